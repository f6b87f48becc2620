"""Sends requests as RabbitMQ 4.3 does, and measures throughput and latency."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import uvloop

from benchmarks.fixtures import SPECIAL, BenchmarkError, publish_levels, type_of

_RATE = re.compile(r"Requests/sec:\s+([0-9.]+)")
_ERRORS = re.compile(r"Socket errors: .*|Non-2xx or 3xx responses: .*")
_LUA = """
local requests = {}
for line in io.lines("%s") do requests[#requests + 1] = line end
local n = 0
local headers = {["Content-Type"] = "application/x-www-form-urlencoded"}
request = function()
  n = n %% #requests + 1
  return wrk.format("%s", "%s", headers, %s)
end
"""


def topic_form(device: str, key: str, permission: str = "write") -> str:
    """Return the body of a ``/auth/topic`` request."""
    return urlencode(
        {
            "username": device,
            "vhost": "/",
            "resource": "topic",
            "name": "amq.topic",
            "permission": permission,
            "routing_key": key,
            "variable_map.client_id": device,
            "variable_map.vhost": "/",
            "variable_map.username": device,
        }
    )


def publishes(devices: int, number: int = 2000, kind: str = "T20") -> list[str]:
    """Return requests for allowed publishes, by random devices of a type from the whole fleet."""
    chosen = random.Random(1)
    first = {"T5": 0, "T500": SPECIAL, "T20": 2 * SPECIAL}[kind]
    last = devices if kind == "T20" else first + SPECIAL
    if last <= first:
        first = 0
    forms = []
    while len(forms) < number:
        n = chosen.randrange(first, min(last, devices))
        ends = publish_levels(type_of(n))
        forms.append(topic_form(f"d{n:07d}", f"fleet.d{n:07d}.telemetry.{chosen.choice(ends)}"))
    return forms


def throughput(port: int, forms: list[str], seconds: float, *, connections: int = 32, method: str = "POST") -> float:
    """
    Return how many requests per second are answered over keep-alive, when ``wrk`` sends as fast as it can.

    Raises:
        BenchmarkError: An answer was an error, or wrk is missing.
    """
    with tempfile.TemporaryDirectory() as place:
        lines = Path(place) / "forms"
        lines.write_text("\n".join(forms) + "\n")
        script = Path(place) / "ask.lua"
        post = method == "POST"
        url = "/auth/topic" if post else '/auth/topic?" .. requests[n] .. "'
        script.write_text(_LUA % (lines, method, url, "requests[n]" if post else "nil"))
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "-s",
            str(script),
            f"http://127.0.0.1:{port}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise BenchmarkError("wrk is missing; install it: apt-get install wrk") from None
    rate = _RATE.search(done.stdout)
    errors = _ERRORS.search(done.stdout)
    if rate is None or (errors and method == "POST"):
        raise BenchmarkError(f"wrk: {done.stdout}{done.stderr}")
    return float(rate[1])


@dataclass
class Answers:
    """The answers of an open-loop run: seconds from the planned start of each request, and the number by text."""

    times: list[float]
    texts: dict[bytes, int]

    def quantile(self, q: float) -> float:
        """Return a quantile of the times, in seconds."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class _Connection(asyncio.Protocol):
    """A keep-alive connection with one request in flight; further requests wait."""

    def __init__(self, answered: Callable[[float, bytes], object]) -> None:
        self.answered = answered
        self.waiting: list[tuple[float, bytes]] = []
        self.began: float | None = None
        self.buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, planned: float, request: bytes) -> None:
        if self.began is None:
            self.began = planned
            self.transport.write(request)
        else:
            self.waiting.append((planned, request))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank_line, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank_line:
            return
        length = int(re.search(rb"(?i)content-length: *([0-9]+)", head)[1])  # type: ignore[index]
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        began, self.began = self.began, None
        assert began is not None
        self.answered(time.monotonic() - began, head[9:12] + b" " + rest[:length])
        if self.waiting:
            self.send(*self.waiting.pop(0))


def http_post(path: str, form: str) -> bytes:
    """Return a complete request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    return f"{head}Content-Length: {len(form)}\r\n\r\n{form}".encode()


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float, connections: int = 16) -> Answers:
    """Send at a fixed rate, regardless of the answers: a late answer does not delay the next request."""
    answers = Answers([], {})

    def answered(took: float, text: bytes) -> None:
        answers.times.append(took)
        answers.texts[text] = answers.texts.get(text, 0) + 1

    loop = asyncio.get_running_loop()
    pool = [
        (await loop.create_connection(lambda: _Connection(answered), "127.0.0.1", port))[1] for _ in range(connections)
    ]
    begin = time.monotonic()
    total = int(rate * seconds)
    for n in range(total):
        planned = begin + n / rate
        while (ahead := planned - time.monotonic()) > 0:  # noqa: ASYNC110 - time is what is waited for
            await asyncio.sleep(min(ahead, 0.001) if ahead > 0.0005 else 0)
        pool[n % connections].send(planned, requests[n % len(requests)])
    limit = time.monotonic() + 30
    while len(answers.times) < total and time.monotonic() < limit:  # noqa: ASYNC110 - time is what is waited for
        await asyncio.sleep(0.005)
    for connection in pool:
        connection.transport.close()
    if len(answers.times) < total:
        raise BenchmarkError(f"{total - len(answers.times)} of {total} requests were not answered")
    return answers


def latencies(port: int, forms: list[str], rate: float, seconds: float, connections: int = 16) -> Answers:
    """Run :func:`open_loop` with these forms for ``/auth/topic``."""
    requests = [http_post("/auth/topic", form) for form in forms]
    return uvloop.run(open_loop(port, requests, rate, seconds, connections))
