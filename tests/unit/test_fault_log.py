"""Log lines of a lasting fault, with a simulated clock."""

import asyncio

from structlog.testing import capture_logs

from authbackend.logs.fault_log import FaultLog
from tests.support.clock import run_on_clock


def logged(work):
    with capture_logs() as lines:
        run_on_clock(work())
    return [(line["event"], line.get("fault"), line.get("unlogged")) for line in lines]


def test_two_faults_by_turns_are_logged_once_each_and_then_once_a_minute():
    async def work():
        faults = FaultLog("left", "back")
        for attempt in range(240):  # an attempt every half second, for two minutes
            faults.failed("refused" if attempt % 2 else "name not known")
            await asyncio.sleep(0.5)
        faults.succeeded()
        faults.succeeded()

    assert logged(work) == [
        ("left", "name not known", None),
        ("left", "refused", None),
        ("left", "refused", 119),
        ("back", None, None),
    ]


def test_the_next_outage_is_logged_at_once():
    async def work():
        faults = FaultLog("left", "back")
        for _ in range(2):
            faults.failed("refused")
            faults.failed("refused")
            faults.succeeded()

    assert logged(work) == [("left", "refused", None), ("back", None, None)] * 2


def test_faults_whose_text_never_repeats_are_bounded_as_well():
    async def work():
        faults = FaultLog("left")
        for attempt in range(1000):
            faults.failed(f"the copy is {attempt} s old")
        faults.succeeded()

    assert [fault for _, fault, _ in logged(work)] == [f"the copy is {number} s old" for number in range(10)]
