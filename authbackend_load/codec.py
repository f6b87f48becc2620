"""
Encodes and decodes the packets of MQTT 3.1.1 and 5.0 that a device of a load test sends and receives. Pure.

It sends CONNECT, SUBSCRIBE, PUBLISH, PUBACK, PINGREQ and DISCONNECT, and receives CONNACK, SUBACK, PUBLISH, PUBACK,
PINGRESP and DISCONNECT. Properties of MQTT 5 are skipped, except the server keep-alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

V5 = 5

CONNACK = 2
PUBLISH = 3
PUBACK = 4
SUBACK = 9
PINGRESP = 13
DISCONNECT = 14

PINGREQ_BYTES = b"\xc0\x00"
_LONGEST_HEADER = 5
_LONGEST_TEXT = 65_535
_LONGEST_PACKET = 268_435_455
_SESSION_EXPIRY = 0x11
_SERVER_KEEP_ALIVE = 0x13
_ONE_BYTE = frozenset({0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A})
_TWO_BYTES = frozenset({0x13, 0x21, 0x22, 0x23})
_FOUR_BYTES = frozenset({0x02, 0x11, 0x18, 0x27})
_TEXT = frozenset({0x03, 0x08, 0x09, 0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F})
_VARIABLE = 0x0B
_USER_PROPERTY = 0x26

REASONS = {
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8B: "server shutting down",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x9F: "connection rate exceeded",
}
"""MQTT 5's names of the reason codes of failures."""

_REASON_OF_311 = {1: 0x84, 2: 0x85, 3: 0x88, 4: 0x86, 5: 0x87}
UNAUTHORIZED = frozenset({0x86, 0x87})
"""The reason codes with which RabbitMQ refuses a client."""


class ProtocolError(Exception):
    """The broker sent what MQTT does not allow, or a packet that a device never receives."""


@dataclass(frozen=True, slots=True)
class Packet:
    """
    One packet from the broker.

    Attributes:
        kind: CONNACK, PUBLISH, PUBACK, SUBACK, PINGRESP or DISCONNECT.
        codes: Reason codes of MQTT 5 (those of a 3.1.1 CONNACK are translated): one, or one per filter in SUBACK.
        packet_id: Of PUBLISH (0 with QoS 0), PUBACK and SUBACK.
        keep_alive_s: The server keep-alive of CONNACK, None without one.
    """

    kind: int
    codes: tuple[int, ...] = ()
    packet_id: int = 0
    keep_alive_s: int | None = None


def reason_text(code: int) -> str:
    """Return a reason code with its name, for example ``0x87 not authorized``."""
    return f"0x{code:02x} {REASONS.get(code, 'unknown')}"


def connect(client_id: str, *, version: int, keep_alive_s: int, clean: bool, session_expiry_s: int = 0) -> bytes:
    """
    Return CONNECT without user name and password: the certificate identifies the device.

    Args:
        version: 4 is MQTT 3.1.1, 5 is 5.0.
        clean: Clean session (3.1.1) or clean start (5.0).
        session_expiry_s: How long the session outlives the connection, 5.0 only.
    """
    body = _text("MQTT") + bytes((version, 0x02 if clean else 0x00)) + keep_alive_s.to_bytes(2, "big")
    if version == V5:
        expiry = bytes((_SESSION_EXPIRY,)) + session_expiry_s.to_bytes(4, "big") if session_expiry_s else b""
        body += _length(len(expiry)) + expiry
    return _packet(0x10, body + _text(client_id))


def subscribe(packet_id: int, filters: list[str], qos: int, *, version: int) -> bytes:
    """Return SUBSCRIBE of these topic filters with one QoS."""
    properties = b"\x00" if version == V5 else b""
    body = packet_id.to_bytes(2, "big") + properties + b"".join(_text(name) + bytes((qos,)) for name in filters)
    return _packet(0x82, body)


def publish(topic: str, payload: bytes, qos: int, packet_id: int, *, version: int) -> bytes:
    """Return PUBLISH, not retained; ``packet_id`` is used with QoS 1 only."""
    identifier = packet_id.to_bytes(2, "big") if qos else b""
    properties = b"\x00" if version == V5 else b""
    return _packet(0x30 | qos << 1, _text(topic) + identifier + properties + payload)


