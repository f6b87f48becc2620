"""``account add | passwd | list``."""

from __future__ import annotations

from pathlib import Path

import click

from authbackend.cli.common import actor, json_option, run, show, show_change, table, target_of, wait_options
from authbackend.errors import InvalidInput
from authbackend.passwords import hash_password
from authbackend.policy.names import RABBITMQ_TAGS
from authbackend.postgres import registry_edits

_SHORTEST_PASSWORD = 8
_password_file = click.option(
    "--password-file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Read the password from FILE (-: standard input) instead of prompting. A newline at its end is dropped.",
)


@click.group()
def account() -> None:
    """Manage accounts: services, people, and machines that speak AMQP."""


def _password(file: Path | None) -> str:
    if file is None:
        password: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        try:
            with click.open_file(str(file), encoding="utf-8-sig") as stream:
                password = stream.read().removesuffix("\n")
        except OSError as error:
            raise InvalidInput(f"cannot read {file}: {error.strerror}") from error
        except UnicodeDecodeError:  # its message quotes bytes of the password
            raise InvalidInput(f"{file} is not UTF-8; nothing was changed") from None
    if len(password) < _SHORTEST_PASSWORD:
        raise InvalidInput(f"the password is shorter than {_SHORTEST_PASSWORD} characters; nothing was changed")
    return password


@account.command()
@click.argument("name")
@click.option(
    "--login",
    type=click.Choice(["password", "certificate"]),
    default="password",
    show_default=True,
    help="How the account logs in.",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    type=click.Choice(RABBITMQ_TAGS),
    help="Give it this RabbitMQ user tag; may be repeated.",
)
@click.option("--vhost", "vhosts", multiple=True, help="Let it use this virtual host; may be repeated.")
@click.option(
    "--client-id", "client_ids", multiple=True, help="Let it use exactly this MQTT client id; may be repeated."
)
@click.option(
    "--configure",
    multiple=True,
    metavar="NAME",
    help="Let it configure queues and exchanges of this name, in which * stands for any characters; may be repeated.",
)
@click.option("--write", multiple=True, metavar="NAME", help="The same, to write to.")
@click.option("--read", multiple=True, metavar="NAME", help="The same, to read from.")
@_password_file
@wait_options
@json_option
@click.pass_context
def add(
    context: click.Context,
    /,
    name: str,
    login: str,
    password_file: Path | None,
    as_json: bool,
    wait_s: float | None,
    **lists: tuple[str, ...],
) -> None:
    """Register an account; prompts for its password, which is never an argument."""
    if login == "certificate" and password_file is not None:
        raise InvalidInput("an account that logs in by certificate has no password")
    password_hash = hash_password(_password(password_file)) if login == "password" else None
    target = target_of(context)
    version = run(
        registry_edits.insert_account(target, actor(), name=name, login=login, password_hash=password_hash, lists=lists)
    )
    lines = [f"account {name} added, version {version}"]
    show_change(target, {"name": name, "version": version}, as_json, lambda: lines, wait_s)


@account.command()
@click.argument("name")
@_password_file
@wait_options
@json_option
@click.pass_context
def passwd(context: click.Context, name: str, password_file: Path | None, as_json: bool, wait_s: float | None) -> None:
    """
    Set the password of an account.

    A replica refuses the old password as soon as it decides by the change; --wait waits for that. Existing connections
    are closed if enforcement is on (enforcement.clusters).
    """
    target = target_of(context)
    version = run(registry_edits.set_password(target, actor(), name, hash_password(_password(password_file))))
    lines = [f"password of {name} set, version {version}"]
    show_change(target, {"name": name, "version": version}, as_json, lambda: lines, wait_s)


@account.command("list")
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List accounts. Of a password, only whether it is set is shown."""
    accounts = run(registry_edits.list_accounts(target_of(context)))
    columns = (
        "name",
        "login",
        "password_set",
        "tags",
        "vhosts",
        "networks",
        "client_ids",
        "configure",
        "write",
        "read",
    )
    show(accounts, as_json, lambda: table(accounts, columns))
