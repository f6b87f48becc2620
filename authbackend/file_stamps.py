"""Detects changed files by modification time, inode and size, without reading them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

Stamps = tuple[tuple[int, int, int] | None, ...]


def stamps(files: Iterable[Path]) -> Stamps:
    """Return a stamp of each file, which changes when the file is written or replaced; None if it cannot be read."""
    return tuple(map(_stamp, files))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
