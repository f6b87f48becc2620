"""The command ``python -m benchmarks.storm``."""

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
    """Split a list at commas; ``none`` is the empty list."""
    del context
    choices = BACKENDS if parameter.name == "backends" else FAULTS
    chosen = () if value in ("", "none") else tuple(value.split(","))
    for name in chosen:
        if name not in choices:
            raise click.BadParameter(f"{name!r} must be one of {', '.join(choices)}")
    return chosen


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--devices", type=click.IntRange(1, 19_000), default=_DEFAULT.devices, help="Devices in the fleet.")
@click.option("--rounds", type=click.IntRange(0), default=_DEFAULT.rounds, help="Storms for each backend.")
@click.option("--backends", callback=_choice, default=",".join(BACKENDS), help="Backends, separated by commas.")
@click.option(
    "--processes", type=click.IntRange(1), default=_DEFAULT.processes, help="Processes of the load generator."
)
@click.option(
    "--in-flight", type=click.IntRange(0), default=_DEFAULT.in_flight, help="Limit of unfinished cycles; 0: none."
)
@click.option("--tls/--no-tls", default=True, help="Mutual TLS between broker and HTTP backends.")
@click.option(
    "--max-sessions",
    type=click.IntRange(1),
    default=_DEFAULT.max_sessions,
    help="httpc's max_sessions; its default is 2.",
)
@click.option("--workers", type=click.IntRange(1), default=_DEFAULT.workers, help="Workers of authbackend serve.")
@click.option("--steps/--no-steps", default=True, help="Also run storms that end after each step.")
@click.option("--refusals/--no-refusals", default=True, help="Also measure the cost of refused publishes.")
@click.option("--logins/--no-logins", default=_DEFAULT.logins, help="Also measure the cost of logging logins.")
@click.option("--faults", callback=_choice, default=",".join(FAULTS), help="Faults, separated by commas, or none.")
@click.option("--fault-time", "fault_s", type=float, default=_DEFAULT.fault_s, help="Seconds that each fault lasts.")
@click.option("--outage", "outage_s", type=float, default=_DEFAULT.outage_s, help="Seconds that PostgreSQL is stopped.")
@click.option("--revoked", type=click.IntRange(0), default=_DEFAULT.revoked, help="Devices that must be refused.")
@click.option("--time-limit", "time_limit_s", type=float, default=_DEFAULT.time_limit_s, help="Seconds for each storm.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON here; default: standard output."
)
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Write PNG files here.")
def main(output: Path | None, plots: Path | None, **values: Any) -> None:
    """
    Compare authorization backends while a whole fleet reconnects to a real RabbitMQ 4.3.

    Needs root, for its own network namespace. Progress goes to standard error.
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
