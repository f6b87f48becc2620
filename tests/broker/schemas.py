"""Reads the keys of ``rabbitmq.conf`` that a broker supports from its cuttlefish schemas, and those that a file sets."""

from __future__ import annotations

import re
from pathlib import Path

_MAPPING = re.compile(r'^\s*\{mapping,\s*"([^"]+)"', re.MULTILINE)
_INCLUDE = re.compile(r'\{include_partial,\s*\{(\w+),\s*"(\w+)"\},\s*\[\{prefix,\s*"([^"]+)"\}(.*?)\]\}\.', re.DOTALL)
_KEY = re.compile(r"^([A-Za-z][\w.-]*)\s*=")


class KnownKeys:
    """
    The keys of all schemas of a RabbitMQ, including those of plugins that are not enabled.

    Args:
        root: Output of ``tools/rabbitmq-root``.
    """

    def __init__(self, root: Path) -> None:
        plugins = next((root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*")) / "plugins"
        self.version = plugins.parent.name.rpartition("-")[2]
        self._patterns = [
            re.compile(r"\.".join("[^.]+" if word.startswith("$") else re.escape(word) for word in name.split(".")))
            for schema in sorted(plugins.glob("*/priv/schema/*.schema"))
            for name in _names(schema.read_text(encoding="utf-8"), plugins)
        ]

    def __len__(self) -> int:
        return len(self._patterns)

    def __contains__(self, key: object) -> bool:
        return any(pattern.fullmatch(str(key)) for pattern in self._patterns)


def _names(schema: str, plugins: Path) -> list[str]:
    """Return the keys of a schema and of the parts that it includes; words that begin with ``$`` are placeholders."""
    names = _MAPPING.findall(schema)
    for plugin, part, prefix, rest in _INCLUDE.findall(schema):
        (file,) = plugins.glob(f"{plugin}-*/priv/schema/{part}.partial")
        names += [f"{prefix}.{name}" for name in _MAPPING.findall(file.read_text(encoding="utf-8"))]
        if "{disable_with, none}" in rest:
            names.append(prefix)
    return names


def keys_of(file: Path) -> list[str]:
    """Return the keys that a file in the format of ``rabbitmq.conf`` sets, in order."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [match[1] for line in lines if (match := _KEY.match(line))]
