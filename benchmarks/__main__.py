"""The command ``python -m benchmarks``, or ``make bench``: runs all benchmarks and writes ``docs/performance.md``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from authbackend_load.run import machine
from benchmarks import braking, fixtures, report, topics
from benchmarks.fixtures import BenchmarkError
from benchmarks.measurements import ALL, QUICK, Extent, running_environment
from benchmarks.namespaces import CannotRun, run_inside
from benchmarks.storm import Options
from benchmarks.storm import run as storm

RESULTS = Path(__file__).parent / "results"
PARTS = (*ALL, "brake", "storm", "faults", "httpc", "revocation", "lanes", "topics")


def _say(text: str) -> None:
    click.echo(f"bench: {text}", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Run only this part; repeatable.")
@click.option("--quick", is_flag=True, help="A small, short run to see whether it works; writes no files.")
@click.option("--report-only", is_flag=True, help="Measure nothing; write plots and tables from the existing results.")
def main(only: tuple[str, ...], quick: bool, report_only: bool) -> None:
    """
    Measure the service side by side with its references, in turn, in one run.

    The results of each part are written to benchmarks/results/PART.json when it ends, plots to docs/performance/ and
    tables to docs/performance.md. Nothing else should run on the machine. Needs wrk, and root for the parts with
    RabbitMQ. Takes about an hour.
    """
    try:
        if not report_only:
            _measure(only or PARTS, quick)
    except (BenchmarkError, CannotRun) as error:
        _say(str(error))
        sys.exit(1)
    if not quick:
        for file in report.write(RESULTS):
            _say(f"wrote {file}")


def _measure(parts: tuple[str, ...], quick: bool) -> None:
    extent = QUICK if quick else Extent()
    without_broker = [name for name in ALL if name in parts]
    if without_broker:
        with running_environment(extent, _say) as environment:
            needs_capacity = any(name in without_broker for name in ("sizes", "changes", "overload"))
            if needs_capacity and "throughput" not in without_broker:
                without_broker.insert(0, "throughput")
            for name in without_broker:
                _say(f"--- {name}")
                started = time.monotonic()
                _save(name, ALL[name](environment), started, quick)
    if "brake" in parts:
        _say("--- brake")
        started = time.monotonic()
        with fixtures.postgres() as server:
            result = braking.measure(server, 5000 if quick else 100_000, 2 if quick else 5, _say)
        _save("brake", result, started, quick)
    if "storm" in parts:
        _say("--- storm")
        started = time.monotonic()
        options = Options(workers=1, refusals=False, faults=())
        options = replace(options, devices=200, rounds=1) if quick else replace(options, rounds=5)
        _save("storm", storm(options), started, quick)
    if "faults" in parts:
        _say("--- faults")
        started = time.monotonic()
        options = Options(rounds=0, steps=False)
        options = (
            replace(options, devices=200, fault_s=5.0, outage_s=5.0) if quick else replace(options, outage_s=600.0)
        )
        _save("faults", storm(options), started, quick)
    if "httpc" in parts:
        _say("--- httpc")
        started = time.monotonic()
        plain = replace(Options(), devices=200 if quick else 5000, rounds=1, steps=False, refusals=False, faults=())
        plain = replace(plain, backends=("authbackend",))
        result = {
            f"{'mutual TLS' if tls else 'plain'}, {sessions} sessions": storm(
                replace(plain, tls=tls, max_sessions=sessions)
            )
            for tls in (True, False)
            for sessions in (64, 2)
        }
        _save("httpc", result, started, quick)
    if "revocation" in parts:
        _say("--- revocation")
        started = time.monotonic()
        small = {"revocations": 10, "fleet": 300, "registered": 3000, "mass": 300, "swept": 200, "certificates": 2}
        _save("revocation", run_inside("benchmarks.revocation.run", small if quick else {}), started, quick)
    if "lanes" in parts:
        _say("--- lanes")
        started = time.monotonic()
        small = {"registered": 5000, "mass": 2000, "swept": 3000}
        _save("lanes", run_inside("benchmarks.revocation.lanes", small if quick else {}), started, quick)
    if "topics" in parts:
        _say("--- topics")
        started = time.monotonic()
        _save("topics", topics.measure(3 if quick else 30), started, quick)


def _save(name: str, result: dict[str, Any], started: float, quick: bool) -> None:
    record = {
        "part": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "lasted_s": round(time.monotonic() - started, 1),
        "machine": machine(),
        "result": result,
    }
    if quick:
        click.echo(json.dumps(record, indent=1))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _say(f"{name} done after {record['lasted_s']} s")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
