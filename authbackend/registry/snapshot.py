"""
The copy of the registry on disk, with which a replica can start while the database is unreachable.

An image of the store, and a journal of the changes since. A replica announces that it serves a change only once the
change is in the journal: a confirmed revocation holds even after a crash and a restart without the database.

Files of mode 600, in a folder of mode 700 that belongs to one replica::

    replica-id      the folder's id
    boots           the boots that ran here, and their lock (see ``identity``)
    manifest.json   names image and journal, with the image's digest; replaced atomically, last
    image-X         the store, copied by LMDB
    journal-X       entries: a header, then the payload as JSON. The header: 4 bytes length of the payload, 32 bytes BLAKE2b
                    of the previous digest and the payload, 16 bytes BLAKE2b of the previous digest and these 36 bytes

If a file is damaged, of another format, of another database or writable by others, the whole copy is refused. Only a
truncated last entry is dropped: it was being written when the machine stopped, so it had not been announced. The header
has a checksum of its own, since a damaged length would make any entry look like a truncated last one.
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
    """The copy on disk cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """
    A successful refresh from the database.

    Args:
        at: When it began.
        patch: The changes.
        database_time: The database's clock at that time, seconds since the epoch.
    """

    at: Instant
    position: FeedPosition
    patch: Patch
    database_time: float | None = None


@dataclass(frozen=True, slots=True)
class RestoredSnapshot:
    """
    The content of the copy on disk.

    Args:
        entries: Oldest first; the first represents the image.
        age_s: Age of the last entry.
        longest_staleness_s: The limit that the replica had announced when it wrote the image.
    """

    entries: list[JournalEntry]
    age_s: float
    longest_staleness_s: float


