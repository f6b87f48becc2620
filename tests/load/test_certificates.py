"""``authbackend-load certificates`` makes files that TLS clients and ``authbackend`` accept."""

from __future__ import annotations

import ssl
from pathlib import Path

from click.testing import CliRunner, Result
from cryptography import x509

from authbackend.policy_file.devices import read_devices
from authbackend.policy_file.lint import lint
from authbackend.policy_file.read import read
from authbackend_load.cli import main
from authbackend_load.plan import read_identities


def _make(directory: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["certificates", str(directory), "--processes", "2", *options])


def test_every_device_has_a_certificate_of_its_own(tmp_path: Path) -> None:
    assert _make(tmp_path, "--count", "3", "--prefix", "AGV").exit_code == 0
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    keys = set()
    for identity in read_identities(tmp_path):
        file = Path(identity.certificate_file)
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        certificate.verify_directly_issued_by(authority)
        assert certificate.subject.rfc4514_string() == f"CN={identity.device_id}"
        ssl.create_default_context().load_cert_chain(file)
        assert file.stat().st_mode & 0o777 == 0o600
        keys.add(certificate.public_key().public_numbers())
    assert len(keys) == 3
    assert [one.device_id for one in read_identities(tmp_path)] == ["AGV000001", "AGV000002", "AGV000003"]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    assert _make(tmp_path, "--count", "2").exit_code == 0
    before = (tmp_path / "devices/APM000001.pem").read_bytes()
    (tmp_path / "policy.yaml").write_text("# mine\n")
    done = _make(tmp_path, "--count", "3")
    assert "1 certificates written, 2 kept" in done.output
    assert (tmp_path / "devices/APM000001.pem").read_bytes() == before
    assert (tmp_path / "policy.yaml").read_text() == "# mine\n"


def test_no_real_device_type_is_replaced_by_default(tmp_path: Path) -> None:
    assert _make(tmp_path, "--count", "1").exit_code == 0
    document, _ = read((tmp_path / "policy.yaml").read_text(), "policy.yaml")
    assert list(document.device_types or {}) == ["authbackend-load"]
    assert {entry.type for entry in read_devices(tmp_path / "devices.csv")[0].values()} == {"authbackend-load"}


def test_authbackend_takes_the_files(tmp_path: Path) -> None:
    assert _make(tmp_path, "--count", "4", "--revoked", "1", "--type", "CART").exit_code == 0
    document, problems = read((tmp_path / "policy.yaml").read_text(), "policy.yaml")
    document.devices, more = read_devices(tmp_path / "devices.csv")
    assert (problems, more, lint(document)) == ([], [], [])
    assert [(one.type, one.status) for one in document.devices.values()] == [
        *[("CART", "active")] * 3,
        ("CART", "revoked"),
    ]
    assert [one.active for one in read_identities(tmp_path)] == [True, True, True, False]


def test_a_prefix_that_rabbitmq_would_misread_is_refused(tmp_path: Path) -> None:
    done = _make(tmp_path, "--count", "1", "--prefix", "a:b")
    assert done.exit_code == 2
    assert "':' chooses a virtual host" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_authority_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    (tmp_path / "ca.key").write_text("x")
    done = _make(tmp_path, "--count", "1")
    assert done.exit_code == 2
    assert str(tmp_path / "ca.pem") in done.stderr
