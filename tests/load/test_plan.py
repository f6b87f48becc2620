"""The times at which the devices of a fleet begin."""

import pytest

from authbackend_load.plan import Plan


def begun(plan, at_s, fleet=10_000):
    return sum(plan.begins_after_s(place) <= at_s for place in range(fleet))


def test_all_at_once_and_at_a_rate():
    assert begun(Plan(), 0.0) == 10_000
    assert [begun(Plan(rate_per_s=100), t) for t in (0, 1, 10)] == [1, 101, 1001]


@pytest.mark.parametrize(("at_s", "expected"), [(0, 0), (5, 125), (10, 500), (11, 600), (20, 1500)])
def test_a_ramp_reaches_the_rate_evenly(at_s, expected):
    """With 100 per second reached after ten seconds: 500 by then, and 100 more each second afterwards."""
    assert begun(Plan(rate_per_s=100, ramp_s=10), at_s) == pytest.approx(expected, abs=2)


def test_nobody_begins_before_the_one_in_front():
    plan = Plan(rate_per_s=50, ramp_s=3)
    times = [plan.begins_after_s(place) for place in range(500)]
    assert times == sorted(times)
