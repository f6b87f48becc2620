"""``device list | show | add | suspend | revoke | reinstate``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import click

from authbackend.cli.common import (
    NOT_ENABLED,
    actor,
    json_option,
    printable,
    run,
    show,
    show_change,
    table,
    target_of,
    wait_options,
    who,
)
from authbackend.errors import InvalidInput
from authbackend.policy.model import Status
from authbackend.policy_file.read import parse_time
from authbackend.postgres import registry_edits
from authbackend.postgres.connection import Target
from authbackend.postgres.enforcement import is_enabled


@click.group()
def device() -> None:
    """List, register, suspend and revoke devices, and issue certificates for them."""


@device.command("list")
@click.option("--type", "device_type", metavar="NAME", help="Only devices of this type.")
@click.option("--status", type=click.Choice([str(status) for status in Status]), help="Only devices with this status.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Show at most this many.")
@json_option
@click.pass_context
def list_(context: click.Context, device_type: str | None, status: str | None, limit: int, as_json: bool) -> None:
    """List devices by id."""
    devices = run(registry_edits.list_devices(target_of(context), device_type=device_type, status=status, limit=limit))

    def lines() -> Iterator[str]:
        yield from table(devices, ("device_id", "common_name", "type", "status", "status_reason", "expires_at"))
        if len(devices) == limit:
            yield f"only the first {limit}; see --limit"

    show(devices, as_json, lines)


@device.command("show")
@click.argument("name", metavar="DEVICE")
@json_option
@click.pass_context
def show_(context: click.Context, name: str, as_json: bool) -> None:
    """Show a device, by id or common name, and the rules that apply to it."""
    shown = run(registry_edits.get_device(target_of(context), name))

    def lines() -> Iterator[str]:
        for key in ("device_id", "common_name", "type", "status", "status_reason", "status_changed_at", "expires_at"):
            yield f"{key:18} {printable(shown[key])}"
        for key, value in sorted(shown["attributes"].items()):
            yield f"attr.{key:13} {printable(value)}"
        for change in shown["scheduled"]:
            yield f"scheduled          {change['status']} at {change['at']}, by {who(change['actor'], change['claimed_by'])}"
        yield ""
        yield from table(shown["rules"], ("id", "of", "effect", "action", "topic", "note"))

    show(shown, as_json, lines)


@device.command()
@click.argument("device_id")
@click.option("--type", "device_type", metavar="NAME", required=True, help="Device type.")
@click.option("--common-name", metavar="NAME", help="Common name in its certificates. Default: the device id.")
@click.option(
    "--status",
    type=click.Choice(["pending", "active"]),
    default="active",
    show_default=True,
    help="A pending device is not let in yet.",
)
@click.option(
    "--attribute",
    "attributes",
    metavar="NAME=VALUE",
    multiple=True,
    help="Value for {attr.NAME} in rules; may be repeated.",
)
@click.option(
    "--expires", metavar="TIME", help="Deny it from TIME on: ISO 8601, UTC if it names no zone. Default: never."
)
@wait_options
@json_option
@click.pass_context
def add(
    context: click.Context,
    device_id: str,
    device_type: str,
    common_name: str | None,
    status: str,
    attributes: tuple[str, ...],
    expires: str | None,
    as_json: bool,
    wait_s: float | None,
) -> None:
    """Register a device."""
    values = {}
    for attribute in attributes:
        name, equals, value = attribute.partition("=")
        if not equals:
            raise InvalidInput(f"--attribute {attribute}: write it as NAME=VALUE")
        values[name] = value
    expires_at = _time("--expires", expires)
    target = target_of(context)
    version = run(
        registry_edits.insert_device(
            target,
            actor(),
            device_id=device_id,
            device_type=device_type,
            common_name=common_name,
            status=status,
            attributes=values,
            expires_at=expires_at,
        )
    )
    result = {"device_id": device_id, "status": status, "version": version}
    show_change(target, result, as_json, lambda: [f"device {device_id} is {status}, version {version}"], wait_s)


def _time(option: str, text: str | None) -> datetime | None:
    try:
        return parse_time(text) if text else None
    except ValueError:
        raise InvalidInput(f"{option} {text}: write it as 2027-01-31T12:00:00Z") from None


def _change(
    context: click.Context,
    device_id: str,
    status: str,
    reason: str,
    as_json: bool,
    wait_s: float | None,
    until: datetime | None = None,
) -> None:
    target = target_of(context)
    version = run(registry_edits.set_device_status(target, actor(), device_id, status, reason, until))
    end = f"is {status} already; nothing was changed" if version is None else f"is {status}, version {version}"
    if until is not None:
        end += f", to be active again at {until.isoformat()}"
    result = {"device_id": device_id, "status": status, "reason": reason, "version": version}
    if until is not None:
        _warn_of_schedule(target)
    show_change(target, result, as_json, lambda: [f"device {device_id} {end}"], wait_s, ("device", device_id))


def _warn_of_schedule(target: Target) -> None:
    if not run(is_enabled(target)):
        click.echo(f"authbackend: scheduled changes are not made: {NOT_ENABLED}", err=True)


_reason_option = click.option("--reason", default="", help="Reason, kept with the device and in the audit trail.")


@device.command()
@click.argument("device_id")
@_reason_option
@click.option(
    "--until",
    metavar="TIME",
    help="Reinstate it at TIME: ISO 8601, UTC if it names no zone. Needs a replica with enforcement.clusters.",
)
@wait_options
@json_option
@click.pass_context
def suspend(
    context: click.Context, device_id: str, reason: str, until: str | None, as_json: bool, wait_s: float | None
) -> None:
    """Deny a device for now, close its connections and delete its sessions."""
    _change(context, device_id, "suspended", reason, as_json, wait_s, _time("--until", until))


@device.command()
@click.argument("device_id")
@_reason_option
@click.option("--at", metavar="TIME", help="Revoke it at TIME instead of now: ISO 8601, UTC if it names no zone.")
@wait_options
@json_option
@click.pass_context
def revoke(
    context: click.Context, device_id: str, reason: str, at: str | None, as_json: bool, wait_s: float | None
) -> None:
    """
    Deny a device for good, close its connections and delete its sessions.

    With --wait, returns when a last check has found nothing of it, and prints the receipt. Closing, deleting and --at need
    a replica with enforcement.clusters.
    """
    due = _time("--at", at)
    if due is None:
        _change(context, device_id, "revoked", reason, as_json, wait_s)
        return
    target = target_of(context)
    version = run(registry_edits.schedule_device_status(target, actor(), device_id, "revoked", reason, due))
    result = {"device_id": device_id, "status": "revoked", "at": due.isoformat(), "version": version}
    _warn_of_schedule(target)
    show_change(target, result, as_json, lambda: [f"device {device_id} is to be revoked at {due.isoformat()}"], wait_s)


@device.command()
@click.argument("device_id")
@_reason_option
@wait_options
@json_option
@click.pass_context
def reinstate(context: click.Context, device_id: str, reason: str, as_json: bool, wait_s: float | None) -> None:
    """Make a pending, suspended or revoked device active: it may log in."""
    _change(context, device_id, "active", reason, as_json, wait_s)
