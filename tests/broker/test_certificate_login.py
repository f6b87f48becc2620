"""The main road: devices with certificates, through the files of ``rabbitmq/``, to this service and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aio_pika.exceptions import AMQPError

from .clients import Disconnected, Management, Mosquitto, MQTTClient, Will, connect_amqp
from .harness import Broker, Identity, Service


@pytest.mark.parametrize("version", [4, 5])
async def test_a_device_publishes_and_subscribes(mqtt: Callable[..., MQTTClient], version: int) -> None:
    """Two connections of one device with its own client ids; QoS 1 arrives."""
    reader = mqtt("APM0001", version=version)
    writer = mqtt("APM0001", version=version, client_id="APM0001_pub")
    assert await reader.connect() == 0
    assert await writer.connect() == 0
    assert await reader.subscribe("fleet/APM0001/telemetry/#") == [1]
    assert await writer.publish("fleet/APM0001/telemetry/speed", b"3.5") == 0
    message = await reader.message()
    assert (message.topic, message.payload, message.qos) == ("fleet/APM0001/telemetry/speed", b"3.5", 1)
    assert await reader.alive()


@pytest.mark.parametrize("version", [4, 5])
async def test_an_unknown_device_is_refused(mqtt: Callable[..., MQTTClient], version: int) -> None:
    """A valid certificate is not enough: the registry must know its common name."""
    assert await mqtt("APM9999", version=version).connect() == 0x86


async def test_a_colon_in_a_common_name_chooses_nobody_else(mqtt: Callable[..., MQTTClient]) -> None:
    """A certificate named ``nosuch:APM0001`` stays a name of its own, which nobody has registered."""
    assert await mqtt("nosuch:APM0001", client_id="APM0001").connect() == 0x86


async def test_a_victims_name_with_the_password_none_is_refused(mqtt: Callable[..., MQTTClient]) -> None:
    """Another device's valid certificate, the victim's name: not the certificate, so not the victim."""
    assert await mqtt("APM0002", client_id="APM0001", username="APM0001", password="none").connect() == 0x86


async def test_a_device_does_not_get_in_by_amqp(
    broker: Broker, service: Service, device: Callable[..., Identity]
) -> None:
    """Its certificate is good, the login carries no client id, and so the virtual host is refused."""
    with pytest.raises(AMQPError):
        await connect_amqp(device("APM0001").context(), port=broker.doors.amqp_tls)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("password", ["none", "x"])
async def test_the_lax_doors_do_not_make_a_victim_of_a_device(
    mqtt: Callable[..., MQTTClient], lax_broker: Broker, plain: bool, password: str
) -> None:
    """Where no certificate is needed, a device's name and any password are refused all the same."""
    port = lax_broker.doors.mqtt_plain if plain else lax_broker.doors.mqtt_tls
    options = {"client_id": "APM0001", "username": "APM0001", "password": password}
    assert await mqtt(None, plain=plain, port=port, **options).connect() == 0x86


async def test_a_will_is_sent_when_the_connection_is_lost(mqtt: Callable[..., MQTTClient]) -> None:
    """The broker asks about the will when it fires, and sends it."""
    reader = mqtt("APM0001")
    lost = mqtt("APM0001", client_id="APM0001_w", will=Will("fleet/APM0001/telemetry/lost", b"gone"))
    assert await reader.connect() == 0
    assert await reader.subscribe("fleet/APM0001/telemetry/lost") == [1]
    assert await lost.connect() == 0
    await lost.drop()
    assert (await reader.message()).payload == b"gone"


async def test_a_denied_publish_ends_the_connection(mqtt: Callable[..., MQTTClient]) -> None:
    """RabbitMQ denies a publish by closing."""
    client = mqtt("APM0001")
    assert await client.connect() == 0
    with pytest.raises(Disconnected):
        await client.publish("fleet/APM0002/secret")


async def test_mosquittos_command_line(mosquitto: Callable[[str], Mosquitto]) -> None:
    """The two commands of the README."""
    device = mosquitto("APM0001")
    options = ["-V", "mqttv5", "-t", "test", "-q", "1"]
    user = ["--property", "CONNECT", "user-property", "client_type", "APM"]
    # A persistent session made first, so that the message waits for the subscriber and nothing has to be
    # timed.
    session = ["-i", "APM0001", "-c", "-x", "60"]
    assert (await device.subscribe(*options, *session, *user, "-E")).status == 0
    sent = await device.publish(*options, "-i", "APM0001_pub", "-m", "hello")
    assert (sent.status, sent.errors) == (0, "")
    received = await device.subscribe(*options, *session, "-C", "1")
    assert (received.status, received.output) == (0, "hello\n")


async def test_monitoring_sees_the_certificate_of_a_connection(
    mqtt: Callable[..., MQTTClient], management: Callable[..., Management]
) -> None:
    """The tag of the account works, and the API shows who is connected; a wrong password is refused."""
    client = mqtt("APM0001", user_properties=[("client_type", "APM")])
    assert await client.connect() == 0
    async with management("monitoring", "monitoring") as api:
        status, listed = await api.get("connections/username/APM0001")
        assert status == 200
        assert [connection["user"] for connection in listed] == ["APM0001"]
        # The full list reads statistics, which a new connection sends within five seconds.
        async with asyncio.timeout(15):
            while not (found := [c for c in (await api.get("connections"))[1] if c.get("peer_cert_subject")]):
                await asyncio.sleep(0.1)
        assert found[0]["peer_cert_subject"] == "CN=APM0001"
    async with management("monitoring", "wrong") as api:
        assert (await api.get("overview"))[0] == 401
