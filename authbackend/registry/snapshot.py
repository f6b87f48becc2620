"""
The registry on disk, so that a replica can start while the database is away.

An image of the store, and a journal of what changed since. A replica tells others that it serves a change only when
the change is in the journal: whatever a revocation was confirmed to, holds after a crash without the database too.

Files, in a folder of mode 700 that belongs to one replica, each of mode 600::

    replica-id      the folder's id
    boots           who ran here, and under which lock (see ``boots``)
    manifest.json   names image and journal, with the image's digest; replaced as a whole, last
    image-X         the store, as LMDB copies it
    journal-X       entries: a header, then the payload as JSON. The header: 4 bytes length of the payload, 32 bytes BLAKE2b
                    of the previous digest and the payload, 16 bytes BLAKE2b of the previous digest and the header so far

A file that is damaged, of another format, of another database or writable by others is refused as a whole. Only a last
entry that is cut short is dropped: it was being written when the machine stopped, so nobody had been told of it. The
header has a checksum of its own, since a damaged length would make any entry look like a last one that is cut short.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from authbackend import clocks
from authbackend.clocks import Instant
from authbackend.errors import ConfigurationError
from authbackend.registry import identity
from authbackend.registry.identity import Boot
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch
from authbackend.registry.store import DATA_FILE, Store

FORMAT = 4
MANIFEST = "manifest.json"
_CLOCK_SLACK_S = 5.0
_DIGEST_BYTES = 32
_CHECK_BYTES = 16
HEADER_BYTES = 4 + _DIGEST_BYTES + _CHECK_BYTES
_LARGEST_JOURNAL_SHARE = 0.25
_SMALLEST_JOURNAL_BYTES = 4 * 1024**2


class SnapshotRefused(Exception):
    """What is on disk cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """
    A look at the database that succeeded.

    Args:
        at: When it began.
        patch: What had changed.
        database_time: The database's clock then, seconds since the epoch.
    """

    at: Instant
    position: FeedPosition
    patch: Patch
    database_time: float | None = None


@dataclass(frozen=True, slots=True)
class RestoredSnapshot:
    """
    What was on disk.

    Args:
        entries: Oldest first; the first stands for the image.
        age_s: How long ago the last of them was.
        longest_staleness_s: What the replica had told the others when it wrote the image.
    """

    entries: list[JournalEntry]
    age_s: float
    longest_staleness_s: float


