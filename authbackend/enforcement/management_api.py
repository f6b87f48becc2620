"""
The management API of one RabbitMQ cluster: who is connected, which queues there are, and ending both.

Source: RabbitMQ's HTTP API reference, and what 4.3.6 was observed to do: the list of a user's connections reads the
connection tracking and is true at once; the list of all connections reads statistics and may be seconds late.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import structlog
from yarl import URL

from authbackend.errors import Unavailable
from authbackend.file_stamps import Stamps, stamps

log = structlog.get_logger(__name__)

PAGE = 500
"""RabbitMQ allows at most this many entries on a page; longer lists are read in parts of this size, too."""

LIST_TIMEOUT_S = 60.0
"""For a list of everything, which takes RabbitMQ seconds when there is much."""

_CONNECTION_COLUMNS = (
    "name,node,user,vhost,protocol,peer_host,client_properties,connected_at,"
    "peer_cert_serial_number,peer_cert_issuer,peer_cert_subject,peer_cert_validity"
)
_MQTT = re.compile(r"(Web )?MQTT\b")
_WITHOUT_CLIENT_ID = re.compile(r"(Web )?(AMQP|STOMP)\b|Direct\b|stream\b")
_REASON = {"X-Reason": "authbackend: not permitted any more"}


@dataclass(frozen=True, slots=True)
class Connection:
    """A live connection, as the connection tracking knows it."""

    name: str
    node: str
    user: str


@dataclass(frozen=True, slots=True)
class LiveConnection:
    """
    A live connection, as the statistics know it. What they do not tell is empty or None.

    Args:
        protocol: ``MQTT 5-0``, ``Web MQTT 5-0``, ``AMQP 0-9-1``, ``AMQP 1-0``, ``stream``, ``STOMP 1.2`` and so on.
        client_id: MQTT only.
        certificate_subject: RFC 4514, None without TLS or certificate; likewise the issuer.
        certificate_serial: Hexadecimal as RabbitMQ writes it, from 4.2.7 on.
        certificate_validity: Its beginning and end as RabbitMQ writes them.
        user_properties: Of an MQTT 5 CONNECT.
        connected_at: Seconds since the epoch.
    """

    name: str
    node: str
    user: str
    vhost: str
    protocol: str
    address: str
    client_id: str | None
    certificate_subject: str | None
    certificate_serial: str | None
    user_properties: dict[str, str]
    connected_at: float
    certificate_issuer: str | None = None
    certificate_validity: str | None = None

    @property
    def mqtt(self) -> bool | None:
        """True for MQTT, also over WebSocket; False for a protocol without client ids; None if it is not known."""
        if _MQTT.match(self.protocol):
            return True
        return False if _WITHOUT_CLIENT_ID.match(self.protocol) else None


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue; ``messages`` as far as they are counted."""

    vhost: str
    name: str
    messages: int


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding of a queue; ``key`` is how RabbitMQ names it among those of the same ends."""

    source: str
    routing_key: str
    key: str


@dataclass(frozen=True, slots=True)
class Access:
    """
    How to reach a cluster.

    Args:
        urls: Management URLs of its nodes; any of them answers for all.
        credentials: Returns user name and password, read anew when they are refused.
        ca_file: The authority of the nodes' certificates, PEM, read again when it changes; None: the system's.
    """

    urls: tuple[str, ...]
    credentials: Callable[[], tuple[str, str]]
    ca_file: str | None = None
    timeout_s: float = 5.0


class ClusterUnreachable(Unavailable):
    """No node of a cluster answers, or none lets the account in: nothing can be done there now."""


class CallRefused(Unavailable):
    """The nodes answer, and refuse this one call."""


class ManagementAPI:
    """
    One cluster, by the management API of its nodes. Implements ``clusters.Cluster``.

    Args:
        access: Where and as whom.
    """

    def __init__(self, access: Access) -> None:
        self.name = URL(access.urls[0]).host or access.urls[0]
        self._access = access
        self._urls = list(access.urls)
        self._session: aiohttp.ClientSession | None = None
        self._replaced: aiohttp.ClientSession | None = None
        self._ca_seen: Stamps = ()
        self._ca_refused: Stamps = ()

    async def aclose(self) -> None:
        """End the connections to it; the next call opens one."""
        sessions = self._session, self._replaced
        self._session = self._replaced = None
        for session in sessions:
            if session is not None:
                await session.close()

    async def nodes(self) -> dict[str, bool]:
        """Return the cluster's nodes and whether the one that answered sees each of them running."""
        found = await self._get("/api/nodes?columns=name,running")
        return {node["name"]: bool(node["running"]) for node in found}

    async def connections_of(self, user: str) -> list[Connection]:
        """Return a user's live connections, true at once."""
        found = await self._get(f"/api/connections/username/{_quoted(user)}")
        return [Connection(each["name"], each["node"], each["user"]) for each in found]

    async def close_user(self, user: str) -> None:
        """Close every connection of a user, on every node."""
        await self._call("DELETE", f"/api/connections/username/{_quoted(user)}", headers=_REASON)

    async def details(self, name: str) -> LiveConnection | None:
        """Return what the statistics know of a connection; None if they do not have it, or not yet."""
        found = await self._get(f"/api/connections/{_quoted(name)}?columns={_CONNECTION_COLUMNS}", missing=None)
        return _live(found) if found and found.get("user") else None

    async def close_connection(self, name: str) -> bool:
        """Close one connection; return False if it is gone, or not in the statistics yet."""
        status, _ = await self._call("DELETE", f"/api/connections/{_quoted(name)}", headers=_REASON)
        return status != 404

    async def connections(self) -> AsyncIterator[list[LiveConnection]]:
        """Yield all connections, so many at a time; one that is younger than the statistics may be missing."""
        async for part in self._whole(f"/api/connections?columns={_CONNECTION_COLUMNS}"):
            yield [_live(each) for each in part]

    async def queues(self, pattern: str | None = None) -> AsyncIterator[list[Queue]]:
        """Yield the queues whose name matches a regular expression, or all, so many at a time."""
        path = "/api/queues?disable_stats=true&enable_queue_totals=true"
        if pattern is None:
            parts = self._whole(f"{path}&columns=name,vhost,messages")
        else:
            parts = self._pages(f"{path}&use_regex=true&name={_quoted(pattern)}")
        async for part in parts:
            yield [Queue(each["vhost"], each["name"], each.get("messages", 0)) for each in part]

    async def bindings(self, queue: Queue) -> list[Binding]:
        """Return what is bound to a queue, but for the default exchange; none if the queue is gone."""
        found = await self._get(f"{_queue(queue)}/bindings", missing=[])
        return [Binding(b["source"], b["routing_key"], b["properties_key"]) for b in found if b["source"]]

    async def all_bindings(self, vhost: str) -> AsyncIterator[list[tuple[str, Binding]]]:
        """Yield the bindings of all queues of a virtual host, each with the queue's name, so many at a time."""
        columns = "source,destination,destination_type,routing_key,properties_key"
        async for part in self._whole(f"/api/bindings/{_quoted(vhost)}?columns={columns}"):
            yield [
                (b["destination"], Binding(b["source"], b["routing_key"], b["properties_key"]))
                for b in part
                if b["source"] and b["destination_type"] == "queue"
            ]

    async def unbind(self, queue: Queue, binding: Binding) -> None:
        """Remove a binding; one that is gone is no fault."""
        ends = f"e/{_quoted(binding.source)}/q/{_quoted(queue.name)}"
        key = quote(binding.key, safe="%~")  # RabbitMQ's own text, already quoted
        await self._call("DELETE", f"/api/bindings/{_quoted(queue.vhost)}/{ends}/{key}")

    async def is_empty(self, queue: Queue) -> bool:
        """
        Return whether a queue holds no message, asked of the queue itself: the counts in the lists are seconds late.

        A message that is there is put back. Needs the right to read the queue.
        """
        body = {"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto", "truncate": 1}
        status, text = await self._call("POST", f"{_queue(queue)}/get", body=body, allowed=(400, 404))
        return status == 404 or (status == 200 and json.loads(text) == [])  # 400: of a kind that cannot be asked

    async def delete_queue(self, queue: Queue) -> None:
        """Delete a queue with its messages; one that is gone is no fault."""
        await self._call("DELETE", _queue(queue))

    async def _whole(self, path: str) -> AsyncIterator[list[dict[str, Any]]]:
        """
        Yield a whole list, so many entries at a time, giving way to other tasks in between.

        One request and not pages: RabbitMQ makes each page from the whole list, so that pages of a long one cost it
        the square of its length.
        """
        _, body = await self._call("GET", path, timeout_s=LIST_TIMEOUT_S)
        text = body.decode()
        decoder = json.JSONDecoder()
        position, part = text.index("[") + 1, []
        while (position := _next_value(text, position)) < len(text) and text[position] != "]":
            entry, position = decoder.raw_decode(text, position)
            part.append(entry)
            if len(part) == PAGE:
                yield part
                part = []
                await asyncio.sleep(0)
        yield part

    async def _pages(self, path: str) -> AsyncIterator[list[dict[str, Any]]]:
        number = count = 1
        while number <= count:
            found = await self._get(f"{path}&page={number}&page_size={PAGE}", missing=None)
            if found is None:
                return  # the list has become shorter meanwhile
            count = found["page_count"]
            number += 1
            yield found["items"]

    async def _get(self, path: str, missing: Any = ...) -> Any:
        status, text = await self._call("GET", path, allowed=(404, 400) if missing is not ... else ())
        return json.loads(text) if status == 200 else missing

    async def _call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        body: object = None,
        allowed: tuple[int, ...] = (404,),
        timeout_s: float | None = None,
    ) -> tuple[int, bytes]:
        faults = []
        refused = False
        for url in tuple(self._urls):
            try:
                status, text = await self._ask(url, method, path, headers, body, timeout_s)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                faults.append(f"{url}: {type(error).__name__}")
                self._urls.append(self._urls.pop(0))  # the next call begins with the next node
                continue
            if status < 300 or status in allowed:
                return status, text
            if status in (401, 403):
                await self.aclose()  # the credentials are read again
                faults.append(
                    f"{url}: HTTP {status}: the account needs the tag administrator and rights on MQTT's queues"
                )
            else:
                refused = True
                faults.append(f"{url}: HTTP {status} to {method} {path.partition('?')[0]}")
                self._urls.append(self._urls.pop(0))
        fault = CallRefused if refused else ClusterUnreachable
        raise fault(f"the management API of cluster {self.name} does not do as asked: {'; '.join(faults)}")

    async def _ask(
        self, url: str, method: str, path: str, headers: dict[str, str] | None, body: object, timeout_s: float | None
    ) -> tuple[int, bytes]:
        session = await self._current_session()
        where = URL(url.rstrip("/") + path, encoded=True)
        limit = aiohttp.ClientTimeout(total=timeout_s or self._access.timeout_s)
        async with session.request(method, where, headers=headers, json=body, timeout=limit) as answer:
            return answer.status, await answer.read()

    async def _current_session(self) -> aiohttp.ClientSession:
        """
        Return the session, another one if the authority's file has changed since it was opened.

        Calls under way keep the one they began with. A file that cannot be used, for example half of one, changes nothing.
        """
        found = stamps([] if self._access.ca_file is None else [Path(self._access.ca_file)])
        if self._session is not None and found in (self._ca_seen, self._ca_refused):
            return self._session
        try:
            opened = self._opened()
        except OSError as error:  # also what ssl says of a file that is no PEM
            if self._session is None:
                raise
            self._ca_refused = found
            log.error("enforcement.ca_not_reloaded", cluster=self.name, file=self._access.ca_file, fault=str(error))
            return self._session
        self._ca_seen, self._ca_refused = found, ()
        before, self._session = self._session, opened
        if before is not None:
            log.info("enforcement.ca_reloaded", cluster=self.name)
            long_replaced, self._replaced = self._replaced, before
            if long_replaced is not None:
                await long_replaced.close()
        return opened

    def _opened(self) -> aiohttp.ClientSession:
        tls = ssl.create_default_context(cafile=self._access.ca_file)
        return aiohttp.ClientSession(
            headers={"authorization": aiohttp.encode_basic_auth(*self._access.credentials())},
            connector=aiohttp.TCPConnector(ssl=tls, limit=16),
        )


