"""Certificates on the command line: authority, enrollment, import, revocation and revocation lists."""

import csv
import json
import ssl
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from authbackend.pki import signing
from authbackend.pki.crl import CrlEntry, entries_of, sign_list
from authbackend.pki.parsing import new_key, read_certificate, read_certificates, read_key, server_names
from tests.cli.conftest import PASSPHRASE

KEY = new_key("ec-p256")


def request(name, key=KEY):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def as_json(result):
    return json.loads(result.stdout)


def listed(execute, name="fleet"):
    """Return the serial numbers on the published list, with their reasons."""
    (row,) = execute("select der from crl where authority = $1", name)
    return {entry.serial: entry.reason for entry in entries_of(row["der"])}


# --- an authority --------------------------------------------------------------------------------------------------


def test_two_commands_make_an_authority_and_a_server(cli, tmp_path):
    made = cli("ca", "init", "pki", "--name", "fleet")
    assert "Take it offline now" in made.stdout
    assert PASSPHRASE not in made.output
    served = cli("ca", "issue-server", "pki", "--name", "RabbitMQ.example", "--name", "127.0.0.1", "--out", "rabbitmq")
    assert "wrote rabbitmq.key rabbitmq.pem" in served.stdout
    chain = read_certificates((tmp_path / "rabbitmq.pem").read_bytes())
    assert server_names((tmp_path / "rabbitmq.pem").read_bytes()) == {"rabbitmq.example", "127.0.0.1"}
    assert chain[1] == read_certificate((tmp_path / "pki" / "intermediate.pem").read_bytes())
    assert read_key((tmp_path / "rabbitmq.key").read_bytes()).public_key() == chain[0].public_key()
    assert (tmp_path / "rabbitmq.key").stat().st_mode & 0o777 == 0o600
    assert "CN=rabbitmq.example" in cli("cert", "show", as_json(cli("cert", "list", "--json"))[0]["serial"]).stdout
    assert "profile device: client 398 ec-p256" in cli("ca", "show", "pki").stdout


def test_without_a_passphrase_nothing_is_made(cli, tmp_path):
    refused = cli("ca", "init", "pki", exit_code=2, AUTHBACKEND_CA_PASSPHRASE="")
    assert "--passphrase-file FILE or set AUTHBACKEND_CA_PASSPHRASE" in refused.stderr
    assert not (tmp_path / "pki").exists()
    (tmp_path / "secret").write_text(PASSPHRASE + "\n")
    cli("ca", "init", "pki", "--passphrase-file", "secret", AUTHBACKEND_CA_PASSPHRASE="")
    cli("ca", "show", "pki")


def test_a_passphrase_can_be_in_a_file_that_the_environment_names(cli, tmp_path):
    (tmp_path / "secret").write_text(PASSPHRASE + "\n")
    elsewhere = {"AUTHBACKEND_CA_PASSPHRASE": "", "AUTHBACKEND_CA_PASSPHRASE_FILE": str(tmp_path / "secret")}
    cli("ca", "init", "pki", **elsewhere)
    cli("ca", "show", "pki")
    (tmp_path / "secret").write_text("another one, 12 characters")
    assert "passphrase" in cli("ca", "show", "pki", exit_code=2, **elsewhere).stderr


KEPT = ("--out", "server", "--keep", "--offline")


def test_a_certificate_that_serves_is_kept_and_one_for_other_names_made_again(cli, ca, tmp_path):
    pem, key = tmp_path / "server.pem", tmp_path / "server.key"
    cli("ca", "issue-server", ca, "--name", "a.example", "--name", "::1", *KEPT)
    first = pem.read_bytes(), key.read_bytes()
    assert (
        "kept server.key server.pem"
        in cli("ca", "issue-server", ca, "--name", "::1", "--name", "a.example", *KEPT).stdout
    )
    assert "kept" in cli("ca", "issue-server", ca, "--name", "A.example", "--name", "0:0::1", *KEPT).stdout
    assert (pem.read_bytes(), key.read_bytes()) == first
    assert "wrote server.key server.pem" in cli("ca", "issue-server", ca, "--name", "a.example", *KEPT).stdout
    assert server_names(pem.read_bytes()) == {"a.example"}
    cli("ca", "issue-client", ca, "--name", "someone", *KEPT)
    assert server_names(pem.read_bytes()) == frozenset()


