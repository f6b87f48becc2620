"""The listeners of the node with the unchanged files of ``rabbitmq/``."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest

from .identities import Certificates, Identity, anonymous_context
from .mqtt import HOST, Disconnected, MQTTClient
from .node import Broker


def test_the_node_listens_for_tls_only(broker: Broker) -> None:
    """Every listener except that for other nodes uses TLS. (The lax node shares this network.)"""
    listeners = "[{element(3, L), element(6, L)} || L <- rabbit_networking:node_listeners(node())]"
    text = broker.control("eval", f"lists:sort({listeners}).")
    expected = "[{'amqp/ssl',5671},{clustering,25672},{https,15671},{'mqtt/ssl',8883}]"
    assert "".join(text.split()) == expected


@pytest.mark.parametrize("port", [5672, 15672, 15675, 15692])
def test_there_is_no_plain_door(broker: Broker, port: int) -> None:
    """AMQP, management, WebSocket and Prometheus: there is no listener on the usual ports without TLS."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=5).close()


async def test_the_websocket_door_needs_a_certificate(lax_broker: Broker, certificates: Certificates) -> None:
    """The optional file has separate TLS options, and adds no listener without TLS."""
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await _exchange(lax_broker.doors.web_mqtt_tls, anonymous_context(certificates.ca_file))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, 15675), timeout=5).close()
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    context = certificates.device("APM0001").context()
    assert (await _exchange(lax_broker.doors.web_mqtt_tls, context, request)).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("door", ["amqp_tls", "mqtt_tls"])
@pytest.mark.parametrize("client", ["nobody", "stranger"])
async def test_tls_needs_a_certificate_of_the_devices_authority(
    broker: Broker, certificates: Certificates, door: str, client: str
) -> None:
    """Without a certificate, or with one of another authority, the handshake fails."""
    context = anonymous_context(certificates.ca_file)
    if client == "stranger":
        context = certificates.stranger("APM0001").context()
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await _exchange(getattr(broker.doors, door), context)


async def test_the_brokers_own_login_is_no_device(broker: Broker, certificates: Certificates) -> None:
    """
    The broker's client certificate for authbackend is not accepted from a device: another authority signed it.
    """
    files = certificates.directory
    login = Identity("x", files / "broker-client.pem", files / "broker-client.key", certificates.ca_file)
    client = MQTTClient(login.context(), port=broker.doors.mqtt_tls, client_id="x")
    with pytest.raises((Disconnected, ssl.SSLError, ConnectionResetError)):
        await client.connect()
    await client.close()


async def test_management_does_not_ask_for_a_certificate(broker: Broker, certificates: Certificates) -> None:
    """People log in there by password; without one, the answer is 401, over TLS."""
    context = anonymous_context(certificates.ca_file)
    request = b"GET /api/overview HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = await _exchange(broker.doors.management_tls, context, request)
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_the_settings_that_have_no_key_are_in_force(broker: Broker) -> None:
    """rabbitmq-env.conf and advanced.config were read, and sessions use quorum queues."""
    assert broker.control("eval", "httpc:get_options([max_sessions]).").strip() == "{ok,[{max_sessions,64}]}"
    colons = "application:get_env(rabbitmq_mqtt,ignore_colons_in_username)."
    assert broker.control("eval", colons).strip() == "{ok,true}"
    queues = "application:get_env(rabbitmq_mqtt,durable_queue_type)."
    assert broker.control("eval", queues).strip() == "{ok,quorum}"


def test_the_lax_node_has_the_doors_that_the_strict_one_lacks(lax_broker: Broker) -> None:
    """The overlay has the intended effect; otherwise the tests with it would test nothing."""
    with socket.create_connection((HOST, lax_broker.doors.mqtt_plain), timeout=5):
        pass


async def _exchange(port: int, context: ssl.SSLContext, request: bytes = b"") -> bytes:
    """
    Send data over TLS and read to the end. With TLS 1.3, the server's refusal comes with the first read.
    """
    reader, writer = await asyncio.open_connection(HOST, port, ssl=context)
    try:
        writer.write(request or b"AMQP\x00\x00\x09\x01")
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()
