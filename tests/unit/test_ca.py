"""The authority in a folder: the files it creates, what it signs, and what it refuses to sign."""

import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from authbackend.pki import signing
from authbackend.pki.bundle import blocks, read_record
from authbackend.pki.ca import AuthorityFolder, create_authority, renew_intermediate
from authbackend.pki.parsing import (
    PKIError,
    new_key,
    read_certificate,
    read_key,
    read_request,
    record_of,
    usable_key,
)
from tests.support.clock import set_time_of_day

PASSPHRASE, OF_ROOT = b"correct horse battery", b"staple in a vault"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ca") / "fleet"
    create_authority(made, "fleet", PASSPHRASE, OF_ROOT, root_folder=made.parent / "offline")
    return made


@pytest.fixture(scope="module")
def authority(folder):
    return AuthorityFolder.open(folder, PASSPHRASE)


def request(name="APM0001", key=None, **changes):
    """Return a device's certificate request; ``changes`` may be extensions."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        changes.get("subject") or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    for extension in changes.get("extensions", ()):
        builder = builder.add_extension(extension, critical=True)
    key = key or ec.generate_private_key(ec.SECP256R1())
    signature = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, signature).public_bytes(serialization.Encoding.PEM)


# --- the folder ----------------------------------------------------------------------------------------------------


def test_keys_are_encrypted_and_for_their_owner_alone(folder):
    keys = [folder / "intermediate.key", folder.parent / "offline" / "fleet-root.key"]
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in key.read_bytes()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.glob("*root*.key")), "the root's key is not beside what signs"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_accepts_the_chain(folder, authority, tmp_path):
    key = new_key("ec-p256").public_key()
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(authority.sign("APM0001", key, authority.profiles["device"], now=datetime.now(UTC)).chain_pem)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", folder / "root.pem"]
    done = subprocess.run([*command, "-untrusted", leaf, leaf], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "passphrase", "fault"),
    [
        ("fleet", b"short", "at least 12 characters"),
        ("a/b", PASSPHRASE, "letters, digits"),
        ("", PASSPHRASE, "letters, digits"),
        ("x" * 49, PASSPHRASE, "letters, digits"),
    ],
)
def test_what_makes_no_safe_authority_makes_none(tmp_path, name, passphrase, fault):
    with pytest.raises(PKIError, match=fault):
        create_authority(tmp_path / "ca", name, passphrase, OF_ROOT, root_folder=tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_root_and_intermediate_have_different_passphrases(tmp_path):
    with pytest.raises(PKIError, match="have the same passphrase") as refused:
        create_authority(tmp_path / "ca", "fleet", PASSPHRASE, PASSPHRASE, root_folder=tmp_path / "root")
    assert PASSPHRASE.decode() not in str(refused.value)
    with pytest.raises(PKIError, match="at least 12 characters"):
        create_authority(tmp_path / "ca", "fleet", PASSPHRASE, b"short", root_folder=tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_the_passphrase_of_every_day_does_not_open_the_roots_key(folder):
    root_key = (folder.parent / "offline" / "fleet-root.key").read_bytes()
    with pytest.raises(PKIError, match="the passphrase is wrong"):
        read_key(root_key, PASSPHRASE)
    assert read_key(root_key, OF_ROOT)
    with pytest.raises(PKIError, match="the passphrase is wrong"):
        AuthorityFolder.open(folder, OF_ROOT)


def test_an_authority_is_never_overwritten(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PKIError, match="never overwritten"):
        create_authority(folder, "other", PASSPHRASE, OF_ROOT, root_folder=tmp_path)
    with pytest.raises(PKIError, match="never overwritten"):
        create_authority(tmp_path / "new", "fleet", PASSPHRASE, OF_ROOT, root_folder=folder.parent / "offline")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_passphrase_is_told_and_not_shown(folder):
    with pytest.raises(PKIError, match="the passphrase is wrong") as refused:
        AuthorityFolder.open(folder, b"hunter2-hunter2")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("authority.toml", "name = ", "is not TOML"),
        ("authority.toml", 'name = "a"\nnmae = 1', "unknown: nmae"),
        ("authority.toml", 'name = "a"\n[profiles.device]\nlifetime_days = 0', "lifetime_days"),
        ("authority.toml", 'name = "a"\n[profiles.device]\nkey = "rsa-1024"', "key must be one of"),
        ("authority.toml", 'name = "a"\n[profiles.x]\npurpose = "both"', "client or server"),
        ("authority.toml", 'name = "a"\n[profiles.x]\nlifetime = 3', "unknown: lifetime"),
        ("intermediate.pem", "nothing", "not a readable PEM certificate"),
        ("root.pem", None, "No such file"),
        ("intermediate.key", "nothing", "intermediate.key"),
    ],
)
def test_a_folder_that_does_not_fit_is_not_taken_up(folder, tmp_path, file, text, fault):
    copy = tmp_path / "ca"
    shutil.copytree(folder, copy)
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text)
    with pytest.raises(PKIError, match=fault):
        AuthorityFolder.open(copy, PASSPHRASE)


def test_files_of_different_authorities_do_not_make_one(folder, tmp_path):
    other = tmp_path / "other"
    create_authority(other, "fleet", PASSPHRASE, OF_ROOT, root_folder=tmp_path / "offline")
    shutil.copy(folder / "intermediate.key", other / "intermediate.key")
    with pytest.raises(PKIError, match="is not the key of"):
        AuthorityFolder.open(other, PASSPHRASE)
    shutil.copy(folder / "intermediate.pem", other / "intermediate.pem")
    with pytest.raises(PKIError, match=r"signed by root\.pem"):
        AuthorityFolder.open(other, PASSPHRASE)


def test_profiles_can_be_changed_and_added(folder, tmp_path):
    copy = tmp_path / "ca"
    shutil.copytree(folder, copy)
    text = '[profiles.device]\nlifetime_days = 90\n[profiles.old]\nkey = "rsa-3072"\n'
    with (copy / "authority.toml").open("a") as file:
        file.write(text)
    opened = AuthorityFolder.open(copy, PASSPHRASE)
    assert opened.profile("device", "client").lifetime == timedelta(days=90)
    assert opened.profile("old", "client").key == "rsa-3072"
    with pytest.raises(PKIError, match="use one of device, device-rsa, old, service"):
        opened.profile("server", "client")


def test_a_renewed_intermediate_keeps_everything_valid(folder, tmp_path):
    copy = tmp_path / "ca"
    shutil.copytree(folder, copy)
    old = AuthorityFolder.open(copy, PASSPHRASE)
    leaf = old.sign("APM0001", new_key("ec-p256").public_key(), old.profiles["device"], now=datetime.now(UTC))
    with pytest.raises(PKIError, match="is not the key of"):
        renew_intermediate(copy, copy / "intermediate.key", PASSPHRASE)
    renew_intermediate(copy, folder.parent / "offline" / "fleet-root.key", OF_ROOT)
    new = AuthorityFolder.open(copy, PASSPHRASE)
    assert (new.subject, new.certificate.public_key()) == (old.subject, old.certificate.public_key())
    assert new.certificate.serial_number != old.certificate.serial_number
    read_certificate(leaf.certificate_pem).verify_directly_issued_by(new.certificate)
    assert read_certificate((copy / "ca.pem").read_bytes()) == new.certificate


@pytest.mark.parametrize("days", [0, 400])
def test_a_renewed_intermediate_never_begins_in_the_future(folder, tmp_path, monkeypatch, days):
    """On the machine with the root's key, the only clock is its own, and it may be fast."""
    copy = tmp_path / "ca"
    shutil.copytree(folder, copy)
    old = read_certificate((copy / "intermediate.pem").read_bytes())
    set_time_of_day(monkeypatch, timedelta(days=days))
    renew_intermediate(copy, folder.parent / "offline" / "fleet-root.key", OF_ROOT)
    renewed = read_certificate((copy / "intermediate.pem").read_bytes())
    assert renewed.not_valid_before_utc == old.not_valid_before_utc
    assert renewed.not_valid_after_utc > old.not_valid_after_utc