def test_a_certificate_that_ends_soon_is_made_again(cli, ca):
    with (ca / "authority.toml").open("a") as file:
        file.write("[profiles.server]\nlifetime_days = 29\n")
    for _ in range(2):
        assert "wrote" in cli("ca", "issue-server", ca, "--name", "a.example", *KEPT).stdout
    (ca / "authority.toml").write_text('name = "fleet"\n')
    assert "wrote" in cli("ca", "issue-server", ca, "--name", "a.example", *KEPT).stdout
    assert "kept" in cli("ca", "issue-server", ca, "--name", "a.example", *KEPT).stdout


def test_what_another_authority_signed_is_never_replaced(cli, ca, tmp_path):
    cli("ca", "init", "other")
    cli("ca", "issue-server", "other", "--name", "a.example", "--out", "server", "--offline")
    before = (tmp_path / "server.pem").read_bytes()
    refused = cli("ca", "issue-server", ca, "--name", "b.example", *KEPT, exit_code=2).stderr
    assert "server.pem was not issued by authority fleet and is left as it is" in refused
    (tmp_path / "server.key").unlink()
    assert "server.key is missing" in cli("ca", "issue-server", ca, "--name", "b.example", *KEPT, exit_code=2).stderr
    assert (tmp_path / "server.pem").read_bytes() == before


def test_a_server_can_be_issued_without_a_database_and_put_on_record_later(cli, ca, tmp_path):
    asked = ("ca", "issue-server", ca, "--name", "rabbitmq", "--out", "server")
    assert "--offline" in cli(*asked, exit_code=2, AUTHBACKEND_DATABASE__DSN=None).stderr
    assert not (tmp_path / "server.pem").exists()
    cli(*asked, "--offline", AUTHBACKEND_DATABASE__DSN=None)
    assert "1 new, 0 already on record, 1 of authorities skipped" in cli("cert", "import", "server.pem").stdout


def test_nothing_is_overwritten(cli, ca, tmp_path):
    (tmp_path / "server.key").write_text("precious")
    refused = cli("ca", "issue-server", ca, "--name", "rabbitmq", "--out", "server", exit_code=2)
    assert "server.key already exists" in refused.stderr
    assert (tmp_path / "server.key").read_text() == "precious"
    assert as_json(cli("cert", "list", "--json")) == []


def test_a_server_is_renewed_with_its_names_and_a_new_key(cli, ca, tmp_path):
    cli("ca", "issue-server", ca, "--name", "rabbitmq", "--name", "::1", "--out", "server")
    before = (tmp_path / "server.pem").read_bytes()
    cli("ca", "renew", ca, "--server", "server.pem")
    after = (tmp_path / "server.pem").read_bytes()
    assert server_names(after) == server_names(before) == {"rabbitmq", "::1"}
    assert read_certificate(after).public_key() != read_certificate(before).public_key()
    assert len(as_json(cli("cert", "list", "--json"))) == 2


def test_the_intermediate_is_renewed_and_known_to_the_database(cli, ca, execute):
    cli("crl", "sign", ca)
    before = execute("select certificate_pem from authority")
    assert "nothing to renew: " in cli("ca", "renew", ca, exit_code=2).stderr
    cli("ca", "renew", ca, "--root-key", ca.parent / "offline" / "fleet-root.key")
    cli("crl", "sign", ca)
    assert execute("select certificate_pem from authority") != before


