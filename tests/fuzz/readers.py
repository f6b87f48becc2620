"""
What reads files and requests of others, and what must hold whatever it is given.

A check returns if everything holds. It raises AssertionError if something does not, and lets through what a reader
raises that is not its documented error. ``tools/fuzz`` looks for inputs that make one raise; ``test_cases`` gives each
its seeds and what was found before.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import CollectorRegistry

from authbackend.broker import protocol
from authbackend.broker.handlers import QUESTIONS, Handlers, Limits, PendingLogin
from authbackend.broker.metrics import BrokerMetrics
from authbackend.broker.responses import Prepared
from authbackend.cli.cert_import import Report, _stream
from authbackend.cli.enroll import _requests
from authbackend.errors import ConfigurationError, InvalidInput
from authbackend.logs import Sampler
from authbackend.pki import der, signing
from authbackend.pki.bundle import blocks, read_record
from authbackend.pki.crl import age_fault, check_entries, entries_of, list_pem, read_list
from authbackend.pki.openssl_index import index_of
from authbackend.pki.parsing import (
    LIBRARY_FAULTS,
    PKIError,
    Record,
    is_authority,
    read_certificate,
    read_certificates,
    read_key,
    read_request,
    record_of,
)
from authbackend.pki.profiles import read_configuration
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.names import common_name_fault
from authbackend.policy_file.devices import parse_devices
from authbackend.policy_file.lint import lint
from authbackend.policy_file.model import DeviceEntry, Problem
from authbackend.policy_file.read import decode, read
from authbackend.policy_file.write import write
from authbackend.postgres.uri import parse
from authbackend.settings import load
from tests.unit.fleet import FLEET, NOW

CASES = Path(__file__).parent.parent / "cases"
SERIAL = re.compile(r"0|-?[1-9a-f][0-9a-f]*")
SECRET = "hunter2"
_ADVICE = re.compile(r"give --distribution-point (\S+)$")


@dataclass(frozen=True, slots=True)
class Reader:
    """
    A reader and its check.

    Attributes:
        seeds: Patterns of files below tests/cases.
        texts: Further inputs to begin with.
        words: What its inputs are made of.
    """

    check: Callable[[bytes], None]
    seeds: tuple[str, ...] = ()
    texts: tuple[str | bytes, ...] = ()
    words: tuple[str, ...] = ()

    def inputs(self) -> Iterator[tuple[str, bytes]]:
        """Yield what it begins with, named."""
        for pattern in self.seeds:
            for path in sorted(CASES.glob(pattern)):
                yield str(path.relative_to(CASES)), path.read_bytes()
        for number, text in enumerate(self.texts, 1):
            yield f"text {number}", text.encode() if isinstance(text, str) else text


# --- the policy file and lists of devices ----------------------------------------------------------------------------


def policy(content: bytes) -> None:
    """Every problem has its place; what has none is written and read again as the same."""
    text, fault = decode(content, "f.yaml")
    if fault is not None:
        _placed([fault], content)
        return
    document, problems = read(text, "f.yaml")
    _placed(problems, content)
    if problems:
        return
    _placed(lint(document, "f.yaml"), content)
    again, problems = read(write(document), "f.yaml")
    assert problems == [], problems
    assert again == document


def devices_csv(content: bytes) -> None:
    """What is read is read as the same from JSON lines."""
    found = _devices(content, json_lines=False)
    if found == {}:
        header = next(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
        assert {"device_id", "type"} <= set(header), "a file of something else is a list without devices"
    if found:
        _same_as_lines(found)


def devices_jsonl(content: bytes) -> None:
    """What is read is written and read again as the same."""
    found = _devices(content, json_lines=True)
    if found == {}:
        assert content.decode("utf-8-sig").strip() == "[]", "a file of something else is a list without devices"
    if found:
        _same_as_lines(found)


def _devices(content: bytes, *, json_lines: bool) -> dict[str, DeviceEntry] | None:
    devices, problems = parse_devices(content, "f", json_lines=json_lines)
    _placed(problems, content)
    assert len(problems) <= 200
    return None if problems else devices


def _same_as_lines(devices: dict[str, DeviceEntry]) -> None:
    rows = []
    for device in devices.values():
        row: dict[str, Any] = {name: value for name, value in asdict(device).items() if value is not None}
        del row["rules"]
        if "attributes" in row:
            row["attributes"] = dict(row["attributes"])
        if "expires_at" in row:
            row["expires_at"] = row["expires_at"].isoformat()
        rows.append(json.dumps(row))
        json.dumps(row, ensure_ascii=False).encode()  # PostgreSQL can hold it
    again, problems = parse_devices("\n".join(rows).encode(), "f", json_lines=True)
    assert problems == [], problems
    assert again == devices


def _placed(problems: list[Problem], content: bytes) -> None:
    lines = len(re.split("\r\n|[\n\r\x85\u2028\u2029]", content.decode(errors="replace")))
    for problem in problems:
        assert 1 <= problem.line <= lines, problem
        assert problem.column >= 1, problem
        assert problem.message


# --- certificates, requests and lists --------------------------------------------------------------------------------

_KEY = ec.generate_private_key(ec.SECP256R1())
_FIELD_CA = x509.load_pem_x509_certificate((CASES / "field/crl/ca.pem").read_bytes())
_VALID = signing.validity(None, None, timedelta(days=30))
_NAMESAKE = signing.sign_authority(
    _FIELD_CA.subject, _KEY.public_key(), issuer=_FIELD_CA.subject, key=_KEY, valid=_VALID, path_length=0
)
AUTHORITIES = [_FIELD_CA, x509.load_pem_x509_certificate((CASES / "field/crl/ed-ca.pem").read_bytes()), _NAMESAKE]
_ECDSA_WITH_SHA256 = (0x30, bytes.fromhex("06082a8648ce3d040302"))


def _resigned(content: bytes, change: Callable[[list[tuple[int, bytes]]], None]) -> bytes | None:
    """Return something signed as if the key of these tests had signed it, so that more than its signature is read."""
    try:
        _, outer, _ = der.element(content)
        fields = list(der.elements(next(der.elements(outer))[1]))
        change(fields)
    except (ValueError, IndexError, StopIteration):
        return None
    body = der.encode(0x30, b"".join(der.encode(*field) for field in fields))
    signature = _KEY.sign(body, ec.ECDSA(hashes.SHA256()))
    return der.encode(0x30, body + der.encode(*_ECDSA_WITH_SHA256) + der.encode(0x03, b"\0" + signature))


def bundle(content: bytes) -> None:
    """Everything in a file is taken or named."""
    report = Report()
    rows = list(_stream("f.pem", io.BytesIO(content), report))
    assert rows or report.faults or report.authorities or report.keys, "nothing is told of it"
    found = list(blocks(io.BytesIO(content)))
    lines = max(1, content.count(b"\n") + 1)
    assert all(1 <= block.line <= lines for block in found)
    assert len(rows) + report.authorities + report.keys + report.faults >= len(found)
    for block in found:
        if block.der is not None:
            certificate(block.der)


def certificate(content: bytes) -> None:
    """What is read can be kept; what the library reads is read, and as the library reads it."""
    with contextlib.suppress(PKIError):
        is_authority(read_certificate(ssl.DER_cert_to_PEM_cert(content).encode()))
    ours = None
    try:
        ours = read_record(content)
        _keepable(ours[0])
    except PKIError:
        pass
    try:
        parsed = x509.load_der_x509_certificate(content)
        theirs = record_of(parsed)
        authority = is_authority(parsed)
    except (PKIError, *LIBRARY_FAULTS):
        return
    assert ours == (theirs, authority)


def _keepable(record: Record) -> None:
    """What the table ``certificate`` asks for."""
    assert SERIAL.fullmatch(record.serial), record
    assert record.issuer
    for text, most in ((record.issuer, 2048), (record.subject, 2048), (record.common_name, 1024)):
        assert len(text.encode()) <= most, record
        assert "\x00" not in text
    assert datetime(1950, 1, 1, tzinfo=UTC) <= record.not_before <= record.not_after, record
    assert re.fullmatch("[0-9a-f]{64}", record.fingerprint)
    assert record.key_fingerprint is None or re.fullmatch("[0-9a-f]{64}", record.key_fingerprint)


def pem(content: bytes) -> None:
    """The files that a command is given with --ca, --issuer or --ca-key."""
    for load_one in (read_certificate, read_certificates, read_key):
        with contextlib.suppress(PKIError):
            load_one(content)


def request(content: bytes) -> None:
    """A request has one common name and a key that is signed for, whoever signed it."""

    def with_our_key(fields: list[tuple[int, bytes]]) -> None:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        key = _KEY.public_key().public_bytes(serialization.Encoding.DER, form)
        fields[2] = der.element(key)[:2]

    for one in (content, _resigned(content, with_our_key)):
        if one is None:
            continue
        try:
            name, _ = read_request(one)
        except PKIError:
            continue
        if common_name_fault(name) is None:
            signing.subject_of([name])


def revocation_list(content: bytes) -> None:
    """A list that is taken can be kept, brokers can read it, and its PEM form is the same list."""

    def with_our_algorithm(fields: list[tuple[int, bytes]]) -> None:
        fields[1 if fields[0][0] == 0x02 else 0] = _ECDSA_WITH_SHA256

    for one in (content, _resigned(content, with_our_algorithm)):
        if one is None:
            continue
        point = None
        try:
            read_list(one, AUTHORITIES)
        except PKIError as error:
            advised = _ADVICE.search(error.detail)
            point = advised[1] if advised else None
        try:
            found, _ = read_list(one, AUTHORITIES, point)
            check_entries(found.der)
        except PKIError:
            continue
        assert 0 <= found.number < 2**159, "a number of more than 20 octets (RFC 5280 5.2.3)"
        age_fault(found, datetime.now(UTC))
        for entry in entries_of(found.der):
            assert SERIAL.fullmatch(entry.serial), entry
            assert 1950 <= entry.revoked_at.year <= 9999, entry
            assert entry.reason != "removeFromCRL", entry
        again, _ = read_list(list_pem(found.der), AUTHORITIES, point)
        assert again == found


def index(content: bytes) -> None:
    """The database of openssl's own authority."""
    try:
        found = list(index_of(content.decode("utf-8-sig", "replace"), "index.txt"))
    except PKIError as error:
        assert error.detail.startswith("index.txt:"), error
        return
    for serial, entry in found:
        assert SERIAL.fullmatch(serial), serial
        if entry is not None:
            assert 1950 <= entry.revoked_at.year <= 9999, entry