class SnapshotFolder:
    """
    The folder of one replica; its methods do disk work and belong into a thread, one at a time.

    Args:
        registry: Names the database (never with a password); a copy of another one is refused.
        longest_staleness_s: How old a copy this replica decides by.
    Raises:
        ConfigurationError: The folder cannot be made or used, or another replica uses it.
    """

    def __init__(self, folder: Path, registry: str, longest_staleness_s: float) -> None:
        self._folder = folder
        self._longest_staleness_s = longest_staleness_s
        self._registry = hashlib.sha256(registry.encode()).hexdigest()
        self._journal: int | None = None
        self._chain = b""
        self._image_bytes = 0
        self._journal_bytes = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"registry.snapshot_dir {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"registry.snapshot_dir {folder} is in use by another replica; each needs a folder of its own"
            ) from None

    def begin_boot(self) -> Boot:
        """
        Return who this replica is; to be called once.

        Raises:
            ConfigurationError: It cannot be written down.
        """
        record = None
        with contextlib.suppress(FileNotFoundError):
            record = (self._folder / "boots").read_bytes()
        try:
            boot, record = identity.begin(self._id(), record, self._lock)
            self._replace(self._folder / "boots", record)
        except OSError as error:
            raise ConfigurationError(f"registry.snapshot_dir {self._folder}: {error.strerror}") from error
        return boot

    def _id(self) -> uuid.UUID:
        file = self._folder / "replica-id"
        with contextlib.suppress(OSError, ValueError):
            return uuid.UUID(file.read_text(encoding="ascii").strip())
        made = uuid.uuid4()
        self._replace(file, f"{made}\n".encode())
        return made

    def restore(self, folder: Path) -> RestoredSnapshot | None:
        """
        Put the image where a store can be opened, and return what changed since; None if there is none.

        Raises:
            Refused: It is damaged, foreign or open to others; nothing was put anywhere.
        """
        manifest = self._manifest()
        if manifest is None:
            return None
        image = self._folder / manifest["image"]
        chain = bytes.fromhex(manifest["sha256"])
        partial = folder / f"{DATA_FILE}.partial"
        try:
            self._check_owner(image)
            if _copied_digest(image, partial) != chain:
                raise SnapshotRefused(f"{image} is damaged: its checksum is not the one in {MANIFEST}. {_REMEDY}")
            image_entry = JournalEntry(
                Instant(**manifest["at"]), FeedPosition(**manifest["position"]), Patch(), manifest["database_time"]
            )
            entries = [image_entry]
            entries += self._entries(self._folder / manifest["journal"], chain)
            restored = RestoredSnapshot(entries, self._age_s(entries[-1]), float(manifest["longest_staleness_s"]))
            partial.rename(folder / DATA_FILE)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SnapshotRefused(f"{self._folder} cannot be read: {error}. {_REMEDY}") from error
        finally:
            partial.unlink(missing_ok=True)
        return restored

    def _age_s(self, newest: JournalEntry) -> float:
        try:
            age_s = clocks.age_s(newest.at, newest.database_time)
        except clocks.AgeUnknown as error:
            raise SnapshotRefused(f"how old {self._folder} is cannot be told: {error}. {_REMEDY}") from error
        if age_s < -_CLOCK_SLACK_S:
            raise SnapshotRefused(
                f"{self._folder} is from the future: this machine's clock is wrong, or was. {_REMEDY}"
            )
        return max(0.0, age_s)

    def save(self, store: Store, feed_read: JournalEntry) -> None:
        """
        Write a new image, of what a store holds since a look, and begin an empty journal.

        Raises:
            OSError: There is no room; the old copy stays.
        """
        number = time.time_ns()
        image, journal = self._folder / f"image-{number}", self._folder / f"journal-{number}"
        try:
            with _private(image) as descriptor:
                store.copy_to(descriptor)
                os.fsync(descriptor)
            with _private(journal) as descriptor:
                os.fsync(descriptor)
            digest = _digest(image)
        except BaseException:
            image.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
            raise
        manifest = {
            "format": FORMAT,
            "machine": platform.machine(),
            "registry": self._registry,
            "lock": os.fstat(self._lock).st_ino,
            "image": image.name,
            "journal": journal.name,
            "sha256": digest.hex(),
            "position": asdict(feed_read.position),
            "at": asdict(feed_read.at),
            "database_time": feed_read.database_time,
            "longest_staleness_s": self._longest_staleness_s,
        }
        manifest["check"] = _check(manifest)
        self._replace(self._folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
        self.close_journal()
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._chain = digest
        self._image_bytes = image.stat().st_size
        self._journal_bytes = 0
        self._forget_others(image.name, journal.name)

    def append(self, entry: JournalEntry) -> None:
        """
        Note a look at the database; returns when it is on disk.

        Raises:
            OSError: It cannot be written; a new image is wanted then.
        """
        assert self._journal is not None
        head = {"at": asdict(entry.at), "position": asdict(entry.position), "database_time": entry.database_time}
        payload = json.dumps({**head, **_plain(entry.patch)}).encode()
        chain = _chained(self._chain, payload)
        data = _header(self._chain, len(payload), chain) + payload
        try:
            if os.write(self._journal, data) != len(data):
                raise OSError(28, "the entry was written only in part")
            os.fdatasync(self._journal)
        except OSError:
            self.close_journal()
            raise
        self._chain = chain
        self._journal_bytes += len(data)

    @property
    def wants_image(self) -> bool:
        """True when there is no journal to append to, or it has grown long."""
        longest = max(_SMALLEST_JOURNAL_BYTES, self._image_bytes * _LARGEST_JOURNAL_SHARE)
        return self._journal is None or self._journal_bytes > longest

    def close_journal(self) -> None:
        """Append no more; the next thing written is a new image."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def close(self) -> None:
        """Leave the folder to others."""
        self.close_journal()
        os.close(self._lock)

    def _manifest(self) -> dict[str, Any] | None:
        file = self._folder / MANIFEST
        try:
            self._check_owner(file)
            manifest = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SnapshotRefused(f"{file} cannot be read: {error}. {_REMEDY}") from error
        if not isinstance(manifest, dict) or manifest.pop("check", None) != _check(manifest):
            raise SnapshotRefused(f"{file} is damaged: its checksum does not fit. {_REMEDY}")
        if (manifest["format"], manifest["machine"]) != (FORMAT, platform.machine()):
            raise SnapshotRefused(f"{file} was written by another version or on another kind of machine. {_REMEDY}")
        if manifest["registry"] != self._registry:
            raise SnapshotRefused(f"{file} is a copy of another database than the one that is set. {_REMEDY}")
        if manifest.get("lock", lock := os.fstat(self._lock).st_ino) != lock:
            raise SnapshotRefused(
                f"{self._folder} was copied from another replica's, and what is in it may be older than what that one "
                f"has told since. {_REMEDY}"
            )
        return manifest

    def _check_owner(self, file: Path) -> None:
        for path in (self._folder, file):
            found = path.stat()
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise SnapshotRefused(f"{path} belongs to somebody else or can be written by others. {_REMEDY}")

    def _entries(self, file: Path, chain: bytes) -> Iterator[JournalEntry]:
        self._check_owner(file)
        data = file.read_bytes()
        position = 0
        while position < len(data):
            header = data[position : position + HEADER_BYTES]
            if len(header) < HEADER_BYTES:
                return  # cut short: it was being written
            length, digest = int.from_bytes(header[:4], "big"), header[4 : 4 + _DIGEST_BYTES]
            payload = data[position + HEADER_BYTES : position + HEADER_BYTES + length]
            if header != _header(chain, length, digest) or (
                len(payload) == length and _chained(chain, payload) != digest
            ):
                raise SnapshotRefused(f"{file} is damaged at byte {position}. {_REMEDY}")
            if len(payload) < length:
                return  # cut short: the length is what was written, so nothing came after it
            yield _entry(json.loads(payload))
            chain = digest
            position += HEADER_BYTES + length

    def _replace(self, file: Path, data: bytes) -> None:
        partial = file.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with _private(partial) as descriptor:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        partial.rename(file)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _forget_others(self, *names: str) -> None:
        for pattern in ("image-*", "journal-*"):
            for file in self._folder.glob(pattern):
                if file.name not in names:
                    file.unlink(missing_ok=True)


_REMEDY = "It is not used. Remove it to be rid of this message; it is written anew from the database"


@contextlib.contextmanager
def _private(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _copied_digest(source: Path, target: Path) -> bytes:
    """Copy first and look at the copy: what was checked is what is used."""
    shutil.copyfile(source, target)
    target.chmod(0o600)
    return _digest(target)


def _chained(chain: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(chain + payload, digest_size=_DIGEST_BYTES).digest()


def _header(chain: bytes, length: int, digest: bytes) -> bytes:
    header = length.to_bytes(4, "big") + digest
    return header + hashlib.blake2b(chain + header, digest_size=_CHECK_BYTES).digest()


def _check(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(patch: Patch) -> dict[str, Any]:
    return {
        "device_types": {key: row and row.decode() for key, row in patch.device_types.items()},
        "accounts": {key: row and row.decode() for key, row in patch.accounts.items()},
        "devices": {
            key: row and [row.name.decode(), row.record.decode(), row.other_id and row.other_id.decode()]
            for key, row in patch.devices.items()
        },
    }


def _entry(plain: dict[str, Any]) -> JournalEntry:
    devices: dict[str, DeviceRow | None] = {}
    for key, row in plain["devices"].items():
        if row is None:
            devices[key] = None
        else:
            name, record, other = row
            devices[key] = DeviceRow(name.encode(), record.encode(), other and other.encode())
    patch = Patch(
        device_types={key: row and row.encode() for key, row in plain["device_types"].items()},
        accounts={key: row and row.encode() for key, row in plain["accounts"].items()},
        devices=devices,
    )
    return JournalEntry(Instant(**plain["at"]), FeedPosition(**plain["position"]), patch, plain["database_time"])
