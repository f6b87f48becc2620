"""Shows the progress of a load test: on a terminal, one line that is rewritten; otherwise, a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from authbackend_load.fleet import Sample

_EVERY_S = 5.0


class Progress:
    """
    Prints the state of a load test.

    Args:
        total: The number of devices.
        stream: Standard error by default.
        quiet: Print nothing.
    """

    def __init__(self, total: int, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._tty = self._stream.isatty()
        self._printed_at = -_EVERY_S
        self._width = 0
        self.phase = "connect"
        """The current phase, shown at the beginning of the line."""

    def sample(self, sample: Sample) -> None:
        """Print a sample, if a line is due."""
        now = time.monotonic()
        if self._quiet or (not self._tty and now - self._printed_at < _EVERY_S):
            return
        self._printed_at = now
        self._print(
            f"{sample.at_s:6.1f} s  {self.phase:10}  connected {sample.connected}/{self._total}"
            f"  cycles {sample.counts['completed']}  publishes {sample.counts['publishes']}"
            f"  failures {sample.failures}"
        )

    def count(self, done: int, of: int, what: str) -> None:
        """Print how many of something are done, if a line is due."""
        now = time.monotonic()
        if self._quiet or (not self._tty and now - self._printed_at < _EVERY_S and done < of):
            return
        self._printed_at = now
        self._print(f"{done}/{of} {what}")

    def _print(self, line: str) -> None:
        if self._tty:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that was rewritten."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0
