"""What the management API reports about connections of each protocol and certificate, and how sweeps use it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID, ObjectIdentifier

from .clients import Management
from .fleet import Fleet
from .identities import Certificates, Identity
from .mqtt import MQTTClient
from .node import Broker
from .service import Database, Service
from .stream import StreamConnection

Clients = Callable[..., MQTTClient]
Sweeps = Callable[[int], Any]
SESSION = {"clean": False, "session_expiry_s": 600}
STREAM_VHOST_DENIED = "0x15 was answered with 12"


@pytest.fixture(scope="module")
def enforcing(lax_broker: Broker, service: Service) -> Iterator[Service]:
    """The service, with enforcement on the lax node."""
    service.stop()
    service.enforce(f"https://localhost:{lax_broker.doors.management_tls}", sweep_interval_s="1")
    service.configure(REGISTRY__MAX_STALENESS_S="10")
    service.start()
    yield service
    service.stop()
    service.enforce("")
    service.configure(REGISTRY__MAX_STALENESS_S="")
    service.command("enforcement", "disable")
    service.start()


@pytest.fixture
def web(mqtt: Clients, lax_broker: Broker, enforcing: Service) -> Clients:
    """Makes clients of MQTT over WebSocket with a certificate."""
    return lambda identity, **options: mqtt(identity, port=lax_broker.doors.web_mqtt_tls, websocket=True, **options)


@pytest_asyncio.fixture
async def api(management: Callable[..., Management], lax_broker: Broker) -> AsyncIterator[Management]:
    """The lax node's management API."""
    async with management("enforcer", "enforcer-password", port=lax_broker.doors.management_tls) as opened:
        yield opened


@pytest.fixture
def swept(enforcing: Service, api: Management) -> Sweeps:
    """``await swept(3)`` waits until three connections are in the statistics, and returns the next complete sweep."""

    def last() -> Any:
        return json.loads(enforcing.command("enforcement", "sweeps", "--json"))

    async def wait(connections: int) -> Any:
        async with asyncio.timeout(60):
            while len((await api.get("connections"))[1]) < connections:
                await asyncio.sleep(0.2)
            seen = {sweep["at"] for sweep in await asyncio.to_thread(last)}
            while len(seen) < 3:  # the second one from now on began after the statistics were complete
                sweep = next(each for each in await asyncio.to_thread(last) if each["cluster"] == "localhost")
                seen.add(sweep["at"])
                await asyncio.sleep(0.2)
            return sweep["report"]

    return wait


async def connected(*clients: MQTTClient) -> None:
    """Connect clients, one after the other."""
    for client in clients:
        assert await client.connect() == 0


async def test_devices_over_websocket_are_no_clients_without_an_id(
    web: Clients, mqtt: Clients, fleet: Fleet, swept: Sweeps
) -> None:
    """With MQTT 3.1.1 and 5: a sweep reports no violation, and compares the properties that they claim."""
    me, liar = fleet.device(), fleet.device()
    old, new = web(me, version=4), web(me, client_id=f"{me}_5")
    claims = web(liar, user_properties=[("client_type", "AGV")])
    await connected(old, new, claims)
    report = await swept(3)
    assert report["found"] == {"property_contradicts": 1}
    assert [await each.alive() for each in (old, new, claims)] == [True] * 3


async def test_a_revoked_device_is_thrown_out_over_websocket(
    web: Clients, fleet: Fleet, api: Management, enforcing: Service
) -> None:
    """Its connections are closed and its session is deleted; another device is not affected."""
    me, other = fleet.device(), fleet.device()
    client, second, neighbour = web(me, **SESSION), web(me, version=4, client_id=f"{me}_2"), web(other, **SESSION)
    await connected(client, second, neighbour)
    assert await client.subscribe(f"fleet/{me}/commands/#") == [1]
    output = json.loads(await asyncio.to_thread(enforcing.command, "device", "revoke", me, "--wait", "--json"))
    (task,) = output["enforcement"]
    assert task["receipt"]["closed"] == {"lax@localhost": 2}
    assert [queue["queue"] for queue in task["receipt"]["queues_deleted"]] == [f"mqtt-subscription-{me}qos1"]
    assert await client.disconnected() is not None
    assert await second.disconnected() is not None
    assert (await api.get(f"queues/%2F/mqtt-subscription-{me}qos1"))[0] == 404
    assert await neighbour.alive()


