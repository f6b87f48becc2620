"""
The client of RabbitMQ's management API: lists and closes connections, lists and deletes queues of one cluster.

Only this module calls RabbitMQ. It knows nothing of tasks or the registry.

Source: RabbitMQ's HTTP API reference, and the behaviour of 4.3.6: the list of one user's connections comes from the
connection tracking and is current; the list of all connections comes from the statistics and may be seconds late.
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
"""RabbitMQ's upper limit of entries per page; also the size of the parts in which whole lists are yielded."""

LIST_TIMEOUT_S = 60.0
"""The timeout for a whole list; long ones take RabbitMQ seconds."""

_CONNECTION_COLUMNS = (
    "name,node,user,vhost,protocol,peer_host,client_properties,connected_at,"
    "peer_cert_serial_number,peer_cert_issuer,peer_cert_subject,peer_cert_validity"
)
_MQTT = re.compile(r"(Web )?MQTT\b")
_WITHOUT_CLIENT_ID = re.compile(r"(Web )?(AMQP|STOMP)\b|Direct\b|stream\b")
_REASON = {"X-Reason": "authbackend: no longer permitted"}


@dataclass(frozen=True, slots=True)
class Connection:
    """A live connection, from RabbitMQ's connection tracking."""

    name: str
    node: str
    user: str


@dataclass(frozen=True, slots=True)
class LiveConnection:
    """
    A live connection, from RabbitMQ's statistics. What they do not report is empty or None.

    Args:
        protocol: ``MQTT 5-0``, ``Web MQTT 5-0``, ``AMQP 0-9-1``, ``AMQP 1-0``, ``stream``, ``STOMP 1.2`` and so on.
        client_id: MQTT only.
        certificate_subject: RFC 4514; None without TLS or certificate. Likewise the issuer.
        certificate_serial: Hexadecimal, in RabbitMQ's notation; reported from 4.2.7 on.
        certificate_validity: Its beginning and end, in RabbitMQ's notation.
        user_properties: Those of the MQTT 5 CONNECT packet.
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
        """True for MQTT, also over WebSocket; False for a protocol without client ids; None for an unknown protocol."""
        if _MQTT.match(self.protocol):
            return True
        return False if _WITHOUT_CLIENT_ID.match(self.protocol) else None


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue; ``messages`` may be seconds late, and is 0 if RabbitMQ does not report it."""

    vhost: str
    name: str
    messages: int


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding of a queue; ``key`` is RabbitMQ's ``properties_key``, unique between one exchange and one queue."""

    source: str
    routing_key: str
    key: str


@dataclass(frozen=True, slots=True)
class Access:
    """
    How to reach a cluster.

    Args:
        urls: Management URLs of its nodes; each node answers for the whole cluster.
        credentials: Returns user name and password; called again after a node refused them.
        ca_file: The CA certificates that nodes are verified with, PEM, read again when the file changes; None for
            those of the system.
    """

    urls: tuple[str, ...]
    credentials: Callable[[], tuple[str, str]]
    ca_file: str | None = None
    timeout_s: float = 5.0


class ClusterUnreachable(Unavailable):
    """No node of the cluster answers, or none accepts the account: nothing can be done there now."""


class CallRefused(Unavailable):
    """The nodes answer, but with an error to this call."""


