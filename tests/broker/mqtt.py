"""An MQTT client that makes every answer of the broker visible to a test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

HOST = "localhost"
ANSWER_TIMEOUT_S = 60.0
RAW_CONNACK = {0x00: 0, 0x84: 1, 0x85: 2, 0x88: 3, 0x86: 4, 0x87: 5}
"""MQTT 3.1.1's return code of CONNACK for the reason code of 5.0 that :class:`MQTTClient` reports for it."""


class Disconnected(Exception):
    """
    The connection ended without the answer; ``reason`` is the code of DISCONNECT, or 0x80 without one.
    """

    def __init__(self, reason: int) -> None:
        super().__init__(f"disconnected, reason 0x{reason:02x}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Message:
    """A received message."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


@dataclass(frozen=True, slots=True)
class Will:
    """A will; ``delay_s`` needs MQTT 5."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    delay_s: int = 0


class _Unchecked(paho.Client):
    """Disables paho's checks of topics and filters: RabbitMQ accepts more, and attackers can send any."""

    @staticmethod
    def _raise_for_invalid_topic(topic: bytes) -> None:
        pass

    @staticmethod
    def _filter_wildcard_len_check(sub: bytes) -> MQTTErrorCode:
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class MQTTClient:
    """
    A client for one connection, with MQTT 3.1.1 (``version=4``) or 5.0 (``version=5``).

    It never reconnects by itself. Reason codes are those of MQTT 5; the codes of a 3.1.1 CONNACK are translated (4 is
    0x86, 5 is 0x87, 2 is 0x85; :data:`RAW_CONNACK` reverses that), those of a SUBACK are as sent (0x80).

    Args:
        tls: The client's TLS context; None: plain TCP.
        client_id: May be empty.
        clean: Clean session (3.1.1) or clean start (5.0).
        session_expiry_s: How long the session outlives the connection (5.0 only).
        username: None: send none; only then does the certificate identify the client.
        password: None: send none; an empty text is sent as an empty password.
        will: The will of the connection.
        user_properties: Pairs for CONNECT (5.0 only).
        websocket: Use MQTT over WebSocket.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None,
        *,
        port: int,
        client_id: str,
        version: int = 5,
        clean: bool = True,
        session_expiry_s: int = 0,
        username: str | None = None,
        password: str | None = None,
        will: Will | None = None,
        user_properties: Sequence[tuple[str, str]] = (),
        websocket: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._port = port
        self._version = version
        self._clean = clean
        self._pending: dict[tuple[str, int], asyncio.Future[list[int]]] = {}
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._connack: asyncio.Future[int] = self._loop.create_future()
        self._closed: asyncio.Future[int] = self._loop.create_future()
        self._properties: Properties | None = None
        self.session_present = False
        self._client = self._paho(client_id, clean, "websockets" if websocket else "tcp")
        if version == 5:
            self._properties = _properties(PacketTypes.CONNECT)
            if session_expiry_s:
                self._properties.SessionExpiryInterval = session_expiry_s
            for pair in user_properties:
                self._properties.UserProperty = pair
        if tls is not None:
            self._client.tls_set_context(tls)
        if username is not None or password is not None:
            self._client.username_pw_set(username or "", password)
        if will is not None:
            self._set_will(will)

    def _paho(self, client_id: str, clean: bool, transport: Literal["tcp", "websockets"]) -> paho.Client:
        client = _Unchecked(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if self._version == 5 else clean,
            protocol=MQTTProtocolVersion(self._version),
            reconnect_on_failure=False,
            transport=transport,
        )
        client.ws_set_options("/ws")
        client.on_connect = lambda _c, _u, flags, code, _p: self._call(self._on_connect, flags.session_present, code)
        client.on_disconnect = lambda _c, _u, _f, code, _p: self._call(self._on_disconnect, code)
        client.on_publish = lambda _c, _u, mid, code, _p: self._call(self._on_answer, "publish", mid, [code])
        client.on_subscribe = lambda _c, _u, mid, codes, _p: self._call(self._on_answer, "subscribe", mid, codes)
        client.on_unsubscribe = lambda _c, _u, mid, codes, _p: self._call(self._on_answer, "unsubscribe", mid, codes)
        client.on_message = lambda _c, _u, message: self._call(
            self._messages.put_nowait,
            Message(message.topic, bytes(message.payload), message.qos, bool(message.retain)),
        )
        return client

    def _set_will(self, will: Will) -> None:
        properties = None
        if will.delay_s:
            properties = _properties(PacketTypes.WILLMESSAGE)
            properties.WillDelayInterval = will.delay_s
        self._client.will_set(will.topic, will.payload, will.qos, will.retain, properties)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        # From paho's thread to the event loop, which may be closed after a test.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_connect(self, session_present: bool, code: ReasonCode) -> None:
        self.session_present = session_present
        if not self._connack.done():
            self._connack.set_result(code.value)

    def _on_disconnect(self, code: ReasonCode) -> None:
        if not self._closed.done():
            self._closed.set_result(code.value)

    def _on_answer(self, kind: str, mid: int, codes: list[ReasonCode]) -> None:
        self._answer(kind, mid).set_result([code.value for code in codes])

    def _answer(self, kind: str, mid: int) -> asyncio.Future[list[int]]:
        return self._pending.setdefault((kind, mid), self._loop.create_future())

    async def _first(self, future: asyncio.Future[Any]) -> Any:
        """Wait for an answer or for the end of the connection, whichever comes first."""
        await asyncio.wait({future, self._closed}, timeout=ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if self._closed.done():
            raise Disconnected(self._closed.result())
        raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s")

    async def connect(self) -> int:
        """
        Connect and return the reason code of CONNACK: 0 is success.

        Raises:
            Disconnected: Closed before a CONNACK.
            OSError: No TCP connection, or TLS refused (ssl.SSLError). With TLS 1.3, a refused certificate appears as
                Disconnected, because the server checks it after the client's last message.
        """
        properties: dict[str, Any] = {}
        if self._version == 5:
            properties = {"clean_start": self._clean, "properties": self._properties}
        await asyncio.to_thread(self._client.connect, HOST, self._port, 60, **properties)
        self._client.loop_start()
        code: int = await self._first(self._connack)
        return code

    async def publish(self, topic: str, payload: bytes | str = b"", *, qos: int = 1, retain: bool = False) -> int:
        """
        Publish and return the reason code of PUBACK (0: success, 0x10: no subscribers); for QoS 0, return 0 once it is
        sent.

        Raises:
            Disconnected: RabbitMQ closed the connection, which is how it refuses a publish.
        """
        if self._closed.done():
            raise Disconnected(self._closed.result())
        mid = self._client.publish(topic, payload, qos, retain).mid
        codes: list[int] = await self._first(self._answer("publish", mid))
        return codes[0]

    async def subscribe(self, *filters: str, qos: int = 1) -> list[int]:
        """
        Subscribe and return the reason codes of SUBACK: the granted QoS, or 0x80 and above for a refusal.

        Raises:
            Disconnected: Closed before a SUBACK.
        """
        if self._closed.done():
            raise Disconnected(self._closed.result())
        if self._version == 5:
            options = SubscribeOptions(qos=qos)
            _, mid = self._client.subscribe([(topic, options) for topic in filters])
        else:
            _, mid = self._client.subscribe([(topic, qos) for topic in filters])
        assert mid is not None
        codes: list[int] = await self._first(self._answer("subscribe", mid))
        return codes

    async def unsubscribe(self, *filters: str) -> list[int]:
        """
        Unsubscribe and return the reason codes of UNSUBACK; for 3.1.1, an empty list.

        Raises:
            Disconnected: Closed before an UNSUBACK.
        """
        _, mid = self._client.unsubscribe(list(filters))
        assert mid is not None
        codes: list[int] = await self._first(self._answer("unsubscribe", mid))
        return codes

    async def message(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Message:
        """
        Wait for the next message.

        Raises:
            TimeoutError: None came in time.
        """
        return await asyncio.wait_for(self._messages.get(), timeout_s)

    def messages(self) -> list[Message]:
        """Return the messages that have arrived since the last call."""
        taken = []
        while not self._messages.empty():
            taken.append(self._messages.get_nowait())
        return taken

    async def disconnected(self, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """
        Wait until the broker ends the connection; return the code of its DISCONNECT (5.0), or 0x80 without one.

        Raises:
            TimeoutError: It is still open.
        """
        return await asyncio.wait_for(asyncio.shield(self._closed), timeout_s)

    @property
    def connected(self) -> bool:
        """
        Whether CONNACK was a success and the connection has not been closed since, as far as this end can tell.
        """
        return self._connack.done() and self._connack.result() == 0 and not self._closed.done()

    async def alive(self) -> bool:
        """
        Return whether the broker still answers on this connection, by an UNSUBSCRIBE without effect.
        """
        try:
            await self.unsubscribe("authbackend/never/subscribed")
        except (Disconnected, TimeoutError):
            return False
        return True

    async def disconnect(self) -> None:
        """Send DISCONNECT and close the connection: no will is sent."""
        self._client.disconnect()
        await asyncio.wait({self._closed}, timeout=ANSWER_TIMEOUT_S)
        await asyncio.to_thread(self._client.loop_stop)

    async def drop(self) -> None:
        """Close the socket without DISCONNECT, so that the will is sent."""
        connection = self._client.socket()
        if isinstance(connection, socket.socket):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({self._closed}, timeout=ANSWER_TIMEOUT_S)
        await asyncio.to_thread(self._client.loop_stop)

    async def close(self) -> None:
        """Close the connection in any state."""
        if self.connected:
            await self.disconnect()
        else:
            await asyncio.to_thread(self._client.loop_stop)


async def connect_all(*clients: MQTTClient) -> list[int]:
    """Connect clients concurrently, as RabbitMQ takes three seconds for each refusal; return the reason codes in order."""
    return list(await asyncio.gather(*(client.connect() for client in clients)))


def _properties(packet: int) -> Properties:
    made: Properties = Properties(packet)  # type: ignore[no-untyped-call]  # not typed in paho
    return made
