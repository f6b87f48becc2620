"""``/crl/NAME.crl``: the revocation list of each authority, from memory, so that it is there without the database."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from typing import Any

from aiohttp import web

from authbackend.errors import NotFound, Unavailable

CONTENT_TYPE = "application/pkix-crl"  # RFC 2585 4.2
LONGEST_WAIT_S = 60.0
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:;|,|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PublishedCrl:
    """A list as it is served: DER."""

    der: bytes
    this_update: datetime

    @property
    def etag(self) -> str:
        """The same for the same list on every replica."""
        return f'"{hashlib.sha256(self.der).hexdigest()[:32]}"'


def to_plain(lists: Mapping[str, PublishedCrl]) -> dict[str, Any]:
    """Return lists as JSON values."""
    return {
        name: {"der": base64.b64encode(each.der).decode("ascii"), "this_update": each.this_update.isoformat()}
        for name, each in lists.items()
    }


def from_plain(note: Mapping[str, Any]) -> dict[str, PublishedCrl]:
    """Return the lists that :func:`as_note` wrote."""
    return {
        name: PublishedCrl(base64.b64decode(each["der"]), datetime.fromisoformat(each["this_update"]))
        for name, each in note.items()
    }


class PublishedCrls:
    """
    The present lists.

    A request that has the present list (``If-None-Match``) and says ``Prefer: wait=SECONDS`` (RFC 7240 4.3) is answered
    when there is another, or after that time, at most a minute: a broker hears of a revocation at once.
    """

    def __init__(self) -> None:
        self._lists: dict[str, PublishedCrl] | None = None
        self._changed = asyncio.Event()
        self._closing = False

    def replace(self, lists: Mapping[str, PublishedCrl]) -> None:
        """Serve these from now on, by the names of their authorities."""
        if self._lists != lists:
            self._lists = dict(lists)
            self._wake()

    async def close(self, _: web.Application) -> None:
        """Answer whoever waits."""
        self._closing = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _present(self, name: str) -> PublishedCrl:
        if self._lists is None:
            raise Unavailable("the revocation lists have not been loaded yet")
        if name not in self._lists:
            raise NotFound(f"no authority {name!r} has a revocation list here; see: authbackend crl list")
        return self._lists[name]

    async def show(self, request: web.Request) -> web.Response:
        """
        Return a list.

        Raises:
            NotFound: No authority of that name has one.
            Unavailable: None has been loaded since the start.
        """
        name = request.match_info["name"]
        known = request.headers.get("If-None-Match", "")
        changed, found = self._changed, self._present(name)
        wanted = _WAIT.search(request.headers.get("Prefer", ""))
        if wanted is not None and known == found.etag and not self._closing:
            found = await self._next(name, found, changed, min(float(wanted[1]), LONGEST_WAIT_S))
        headers = {
            "ETag": found.etag,
            "Last-Modified": format_datetime(found.this_update, usegmt=True),
            "Cache-Control": "no-cache",  # a revocation must not wait in a cache
        }
        if known == found.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=found.der, content_type=CONTENT_TYPE, headers=headers)

    async def _next(self, name: str, known: PublishedCrl, changed: asyncio.Event, wait_s: float) -> PublishedCrl:
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    await changed.wait()
                    changed, found = self._changed, self._present(name)
                    if found != known or self._closing:
                        return found
        except TimeoutError:
            return self._present(name)
