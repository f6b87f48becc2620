"""What the process that follows the database tells the one that answers balancers, brokers' hosts and Prometheus: files in memory, replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class SharedValue:
    """A JSON value that one process writes and others read."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.json"
        self._stamp: tuple[int, int] | None = None
        self._value: Any = None

    def write(self, value: Any) -> None:
        """Replace the value; what cannot be written is logged, since following the database does not depend on it."""
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(value), encoding="utf-8")
            new.replace(self._file)
        except OSError as error:
            log.warning("note.not_written", path=str(self._file), fault=error.strerror)

    def forget(self) -> None:
        """Drop the value: its writer is gone."""
        self._file.unlink(missing_ok=True)

    def read(self) -> Any:
        """
        Return the value, None if there is none; the same object until it is written again.

        It stays what it was while the file cannot be opened, as when clients hold all files that the process may open.
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
