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
    help="Read the password from FILE (- is standard input) instead of asking; the last newline is dropped.",
)


@click.group()
def account() -> None:
    """Accounts: services, people, and machines that speak AMQP."""


def _password(file: Path | None) -> str:
    if file is None:
        password: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        try:
            with click.open_file(str(file), encoding="utf-8-sig") as stream:
                password = stream.read().removesuffix("\n")
        except OSError as error:
            raise InvalidInput(f"cannot read {file}: {error.strerror}") from error
        except UnicodeDecodeError:  # its text holds the bytes
            raise InvalidInput(f"{file} is not UTF-8; nothing was changed") from None
    if len(password) < _SHORTEST_PASSWORD:
        raise InvalidInput(f"the password is shorter than {_SHORTEST_PASSWORD} characters; nothing was changed")
    return password


@account.command()
@click.argument("name")
@click.option("--login", type=click.Choice(["password", "certificate"]), default="password", show_default=True)
@click.option(
    "--tag", "tags", multiple=True, type=click.Choice(RABBITMQ_TAGS), help="A RabbitMQ user tag; may be repeated."
)
@click.option("--vhost", "vhosts", multiple=True, help="A virtual host it may use; may be repeated.")
@click.option("--client-id", "client_ids", multiple=True, help="An exact MQTT client id it may use; may be repeated.")
@click.option(
    "--configure",
    multiple=True,
    metavar="NAME",
    help="Queues and exchanges it may configure; * stands for any run of characters.",
)
@click.option("--write", multiple=True, metavar="NAME", help="The same for writing.")
@click.option("--read", multiple=True, metavar="NAME", help="The same for reading.")
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
    """Register an account; asks for its password, which is never an argument."""
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

    Replicas that decide by the change (--wait) refuse the old password; existing connections are closed by a replica with
    enforcement.clusters.
    """
    target = target_of(context)
    version = run(registry_edits.set_password(target, actor(), name, hash_password(_password(password_file))))
    lines = [f"password of {name} set, version {version}"]
    show_change(target, {"name": name, "version": version}, as_json, lambda: lines, wait_s)


@account.command("list")
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List accounts; for passwords, only whether one is set."""
    found = run(registry_edits.list_accounts(target_of(context)))
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
    show(found, as_json, lambda: table(found, columns))
