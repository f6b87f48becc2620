"""Values that the follower process passes to the other processes, through files in memory that are replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class SharedValue:
    """A JSON value, written by one process and read by others."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.json"
        self._stamp: tuple[int, int] | None = None
        self._value: Any = None

    def write(self, value: Any) -> None:
        """Replace the value; a failure is only logged, since following the database does not depend on it."""
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(value), encoding="utf-8")
            new.replace(self._file)
        except OSError as error:
            log.warning("note.not_written", path=str(self._file), fault=error.strerror)

    def forget(self) -> None:
        """Delete the value, because its writer has ended."""
        self._file.unlink(missing_ok=True)

    def read(self) -> Any:
        """
        Return the value, None if there is none; the same object until it is written again.

        If the file cannot be opened, for example because clients use up the limit on open files, the last value stays.
        """
        try:
            with self._file.open(encoding="utf-8") as file:
                stat = os.fstat(file.fileno())
                stamp = (stat.st_mtime_ns, stat.st_ino)
                if stamp != self._stamp:
                    self._value = json.load(file)
                    self._stamp = stamp
        except FileNotFoundError:
            self._stamp = self._value = None
        except OSError as error:
            log.debug("note.not_read", path=str(self._file), fault=error.strerror)
        return self._value
