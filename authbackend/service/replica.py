"""Opens, before the first fork, what the processes of a replica share: the store, the copy on disk, heartbeats."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import structlog

from authbackend import clocks
from authbackend.metrics import files as metric_files
from authbackend.postgres.connection import Target
from authbackend.postgres.uri import parse
from authbackend.registry.identity import Boot
from authbackend.registry.snapshot import RestoredSnapshot, SnapshotFolder, SnapshotRefused
from authbackend.registry.store import Store, in_memory
from authbackend.secrets import read_dsn
from authbackend.service.heartbeats import WorkerHeartbeats
from authbackend.service.shared_value import SharedValue
from authbackend.settings import Settings

log = structlog.get_logger(__name__)

FOLLOWER = "registry"
"""Name of the process that follows the database and enforces."""
ADMIN = "admin"
"""Name of the process with the admin listener."""
HEALTH = "health"
"""Name of the process with the health listener."""


def worker_names(settings: Settings) -> list[str]:
    """Return the process names of the workers, in order."""
    return [f"worker-{place}" for place in range(settings.replica.workers)]


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """
    Resources shared by the processes of a replica, opened before the first fork.

    Args:
        folder: The folder of the store, on a file system in memory.
        shared: Whether there are several processes, which share metrics in ``folder / "metrics"``.
        snapshot_folder: The copy on disk, None without ``registry.snapshot_dir``.
    """

    folder: Path
    heartbeats: WorkerHeartbeats
    shared: bool
    boot: Boot
    snapshot_folder: SnapshotFolder | None = None

    @property
    def replica_state(self) -> SharedValue:
        """The state of the copy and of the other replicas, written by the follower."""
        return SharedValue(self.folder / "notes", "replica")

    @property
    def certificate_counts(self) -> SharedValue:
        """The certificate metrics, written by the follower."""
        return SharedValue(self.folder / "notes", "certificates")

    @property
    def published_crls(self) -> SharedValue:
        """The CRLs to serve, written by the follower."""
        return SharedValue(self.folder / "notes", "lists")

    @property
    def metrics(self) -> Path | None:
        """The folder of the shared metrics, None if there is only one process."""
        return self.folder / "metrics" if self.shared else None


def target(settings: Settings, application_name: str = "authbackend") -> Target:
    """
    Return how to connect to the database.

    Raises:
        ConfigurationError: No connection URI is set, or it is invalid.
    """
    database = settings.database
    dsn = read_dsn(database)
    parse(dsn)
    read_again = None if database.password_file is None else lambda: read_dsn(database)
    return Target(dsn, database.connect_timeout_s, database.statement_timeout_s, application_name, read_again)


@contextlib.contextmanager
def open_replica(settings: Settings, folder: Path, *, shared: bool) -> Iterator[ReplicaResources]:
    """
    Create the shared resources in an empty folder; the store is filled from the copy on disk, if there is one.

    Raises:
        ConfigurationError: ``registry.snapshot_dir`` cannot be used.
        Unavailable: There is not enough memory.
    """
    registry = settings.registry
    (folder / "notes").mkdir(mode=0o700)
    if shared:
        metric_files.reserve(folder / "metrics", (FOLLOWER, ADMIN, HEALTH, *worker_names(settings)))
    with contextlib.ExitStack() as stack:
        snapshot_folder = None
        restored = None
        if registry.snapshot_dir is not None:
            snapshot_folder = SnapshotFolder(
                registry.snapshot_dir, _database_name(target(settings)), registry.max_staleness_s
            )
            stack.callback(snapshot_folder.close)
            try:
                restored = snapshot_folder.restore(folder)
            except SnapshotRefused as error:
                log.error("registry.disk_copy_refused", fault=str(error))
        store = Store(folder)
        try:
            if restored is not None:
                _restore(store, restored)
        finally:
            store.close()
        heartbeats = WorkerHeartbeats(settings.replica.workers)
        boot = snapshot_folder.begin_boot() if snapshot_folder else Boot(uuid.uuid4())
        yield ReplicaResources(folder, heartbeats, shared, boot, snapshot_folder)


def _restore(store: Store, restored: RestoredSnapshot) -> None:
    for entry in restored.entries:
        store.apply(entry.patch, entry.position, 0.0)
    synced_at = clocks.uptime() - restored.age_s
    store.restored(synced_at, restored.longest_staleness_s, restored.entries[-1].database_time)
    log.info("registry.restored", **store.sizes(), age_s=round(restored.age_s, 1))


def _database_name(database: Target) -> str:
    """Return the hosts and name of a database, without role, password and connection options."""
    parts = urlsplit(database.dsn)
    location = {k: v for k, v in parse(database.dsn).parameters.items() if k in ("host", "port", "dbname", "service")}
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}?{urlencode(location, safe='/,')}"


def memory_fault(settings: Settings) -> str | None:
    """Return what is wrong with ``registry.memory_dir``, None if nothing is."""
    folder = settings.registry.memory_dir
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return f"registry.memory_dir {folder} is not a writable folder; create it or set another one"
    if not in_memory(folder):
        return (
            f"registry.memory_dir {folder} is not on a file system in memory (tmpfs), and decisions must not wait for a disk; "
            "set a folder on one, for example /dev/shm"
        )
    return None
