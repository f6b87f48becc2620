"""The endpoint ``/crl/NAME.crl``: serves each authority's CRL from memory, so it works while the database is away."""

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
    """A CRL as it is served, DER."""

    der: bytes
    this_update: datetime

    @property
    def etag(self) -> str:
        """The entity tag: the same on every replica for the same list."""
        return f'"{hashlib.sha256(self.der).hexdigest()[:32]}"'


def to_plain(lists: Mapping[str, PublishedCrl]) -> dict[str, Any]:
    """Return lists as JSON values."""
    return {
        name: {"der": base64.b64encode(each.der).decode("ascii"), "this_update": each.this_update.isoformat()}
        for name, each in lists.items()
    }


def from_plain(values: Mapping[str, Any]) -> dict[str, PublishedCrl]:
    """Return the lists that :func:`to_plain` wrote."""
    return {
        name: PublishedCrl(base64.b64decode(each["der"]), datetime.fromisoformat(each["this_update"]))
        for name, each in values.items()
    }


class PublishedCrls:
    """
    The current revocation lists.

    A request that already has the current list (``If-None-Match``) and sends ``Prefer: wait=SECONDS`` (RFC 7240 4.3) is
    answered when the list changes or after that time, up to a minute, so brokers learn of a revocation immediately.
    """

    def __init__(self) -> None:
        self._lists: dict[str, PublishedCrl] | None = None
        self._changed = asyncio.Event()
        self._closing = False

    def replace(self, lists: Mapping[str, PublishedCrl]) -> None:
        """Serve these lists from now on, keyed by the name of the authority."""
        if self._lists != lists:
            self._lists = dict(lists)
            self._wake()

    async def close(self, _: web.Application) -> None:
        """Answer all waiting requests."""
        self._closing = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _current(self, name: str) -> PublishedCrl:
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
            Unavailable: No list has been loaded since the start.
        """
        name = request.match_info["name"]
        client_etag = request.headers.get("If-None-Match", "")
        changed, crl = self._changed, self._current(name)
        preference = _WAIT.search(request.headers.get("Prefer", ""))
        if preference is not None and client_etag == crl.etag and not self._closing:
            crl = await self._next(name, crl, changed, min(float(preference[1]), LONGEST_WAIT_S))
        headers = {
            "ETag": crl.etag,
            "Last-Modified": format_datetime(crl.this_update, usegmt=True),
            "Cache-Control": "no-cache",  # a revocation must not wait in a cache
        }
        if client_etag == crl.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=crl.der, content_type=CONTENT_TYPE, headers=headers)

    async def _next(self, name: str, served: PublishedCrl, changed: asyncio.Event, wait_s: float) -> PublishedCrl:
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    await changed.wait()
                    changed, crl = self._changed, self._current(name)
                    if crl != served or self._closing:
                        return crl
        except TimeoutError:
            return self._current(name)
