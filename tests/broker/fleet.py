"""The registry as the tests see it: devices nobody has used yet, and changes that the service has taken over."""

from __future__ import annotations

import itertools
import json

from authbackend.postgres import replicas
from authbackend.postgres.connection import Target

from .processes import HarnessError
from .service import Database, Service

FIRST, LAST = 1001, 1600
EDITOR = "authbackend_admin"
"""The role of the security team (sql/roles.sql)."""
CONFIRMED_TIMEOUT_S = 30.0


class Fleet:
    """
    Devices of type APM that are registered and active, each handed out once, so that no test meets the
    sessions, wills or counters of another.
    """

    def __init__(self, database: Database, service: Service) -> None:
        self.database = database
        self.service = service
        self._numbers = itertools.count(FIRST)

    def register(self) -> None:
        """Put the devices into the registry. Once."""
        self.database.sql(
            f"insert into device (device_id, type) select 'APM' || n, 'APM' from generate_series({FIRST}, {LAST}) n",
            EDITOR,
        )

    def device(self) -> str:
        """The id and common name of a device that no test has used."""
        number = next(self._numbers)
        if number > LAST:
            raise HarnessError("more devices are needed: raise LAST")
        return f"APM{number}"

    async def change(self, statement: str) -> None:
        """Change the registry with psql and wait until every replica decides by it."""
        await self.served(self.database.sql(f"{statement}; select registry_version()", EDITOR).splitlines()[-1])

    async def command(self, *arguments: str, stdin: str | None = None) -> None:
        """Change the registry with ``authbackend ARGUMENTS --json`` and wait as :meth:`change` does."""
        version = json.loads(self.service.command(*arguments, "--json", stdin=stdin))["version"]
        if version is not None:
            await self.served(version)

    async def served(self, version: str) -> None:
        """
        Wait until every replica decides by a registry version, as ``authbackend wait`` does.

        The number alone would not do: a PostgreSQL that crashed gives out again what a replica has seen before.
        """
        await replicas.wait(Target(self.database.dsn_of(EDITOR)), version, CONFIRMED_TIMEOUT_S)
