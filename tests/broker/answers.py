"""Reads from ``docs/broker-answers.toml`` what a client sees and a broker logs when the service denies a request."""

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
    """Return the content of the file."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def connack(version: int, code: int) -> str:
    """Describe a CONNACK in the terms of its MQTT version."""
    return f"CONNACK {RAW_CONNACK[code]}" if version == 4 else f"CONNACK 0x{code:02X}"


async def publish(client: MQTTClient, topic: str, qos: int) -> str:
    """Make a publish that is refused, and return what the client sees."""
    try:
        code = await client.publish(topic, b"refused", qos=qos)
    except Disconnected as end:
        return _closed(end.reason)
    if qos:
        return f"PUBACK 0x{code:02X}"
    return _closed(await client.disconnected())


async def subscribe(client: MQTTClient, topic: str) -> str:
    """Make a subscription that is refused, and return what the client sees."""
    (code,) = await client.subscribe(topic)
    return f"SUBACK 0x{code:02X}, then {_closed(await client.disconnected())}"


def _closed(reason: int) -> str:
    return "closed" if reason == 0x80 else f"DISCONNECT 0x{reason:02X}"


@dataclass(slots=True)
class BrokerLog:
    """The log of a node from now on: a line belongs to a name if its Erlang process has ever logged that name."""

    broker: Broker
    begin: int = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.broker.logs[0].stat().st_size

    def lines(self, names: dict[str, str]) -> list[str]:
        """
        Return the first line of each entry, of level notice and above, from processes that log one of these names.

        Args:
            names: User names, client ids and topics, each with its replacement.
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
