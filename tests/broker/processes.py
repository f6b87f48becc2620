"""Runs child processes, waits for lines of their output, and stops them."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

STOP_TIMEOUT_S = 30.0


class HarnessError(Exception):
    """A part of the test environment did not start, or did not behave as every test requires."""


class Process:
    """A child process; its output goes to a file, and tests can wait for a line of it."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, environment: dict[str, str], cwd: Path | None = None
    ) -> None:
        self.log = log
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._child.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self._child.stdout,), daemon=True)
        self._reader.start()

    def _copy(self, output: IO[str]) -> None:
        with output, self.log.open("a") as log:
            for line in output:
                log.write(line)
                log.flush()
                self._lines.put(line)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the child is still running."""
        return self._child.poll() is None

    def wait_for_line(self, text: str, timeout_s: float) -> None:
        """
        Wait until a line that contains ``text`` is printed.

        Raises:
            HarnessError: The process ended first, or the time was up; the message ends with its last output.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise HarnessError(f"no {text!r} within {timeout_s:g} s:\n{tail(self.log)}") from None
            if line is None:
                raise HarnessError(f"ended before it printed {text!r}:\n{tail(self.log)}")
            if text in line:
                return

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Send SIGTERM, after ``timeout_s`` SIGKILL, and return the exit status."""
        if self.running:
            self._child.terminate()
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(STOP_TIMEOUT_S)
        return self._child.wait()

    def kill(self) -> None:
        """Kill the process and its children (SIGKILL), as in a crash."""
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._reader.join(STOP_TIMEOUT_S)


def tail(file: Path, lines: int = 40) -> str:
    """Return the last lines of a log; empty if there is none."""
    if not file.exists():
        return ""
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """
    Poll until a condition holds, for a process that does not report it.

    Raises:
        HarnessError: It does not within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise HarnessError(f"still not so after {timeout_s:g} s")
        await asyncio.sleep(0.02)
