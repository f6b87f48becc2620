"""Revoked certificates are refused at the TLS handshake, immediately, on all listeners, and with saved sessions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from authbackend.pki.crl import list_pem, read_list
from authbackend.pki.parsing import PKIError

from .conftest import make_service
from .fleet import Fleet
from .identities import Certificates, anonymous_context
from .mqtt import MQTTClient
from .revocation import DOORS, VERSIONS, Revocable, Tls
from .service import Database

Clients = Callable[..., MQTTClient]
REVOKED = "SSLV3_ALERT_CERTIFICATE_REVOKED"


@pytest.fixture(scope="module")
def revocable(workplace: Path, certificates: Certificates, database: Database, fleet: Fleet) -> Iterator[Revocable]:
    """A running node, with a list that is kept up to date."""
    replica = make_service(workplace, certificates, database, broker_port=8090, health_port=8091)
    root = Path(os.environ["AUTHBACKEND_TEST_RABBITMQ_ROOT"])
    node = Revocable(workplace, root, certificates, replica)
    replica.configure(PKI__AUTHORITY_DIR=str(node.ca), PKI__PASSPHRASE_FILE=str(node.secret))
    try:
        node.start()
        yield node
    finally:
        node.close()


@pytest.fixture
def without_sync(revocable: Revocable) -> Iterator[Revocable]:
    """Stop ``crl sync`` during a test."""
    revocable.stop_sync()
    content = revocable.file.read_bytes()
    path = revocable.file
    yield revocable
    path.write_bytes(content)
    revocable.start_sync()


def serial_of(revocable: Revocable, device_id: str) -> str:
    """Return the serial number of a device's first certificate."""
    return revocable.replica.command("cert", "list", "--device", device_id).splitlines()[1].split()[0]


async def test_a_revoked_certificate_is_refused_at_once_and_the_new_one_goes_on(
    mqtt: Clients, revocable: Revocable, fleet: Fleet
) -> None:
    """After a rotation, the connection with the new certificate stays when the old one is revoked."""
    me = fleet.device()
    old = revocable.enroll(me)
    serial = serial_of(revocable, me)
    new = revocable.enroll(me)
    in_use = mqtt(new, client_id=f"{me}_new", port=DOORS.mqtt_tls)
    assert await in_use.connect() == 0
    client = Tls(old)
    assert client.login() == "accepted"
    requests = fleet.service.count("authbackend_decisions", endpoint="user")
    begin = time.monotonic()
    revocable.sign("cert", "revoke", serial, "--ca", revocable.ca, "--reason", "superseded")
    ended = time.monotonic()
    seconds = client.seconds_until(REVOKED, ended)
    print(f"refused {seconds:.3f} s after the command ended, {seconds + ended - begin:.3f} s after its start")
    requests_meanwhile = fleet.service.count("authbackend_decisions", endpoint="user")
    assert [Tls(old, version).login() for version in VERSIONS] == [REVOKED] * 2
    assert fleet.service.count("authbackend_decisions", endpoint="user") == requests_meanwhile >= requests
    assert await in_use.alive()
    assert Tls(new).login() == "accepted"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_saved_session_does_not_carry_a_revoked_certificate_past_the_check(
    revocable: Revocable, fleet: Fleet, version: str
) -> None:
    """A client offers its saved session: it is not resumed, neither before nor after the revocation."""
    me = fleet.device()
    client = Tls(revocable.enroll(me), version)
    assert client.login() == "accepted"
    assert client.login() == "accepted"
    assert not client.reused
    revocable.sign("cert", "revoke", "--device", me, "--all", "--ca", revocable.ca)
    seconds = client.seconds_until(REVOKED, time.monotonic())
    print(f"{version}: refused {seconds:.3f} s after the command ended")
    assert client.login() == REVOKED


