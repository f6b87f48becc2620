"""``replicas list | forget`` and ``wait``."""

from __future__ import annotations

import click

from authbackend.cli.common import actor, json_option, run, show, show_change, table, target_of
from authbackend.postgres import replicas as store


@click.group()
def replicas() -> None:
    """List running replicas, and forget those that are gone."""


@replicas.command("list")
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """
    List the replicas: their state, the version they serve, and how long ago they were in step with the database.

    States: starting, live, silent (not heard of for 10 s; may still be answering), stopped (signed off), gone (its copy
    is too old to decide by). MAY_ANSWER: `authbackend wait` waits for it. ID is new at each start, FOLDER stays. TWINS:
    how many others now run from a folder with the same id; one was copied, and needs an empty folder of its own.
    """
    known = run(store.list_replicas(target_of(context)))
    shown = [{**one, "age_s": None if one["age_s"] is None else round(one["age_s"], 1)} for one in known]
    columns = ("name", "id", "folder", "twins", "program_version", "workers", "state", "version", "age_s", "may_answer")
    show(known, as_json, lambda: table(shown, columns))


@replicas.command()
@click.argument("name", metavar="REPLICA")
@json_option
@click.pass_context
def forget(context: click.Context, name: str, as_json: bool) -> None:
    """
    Forget a replica, by id or name, that will never answer again, so that nobody waits for it.

    One that is still running reappears within a second.
    """
    number = run(store.forget_replica(target_of(context), actor(), name))
    show({"forgotten": number}, as_json, lambda: [f"forgot {number} replicas"])


@click.command()
@click.argument("version")
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="Longest time to wait, in seconds.",
)
@json_option
@click.pass_context
def wait(context: click.Context, version: str, timeout: float, as_json: bool) -> None:
    """
    Wait until every replica that may answer decides by VERSION, as printed by a command or `select registry_version()`.

    Exit status 8 if that is not confirmed in time; the message names the missing replicas.
    """
    show_change(target_of(context), {"version": version}, as_json, list, timeout)
