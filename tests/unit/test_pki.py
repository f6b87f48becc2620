"""
The bench authority: certificates that RabbitMQ and TLS accept, safe files, and a command that can be repeated.
"""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from authbackend.cli.certs import certs
from authbackend.pki.bench_ca import Authority, Issued, PKIError, read_certificate, server_names
from authbackend.pki.bench_certificates import SERVICE_NAMES, device_name_fault, make_certificates

AUTHORITY = Authority.create("test CA")


def verify_client(authority: Authority, issued: Issued) -> list[x509.GeneralName]:
    """Verify a client certificate as a TLS server does; return its alternative names."""
    store = Store([read_certificate(authority.certificate_pem)])
    verifier = PolicyBuilder().store(store).build_client_verifier()
    return list(verifier.verify(read_certificate(issued.certificate_pem), []).subjects or [])


def verify_server(authority: Authority, issued: Issued, name: str) -> None:
    """Verify a server certificate as a TLS client does that connects to ``name``."""
    store = Store([read_certificate(authority.certificate_pem)])
    verifier = PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name))
    verifier.verify(read_certificate(issued.certificate_pem), [])


def test_a_client_certificate_identifies_by_common_name_and_dns_name() -> None:
    """The subject is only the common name, which is also the DNS alternative name."""
    issued = AUTHORITY.issue_client("APM0001")
    assert verify_client(AUTHORITY, issued) == [x509.DNSName("APM0001")]
    assert read_certificate(issued.certificate_pem).subject.rfc4514_string() == "CN=APM0001"


def test_a_client_certificate_is_no_server_and_no_authority() -> None:
    """Its key usages are those of a client, so it can neither pose as the broker nor sign other certificates."""
    certificate = read_certificate(AUTHORITY.issue_client("localhost").certificate_pem)
    with pytest.raises(VerificationError):
        verify_server(AUTHORITY, AUTHORITY.issue_client("localhost"), "localhost")
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_a_server_certificate_is_good_for_its_names_only() -> None:
    """Names are normalised, addresses are IP addresses, and no other name is included."""
    issued = AUTHORITY.issue_server(["RabbitMQ", "127.0.0.1", "0:0::1", "*.example.org"])
    assert server_names(issued.certificate_pem) == {"rabbitmq", "127.0.0.1", "::1", "*.example.org"}
    verify_server(AUTHORITY, issued, "rabbitmq")
    with pytest.raises(VerificationError):
        verify_server(AUTHORITY, issued, "localhost")
    with pytest.raises(VerificationError):
        verify_client(AUTHORITY, issued)


@pytest.mark.parametrize("names", [[], [""], ["https://broker"], ["broker:8883"], ["a b"], ["x" * 64 + ".org"]])
def test_a_server_name_must_be_one(names: list[str]) -> None:
    """A URL, a port or an empty name is refused."""
    with pytest.raises(PKIError):
        AUTHORITY.issue_server(names)


