"""Other clients than :mod:`mqtt`: mosquitto's command line, AMQP, and the management API."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aio_pika
import aiohttp
from aio_pika.abc import AbstractConnection
from yarl import URL

from .identities import Identity, anonymous_context
from .mqtt import ANSWER_TIMEOUT_S, HOST


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit status and output of a command."""

    status: int
    output: str
    errors: str


class Mosquitto:
    """Runs mosquitto_pub and mosquitto_sub with a device's certificate."""

    def __init__(self, identity: Identity, port: int) -> None:
        files = [
            "--cafile",
            identity.ca_file,
            "--cert",
            identity.certificate_file,
            "--key",
            identity.key_file,
        ]
        self._options = ["-h", HOST, "-p", str(port), *map(str, files)]

    async def publish(self, *arguments: str, timeout_s: float = 15.0) -> Outcome:
        """Run ``mosquitto_pub ... ARGUMENTS`` until it exits."""
        return await self._run("mosquitto_pub", arguments, timeout_s)

    async def subscribe(self, *arguments: str, timeout_s: float = 15.0) -> Outcome:
        """Run ``mosquitto_sub ... ARGUMENTS`` until it exits; it needs ``-C COUNT`` or ``-W SECONDS``."""
        return await self._run("mosquitto_sub", arguments, timeout_s)

    async def _run(self, program: str, arguments: Sequence[str], timeout_s: float) -> Outcome:
        command = [program, *self._options, *arguments]
        child = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            output, errors = await asyncio.wait_for(child.communicate(), timeout_s)
        except TimeoutError:
            child.kill()
            await child.wait()
            raise
        return Outcome(child.returncode or 0, output.decode(), errors.decode())


async def connect_amqp(
    tls: ssl.SSLContext, *, port: int, username: str | None = None, password: str | None = None
) -> AbstractConnection:
    """
    Connect over AMQP 0-9-1 with TLS: EXTERNAL (by certificate) without a user name, PLAIN with one.

    Raises:
        aio_pika.exceptions.AMQPConnectionError: Refused; ProbableAuthenticationError at login.
    """
    login = "" if username is None else f"{quote(username, safe='')}:{quote(password or '', safe='')}@"
    mechanism = "EXTERNAL" if username is None else "PLAIN"
    url = f"amqps://{login}{HOST}:{port}/?auth={mechanism}"
    return await aio_pika.connect(url, ssl_context=tls, timeout=ANSWER_TIMEOUT_S)


class Management:
    """
    A client of the management API over TLS, by user name and password, without a client certificate; use it with
    ``async with``.
    """

    def __init__(self, ca_file: str, *, port: int, username: str, password: str) -> None:
        self._url = f"https://{HOST}:{port}/api/"
        self._tls = anonymous_context(ca_file)
        self._headers = {
            "authorization": aiohttp.encode_basic_auth(username, password),
            "content-type": "application/json",
        }

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers, connector=aiohttp.TCPConnector(ssl=self._tls))
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """
        Call ``/api/PATH`` and return the status and the parsed body (None if there is none).

        Args:
            method: GET, PUT, POST or DELETE.
            path: Without ``/api/``; the caller quotes its parts (``%2F`` for the virtual host ``/``).
            body: Sent as JSON unless None.
        """
        data = None if body is None else json.dumps(body)
        url = URL(self._url + path, encoded=True)
        async with self._session.request(method, url, data=data) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text else None

    async def get(self, path: str) -> tuple[int, Any]:
        """Send GET ``/api/PATH``."""
        return await self.request("GET", path)

    async def delete(self, path: str) -> tuple[int, Any]:
        """Send DELETE ``/api/PATH``."""
        return await self.request("DELETE", path)
