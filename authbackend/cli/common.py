"""What all commands share: settings, errors, output, and how receipts are shown."""

from __future__ import annotations

import asyncio
import functools
import getpass
import json
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from authbackend.enforcement.tasks import Pause
from authbackend.errors import AuthbackendError, Unconfirmed
from authbackend.postgres import enforcement, registry_edits, replicas
from authbackend.postgres.connection import Target
from authbackend.service import replica
from authbackend.settings import Settings, load

T = TypeVar("T")

NOT_ENABLED = "enforcement is off until a replica with enforcement.clusters becomes the leader"
_NOT_FOR_TERMINALS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Commands(click.Group):
    """A group that prints an error as one line, without a traceback, and exits with the error's code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            with warnings.catch_warnings():
                if not sys.warnoptions:  # warnings of libraries, about certificates, are for developers
                    warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except AuthbackendError as error:
            click.echo(harmless(f"authbackend: {error.detail}"), err=True)
            sys.exit(error.exit_code)


def settings_of(context: click.Context) -> Settings:
    """
    Return the settings of this call.

    Raises:
        ConfigurationError: A setting is unknown or invalid.
    """
    config = context.find_root().obj
    return load(os.environ, Path(config) if config else None)


def target_of(context: click.Context) -> Target:
    """
    Return the database that the settings name.

    Raises:
        ConfigurationError: They name none.
    """
    return replica.target(settings_of(context), "authbackend cli")


def wait_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--wait`` and ``--timeout`` to a command, which gets them as ``wait_s``: None without ``--wait``."""

    @click.option(
        "--wait",
        is_flag=True,
        help="Wait until every replica that may answer decides by the change and, if enforcement is on, a last check has found nothing connected or stored that the change takes away. Exit status 8 if that is not confirmed in time.",
    )
    @click.option(
        "--timeout",
        type=click.FloatRange(0),
        metavar="SECONDS",
        default=10.0,
        show_default=True,
        help="Longest time that --wait waits, in seconds.",
    )
    @functools.wraps(command)
    def with_wait(*args: Any, wait: bool, timeout: float, **kwargs: Any) -> Any:
        return command(*args, wait_s=timeout if wait else None, **kwargs)

    return with_wait


def show_change(
    target: Target,
    result: dict[str, Any],
    as_json: bool,
    lines: Callable[[], Iterable[str]],
    wait_s: float | None,
    about: tuple[str, str] | None = None,
) -> None:
    """
    Print a change with its ``version``; with ``wait_s``, wait for the replicas and for enforcement first.

    Args:
        wait_s: Longest wait, in seconds; None: do not wait.
        about: Kind and name of what was changed. If nothing changed this time, its previous change is waited for.
    Raises:
        Unconfirmed: Not every replica decides by it in time, or something may still be connected. The change is
            committed and printed all the same.
    """
    fault = None
    if wait_s is not None:
        began = time.monotonic()
        try:
            version = result["version"] or run(registry_edits.present_version(target))
            result["confirmed_by"] = [each["name"] for each in run(replicas.wait(target, version, wait_s))]
        except Unconfirmed as error:
            fault, result["confirmed_by"] = error, None
        left_s = max(0.0, wait_s - (time.monotonic() - began))
        if result["version"]:
            result["enforcement"] = run(enforcement.enforced(target, result["version"], left_s))
        elif about is not None:
            result["enforcement"] = run(enforcement.settled(target, about[0], [about[1]], left_s))
        if "enforcement" in result:
            left_open = unfinished(result["enforcement"])
            for line in held_up(target) if left_open else ():
                click.echo(f"authbackend: {line}", err=True)
            fault = fault or left_open or left_alone(result["enforcement"])

    def all_lines() -> Iterable[str]:
        yield from lines()
        if result.get("confirmed_by"):
            yield f"confirmed by {', '.join(map(printable, result['confirmed_by']))}"
        for task in result.get("enforcement") or ():
            yield from receipt_lines(task)

    show(result, as_json, all_lines)
    if fault is not None:
        raise fault
    if result.get("confirmed_by") == []:
        click.echo("authbackend: no running replica is known, so none had to confirm", err=True)
    if "enforcement" in result and result["enforcement"] is None:
        click.echo(f"authbackend: existing connections were not checked: {NOT_ENABLED}", err=True)