def test_an_intermediate_is_not_renewed_to_an_earlier_end(folder, tmp_path, monkeypatch):
    copy = tmp_path / "ca"
    shutil.copytree(folder, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    set_time_of_day(monkeypatch, timedelta(days=-400))
    with pytest.raises(PKIError, match="the clock of this machine is behind"):
        renew_intermediate(copy, folder.parent / "offline" / "fleet-root.key", OF_ROOT)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


# --- what it signs -------------------------------------------------------------------------------------------------


def test_a_device_gets_a_client_certificate_for_its_name_alone(authority):
    key = new_key("ec-p256").public_key()
    signed = authority.sign("APM0001", key, authority.profiles["device"], ["APM0001"], now=datetime.now(UTC))
    certificate = read_certificate(signed.certificate_pem)
    assert record_of(certificate) == signed.record
    assert (signed.record.subject, signed.record.issuer) == ("CN=APM0001", "CN=fleet intermediate")
    extensions = certificate.extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["APM0001"]
    assert certificate.serial_number.bit_length() > 100
    assert timedelta(days=397) < certificate.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=398)
    assert not signed.shortened


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("/:APM0001", '":" is not possible'),
        ("APM0001,APM0002", '"," is not possible'),
        (" APM0001", "white space"),
        ("APM\x01", "control character"),
        ("", "empty"),
        ("x" * 65, "at most 64"),
    ],
)
def test_no_name_is_signed_that_rabbitmq_could_take_for_another(authority, name, fault):
    with pytest.raises(PKIError, match=fault):
        authority.sign(name, new_key("ec-p256").public_key(), authority.profiles["device"], now=datetime.now(UTC))


