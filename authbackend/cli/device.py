"""``device list | show | add | suspend | revoke | reinstate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click

from authbackend.cli.common import actor, json_option, printable, run, show, show_change, table, target_of, wait_options
from authbackend.document.read import parse_time
from authbackend.errors import InvalidInput
from authbackend.policy.rules import Status
from authbackend.postgres import editor


@click.group()
def device() -> None:
    """Devices of the registry."""


@device.command("list")
@click.option("--type", "device_type", metavar="NAME", help="Only devices of this type.")
@click.option("--status", type=click.Choice([str(status) for status in Status]), help="Only devices with this status.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="At most this many.")
@json_option
@click.pass_context
def list_(context: click.Context, device_type: str | None, status: str | None, limit: int, as_json: bool) -> None:
    """List devices by id."""
    found = run(editor.list_devices(target_of(context), device_type=device_type, status=status, limit=limit))

    def lines() -> Iterator[str]:
        yield from table(found, ("device_id", "common_name", "type", "status", "status_reason", "expires_at"))
        if len(found) == limit:
            yield f"only the first {limit}; see --limit"

    show(found, as_json, lines)


@device.command("show")
@click.argument("name", metavar="DEVICE")
@json_option
@click.pass_context
def show_(context: click.Context, name: str, as_json: bool) -> None:
    """Show a device, by its id or common name, and the rules it is decided by."""
    found = run(editor.get_device(target_of(context), name))

    def lines() -> Iterator[str]:
        for key in ("device_id", "common_name", "type", "status", "status_reason", "status_changed_at", "expires_at"):
            yield f"{key:18} {printable(found[key])}"
        for key, value in sorted(found["attributes"].items()):
            yield f"attr.{key:13} {printable(value)}"
        yield ""
        yield from table(found["rules"], ("id", "of", "effect", "action", "topic", "note"))

    show(found, as_json, lines)


@device.command()
@click.argument("device_id")
@click.option("--type", "device_type", metavar="NAME", required=True, help="Its device type.")
@click.option("--common-name", metavar="NAME", help="As its certificate says; default: the device id.")
@click.option("--status", type=click.Choice(["pending", "active"]), default="active", show_default=True)
@click.option(
    "--attribute", "attributes", metavar="NAME=VALUE", multiple=True, help="A value for {attr.NAME}; may be repeated."
)
@click.option("--expires", metavar="TIME", help="ISO 8601; UTC without a zone.")
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
    try:
        expires_at = parse_time(expires) if expires else None
    except ValueError:
        raise InvalidInput(f"--expires {expires}: write it as 2027-01-31T12:00:00Z") from None
    target = target_of(context)
    version = run(
        editor.insert_device(
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


def _transition(name: str, status: str, text: str) -> Callable[..., Any]:
    @device.command(name, help=text)
    @click.argument("device_id")
    @click.option("--reason", default="", help="Why; kept with the device and in the audit trail.")
    @wait_options
    @json_option
    @click.pass_context
    def command(context: click.Context, device_id: str, reason: str, as_json: bool, wait_s: float | None) -> None:
        target = target_of(context)
        version = run(editor.set_device_status(target, actor(), device_id, status, reason))
        end = f"is {status} already; nothing was changed" if version is None else f"is {status}, version {version}"
        result = {"device_id": device_id, "status": status, "reason": reason, "version": version}
        show_change(target, result, as_json, lambda: [f"device {device_id} {end}"], wait_s)

    return command


suspend = _transition("suspend", "suspended", "Deny a device for now.")
revoke = _transition(
    "revoke",
    "revoked",
    "Deny a device for good. RabbitMQ does not ask again about what is already connected: close its connections too.",
)
reinstate = _transition("reinstate", "active", "Let a pending, suspended or revoked device in again.")
