"""
The processes of a replica: a small parent, one process that follows the database and enforces, one that answers people,
one that answers balancers, brokers' hosts and Prometheus, and the workers.

The parent has no event loop and opens nothing but sockets, so that it can fork at any time. It starts again what dies,
with back-off, and drains on SIGTERM: workers stop accepting, finish what is in flight and end; then the replica signs
off. A child whose parent is gone ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import uvloop

from authbackend import logs, metric_files
from authbackend.backoff import Backoff
from authbackend.errors import AuthbackendError, ConfigurationError, Unavailable
from authbackend.registry.store import Store
from authbackend.service import components
from authbackend.service.replica import (
    ADMIN,
    FOLLOWER,
    HEALTH,
    ReplicaResources,
    memory_fault,
    open_replica,
    worker_names,
)
from authbackend.settings import Settings

log = structlog.get_logger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
LIVED_LONG_S = 10.0
"""A process that lived this long is started again at once when it dies."""

_PREFIX = "authbackend-"
_READY = signal.SIGRTMIN
"""A child to its parent, when it serves. Two of SIGUSR1 at once would be one; signals of this kind queue."""
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, _READY}
_GARBAGE = 10_000  # containers until a collection; requests leave no cycles behind, so there is little to find

Part = Callable[[Store, components.OnEnd, asyncio.Event], AbstractAsyncContextManager[object]]
"""A part of the service; the event is set when certificates are to be read again."""


@dataclass(slots=True)
class _Process:
    """A place for a child; ``started`` and ``due`` are of the monotonic clock."""

    name: str
    part: Part
    worker: int | None = None
    process_id: int | None = None
    started: float = 0.0
    due: float = 0.0
    ready: bool = False
    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S))


def serve(settings: Settings, started: Callable[[dict[str, str]], object]) -> None:
    """
    Run the processes of a replica until SIGTERM or SIGINT.

    Args:
        started: Is told where it listens, when everybody does.
    Raises:
        ConfigurationError: A setting cannot be used.
        Unavailable: A process had to be killed because it did not end in time.
    """
    if fault := memory_fault(settings):
        raise ConfigurationError(fault)
    _raise_file_limit()
    with _folder(settings.registry.memory_dir) as folder, open_replica(settings, folder, shared=True) as resources:
        admin = components.listening_socket("admin.listen", settings.admin.listen)
        health = components.listening_socket("health.listen", settings.health.listen)
        components.bound_socket("broker.listen", settings.broker.listen).close()  # somebody listens there already?
        broker = components.bound_socket("broker.listen", settings.broker.listen, shared=True)  # keeps the port
        with admin, health, broker:
            Supervisor(settings, resources, admin, health, broker.getsockname()[1]).run(started)


def survive_hangups(on_hangup: Callable[[], object] = lambda: None) -> None:
    """
    Do something at SIGHUP, or nothing; never end by it.

    A handler of Python's own: an event loop that closes would leave the signal to end the process, and one that is
    ignored would stay so in every program that is started.
    """
    signal.signal(signal.SIGHUP, lambda *_: on_hangup())


class Supervisor:
    """Starts, watches and ends the children."""

    def __init__(
        self, settings: Settings, resources: ReplicaResources, admin: socket.socket, health: socket.socket, port: int
    ) -> None:
        self._settings = settings
        self._ground = resources
        self._where = components.urls(settings, port, admin, health)
        self._life, self._lifeline = os.pipe()  # read end for children: its end is the parent's

        def follow(store: Store, on_end: components.OnEnd, _: asyncio.Event) -> AbstractAsyncContextManager[object]:
            return components.run_follower(settings, resources, store, on_end)

        def people(store: Store, _: components.OnEnd, __: asyncio.Event) -> AbstractAsyncContextManager[object]:
            return components.run_admin(settings, store, admin)

        def health_and_lists(
            store: Store, on_end: components.OnEnd, reload: asyncio.Event
        ) -> AbstractAsyncContextManager[object]:
            return components.answering_health(settings, resources, store, health, on_end, reload=reload)

        def answer(worker: int) -> Part:
            return lambda store, on_end, reload: components.run_worker(
                settings, resources, store, worker, port, on_end, reload=reload
            )

        self._registry = _Process(FOLLOWER, follow)
        self._workers = [_Process(name, answer(n), n) for n, name in enumerate(worker_names(settings))]
        self._answering = [_Process(ADMIN, people), _Process(HEALTH, health_and_lists), *self._workers]

    def run(self, started: Callable[[dict[str, str]], object]) -> None:
        """Run until a signal; see :func:`serve`."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._watch(started)
        finally:
            overdue = self._end(self._answering) + self._end([self._registry])
            os.close(self._lifeline)
            os.close(self._life)
            signal.signal(_READY, signal.SIG_IGN)  # of a child that became ready while it was being ended
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        log.info("service.stopped")
        if overdue:
            raise Unavailable(
                f"{', '.join(overdue)} did not end within replica.drain_timeout_s "
                f"({self._settings.replica.drain_timeout_s:g} s) and had to be killed"
            )

    def _watch(self, started: Callable[[dict[str, str]], object]) -> None:
        told = False
        everybody = [self._registry, *self._answering]
        while True:
            now = time.monotonic()
            for process in everybody:
                if process.process_id is None and now >= process.due:
                    self._start(process)
            waiting = [process.due - now for process in everybody if process.process_id is None]
            received = signal.sigtimedwait(_SIGNALS, max(0.01, min(waiting, default=3600.0)))
            if received is None:
                continue
            if received.si_signo in (signal.SIGTERM, signal.SIGINT):
                log.info("service.stopping")
                return
            if received.si_signo == signal.SIGHUP:
                self._tell_hangup()
            if received.si_signo == _READY:
                for process in everybody:
                    process.ready = process.ready or process.process_id == received.si_pid
            self._reap(everybody)
            if not told and all(process.ready for process in everybody):
                told = True
                log.info("service.listening", **self._where, workers=len(self._workers))
                started(self._where)

    def _tell_hangup(self) -> None:
        """Have those who answer read their certificates again."""
        log.info("service.reloading")
        for process in self._answering:
            if process.process_id is not None:
                os.kill(process.process_id, signal.SIGHUP)

    def _reap(self, processes: list[_Process]) -> None:
        for process in processes:
            if process.process_id is None:
                continue
            process_id, status = os.waitpid(process.process_id, os.WNOHANG)
            if process_id == 0:
                continue
            self._ended(process, os.waitstatus_to_exitcode(status))

    def _ended(self, process: _Process, code: int) -> None:
        self._forget(process)
        if code == ConfigurationError.exit_code and not process.ready:
            raise ConfigurationError(f"{process.name} cannot start; its message is above")
        lived = time.monotonic() - process.started
        if lived >= LIVED_LONG_S:
            process.backoff.reset()
            pause = 0.0
        else:
            pause = process.backoff.next_s()
        process.due = time.monotonic() + pause
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        log.error("process.died", name=process.name, how=how, lived_s=round(lived, 1), again_in_s=round(pause, 2))

    def _forget(self, process: _Process) -> None:
        process.process_id = None
        if process.worker is not None:
            self._ground.heartbeats.gone(process.worker)
        if process.name == FOLLOWER:
            self._ground.replica_state.forget()
        if self._ground.metrics is not None:
            metric_files.forget_gauges(self._ground.metrics, process.name)

    def _start(self, process: _Process) -> None:
        process.started = time.monotonic()
        parent = os.getpid()
        process_id = os.fork()
        if process_id:
            process.process_id = process_id
            return
        code = 70
        try:
            os.close(self._lifeline)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            code = _run_child(self._settings, self._ground, process, self._life, parent)
        finally:
            sys.stderr.flush()
            os._exit(code)  # nothing of the parent's is cleaned up here

    def _end(self, processes: list[_Process]) -> list[str]:
        """End children and return the names of those that had to be killed."""
        for process in processes:
            if process.process_id is not None:
                os.kill(process.process_id, signal.SIGTERM)
        deadline = time.monotonic() + self._settings.replica.drain_timeout_s
        while any(process.process_id is not None for process in processes) and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, max(0.0, min(0.2, deadline - time.monotonic())))
            for process in processes:
                if process.process_id is not None and os.waitpid(process.process_id, os.WNOHANG)[0]:
                    self._forget(process)
        overdue = [process for process in processes if process.process_id is not None]
        for process in overdue:
            assert process.process_id is not None
            os.kill(process.process_id, signal.SIGKILL)
            os.waitpid(process.process_id, 0)
            self._forget(process)
        return [process.name for process in overdue]


