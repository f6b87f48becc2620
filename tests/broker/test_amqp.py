"""AMQP: services can use it, devices cannot, and the queues of devices' sessions cannot be reached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue, HeadersType
from aio_pika.exceptions import AMQPConnectionError, AMQPError, ChannelClosed

from .clients import connect_amqp
from .fleet import Fleet
from .identities import Certificates
from .mqtt import MQTTClient
from .node import Broker

Clients = Callable[..., MQTTClient]
Connections = Callable[[str], Awaitable[AbstractConnection]]
ACCESS_REFUSED = "ACCESS_REFUSED"


@pytest_asyncio.fixture
async def amqp(broker: Broker, certificates: Certificates, fleet: Fleet) -> AsyncIterator[Connections]:
    """``await amqp("collector")`` connects as a service that logs in by certificate; it is closed after the test."""
    opened: list[AbstractConnection] = []

    async def connect(name: str) -> AbstractConnection:
        opened.append(await connect_amqp(certificates.device(name).context(), port=broker.doors.amqp_tls))
        return opened[-1]

    yield connect
    for connection in opened:
        await connection.close()


async def _queue_of_a_sleeping_device(mqtt: Clients, device: str) -> str:
    """Make a device's persistent session with one message; return the name of its queue."""
    sleeper = mqtt(device, clean=False, session_expiry_s=60)
    assert await sleeper.connect() == 0
    assert await sleeper.subscribe(f"fleet/{device}/telemetry/#", f"fleet/{device}/commands/#") == [1, 1]
    await sleeper.disconnect()
    writer = mqtt(device, client_id=f"{device}_pub")
    assert await writer.connect() == 0
    assert await writer.publish(f"fleet/{device}/telemetry/x", b"for the device") == 0
    return f"mqtt-subscription-{device}qos1"


async def _messages_of(mqtt: Clients, device: str, count: int) -> list[bytes]:
    awake = mqtt(device, clean=False, session_expiry_s=60)
    assert await awake.connect() == 0
    assert awake.session_present
    return [(await awake.message()).payload for _ in range(count)]


async def test_a_devices_certificate_does_not_open_amqp(amqp: Connections, fleet: Fleet) -> None:
    """The login is allowed; the virtual host is denied, because AMQP has no client id."""
    me = fleet.device()
    before = fleet.service.denials(endpoint="vhost", reason="client_id_missing")
    with pytest.raises(AMQPError):
        await amqp(me)
    assert fleet.service.denials(endpoint="vhost", reason="client_id_missing") == before + 1


@pytest.mark.parametrize("password", ["none", "x", ""])
async def test_a_devices_name_and_a_password_do_not_open_amqp(
    broker: Broker, certificates: Certificates, fleet: Fleet, password: str
) -> None:
    """PLAIN with the name of a device, over a connection with another device's certificate."""
    victim, tls = fleet.device(), certificates.device(fleet.device()).context()
    before = fleet.service.denials(endpoint="user", reason="password_on_certificate_identity")
    with pytest.raises(AMQPConnectionError):
        await connect_amqp(tls, port=broker.doors.amqp_tls, username=victim, password=password)
    assert fleet.service.denials(endpoint="user", reason="password_on_certificate_identity") == before + 1


async def test_a_service_collects_what_devices_publish(amqp: Connections, mqtt: Clients, fleet: Fleet) -> None:
    """By certificate, with a queue of its own, which it can bind only to topics that its rules allow."""
    me = fleet.device()
    connection = await amqp("collector")
    channel = await connection.channel()
    queue = await channel.declare_queue("collector-telemetry", exclusive=True)
    await queue.bind("amq.topic", "fleet.*.telemetry.#")
    device = mqtt(me)
    assert await device.connect() == 0
    assert await device.publish(f"fleet/{me}/telemetry/speed", b"3.5") == 0
    message = await queue.get(timeout=10)
    assert (message.routing_key, message.body) == (f"fleet.{me}.telemetry.speed", b"3.5")
    await message.ack()
    for key in ("#", "fleet.#", "fleet.*.commands.#", "*.*.*.*"):
        other = await (await connection.channel()).get_queue("collector-telemetry", ensure=False)
        with pytest.raises(ChannelClosed, match=ACCESS_REFUSED):
            await other.bind("amq.topic", key)
    with pytest.raises(ChannelClosed, match=ACCESS_REFUSED):
        await (await connection.channel()).declare_queue("telemetry", exclusive=True)


async def test_wildcards_do_not_reach_the_devices_sessions(amqp: Connections, mqtt: Clients, fleet: Fleet) -> None:
    """``collector`` may read "*", which does not include queues of sessions: no read, purge, bind or delete."""
    victim = fleet.device()
    name = await _queue_of_a_sleeping_device(mqtt, victim)
    connection = await amqp("collector")

    async def seen(_message: AbstractIncomingMessage) -> None:
        pytest.fail("read from a device's session")

    attempts: dict[str, Callable[[AbstractQueue], Awaitable[object]]] = {
        "get": lambda queue: queue.get(fail=False),
        "consume": lambda queue: queue.consume(seen),
        "purge": lambda queue: queue.purge(),
        "bind": lambda queue: queue.bind("amq.topic", "fleet.x.telemetry.#"),
        "delete": lambda queue: queue.delete(if_unused=False, if_empty=False),
    }
    denied = fleet.service.denials(endpoint="resource", reason="resource_not_permitted")
    for attempt in attempts.values():
        channel = await connection.channel()
        queue = await channel.get_queue(name, ensure=False)
        with pytest.raises(ChannelClosed, match=ACCESS_REFUSED):
            await attempt(queue)
    assert fleet.service.denials(endpoint="resource", reason="resource_not_permitted") == denied + len(attempts)
    assert await _messages_of(mqtt, victim, 1) == [b"for the device"]


async def test_a_service_publishes_to_devices_inside_its_rules(amqp: Connections, mqtt: Clients, fleet: Fleet) -> None:
    """
    ``dispatcher`` may write "*" and publish commands. Other topics are refused, also as a second key in the ``CC`` header,
    and so is the default exchange, which would put a message into a device's session without any topic rule.
    """
    victim = fleet.device()
    name = await _queue_of_a_sleeping_device(mqtt, victim)
    connection = await amqp("dispatcher")

    async def publish(exchange: str, key: str, copies: HeadersType) -> None:
        channel: AbstractChannel = await connection.channel()
        target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        async with asyncio.timeout(10):
            await target.publish(Message(exchange.encode() or b"forged", headers=copies), key)

    refused: list[tuple[str, str, HeadersType]] = [
        ("amq.topic", f"fleet.{victim}.telemetry.x", {}),
        ("amq.topic", "#", {}),
        ("amq.topic", f"fleet.{victim}.commands.stop", {"CC": [f"fleet.{victim}.telemetry.x"]}),
        ("amq.topic", f"fleet.{victim}.commands.stop", {"BCC": [f"fleet.{victim}.telemetry.x"]}),
        ("", name, {}),
    ]
    for exchange, key, copies in refused:
        with pytest.raises(ChannelClosed, match=ACCESS_REFUSED):
            await publish(exchange, key, copies)
    await publish("amq.topic", f"fleet.{victim}.commands.stop", {})
    assert await _messages_of(mqtt, victim, 2) == [b"for the device", b"amq.topic"]
