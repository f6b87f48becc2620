"""
The files in memory through which the processes of a replica share their metrics (prometheus_client's multiprocess mode).

They lie beside the registry, which may fill the file system. A page of a mapped file that gets no memory then ends the
process (SIGBUS), so these files have all of theirs from the start, and grow only by memory that they have got before.
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
"""Of each file: some thousand series."""

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_KINDS = ("counter", "histogram", "gauge_livesum")
_EMPTY = struct.pack("i", 8)  # how much of the file is used: its head


class _Allocated(MmapedDict):
    """A file whose memory nobody can take; a series for which there is none is counted from when there is."""

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
            found: tuple[float, float] = super().read_value(key)  # type: ignore[no-untyped-call]
            return found
        return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        with contextlib.suppress(OSError):
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]


def reserve(folder: Path, processes: Iterable[str]) -> None:
    """
    Make the folder with the files of all processes, before anything else takes the memory.

    Raises:
        NoRoom: There is not enough.
    """
    try:
        folder.mkdir(mode=0o700)
        for process in processes:
            for kind in _KINDS:
                with (folder / f"{kind}_{process}.db").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
    except OSError as error:
        raise NoRoom(
            f"there is no memory for the metrics at {folder}: {error.strerror}; give that file system more room "
            "(registry.memory_dir; in a container, shm_size)"
        ) from error


def share(folder: Path, process: str) -> None:
    """
    Keep the metrics made from now on in a folder that several processes share; ``process`` names this one.

    Source: prometheus_client, "Multiprocess Mode". Named after the worker's place rather than its process id, a file
    is taken over by the next worker in that place, so counters never go back and files do not pile up.
    """
    os.environ[_FOLDER] = str(folder)
    values.MmapedDict = _Allocated  # type: ignore[attr-defined,assignment]
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]


def forget_gauges(folder: Path, process: str) -> None:
    """Drop what a process that is gone said about its present state; its files keep their memory for the next one."""
    for file in folder.glob(f"gauge_live*_{process}.db"):
        with file.open("r+b") as opened:
            opened.write(_EMPTY)