def show_enforced(
    target: Target,
    tasks: list[dict[str, Any]] | None,
    result: dict[str, Any],
    as_json: bool,
    lines: Callable[[], Iterable[str]],
) -> None:
    """
    Print a revocation of certificates with its receipts.

    Args:
        tasks: The tasks that were waited for; None if enforcement is off.
    Raises:
        Unconfirmed: Something may still be connected, or a node may let the certificate in again. The revocation is
            committed and printed all the same.
    """
    result["enforcement"] = tasks

    def all_lines() -> Iterable[str]:
        yield from lines()
        for task in tasks or ():
            yield from receipt_lines(task)

    show(result, as_json, all_lines)
    fault = unfinished(tasks)
    for line in held_up(target) if fault else ():
        click.echo(f"authbackend: {line}", err=True)
    if tasks is None:
        raise Unconfirmed(
            f"committed, but existing connections were not checked, and it is not known which nodes have the revocation list: {NOT_ENABLED}"
        )
    if fault := fault or left_alone(tasks) or unlisted(tasks):
        raise fault


def unfinished(tasks: list[dict[str, Any]] | None) -> Unconfirmed | None:
    """Return the error to raise if a task of a change is still open."""
    open_ = [task for task in tasks or () if task["finished_at"] is None]
    if not open_:
        return None
    named = "; ".join(
        f"task {task['id']} ({task['kind']} {printable(task['name'])} on {printable(task['cluster'])}): {printable(why_open(task))}"
        for task in open_[:5]
    )
    more = f", and {len(open_) - 5} more" if len(open_) > 5 else ""
    return Unconfirmed(
        f"committed, but not yet confirmed for existing connections and sessions: {named}{more}. See: authbackend enforcement list --state open"
    )


def left_alone(tasks: list[dict[str, Any]] | None) -> Unconfirmed | None:
    """Return the error to raise if connections were left open because the brokers report too little about them."""
    untold = sum((task["receipt"] or {}).get("untold") or 0 for task in tasks or ())
    if not untold:
        return None
    return Unconfirmed(
        f"committed, but {untold} connections were left open: the brokers report too little to know whether they should end. See: authbackend enforcement sweeps"
    )


def unlisted(tasks: list[dict[str, Any]] | None) -> Unconfirmed | None:
    """Return the error to raise if it is not known that every node refuses a revoked certificate at the next login."""
    nodes = sorted(
        {node for task in tasks or () for node in ((task["receipt"] or {}).get("lists") or {}).get("unknown", ())}
    )
    if not nodes:
        return None
    return Unconfirmed(
        f"committed, but {', '.join(map(printable, nodes))} is not known to check a revocation list: there the certificate can log in again, and only the sweep finds it. Let crl sync report on each node's host (--node); see: authbackend crl hosts"
    )


def why_open(task: dict[str, Any]) -> str:
    """Explain why a task is not done yet."""
    receipt = task["receipt"] or {}
    if task["fault"]:
        return str(task["fault"])
    if receipt.get("unconfirmed"):
        return f"replicas that may still answer from an older copy: {', '.join(receipt['unconfirmed'])}"
    if receipt.get("unseen_nodes"):
        return f"nodes that are not seen running, so it is not known what is connected there: {', '.join(receipt['unseen_nodes'])}"
    lists = receipt.get("lists") or {}
    if silent := lists.get("silent"):
        return f"crl sync on the host of {', '.join(silent)} no longer reports, so it is not known whether the node has the revocation list; see: authbackend crl hosts"
    if behind := lists.get("behind"):
        if lists["number"] is None:
            return "it is on no revocation list yet: none has been signed or imported since"
        return f"revocation list number {lists['number']} is not installed yet on {', '.join(behind)}; see: authbackend crl hosts"
    return "in progress" if receipt else "not begun"