async def test_a_revocation_with_psql_is_signed_by_the_service(
    revocable: Revocable, fleet: Fleet, database: Database
) -> None:
    """Changing the row is enough: the replica with the authority signs a list, and the sync fetches it."""
    me = fleet.device()
    client = Tls(revocable.enroll(me))
    assert client.login() == "accepted"
    begin = time.monotonic()
    database.sql(f"update certificate set state = 'revoked', reason = 'keyCompromise' where device_id = '{me}'")
    seconds = client.seconds_until(REVOKED, begin)
    print(f"psql: refused {seconds:.3f} s after the statement began")


@pytest.mark.parametrize("door", ["amqp_tls", "mqtt_tls", "web_mqtt_tls"])
async def test_every_door_checks(revocable: Revocable, fleet: Fleet, door: str) -> None:
    """MQTT, AMQP and MQTT over WebSocket, which has separate TLS options."""
    me = fleet.device()
    identity = revocable.enroll(me)
    port = getattr(DOORS, door)
    assert Tls(identity, port=port).handshake() == "accepted"
    revocable.sign("cert", "revoke", "--device", me, "--all", "--ca", revocable.ca)
    Tls(identity).seconds_until(REVOKED, time.monotonic())
    assert [Tls(identity, version, port).handshake() for version in VERSIONS] == [REVOKED] * 2


async def test_nobody_gets_in_without_a_certificate(revocable: Revocable, fleet: Fleet) -> None:
    """The options of advanced.config, including fail_if_no_peer_cert, are in effect."""
    client = Tls(revocable.enroll(fleet.device()))
    client.context = anonymous_context(revocable.ca / "ca.pem")
    assert client.login() == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


