"""``enforcement list | show | retry | sweeps | pause | resume | forget | disable``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from authbackend.cli.common import (
    actor,
    held_up,
    json_option,
    pause_line,
    printable,
    receipt_lines,
    run,
    show,
    table,
    target_of,
    who,
    why_open,
)
from authbackend.postgres import enforcement as work
from authbackend.postgres.connection import Target


@click.group()
def enforcement() -> None:
    """Show and control what is closed and deleted on the brokers after a change."""


@enforcement.command("list")
@click.option(
    "--state",
    type=click.Choice(["open", "waiting", "checking", "done", "superseded"]),
    help="Only tasks in this state.",
)
@click.option(
    "--kind", type=click.Choice(["device", "device_type", "account", "certificate"]), help="Only tasks of this kind."
)
@click.option("--name", metavar="NAME", help="Only tasks of this device id, device type or account.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Show at most this many.")
@json_option
@click.pass_context
def list_(
    context: click.Context, state: str | None, kind: str | None, name: str | None, limit: int, as_json: bool
) -> None:
    """
    List tasks, the newest first.

    What holds them up is printed before them: a pause, a process that holds the enforcement lock but is not a replica, and
    scheduled changes that are late.
    """
    target = target_of(context)
    tasks = run(work.list_tasks(target, state=state, kind=kind, name=name, limit=limit))
    rows = [
        {
            **task,
            "by": who(task["by"], task["claimed_by"]),
            "noted_at": f"{task['noted_at']:%Y-%m-%d %H:%M:%S}",
            "closed": sum(((task["receipt"] or {}).get("closed") or {}).values()),
            "why": why_open(task) if task["finished_at"] is None else "",
        }
        for task in tasks
    ]
    columns = ("id", "noted_at", "by", "cluster", "kind", "name", "causes", "state", "closed", "why")

    def lines() -> Iterator[str]:
        yield from _held_up(target)
        yield from table(rows, columns)

    show(tasks, as_json, lines)


def _held_up(target: Target) -> Iterator[str]:
    yield from held_up(target)
    for each in run(work.list_overdue(target)):
        cause = f"its row is locked by {printable(each.holder)}" if each.holder else "no lock on its row is seen"
        yield (
            f"late: device {printable(each.device_id)} should have become {each.status} at {each.at:%Y-%m-%d %H:%M:%S} UTC; {cause}"
        )


@enforcement.command("show")
@click.argument("task", type=click.IntRange(1))
@json_option
@click.pass_context
def show_(context: click.Context, task: int, as_json: bool) -> None:
    """Show a task and its receipt: who caused it and when, which replicas confirmed, and what was closed where."""
    target = target_of(context)
    shown = run(work.get_task(target, task))

    def lines() -> Iterator[str]:
        if shown["finished_at"] is None:
            yield from held_up(target)
        yield from receipt_lines(shown)
        yield f"  noted at {shown['noted_at']:%Y-%m-%d %H:%M:%S.%f} UTC, by {who(shown['by'], shown['claimed_by'])}, version {shown['version']}"
        receipt = shown["receipt"] or {}
        if receipt.get("confirmed_by") is not None:
            yield f"  confirmed by: {', '.join(map(printable, receipt['confirmed_by'])) or 'no replica'}"
        for cluster, nodes in (receipt.get("nodes") or {}).items():
            seen = ", ".join(f"{printable(node)}{'' if up else ' (not running)'}" for node, up in nodes.items())
            yield f"  checked {printable(cluster)}: {seen}; {receipt['looks']} checks"
        if shown["attempts"]:
            yield f"  failed attempts: {shown['attempts']}"

    show(shown, as_json, lines)


@enforcement.command()
@click.argument("task", type=click.IntRange(1), required=False)
@json_option
@click.pass_context
def retry(context: click.Context, task: int | None, as_json: bool) -> None:
    """Run a task now, even one that is done. Without TASK: all open ones."""
    changed = run(work.retry(target_of(context), actor(), task))
    show({"tasks": changed}, as_json, lambda: [f"{changed} tasks are due now"])


@enforcement.command()
@json_option
@click.pass_context
def sweeps(context: click.Context, as_json: bool) -> None:
    """Show the results of each cluster's last sweep."""
    results = run(work.list_sweeps(target_of(context)))

    def lines() -> Iterator[str]:
        for sweep in results:
            report = sweep["report"]
            counted = ", ".join(f"{cause} {number}" for cause, number in report["found"].items()) or "nothing"
            yield (
                f"{printable(sweep['cluster'])} at {sweep['at']:%Y-%m-%d %H:%M:%S} UTC: {report['connections']} connections, "
                f"{report['sessions']} session queues in {report['duration_s']:g} s; found {counted}"
            )
            columns = ("cause", "user", "client_id", "queue", "node", "why")
            entries = [{column: entry.get(column) for column in columns} for entry in report["entries"]]
            if entries:
                yield from table(entries, columns)
        if not results:
            yield "no sweep has run yet"

    show(results, as_json, lines)


@enforcement.command()
@click.option(
    "--all", "everything", is_flag=True, help="Also pause single revocations, suspensions, deletions and expiries."
)
@json_option
@click.pass_context
def pause(context: click.Context, everything: bool, as_json: bool) -> None:
    """
    Stop closing connections and deleting sessions for up to an hour.

    For a change that turned out to be wrong. The pause takes effect between two connections; undo the change, and what has
    been undone is not closed any more. Single revocations, suspensions, deletions and expiries go on, unless --all is given.
    Decisions are not paused. Meanwhile the sweep reports, but closes nothing.
    """
    paused = run(work.pause(target_of(context), actor(), "all" if everything else "bulk"))
    show(asdict(paused), as_json, lambda: [pause_line(paused)])


@enforcement.command()
@json_option
@click.pass_context
def resume(context: click.Context, as_json: bool) -> None:
    """End a pause; open tasks become due immediately."""
    was_paused = run(work.resume(target_of(context), actor()))
    show(
        {"resumed": was_paused},
        as_json,
        lambda: ["the pause has ended" if was_paused else "enforcement was not paused"],
    )


@enforcement.command()
@click.argument("cluster")
@json_option
@click.pass_context
def forget(context: click.Context, cluster: str, as_json: bool) -> None:
    """
    Forget a cluster that is gone for good: record no more tasks for it, and close its open ones.

    If a replica still has it in enforcement.clusters, it comes back when that replica becomes the leader.
    """
    tasks = run(work.forget_cluster(target_of(context), actor(), cluster))
    show(
        {"cluster": cluster, "tasks": tasks},
        as_json,
        lambda: [f"cluster {printable(cluster)} is forgotten; {tasks} tasks were closed without being done"],
    )


@enforcement.command()
@json_option
@click.pass_context
def disable(context: click.Context, as_json: bool) -> None:
    """
    Switch enforcement off: record no more tasks, and end all holds.

    For a registry whose replicas no longer enforce: otherwise, changes go on recording tasks that nobody does. It is
    switched on again when a replica with enforcement.clusters becomes the leader.
    """
    holds, moves = run(work.disable(target_of(context), actor()))
    show(
        {"enabled": False, "holds": holds, "client_id_moves": moves},
        as_json,
        lambda: [
            f"changes record no more tasks until a replica with enforcement.clusters becomes the leader; {holds} holds of devices and {moves} of types whose client ids moved have ended"
        ],
    )
