"""What a client sees when the service says no, as it stands in ``docs/broker-answers.toml``, and what a broker logs."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from typing import Any

from .mqtt import RAW_CONNACK, Disconnected, MQTTClient
from .node import REPOSITORY, Broker

FILE = REPOSITORY / "docs/broker-answers.toml"
_LINE = re.compile(r"^(\S+ \S+) \[(\w+)\] <([\d.]+)> (.*)$")
_ADDRESS = re.compile(r"(?:\[?::ffff:)?127\.0\.0\.1\]?:\d+|<[\d.]+>")


def expected() -> dict[str, Any]:
    """The whole file."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def connack(version: int, code: int) -> str:
    """A CONNACK in the words of its MQTT version."""
    return f"CONNACK {RAW_CONNACK[code]}" if version == 4 else f"CONNACK 0x{code:02X}"


async def publish(client: MQTTClient, topic: str, qos: int) -> str:
    """Publish what is refused, and return what the client sees."""
    try:
        code = await client.publish(topic, b"refused", qos=qos)
    except Disconnected as end:
        return _closed(end.reason)
    if qos:
        return f"PUBACK 0x{code:02X}"
    return _closed(await client.disconnected())


async def subscribe(client: MQTTClient, topic: str) -> str:
    """Subscribe to what is refused, and return what the client sees."""
    (code,) = await client.subscribe(topic)
    return f"SUBACK 0x{code:02X}, then {_closed(await client.disconnected())}"


def _closed(reason: int) -> str:
    return "closed" if reason == 0x80 else f"DISCONNECT 0x{reason:02X}"


@dataclass(slots=True)
class BrokerLog:
    """What a node logs from now on, by connection: a line counts as somebody's if its process ever named them."""

    broker: Broker
    begin: int = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.broker.logs[0].stat().st_size

    def lines(self, names: dict[str, str]) -> list[str]:
        """
        The lines of notice and above of the processes that name one of these; of an entry of several lines, the first.

        Args:
            names: what is replaced, by what: a user name, a client id, a topic.
        """
        text = self.broker.logs[0].read_bytes()[self.begin :].decode(errors="replace")
        entries: dict[tuple[str, str, str], str] = {}
        for line in text.splitlines():
            if match := _LINE.match(line):
                at, level, process, words = match.groups()
                entries.setdefault((at, level, process), words)
        processes = {process for (_, _, process), words in entries.items() if any(name in words for name in names)}
        wanted = [
            f"[{level}] {words}"
            for (_, level, process), words in entries.items()
            if process in processes and level not in ("debug", "info")
        ]
        return list(dict.fromkeys(_general(line, names) for line in wanted))


def _general(line: str, names: dict[str, str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        line = line.replace(name, names[name])
    return _ADDRESS.sub("ADDRESS", line).rstrip()
