"""One process of a load test: its share of the devices on one event loop."""

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
    Allow this process so many connections.

    Raises:
        LoadError: the system does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise LoadError(
            f"{connections} connections in one process need {wanted} open files, the limit is {hard}:"
            f" more --processes, or raise it with ulimit -Hn {wanted}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Worker:
    """
    The devices of one process.

    Args:
        places: the place of each identity in the whole fleet, which decides when it begins.
        address: of the broker.
        in_flight: cycles not finished at a time in this process; 0 is no limit.
    Raises:
        LoadError: a certificate cannot be used.
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
        self._wanted = sum(identity.active for identity in identities)
        self.fault: BaseException | None = None
        """What went wrong in the load generator itself."""
        self.beginnings = 0
        self.complete = 0
        self._judged = 0
        self.last_complete_at = 0.0

    def begin(self, at: float) -> None:
        """Let every device begin its cycle; ``at`` is the fleet's beginning on the monotonic clock, in seconds."""
        self.beginnings += 1
        self.complete, self._judged, self.last_complete_at = 0, 0, at
        self._tasks = [
            asyncio.create_task(self._live(device, at, place))
            for device, place in zip(self._devices, self._places, strict=True)
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # a device lives until it is cancelled
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
                    self._judged, done = self._judged + 1, True
                delay_s = min(self._plan.retry_delay_s * 2 ** min(failures - 1, 10), _LONGEST_RETRY_S)
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))

    def _completed(self, device: Device, start: float) -> None:
        if not device.identity.active:
            self._judged += 1
            return
        now = time.monotonic()
        self.complete += 1
        self.last_complete_at = now
        self.record.count("completed")
        # From the planned start: the wait for a slot, for a late loop and for another try is the device's wait.
        self.record.latency("cycle", now - start)

    async def end(self, *, cut: bool) -> None:
        """End all connections, ``cut`` or in good order, and all that was under way."""
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
        """Take a fault of the event loop, for the next sample to raise."""
        self.fault = context.get("exception") or RuntimeError(context["message"])

    def sample(self) -> dict[str, Any]:
        """Return how things stand."""
        if self.fault is not None:
            raise self.fault
        return {
            "at": time.monotonic(),
            "beginnings": self.beginnings,
            "connected": sum(device.connected for device in self._devices),
            "complete": self.complete,
            "last_complete_at": self.last_complete_at,
            "all_complete": self.complete >= self._wanted and self._judged >= len(self._devices) - self._wanted,
            "failures": self.record.failures.total(),
            "counts": dict(self.record.counts),
            "cpu_s": time.process_time(),
        }


def main(pipe: Pipe, *arguments: Any) -> None:
    """Run a worker (its arguments) that obeys the pipe; the beginning of every process of a load test."""
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
                # What was written last has to leave before the process does.
                await asyncio.sleep(SAMPLE_S)
                pipe.send({"done": "stop", "record": worker.record.as_dict(), "cpu_s": time.process_time()})
                return
            case "abandon":
                return
