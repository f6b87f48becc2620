"""A fleet of devices, spread over several processes of one machine: starts, directs and samples them."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from authbackend_load import worker
from authbackend_load.plan import Identity, LoadError, Plan, share
from authbackend_load.record import Record

_ANSWER_TIMEOUT_S = 60.0
_PREPARE_S = 0.01
_START_DELAY_S = 0.2


@dataclass(frozen=True, slots=True)
class Sample:
    """
    The state of a fleet at one moment.

    Attributes:
        at_s: Seconds since the fleet was started.
        connected: Devices with a connection.
        complete: Devices that have finished their cycle since the last :meth:`Fleet.begin`.
        failures: The number since the start.
        counts: Those of :class:`Record`, since the start.
    """

    at_s: float
    connected: int
    complete: int
    failures: int
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class Storm:
    """
    A connection storm: the whole fleet connects.

    Attributes:
        name: ``connect`` for the first, ``reconnect`` for those after a cut.
        begin_s: Seconds since the fleet was started.
        devices: Devices that had to finish their cycle.
        complete: Devices that finished it.
        duration_s: Time until the last of them finished.
    """

    name: str
    begin_s: float
    devices: int
    complete: int
    duration_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the storm for JSON, with its rate."""
        rate = self.complete / self.duration_s if self.duration_s > 0 else 0.0
        return {
            "name": self.name,
            "begin_s": round(self.begin_s, 3),
            "devices": self.devices,
            "complete": self.complete,
            "duration_s": round(self.duration_s, 3),
            "cycles_per_s": round(rate, 1),
        }


@dataclass(slots=True)
class _Process:
    process: BaseProcess
    pipe: Pipe
    last: dict[str, Any] = field(default_factory=dict)


class Fleet:
    """
    Devices in several processes, which run for the duration of a ``with`` block.

    Args:
        processes: The number of processes; each can use one core.
        on_sample: Called about four times a second while the fleet is active.
    """

    def __init__(
        self,
        plan: Plan,
        identities: Sequence[Identity],
        processes: int = 1,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> None:
        self.plan = plan
        self.samples: list[Sample] = []
        self.storms: list[Storm] = []
        self.record = Record()
        self.cpu_s = 0.0
        self._active = sum(identity.active for identity in identities)
        self._identities = identities
        self._count = min(processes, len(identities))
        self._on_sample = on_sample
        self._processes: list[_Process] = []
        self._beginnings = 0
        self._begun_at = 0.0
        self._started_at = 0.0

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [each.process.pid for each in self._processes if each.process.pid is not None]

    def __enter__(self) -> Self:
        address = resolve(self.plan.host, self.plan.port)
        context = multiprocessing.get_context("spawn")
        places = list(range(len(self._identities)))
        in_flight = -(-self.plan.in_flight // self._count)
        for index in range(self._count):
            pipe, workers_end = context.Pipe()
            part = share(self._identities, index, self._count)
            arguments = (workers_end, self.plan, part, places[index :: self._count], address, in_flight)
            process = context.Process(target=worker.main, args=arguments, daemon=True)
            process.start()
            workers_end.close()
            self._processes.append(_Process(process, pipe))
        try:
            self._answers("ready")
        except BaseException:
            self._kill()
            raise
        self._started_at = time.monotonic()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        for each in self._processes:
            each.pipe.close()
        for each in self._processes:
            each.process.join(2)
            if each.process.is_alive():
                each.process.kill()
                each.process.join()
        self._processes = []

    def begin(self) -> None:
        """Make every device begin its cycle, immediately or at the plan's rate; return once the command is sent."""
        self._beginnings += 1
        self._begun_at = time.monotonic() + _START_DELAY_S
        self._send("begin", self._begun_at)

    def storm(self, time_limit_s: float) -> Storm:
        """
        Connect the whole fleet; wait until all active devices have finished their cycle and all others were refused.

        Args:
            time_limit_s: After this time the storm ends, finished or not; the result shows what is missing.
        """
        self.begin()
        end = self._begun_at + time_limit_s
        while time.monotonic() < end and not self._all_complete():
            self.look()
        samples = [each.last for each in self._processes if each.last.get("beginnings") == self._beginnings]
        last = max((sample["last_complete_at"] for sample in samples), default=self._begun_at)
        storm = Storm(
            "reconnect" if self.storms else "connect",
            self._begun_at - self._started_at,
            self._active,
            sum(sample["complete"] for sample in samples),
            (last if self._all_complete() else time.monotonic()) - self._begun_at,
        )
        self.storms.append(storm)
        return storm

    def _all_complete(self) -> bool:
        return all(
            each.last.get("beginnings") == self._beginnings and each.last["all_complete"] for each in self._processes
        )

    def hold(self, duration_s: float) -> None:
        """Leave the devices connected for this time; they publish and ping as the plan says."""
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            self.look()

    def cut(self) -> None:
        """Abort all connections at the same time, without DISCONNECT."""
        self._send("cut")
        self._answers("done")
        self._sampled()

    def stop(self) -> None:
        """Disconnect all devices, and collect the records of all processes."""
        self._send("stop")
        for answer in self._answers("done"):
            self.record.merge(Record.of(answer["record"]))
            self.cpu_s += answer["cpu_s"]

    def look(self) -> None:
        """Wait for the next samples of the processes, for up to about half a second."""
        for each in wait([one.pipe for one in self._processes], timeout=2 * worker.SAMPLE_S):
            assert isinstance(each, Pipe)
            self._receive(each)
        self._sampled()

    def _sampled(self) -> None:
        latest = [each.last for each in self._processes if each.last]
        now = time.monotonic() - self._started_at
        if not latest or (self.samples and now - self.samples[-1].at_s < worker.SAMPLE_S):
            return
        counts: Counter[str] = Counter()
        for one in latest:
            counts.update(one["counts"])
        self.samples.append(
            Sample(
                now,
                sum(one["connected"] for one in latest),
                sum(one["complete"] for one in latest),
                sum(one["failures"] for one in latest),
                counts,
            )
        )
        if self._on_sample is not None:
            self._on_sample(self.samples[-1])

    def _send(self, *command: Any) -> None:
        for each in self._processes:
            each.pipe.send(command)

    def _answers(self, key: str) -> list[dict[str, Any]]:
        """Wait for an answer with this key from every process; samples may come first."""
        answers = []
        for each in self._processes:
            deadline = time.monotonic() + _ANSWER_TIMEOUT_S + _PREPARE_S * len(self._identities)
            while key not in (message := self._receive(each.pipe, deadline - time.monotonic())):
                pass
            answers.append(message)
        return answers

    def _receive(self, pipe: Pipe, timeout_s: float = 0.0) -> dict[str, Any]:
        each = next(one for one in self._processes if one.pipe is pipe)
        if not pipe.poll(max(0.0, timeout_s)):
            raise LoadError(
                f"process {each.process.pid} of the load generator does not answer in time; use fewer devices here (--share)"
            )
        try:
            message: dict[str, Any] = pipe.recv()
        except EOFError:
            each.process.join(1)
            status = each.process.exitcode
            raise LoadError(f"process {each.process.pid} of the load generator ended with status {status}") from None
        if "fault" in message:
            raise LoadError(message["fault"])
        if "at" in message:
            each.last = message
        return message


def resolve(host: str, port: int) -> tuple[str, int]:
    """
    Return the first address of a host.

    Raises:
        LoadError: The name cannot be resolved.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise LoadError(f"host {host}: {error.strerror}") from error
    return str(addresses[0][4][0]), port