# --- tables and settings of an authority -----------------------------------------------------------------------------


def _in_a_file(content: bytes, suffix: str, look: Callable[[Path], object]) -> None:
    with tempfile.NamedTemporaryFile(suffix=suffix, dir="/dev/shm") as file:
        file.write(content)
        file.flush()
        look(Path(file.name))


def enrolment(content: bytes) -> None:
    """The table of ``device enroll --from``."""

    def look(path: Path) -> None:
        try:
            requests = list(_requests(path, None, generate=True))
        except InvalidInput:
            return
        assert requests
        assert len({one.device_id for one in requests}) == len(requests)

    _in_a_file(content, ".csv", look)


def profiles(content: bytes) -> None:
    """``authority.toml``."""

    def look(path: Path) -> None:
        try:
            _, found = read_configuration(path)
        except PKIError:
            return
        assert all(timedelta(0) < one.lifetime <= timedelta(days=36500) for one in found.values())

    _in_a_file(content, ".toml", look)


def settings(content: bytes) -> None:
    """A file of settings, and the same text as variables."""
    pairs = (line.partition("=") for line in content.decode("utf-8", "surrogateescape").splitlines())
    _load({name: value for name, separator, value in pairs if separator and "\0" not in name + value})
    _in_a_file(content, ".toml", lambda path: _load({}, path))


