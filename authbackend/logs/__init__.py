"""Structured logs on standard error. Query strings, passwords and hashes are never logged."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

WINDOW_S = 10.0
_MOST_NAMES = 10_000


def _printable(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape unprintable text, so that a name that a client chose cannot forge a line or control a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key != "exception":
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


def configure(form: Literal["json", "console"], level: str, process: str | None = None) -> None:
    """
    Set up structlog and the standard library's logging, which aiohttp uses, with the same format.

    Args:
        process: Added to each line, to tell a replica's processes apart.
    """
    number = logging.getLevelName(level.upper())
    renderer: Any = structlog.processors.JSONRenderer() if form == "json" else _console_renderer()
    shared: list[Any] = [
        *([lambda _, __, event: {**event, "process": process}] if process else []),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    finish: list[Any] = [_printable]
    if form == "json":
        finish = [structlog.processors.format_exc_info, _printable]
    structlog.configure(
        processors=[*shared, *finish, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _StderrLogger(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish, renderer],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))


def _console_renderer() -> structlog.dev.ConsoleRenderer:
    """Return a renderer without local variables in tracebacks: they can contain a password."""
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)


class _StderrLogger:
    """Writes lines to standard error; a full disk or closed pipe may lose lines, but must not break a request."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


class Sampler:
    """
    Limits how many denials are logged in each window, per name and in total; counts the rest.

    Memory is bounded: after 10,000 names in one window, all further names share one limit.
    """

    def __init__(self, most_per_name: int, most: int = 10_000) -> None:
        self._most_per_name = most_per_name
        self._most = most
        self._admitted = 0
        self._window = 0
        self._counts: dict[str, int] = {}
        self._suppressed = 0

    def admit(self, name: str, now: float | None = None) -> tuple[bool, int]:
        """Return whether to log, and how many denials of the last window were suppressed (once per window)."""
        window = int((time.monotonic() if now is None else now) / WINDOW_S)
        suppressed = 0
        if window != self._window:
            suppressed, self._suppressed = self._suppressed, 0
            self._window = window
            self._counts = {}
            self._admitted = 0
        if name not in self._counts and len(self._counts) >= _MOST_NAMES:
            name = ""
        count = self._counts.get(name, 0) + 1
        self._counts[name] = count
        admitted = count <= self._most_per_name and self._admitted < self._most
        if admitted:
            self._admitted += 1
        else:
            self._suppressed += 1
        return admitted, suppressed
