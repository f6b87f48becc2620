"""Percentiles and counts are exact, also when merged from several processes."""

from __future__ import annotations

import io
import json
import random

import pytest

from authbackend_load.fleet import Sample
from authbackend_load.histogram import Histogram
from authbackend_load.progress import Progress
from authbackend_load.record import Record


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_a_percentile_is_exact_to_one_percent(fraction: float) -> None:
    chance = random.Random(1)
    durations = [chance.lognormvariate(-4, 2) for _ in range(10_001)]
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    exact = sorted(durations)[max(0, round(fraction * len(durations)) - 1)]
    assert histogram.quantile(fraction) == pytest.approx(exact, rel=0.02)


def test_histograms_of_processes_add_up() -> None:
    """Also after a round trip through JSON."""
    parts, whole = [Histogram(), Histogram()], Histogram()
    for number in range(1, 101):
        parts[number % 2].add(number / 1000)
        whole.add(number / 1000)
    sum_ = Histogram.of(json.loads(json.dumps(parts[0].as_dict())))
    sum_.merge(parts[1])
    assert sum_.summary() == whole.summary()
    assert whole.summary()["count"] == 100
    assert whole.summary()["max"] == 100
    assert whole.summary()["mean"] == pytest.approx(50.5)
    assert whole.at_least(0.0905) == 10
    assert whole.distribution()[-1] == (100, 1)


def test_no_events_have_no_percentiles() -> None:
    assert Histogram().summary() == {"count": 0}


def test_records_of_processes_add_up() -> None:
    one, two = Record(), Record()
    one.failure("connack", "0x87 not authorized")
    two.failure("connack", "0x87 not authorized")
    two.failure("handshake", "tcp: connection refused")
    two.count("attempts", 3)
    one.merge(Record.of(json.loads(json.dumps(two.as_dict()))))
    assert one.report()["failures"] == {"connack: 0x87 not authorized": 2, "handshake: tcp: connection refused": 1}
    assert one.report()["counts"] == {"attempts": 3}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _sample(at_s: float, connected: int) -> Sample:
    return Sample(at_s, connected, connected, 0, Record().counts)


def test_progress_rewrites_its_line_on_a_terminal() -> None:
    stream = _Terminal()
    progress = Progress(10, stream)
    progress.sample(_sample(0.25, 3))
    progress.sample(_sample(0.5, 10))
    progress.close()
    first, second = stream.getvalue().removesuffix("\n").split("\r")[1:]
    assert ("connected 3/10" in first, "connected 10/10" in second, "\n" in first + second) == (True, True, False)


def test_progress_prints_few_lines_elsewhere() -> None:
    stream = io.StringIO()
    progress = Progress(10, stream)
    for number in range(100):
        progress.sample(_sample(number / 4, number))
    assert len(stream.getvalue().splitlines()) == 1
