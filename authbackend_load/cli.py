"""The command line: ``authbackend-load certificates`` and ``authbackend-load run``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from authbackend_load import certificates as pki
from authbackend_load import plot as plots
from authbackend_load import run as runs
from authbackend_load.plan import CA_FILE, PUBLISH, STEPS, SUBSCRIBE, LoadError, Plan, read_identities, share
from authbackend_load.progress import Progress

_CORES = len(os.sched_getaffinity(0))
_directory = click.Path(file_okay=False, path_type=Path)
_file = click.Path(dir_okay=False, path_type=Path)


class _Group(click.Group):
    """Prints the message of a :class:`LoadError` and exits with code 2, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoadError as error:
            click.echo(f"authbackend-load: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("authbackend-load: stopped", err=True)
            sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """
    Load-test RabbitMQ with a fleet of MQTT devices, each with its own TLS client certificate.

    Exit codes: 0 success, 1 a device did not finish or a verdict was wrong, 2 invalid usage, 130 stopped by Ctrl-C.
    """


@main.command()
@click.argument("directory", metavar="DIR", type=_directory)
@click.option("--count", type=click.IntRange(1, 999_999), required=True, help="How many devices.")
@click.option("--prefix", metavar="TEXT", default="APM", help="Device ids are PREFIX000001 and so on.")
@click.option(
    "--type",
    "device_type",
    metavar="NAME",
    default="authbackend-load",
    show_default=True,
    help="Their device type in authbackend; applying the policy file replaces a type of this name.",
)
@click.option("--revoked", type=click.IntRange(0), default=0, help="Register the last N as revoked.", metavar="N")
@click.option("--processes", type=click.IntRange(1), default=_CORES, help="Make certificates in this many processes.")
def certificates(directory: Path, count: int, prefix: str, device_type: str, revoked: int, processes: int) -> None:
    """
    Make a certificate for each device in DIR, and the files that register them.

    DIR gets the files of `authbackend certs DIR`, and devices/DEVICE.pem (certificate and key in one file),
    devices.csv and policy.yaml. Existing files are kept, so the command can be repeated to add devices.
    To use an existing authority, put its ca.pem and ca.key into DIR first.
    """
    ids = pki.device_ids(prefix, count)
    progress = Progress(count)
    made = pki.make(
        directory,
        ids,
        device_type=device_type,
        revoked=min(revoked, count),
        processes=processes,
        progress=lambda done: progress.count(done, count, "certificates"),
    )
    progress.close()
    click.echo(f"{directory}: {made.written} certificates written, {made.kept} kept")
    click.echo(
        f"register them: authbackend policy apply {directory}/{pki.POLICY_FILE} --devices {directory}/devices.csv"
    )


def _fleet_options(function: Any) -> Any:
    for option in reversed(
        (
            click.option("--count", type=click.IntRange(1), metavar="N", help="Use N devices; default: all in DIR."),
            click.option("--skip", type=click.IntRange(0), default=0, metavar="N", help="Skip the first N of DIR."),
            click.option("--share", "part", metavar="K/N", help="Use only the K-th of N shares, one for each machine."),
            click.option("--processes", type=click.IntRange(1), default=_CORES, help="Run in this many processes."),
            click.option("--host", default="localhost", help="Host of the broker."),
            click.option(
                "--port", type=click.IntRange(1, 65_535), default=8883, help="The broker's port for MQTT over TLS."
            ),
            click.option("--ca", type=_file, help="Authority of the broker's certificate; default: DIR/ca.pem."),
            click.option(
                "--server-name", metavar="NAME", default="", help="Name in the broker's certificate; default: host."
            ),
            click.option("--insecure", is_flag=True, help="Accept any certificate of the broker."),
            click.option(
                "--tls", "tls_version", type=click.Choice(["1.2", "1.3"]), help="Use only this version of TLS."
            ),
            click.option(
                "--source",
                "sources",
                metavar="ADDRESS",
                multiple=True,
                help="Local address to connect from; repeatable.",
            ),
        )
    ):
        function = option(function)
    return function


def _mqtt_options(function: Any) -> Any:
    for option in reversed(
        (
            click.option("--mqtt", type=click.Choice(["3.1.1", "5"]), default="5", help="MQTT version."),
            click.option(
                "--keep-alive", type=click.IntRange(0, 65_535), default=60, help="Keep-alive in seconds; 0: none."
            ),
            click.option(
                "--persistent", type=click.IntRange(0), default=0, metavar="S", help="Keep sessions for S seconds."
            ),
            click.option("--client-id", default="{device_id}", help="Client id; {device_id} is filled in."),
            click.option("--subscribe", "-s", multiple=True, default=[SUBSCRIBE], help="Topic filter; repeatable."),
            click.option("--subscribe-qos", type=click.IntRange(0, 1), default=1),
            click.option("--publish", "-p", multiple=True, default=[PUBLISH], help="Topic, also with {n}; repeatable."),
            click.option("--publish-qos", type=click.IntRange(0, 1), default=1),
            click.option("--publishes", type=click.IntRange(0), default=1, help="Publishes in each cycle."),
            click.option("--interval", type=click.FloatRange(0), default=0.0, help="Seconds between later publishes."),
            click.option(
                "--payload", type=click.IntRange(0, 1_000_000), default=64, help="Size of a message in bytes."
            ),
            click.option("--until", type=click.Choice(STEPS), default="publish", help="Last step of a cycle."),
        )
    ):
        function = option(function)
    return function


def _time_options(function: Any) -> Any:
    for option in reversed(
        (
            click.option(
                "--rate", type=click.FloatRange(0), default=0.0, help="Cycles started per second; 0: all at once."
            ),
            click.option("--ramp", type=click.FloatRange(0), default=0.0, help="Seconds until --rate is reached."),
            click.option("--in-flight", type=click.IntRange(0), default=0, help="Limit of unfinished cycles; 0: none."),
            click.option("--duration", type=click.FloatRange(0), default=0.0, help="Seconds to stay connected."),
            click.option(
                "--reconnect-all", type=click.IntRange(0), default=0, metavar="N", help="Cut all connections N times."
            ),
            click.option(
                "--retry-delay",
                type=click.FloatRange(0.01),
                default=1.0,
                help="Seconds before a retry; doubles up to 30.",
            ),
            click.option("--timeout", type=click.FloatRange(0.1), default=30.0, help="Seconds to wait for an answer."),
            click.option(
                "--time-limit", type=click.FloatRange(1), default=300.0, help="Seconds for the fleet to connect."
            ),
        )
    ):
        function = option(function)
    return function


@main.command()
@click.argument("directory", metavar="DIR", type=_directory)
@_fleet_options
@_mqtt_options
@_time_options
@click.option("--output", type=_file, help="Write the result as JSON here; default: standard output.")
@click.option("--plot", "picture", type=_file, help="Draw the result here, PNG.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
def run(directory: Path, **options: Any) -> None:
    """
    Connect the devices of DIR and measure how long each step takes.

    A cycle is TCP, TLS, CONNECT, SUBSCRIBE and PUBLISH, each acknowledged. A cycle that fails is counted by cause and
    retried. When every device has finished its cycle, all stay connected for --duration. Then --reconnect-all cuts all
    connections at the same time, and the devices reconnect. In topics, filters and client ids, {device_id} is the
    device and {n} the number of the publish. Devices whose status in devices.csv is not active must be refused; a run
    in which one gets in fails.
    """
    if options["picture"] is not None:
        plots.require()
    identities = read_identities(directory, options["count"], options["skip"])
    if options["part"]:
        identities = share(identities, *_part(options["part"]))
    if not identities:
        raise LoadError(f"--share {options['part']}: fewer devices than shares; make more, or use fewer shares")
    progress = Progress(len(identities), quiet=options["quiet"])
    result = runs.run(
        _plan(directory, options),
        identities,
        processes=options["processes"],
        duration_s=options["duration"],
        reconnects=options["reconnect_all"],
        time_limit_s=options["time_limit"],
        on_sample=progress.sample,
        on_phase=lambda name: setattr(progress, "phase", name),
    )
    progress.close()
    _deliver(result, options["output"], options["picture"])


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise LoadError(f"--share {text}: write it as 2/3 for the second of three machines")
    return int(number) - 1, int(count)


def _plan(directory: Path, options: dict[str, Any]) -> Plan:
    ca = options["ca"] or directory / CA_FILE
    if not options["insecure"] and not ca.exists():
        raise LoadError(f"{ca} is missing: give the authority of the broker's certificate with --ca, or use --insecure")
    return Plan(
        host=options["host"],
        port=options["port"],
        ca_file="" if options["insecure"] else str(ca),
        server_name=options["server_name"],
        tls_version=options["tls_version"] or "",
        version=5 if options["mqtt"] == "5" else 4,
        keep_alive_s=options["keep_alive"],
        clean=not options["persistent"],
        session_expiry_s=options["persistent"],
        client_id=options["client_id"],
        subscribe=tuple(filter(None, options["subscribe"])),
        subscribe_qos=options["subscribe_qos"],
        publish=tuple(filter(None, options["publish"])),
        publish_qos=options["publish_qos"],
        publishes=options["publishes"],
        interval_s=options["interval"],
        payload_bytes=options["payload"],
        until=options["until"],
        rate_per_s=options["rate"],
        ramp_s=options["ramp"],
        in_flight=options["in_flight"],
        retry_delay_s=options["retry_delay"],
        timeout_s=options["timeout"],
        sources=options["sources"],
    )


def _deliver(result: dict[str, Any], output: Path | None, picture: Path | None) -> None:
    text = json.dumps(result, indent=1)
    if output is None:
        click.echo(text)
    else:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LoadError(f"{output}: {error.strerror}") from error
        _summary(result)
    if picture is not None:
        plots.plot(result, picture)
    faults = runs.faults(result)
    for fault in faults:
        click.echo(f"authbackend-load: {fault}", err=True)
    if faults:
        sys.exit(1)


def _summary(result: dict[str, Any]) -> None:
    for storm in result["storms"]:
        click.echo(
            f"{storm['name']}: {storm['complete']} of {storm['devices']} devices in {storm['duration_s']:g} s,"
            f" {storm['cycles_per_s']:g} a second"
        )
    for name, values in result["latency_ms"].items():
        click.echo(
            f"  {name:10} p50 {values['p50']:10.1f}  p99 {values['p99']:10.1f}  max {values['max']:10.1f} ms"
            f"  ({values['count']})"
        )
    for cause, count in result["failures"].items():
        click.echo(f"  {count} x {cause}")