async def test_without_a_list_in_order_everybody_is_refused_and_a_new_list_is_in_force_at_once(
    without_sync: Revocable, fleet: Fleet
) -> None:
    """Missing, expired or truncated, it refuses everybody; after it is replaced, the next handshake succeeds."""
    client = Tls(without_sync.enroll(fleet.device()))
    file = without_sync.file
    good = file.read_bytes()
    assert client.login() == "accepted"

    file.unlink()
    missing = client.login()
    file.write_bytes(good)
    assert (missing != "accepted", client.login()) == (True, "accepted")

    then = datetime.now(UTC) - timedelta(hours=1)
    late = without_sync.authority.sign_list([], 1, then, timedelta(minutes=59))
    file.write_bytes(list_pem(late.der))
    past = client.login()
    file.write_bytes(good)
    assert (past != "accepted", client.login()) == (True, "accepted")

    file.write_bytes(good[: len(good) // 2])
    half = client.login()
    file.write_bytes(good)
    assert (half != "accepted", client.login()) == (True, "accepted")
    print(f"missing: {missing}; past nextUpdate: {past}; half written: {half}")


async def test_the_sync_says_that_a_list_is_too_old(without_sync: Revocable) -> None:
    """The node then refuses everybody, so the log must say so."""
    then = datetime.now(UTC) - timedelta(hours=1)
    late = without_sync.authority.sign_list([], 10**14, then, timedelta(minutes=59))
    without_sync.file.write_bytes(list_pem(late.der))
    without_sync.start_sync()
    sync = without_sync._sync
    assert sync is not None
    sync.wait_for_line("crl.expired", 10)
    without_sync.stop_sync()


# --- serial numbers that RFC 5280 forbids --------------------------------------------------------------------------


@pytest.mark.parametrize("serial", [0, -1, -(2**62) - 77, 2**159 + 5, 2**500 + 1], ids="{:x}".format)
async def test_whatever_the_serial_number_a_certificate_is_recorded_and_revoked(
    revocable: Revocable, fleet: Fleet, serial: int
) -> None:
    """The node accepts it like any other, so it must be possible to record it and put it on a list."""
    identity = revocable.certificate(fleet.device(), serial=serial)
    assert [Tls(identity, version).login() for version in VERSIONS] == ["accepted"] * 2
    revocable.replica.command("cert", "import", identity.certificate_file)
    signing = ("--ca", revocable.ca, "--passphrase-file", revocable.secret)
    revocable.replica.command("cert", "revoke", *signing, "--", f"{serial:x}")
    Tls(identity).seconds_until(REVOKED, time.monotonic())
    assert [Tls(identity, version).login() for version in VERSIONS] == [REVOKED] * 2


# --- the scope of a list -------------------------------------------------------------------------------------------

POINT = "http://ca.example.test/fleet.crl"
OTHER = "http://ca.example.test/other.crl"
POINTS = {"none": None, "the same": POINT, "another": OTHER}


def scope(
    name: str | None = None,
    *,
    user: bool = False,
    ca: bool = False,
    attribute: bool = False,
    reasons: frozenset[x509.ReasonFlags] | None = None,
    indirect: bool = False,
) -> x509.IssuingDistributionPoint:
    """Return an issuing distribution point."""
    names = [x509.UniformResourceIdentifier(name)] if name else None
    return x509.IssuingDistributionPoint(names, None, user, ca, reasons, indirect, attribute)


BY_THE_LIST = ("accepted", REVOKED)
NOBODY = ("SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_BAD_CERTIFICATE")
LISTED_OR_NOT = ("SSLV3_ALERT_BAD_CERTIFICATE", REVOKED)
ALL_BY_THE_LIST = dict.fromkeys(POINTS, BY_THE_LIST)
WHO_NAMES_A_POINT = {**ALL_BY_THE_LIST, "none": NOBODY}
SCOPES = {
    "no issuing distribution point": (None, ALL_BY_THE_LIST),
    "names a distribution point": (scope(POINT), WHO_NAMES_A_POINT),
    "for users' certificates, named": (scope(POINT, user=True), WHO_NAMES_A_POINT),
    "for users' certificates": (scope(user=True), ALL_BY_THE_LIST),
    "for authorities' certificates": (scope(ca=True), dict.fromkeys(POINTS, NOBODY)),
    "for attribute certificates": (scope(attribute=True), dict.fromkeys(POINTS, NOBODY)),
    "for some reasons": (
        scope(reasons=frozenset([x509.ReasonFlags.key_compromise])),
        dict.fromkeys(POINTS, LISTED_OR_NOT),
    ),
    "indirect": (scope(indirect=True), ALL_BY_THE_LIST),
}
"""Issuing distribution points, and what the node says to a certificate that is not on the list and to one that is."""


def list_of(revocable: Revocable, listed: int, point: x509.IssuingDistributionPoint | None, *, critical: bool) -> bytes:
    """Return a list of the authority with one entry, DER."""
    now = datetime.now(UTC)
    entry = x509.RevokedCertificateBuilder().serial_number(listed).revocation_date(now).build()
    builder = (
        x509.CertificateRevocationListBuilder(revocable.authority.certificate.subject, now, now + timedelta(days=1))
        .add_revoked_certificate(entry)
        .add_extension(x509.CRLNumber(10**14), critical=False)
    )
    if point is not None:
        builder = builder.add_extension(point, critical=critical)
    return builder.sign(revocable.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize("critical", [True, False], ids=["critical", "not critical"])
@pytest.mark.parametrize("name", SCOPES)
async def test_a_list_that_is_taken_lets_in_who_is_not_on_it_and_nobody_else(
    without_sync: Revocable, fleet: Fleet, name: str, critical: bool
) -> None:
    """A list that the service accepts works on the node: with the required distribution point, or without one."""
    me = fleet.device()
    point_of_list, expected = SCOPES[name]
    answers = {}
    for kind, point in POINTS.items():
        good, bad = (without_sync.certificate(me, point=point) for _ in range(2))
        listed = x509.load_pem_x509_certificate(bad.certificate_file.read_bytes()).serial_number
        content = list_of(without_sync, listed, point_of_list, critical=critical)
        without_sync.file.write_bytes(list_pem(content))
        answers[kind] = (Tls(good).login(), Tls(bad).login())
    assert answers == expected
    taken = set()
    for point, kinds in ((None, set(POINTS)), (POINT, {"the same"})):
        with contextlib.suppress(PKIError):
            read_list(content, [without_sync.authority.certificate], point)
            taken |= kinds
    assert {kind: answers[kind] for kind in taken} == dict.fromkeys(taken, BY_THE_LIST)