def test_a_client_of_an_account_gets_a_certificate_and_a_device_does_not_this_way(cli, ca, fleet, tmp_path):
    cli("ca", "issue-client", ca, "--name", "backend")
    usages = read_certificate((tmp_path / "backend.pem").read_bytes()).extensions
    assert list(usages.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert "authbackend device enroll" in cli("ca", "issue-client", ca, "--name", "two", exit_code=2).stderr
    assert not (tmp_path / "two.pem").exists()


# --- devices -------------------------------------------------------------------------------------------------------


def test_a_device_is_enrolled_by_its_request_and_is_on_record(cli, ca, fleet, execute, tmp_path):
    (tmp_path / "D2.csr").write_bytes(request("two"))
    cli("device", "enroll", "D2", "--ca", ca, "--csr", "D2.csr")
    certificate = read_certificate((tmp_path / "D2.pem").read_bytes())
    assert certificate.public_key() == KEY.public_key()
    assert not (tmp_path / "D2.key").exists()
    (row,) = execute("select * from certificate")
    assert (row["device_id"], row["common_name"], row["state"]) == ("D2", "two", "active")
    assert row["fingerprint"] == certificate.fingerprint(hashes.SHA256()).hex()
    (told,) = execute("select claimed_by, entity from audit where entity = 'certificate'")
    assert told["claimed_by"] == "alice"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("D1", "--csr", "two.csr"), "the request is for the common name 'two', the device's is 'D1'"),
        (("D9", "--csr", "two.csr"), "no device has the id 'D9'"),
        (("D9", "--generate", "--type", "nosuch"), "there is no such device type"),
        (("D1", "--generate", "--type", "Other"), "exists, with the type APM"),
        (("D1", "--csr", "garbage.csr"), "not a readable certificate request"),
        (("D1", "--csr", "nowhere.csr"), "No such file"),
        (("D1", "--generate", "--profile", "server"), "no profile 'server' for a client"),
        (("D1",), "give either --csr FILE"),
        ((), "give either a DEVICE or --from"),
        (("a/b", "--generate", "--type", "APM", "--out", "x"), "letters, digits"),
    ],
)
def test_what_is_not_signed_changes_nothing(cli, ca, fleet, execute, tmp_path, arguments, fault):
    execute("insert into device_type (name) values ('Other')")
    (tmp_path / "two.csr").write_bytes(request("two"))
    (tmp_path / "garbage.csr").write_bytes(b"garbage")
    code = 4 if "no such device type" in fault else 2
    assert fault in cli("device", "enroll", *arguments, "--ca", ca, exit_code=code).stderr
    assert execute("select * from certificate") == []
    assert len(execute("select * from device")) == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".pem", ".key", ".zip"}]


def test_a_revoked_device_gets_no_certificate(cli, ca, fleet):
    cli("device", "revoke", "D1")
    assert "device reinstate D1" in cli("device", "enroll", "D1", "--ca", ca, "--generate", exit_code=2).stderr


def test_a_key_that_was_revoked_as_compromised_gets_no_certificate_again(cli, ca, fleet, execute, tmp_path):
    (tmp_path / "one.csr").write_bytes(request("D1"))
    (tmp_path / "two.csr").write_bytes(request("two"))
    cli("device", "enroll", "D1", "--ca", ca, "--csr", "one.csr")
    cli("cert", "revoke", "--device", "D1", "--all", "--ca", ca, "--reason", "superseded")
    cli("device", "enroll", "D1", "--ca", ca, "--csr", "one.csr", "--out", "again.pem")
    cli("cert", "revoke", "--device", "D1", "--all", "--ca", ca, "--reason", "keyCompromise")
    for device, file in (("D1", "one.csr"), ("D2", "two.csr")):  # the same key, under whatever name
        told = cli("device", "enroll", device, "--ca", ca, "--csr", file, "--out", "more.pem", exit_code=2)
        assert "revoked as compromised" in told.stderr
    assert not (tmp_path / "more.pem").exists()
    assert execute("select count(*) as n from certificate where state = 'active'") == [{"n": 0}]


def test_a_bench_device_is_registered_and_gets_a_key(cli, ca, fleet, execute, tmp_path):
    cli("device", "enroll", "D3", "--ca", ca, "--generate", "--type", "APM", "--profile", "device-rsa")
    key = read_key((tmp_path / "D3.key").read_bytes())
    assert key.key_size == 2048
    assert execute("select type, status from device where device_id = 'D3'") == [{"type": "APM", "status": "active"}]


def test_a_device_that_is_registered_gets_what_is_put_on_record_from_then_on(cli, ca, fleet, execute):
    before = pem(*outside("D3"))
    cli("cert", "import", "-", stdin=before)
    cli("device", "enroll", "D3", "--ca", ca, "--generate", "--type", "APM")
    assert sorted(row["device_id"] or "" for row in execute("select device_id from certificate")) == ["", "D3"]
    assert as_json(cli("cert", "import", "-", "--json", stdin=before))["linked"] == 1
    assert [row["device_id"] for row in execute("select device_id from certificate")] == ["D3", "D3"]