def _load(environment: dict[str, str], file: Path | None = None) -> None:
    try:
        found = load(environment, file)
    except ConfigurationError as error:
        assert error.detail
        return
    assert SECRET not in repr(found.database.dsn)


def uri(content: bytes) -> None:
    """No part of a password is in what is told of a URI."""
    try:
        parse(content.decode("utf-8", "replace"))
    except ConfigurationError as error:
        assert SECRET not in error.detail, error
        assert len(error.detail) < 500


# --- what a broker asks ----------------------------------------------------------------------------------------------


class _Serving:
    """The registry of the unit tests, as a reader of the copy in memory."""

    state = True
    now = NOW

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stale(self, _limit_s: float) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(FLEET, name)


class _Silent(Sampler):
    """Nothing is logged."""

    def admit(self, name: str, now: float | None = None) -> tuple[bool, int]:
        return False, 0


_HANDLERS = Handlers(
    _Serving(),
    None,
    BrokerMetrics(CollectorRegistry()),
    _Silent(1),
    DecisionSettings(),
    Limits(3600.0),
)


def form(content: bytes) -> None:
    """A form is answered by its values alone; one that the standard library reads otherwise is denied."""
    known = _read_otherwise(content)
    plain = urlencode(known or {}).encode()
    for question in QUESTIONS.values():
        answer = _HANDLERS.answer(question, content, time.monotonic())
        if isinstance(answer, PendingLogin):
            assert known is not None and "password" in known
            continue
        verdict = _verdict(answer)
        assert re.fullmatch(rb"deny|allow( [a-z]+)*", verdict), content
        if known is None:
            assert verdict == b"deny", content
        else:
            again = _HANDLERS.answer(question, plain, time.monotonic())
            assert isinstance(again, Prepared) and verdict == _verdict(again), content


