"""Files that nobody ever sees half written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, mode: int) -> Iterator[BinaryIO]:
    """
    Give a file to write to that replaces ``path`` as a whole at the end of the block: on disk, then renamed.

    Args:
        mode: What it has from the first byte on, whatever the umask says, so that a key is never readable by others.
    Raises:
        OSError: It cannot be written; what was there is still there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)  # of a process with this id that was killed
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
    with contextlib.suppress(OSError):  # some file systems cannot; then the rename itself may be lost, not half done
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(path: Path, content: bytes, mode: int) -> None:
    """
    Replace a file as a whole, as :func:`replacing` does.

    Raises:
        OSError: It cannot be written; what was there is still there.
    """
    with replacing(path, mode) as file:
        file.write(content)