@pytest.mark.parametrize("name", ["/:APM0001", "nosuch:APM0001", "a,b", "APM 1", "ünï", "#"])
def test_tests_can_have_odd_names(name: str) -> None:
    """The class accepts any common name; the command does not."""
    certificate = read_certificate(AUTHORITY.issue_client(name).certificate_pem)
    (attribute,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert attribute.value == name
    assert name == "ünï" or device_name_fault(name)


def test_tests_can_have_two_common_names() -> None:
    """RabbitMQ joins them with a comma."""
    certificate = read_certificate(AUTHORITY.issue_client("A", more_common_names=["B"]).certificate_pem)
    assert [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [
        "A",
        "B",
    ]


@pytest.mark.parametrize(("begins", "ends"), [(-2, -1), (1, 2)], ids=["expired", "not yet"])
def test_tests_can_have_certificates_out_of_their_time(begins: int, ends: int) -> None:
    """Both ends of the validity can be chosen, and verification fails outside it."""
    now = datetime.now(UTC).replace(microsecond=0)
    begin, end = now + timedelta(days=begins), now + timedelta(days=ends)
    issued = AUTHORITY.issue_client("APM0001", not_before=begin, not_after=end)
    certificate = read_certificate(issued.certificate_pem)
    assert certificate.not_valid_before_utc == begin
    assert certificate.not_valid_after_utc == end
    with pytest.raises(VerificationError):
        verify_client(AUTHORITY, issued)


def test_an_end_in_the_past_needs_no_beginning() -> None:
    """``not_after`` alone makes an expired certificate."""
    ended = datetime.now(UTC) - timedelta(days=1)
    certificate = read_certificate(AUTHORITY.issue_client("A", not_after=ended).certificate_pem)
    assert certificate.not_valid_before_utc < certificate.not_valid_after_utc < datetime.now(UTC)


def test_an_authority_knows_its_own() -> None:
    """By the signature, not by the name."""
    other = Authority.create("test CA")
    assert AUTHORITY.issued(AUTHORITY.issue_client("A").certificate_pem)
    assert not AUTHORITY.issued(other.issue_client("A").certificate_pem)
    again = Authority.load(AUTHORITY.certificate_pem, AUTHORITY.key_pem)
    assert again.issued(AUTHORITY.issue_client("A").certificate_pem)


@pytest.mark.parametrize("case", ["not PEM", "another key", "no authority"])
def test_loading_says_what_is_wrong(case: str) -> None:
    """A pair that cannot sign is refused when it is loaded."""
    leaf = AUTHORITY.issue_client("A")
    certificate, key = {
        "not PEM": (b"", b""),
        "another key": (AUTHORITY.certificate_pem, leaf.key_pem),
        "no authority": (leaf.certificate_pem, leaf.key_pem),
    }[case]
    with pytest.raises(PKIError, match={"not PEM": "PEM", "another key": "belong", "no authority": "CA"}[case]):
        Authority.load(certificate, key)


def written(directory: Path, **options: list[str]) -> dict[str, bool]:
    """Run make_certificates and return which pairs were written (True) or kept (False)."""
    return {outcome.name: outcome.written for outcome in make_certificates(directory, **options)}


def pair(directory: Path, name: str) -> Issued:
    """Read a pair of files."""
    return Issued((directory / f"{name}.pem").read_bytes(), (directory / f"{name}.key").read_bytes())


def authority(directory: Path, name: str) -> Authority:
    """Read an authority's pair of files."""
    files = pair(directory, name)
    return Authority.load(files.certificate_pem, files.key_pem)


BASE = ["ca", "internal-ca", "rabbitmq", "authbackend", "broker-client"]


def test_one_call_makes_everything(tmp_path: Path) -> None:
    """Keys are private, servers have their names, and each certificate is from the right authority."""
    assert written(tmp_path / "new", devices=["APM0001"]) == dict.fromkeys([*BASE, "APM0001"], True)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {".pem": 0o644, ".key": 0o600}
    public, internal = authority(tmp_path / "new", "ca"), authority(tmp_path / "new", "internal-ca")
    verify_server(public, pair(tmp_path / "new", "rabbitmq"), "localhost")
    verify_server(internal, pair(tmp_path / "new", "authbackend"), "authbackend")
    verify_client(public, pair(tmp_path / "new", "APM0001"))
    verify_client(internal, pair(tmp_path / "new", "broker-client"))


def test_a_device_has_no_key_to_the_internal_channel(tmp_path: Path) -> None:
    """Neither does the service's server certificate: only the broker's client certificate gives access."""
    written(tmp_path, devices=["APM0001"])
    for name in ("APM0001", "rabbitmq", "authbackend"):
        with pytest.raises(VerificationError):
            verify_client(authority(tmp_path, "internal-ca"), pair(tmp_path, name))


def test_a_second_call_keeps_what_is_there(tmp_path: Path) -> None:
    """Including a server certificate for names other than the default, if no names are given."""
    written(tmp_path, devices=["A"], servers=["broker.example.org"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert written(tmp_path, devices=["A", "B"]) == dict.fromkeys([*BASE, "A"], False) | {"B": True}
    assert {path: path.read_bytes() for path in before} == before


def test_a_server_certificate_follows_the_names_asked_for(tmp_path: Path) -> None:
    """It is kept if the same names are given in another order or spelling."""
    written(tmp_path, servers=["a.example", "::1"])
    assert not written(tmp_path, servers=["0::1", "A.example"])["rabbitmq"]
    changed = written(tmp_path, servers=["b.example"])
    assert changed == dict.fromkeys(BASE, False) | {"rabbitmq": True}
    assert server_names(pair(tmp_path, "rabbitmq").certificate_pem) == {"b.example"}


def test_servers_follow_a_new_authority_and_devices_are_reported(tmp_path: Path) -> None:
    """
    A server certificate would no longer work, so it is replaced with the same names; a device's key is never replaced.
    """
    written(tmp_path, devices=["A"], servers=["b.example"])
    for name in ("ca", "internal-ca"):
        (tmp_path / f"{name}.pem").unlink()
        (tmp_path / f"{name}.key").unlink()
    outcomes = {outcome.name: outcome for outcome in make_certificates(tmp_path, devices=["A"])}
    assert {name for name, outcome in outcomes.items() if outcome.written} == set(BASE)
    assert "unusable" in outcomes["A"].note
    assert server_names(pair(tmp_path, "rabbitmq").certificate_pem) == {"b.example"}
    assert server_names(pair(tmp_path, "authbackend").certificate_pem) == set(SERVICE_NAMES)


def test_servers_are_renewed_before_they_end(tmp_path: Path) -> None:
    """In the last 30 days."""
    written(tmp_path)
    soon = datetime.now(UTC) + timedelta(days=20)
    issued = authority(tmp_path, "internal-ca").issue_server(SERVICE_NAMES, not_after=soon)
    (tmp_path / "authbackend.pem").write_bytes(issued.certificate_pem)
    (tmp_path / "authbackend.key").write_bytes(issued.key_pem)
    assert written(tmp_path) == dict.fromkeys(BASE, False) | {"authbackend": True}


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a:b", "a,b", "a b", "a.b", "x" * 65, "ca", "CA", "rabbitmq"])
def test_bad_device_names_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    """A name is also a file name and a topic level, and must not be that of another file."""
    result = CliRunner().invoke(certs, [str(tmp_path / "new"), "--device", "good", "--device", name])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: device name {name!r}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("missing", "there"), [("ca.key", "ca.pem"), ("rabbitmq.pem", "rabbitmq.key")])
def test_half_a_pair_is_an_error_that_names_both_files(tmp_path: Path, missing: str, there: str) -> None:
    """Replacing half of an authority by a new one would cut off every device."""
    written(tmp_path)
    (tmp_path / missing).unlink()
    result = CliRunner().invoke(certs, [str(tmp_path)])
    assert result.exit_code == 1
    assert f"{tmp_path / missing} is missing, but {tmp_path / there} is there" in result.output


def test_the_command_says_what_it_did_and_what_goes_where(tmp_path: Path) -> None:
    """The first run writes everything, the second keeps it."""
    directory = tmp_path / "certs"
    first = CliRunner().invoke(certs, [str(directory), "--device", "APM0001", "--server", "broker"])
    assert first.exit_code == 0
    assert f"wrote {directory / 'APM0001'}.pem .key" in first.output
    assert f"AUTHBACKEND_BROKER__TLS__CERTIFICATE_FILE={directory / 'authbackend.pem'}" in first.output
    second = CliRunner().invoke(certs, [str(directory), "--device", "APM0001"])
    assert f"kept  {directory / 'APM0001'}.pem .key" in second.output
    assert "wrote" not in second.output