def _verdict(answer: Prepared) -> bytes:
    message = answer.message()
    assert message.startswith(b"HTTP/1.1 200 "), message
    return message.partition(b"\r\n\r\n")[2]


def _read_otherwise(content: bytes) -> dict[str, str] | None:
    """Return the parameters that a form has by another reading; None if it is none that a broker sends."""
    try:
        text = content.decode()
        found = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=protocol.MOST_PARAMETERS)
    except ValueError:
        return None
    pairs = [(name, value) for name, value in found if name in protocol._LIMITS]
    known = dict(pairs)
    bad = len(known) != len(pairs) or any(
        "\0" in value or len(value.encode()) > protocol._LIMITS[name] for name, value in pairs
    )
    return None if bad or re.search("%(?![0-9A-Fa-f]{2})", text) else known


# --- all of them -----------------------------------------------------------------------------------------------------

_NAMES = ("device_id", "common_name", "type", "status", "status_reason", "expires_at", "attributes")
_PEM = ("-----BEGIN ", "-----END ", "CERTIFICATE-----", "X509 CRL-----", "PRIVATE KEY-----", "CERTIFICATE REQUEST-----")
_DER = ("\x06\x03U\x1d", "\x17\r", "\x18\x0f", "0\x82", "\x06\x03U\x04\x03", "\xa0\x03\x02\x01\x02", "\x02\x01\x00")
_CERTIFICATES = [
    block.der
    for path in sorted(CASES.glob("field/pem/*"))
    for block in blocks(io.BytesIO(path.read_bytes()))
    if block.der is not None
]
_URI = f"postgresql://role:{SECRET}@db:5432/authbackend"

