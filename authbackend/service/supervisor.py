"""
Starts, watches and stops the processes of a replica: the follower, which also enforces, one process each for the admin
and the health listener, and the workers.

The parent has no event loop and opens only sockets, so that it can fork at any time. It restarts children that die, with
back-off, and drains on SIGTERM: workers stop accepting, finish requests in flight and exit; then the replica signs off.
A child whose parent has died exits.
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

from authbackend import logs
from authbackend.backoff import Backoff
from authbackend.errors import AuthbackendError, ConfigurationError, Unavailable
from authbackend.metrics import files as metric_files
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
"""A process that lived this long is restarted without a pause when it dies."""

_PREFIX = "authbackend-"
_READY = signal.SIGRTMIN
"""Sent by a child to its parent when it serves. Real-time signals queue; two pending SIGUSR1 would merge into one."""
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, _READY}
_GC_THRESHOLD = 10_000  # allocations until a collection; requests leave no cycles behind, so there is little to collect

Part = Callable[[Store, components.OnEnd, asyncio.Event], AbstractAsyncContextManager[object]]
"""A part of the service, run by one child; the event is set to reload certificates."""


@dataclass(slots=True)
class _Process:
    """A child process, running or due to be started; ``started`` and ``due`` are by the monotonic clock."""

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
        started: Called with the URLs once all processes serve.
    Raises:
        ConfigurationError: A setting cannot be used.
        Unavailable: A process had to be killed because it did not exit in time.
    """
    if fault := memory_fault(settings):
        raise ConfigurationError(fault)
    _raise_file_limit()
    with _folder(settings.registry.memory_dir) as folder, open_replica(settings, folder, shared=True) as resources:
        admin = components.listening_socket("admin.listen", settings.admin.listen)
        health = components.listening_socket("health.listen", settings.health.listen)
        components.bound_socket("broker.listen", settings.broker.listen).close()  # fails if the address is in use
        broker = components.bound_socket("broker.listen", settings.broker.listen, shared=True)  # reserves the port
        with admin, health, broker:
            Supervisor(settings, resources, admin, health, broker.getsockname()[1]).run(started)


def survive_hangups(on_hangup: Callable[[], object] = lambda: None) -> None:
    """
    Call a function on SIGHUP, instead of ending the process.

    A plain Python handler: an event loop removes its handlers when it closes, and SIGHUP would then end the process;
    SIG_IGN would be inherited by every program that is started.
    """
    signal.signal(signal.SIGHUP, lambda *_: on_hangup())


