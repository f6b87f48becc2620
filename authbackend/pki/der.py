"""Parses and encodes DER (X.690) where ``cryptography`` would reject a whole certificate or CRL because of one part."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime


def element(der: bytes) -> tuple[int, bytes, bytes]:
    """
    Split off the first element and return its tag, its content and the rest.

    Raises:
        ValueError: It is truncated.
    """
    begin, end = _bounds(der, 0)
    return der[0], der[begin:end], der[end:]


def elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """
    Yield the tag and content of each consecutive element.

    Raises:
        ValueError: One is truncated.
    """
    at = 0
    while at < len(der):
        begin, end = _bounds(der, at)
        yield der[at], der[begin:end]
        at = end


def _bounds(der: bytes, at: int) -> tuple[int, int]:
    """Return where the content of the element at offset ``at`` begins and ends."""
    if len(der) < at + 2:
        raise ValueError("DER is truncated")
    length, begin = der[at + 1], at + 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(der[at + 2 : begin], "big")
    if len(der) < begin + length:
        raise ValueError("DER is truncated")
    return begin, begin + length


def encode(tag: int, content: bytes) -> bytes:
    """Return an element as DER."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def integer(number: int) -> bytes:
    """Return an INTEGER's content in its shortest form."""
    return number.to_bytes((number if number >= 0 else ~number).bit_length() // 8 + 1, "big", signed=True)


def time(text: str) -> datetime:
    """
    Parse a UTCTime or a GeneralizedTime (RFC 5280 4.1.2.5: two-digit years are 1950 to 2049).

    Raises:
        ValueError: Neither of them.
    """
    if len(text) == 13:
        text = ("19" if text[:2] >= "50" else "20") + text
    if len(text) != 15 or text[14] != "Z" or not (text.isascii() and text[:14].isdigit()):
        raise ValueError(f"{text[:32]!r} is not a valid time")
    month, day, hour, minute, second = (int(text[at : at + 2]) for at in range(4, 14, 2))
    return datetime(int(text[:4]), month, day, hour, minute, second, tzinfo=UTC)


def encode_time(moment: datetime) -> bytes:
    """Return a time (UTC, whole seconds) as the element that RFC 5280 4.1.2.5 requires."""
    if 1950 <= moment.year < 2050:
        return encode(0x17, moment.strftime("%y%m%d%H%M%SZ").encode())
    return encode(0x18, f"{moment.year:04}{moment:%m%d%H%M%SZ}".encode())


def dotted(oid: bytes) -> str:
    """Return an object identifier in dotted form from its content."""
    numbers, number = [], 0
    for octet in oid:
        number = number << 7 | octet & 0x7F
        if not octet & 0x80:
            numbers.append(number)
            number = 0
    first = min(numbers[0] // 40, 2) if numbers else 0
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]])) if numbers else "0.0"