def test_a_device_that_is_deleted_and_registered_anew_does_not_get_its_certificates_back(
    cli, ca, fleet, execute, tmp_path
):
    old = pem(*outside("D1"))
    cli("cert", "import", "-", stdin=old)
    cli("device", "enroll", "D1", "--ca", ca, "--generate")
    kept = "schema: authbackend/1\ndevices: [{device_id: D2, common_name: two, type: APM}]\n"
    (tmp_path / "kept.yaml").write_text(kept)
    cli("policy", "apply", "kept.yaml", "--prune")
    cli("device", "enroll", "D1", "--ca", ca, "--generate", "--type", "APM", "--out", "anew.pem")
    assert as_json(cli("cert", "import", "-", "--json", stdin=old))["linked"] == 0
    rows = execute("select device_id, state, reason from certificate order by added_at")
    assert [tuple(row.values()) for row in rows] == [(None, "revoked", "cessationOfOperation")] * 2 + [
        ("D1", "active", "")
    ]


def table(tmp_path, rows, columns=("device_id", "type", "csr")):
    with (tmp_path / "fleet.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


def test_many_are_enrolled_into_one_file(cli, ca, fleet, execute, tmp_path):
    table(tmp_path, [("D1", "", ""), *((f"N{n}", "APM", "") for n in range(120))])
    told = cli("device", "enroll", "--from", "fleet.csv", "--generate", "--ca", ca).stdout
    assert "enrolled 121 devices into fleet.zip" in told
    assert "all of them expire on" in told
    assert (tmp_path / "fleet.zip").stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(tmp_path / "fleet.zip") as archive:
        assert len(archive.namelist()) == 2 * 121 + 1
        certificate = read_certificate(archive.read("N7.pem"))
        assert read_key(archive.read("N7.key")).public_key() == certificate.public_key()
        assert len(read_certificates(archive.read("ca.pem"))) == 2
    assert execute("select count(*) as n from certificate where device_id is not null")[0]["n"] == 121


def test_many_are_enrolled_by_their_requests_into_a_folder(cli, ca, fleet, tmp_path):
    (tmp_path / "csr").mkdir()
    (tmp_path / "csr" / "D1.csr").write_bytes(request("D1"))
    table(tmp_path, [("D1", "", "csr/D1.csr")])
    cli("device", "enroll", "--from", "fleet.csv", "--ca", ca, "--out", "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["D1.pem", "ca.pem"]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([("D1", "", ""), ("D8", "", ""), ("D9", "", "")], "fleet.csv:3: no device has the id 'D8'"),
        ([("D1", "", ""), ("D1", "", "")], "fleet.csv:3: duplicate device D1"),
        ([("D1", "", "D1.csr")], "not both"),
        ([("D1", "", "", "more")], "too many fields"),
        ([("", "APM", "")], "no device_id"),
        ([], "names no device"),
    ],
)
def test_one_wrong_line_and_nobody_is_enrolled(cli, ca, fleet, execute, tmp_path, rows, fault):
    table(tmp_path, rows)
    assert fault in cli("device", "enroll", "--from", "fleet.csv", "--generate", "--ca", ca, exit_code=2).stderr
    assert execute("select * from certificate") == []
    assert not (tmp_path / "fleet.zip").exists()


def test_an_unknown_column_is_named(cli, ca, fleet, tmp_path):
    table(tmp_path, [("D1", "x")], ("device_id", "sort"))
    refused = cli("device", "enroll", "--from", "fleet.csv", "--generate", "--ca", ca, exit_code=2)
    assert "device_id and, optionally, type, common_name, csr" in refused.stderr


# --- imports -------------------------------------------------------------------------------------------------------

OUTSIDE = new_key("ec-p256")
OUTSIDE_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Outside CA")])
OUTSIDE_CA = signing.sign_authority(
    OUTSIDE_NAME,
    OUTSIDE.public_key(),
    issuer=OUTSIDE_NAME,
    key=OUTSIDE,
    valid=signing.validity(None, None, timedelta(days=100)),
    path_length=0,
)


