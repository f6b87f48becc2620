"""
The registry in shared memory: one process writes it, every worker reads it, each request at one version.

LMDB on a file system in memory. A reader sees a whole version or the next one, never half of one; a worker that is
killed, or the writer in the middle of a change, leaves it whole. Why LMDB: docs/decisions/0007-shared-registry.md.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb

from authbackend import clocks
from authbackend.errors import NoRoom, Unavailable
from authbackend.policy.model import Account, Device, DeviceType
from authbackend.registry import records
from authbackend.registry.device_cache import CompiledDevices
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
SPARE_FILE = "spare"
LARGEST_BYTES = 64 * 1024**3
"""Address space, not memory: some 600 million devices."""

MOST_KNOWN = 10_000
"""Device types, and accounts, that a reader keeps in readable form."""

_MOST_READERS = 512
_LONGEST_NAME_BYTES = 500  # LMDB's keys are at most 511 bytes; no name of the registry is longer than 128
_TABLES = (b"device", b"device_id", b"device_type", b"account", b"state")
_STATE = b"state"
_NO_ROOM = {errno.ENOSPC, errno.EIO}  # a write that got only some of its pages is the second
_SPARE_BYTES = 1024**2
_SPARE_FILE_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class State:
    """
    What is known about a version.

    Args:
        mark: How far the reader of the database has come.
        synced_at: Start of the last look at the database that succeeded; seconds by ``clocks.uptime``, which all
            processes of a machine share.
        content: Grows with every change of the content.
        fault: Why the last look failed, None if it did not.
        longest_staleness_s: What the other replicas were told last, if the database has not been seen since the start.
        database_time: The database's clock at ``synced_at``, seconds since the epoch; None if it is not known.
    """

    position: FeedPosition
    synced_at: float
    content: int
    fault: str | None = None
    longest_staleness_s: float | None = None
    database_time: float | None = None


class Store:
    """
    The store in a folder.

    Open it after a fork, never before one. One process writes; a second writer would wait for the first.

    Args:
        folder: On a file system in memory.
        readonly: For workers; the folder must hold a store.
    Raises:
        Unavailable: It cannot be opened.
    """

    def __init__(self, folder: Path, *, readonly: bool = False) -> None:
        self.folder = folder
        try:
            self._env = lmdb.open(
                str(folder),
                map_size=LARGEST_BYTES,
                max_dbs=len(_TABLES),
                max_readers=_MOST_READERS,
                max_spare_txns=1,
                readonly=readonly,
                sync=False,  # it is memory; what must last is in PostgreSQL
                metasync=False,
                meminit=False,
                mode=0o600,
                readahead=False,
            )
            self._devices, self._ids, self._types, self._accounts, self._states = (
                self._env.open_db(table, create=not readonly) for table in _TABLES
            )
        except lmdb.Error as error:
            raise Unavailable(f"the registry in {folder} cannot be opened: {error}") from error
        if not readonly:
            self._reserve_readers(folder)
            self._reserve_spare()

    def _reserve_readers(self, folder: Path) -> None:
        """Give the table of readers its memory now; a worker that got none for its place later would be killed."""
        try:
            with (folder / LOCK_FILE).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            self._env.close()
            raise NoRoom(_no_room(folder, str(error.strerror))) from error

    def _reserve_spare(self) -> None:
        """Set memory aside in which to note that there is none; if there is none for it now, at the next occasion."""
        with contextlib.suppress(OSError), (self.folder / SPARE_FILE).open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, _SPARE_FILE_BYTES)

    def close(self) -> None:
        """Close it; a reader of it must not be used any more."""
        self._env.close()

    def state(self) -> State | None:
        """Return the newest version's state, None before the first load."""
        with self._env.begin() as transaction:
            text: Any = transaction.get(_STATE, db=self._states)
            return _state(text)

    def sizes(self) -> dict[str, int]:
        """Return how many devices, device types and accounts there are."""
        tables = {"device": self._devices, "device_type": self._types, "account": self._accounts}
        with self._env.begin() as transaction:
            return {name: transaction.stat(table)["entries"] for name, table in tables.items()}

    def memory_bytes(self) -> tuple[int, int]:
        """Return how much memory the file of the store has, and how much is left beside it."""
        here = os.statvfs(self.folder)
        return (self.folder / DATA_FILE).stat().st_blocks * 512, here.f_bavail * here.f_frsize

    def forget_dead_readers(self) -> None:
        """Free what a worker that was killed had been reading."""
        self._env.reader_check()

    def copy_to(self, descriptor: int) -> None:
        """Write a compact copy of one version to a file; from any thread."""
        self._env.copyfd(descriptor, compact=True)

    def note(
        self,
        *,
        position: FeedPosition | None = None,
        synced_at: float | None = None,
        fault: str | None = None,
        database_time: float | None = None,
    ) -> None:
        """Note a look at the database that changed nothing, or failed; does nothing before the first load."""
        self._note(
            lambda old: (
                replace(old, position=position or old.position, fault=fault)
                if synced_at is None
                else State(position or old.position, synced_at, old.content, fault, database_time=database_time)
            )
        )

    def restored(self, synced_at: float, longest_staleness_s: float, database_time: float | None = None) -> None:
        """Note that the content is from disk: how old it is, and how long others count on it being used."""
        fault = "the database has not been read since the start"
        self._note(
            lambda old: replace(
                old,
                synced_at=synced_at,
                fault=fault,
                longest_staleness_s=longest_staleness_s,
                database_time=database_time,
            )
        )

    def _note(self, change: Callable[[State], State]) -> None:
        try:
            self._noted(change)
        except NoRoom:
            (self.folder / SPARE_FILE).unlink(missing_ok=True)
            self._noted(change)

    def _noted(self, change: Callable[[State], State]) -> None:
        with self._writing() as transaction:
            state = _state(transaction.get(_STATE, db=self._states))
            if state is not None:
                transaction.put(_STATE, _text(change(state)), db=self._states)

    def apply(self, patch: Patch, position: FeedPosition, synced_at: float, database_time: float | None = None) -> None:
        """
        Apply what changed; readers see all of it or nothing.

        Raises:
            NoRoom: The version stays what it was.
        """
        with self._writing() as transaction:
            for table, rows in ((self._types, patch.device_types), (self._accounts, patch.accounts)):
                for key, record in rows.items():
                    if record is None:
                        transaction.delete(key.encode(), db=table)
                    else:
                        transaction.put(key.encode(), record, db=table)
            for device_id in patch.devices:  # all of the old first: two devices may have swapped their common names
                self._forget(transaction, device_id)
            for row in patch.devices.values():
                if row is not None:
                    transaction.put(row.name, row.record, db=self._devices)
                    if row.other_id is not None:
                        transaction.put(row.other_id, row.name, db=self._ids)
            self._finish(transaction, position, synced_at, database_time)
        self._reserve_spare()

    @contextlib.contextmanager
    def loading(self, position: FeedPosition, synced_at: float, database_time: float | None = None) -> Iterator[Loader]:
        """
        Replace everything by what the loader is given in the block; readers see it when the block has ended.

        Raises:
            NoRoom: The version stays what it was.
        """
        with self._writing() as transaction:
            before_bytes = self._bytes(transaction)
            for table in (self._devices, self._ids, self._types, self._accounts):
                transaction.drop(table, delete=False)
            yield Loader(transaction, self._devices, self._ids, self._types, self._accounts)
            self._check_room(transaction, before_bytes)
            self._finish(transaction, position, synced_at, database_time)
        self._reserve_spare()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        try:
            with self._env.begin(write=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            self._give_back()
            if isinstance(error, lmdb.MapFullError) or getattr(error, "code", None) in _NO_ROOM:
                raise NoRoom(_no_room(self.folder, str(error))) from error
            raise Unavailable(f"the registry in {self.folder} cannot be written: {error}") from error

    def _give_back(self) -> None:
        """Return the memory beyond the newest version, which a change that failed had taken; nobody reads it."""
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        with contextlib.suppress(OSError), (self.folder / DATA_FILE).open("r+b") as file:
            if os.fstat(file.fileno()).st_size > used:
                os.ftruncate(file.fileno(), used)

    def _check_room(self, transaction: Any, before_bytes: int) -> None:
        """Refuse what would fill the file system, before it is written: others need room there as well."""
        taken, available = self.memory_bytes()
        missing = before_bytes + self._bytes(transaction) - taken - available + _SPARE_BYTES
        if missing > 0:
            raise NoRoom(
                _no_room(self.folder, f"{missing / 2**20:.1f} MiB more are needed to load all of it beside it")
            )

    def _bytes(self, transaction: Any) -> int:
        """Return how much a version takes."""
        tables = (self._devices, self._ids, self._types, self._accounts)
        found = [transaction.stat(table) for table in tables]
        return int(
            sum((one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"]) * one["psize"] for one in found)
        )

    def _finish(self, transaction: Any, position: FeedPosition, synced_at: float, database_time: float | None) -> None:
        before = _state(transaction.get(_STATE, db=self._states))
        content = before.content + 1 if before else 1
        transaction.put(
            _STATE, _text(State(position, synced_at, content, database_time=database_time)), db=self._states
        )

    def _forget(self, transaction: Any, device_id: str) -> None:
        key = device_id.encode()
        name = transaction.pop(key, db=self._ids)
        if name is None:
            record = transaction.get(key, db=self._devices)
            if record is None or records.device_id_of(device_id, record) != device_id:
                return
            name = key
        transaction.delete(name, db=self._devices)

    def differences(self, present: Patch) -> int:
        """Return how many rows are not here as the database has them."""
        with self.reader() as here:
            found = sum(here.record("device_type", key) != record for key, record in present.device_types.items())
            found += sum(here.record("account", key) != record for key, record in present.accounts.items())
            for device_id, row in present.devices.items():
                found += here.device_by_id(device_id) is not None if row is None else not here.same(row)
            return found

    def reader(self) -> Reader:
        """Return a reader; one for each task that reads."""
        return Reader(self._env, self._devices, self._ids, self._types, self._accounts, self._states)


class Loader:
    """Fills an emptied store."""

    def __init__(self, transaction: Any, devices: Any, ids: Any, types: Any, accounts: Any) -> None:
        self._transaction = transaction
        self._devices = transaction.cursor(devices)
        self._ids = ids
        self._tables = {"device_type": types, "account": accounts}

    def add(self, entity: str, name: str, record: bytes) -> None:
        """Add a device type or an account."""
        self._transaction.put(name.encode(), record, db=self._tables[entity])

    def add_devices(self, rows: Iterable[tuple[bytes, bytes, bytes | None]]) -> None:
        """Add devices: common name, record, and the device id where it is not the common name."""
        plain = []
        for name, record, other_id in rows:
            plain.append((name, record))
            if other_id is not None:
                self._transaction.put(other_id, name, db=self._ids)
        plain.sort()
        self._devices.putmulti(plain)


class Reader:
    """
    The registry at one version for the time of a ``with`` block, which must not give way to another task.

    Cost: beginning and looking one device up take about 2 microseconds, whatever the size.
    """

    __slots__ = (
        *("_accounts", "_accounts_known", "_compiled", "_devices", "_env", "_ids", "_seen", "_states"),
        *("_transaction", "_types", "_types_fresh", "_types_known", "state"),
    )

    def __init__(self, env: lmdb.Environment, devices: Any, ids: Any, types: Any, accounts: Any, states: Any) -> None:
        self._env = env
        self._devices = devices
        self._ids = ids
        self._types = types
        self._accounts = accounts
        self._states = states
        self._seen = -1
        self._compiled = CompiledDevices()
        self._types_known: dict[str, tuple[bytes, DeviceType]] = {}
        self._types_fresh: dict[str, DeviceType | None] = {}  # looked at in this version
        self._accounts_known: dict[str, tuple[bytes, Account]] = {}
        self._transaction: Any  # lmdb.Transaction, whose stubs think of buffers=True
        self.state: State | None = None

    def __enter__(self) -> Self:
        transaction: Any = self._env.begin()
        self._transaction = transaction
        version = transaction.id()
        if version != self._seen:
            self._seen = version
            self._types_fresh.clear()
            for known in (self._types_known, self._accounts_known):  # also who was removed and is asked for no more
                if len(known) > MOST_KNOWN:
                    known.clear()
            self.state = _state(transaction.get(_STATE, db=self._states))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._transaction.abort()

    @property
    def age_s(self) -> float:
        """Seconds since the start of the last look at the database that succeeded; infinite before the first load."""
        return float("inf") if self.state is None else clocks.uptime() - self.state.synced_at

    @property
    def now(self) -> float:
        """
        The database's time of day, seconds since the epoch, carried on since the last look.

        Setting this machine's clock moves no expiry and no hold. This machine's where the database's is not known.
        """
        state = self.state
        if state is None or state.database_time is None:
            return time.time()
        return state.database_time + self.age_s

    def stale(self, longest_s: float) -> bool:
        """Return whether the copy is too old to decide by."""
        if self.state is not None and self.state.longest_staleness_s is not None:
            longest_s = min(longest_s, self.state.longest_staleness_s)
        return self.age_s > longest_s

    def device_by_name(self, common_name: str) -> Device | None:
        """Return the device with this common name, in any status."""
        key = _key(common_name)
        record = self._transaction.get(key, db=self._devices) if key else None
        if record is None:
            self._compiled.forget(common_name)
            return None
        return self._compiled.device(common_name, record)

    def device_by_id(self, device_id: str) -> Device | None:
        """Return the device with this id, in any status."""
        key = _key(device_id)
        if not key:
            return None
        record = self._transaction.get(key, db=self._devices)
        if record is not None and records.device_id_of(device_id, record) == device_id:
            return self._compiled.device(device_id, record)
        name = self._transaction.get(key, db=self._ids)
        return None if name is None else self.device_by_name(name.decode())

    def device_type(self, name: str) -> DeviceType | None:
        """Return a device type."""
        try:
            return self._types_fresh[name]
        except KeyError:
            pass
        record = self._transaction.get(_key(name) or b"\x00", db=self._types)
        found: DeviceType | None = None
        if record is not None:
            known = self._types_known.get(name)
            if known is not None and known[0] == record:
                found = known[1]
            else:
                found = records.device_type(record, known[1] if known else None)
                self._types_known[name] = (record, found)
        else:
            self._types_known.pop(name, None)
        self._types_fresh[name] = found
        return found

    def account(self, name: str) -> Account | None:
        """Return an account."""
        key = _key(name)
        record = self._transaction.get(key, db=self._accounts) if key else None
        if record is None:
            self._accounts_known.pop(name, None)
            return None
        known = self._accounts_known.get(name)
        if known is None or known[0] != record:
            known = self._accounts_known[name] = (record, records.account(record))
        return known[1]

    def accounts(self) -> Iterator[Account]:
        """Yield the accounts."""
        for key, _ in self._transaction.cursor(self._accounts):
            found = self.account(bytes(key).decode())
            assert found is not None
            yield found

    def same(self, row: DeviceRow) -> bool:
        """Return whether a device is here as the database has it."""
        return bool(self._transaction.get(row.name, db=self._devices) == row.record) and (
            row.other_id is None or self._transaction.get(row.other_id, db=self._ids) == row.name
        )

    def record(self, entity: str, name: str) -> bytes | None:
        """Return what is kept of a device type, an account, or a device by its common name."""
        table = {"device_type": self._types, "account": self._accounts, "device": self._devices}[entity]
        found: bytes | None = self._transaction.get(name.encode(), db=table)
        return found

    def entries(self, entity: str) -> Iterator[tuple[str, bytes]]:
        """Yield name, or common name, and what is kept of each device type, account or device."""
        table = {"device_type": self._types, "account": self._accounts, "device": self._devices}[entity]
        for name, record in self._transaction.cursor(table):
            yield bytes(name).decode(), bytes(record)

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield every device's common name and record."""
        yield from self._transaction.cursor(self._devices)


def _no_room(folder: Path, cause: str) -> str:
    return (
        f"the registry does not fit into the memory at {folder}: give that file system more room (registry.memory_dir; in a "
        f"container, shm_size). {cause}"
    )


def _key(name: str) -> bytes | None:
    """Return a name as a key; None for one that no row can have."""
    if not name or len(name) > _LONGEST_NAME_BYTES:
        return None
    key = name.encode("utf-8", "surrogatepass")
    return key if len(key) <= _LONGEST_NAME_BYTES else None


def _text(state: State) -> bytes:
    return json.dumps(asdict(state)).encode()


def _state(text: bytes | None) -> State | None:
    if text is None:
        return None
    values = json.loads(text)
    return State(**{**values, "position": FeedPosition(**values["position"])})


def in_memory(folder: Path) -> bool:
    """Return whether a folder is on a file system in memory."""
    path = os.path.realpath(folder)
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, *_ = line.split(" ")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1] in ("tmpfs", "ramfs")
