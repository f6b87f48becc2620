"""A process of a load test, which runs its share of the devices on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import resource
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

import uvloop

from authbackend_load.device import Device, Failed
from authbackend_load.plan import Identity, LoadError, Plan
from authbackend_load.record import Record

SAMPLE_S = 0.25
_SPARE_FILES = 64
_LONGEST_RETRY_S = 30.0


def raise_file_limit(connections: int) -> None:
    """
    Raise the limit on open files, if this number of connections needs it.

    Raises:
        LoadError: The hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _SPARE_FILES
    if soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LoadError(
            f"{connections} connections in one process need {needed} open files, the limit is {hard}:"
            f" use more --processes, or raise it with ulimit -Hn {needed}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Worker:
    """
    The devices of one process.

    Args:
        places: The place of each identity in the whole fleet, which decides when it begins.
        address: IP address and port of the broker.
        in_flight: Limit of unfinished cycles in this process; 0: none.
    Raises:
        LoadError: A certificate cannot be used.
    """

    def __init__(
        self,
        plan: Plan,
        identities: Sequence[Identity],
        places: Sequence[int],
        address: tuple[str, int],
        in_flight: int,
    ) -> None:
        self.record = Record()
        self._plan = plan
        self._places = places
        self._devices = [
            Device(
                plan,
                identity,
                self.record,
                address=address,
                source=plan.sources[place % len(plan.sources)] if plan.sources else None,
            )
            for identity, place in zip(identities, places, strict=True)
        ]
        self._slots = asyncio.Semaphore(in_flight) if in_flight else None
        self._tasks: list[asyncio.Task[None]] = []
        self._active = sum(identity.active for identity in identities)
        self.fault: BaseException | None = None
        """An error of the load generator itself."""
        self.beginnings = 0
        self.complete = 0
        self._decided = 0  # devices that must be refused, and whose verdict is known
        self.last_complete_at = 0.0

    def begin(self, at: float) -> None:
        """Make every device begin its cycle; ``at`` is when the fleet begins, by the monotonic clock."""
        self.beginnings += 1
        self.complete, self._decided, self.last_complete_at = 0, 0, at
        self._tasks = [
            asyncio.create_task(self._live(device, at, place))
            for device, place in zip(self._devices, self._places, strict=True)
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # a device runs until it is cancelled
            self.fault = task.exception()

    async def _live(self, device: Device, at: float, place: int) -> None:
        start = at + self._plan.begins_after_s(place)
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        failures, done = 0, False
        while True:
            try:
                async with self._slots or contextlib.nullcontext():
                    await device.cycle()
                if not done:
                    self._completed(device, start)
                failures, done = 0, True
                await device.stay()
            except Failed as failure:
                failures += 1
                if not done and not device.identity.active and failure.refused:
                    self._decided, done = self._decided + 1, True
                delay_s = min(self._plan.retry_delay_s * 2 ** min(failures - 1, 10), _LONGEST_RETRY_S)
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))

    def _completed(self, device: Device, start: float) -> None:
        if not device.identity.active:
            self._decided += 1
            return
        now = time.monotonic()
        self.complete += 1
        self.last_complete_at = now
        self.record.count("completed")
        # From the planned start, since waiting for a slot, a busy event loop or a retry is part of what a device sees.
        self.record.latency("cycle", now - start)

    async def end(self, *, cut: bool) -> None:
        """End all connections, with DISCONNECT or ``cut`` without, and cancel all cycles."""
        for task in self._tasks:
            task.cancel()
        for device in self._devices:
            if cut:
                device.cut()
            else:
                device.disconnect()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def notice(self, context: dict[str, Any]) -> None:
        """Keep an error of the event loop, for the next sample to raise."""
        self.fault = context.get("exception") or RuntimeError(context["message"])

    def sample(self) -> dict[str, Any]:
        """Return the current state of the devices, or raise an error of the load generator."""
        if self.fault is not None:
            raise self.fault
        return {
            "at": time.monotonic(),
            "beginnings": self.beginnings,
            "connected": sum(device.connected for device in self._devices),
            "complete": self.complete,
            "last_complete_at": self.last_complete_at,
            "all_complete": self.complete >= self._active and self._decided >= len(self._devices) - self._active,
            "failures": self.record.failures.total(),
            "counts": dict(self.record.counts),
            "cpu_s": time.process_time(),
        }


def main(pipe: Pipe, *arguments: Any) -> None:
    """Run a worker that follows the commands from the pipe; the entry point of each process of a load test."""
    try:
        gc.freeze()
        gc.set_threshold(50_000, 50, 50)
        uvloop.run(_obey(pipe, arguments))
    except (BrokenPipeError, EOFError, KeyboardInterrupt):
        os._exit(1)
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send({"fault": str(error) if isinstance(error, LoadError) else f"{type(error).__name__}: {error}"})
        if not isinstance(error, LoadError):
            raise


async def _obey(pipe: Pipe, arguments: tuple[Any, ...]) -> None:
    raise_file_limit(len(arguments[1]))
    worker = Worker(*arguments)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: worker.notice(context))
    commands: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def receive() -> None:
        try:
            commands.put_nowait(pipe.recv())
        except EOFError:
            loop.remove_reader(pipe.fileno())
            commands.put_nowait(("abandon",))

    loop.add_reader(pipe.fileno(), receive)
    pipe.send({"ready": True})
    while True:
        try:
            command, *values = await asyncio.wait_for(commands.get(), SAMPLE_S)
        except TimeoutError:
            pipe.send(worker.sample())
            continue
        match command:
            case "begin":
                worker.begin(*values)
            case "cut":
                await worker.end(cut=True)
                pipe.send({"done": "cut"})
            case "stop":
                await worker.end(cut=False)
                # Bytes written last must be sent before the process ends.
                await asyncio.sleep(SAMPLE_S)
                pipe.send({"done": "stop", "record": worker.record.as_dict(), "cpu_s": time.process_time()})
                return
            case "abandon":
                return
