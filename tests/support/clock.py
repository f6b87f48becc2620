"""An event loop whose clock jumps to the next timer instead of waiting for it, and a process whose time of day is wrong."""

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
    """Adds what it was asked to wait to a clock; waits for real only where nothing but another thread can go on."""

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
    """Run something in no time, by a clock that begins at 0 and reads ``asyncio.get_running_loop().time()``."""
    with asyncio.Runner(loop_factory=_ClockLoop) as runner:
        return runner.run(coroutine)


def set_time_of_day(monkeypatch: pytest.MonkeyPatch, by: dt.timedelta) -> None:
    """Set the time of day of this process, as its own modules see it; the database's is right."""

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
