"""The command line with a database of its own, and an authority that signs."""

import shutil

import pytest
from click.testing import CliRunner

from authbackend.cli import main
from authbackend.pki.ca import create_authority
from tests.support.postgres import connected, run

PASSPHRASE, ROOT_PASSPHRASE = "correct horse battery", "staple in a vault"


@pytest.fixture
def cli(dsn, tmp_path, monkeypatch):
    """Run a command and return click's result."""
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHBACKEND_CONFIG", "AUTHBACKEND_ACTOR"):
        monkeypatch.delenv(name, raising=False)
    environment = {
        "AUTHBACKEND_DATABASE__DSN": dsn,
        "AUTHBACKEND_ACTOR": "alice",
        "AUTHBACKEND_CA_PASSPHRASE": PASSPHRASE,
        "AUTHBACKEND_CA_ROOT_PASSPHRASE": ROOT_PASSPHRASE,
    }

    def call(*arguments, exit_code=0, stdin=None, **changed):
        result = CliRunner().invoke(main, [*map(str, arguments)], env={**environment, **changed}, input=stdin)
        assert result.exit_code == exit_code, (result.output, result.stderr, result.exception)
        return result

    return call


@pytest.fixture(scope="session")
def made_authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority") / "fleet"
    create_authority(
        folder, "fleet", PASSPHRASE.encode(), ROOT_PASSPHRASE.encode(), root_folder=folder.parent / "offline"
    )
    return folder


@pytest.fixture
def ca(made_authority, tmp_path):
    """The folder of an authority that signs, with the root's key beside it."""
    shutil.copytree(made_authority.parent, tmp_path / "authority")
    return tmp_path / "authority" / "fleet"


@pytest.fixture
def fleet(execute):
    execute(
        "insert into device_type (name, client_ids, vhosts) values ('APM', array['{device_id}'], array['/']);"
        "insert into device (device_id, common_name, type) values ('D1', 'D1', 'APM'), ('D2', 'two', 'APM')"
    )


@pytest.fixture
def execute(dsn):
    def call(statement, *arguments):
        async def work():
            async with connected(dsn) as connection:
                return (
                    [dict(r) for r in await connection.fetch(statement, *arguments)]
                    if arguments or statement.startswith("select")
                    else await connection.execute(statement)
                )

        return run(work())

    return call
