"""``python -m benchmarks.storm``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.namespaces import CannotRun
from benchmarks.storm import run
from benchmarks.storm.options import BACKENDS, FAULTS, Options
from benchmarks.storm.plot import plot

_DEFAULT = Options()


def _choice(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """Split a list at commas; ``none`` is the empty one."""
    del context
    known = BACKENDS if parameter.name == "backends" else FAULTS
    chosen = () if value in ("", "none") else tuple(value.split(","))
    for name in chosen:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return chosen


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--devices", type=click.IntRange(1, 19_000), default=_DEFAULT.devices, help="In the fleet.")
@click.option("--rounds", type=click.IntRange(0), default=_DEFAULT.rounds, help="Storms for each backend.")
@click.option("--backends", callback=_choice, default=",".join(BACKENDS), help="Separated by commas.")
@click.option("--processes", type=click.IntRange(1), default=_DEFAULT.processes, help="Of the load generator.")
@click.option("--in-flight", type=click.IntRange(0), default=_DEFAULT.in_flight, help="Unfinished cycles; 0: no limit.")
@click.option("--tls/--no-tls", default=True, help="Mutual TLS between broker and HTTP backends.")
@click.option(
    "--max-sessions", type=click.IntRange(1), default=_DEFAULT.max_sessions, help="httpc; RabbitMQ's own is 2."
)
@click.option("--workers", type=click.IntRange(1), default=_DEFAULT.workers, help="Processes of authbackend serve.")
@click.option("--steps/--no-steps", default=True, help="Also storms that end after each step.")
@click.option("--refusals/--no-refusals", default=True, help="Also the cost of refused publishes.")
@click.option("--logins/--no-logins", default=_DEFAULT.logins, help="Also the cost of log lines of logins.")
@click.option("--faults", callback=_choice, default=",".join(FAULTS), help="Separated by commas; none for none.")
@click.option("--fault-time", "fault_s", type=float, default=_DEFAULT.fault_s, help="Seconds each fault lasts.")
@click.option("--outage", "outage_s", type=float, default=_DEFAULT.outage_s, help="Seconds PostgreSQL is away.")
@click.option("--revoked", type=click.IntRange(0), default=_DEFAULT.revoked, help="Devices that must be refused.")
@click.option("--time-limit", "time_limit_s", type=float, default=_DEFAULT.time_limit_s, help="Seconds for each storm.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON here; default: standard output.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="PNG files here.")
def main(output: Path | None, plots: Path | None, **values: Any) -> None:
    """
    Let a fleet reconnect at once to a real RabbitMQ 4.3 with several authorization backends, and compare.

    Needs root, for a network of its own. Progress goes to standard error.
    """
    try:
        result = run(Options(**values))
    except CannotRun as error:
        click.echo(f"storm: {error}", err=True)
        sys.exit(1)
    text = json.dumps(result, indent=1)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
    if plots is not None:
        for file in plot(result, plots):
            click.echo(f"storm: drew {file}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.storm")