def _next_value(text: str, position: int) -> int:
    """Return where the next value of a JSON array, or its end, begins."""
    while position < len(text) and text[position] in ", \n\r\t":
        position += 1
    return position


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _queue(queue: Queue) -> str:
    return f"/api/queues/{_quoted(queue.vhost)}/{_quoted(queue.name)}"


def _live(found: dict[str, Any]) -> LiveConnection:
    properties = found.get("client_properties")
    if not isinstance(properties, dict):
        properties = {}
    claimed = properties.get("user_property")
    client_id = properties.get("client_id")
    protocol = _text(found, "protocol")
    connected_at = 0.0
    with contextlib.suppress(TypeError, ValueError):
        connected_at = float(found.get("connected_at") or 0) / 1000
    return LiveConnection(
        name=_text(found, "name"),
        node=_text(found, "node"),
        user=_text(found, "user"),
        vhost=_text(found, "vhost"),
        protocol=protocol,
        address=_text(found, "peer_host"),
        client_id=client_id if isinstance(client_id, str) and client_id and _MQTT.match(protocol) else None,
        certificate_subject=_text(found, "peer_cert_subject") or None,
        certificate_serial=_text(found, "peer_cert_serial_number") or None,
        user_properties={k: v for k, v in claimed.items() if isinstance(v, str)} if isinstance(claimed, dict) else {},
        connected_at=connected_at,
        certificate_issuer=_text(found, "peer_cert_issuer") or None,
        certificate_validity=_text(found, "peer_cert_validity") or None,
    )


def _text(found: dict[str, Any], name: str) -> str:
    """Return a fact of a connection, empty if it is not told."""
    value = found.get(name)
    return value if isinstance(value, str) else ""