@pytest.mark.parametrize(("days", "fault"), [(-400, "is not valid before"), (6 * 365, "expired on")])
def test_nothing_is_signed_outside_of_the_authoritys_own_time(authority, days, fault):
    with pytest.raises(PKIError, match=fault):
        authority.sign(
            "D1",
            new_key("ec-p256").public_key(),
            authority.profiles["device"],
            now=datetime.now(UTC) + timedelta(days=days),
        )


def test_nothing_outlives_its_authority(folder, tmp_path):
    copy = tmp_path / "ca"
    shutil.copytree(folder, copy)
    with (copy / "authority.toml").open("a") as file:
        file.write("[profiles.device]\nlifetime_days = 36500\n")
    opened = AuthorityFolder.open(copy, PASSPHRASE)
    signed = opened.sign("APM0001", new_key("ec-p256").public_key(), opened.profiles["device"], now=datetime.now(UTC))
    assert signed.record.not_after == opened.not_after
    assert signed.shortened


# --- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ec-p256", "ec-p384", "rsa-2048"])
def test_a_request_gives_name_and_key_and_nothing_else(kind):
    key = new_key(kind)
    asks = [x509.BasicConstraints(ca=True, path_length=None)]
    assert read_request(request(key=key, extensions=asks)) == ("APM0001", key.public_key())


def forged():
    der = bytearray(x509.load_pem_x509_csr(request()).public_bytes(serialization.Encoding.DER))
    der[bytes(der).index(b"APM0001") + 6] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


TWO = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("APM0001", "APM0002")])
NONE = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme")])


@pytest.mark.parametrize(
    ("pem", "fault"),
    [
        (b"nonsense", "not a readable certificate request"),
        (forged(), "signature is wrong"),
        (request(subject=TWO), "2 common names"),
        (request(subject=NONE), "0 common names"),
        (request(key=rsa.generate_private_key(65537, 1024)), "RSA of 2048"),
        (request(key=ec.generate_private_key(ec.SECP192R1())), "EC P-256"),
        (request(key=ed25519.Ed25519PrivateKey.generate()), "EC P-256"),
    ],
)
def test_a_request_that_proves_nothing_or_is_weak_is_refused(pem, fault):
    with pytest.raises(PKIError, match=fault):
        read_request(pem)


def test_a_key_with_a_small_exponent_is_weak():
    with pytest.raises(PKIError):
        usable_key(rsa.generate_private_key(3, 2048).public_key(), "it")


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_one_by_one_whatever_is_between(authority):
    key = new_key("ec-p256").public_key()
    pems = [
        authority.sign(f"D{n}", key, authority.profiles["device"], now=datetime.now(UTC)).certificate_pem
        for n in range(3)
    ]
    text = b"subject=CN=D0\r\n" + pems[0].replace(b"\n", b"\r\n") + b"\n# junk\n" + pems[1] + pems[2].rstrip()
    parsed = list(blocks(text.splitlines(keepends=True)))
    assert [read_record(block.der)[0] for block in parsed] == [record_of(read_certificate(pem)) for pem in pems]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([b"-----BEGIN CERTIFICATE-----\n", b"MIIB\n"], "no END line: the file ends"),
        ([b"-----BEGIN CERTIFICATE-----\n", *[b"A" * 64 + b"\n"] * 2000], "longer than 64 KiB"),
    ],
)
def test_a_stream_that_never_ends_a_certificate_is_refused(lines, fault):
    (parsed,) = blocks(lines)
    assert parsed.der is None
    assert fault in parsed.fault


def test_two_common_names_are_kept_as_rabbitmq_joins_them():
    key = new_key("ec-p256")
    certificate = signing.sign_leaf(
        TWO,
        key.public_key(),
        issuer=NONE,
        key=key,
        valid=signing.validity(None, None, timedelta(days=1)),
        usage=ExtendedKeyUsageOID.CLIENT_AUTH,
        alternative=[],
    )
    record = record_of(certificate)
    assert record.common_name == "APM0001,APM0002"
    assert record.issuer == "O=Acme"
    assert len(record.fingerprint) == 64
    assert int(record.serial, 16) == certificate.serial_number
