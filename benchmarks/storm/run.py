"""Runs a storm benchmark inside the namespaces: ``python -m benchmarks.storm.run OPTIONS RESULT``, both JSON files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from authbackend_load.plan import LoadError
from authbackend_load.run import machine
from benchmarks.storm.environment import running_environment
from benchmarks.storm.faults import faults, refusals
from benchmarks.storm.logins import logins
from benchmarks.storm.options import Options
from benchmarks.storm.rounds import rounds, steps
from tests.broker.processes import HarnessError

SCHEMA = "authbackend-storm/1"


def _say(text: str) -> None:
    print(f"storm: {text}", file=sys.stderr, flush=True)  # noqa: T201


def measure(options: Options) -> dict[str, Any]:
    """
    Start all parts, run the measurements that the options select, and return the result for JSON.

    Raises:
        HarnessError: A part did not start or failed.
        LoadError: The load generator could not run.
    """
    begin, start = datetime.now(UTC), time.monotonic()
    _say(f"booting RabbitMQ, PostgreSQL and the backends; registering {options.devices} devices")
    with running_environment(options) as environment:
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "begin": begin.isoformat(timespec="seconds"),
            "machine": machine() | environment.versions(),
            "options": options.as_dict(),
        }
        _say(f"ready after {time.monotonic() - start:.0f} s")
        parts: tuple[tuple[str, bool, Callable[..., dict[str, Any]]], ...] = (
            ("rounds", options.rounds > 0 and not options.logins, rounds),
            ("steps", options.steps, steps),
            ("refusals", options.refusals and "authbackend" in options.backends, refusals),
            ("logins", options.logins and "authbackend" in options.backends, logins),
            ("faults", bool(options.faults) and "authbackend" in options.backends, faults),
        )
        for name, selected, part in parts:
            if selected:
                result[name] = part(environment, _say)
    result["lasted_s"] = round(time.monotonic() - start, 1)
    return result


def main() -> None:
    """Read the options, measure, write the result."""
    values: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    options = Options(**values)
    try:
        result = measure(options)
    except (HarnessError, LoadError) as error:
        _say(str(error))
        sys.exit(1)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