def receipt_lines(task: dict[str, Any]) -> Iterable[str]:
    """Yield a task and its receipt for a person."""
    receipt = task["receipt"] or {}
    causes = ", ".join(task["causes"])
    yield f"task {task['id']}: {task['kind']} {printable(task['name'])} ({causes}) on {printable(task['cluster'])} is {task['state']}"
    if task["finished_at"] is None:
        yield f"  open: {printable(why_open(task))}"
    if receipt.get("superseded"):
        yield f"  superseded: {printable(receipt['superseded'])}"
    closed = receipt.get("closed") or {}
    if "devices" in receipt:
        yield f"  {receipt['devices']} devices are affected, each has its own task"
    elif receipt:
        where = (
            ", ".join(f"{number} on {printable(node)}" for node, number in sorted(closed.items())) or "none was open"
        )
        last = f"; the last one {receipt['took_s']:g} s after the change" if closed else ""
        yield f"  connections closed: {where}{last}"
    for queue in receipt.get("queues_deleted", ()):
        yield f"  session deleted: {printable(queue['queue'])} with {queue['messages']} messages ({printable(queue['why'])})"
    for removed in receipt.get("subscriptions_removed", ()):
        yield f"  subscription removed: {printable(removed['filter'])} of {printable(removed['queue'])} ({printable(removed['why'])})"
    yield from _list_lines(receipt.get("lists") or {})
    if receipt.get("checked_at"):
        untold = receipt.get("untold")
        but = (
            f"; {untold} were left open, because the brokers report too little about them; see: authbackend enforcement sweeps"
            if untold
            else ""
        )
        what = "connected with it" if task["kind"] == "certificate" else "more to end"
        yield f"  last look at {receipt['checked_at']}: nothing {what} was found{but}"


def _list_lines(lists: dict[str, Any]) -> Iterable[str]:
    """Yield which nodes refuse a revoked certificate at the next login, as far as that is known."""
    if lists.get("installed"):
        yield f"  revocation list number {lists['number']} or a later one is installed on {', '.join(map(printable, lists['installed']))}"
    if lists.get("silent"):
        yield f"  no longer known to have that list, because crl sync no longer reports: {', '.join(map(printable, lists['silent']))}"
    if lists.get("unknown"):
        yield f"  not known to check a revocation list: {', '.join(map(printable, lists['unknown']))}; there it can log in again, and only the sweep finds it"


def held_up(target: Target) -> Iterable[str]:
    """Yield what blocks all enforcement: a pause, or a process that holds the leader's lock without being a replica."""
    if pause := run(enforcement.paused(target)):
        yield pause_line(pause)
    for holder in run(enforcement.list_lock_takers(target)):
        yield (
            f"nobody enforces: process {holder['pid']} (role {printable(holder['role'])}, {printable(holder['application'])}) "
            f"holds the lock of enforcement but is not a replica; end it: select pg_terminate_backend({holder['pid']})"
        )


def pause_line(pause: Pause) -> str:
    """Return what is paused, until when, and by whom."""
    what = "all enforcement" if pause.scope == "all" else "enforcement of everything but single revocations"
    return f"{what} is paused until {pause.until:%Y-%m-%d %H:%M:%S} UTC, by {who(pause.by, pause.claimed_by)}; end it: authbackend enforcement resume"


def who(by: str | None, claimed_by: str | None) -> str:
    """Return the role that acted, and the name that its client claimed if that is another one."""
    return printable(by) if claimed_by in (None, by) else f"{printable(by)} (says {printable(claimed_by)})"


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to completion."""
    return asyncio.run(coroutine)


def actor() -> str:
    """Return the name to claim in the audit trail (``claimed_by``): ``AUTHBACKEND_ACTOR``, else user@host."""
    if named := os.environ.get("AUTHBACKEND_ACTOR"):
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def show(value: Any, as_json: bool, lines: Callable[[], Iterable[str]]) -> None:
    """Print a result as JSON or as lines for a person."""
    if as_json:
        click.echo(harmless(json.dumps(value, indent=2, ensure_ascii=False, default=str)))
        return
    for line in lines():
        click.echo(harmless(line))


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Iterable[str]:
    """Yield a table with aligned columns."""
    cells = [[column.upper() for column in columns], *([printable(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def harmless(text: str) -> str:
    """Escape what could control a terminal or cannot be encoded; text, or JSON, may quote anybody's file."""
    return _NOT_FOR_TERMINALS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def printable(value: Any) -> str:
    """Return a stored value as text that cannot control a terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value) or "-"
    text = str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
