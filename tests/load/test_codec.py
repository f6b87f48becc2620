"""Packets as in the OASIS specifications (MQTT 3.1.1 and 5.0), in pieces of any size, and malformed packets."""

from __future__ import annotations

import pytest

from authbackend_load import codec

CASES = [
    (5, "20 03 00 00 00", codec.Packet(codec.CONNACK, (0,))),
    (5, "20 03 00 87 00", codec.Packet(codec.CONNACK, (0x87,))),
    (5, "20 09 01 00 06 21 00 0a 13 00 1e", codec.Packet(codec.CONNACK, (0,), keep_alive_s=30)),
    (5, "20 0a 00 00 07 26 00 01 61 00 01 62", codec.Packet(codec.CONNACK, (0,))),
    (5, "20 06 00 86 03 1f 00 00", codec.Packet(codec.CONNACK, (0x86,))),
    (4, "20 02 00 00", codec.Packet(codec.CONNACK, (0,))),
    (4, "20 02 00 04", codec.Packet(codec.CONNACK, (0x86,))),
    (4, "20 02 00 05", codec.Packet(codec.CONNACK, (0x87,))),
    (5, "90 05 00 07 00 01 87", codec.Packet(codec.SUBACK, (1, 0x87), 7)),
    (5, "90 08 00 07 04 1f 00 01 78 02", codec.Packet(codec.SUBACK, (2,), 7)),
    (4, "90 04 00 07 01 80", codec.Packet(codec.SUBACK, (1, 0x80), 7)),
    (5, "40 02 01 02", codec.Packet(codec.PUBACK, (0,), 0x102)),
    (5, "40 04 01 02 10 00", codec.Packet(codec.PUBACK, (0x10,), 0x102)),
    (4, "40 02 01 02", codec.Packet(codec.PUBACK, (0,), 0x102)),
    (5, "30 06 00 01 61 00 68 69", codec.Packet(codec.PUBLISH)),
    (4, "32 07 00 01 61 00 09 68 69", codec.Packet(codec.PUBLISH, packet_id=9)),
    (5, "d0 00", codec.Packet(codec.PINGRESP)),
    (5, "e0 00", codec.Packet(codec.DISCONNECT, (0,))),
    (5, "e0 02 8e 00", codec.Packet(codec.DISCONNECT, (0x8E,))),
]


@pytest.mark.parametrize(("version", "data", "packet"), CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_the_broker_sends_is_read(version: int, data: str, packet: codec.Packet, size: int) -> None:
    decoder, sent = codec.Decoder(version), bytes.fromhex(data) * 2
    packets = [one for at in range(0, len(sent), size) for one in decoder.feed(sent[at : at + size])]
    assert packets == [packet, packet]


def test_a_long_packet_is_read() -> None:
    """Its length takes more than one byte, which arrive separately."""
    data = codec.publish("a", b"x" * 20_000, 1, 5, version=5)
    decoder = codec.Decoder(5)
    assert list(decoder.feed(data[:2])) == []
    assert list(decoder.feed(data[2:])) == [codec.Packet(codec.PUBLISH, packet_id=5)]


@pytest.mark.parametrize("data", ["20 ff ff ff ff 01", "20 01 00", "90 01 00", "10 00", "20 04 00 00 01 7f"])
def test_what_is_no_packet_is_said_to_be_none(data: str) -> None:
    with pytest.raises(codec.ProtocolError):
        list(codec.Decoder(5).feed(bytes.fromhex(data)))


@pytest.mark.parametrize(
    ("packet", "data"),
    [
        (
            codec.connect("D1", version=4, keep_alive_s=60, clean=True),
            "10 0e 00 04 4d 51 54 54 04 02 00 3c 00 02 44 31",
        ),
        (
            codec.connect("D1", version=5, keep_alive_s=60, clean=False, session_expiry_s=3600),
            "10 14 00 04 4d 51 54 54 05 00 00 3c 05 11 00 00 0e 10 00 02 44 31",
        ),
        (codec.subscribe(7, ["a/#", "b"], 1, version=5), "82 0d 00 07 00 00 03 61 2f 23 01 00 01 62 01"),
        (codec.subscribe(7, ["a/#"], 0, version=4), "82 08 00 07 00 03 61 2f 23 00"),
        (codec.publish("a", b"hi", 1, 9, version=5), "32 08 00 01 61 00 09 00 68 69"),
        (codec.publish("a", b"hi", 0, 0, version=4), "30 05 00 01 61 68 69"),
        (codec.puback(9), "40 02 00 09"),
        (codec.disconnect(version=5), "e0 02 00 00"),
        (codec.disconnect(version=4), "e0 00"),
        (codec.PINGREQ_BYTES, "c0 00"),
    ],
)
def test_what_a_device_sends(packet: bytes, data: str) -> None:
    assert packet == bytes.fromhex(data)


def test_a_topic_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="65536 bytes"):
        codec.publish("x" * 65_536, b"", 0, 0, version=5)
