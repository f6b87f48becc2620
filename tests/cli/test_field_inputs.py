"""Inputs that people give by mistake, or as other products write them: ``tests/cases/field``."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import argon2
import pytest

from authbackend.errors import ConfigurationError, Unavailable
from authbackend.postgres.uri import parse, tls_context
from authbackend.secrets import read_dsn, read_password
from authbackend.service.replica import target
from authbackend.settings import Database, Enforcement, load
from tests.cli.test_certificates import as_json

FIELD = Path(__file__).parent.parent / "cases" / "field"

# --- lists of devices ----------------------------------------------------------------------------------------------

LISTS_OF_NO_DEVICES = {
    "error-page.csv": "<html><body>502 Bad Gateway</body></html>",
    "error-page-of-many-lines.csv": "<html>\n<body>\n502 Bad Gateway\n</body>\n</html>\n",
    "nothing.csv": "",
    "text.csv": "not csv at all",
    "no-type.csv": "device_id,common_name\n",
    "nothing.jsonl": "",
    "blank.jsonl": "\n \n",
    "error-page.json": "<html><body>502 Bad Gateway</body></html>",
    "half.csv": 'device_id,type\nCSV001,"CSV',
}


@pytest.mark.parametrize("name", LISTS_OF_NO_DEVICES)
def test_what_is_no_list_of_devices_removes_none(cli, fleet, execute, tmp_path, name):
    (tmp_path / name).write_text(LISTS_OF_NO_DEVICES[name])
    refused = cli("policy", "apply", FIELD / "csv/base.yaml", "--devices", name, "--prune", exit_code=2)
    assert f"{name}:" in refused.stderr
    assert len(execute("select 1 from device")) == 2


@pytest.mark.parametrize("name", ["html.csv", "empty.csv", "text.csv", "empty.jsonl"])
def test_a_file_of_something_else_removes_no_device(cli, fleet, execute, name):
    devices = ("--devices", FIELD / "csv" / name, "--prune")
    refused = cli("policy", "apply", FIELD / "csv/base.yaml", *devices, exit_code=2)
    assert f"{name}:1:1: error: not a list of devices: " in refused.stderr
    assert len(execute("select 1 from device")) == 2


@pytest.mark.parametrize(("name", "text"), [("d.csv", "device_id,type\n"), ("d.jsonl", "[]\n")])
def test_a_list_that_says_there_are_no_devices_is_believed(cli, fleet, execute, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    cli("policy", "apply", FIELD / "csv/base.yaml", "--devices", name, "--prune")
    assert execute("select 1 from device") == []


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_named_once(cli, tmp_path, separator, word):
    text = (FIELD / "csv/semi.csv").read_text().replace(";", separator)
    (tmp_path / "semi.csv").write_text(text)
    problems = as_json(cli("policy", "check", FIELD / "csv/base.yaml", "--devices", "semi.csv", "--json", exit_code=2))
    (problem,) = problems["problems"]
    assert f"separated by {word}" in problem["message"]


def test_a_list_that_is_not_utf_8_is_told_with_its_place(cli, tmp_path):
    (tmp_path / "latin.csv").write_bytes("device_id,type,status_reason\nA,T,gestört\n".encode("latin-1"))
    refused = cli("policy", "check", FIELD / "csv/base.yaml", "--devices", "latin.csv", exit_code=2)
    assert "latin.csv:2:9: " in refused.stdout


# --- certificates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"), [("nonewline.pem", 3), ("bommid.pem", 2), ("mixhdr.pem", 1), ("der.cer", 1)]
)
def test_every_certificate_of_a_file_is_taken(cli, fleet, name, number):
    found = as_json(cli("cert", "import", FIELD / "pem" / name, "--json"))
    assert (found["new"], found["faults"]) == (number, 0)
    assert found["new"] + found["present"] + found["authorities"] >= number


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("trusted.pem", "TRUSTED CERTIFICATE: this is OpenSSL's own format"),
        ("utf16.pem", "UTF-16"),
        ("version4.pem", "version 4 is not supported"),
    ],
)
def test_what_is_not_taken_is_called_what_it_is(cli, fleet, name, fault):
    told = cli("cert", "import", FIELD / "pem" / name, exit_code=2).stdout
    assert f"not imported: {FIELD / 'pem' / name}:1: " in told
    assert fault in told


def test_what_a_broker_lets_in_can_be_put_on_record_and_revoked(cli, fleet, execute):
    told = as_json(cli("cert", "import", FIELD / "pem", "--json", exit_code=2))
    assert told["faults"] == 3
    serials = {row["common_name"]: row["serial"] for row in execute("select common_name, serial from certificate")}
    assert serials.keys() >= {"BIP0001", "BCF0001", "DUP0001", "EDI0001", "TEL\xc9X001", "edge_001"}
    assert "0" in serials.values()
    assert [serial for serial in serials.values() if serial.startswith("-")]
    for row in execute("select serial, issuer from certificate"):
        assert row["issuer"] == "CN=Example Intermediate CA,O=Example"
        cli("cert", "revoke", "--", row["serial"])
    assert {row["state"] for row in execute("select state from certificate")} == {"revoked"}


def test_what_lies_beside_certificates_is_told(cli, fleet, tmp_path):
    folder = tmp_path / "certs"
    folder.mkdir()
    block = (FIELD / "pem/nonewline.pem").read_text().split("-----END")[0]
    end = "-----END CERTIFICATE-----\n"
    key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    (folder / "cut.pem").write_text(block + "\n" + block + end + key)
    (folder / "chain.p7b").write_text("")
    (folder / "beside.key").write_text(key)
    (folder / "elsewhere").symlink_to(FIELD / "pem")
    told = cli("cert", "import", folder, exit_code=2).stdout
    assert "1 new" in told
    assert "2 private keys were not read" in told
    assert "cut.pem:1: CERTIFICATE has no END line: line 10 begins or ends another block" in told
    assert "chain.p7b: not named" in told
    assert "elsewhere: a link to a folder" in told


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("v1.csr", "has version 2"),
        ("v2signed.csr", "has version 3"),
        ("sm2.csr", "not supported"),
        ("oddcurve.csr", "not supported"),
        ("sha1b.csr", "signed with SHA1, which is not accepted"),
        ("pr-underscore.csr", "PrintableString"),
        ("pr-bang.csr", "PrintableString"),
    ],
)
def test_a_request_that_is_not_signed_is_called_what_it_is(cli, ca, fleet, name, fault):
    told = cli("device", "enroll", "D1", "--ca", ca, "--csr", FIELD / "csr" / name, exit_code=2).stderr
    assert fault in told
    assert len(told.splitlines()) == 1
    assert "cryptography.io" not in told


def test_a_request_in_der_is_signed(cli, ca, fleet, tmp_path):
    cli("device", "enroll", "APM0001", "--type", "APM", "--ca", ca, "--csr", FIELD / "csr/der.csr")
    assert (tmp_path / "APM0001.pem").exists()


# --- revocations of openssl's index --------------------------------------------------------------------------------

INDEXES = {"scep": ["1001"], "trimmed": ["1002"], "bom": ["1003"]}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_is_read_however_it_was_saved(cli, fleet, execute, name):
    cli("cert", "import", FIELD / "pem/nonewline.pem")
    cli("cert", "import", "--openssl-index", FIELD / "index" / name, "--issuer", FIELD / "pem/ca.pem")
    revoked = execute("select serial from certificate where state = 'revoked'")
    assert [row["serial"] for row in revoked] == INDEXES[name]


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_another_authority_is_told(cli, fleet, execute, name):
    cli("cert", "import", FIELD / "pem/nonewline.pem")
    index = ("--openssl-index", FIELD / "index" / name, "--issuer", FIELD / "crl/ed-ca.pem")
    told = cli("cert", "import", *index, exit_code=2).stdout
    assert "is on record as issued by 'CN=Example Ed25519 CA,O=Example': name the right authority with --issuer" in told
    assert {row["state"] for row in execute("select state from certificate")} == {"active"}


# --- policies of other products -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        (
            "foreign-placeholders.yaml",
            {"7:9": "%c in dev/%c/up", "8:9": "%u in", "9:9": "no shared subscriptions", "17:9": "$clientid in"},
        ),
        (
            "regex-and-star.yaml",
            {
                "5:14": "vhost '*'",
                "8:9": "<device_id> in",
                "9:9": "> in dev/>",
                "10:9": ":device_id in",
                "11:9": "@deviceId in",
                "16:14": "vhost '.*'",
            },
        ),
    ],
)
def test_what_another_product_would_understand_is_warned_of_with_its_place(cli, name, warned):
    lines = cli("policy", "check", FIELD / "policy" / name).stdout.splitlines()
    for place, text in warned.items():
        assert [line for line in lines if f"{name}:{place}: warning: " in line and text in line], (place, lines)
    assert not [line for line in lines if ":0:0:" in line]


def test_every_regular_expression_among_permissions_is_warned_of(cli):
    told = cli("policy", "check", FIELD / "policy/regex-and-star.yaml").stdout
    for value in ("^$", ".*", "^amq\\\\.gen.*$"):
        assert f"name '{value}' looks like a regular expression" in told


def test_double_braces_are_called_what_they_are(cli):
    told = cli("policy", "check", FIELD / "policy/double-braces.yaml", exit_code=2).stdout
    assert "double braces" in told
    assert "{x}" not in told


@pytest.mark.parametrize(
    ("content", "devices", "place", "text"),
    [
        (b"schema: authbackend/1\n# \xe4\n", False, "2:3", "not UTF-8"),
        (b"", False, "1:1", "the file is empty"),
        (b"# nothing\n", False, "1:1", "the file is empty"),
        (b"schema: authbackend/1\nx: a\x01b\n", False, "2:5", "not YAML"),
        (b'schema: "', False, "1:10", "not YAML"),
        (b"schema: authbackend/1\ndevices:\n  - {device_id: A, type: T}\n", True, "3:3", "exclude each other"),
    ],
)
def test_every_problem_of_a_policy_file_has_its_place(cli, tmp_path, content, devices, place, text):
    (tmp_path / "p.yaml").write_bytes(content)
    (tmp_path / "d.csv").write_text("device_id,type\n")
    more = ("--devices", "d.csv") if devices else ()
    told = cli("policy", "check", "p.yaml", *more, exit_code=2).stdout
    assert f"p.yaml:{place}: error: " in told
    assert text in told


def test_a_file_cannot_drive_the_terminal_that_its_faults_are_shown_on(cli, tmp_path):
    (tmp_path / "p.yaml").write_text(
        'schema: authbackend/1\ndevices: [{device_id: A, type: T, rules: ["\\e]0;x\\a"]}]\n'
    )
    (tmp_path / "d.csv").write_text("device_id,type,\x1b]0;x\x07\n")
    (tmp_path / "d.jsonl").write_text('{"device_id": "A", "type": "T", "A\\ud800": "", "\\u009b2J": ""}\n')
    (tmp_path / "i.txt").write_text("R\t1\t2\t\x1b[2J\tz\tw\n")
    for command in (
        ("policy", "check", "p.yaml"),
        ("policy", "check", FIELD / "csv/base.yaml", "--devices", "d.csv"),
        ("policy", "check", FIELD / "csv/base.yaml", "--devices", "d.jsonl"),
        ("policy", "check", FIELD / "csv/base.yaml", "--devices", "d.jsonl", "--json"),
        ("policy", "plan", FIELD / "csv/base.yaml", "--devices", "d.csv"),
        ("cert", "import", "--openssl-index", "i.txt", "--issuer", FIELD / "pem/ca.pem"),
    ):
        told = cli(*command, exit_code=2).output
        assert not {"\x1b", "\x9b", "\ud800"} & set(told)


# --- settings ------------------------------------------------------------------------------------------------------


def variables(name):
    lines = (FIELD / "env" / name).read_text().splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_variables_of_kubernetes_and_docker_are_no_settings():
    assert load(variables("service-links.env")) == load({})


def test_what_is_empty_is_not_set():
    settings = load(variables("empty.env"))
    assert settings == load({})
    with pytest.raises(ConfigurationError, match="AUTHBACKEND_DATABASE__DSN"):
        target(settings)


URIS = {
    "?sslmode=require&channel_binding=require": "channel_binding can only be prefer or disable",
    "?sslmode=require&connect_timeout=10": None,
    "?sslmode=require&gssencmode=disable": None,
    "?sslmode=verify-full": "sslrootcert /nowhere/.postgresql/root.crt cannot be read",
    "?sslmode=verify-full&sslrootcert=/not/there.pem": "sslrootcert /not/there.pem cannot be read",
    "?sslmode=verify-full&sslrootcert=system": None,
    "?sslmode=verify-ca&sslrootcert=/of/another/authority.pem": "sslrootcert /of/another/authority.pem cannot be read",
}


@pytest.mark.parametrize("line", (FIELD / "env/uris.txt").read_text().splitlines()[1:])
def test_a_connection_uri_is_honoured_or_refused_with_what_it_cannot_have(line, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    dsn = f"postgresql://role:hunter2@host:5432/db{line}"
    if (fault := URIS[line]) is not None:
        with pytest.raises((ConfigurationError, Unavailable), match=re.escape(fault)) as refused:
            tls_context(parse(dsn), {})
        assert "hunter2" not in str(refused.value)
        return
    uri = parse(dsn)
    tls_context(uri, {})
    passed = set(parse_qs(urlsplit(uri.dsn).query))
    assert passed <= {"sslmode"}, "a parameter of libpq would be sent to the server as a setting"
    assert uri.connect_timeout_s == (10 if "connect_timeout" in line else None)


# --- passwords, and library warnings -------------------------------------------------------------------------------


def test_a_password_that_is_not_utf_8_is_refused_without_a_word_of_it(cli, execute):
    refused = cli("account", "add", "ops", "--password-file", FIELD / "env/password-latin1", exit_code=2)
    assert f"{FIELD / 'env/password-latin1'} is not UTF-8" in refused.stderr
    assert "longenou" not in refused.output
    assert execute("select 1 from account") == []


def test_a_byte_order_mark_is_no_part_of_a_password(cli, execute):
    cli("account", "add", "ops", "--password-file", FIELD / "env/password-with-bom")
    (row,) = execute("select password_hash from account")
    assert argon2.PasswordHasher().verify(row["password_hash"], "longenough1")


@pytest.mark.parametrize(
    ("read", "section", "name"),
    [
        (read_password, Enforcement(password_file=FIELD / "env/password-latin1"), "enforcement"),
        (read_dsn, Database(dsn="postgresql://a@b/c", password_file=FIELD / "env/password-latin1"), "database"),
    ],
)
def test_a_password_of_the_service_that_is_not_utf_8_is_refused_without_a_word_of_it(read, section, name):
    with pytest.raises(ConfigurationError, match=f"{name}.password_file .* is not UTF-8") as refused:
        read(section)
    assert "longenou" not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_a_password_of_the_service():
    file = FIELD / "env/password-with-bom"
    assert read_password(Enforcement(password_file=file)) == "longenough1"
    assert read_dsn(Database(dsn="postgresql://a@b/c", password_file=file)) == "postgresql://a:longenough1@b/c"


def test_warnings_of_libraries_are_not_shown_to_people(tmp_path):
    ca = FIELD / "pem/x-neg.pem"
    sync = ("crl", "sync", "--once", "--url", "http://127.0.0.1:1/crl/a.crl", "--ca", ca, "--dir", tmp_path)
    command = [sys.executable, "-m", "authbackend", *map(str, sync)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 5
    assert ended.stderr.startswith("authbackend: http://127.0.0.1:1/crl/a.crl cannot be reached")
    assert len(ended.stderr.splitlines()) == 1
