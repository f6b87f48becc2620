"""``policy check | plan | apply | export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from authbackend.cli.common import actor, harmless, json_option, run, show, show_change, target_of, wait_options
from authbackend.errors import Forbidden, InvalidInput
from authbackend.pki.files import write_file
from authbackend.policy_file.changes import Change, Impact
from authbackend.policy_file.devices import read_devices
from authbackend.policy_file.lint import lint
from authbackend.policy_file.model import Document, Problem
from authbackend.policy_file.read import decode, read
from authbackend.policy_file.write import as_tree, write
from authbackend.postgres import policy_apply, policy_export

_file = click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
_devices = click.option(
    "--devices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Read the devices section from FILE, CSV or JSON lines.",
)
_prune = click.option("--prune", is_flag=True, help="Also remove entries that a section of the file does not list.")


@click.group()
def policy() -> None:
    """Check, plan, apply and export the policy file."""


def _read(file: Path, devices: Path | None) -> tuple[Document, list[Problem]]:
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    if str(file) == "-":
        file = Path("standard input")
    text, fault = decode(data, str(file))
    if fault is not None:
        return Document(), [fault]
    document, problems = read(text, str(file))
    if devices is not None:
        if document.devices is not None:
            place = document.places["devices",]
            problems.append(Problem(str(file), *place, "has a devices section; it and --devices exclude each other"))
        document.devices, more = read_devices(devices)
        document.speaks_of_device_rules = False
        problems += more
    if not problems:
        problems = lint(document, str(file))
    return document, problems


def _read_or_refuse(file: Path, devices: Path | None) -> Document:
    document, problems = _read(file, devices)
    for problem in problems:
        click.echo(harmless(str(problem)), err=True)
    if any(not problem.warning for problem in problems):
        raise InvalidInput("nothing was changed: the file has errors")
    return document


@policy.command()
@_file
@_devices
@json_option
def check(file: Path, devices: Path | None, as_json: bool) -> None:
    """Check FILE and print every problem with file, line and column; needs no database."""
    document, problems = _read(file, devices)
    errors = sum(not problem.warning for problem in problems)

    def lines() -> Iterator[str]:
        yield from map(str, problems)
        sizes = [
            f"{len(section)} {name}"
            for name, section in (
                ("device types", document.device_types),
                ("devices", document.devices),
                ("accounts", document.accounts),
            )
            if section is not None
        ]
        yield f"{file}: {errors} errors, {len(problems) - errors} warnings; {', '.join(sizes) or 'no section'}"

    show({"errors": errors, "problems": [asdict(problem) for problem in problems]}, as_json, lines)
    if errors:
        raise click.exceptions.Exit(InvalidInput.exit_code)


def _say(text: str) -> None:
    click.echo(f"authbackend: {text}", err=True)


def _impact(impact: Impact | None) -> dict[str, object] | None:
    return None if impact is None else impact.as_json()


def _changes(changes: list[Change]) -> list[dict[str, object]]:
    return [asdict(change) for change in changes]


@policy.command()
@_file
@_devices
@_prune
@json_option
@click.pass_context
def plan(context: click.Context, file: Path, devices: Path | None, prune: bool, as_json: bool) -> None:
    """
    Print what applying FILE would change: the impact, and the exact difference. Changes nothing.

    The impact is how many devices, accounts and certificates lose something. The database counts it: it makes the changes
    and rolls them back. If it would refuse them, the exit status is that of apply; an impact above the brake's limit is
    only reported.
    """
    document = _read_or_refuse(file, devices)
    planned = run(policy_apply.plan(target_of(context), document, prune=prune, say=_say))
    readable = isinstance(planned.fault, Forbidden)

    def lines() -> Iterator[str]:
        if planned.impact is not None:
            yield str(planned.impact)
            if planned.impact.beyond_limit:
                yield planned.impact.way_on
        elif readable:
            yield "impact: not known, because this role may only read: the database counts it while it makes the changes"
        yield from map(str, planned.changes)
        yield f"{len(planned.changes)} changes"

    show({"impact": _impact(planned.impact), "changes": _changes(planned.changes)}, as_json, lines)
    if planned.fault is not None and not readable:
        raise planned.fault


@policy.command()
@_file
@_devices
@_prune
@click.option(
    "--accept-impact",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Let the change take something from up to NUMBER devices, accounts and certificates. Default: what the brake allows.",
)
@wait_options
@json_option
@click.pass_context
def apply(
    context: click.Context,
    file: Path,
    devices: Path | None,
    prune: bool,
    accept_impact: int | None,
    as_json: bool,
    wait_s: float | None,
) -> None:
    """
    Make the registry what FILE says, all or nothing, and print the impact and the new registry version.

    It blocks nobody. Exit status 4: somebody else changed a row in the meantime, which is named. Exit status 5: others
    held or wanted the rows; try again.
    """
    document = _read_or_refuse(file, devices)
    target = target_of(context)
    applied = run(
        policy_apply.apply(target, document, actor=actor(), prune=prune, accept_impact=accept_impact, say=_say)
    )
    end = (
        "nothing to change"
        if applied.version is None
        else f"applied {len(applied.changes)} changes, version {applied.version}"
    )
    result = {"version": applied.version, "impact": _impact(applied.impact), "changes": _changes(applied.changes)}
    first = [] if applied.impact is None else [str(applied.impact)]
    show_change(target, result, as_json, lambda: [*first, *map(str, applied.changes), end], wait_s)


@policy.command()
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to FILE, mode 600, instead of standard output.",
)
@json_option
@click.pass_context
def export(context: click.Context, output: Path | None, as_json: bool) -> None:
    """Write the whole registry as a policy file. It holds password hashes: keep it secret."""
    document = run(policy_export.export(target_of(context)))
    text = json.dumps(as_tree(document), indent=2, ensure_ascii=False) + "\n" if as_json else write(document)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        write_file(output, text.encode(), 0o600)
    except OSError as error:
        raise InvalidInput(f"{output}: {error.strerror}") from error
    click.echo(f"wrote {output}", err=True)
