"""Whether files have changed, told without reading them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

Stamps = tuple[tuple[int, int, int] | None, ...]


def stamps(files: Iterable[Path]) -> Stamps:
    """Return what changes when a file is written or replaced, for each; None for one that cannot be found."""
    return tuple(map(_stamp, files))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
