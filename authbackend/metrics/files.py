"""
Allocates the memory-mapped files through which a replica's processes share metrics (prometheus_client's multiprocess
mode).

They are on the same file system as the registry, which may fill it. A write to a mapped page that cannot be allocated
kills the process (SIGBUS), so the files are allocated in full at the start, and memory is allocated before they grow.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from authbackend.errors import NoRoom

FILE_BYTES = 256 * 1024
"""Initial size of each file: room for some thousand series."""

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_KINDS = ("counter", "histogram", "gauge_livesum")
_EMPTY = struct.pack("i", 8)  # bytes used: only the file header


class _Allocated(MmapedDict):
    """A file allocated in advance; a new series for which there is no memory is not counted until there is."""

    def __init__(self, filename: str) -> None:
        with Path(filename).open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, max(FILE_BYTES, os.fstat(file.fileno()).st_size))
        super().__init__(filename)  # type: ignore[no-untyped-call]

    def _init_value(self, key: str) -> None:
        longest = len(key.encode()) + 4 + 8 + 16
        while self._used + longest > self._capacity:
            os.posix_fallocate(self._f.fileno(), 0, self._capacity * 2)
            self._capacity *= 2
            self._m = type(self._m)(self._f.fileno(), self._capacity)
        super()._init_value(key)  # type: ignore[no-untyped-call]

    def read_value(self, key: str) -> tuple[float, float]:
        with contextlib.suppress(OSError):
            value: tuple[float, float] = super().read_value(key)  # type: ignore[no-untyped-call]
            return value
        return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        with contextlib.suppress(OSError):
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]


def reserve(folder: Path, processes: Iterable[str]) -> None:
    """
    Create the folder and the files of all processes, before anything else uses up the memory.

    Raises:
        NoRoom: There is not enough memory.
    """
    try:
        folder.mkdir(mode=0o700)
        for process in processes:
            for kind in _KINDS:
                with (folder / f"{kind}_{process}.db").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
    except OSError as error:
        raise NoRoom(
            f"not enough memory for the metrics in {folder}: {error.strerror}; give that file system more room "
            "(registry.memory_dir; in a container, shm_size)"
        ) from error


def share(folder: Path, process: str) -> None:
    """
    Store metrics created from now on in a folder that several processes share; ``process`` names this one.

    Source: prometheus_client, "Multiprocess Mode". Files are named after the worker's slot, not its process id, so the
    next worker in that slot continues with them: counters never go back and files do not accumulate.
    """
    os.environ[_FOLDER] = str(folder)
    values.MmapedDict = _Allocated  # type: ignore[attr-defined,assignment]
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]


def forget_gauges(folder: Path, process: str) -> None:
    """Clear the gauges of a process that has ended; its files stay allocated for its successor."""
    for file in folder.glob(f"gauge_live*_{process}.db"):
        with file.open("r+b") as opened:
            opened.write(_EMPTY)
