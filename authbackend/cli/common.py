"""What every command needs: settings, output, errors."""

from __future__ import annotations

import asyncio
import functools
import getpass
import json
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from authbackend import ground
from authbackend.errors import AuthbackendError, Unconfirmed
from authbackend.postgres import editor, replicas
from authbackend.postgres.connection import Target
from authbackend.settings import Settings, load

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Commands(click.Group):
    """A group that ends with an error's message and exit code instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except AuthbackendError as error:
            click.echo(f"authbackend: {error.detail}", err=True)
            sys.exit(error.exit_code)


def settings_of(context: click.Context) -> Settings:
    """
    Return the settings of this call.

    Raises:
        ConfigurationError: They are wrong.
    """
    config = context.find_root().obj
    return load(os.environ, Path(config) if config else None)


def target_of(context: click.Context) -> Target:
    """
    Return the database of this call.

    Raises:
        ConfigurationError: None is set.
    """
    return ground.target(settings_of(context), "authbackend cli")


def wait_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--wait`` and ``--timeout`` to a command, which gets them as ``wait_s``: None is not to wait."""

    @click.option(
        "--wait",
        is_flag=True,
        help="Return when every replica decides by it; exit status 8 if that is not known in time.",
    )
    @click.option(
        "--timeout",
        type=click.FloatRange(0),
        metavar="SECONDS",
        default=10.0,
        show_default=True,
        help="How long --wait waits.",
    )
    @functools.wraps(command)
    def with_wait(*args: Any, wait: bool, timeout: float, **kwargs: Any) -> Any:
        return command(*args, wait_s=timeout if wait else None, **kwargs)

    return with_wait


def show_change(
    target: Target, result: dict[str, Any], as_json: bool, lines: Callable[[], Iterable[str]], wait_s: float | None
) -> None:
    """
    Wait for the replicas, if wanted, and print a change with its ``version``.

    Raises:
        Unconfirmed: Not all decide by it in time; it is printed and committed all the same.
    """
    fault = None
    if wait_s is not None:
        try:
            version = result["version"] or run(editor.present_version(target))
            result["confirmed_by"] = [found["name"] for found in run(replicas.wait(target, version, wait_s))]
        except Unconfirmed as error:
            fault, result["confirmed_by"] = error, None

    def all_lines() -> Iterable[str]:
        yield from lines()
        if result.get("confirmed_by"):
            yield f"confirmed by {', '.join(map(printable, result['confirmed_by']))}"

    show(result, as_json, all_lines)
    if fault is not None:
        raise fault
    if result.get("confirmed_by") == []:
        click.echo("authbackend: no replica is known that could answer", err=True)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run something asynchronous to its end."""
    return asyncio.run(coroutine)


def actor() -> str:
    """Return who acts, for the audit trail: ``AUTHBACKEND_ACTOR``, else user@host."""
    if named := os.environ.get("AUTHBACKEND_ACTOR"):
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def show(value: Any, as_json: bool, lines: Callable[[], Iterable[str]]) -> None:
    """Print a result as JSON or as lines for a person."""
    if as_json:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        return
    for line in lines():
        click.echo(line)


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Iterable[str]:
    """Yield a table with aligned columns."""
    cells = [[column.upper() for column in columns], *([printable(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def printable(value: Any) -> str:
    """Return a value for a terminal: nothing that somebody stored can drive it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value) or "-"
    text = str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