class SnapshotFolder:
    """
    The folder of one replica; its methods block on disk: call them in a thread, one at a time.

    Args:
        registry: Name of the database (never with a password); a copy of another one is refused.
        longest_staleness_s: Maximum age of a copy that this replica decides by.
    Raises:
        ConfigurationError: The folder cannot be created or used, or another replica uses it.
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
        Record the start of this replica and return its identity; call it once.

        Raises:
            ConfigurationError: The folder cannot be written.
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
        folder_id = uuid.uuid4()
        self._replace(file, f"{folder_id}\n".encode())
        return folder_id

    def restore(self, folder: Path) -> RestoredSnapshot | None:
        """
        Copy the image to where a store can be opened, and return the changes since; None if there is no copy on disk.

        Raises:
            SnapshotRefused: It is damaged, of another database or writable by others; nothing was copied.
        """
        manifest = self._manifest()
        if manifest is None:
            return None
        image = self._folder / manifest["image"]
        chain = bytes.fromhex(manifest["sha256"])
        partial = folder / f"{DATA_FILE}.partial"
        try:
            self._check_owner(image)
            if _copy_and_digest(image, partial) != chain:
                raise SnapshotRefused(f"{image} is damaged: its checksum differs from the one in {MANIFEST}. {_REMEDY}")
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
            raise SnapshotRefused(f"the age of {self._folder} is unknown: {error}. {_REMEDY}") from error
        if age_s < -_CLOCK_SLACK_S:
            raise SnapshotRefused(
                f"{self._folder} is from the future: this machine's clock is wrong, or was. {_REMEDY}"
            )
        return max(0.0, age_s)

    def save(self, store: Store, feed_read: JournalEntry) -> None:
        """
        Write a new image of the store as of a refresh, and begin an empty journal.

        Raises:
            OSError: It cannot be written, for example because the disk is full; the old copy stays.
        """
        number = time.time_ns()
        image, journal = self._folder / f"image-{number}", self._folder / f"journal-{number}"
        try:
            with _created_privately(image) as descriptor:
                store.copy_to(descriptor)
                os.fsync(descriptor)
            with _created_privately(journal) as descriptor:
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
        self._delete_others(image.name, journal.name)

    def append(self, entry: JournalEntry) -> None:
        """
        Append a refresh to the journal; return once it is on disk.

        Raises:
            OSError: It cannot be written; a new image is needed then.
        """
        assert self._journal is not None
        head = {"at": asdict(entry.at), "position": asdict(entry.position), "database_time": entry.database_time}
        payload = json.dumps({**head, **_to_json(entry.patch)}).encode()
        chain = _chained(self._chain, payload)
        data = _header(self._chain, len(payload), chain) + payload
        try:
            if os.write(self._journal, data) != len(data):
                raise OSError(28, "the entry was only partly written")
            os.fdatasync(self._journal)
        except OSError:
            self.close_journal()
            raise
        self._chain = chain
        self._journal_bytes += len(data)

    @property
    def wants_image(self) -> bool:
        """Whether a new image is due: there is no journal to append to, or it has grown too long."""
        longest = max(_SMALLEST_JOURNAL_BYTES, self._image_bytes * _LARGEST_JOURNAL_SHARE)
        return self._journal is None or self._journal_bytes > longest

    def close_journal(self) -> None:
        """Close the journal; the next write is a new image."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def close(self) -> None:
        """Release the folder, so that another replica can use it."""
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
            raise SnapshotRefused(f"{file} is damaged: its checksum does not match. {_REMEDY}")
        if (manifest["format"], manifest["machine"]) != (FORMAT, platform.machine()):
            raise SnapshotRefused(
                f"{file} was written by another version of authbackend or on another machine architecture. {_REMEDY}"
            )
        if manifest["registry"] != self._registry:
            raise SnapshotRefused(f"{file} is a copy of another database, not of the configured one. {_REMEDY}")
        if manifest.get("lock", lock := os.fstat(self._lock).st_ino) != lock:
            raise SnapshotRefused(
                f"{self._folder} was copied from another replica's, and its content may be older than what that replica "
                f"has announced since. {_REMEDY}"
            )
        return manifest

    def _check_owner(self, file: Path) -> None:
        for path in (self._folder, file):
            stat = path.stat()
            if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
                raise SnapshotRefused(f"{path} belongs to another user or is writable by others. {_REMEDY}")

    def _entries(self, file: Path, chain: bytes) -> Iterator[JournalEntry]:
        self._check_owner(file)
        data = file.read_bytes()
        position = 0
        while position < len(data):
            header = data[position : position + HEADER_BYTES]
            if len(header) < HEADER_BYTES:
                return  # truncated: it was being written
            length, digest = int.from_bytes(header[:4], "big"), header[4 : 4 + _DIGEST_BYTES]
            payload = data[position + HEADER_BYTES : position + HEADER_BYTES + length]
            if header != _header(chain, length, digest) or (
                len(payload) == length and _chained(chain, payload) != digest
            ):
                raise SnapshotRefused(f"{file} is damaged at byte {position}. {_REMEDY}")
            if len(payload) < length:
                return  # truncated: the header confirms the length, so no entry follows
            yield _from_json(json.loads(payload))
            chain = digest
            position += HEADER_BYTES + length

    def _replace(self, file: Path, data: bytes) -> None:
        partial = file.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with _created_privately(partial) as descriptor:
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

    def _delete_others(self, *names: str) -> None:
        for pattern in ("image-*", "journal-*"):
            for file in self._folder.glob(pattern):
                if file.name not in names:
                    file.unlink(missing_ok=True)


_REMEDY = "It is not used. Remove it to stop this message; a new copy is written from the database"


@contextlib.contextmanager
def _created_privately(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _copy_and_digest(source: Path, target: Path) -> bytes:
    """Copy the file and hash the copy, so that exactly what was checked is used."""
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


def _to_json(patch: Patch) -> dict[str, Any]:
    return {
        "device_types": {key: row and row.decode() for key, row in patch.device_types.items()},
        "accounts": {key: row and row.decode() for key, row in patch.accounts.items()},
        "devices": {
            key: row and [row.name.decode(), row.record.decode(), row.other_id and row.other_id.decode()]
            for key, row in patch.devices.items()
        },
    }


def _from_json(values: dict[str, Any]) -> JournalEntry:
    devices: dict[str, DeviceRow | None] = {}
    for key, row in values["devices"].items():
        if row is None:
            devices[key] = None
        else:
            name, record, other = row
            devices[key] = DeviceRow(name.encode(), record.encode(), other and other.encode())
    patch = Patch(
        device_types={key: row and row.encode() for key, row in values["device_types"].items()},
        accounts={key: row and row.encode() for key, row in values["accounts"].items()},
        devices=devices,
    )
    return JournalEntry(Instant(**values["at"]), FeedPosition(**values["position"]), patch, values["database_time"])