def outside(*names, days=50):
    """Return certificates of an outside authority."""
    return [
        signing.sign_leaf(
            signing.subject_of([name]),
            KEY.public_key(),
            issuer=OUTSIDE_NAME,
            key=OUTSIDE,
            valid=signing.validity(None, None, timedelta(days=days)),
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            alternative=[],
        )
        for name in names
    ]


def pem(*certificates):
    return b"".join(map(signing.certificate_pem, certificates))


def test_a_stream_is_imported_in_batches_and_again_without_effect(cli, fleet, execute, monkeypatch):
    monkeypatch.setattr("authbackend.cli.cert_import.BATCH", 7)
    stream = pem(OUTSIDE_CA, *outside("D1", "two", *(f"X{n}" for n in range(30))))
    told = as_json(cli("cert", "import", "-", "--json", stdin=stream))
    assert (told["new"], told["authorities"], told["unknown"]) == (32, 1, 30)
    assert len(told["unknown_names"]) == 20
    assert {r["device_id"] for r in execute("select device_id from certificate")} == {"D1", "D2", None}
    again = as_json(cli("cert", "import", "-", "--json", stdin=stream))
    assert (again["new"], again["present"]) == (0, 32)
    execute("insert into device (device_id, type) values ('X3', 'APM')")
    assert as_json(cli("cert", "import", "-", "--json", stdin=stream))["linked"] == 1
    assert len(execute("select * from certificate where device_id = 'X3'")) == 1


def test_folders_are_imported_and_what_cannot_be_read_is_named(cli, fleet, tmp_path):
    folder = tmp_path / "certs"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.crt").write_bytes(pem(*outside("D1")))
    (folder / "deep" / "two.pem").write_bytes(pem(*outside("two")))
    (folder / "notes.txt").write_text("no certificate")
    (folder / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (folder / "empty.pem").write_text("")
    told = cli("cert", "import", folder, exit_code=2).stdout
    assert "2 new" in told
    assert "bad.pem:1: certificate 1: the certificate cannot be read" in told
    assert "empty.pem: no certificate in it" in told
    assert "notes.txt: not named" in told


def swapped(certificate):
    """Return the certificate with the two times of its validity swapped."""
    der = certificate.public_bytes(serialization.Encoding.DER)
    begin, end = (
        f"{moment:%y%m%d%H%M%SZ}".encode()
        for moment in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    )
    return ssl.DER_cert_to_PEM_cert(der.replace(begin + b"\x17\x0d" + end, end + b"\x17\x0d" + begin)).encode()


def of_long_subject():
    units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "x" * 60) for _ in range(40)]
    begin, end = signing.validity(None, None, timedelta(days=9))
    builder = x509.CertificateBuilder().subject_name(x509.Name(units)).issuer_name(OUTSIDE_NAME)
    builder = builder.public_key(KEY.public_key()).serial_number(7).not_valid_before(begin).not_valid_after(end)
    return pem(builder.sign(OUTSIDE, hashes.SHA256()))


@pytest.mark.parametrize(
    ("odd", "fault"),
    [
        (swapped(*outside("D2")), "its validity ends before it begins"),
        (of_long_subject(), "its subject has more than 2048"),
    ],
)
def test_a_certificate_that_cannot_be_kept_is_named_and_the_rest_is_imported(cli, fleet, execute, odd, fault):
    told = cli("cert", "import", "-", stdin=pem(*outside("D1")) + odd + pem(*outside("two")), exit_code=2).stdout
    assert "2 new" in told
    assert f"certificate 2: {fault}" in told


def test_an_end_without_a_beginning_is_named(cli, fleet):
    broken = pem(*outside("D1")).replace(b"-----BEGIN", b"----BEGIN") + pem(*outside("two"))
    told = cli("cert", "import", "-", stdin=broken, exit_code=2).stdout
    assert "1 new" in told
    assert "CERTIFICATE has an END line without a BEGIN line" in told