class ManagementAPI:
    """
    A client of one cluster. Implements ``clusters.Cluster``.

    Calls go to one node until it fails, then to the next.
    """

    def __init__(self, access: Access) -> None:
        self.name = URL(access.urls[0]).host or access.urls[0]
        self._access = access
        self._urls = list(access.urls)
        self._session: aiohttp.ClientSession | None = None
        self._replaced_session: aiohttp.ClientSession | None = None
        self._ca_loaded: Stamps = ()
        self._ca_refused: Stamps = ()

    async def aclose(self) -> None:
        """Close the connections; the next call opens a new one."""
        sessions = self._session, self._replaced_session
        self._session = self._replaced_session = None
        for session in sessions:
            if session is not None:
                await session.close()

    async def nodes(self) -> dict[str, bool]:
        """Return the cluster's nodes, and whether the node that answered sees each of them running."""
        nodes = await self._get("/api/nodes?columns=name,running")
        return {node["name"]: bool(node["running"]) for node in nodes}

    async def connections_of(self, user: str) -> list[Connection]:
        """Return a user's live connections, without the delay of the statistics."""
        connections = await self._get(f"/api/connections/username/{_quoted(user)}")
        return [Connection(each["name"], each["node"], each["user"]) for each in connections]

    async def close_user(self, user: str) -> None:
        """Close every connection of a user, on every node."""
        await self._call("DELETE", f"/api/connections/username/{_quoted(user)}", headers=_REASON)

    async def details(self, name: str) -> LiveConnection | None:
        """Return a connection as the statistics have it; None if they do not have it, or not yet."""
        entry = await self._get(f"/api/connections/{_quoted(name)}?columns={_CONNECTION_COLUMNS}", missing=None)
        return _live_connection(entry) if entry and entry.get("user") else None

    async def close_connection(self, name: str) -> bool:
        """Close one connection; return False if it is gone, or not in the statistics yet."""
        status, _ = await self._call("DELETE", f"/api/connections/{_quoted(name)}", headers=_REASON)
        return status != 404

    async def connections(self) -> AsyncIterator[list[LiveConnection]]:
        """Yield all connections, in parts; those opened in the last seconds may be missing."""
        async for part in self._whole_list(f"/api/connections?columns={_CONNECTION_COLUMNS}"):
            yield [_live_connection(each) for each in part]

    async def queues(self, pattern: str | None = None) -> AsyncIterator[list[Queue]]:
        """Yield the queues whose name matches a regular expression, or all queues, in parts."""
        path = "/api/queues?disable_stats=true&enable_queue_totals=true"
        if pattern is None:
            parts = self._whole_list(f"{path}&columns=name,vhost,messages")
        else:
            parts = self._pages(f"{path}&use_regex=true&name={_quoted(pattern)}")
        async for part in parts:
            yield [Queue(each["vhost"], each["name"], each.get("messages", 0)) for each in part]

    async def bindings(self, queue: Queue) -> list[Binding]:
        """Return a queue's bindings, except to the default exchange; none if the queue is gone."""
        bindings = await self._get(f"{_queue_path(queue)}/bindings", missing=[])
        return [Binding(b["source"], b["routing_key"], b["properties_key"]) for b in bindings if b["source"]]

    async def all_bindings(self, vhost: str) -> AsyncIterator[list[tuple[str, Binding]]]:
        """Yield the bindings of all queues of a virtual host, each with its queue's name, in parts."""
        columns = "source,destination,destination_type,routing_key,properties_key"
        async for part in self._whole_list(f"/api/bindings/{_quoted(vhost)}?columns={columns}"):
            yield [
                (b["destination"], Binding(b["source"], b["routing_key"], b["properties_key"]))
                for b in part
                if b["source"] and b["destination_type"] == "queue"
            ]

    async def unbind(self, queue: Queue, binding: Binding) -> None:
        """Remove a binding; it is not an error if it is gone already."""
        ends = f"e/{_quoted(binding.source)}/q/{_quoted(queue.name)}"
        key = quote(binding.key, safe="%~")  # RabbitMQ has already percent-encoded it
        await self._call("DELETE", f"/api/bindings/{_quoted(queue.vhost)}/{ends}/{key}")

    async def is_empty(self, queue: Queue) -> bool:
        """
        Ask the queue itself whether it is empty; the counts in the statistics are seconds late.

        A message that is read is put back. Needs the permission to read the queue.
        """
        body = {"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto", "truncate": 1}
        status, text = await self._call("POST", f"{_queue_path(queue)}/get", body=body, allowed=(400, 404))
        return status == 404 or (status == 200 and json.loads(text) == [])  # 400: this queue type cannot be read

    async def delete_queue(self, queue: Queue) -> None:
        """Delete a queue with its messages; it is not an error if it is gone already."""
        await self._call("DELETE", _queue_path(queue))

    async def _whole_list(self, path: str) -> AsyncIterator[list[dict[str, Any]]]:
        """
        Yield a whole list in parts, letting other asyncio tasks run after each.

        It is requested whole and not by pages: RabbitMQ computes the whole list for each page, so reading a list by
        pages would cost it the square of the list's length. It is decoded entry by entry: decoding everything in one
        call would block the event loop.
        """
        _, body = await self._call("GET", path, timeout_s=LIST_TIMEOUT_S)
        text = body.decode()
        decoder = json.JSONDecoder()
        position, part = text.index("[") + 1, []
        while (position := _skip_separators(text, position)) < len(text) and text[position] != "]":
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
            page = await self._get(f"{path}&page={number}&page_size={PAGE}", missing=None)
            if page is None:
                return  # the list has become shorter since the page before
            count = page["page_count"]
            number += 1
            yield page["items"]

    async def _get(self, path: str, missing: Any = ...) -> Any:
        """Return the JSON at a path; ``missing`` is returned instead of an error if there is none."""
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
        """
        Call one node after the other until one succeeds; return the HTTP status and the body.

        Args:
            allowed: Error statuses that are results.
        Raises:
            CallRefused: At least one node answered with an error.
            ClusterUnreachable: No node answered, or none accepted the account.
        """
        faults = []
        refused = False
        for url in tuple(self._urls):
            try:
                status, text = await self._request(url, method, path, headers, body, timeout_s)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                faults.append(f"{url}: {type(error).__name__}")
                self._urls.append(self._urls.pop(0))  # the next call starts with the next node
                continue
            if status < 300 or status in allowed:
                return status, text
            if status in (401, 403):
                await self.aclose()  # so that the next call reads the credentials again
                faults.append(
                    f"{url}: HTTP {status}: check the account's password; it needs the tag administrator and permissions on the queues of MQTT sessions"
                )
            else:
                refused = True
                faults.append(f"{url}: HTTP {status} to {method} {path.partition('?')[0]}")
                self._urls.append(self._urls.pop(0))
        error_type = CallRefused if refused else ClusterUnreachable
        raise error_type(f"the management API of cluster {self.name} failed: {'; '.join(faults)}")

    async def _request(
        self, url: str, method: str, path: str, headers: dict[str, str] | None, body: object, timeout_s: float | None
    ) -> tuple[int, bytes]:
        session = await self._current_session()
        full_url = URL(url.rstrip("/") + path, encoded=True)
        timeout = aiohttp.ClientTimeout(total=timeout_s or self._access.timeout_s)
        async with session.request(method, full_url, headers=headers, json=body, timeout=timeout) as response:
            return response.status, await response.read()

    async def _current_session(self) -> aiohttp.ClientSession:
        """
        Return the HTTP session, or a new one if the CA file has changed since it was opened.

        A file that cannot be used, for example because only half of it is written, changes nothing and is logged once.
        """
        ca_stamps = stamps([] if self._access.ca_file is None else [Path(self._access.ca_file)])
        if self._session is not None and ca_stamps in (self._ca_loaded, self._ca_refused):
            return self._session
        try:
            session = self._open_session()
        except OSError as error:  # ssl's error about a file that is not PEM is one, too
            if self._session is None:
                raise
            self._ca_refused = ca_stamps
            log.error("enforcement.ca_not_reloaded", cluster=self.name, file=self._access.ca_file, fault=str(error))
            return self._session
        self._ca_loaded, self._ca_refused = ca_stamps, ()
        old_session, self._session = self._session, session
        if old_session is not None:
            log.info("enforcement.ca_reloaded", cluster=self.name)
            # Calls in progress still use the old session, so it is closed only at the next change.
            older_session, self._replaced_session = self._replaced_session, old_session
            if older_session is not None:
                await older_session.close()
        return session

    def _open_session(self) -> aiohttp.ClientSession:
        tls = ssl.create_default_context(cafile=self._access.ca_file)
        return aiohttp.ClientSession(
            headers={"authorization": aiohttp.encode_basic_auth(*self._access.credentials())},
            connector=aiohttp.TCPConnector(ssl=tls, limit=16),
        )


