"""Reads the database of ``openssl ca`` (``index.txt``)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from authbackend.pki import der
from authbackend.pki.crl import REASONS, CrlEntry
from authbackend.pki.parsing import MOST_SERIAL_DIGITS, PKIError

_REASONS = {name.lower(): name for name in REASONS} | {
    "keytime": "keyCompromise",
    "cakeytime": "cACompromise",
    "holdinstruction": "certificateHold",
}
_SERIAL = re.compile(f"-?[0-9A-Fa-f]{{1,{MOST_SERIAL_DIGITS}}}")


def index_of(text: str, name: str) -> Iterator[tuple[str, CrlEntry | None]]:
    """
    Yield the serial number of each certificate in an index, with its revocation if it is revoked.

    Source: apps/openssl.h of OpenSSL: tab-separated type (V, R or E), end, ``time[,reason[,extra]]`` of the revocation,
    serial number, file, subject. Editors strip an empty subject together with its tab.

    Args:
        name: The file's name, for messages.
    Raises:
        PKIError: A line has another format.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) not in (5, 6) or fields[0] not in {"V", "R", "E"}:
            raise PKIError(f"{name}:{number}: not a line of openssl's index.txt (six fields separated by tabs)")
        if not _SERIAL.fullmatch(fields[3]):
            raise PKIError(f"{name}:{number}: the serial number {fields[3][:80]!r} cannot be read")
        serial = f"{int(fields[3], 16):x}"
        if fields[0] != "R":
            yield serial, None
            continue
        moment, _, reason = fields[2].partition(",")
        reason = reason.partition(",")[0].lower()
        try:
            revoked_at = der.time(moment)
            if revoked_at.year < 1950:
                raise ValueError(moment)
        except ValueError:
            raise PKIError(f"{name}:{number}: the revocation time cannot be read") from None
        yield serial, CrlEntry(serial, _REASONS.get(reason, "unspecified"), revoked_at)