def _run_child(settings: Settings, resources: ReplicaResources, process: _Process, life: int, parent: int) -> int:
    logs.configure(settings.log.format, settings.log.level, process.name)
    assert resources.metrics is not None
    metric_files.share(resources.metrics, process.name)
    try:
        uvloop.run(_child(resources, process, life, parent))
    except AuthbackendError as error:
        log.error("process.failed", fault=error.detail)
        return error.exit_code
    except BaseException:
        log.exception("process.crashed")
        return 70
    return 0


async def _child(resources: ReplicaResources, process: _Process, life: int, parent: int) -> None:
    stop = asyncio.Event()
    reload = asyncio.Event()
    ended: list[str] = []

    def on_end(name: str) -> None:
        ended.append(name)
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    survive_hangups(lambda: _wake(loop, reload))
    loop.add_reader(life, stop.set)  # readable at its end: the parent is gone
    with contextlib.closing(Store(resources.folder, readonly=process.name != FOLLOWER)) as store:
        async with process.part(store, on_end, reload):
            gc.freeze()  # what is here by now stays: no collection has to look at it again
            gc.set_threshold(_GARBAGE)
            os.kill(parent, _READY)
            await stop.wait()
    if ended:
        raise Unavailable(f"the task {ended[0]} ended by itself; stopped, so that it is started anew")


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # it has closed
        loop.call_soon_threadsafe(event.set)


@contextlib.contextmanager
def _folder(memory: Path) -> Iterator[Path]:
    """Make a folder in memory for the time of the block, and remove those that killed services left."""
    for old in memory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (old / "owner").open("rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=memory))
    try:
        with (folder / "owner").open("wb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _raise_file_limit() -> None:
    """Allow as many open files as the administrator lets this process have; each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
