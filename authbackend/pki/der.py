"""As much of DER (X.690) as is needed where the library refuses a whole certificate for one part of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime


def element(der: bytes) -> tuple[int, bytes, bytes]:
    """
    Split the first element from what follows: tag, content, rest.

    Raises:
        ValueError: It is cut off.
    """
    if len(der) < 2:
        raise ValueError("DER is cut off")
    length, begin = der[1], 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(der[2:begin], "big")
    if len(der) < begin + length:
        raise ValueError("DER is cut off")
    return der[0], der[begin : begin + length], der[begin + length :]


def elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """
    Yield the elements of a content: tag, content.

    Raises:
        ValueError: One is cut off.
    """
    while der:
        tag, content, der = element(der)
        yield tag, content


def encode(tag: int, content: bytes) -> bytes:
    """Return an element."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def time(text: str) -> datetime:
    """
    Parse a UTCTime or a GeneralizedTime (RFC 5280 4.1.2.5: two-digit years are 1950 to 2049).

    Raises:
        ValueError: It is neither.
    """
    if len(text) == 13:
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def dotted(oid: bytes) -> str:
    """Return an object identifier's content as text."""
    numbers, number = [], 0
    for octet in oid:
        number = number << 7 | octet & 0x7F
        if not octet & 0x80:
            numbers.append(number)
            number = 0
    first = min(numbers[0] // 40, 2) if numbers else 0
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]])) if numbers else "0.0"
