"""deploy/prepare in a copy of the checkout, with the real command line: what it makes, and what it leaves alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization

from authbackend.pki.bench_ca import Authority
from authbackend.pki.parsing import read_certificate, read_certificates, server_names

REPO = Path(__file__).parent.parent.parent
COPIED = ("deploy", "rabbitmq", "sql", "authbackend/sample-fleet.yaml", "docker-compose.yml")


class Checkout:
    """A checkout of its own, with a .venv that runs this checkout's code."""

    def __init__(self, folder, umask=0o022):
        self.folder = folder
        self.secrets = folder / "deploy" / "secrets"
        before = os.umask(umask)
        try:
            for name in COPIED:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if (REPO / name).is_dir():
                    shutil.copytree(
                        REPO / name, folder / name, ignore=shutil.ignore_patterns("secrets"), copy_function=_copy
                    )
                else:
                    _copy(REPO / name, folder / name)
            command = folder / ".venv" / "bin" / "authbackend"
            command.parent.mkdir(parents=True)
        finally:
            os.umask(before)
        command.write_text(f'#!/bin/sh\nPYTHONPATH={REPO} exec {sys.executable} -m authbackend "$@"\n')
        command.chmod(0o755)
        self._umask = umask

    def prepare(self, *arguments, fails=False):
        done = subprocess.run(
            ["deploy/prepare", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            umask=self._umask,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def files(self):
        return {p.relative_to(self.secrets): p.read_bytes() for p in self.secrets.rglob("*") if p.is_file()}


def _copy(source, target):
    """As git writes a file: by the umask, with its executable bits."""
    Path(target).write_bytes(Path(source).read_bytes())
    if os.access(source, os.X_OK):
        mode = Path(target).stat().st_mode
        Path(target).chmod(mode | (mode & 0o444) >> 2)
    return target


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What one run makes; for tests that change nothing of it."""
    checkout = Checkout(tmp_path_factory.mktemp("made") / "checkout")
    checkout.said = checkout.prepare("--revocation", "--server", "mqtt.example.com")
    return checkout


@pytest.fixture
def checkout(made, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(made.folder, tmp_path / "checkout", symlinks=True)
    copy = Checkout.__new__(Checkout)
    copy.folder, copy.secrets, copy._umask = tmp_path / "checkout", tmp_path / "checkout" / "deploy" / "secrets", 0o022
    return copy


def test_devices_and_nodes_are_of_an_authority_that_can_revoke(made):
    authority = read_certificates((made.secrets / "rabbitmq" / "ca.pem").read_bytes())
    assert [str(each.subject.rfc4514_string()) for each in authority] == ["CN=fleet intermediate", "CN=fleet root"]
    for file in ("rabbitmq/rabbitmq.pem", "devices/APM0001.pem"):
        read_certificate((made.secrets / file).read_bytes()).verify_directly_issued_by(authority[0])
    assert server_names((made.secrets / "rabbitmq" / "rabbitmq.pem").read_bytes()) == {
        *("localhost", "127.0.0.1", "::1", "haproxy", "rabbitmq1", "rabbitmq2", "rabbitmq3", "mqtt.example.com")
    }
    channel = read_certificates((made.secrets / "authbackend" / "internal-ca.pem").read_bytes())
    for file in ("authbackend/authbackend.pem", "rabbitmq/broker-client.pem"):
        read_certificate((made.secrets / file).read_bytes()).verify_directly_issued_by(channel[0])


def test_the_keys_of_authorities_are_encrypted_and_in_no_folder_of_a_service(made):
    for key in ("fleet/intermediate.key", "internal/intermediate.key", "offline/fleet-root.key"):
        assert b"ENCRYPTED" in (made.secrets / "pki" / key).read_bytes()
    passphrase = (made.secrets / "ca-passphrase").read_bytes()
    serialization.load_pem_private_key((made.secrets / "pki" / "fleet" / "intermediate.key").read_bytes(), passphrase)
    assert passphrase.decode() not in made.said
    named = {p.name for folder in ("rabbitmq", "authbackend", "devices") for p in (made.secrets / folder).iterdir()}
    assert not {"intermediate.key", "fleet-root.key"} & named
    assert not list((made.secrets / "certificates").glob("*.key"))


def test_a_second_run_changes_nothing(checkout):
    before, environment = checkout.files(), (checkout.folder / ".env").read_text()
    assert "wrote" not in checkout.prepare()
    assert checkout.files() == before
    assert (
        (checkout.folder / ".env").read_text()
        == environment
        == "COMPOSE_PROJECT_NAME=authbackend\nCOMPOSE_PROFILES=revocation\n"
    )


def test_another_server_name_makes_that_certificate_again_and_no_other(checkout):
    before = checkout.files()
    checkout.prepare("--server", "broker.example.com")
    changed = {str(name) for name, content in checkout.files().items() if before.get(name) != content}
    folders = ("pki", "rabbitmq", "certificates")
    assert changed == {f"{f}/rabbitmq.pem" for f in folders} | {
        "pki/rabbitmq.key",
        "rabbitmq/rabbitmq.key",
        "server-names",
        ".placed",
    }
    assert {"broker.example.com", "mqtt.example.com"} <= server_names(
        (checkout.secrets / "rabbitmq" / "rabbitmq.pem").read_bytes()
    )


def foreign(folder, *names):
    """Put files of another authority somewhere; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    other = Authority.create("of the company")
    server, client = other.issue_server(["rabbitmq1"]), other.issue_client("rabbitmq")
    content = {
        "ca.pem": other.certificate_pem,
        "internal-ca.pem": other.certificate_pem,
        "rabbitmq.pem": server.certificate_pem,
        "rabbitmq.key": server.key_pem,
        "broker-client.pem": client.certificate_pem,
        "broker-client.key": client.key_pem,
    }
    for name in names:
        (folder / name).write_bytes(content[name])
    return {name: content[name] for name in names}


ALL_OF_A_NODE = ("ca.pem", "internal-ca.pem", "rabbitmq.pem", "rabbitmq.key", "broker-client.pem", "broker-client.key")


@pytest.mark.parametrize("names", [ALL_OF_A_NODE, ("ca.pem",)])
def test_the_operators_files_are_kept_and_named(checkout, names):
    theirs = foreign(checkout.secrets / "rabbitmq", *names)
    said = checkout.prepare("--server", "one.more.example.com")
    assert {name: (checkout.secrets / "rabbitmq" / name).read_bytes() for name in names} == theirs
    for name in names:
        assert f"kept  deploy/secrets/rabbitmq/{name}, which was not made here" in said


def test_the_operators_files_are_kept_by_the_first_run_too(tmp_path):
    checkout = Checkout(tmp_path / "checkout")
    theirs = foreign(checkout.secrets / "rabbitmq", *ALL_OF_A_NODE)
    checkout.prepare()
    assert {name: (checkout.secrets / "rabbitmq" / name).read_bytes() for name in ALL_OF_A_NODE} == theirs


def test_a_certificate_without_its_key_is_refused_with_words_and_nothing_is_put_anywhere(checkout):
    foreign(checkout.secrets / "rabbitmq", "rabbitmq.pem")
    before = checkout.files()
    (checkout.secrets / "devices" / "ca.pem").unlink()
    said = checkout.prepare(fails=True)
    assert "rabbitmq/rabbitmq.pem was not made here, but rabbitmq.key beside it was, or is missing" in said
    assert not (checkout.secrets / "devices" / "ca.pem").exists()
    assert checkout.files() == {name: content for name, content in before.items() if str(name) != "devices/ca.pem"}


def test_a_certificate_of_another_authority_in_pki_is_refused_with_words(checkout):
    theirs = foreign(checkout.secrets / "pki", "rabbitmq.pem", "rabbitmq.key")
    assert "pki/rabbitmq.pem was not issued by authority fleet and is left as it is" in checkout.prepare(fails=True)
    assert (checkout.secrets / "pki" / "rabbitmq.pem").read_bytes() == theirs["rabbitmq.pem"]


def test_a_name_that_would_overwrite_another_file_is_refused_before_anything_is_made(tmp_path):
    checkout = Checkout(tmp_path / "checkout")
    assert "another file has this name" in checkout.prepare("--device", "rabbitmq", fails=True)
    assert "letters, digits" in checkout.prepare("--device", "../x", fails=True)
    assert not checkout.secrets.exists()


def test_another_profile_in_env_is_not_replaced_in_silence(tmp_path):
    checkout = Checkout(tmp_path / "checkout")
    (checkout.folder / ".env").write_text("COMPOSE_PROFILES=tools\n")
    assert "add revocation to COMPOSE_PROFILES" in checkout.prepare("--revocation", fails=True)
    assert not (checkout.secrets / "rabbitmq" / "revocation").exists()
    (checkout.folder / ".env").write_text("COMPOSE_PROFILES=tools,revocation\n")
    checkout.prepare("--revocation")
    assert (checkout.secrets / "rabbitmq" / "revocation").exists()


def test_containers_can_read_what_is_mounted_whatever_the_umask(tmp_path):
    """Their users are nobody on this host; a checkout with umask 027 keeps its files from them."""
    checkout = Checkout(tmp_path / "checkout", umask=0o027)
    assert (checkout.folder / "deploy" / "enforcer.yaml").stat().st_mode & 0o004 == 0
    checkout.prepare("--revocation")
    project = yaml.safe_load((checkout.folder / "docker-compose.yml").read_text(encoding="utf-8"))
    for name, service in project["services"].items():
        if name.startswith("rabbitmq"):
            continue  # reads as root, with DAC_OVERRIDE
        mounts = [checkout.folder / volume.split(":")[0] for volume in service.get("volumes", ()) if volume[0] == "."]
        mounts += [checkout.folder / project["secrets"][each]["file"] for each in service.get("secrets", ())]
        for mount in mounts:
            for path in [mount, *mount.rglob("*")]:
                wanted = 0o005 if path.is_dir() or path.name == "database-roles" else 0o004
                assert path.stat().st_mode & wanted == wanted, f"{name}: {path}"
    assert checkout.secrets.stat().st_mode & 0o777 == 0o700