def test_a_table_with_a_broken_line_is_refused_with_words(cli, ca, fleet, tmp_path):
    (tmp_path / "fleet.csv").write_text('device_id\nD1\n"D2\n')
    refused = cli("device", "enroll", "--from", "fleet.csv", "--generate", "--ca", ca, exit_code=2)
    assert "fleet.csv is not CSV in UTF-8: unexpected end of data" in refused.stderr


def test_a_second_certificate_with_the_same_serial_number_is_named(cli, fleet, execute):
    (one,) = outside("D1")
    builder = x509.CertificateBuilder().subject_name(signing.subject_of(["D1"])).issuer_name(OUTSIDE_NAME)
    builder = builder.public_key(KEY.public_key()).serial_number(one.serial_number)
    begin, end = signing.validity(None, None, timedelta(days=9))
    two = builder.not_valid_before(begin).not_valid_after(end).sign(OUTSIDE, hashes.SHA256())
    told = cli("cert", "import", "-", stdin=pem(one, two), exit_code=2).stdout
    assert f"{one.serial_number:x}: another certificate of its issuer" in told
    assert len(execute("select * from certificate")) == 1


def test_revocations_of_an_openssl_authority_are_taken_over(cli, fleet, execute, tmp_path):
    one, two = outside("D1", "two")
    line = "{}\t271124120000Z\t{}\t{:X}\tunknown\t/CN=x\n"
    (tmp_path / "index.txt").write_text(
        line.format("R", "261101120000Z,keyCompromise", one.serial_number)
        + line.format("V", "", two.serial_number)
        + line.format("R", "261101120000Z", 99)
        + line.format("R", "261101120000Z,certificateHold", two.serial_number)
    )
    (tmp_path / "outside.pem").write_bytes(pem(OUTSIDE_CA))
    index = ("--openssl-index", "index.txt", "--issuer", "outside.pem")
    told = cli("cert", "import", "-", *index, stdin=pem(one, two), exit_code=2).stdout
    assert "1 revoked; 1 more are revoked in the index, but not on record" in told
    assert f"{two.serial_number:x} is on hold" in told
    assert {r["common_name"]: (r["state"], r["reason"]) for r in execute("select * from certificate")} == {
        "D1": ("revoked", "keyCompromise"),
        "two": ("active", ""),
    }


# --- what ends when ------------------------------------------------------------------------------------------------


def test_what_expires_is_listed_and_many_on_a_day_are_named(cli, fleet, execute):
    cli("cert", "import", "-", stdin=pem(*outside("D1", "two", days=20), *outside("D1", days=90)))
    cli("cert", "import", "-", stdin=pem(*outside(*(f"X{n}" for n in range(55)), days=25)))
    rows = as_json(cli("cert", "list", "--expiring", "30d", "--json"))
    assert len(rows) == 57
    assert {row["common_name"]: row["renewed"] for row in rows[:2]} == {"D1": True, "two": False}
    text = cli("cert", "list", "--expiring", "30d").stdout
    assert (
        f"many expire on one day: 55 without a successor on {datetime.now(UTC) + timedelta(days=25):%Y-%m-%d}" in text
    )
    assert "many" not in cli("cert", "list", "--expiring", "3w").stdout
    assert len(as_json(cli("cert", "list", "--device", "D1", "--json"))) == 2
    assert "only the first 1" in cli("cert", "list", "--limit", "1").stdout
    assert "write it as 30d" in cli("cert", "list", "--expiring", "soon", exit_code=2).stderr


# --- revocations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_certificates(cli, ca, fleet):
    """Serial numbers of two certificates of D1, the older first."""
    serials = []
    for name in ("old", "new"):
        serials.append(
            as_json(cli("device", "enroll", "D1", "--ca", ca, "--generate", "--out", name, "--json"))["serial"]
        )
    return serials


def test_revoking_with_the_authority_publishes_the_list_in_the_same_command(cli, ca, two_certificates, execute):
    old, new = two_certificates
    written = ":".join([old.upper().rjust(40, "0")[n : n + 2] for n in range(0, 40, 2)])
    told = as_json(cli("cert", "revoke", written, "--ca", ca, "--reason", "keyCompromise", "--json"))
    assert [row["serial"] for row in told["revoked"]] == [old]
    assert listed(execute) == {old: "keyCompromise"}
    assert execute("select number::text from crl") == [{"number": str(told["crl_number"])}]
    again = as_json(cli("cert", "revoke", old, "--ca", ca, "--json"))
    assert (again["revoked"], again["crl_number"]) == ([], None)
    assert {r["serial"]: r["state"] for r in execute("select * from certificate")} == {old: "revoked", new: "active"}
    assert [r["after"] for r in execute("select after from audit where entity = 'crl' and after ? 'der'")] == []