def puback(packet_id: int) -> bytes:
    """Return PUBACK with success, which is the same in both versions."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def disconnect(*, version: int) -> bytes:
    """Return a normal DISCONNECT."""
    return b"\xe0\x02\x00\x00" if version == V5 else b"\xe0\x00"


class Decoder:
    """Decodes packets from bytes that arrive in pieces of any size."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Packet]:
        """
        Add bytes and yield the packets that are complete.

        Raises:
            ProtocolError: The bytes are not a packet that a broker sends to a device.
        """
        self._buffer += data
        while (packet := self._take()) is not None:
            yield self._parse(*packet)

    def _take(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, begin = buffer[1], 2
        if length >= 0x80:
            try:
                length, begin = _variable(buffer, 1)
            except IndexError:
                if len(buffer) >= _LONGEST_HEADER:
                    raise ProtocolError("a packet's length has more than four bytes") from None
                return None
        if len(buffer) < begin + length:
            return None
        head, body = buffer[0], bytes(buffer[begin : begin + length])
        del buffer[: begin + length]
        return head, body

    def _parse(self, head: int, body: bytes) -> Packet:
        kind = head >> 4
        try:
            match kind:
                case 2:
                    return self._connack(body)
                case 3:
                    return self._publish(head, body)
                case 4:
                    code = body[2] if self._version == V5 and len(body) > 2 else 0
                    return Packet(PUBACK, (code,), _number(body, 0))
                case 9:
                    begin = _skip(body, 2) if self._version == V5 else 2
                    return Packet(SUBACK, tuple(body[begin:]), _number(body, 0))
                case 13:
                    return Packet(PINGRESP)
                case 14:
                    return Packet(DISCONNECT, (body[0] if body else 0,))
        except IndexError:
            raise ProtocolError(f"packet type {kind} is too short: {body.hex()}") from None
        raise ProtocolError(f"packet type {kind} is never sent to a device")

    def _connack(self, body: bytes) -> Packet:
        code = body[1]
        if self._version != V5:
            return Packet(CONNACK, (_REASON_OF_311.get(code, 0x80) if code else 0,))
        return Packet(CONNACK, (code,), keep_alive_s=_server_keep_alive(body, 2))

    def _publish(self, head: int, body: bytes) -> Packet:
        begin = 2 + _number(body, 0)
        return Packet(PUBLISH, packet_id=_number(body, begin) if head & 0x06 else 0)


def _server_keep_alive(body: bytes, at: int) -> int | None:
    length, at = _variable(body, at)
    end = at + length
    while at < end:
        name = body[at]
        at += 1
        if name == _SERVER_KEEP_ALIVE:
            return _number(body, at)
        if name in _ONE_BYTE:
            at += 1
        elif name in _TWO_BYTES:
            at += 2
        elif name in _FOUR_BYTES:
            at += 4
        elif name in _TEXT:
            at += 2 + _number(body, at)
        elif name == _USER_PROPERTY:
            at += 2 + _number(body, at)
            at += 2 + _number(body, at)
        elif name == _VARIABLE:
            at = _variable(body, at)[1]
        else:
            raise ProtocolError(f"unknown property 0x{name:02x} in CONNACK")
    return None


def _skip(body: bytes, at: int) -> int:
    length, begin = _variable(body, at)
    return begin + length


def _variable(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return a variable byte integer and where it ends; IndexError if it does not end within four bytes."""
    value = 0
    for shift in (0, 7, 14, 21):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _number(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def _text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > _LONGEST_TEXT:
        raise ValueError(f"text of {len(encoded)} bytes; MQTT allows up to {_LONGEST_TEXT}")
    return len(encoded).to_bytes(2, "big") + encoded


def _length(length: int) -> bytes:
    out = bytearray()
    while True:
        length, byte = length >> 7, length & 0x7F
        out.append(byte | (0x80 if length else 0))
        if not length:
            return bytes(out)


def _packet(head: int, body: bytes) -> bytes:
    if len(body) > _LONGEST_PACKET:
        raise ValueError(f"packet of {len(body)} bytes; MQTT allows up to {_LONGEST_PACKET}")
    return bytes((head,)) + _length(len(body)) + body