async def test_a_sweep_closes_over_websocket_whom_nobody_noted(
    web: Clients, fleet: Fleet, database: Database, enforcing: Service
) -> None:
    """Like connections over MQTT."""
    me = fleet.device()
    client = web(me)
    await connected(client)
    database.sql(
        f"set session_replication_role = replica; alter table device disable trigger enforcement_u;"
        f"update device set status = 'revoked' where device_id = '{me}'; alter table device enable always trigger enforcement_u"
    )
    assert await client.disconnected(30) is not None


async def test_a_revoked_certificate_over_websocket(
    web: Clients, certificates: Certificates, fleet: Fleet, enforcing: Service
) -> None:
    """Its connection is closed; that with the device's other certificate is not."""
    me = fleet.device()
    old, new = certificates.device(me), certificates.device(me)
    for each in (old, new):
        enforcing.command("cert", "import", str(each.certificate_file))
    with_old, with_new = web(old), web(new, client_id=f"{me}_2")
    await connected(with_old, with_new)
    enforcing.command("cert", "revoke", f"{serial_of(old):x}", "--reason", "keyCompromise")
    assert await with_old.disconnected(30) is not None
    assert await with_new.alive()


def serial_of(identity: Identity) -> int:
    """Return the serial number of a certificate."""
    return x509.load_pem_x509_certificate(identity.certificate_file.read_bytes()).serial_number


def _attribute(oid: ObjectIdentifier | str, value: str, form: _ASN1Type | None = None) -> x509.NameAttribute:
    return x509.NameAttribute(ObjectIdentifier(oid) if isinstance(oid, str) else oid, value, form)


NAMES = {
    "escaped": [[_attribute(NameOID.ORGANIZATION_NAME, 'Acme, "Inc" + <a>;\\x=#')]],
    "spaces": [[_attribute(NameOID.ORGANIZATION_NAME, text)] for text in (" lead", "#hash", "trail ", " ")],
    "e-mail": [[_attribute(NameOID.EMAIL_ADDRESS, "a,b+c@example.com")]],
    "domain": [[_attribute(NameOID.DOMAIN_COMPONENT, text)] for text in ("com", " #ex,CN=x ")],
    "unicode": [[_attribute(NameOID.ORGANIZATION_NAME, "Ünï 日本 😀")]],
    "bmp": [[_attribute(NameOID.ORGANIZATION_NAME, "Ünï 日本", _ASN1Type.BMPString)]],
    "teletex": [[_attribute(NameOID.ORGANIZATION_NAME, "aÜb", _ASN1Type.T61String)]],
    "control": [[_attribute(NameOID.ORGANIZATION_NAME, "a\tb\x7fc~\n")]],
    "several": [[_attribute(NameOID.SERIAL_NUMBER, "SN 7"), _attribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "x")]],
    "many": [
        [_attribute(oid, f"{oid.dotted_string} x")]
        for oid in (
            *(NameOID.SURNAME, NameOID.GIVEN_NAME, NameOID.INITIALS, NameOID.LOCALITY_NAME, NameOID.TITLE),
            *(NameOID.STATE_OR_PROVINCE_NAME, NameOID.PSEUDONYM, NameOID.STREET_ADDRESS, NameOID.DN_QUALIFIER),
            *(NameOID.GENERATION_QUALIFIER, NameOID.POSTAL_CODE, NameOID.BUSINESS_CATEGORY),
        )
    ],
    "user ids": [[_attribute(NameOID.USER_ID, text)] for text in ("abcdefghij", 'q"\\,' + "x" * 60, "x" * 200, "日本")],
    "unknown": [[_attribute("1.2.3.5", "ia5,x", _ASN1Type.IA5String)], [_attribute("1.2.3.4", "plain")]],
}
UNREADABLE = [[_attribute("1.2.3.4", "Ü,é unknown")]]
"""Erlang prints it as text, and what RabbitMQ makes of that cannot be read back."""


