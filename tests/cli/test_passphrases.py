"""The keys of root and intermediate have passphrases of their own, from files, the environment or a terminal."""

import os
import pty
import sys

import pytest

from authbackend.pki import signing
from authbackend.pki.ca import AuthorityFolder
from authbackend.pki.files import write_file
from authbackend.pki.parsing import PKIError, read_key
from tests.cli.conftest import PASSPHRASE, ROOT_PASSPHRASE

NOT_SET = {"AUTHBACKEND_CA_PASSPHRASE": "", "AUTHBACKEND_CA_ROOT_PASSPHRASE": ""}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "daily").write_text(PASSPHRASE + "\n")
    (tmp_path / "root").write_text(ROOT_PASSPHRASE + "\r\n")
    (tmp_path / "daily-again").write_text(PASSPHRASE)
    return tmp_path


def opens(folder, passphrase=PASSPHRASE, root_passphrase=ROOT_PASSPHRASE):
    AuthorityFolder.open(folder, passphrase.encode())
    assert read_key((folder / "offline" / "pki-root.key").read_bytes(), root_passphrase.encode())
    with pytest.raises(PKIError):
        read_key((folder / "offline" / "pki-root.key").read_bytes(), passphrase.encode())


def test_each_key_has_a_file(cli, files):
    options = ("--passphrase-file", "daily", "--root-passphrase-file", "root")
    told = cli("ca", "init", "pki", *options, **NOT_SET)
    assert PASSPHRASE not in told.output
    assert ROOT_PASSPHRASE not in told.output
    opens(files / "pki")


def test_each_key_has_a_variable(cli, files):
    cli("ca", "init", "pki")
    opens(files / "pki")


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (("--passphrase-file", "daily", "--root-passphrase-file", "daily"), NOT_SET),
        (("--passphrase-file", "daily", "--root-passphrase-file", "daily-again"), NOT_SET),
        (("--root-passphrase-file", "daily"), {}),
        ((), {"AUTHBACKEND_CA_ROOT_PASSPHRASE": PASSPHRASE}),
    ],
)
def test_equal_ones_are_refused_and_nothing_is_made(cli, files, options, variables):
    refused = cli("ca", "init", "pki", *options, exit_code=2, **variables)
    assert "have the same passphrase" in refused.stderr
    assert PASSPHRASE not in refused.output
    assert not (files / "pki").exists()


def test_without_the_roots_nothing_is_made(cli, files):
    refused = cli("ca", "init", "pki", exit_code=2, AUTHBACKEND_CA_ROOT_PASSPHRASE="")
    assert "no passphrase of the root's key: give --root-passphrase-file FILE" in refused.stderr
    assert "AUTHBACKEND_CA_ROOT_PASSPHRASE" in refused.stderr
    assert not (files / "pki").exists()


def test_the_intermediate_is_renewed_with_the_roots_passphrase(cli, files):
    cli("ca", "init", "pki")
    renewal = ("ca", "renew", "pki", "--root-key", "pki/offline/pki-root.key")
    assert cli(*renewal, "--root-passphrase-file", "root", AUTHBACKEND_CA_ROOT_PASSPHRASE="").stderr == ""
    refused = cli(*renewal, exit_code=2, AUTHBACKEND_CA_ROOT_PASSPHRASE="").stderr
    assert "the passphrase is wrong" in refused
    assert "--root-passphrase-file" in refused


def test_an_authority_of_an_older_version_goes_on_with_one_passphrase_and_says_so(cli, files):
    cli("ca", "init", "pki")
    root_key = files / "pki" / "offline" / "pki-root.key"
    key = read_key(root_key.read_bytes(), ROOT_PASSPHRASE.encode())
    write_file(root_key, signing.key_pem(key, PASSPHRASE.encode()), 0o600)
    cli("ca", "show", "pki")
    told = cli("ca", "renew", "pki", "--root-key", root_key, AUTHBACKEND_CA_ROOT_PASSPHRASE="")
    assert "have the same passphrase" in told.stderr
    assert f"openssl pkcs8 -topk8 -v2 aes-256-cbc -in {root_key}" in told.stderr
    assert "renewed" in told.stdout


def at_a_terminal(folder, answers):
    """Run ``ca init pki`` at a terminal and answer its prompts; return everything shown, and the exit status."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-m", "authbackend", "ca", "init", "pki"], keep)
    shown, left = b"", list(answers)
    answered = 0
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        shown += part
        if left and shown[answered:].rstrip().endswith(b":"):
            answered = len(shown)
            os.write(terminal, left.pop(0).encode() + b"\n")
    os.close(terminal)
    assert not left, shown
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_at_a_terminal_each_is_asked_for_twice(files):
    shown, status = at_a_terminal(files, [PASSPHRASE, PASSPHRASE, ROOT_PASSPHRASE, ROOT_PASSPHRASE])
    assert status == 0
    assert shown.index("passphrase of the authority's key") < shown.index("passphrase of the root's key")
    assert PASSPHRASE not in shown
    assert ROOT_PASSPHRASE not in shown
    opens(files / "pki")


def test_at_a_terminal_equal_ones_are_refused(files):
    shown, status = at_a_terminal(files, [PASSPHRASE] * 4)
    assert status == 2
    assert "have the same passphrase" in shown
    assert not (files / "pki").exists()