READERS = {
    "policy": Reader(
        policy,
        ("field/policy/*", "field/csv/base.yaml", "fuzz/policy/*"),
        (Path(__file__).parent.parent.joinpath("broker/policy.yaml").read_text(encoding="utf-8"),),
        (
            *("schema: authbackend/1\n", "device_types:", "devices:", "accounts:", "rules:", "client_ids:", "vhosts:"),
            *("effect: ", "allow", "deny", "action: ", "publish", "subscribe", "topic: ", "{device_id}", "{attr.site}"),
            *("networks: ", "max_staleness_s: ", "require_known_certificate: ", "permissions:", "password_hash: "),
            *("login: ", "tags: ", "exchange: ", "note: ", "!!", "&a ", "*a", "<<", "? ", "| ", "> ", "~", "$share/"),
        ),
    ),
    "csv": Reader(
        devices_csv,
        ("field/csv/*.csv", "fuzz/csv/*"),
        ("device_id,common_name,type,status,attr.site,expires_at\nA1,,APM,,hamburg,2027-01-31\n",),
        (*_NAMES, "attr.", "active", "revoked", "2027-01-31T12:00:00Z", '"', ",", "\n", "\ufeff"),
    ),
    "jsonl": Reader(
        devices_jsonl,
        ("field/csv/*.jsonl", "fuzz/jsonl/*"),
        ('{"device_id": "A1", "type": "APM", "attributes": {"site": "hamburg"}}\n', "[]\n"),
        (*(f'"{name}": ' for name in _NAMES), "null", "\\ud800", "\\u0000", "{}", "[]", "1e999"),
    ),
    "bundle": Reader(bundle, ("field/pem/*", "fuzz/bundle/*"), words=(*_PEM, *_DER)),
    "der": Reader(certificate, ("fuzz/der/*",), tuple(_CERTIFICATES), _DER),
    "pem": Reader(pem, ("field/pem/*.pem", "fuzz/pem/*"), words=_PEM),
    "csr": Reader(request, ("field/csr/*", "fuzz/csr/*"), words=(*_PEM, *_DER)),
    "crl": Reader(revocation_list, ("field/crl/*", "fuzz/crl/*"), words=(*_PEM, *_DER)),
    "index": Reader(
        index,
        ("field/index/*", "fuzz/index/*"),
        ("R\t271124120000Z\t261101120000Z,keyCompromise\t0A0B\tunknown\t/CN=b\n",),
        ("R\t", "V\t", "E\t", "20501124120000Z", "holdInstruction", "\tunknown\t", "\x85", "\u2028"),
    ),
    "enrolment": Reader(
        enrolment, ("fuzz/enrolment/*",), ("device_id,type,common_name\nA1,APM,\n",), (*_NAMES, "csr", '"', "\0")
    ),
    "profiles": Reader(
        profiles,
        ("fuzz/profiles/*",),
        ('name = "fleet"\n[profiles.device]\nlifetime_days = 90\nkey = "rsa-2048"\npurpose = "client"\n',),
        ("nan", "inf", "-0", "1e400", "true", "[profiles.", '"""'),
    ),
    "settings": Reader(
        settings,
        ("field/env/*.env", "fuzz/settings/*"),
        (
            f'[database]\ndsn = "{_URI}"\n[enforcement]\nclusters = ["https://a:15671 https://b:15671"]\n',
            f"AUTHBACKEND_DATABASE__DSN={_URI}\nAUTHBACKEND_ENFORCEMENT__CLUSTERS=https://a:15671\n",
        ),
        ("AUTHBACKEND_", "__", "tcp://", "nan", "inf", "[broker.tls]", "listen", "1e400", "[[", "\x00"),
    ),
    "uri": Reader(
        uri,
        ("fuzz/uri/*",),
        (
            _URI,
            *(
                f"{_URI}{line}"
                for line in (CASES / "field/env/uris.txt").read_text(encoding="utf-8").splitlines()
                if line.startswith("?")
            ),
        ),
        (SECRET, "postgres://", "@", "%40", "?host=", "&port=", "[::1]", ",", "sslmode=", "options="),
    ),
    "form": Reader(
        form,
        ("fuzz/form/*",),
        (
            "username=APM0001&password=none&client_id=APM0001_1&vhost=%2F",
            "username=APM0001&vhost=%2F&ip=10.20.0.1&client_id=APM0001_1",
            "username=APM0001&vhost=%2F&resource=queue&name=mqtt-subscription-APM0001qos1&permission=configure",
            "username=APM0001&vhost=%2F&resource=topic&name=amq.topic&permission=write&routing_key=fleet.APM0001.telemetry.a&variable_map.client_id=APM0001_1&variable_map.vhost=%2F",
            "username=amqp-machine&vhost=%2F&resource=exchange&name=events&permission=write&variable_map.username=amqp-machine",
        ),
        (
            *(f"{name}=" for name in protocol._LIMITS),
            "&",
            "%00",
            "%C3%A9",
            "%2F",
            "+",
            "topic",
            "queue",
            "exchange",
            "read",
        ),
    ),
}
