"""``serve``, ``migrate`` and ``roles``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from pydantic import SecretStr

from authbackend import logs
from authbackend.certificates import crl_publisher
from authbackend.cli.common import json_option, run, settings_of, show, target_of
from authbackend.errors import ConfigurationError, Unavailable
from authbackend.policy_file.read import read
from authbackend.postgres import migrate as migrations
from authbackend.postgres import policy_apply
from authbackend.postgres.connection import Target
from authbackend.postgres.embedded import embedded, tools
from authbackend.postgres.statements import SQL
from authbackend.service import components, replica, supervisor
from authbackend.settings import Database, Settings, is_loopback

SAMPLE = Path(__file__).parent.parent / "sample-fleet.yaml"


@click.command()
@click.option(
    "--embedded",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Run a private PostgreSQL in DIR, migrated. For trying out; needs the extra authbackend[embedded].",
)
@click.option("--sample", is_flag=True, help="With --embedded: load the sample fleet into an empty registry.")
@click.option(
    "--workers", type=click.IntRange(1, 64), metavar="N", help="Worker processes. Default: the setting replica.workers."
)
@click.pass_context
def serve(context: click.Context, folder: Path | None, sample: bool, workers: int | None) -> None:
    """
    Run a replica: answer RabbitMQ and people until SIGTERM.

    Also starts while the database is down: it answers 503 and is not ready until the registry has been loaded.
    """
    supervisor.survive_hangups()
    settings = settings_of(context)
    if workers is not None:
        settings = settings.model_copy(update={"replica": settings.replica.model_copy(update={"workers": workers})})
    if sample and folder is None:
        raise ConfigurationError("--sample needs --embedded DIR; for your own database: authbackend policy apply FILE")
    logs.configure(settings.log.format, settings.log.level)
    components.broker_tls(settings.broker)  # report configuration errors before anything starts
    components.health_tls(settings.health)
    crl_publisher.open_authority(settings.pki)
    with _database(settings, folder, sample) as ready:
        supervisor.serve(ready, lambda where: _greet(ready, where, folder, sample))


@contextlib.contextmanager
def _database(settings: Settings, folder: Path | None, sample: bool) -> Iterator[Settings]:
    if folder is None:
        _require_migrated(replica.target(settings))
        yield settings
        return
    if settings.database.dsn is not None:
        raise ConfigurationError(
            "--embedded and database.dsn exclude each other: unset AUTHBACKEND_DATABASE__DSN or leave --embedded out"
        )
    _say(f"starting PostgreSQL in {folder}/postgres")
    with embedded(folder) as dsn:
        ready = settings.model_copy(
            update={
                "database": Database(dsn=SecretStr(dsn)),
                "registry": settings.registry.model_copy(
                    update={"snapshot_dir": settings.registry.snapshot_dir or folder / "snapshot"}
                ),
            }
        )
        target = replica.target(ready)
        applied = run(migrations.migrate(target))
        if applied:
            _say(f"applied {len(applied)} migrations")
        if sample and applied:
            run(_load_sample(target))
            _say(f"loaded the sample fleet ({SAMPLE.name})")
        yield ready


def _require_migrated(target: Target) -> None:
    try:
        missing = run(migrations.missing(target))
    except Unavailable as error:
        _say(f"{error.detail}; starting anyway, not ready until it answers")
        return
    if missing:
        raise ConfigurationError(f"the database lacks {len(missing)} migrations; run: authbackend migrate")


async def _load_sample(target: Target) -> None:
    document, problems = read(SAMPLE.read_text(encoding="utf-8"), SAMPLE.name)
    assert not problems, problems
    await policy_apply.apply(target, document, actor="authbackend serve --sample")


def _greet(settings: Settings, where: dict[str, str], folder: Path | None, sample: bool) -> None:
    _say(
        f"answering RabbitMQ on {where['broker']}, people on {where['admin']}, "
        f"balancers, brokers' hosts and Prometheus on {where['health']}"
    )
    if folder is None:
        return
    dsn = replica.target(settings).dsn
    _say(f"database: {dsn}  (psql: {tools() / 'psql'} '{dsn}')")
    _say(f"for the other commands in another shell:  export AUTHBACKEND_DATABASE__DSN='{dsn}'")
    if sample and is_loopback(settings.admin.listen) and where["broker"].startswith("http:"):
        click.echo(_TRY.format(**where), err=True)


_TRY = """
Try, as RabbitMQ would ask about the device APM0001 of the sample fleet:
  allowed:  curl -d 'username=APM0001&vhost=/&resource=topic&name=amq.topic&permission=write&routing_key=fleet.APM0001.telemetry.speed&variable_map.client_id=APM0001' {broker}/auth/topic
  denied:   curl -d 'username=APM0001&vhost=/&resource=topic&name=amq.topic&permission=write&routing_key=fleet.APM0002.telemetry.speed&variable_map.client_id=APM0001' {broker}/auth/topic
  explain:  curl '{admin}/api/explain?device=APM0001&action=publish&topic=fleet/APM0002/telemetry/speed'

Stop with Ctrl-C."""


def _say(text: str) -> None:
    click.echo(f"authbackend: {text}", err=True)
    sys.stderr.flush()


@click.command()
@click.option(
    "--repair-triggers",
    is_flag=True,
    help="Also enable the registry's triggers again, after a restore that disabled them.",
)
@json_option
@click.pass_context
def migrate(context: click.Context, repair_triggers: bool, as_json: bool) -> None:
    """Bring the database to this version's schema. Several may run at once."""
    target = target_of(context)
    applied = run(migrations.migrate(target))
    repaired = run(migrations.repair_triggers(target)) if repair_triggers else 0
    names = [f"{migration.version}_{migration.name}" for migration in applied]
    result = {"applied": names, "repaired_triggers": repaired}

    def lines() -> Iterator[str]:
        yield from (f"applied {name}" for name in names)
        if not names:
            yield "nothing to apply"
        if repair_triggers:
            yield f"enabled {repaired} triggers"

    show(result, as_json, lines)


@click.command()
def roles() -> None:
    """
    Print the SQL that creates the database roles of least privilege; its first lines say what each is for.

    Run it as the owner of the tables, after the first migration and after an upgrade:

    \b
      authbackend roles | psql --set ON_ERROR_STOP=1 "$AUTHBACKEND_DATABASE__DSN"
    """  # noqa: D301 - click leaves the lines after this mark as they are
    click.echo((SQL / "roles.sql").read_text(encoding="utf-8"), nl=False)