class Supervisor:
    """Starts, watches and stops the child processes."""

    def __init__(
        self, settings: Settings, resources: ReplicaResources, admin: socket.socket, health: socket.socket, port: int
    ) -> None:
        self._settings = settings
        self._resources = resources
        self._urls = components.urls(settings, port, admin, health)
        self._parent_alive, self._parent_end = os.pipe()  # children watch the read end: it closes when the parent dies

        def run_follower(
            store: Store, on_end: components.OnEnd, _: asyncio.Event
        ) -> AbstractAsyncContextManager[object]:
            return components.run_follower(settings, resources, store, on_end)

        def run_admin(store: Store, _: components.OnEnd, __: asyncio.Event) -> AbstractAsyncContextManager[object]:
            return components.run_admin(settings, store, admin)

        def run_health(
            store: Store, on_end: components.OnEnd, reload: asyncio.Event
        ) -> AbstractAsyncContextManager[object]:
            return components.run_health(settings, resources, store, health, on_end, reload=reload)

        def run_worker(worker: int) -> Part:
            return lambda store, on_end, reload: components.run_worker(
                settings, resources, store, worker, port, on_end, reload=reload
            )

        self._registry = _Process(FOLLOWER, run_follower)
        self._workers = [_Process(name, run_worker(n), n) for n, name in enumerate(worker_names(settings))]
        self._answering = [_Process(ADMIN, run_admin), _Process(HEALTH, run_health), *self._workers]

    def run(self, started: Callable[[dict[str, str]], object]) -> None:
        """Run until SIGTERM or SIGINT; see :func:`serve`."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._watch(started)
        finally:
            overdue = self._end(self._answering) + self._end([self._registry])
            os.close(self._parent_end)
            os.close(self._parent_alive)
            signal.signal(_READY, signal.SIG_IGN)  # a child may have sent it while it was being stopped
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        log.info("service.stopped")
        if overdue:
            raise Unavailable(
                f"{', '.join(overdue)} did not exit within replica.drain_timeout_s "
                f"({self._settings.replica.drain_timeout_s:g} s) and had to be killed"
            )

    def _watch(self, started: Callable[[dict[str, str]], object]) -> None:
        announced = False
        processes = [self._registry, *self._answering]
        while True:
            now = time.monotonic()
            for process in processes:
                if process.process_id is None and now >= process.due:
                    self._start(process)
            waiting = [process.due - now for process in processes if process.process_id is None]
            received = signal.sigtimedwait(_SIGNALS, max(0.01, min(waiting, default=3600.0)))
            if received is None:
                continue
            if received.si_signo in (signal.SIGTERM, signal.SIGINT):
                log.info("service.stopping")
                return
            if received.si_signo == signal.SIGHUP:
                self._forward_hangup()
            if received.si_signo == _READY:
                for process in processes:
                    process.ready = process.ready or process.process_id == received.si_pid
            self._reap(processes)
            if not announced and all(process.ready for process in processes):
                announced = True
                log.info("service.listening", **self._urls, workers=len(self._workers))
                started(self._urls)

    def _forward_hangup(self) -> None:
        """Forward SIGHUP to the processes that listen, so that they reload their certificates."""
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
            raise ConfigurationError(f"{process.name} cannot start; see its message above")
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
            self._resources.heartbeats.gone(process.worker)
        if process.name == FOLLOWER:
            self._resources.replica_state.forget()
        if self._resources.metrics is not None:
            metric_files.forget_gauges(self._resources.metrics, process.name)

    def _start(self, process: _Process) -> None:
        process.started = time.monotonic()
        parent = os.getpid()
        process_id = os.fork()
        if process_id:
            process.process_id = process_id
            return
        code = 70
        try:
            os.close(self._parent_end)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            code = _run_child(self._settings, self._resources, process, self._parent_alive, parent)
        finally:
            sys.stderr.flush()
            os._exit(code)  # skip the parent's cleanup handlers

    def _end(self, processes: list[_Process]) -> list[str]:
        """Stop children and return the names of those that had to be killed."""
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


def _run_child(
    settings: Settings, resources: ReplicaResources, process: _Process, parent_alive: int, parent: int
) -> int:
    logs.configure(settings.log.format, settings.log.level, process.name)
    assert resources.metrics is not None
    metric_files.share(resources.metrics, process.name)
    try:
        uvloop.run(_child(resources, process, parent_alive, parent))
    except AuthbackendError as error:
        log.error("process.failed", fault=error.detail)
        return error.exit_code
    except BaseException:
        log.exception("process.crashed")
        return 70
    return 0


async def _child(resources: ReplicaResources, process: _Process, parent_alive: int, parent: int) -> None:
    stop = asyncio.Event()
    reload = asyncio.Event()
    ended: list[str] = []

    def on_end(name: str) -> None:
        ended.append(name)
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    survive_hangups(lambda: _wake(loop, reload))
    loop.add_reader(parent_alive, stop.set)  # readable at end of file, when the parent has died
    with contextlib.closing(Store(resources.folder, readonly=process.name != FOLLOWER)) as store:
        async with process.part(store, on_end, reload):
            gc.freeze()  # objects from startup stay: exclude them from collections
            gc.set_threshold(_GC_THRESHOLD)
            os.kill(parent, _READY)
            await stop.wait()
    if ended:
        raise Unavailable(f"the task {ended[0]} ended unexpectedly; the process stops, so that the parent restarts it")


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(event.set)


@contextlib.contextmanager
def _folder(memory: Path) -> Iterator[Path]:
    """Create a folder in memory for the duration of the block; remove those left by services that were killed."""
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
    """Raise the limit on open files to the hard limit; each connection needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