def test_waiting_for_a_revocation_ends_well_only_when_every_node_has_the_list(cli, ca, two_certificates, execute):
    one, two = two_certificates
    assert "enforcement is off" in cli("cert", "revoke", one, "--ca", ca, "--wait", exit_code=8).stderr
    execute("insert into enforcement_setup (hold_limit_s) values (30) returning 1")
    execute("insert into enforcement_cluster (name) values ('rabbit') returning 1")

    def revoked(lists, exit_code):
        """Revoke the second certificate; a trigger writes its receipt in the same moment."""
        execute(
            "create or replace function receipt() returns trigger language plpgsql as $$ begin new.finished_at = now(); new.state = 'done';"
            f"new.receipt = '{json.dumps({'closed': {}, 'looks': 2, 'lists': lists, 'checked_at': 'noon'})}'; return new; end $$;"
            "create or replace trigger receipt before insert on enforcement for each row execute function receipt()"
        )
        return cli("cert", "revoke", two, "--ca", ca, "--wait", "--timeout", "20", exit_code=exit_code)

    told = revoked({"number": "6", "installed": ["rabbit@one"], "behind": [], "unknown": ["rabbit@two"]}, 8)
    assert "number 6 or a later one is installed on rabbit@one" in told.stdout
    assert "not known to check a revocation list: rabbit@two; there it can log in again" in told.stdout
    assert "last look at noon: nothing connected with it was found" in told.stdout
    assert "rabbit@two is not known to check a revocation list" in told.stderr


def test_the_hosts_that_report_are_listed_and_forgotten(cli, ca, execute):
    execute("select crl_report('rabbit@one', 'CN=ca', 7, '2030-01-01Z')")
    assert [(row["node"], row["number"]) for row in as_json(cli("crl", "hosts", "--json"))] == [("rabbit@one", "7")]
    assert as_json(cli("crl", "hosts", "--forget", "rabbit@one", "--json")) == []
    assert "has reported" in cli("crl", "hosts", "--forget", "rabbit@one", exit_code=3).stderr


def test_all_but_the_newest_of_a_device_are_revoked(cli, ca, two_certificates, execute):
    execute(f"update certificate set not_before = not_before - interval '1 day' where serial = '{two_certificates[0]}'")
    told = cli("cert", "revoke", "--device", "D1", "--all-but-newest", "--reason", "left in a taxi", "--ca", ca).stdout
    assert f"revoked {two_certificates[0]} of D1 (left in a taxi)" in told
    assert listed(execute) == {two_certificates[0]: ""}
    assert "nothing to revoke" in cli("cert", "revoke", "--device", "D1", "--all-but-newest").stdout
    cli("cert", "revoke", "--device", "D1", "--all", "--ca", ca)
    assert set(listed(execute)) == set(two_certificates)


@pytest.mark.parametrize(
    ("arguments", "code", "fault"),
    [
        (("abcdef",), 3, "no certificate on record"),
        (("not-hex",), 2, "neither a serial number nor"),
        (("--device", "D9", "--all"), 3, "no device has the id"),
        (("--device", "D1"), 2, "--all-but-newest or --all"),
        (("--device", "D1", "--all", "--all-but-newest"), 2, "--all-but-newest or --all"),
        ((), 2, "name one certificate"),
        (("--device", "D1", "--all", "--reason", "certificateHold"), 2, "a revocation is final here"),
    ],
)
def test_a_revocation_that_is_not_clear_changes_nothing(cli, two_certificates, execute, arguments, code, fault):
    assert fault in cli("cert", "revoke", *arguments, exit_code=code).stderr
    assert {r["state"] for r in execute("select state from certificate")} == {"active"}


