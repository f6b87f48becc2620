"""All processes of a load test on one machine."""

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
    How things stand at one moment.

    Attributes:
        at_s: since the fleet was started.
        connected: devices with a connection.
        complete: devices that have finished their cycle since the last :meth:`Fleet.begin`.
        failures: since the start.
        counts: those of :class:`Record`, since the start.
    """

    at_s: float
    connected: int
    complete: int
    failures: int
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class Storm:
    """
    One time that the whole fleet connected.

    Attributes:
        name: ``connect`` for the first, ``reconnect`` for those after a cut.
        begin_s: since the fleet was started.
        devices: that had to finish their cycle.
        complete: that did.
        duration_s: until the last of them did.
    """

    name: str
    begin_s: float
    devices: int
    complete: int
    duration_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, with the rate."""
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
    Devices in several processes. Use with ``with``; every process ends with the block.

    Args:
        processes: how many; each can fill a core.
        on_sample: called about four times a second while something goes on.
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
            ours, theirs = context.Pipe()
            part = share(self._identities, index, self._count)
            arguments = (theirs, self.plan, part, places[index :: self._count], address, in_flight)
            process = context.Process(target=worker.main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(_Process(process, ours))
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
        """Let every device begin its cycle, at once or at the plan's rate; return when they are told."""
        self._beginnings += 1
        self._begun_at = time.monotonic() + _START_DELAY_S
        self._tell("begin", self._begun_at)

    def storm(self, time_limit_s: float) -> Storm:
        """
        Let the whole fleet connect and wait until every device that may has finished its cycle, and every other one
        was refused.

        Args:
            time_limit_s: then it is over, finished or not; what is missing is in the result.
        """
        self.begin()
        end = self._begun_at + time_limit_s
        while time.monotonic() < end and not self._all_complete():
            self.look()
        known = [each.last for each in self._processes if each.last.get("beginnings") == self._beginnings]
        last = max((one["last_complete_at"] for one in known), default=self._begun_at)
        storm = Storm(
            "reconnect" if self.storms else "connect",
            self._begun_at - self._started_at,
            self._active,
            sum(one["complete"] for one in known),
            (last if self._all_complete() else time.monotonic()) - self._begun_at,
        )
        self.storms.append(storm)
        return storm

    def _all_complete(self) -> bool:
        return all(
            each.last.get("beginnings") == self._beginnings and each.last["all_complete"] for each in self._processes
        )

    def hold(self, duration_s: float) -> None:
        """Leave the devices connected for this time; they do what the plan says for then."""
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            self.look()

    def cut(self) -> None:
        """Cut all connections at once, without a word."""
        self._tell("cut")
        self._answers("done")
        self._sampled()

    def stop(self) -> None:
        """End all connections in good order, and collect what happened."""
        self._tell("stop")
        for answer in self._answers("done"):
            self.record.merge(Record.of(answer["record"]))
            self.cpu_s += answer["cpu_s"]

    def look(self) -> None:
        """Wait for the next sample of every process, at most about half a second."""
        for each in wait([one.pipe for one in self._processes], timeout=2 * worker.SAMPLE_S):
            assert isinstance(each, Pipe)
            self._receive(each)
        self._sampled()

    def _sampled(self) -> None:
        known = [each.last for each in self._processes if each.last]
        now = time.monotonic() - self._started_at
        if not known or (self.samples and now - self.samples[-1].at_s < worker.SAMPLE_S):
            return
        counts: Counter[str] = Counter()
        for last in known:
            counts.update(last["counts"])
        self.samples.append(
            Sample(
                now,
                sum(last["connected"] for last in known),
                sum(last["complete"] for last in known),
                sum(last["failures"] for last in known),
                counts,
            )
        )
        if self._on_sample is not None:
            self._on_sample(self.samples[-1])

    def _tell(self, *command: Any) -> None:
        for each in self._processes:
            each.pipe.send(command)

    def _answers(self, key: str) -> list[dict[str, Any]]:
        """Wait until every process gave an answer that has this key; samples may come first."""
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
            raise LoadError(f"process {each.process.pid} of the load generator does not answer")
        try:
            message: dict[str, Any] = pipe.recv()
        except EOFError:
            each.process.join(1)
            status = each.process.exitcode
            raise LoadError(f"process {each.process.pid} of the load generator ended, status {status}") from None
        if "fault" in message:
            raise LoadError(message["fault"])
        if "at" in message:
            each.last = message
        return message


def resolve(host: str, port: int) -> tuple[str, int]:
    """
    Return the first address of a host.

    Raises:
        LoadError: the name is not known.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise LoadError(f"host {host}: {error.strerror}") from error
    return str(found[0][4][0]), port
