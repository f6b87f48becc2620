"""A histogram of latencies, exact to one percent, in little memory; histograms of several processes can be merged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

_STEP = math.log(1.01)
_SMALLEST_S = 1e-6
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


class Histogram:
    """Counts durations in buckets, each one percent wider than the previous."""

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self.largest_s = 0.0
        self.smallest_s = math.inf
        self._buckets: Counter[int] = Counter()

    def add(self, duration_s: float) -> None:
        """Count a duration; less than a microsecond counts as one."""
        self.count += 1
        self.total_s += duration_s
        self.largest_s = max(self.largest_s, duration_s)
        self.smallest_s = min(self.smallest_s, duration_s)
        self._buckets[int(math.log(max(duration_s, _SMALLEST_S) / _SMALLEST_S) / _STEP)] += 1

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self.count += other.count
        self.total_s += other.total_s
        self.largest_s = max(self.largest_s, other.largest_s)
        self.smallest_s = min(self.smallest_s, other.smallest_s)
        self._buckets.update(other._buckets)

    def quantile(self, fraction: float) -> float:
        """Return the duration in seconds that this fraction of the events did not exceed; NaN without events."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(fraction * self.count))
        for bucket, seen in self._cumulated():
            if seen >= rank:
                return self._duration(bucket)
        return self.largest_s

    def at_least(self, duration_s: float) -> int:
        """Return how many events took at least this long, exact to one percent."""
        return sum(count for bucket, count in self._buckets.items() if self._duration(bucket) >= duration_s)

    def summary(self) -> dict[str, float | int]:
        """Return the count; with events also mean, minimum, percentiles and maximum, in milliseconds."""
        if not self.count:
            return {"count": 0}
        percentiles = {name: round(self.quantile(fraction) * 1000, 3) for name, fraction in QUANTILES.items()}
        return {
            "count": self.count,
            "mean": round(self.total_s / self.count * 1000, 3),
            "min": round(self.smallest_s * 1000, 3),
            **percentiles,
            "max": round(self.largest_s * 1000, 3),
        }

    def distribution(self) -> list[tuple[float, float]]:
        """Return the cumulative distribution: pairs of milliseconds and cumulative fraction."""
        return [(round(self._duration(b) * 1000, 3), round(seen / self.count, 6)) for b, seen in self._cumulated()]

    def _cumulated(self) -> list[tuple[int, int]]:
        seen, pairs = 0, []
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            pairs.append((bucket, seen))
        return pairs

    def _duration(self, bucket: int) -> float:
        middle = _SMALLEST_S * math.exp((bucket + 0.5) * _STEP)
        return min(max(middle, self.smallest_s), self.largest_s)

    def as_dict(self) -> dict[str, Any]:
        """Return the histogram as plain values."""
        return {
            "count": self.count,
            "total_s": self.total_s,
            "largest_s": self.largest_s,
            "smallest_s": self.smallest_s,
            "buckets": dict(self._buckets),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the histogram that :meth:`as_dict` returned."""
        histogram = cls()
        histogram.count, histogram.total_s = values["count"], values["total_s"]
        histogram.largest_s, histogram.smallest_s = values["largest_s"], values["smallest_s"]
        histogram._buckets = Counter({int(bucket): count for bucket, count in values["buckets"].items()})
        return histogram