def test_an_authority_revokes_only_what_it_issued(cli, ca, fleet, execute):
    (one,) = outside("D1")
    cli("cert", "import", "-", stdin=pem(one))
    refused = cli("cert", "revoke", f"{one.serial_number:x}", "--ca", ca, exit_code=2).stderr
    assert "issued by 'CN=Outside CA'" in refused
    assert execute("select state from certificate") == [{"state": "active"}]


# --- lists ---------------------------------------------------------------------------------------------------------


def outside_list(number, *entries, now=None, key=OUTSIDE, authority=OUTSIDE_CA):
    made = sign_list(
        list(entries),
        issuer=authority,
        key=key,
        number=number,
        now=now or datetime.now(UTC),
        lifetime=timedelta(days=7),
    )
    return made.der


@pytest.fixture
def take_over(cli, tmp_path):
    (tmp_path / "outside.pem").write_bytes(pem(OUTSIDE_CA))

    def call(der, **options):
        (tmp_path / "outside.crl").write_bytes(der)
        return cli("crl", "import", "outside.crl", "--ca", "outside.pem", "--name", "outside", **options)

    return call


def test_a_list_of_an_outside_authority_is_taken_over(cli, fleet, take_over, execute):
    one, two = outside("D1", "two")
    cli("cert", "import", "-", stdin=pem(one, two))
    now = datetime.now(UTC)
    der = outside_list(
        5,
        CrlEntry(f"{one.serial_number:x}", "keyCompromise", now),
        CrlEntry("77", "", now),
        CrlEntry(f"{two.serial_number:x}", "certificateHold", now),
    )
    told = take_over(der).stdout
    assert "1 certificates revoked now; 1 on the list are not on record" in told
    assert "1 on hold" in told
    assert {r["common_name"]: r["state"] for r in execute("select * from certificate")} == {
        "D1": "revoked",
        "two": "active",
    }
    assert execute("select der from crl")[0]["der"] == der
    exported = cli("crl", "export", "outside", "--der").stdout_bytes
    assert exported == der
    assert "outside" in cli("crl", "list").stdout
    assert "no authority 'nosuch'" in cli("crl", "export", "nosuch", exit_code=3).stderr
    take_over(der)


def test_a_list_that_is_not_in_order_changes_nothing(cli, fleet, take_over, execute):
    take_over(outside_list(5))
    before = execute("select * from crl")
    (one,) = outside("D1")
    cli("cert", "import", "-", stdin=pem(one))
    entry = CrlEntry(f"{one.serial_number:x}", "", datetime.now(UTC))
    assert (
        "older than number 5, which the authority's lists have reached"
        in take_over(outside_list(4, entry), exit_code=4).stderr
    )
    assert "another list with number 5" in take_over(outside_list(5, entry), exit_code=2).stderr
    old = datetime.now(UTC) - timedelta(days=9)
    assert "too old" in take_over(outside_list(6, entry, now=old), exit_code=2).stderr
    forged = outside_list(6, entry, key=KEY)
    assert "none of the given authorities" in take_over(forged, exit_code=2).stderr
    assert "neither DER nor PEM" in take_over(b"x", exit_code=2).stderr
    assert execute("select * from crl") == before
    assert execute("select state from certificate") == [{"state": "active"}]


def test_two_authorities_cannot_share_a_name(cli, ca, take_over):
    cli("crl", "sign", ca)
    refused = cli("crl", "import", "outside.crl", "--ca", "outside.pem", "--name", "fleet", exit_code=2)
    assert "No such file" in refused.stderr
    take_over(outside_list(1))
    refused = cli("crl", "import", "outside.crl", "--ca", "outside.pem", "--name", "fleet", exit_code=4)
    assert "another authority is already called 'fleet'" in refused.stderr


def test_sync_says_what_it_needs(cli, ca):
    refused = cli("crl", "sync", "--url", "ftp://x", "--ca", ca / "ca.pem", "--dir", "crl", "--once", exit_code=2)
    assert "http://HOST:PORT/crl/NAME.crl" in refused.stderr
    refused = cli(
        "crl",
        "sync",
        "--url",
        "http://127.0.0.1:1/crl/a.crl",
        "--ca",
        ca / "ca.pem",
        "--dir",
        "crl",
        "--once",
        exit_code=5,
    )
    assert "cannot be reached" in refused.stderr