def _skip_separators(text: str, position: int) -> int:
    """Return the position of the next value of a JSON array, or of its end."""
    while position < len(text) and text[position] in ", \n\r\t":
        position += 1
    return position


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _queue_path(queue: Queue) -> str:
    return f"/api/queues/{_quoted(queue.vhost)}/{_quoted(queue.name)}"


def _live_connection(entry: dict[str, Any]) -> LiveConnection:
    """Read an entry of RabbitMQ's list of connections; a field with an unexpected type counts as not reported."""
    properties = entry.get("client_properties")
    if not isinstance(properties, dict):
        properties = {}
    user_properties = properties.get("user_property")
    if not isinstance(user_properties, dict):
        user_properties = {}
    client_id = properties.get("client_id")
    protocol = _text(entry, "protocol")
    connected_at = 0.0
    with contextlib.suppress(TypeError, ValueError):
        connected_at = float(entry.get("connected_at") or 0) / 1000
    return LiveConnection(
        name=_text(entry, "name"),
        node=_text(entry, "node"),
        user=_text(entry, "user"),
        vhost=_text(entry, "vhost"),
        protocol=protocol,
        address=_text(entry, "peer_host"),
        client_id=client_id if isinstance(client_id, str) and client_id and _MQTT.match(protocol) else None,
        certificate_subject=_text(entry, "peer_cert_subject") or None,
        certificate_serial=_text(entry, "peer_cert_serial_number") or None,
        user_properties={name: value for name, value in user_properties.items() if isinstance(value, str)},
        connected_at=connected_at,
        certificate_issuer=_text(entry, "peer_cert_issuer") or None,
        certificate_validity=_text(entry, "peer_cert_validity") or None,
    )


def _text(entry: dict[str, Any], name: str) -> str:
    """Return a text field, empty if it is not reported."""
    value = entry.get(name)
    return value if isinstance(value, str) else ""