async def test_a_certificate_is_compared_with_the_record_whatever_its_names(
    mqtt: Clients, lax_broker: Broker, certificates: Certificates, fleet: Fleet, swept: Sweeps, enforcing: Service
) -> None:
    """
    Certificates on record stay; one from another authority with a recorded serial number is closed. Unreadable ones are
    reported and stay.
    """
    identities = {}
    for kind, parts in (NAMES | {"unreadable": UNREADABLE}).items():
        me = fleet.device()
        first = [_attribute(NameOID.COMMON_NAME, me), *(parts.pop() if kind == "several" else [])]
        subject = x509.Name(map(x509.RelativeDistinguishedName, [*parts, first]))
        identities[kind] = certificates.named(me, subject)
        enforcing.command("cert", "import", str(identities[kind].certificate_file))
    owner = identities["escaped"]
    recorded = x509.load_pem_x509_certificate(owner.certificate_file.read_bytes())
    forged = certificates.named(owner.name, recorded.subject, serial=recorded.serial_number, by_rival=True)
    port = lax_broker.doors.mqtt_tls
    clients = {kind: mqtt(identity, port=port) for kind, identity in identities.items()}
    impostor = mqtt(forged, port=port, client_id=f"{owner.name}_2")
    await connected(*clients.values(), impostor)
    await fleet.change("update device_type set require_known_certificate = true where name = 'APM'")
    try:
        assert await impostor.disconnected(30) is not None
        report = await swept(len(clients))
        assert [(each["cause"], each["user"], each["why"]) for each in report["entries"]] == [
            (
                "incomplete_facts",
                identities["unreadable"].name,
                "unknown: whether its certificate is the one on record",
            )
        ]
        assert {kind: await client.alive() for kind, client in clients.items()} == dict.fromkeys(clients, True)
    finally:
        await fleet.change("update device_type set require_known_certificate = false where name = 'APM'")


async def test_a_forged_certificate_does_not_share_the_fate_of_a_revoked_one(
    mqtt: Clients, lax_broker: Broker, certificates: Certificates, fleet: Fleet, swept: Sweeps, enforcing: Service
) -> None:
    """The same serial number from another authority is a different certificate."""
    me, other = fleet.device(), fleet.device()
    revoked = certificates.device(me)
    enforcing.command("cert", "import", str(revoked.certificate_file))
    subject = x509.Name([_attribute(NameOID.COMMON_NAME, other)])
    same_number = certificates.named(other, subject, serial=serial_of(revoked), by_rival=True)
    enforcing.command("cert", "revoke", f"{serial_of(revoked):x}")
    port = lax_broker.doors.mqtt_tls
    client, namesake = mqtt(revoked, port=port), mqtt(same_number, port=port)  # the lax node checks no list
    await connected(client, namesake)
    assert await client.disconnected(30) is not None
    assert (await swept(1))["found"] == {}
    assert await namesake.alive()


@pytest.mark.parametrize("serial", [0, -77, -(2**63), 2**400], ids="{:x}".format)
async def test_whatever_its_serial_number_a_revoked_certificate_is_closed(
    mqtt: Clients, lax_broker: Broker, certificates: Certificates, fleet: Fleet, enforcing: Service, serial: int
) -> None:
    """The node reports serial numbers that RFC 5280 forbids like any others."""
    me = fleet.device()
    identity = certificates.named(me, x509.Name([_attribute(NameOID.COMMON_NAME, me)]), serial=serial)
    enforcing.command("cert", "import", str(identity.certificate_file))
    client = mqtt(identity, port=lax_broker.doors.mqtt_tls)  # the lax node checks no list
    await connected(client)
    # By fingerprint: other tests have recorded the same serial numbers of other authorities.
    der = ssl.PEM_cert_to_DER_cert(
        identity.certificate_file.read_text().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----"
    )
    enforcing.command("cert", "revoke", hashlib.sha256(der).hexdigest())
    assert await client.disconnected(30) is not None


async def test_a_device_gets_no_stream(
    lax_broker: Broker, certificates: Certificates, fleet: Fleet, enforcing: Service
) -> None:
    """The login by certificate is allowed, the virtual host is denied: streams have no client id."""
    identity = certificates.device(fleet.device())
    with pytest.raises(ConnectionRefusedError, match=STREAM_VHOST_DENIED):
        await StreamConnection.open(identity.context(), lax_broker.doors.stream_tls)


@pytest.mark.parametrize("noted", [True, False], ids=["change", "sweep"])
async def test_the_stream_of_an_account_that_is_gone_is_closed(
    lax_broker: Broker,
    certificates: Certificates,
    fleet: Fleet,
    database: Database,
    swept: Sweeps,
    noted: bool,
) -> None:
    """By the task, or without one by the next sweep; earlier sweeps leave it open."""
    name = f"streamer-{noted}"
    await fleet.change(f"insert into account (name, login, vhosts) values ('{name}', 'certificate', '{{/}}')")
    connection = await StreamConnection.open(certificates.device(name).context(), lax_broker.doors.stream_tls)
    try:
        assert (await swept(1))["found"] == {}
        assert connection.open_still
        if noted:
            await fleet.change(f"delete from account where name = '{name}'")
        else:
            database.sql(
                f"set session_replication_role = replica; alter table account disable trigger enforcement_u;"
                f"update account set vhosts = '{{/other}}' where name = '{name}';"
                "alter table account enable always trigger enforcement_u"
            )
        await connection.closed(30)
        assert not connection.open_still
    finally:
        connection.close()
