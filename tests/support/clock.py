"""Control of time: an event loop whose clock jumps to the next timer, and a wrong time of day for this process."""

from __future__ import annotations

import asyncio
import datetime as dt
import selectors
import sys
import time
from collections.abc import Coroutine
from typing import Any

import pytest

_datetime, _time = dt.datetime, time.time


class _JumpingSelector(selectors.DefaultSelector):
    """Advances a clock by the timeout instead of waiting; waits for real only without a timeout, for other threads."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(timeout if timeout is None else 0)
        if not ready and timeout:
            self.now += timeout
        return ready


class _ClockLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_on_clock(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine without waiting, on a clock that starts at 0; ``asyncio.get_running_loop().time()`` reads it."""
    with asyncio.Runner(loop_factory=_ClockLoop) as runner:
        return runner.run(coroutine)


def set_time_of_day(monkeypatch: pytest.MonkeyPatch, by: dt.timedelta) -> None:
    """Shift the time of day that authbackend's modules see in this process; the database's clock stays right."""

    class AnyDatetime(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _datetime)

    class Shifted(_datetime, metaclass=AnyDatetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return _datetime.now(tz) + by

    monkeypatch.setattr(time, "time", lambda: _time() + by.total_seconds())
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "authbackend" and getattr(module, "datetime", None) is _datetime:
            monkeypatch.setattr(module, "datetime", Shifted)
