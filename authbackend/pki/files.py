"""Replaces files atomically, and keys without ever being readable by others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, mode: int) -> Iterator[BinaryIO]:
    """
    Open a temporary file that atomically replaces ``path`` at the end of the block: synced to disk, then renamed.

    Args:
        mode: File mode from the first byte on, whatever the umask, so that others can never read a key.
    Raises:
        OSError: It cannot be written; the old file is unchanged.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)  # left by a killed process with the same id
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.fchmod(descriptor, mode)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(
        OSError
    ):  # some file systems cannot; a crash may then undo the rename, but not leave it half done
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(path: Path, content: bytes, mode: int) -> None:
    """
    Replace a file atomically, as :func:`replacing` does.

    Raises:
        OSError: It cannot be written; the old file is unchanged.
    """
    with replacing(path, mode) as file:
        file.write(content)
