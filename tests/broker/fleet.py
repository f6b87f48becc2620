"""Provides the tests with unused devices, and with changes of the registry that the service uses once they return."""

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
    Registered, active devices of type APM, each given to one test only, so that no test sees the sessions, wills or
    counters of another.
    """

    def __init__(self, database: Database, service: Service) -> None:
        self.database = database
        self.service = service
        self._numbers = itertools.count(FIRST)

    def register(self) -> None:
        """Register the devices; called once."""
        self.database.sql(
            f"insert into device (device_id, type) select 'APM' || n, 'APM' from generate_series({FIRST}, {LAST}) n",
            EDITOR,
        )

    def device(self) -> str:
        """Return the id, which is also the common name, of an unused device."""
        number = next(self._numbers)
        if number > LAST:
            raise HarnessError("more devices are needed: raise LAST")
        return f"APM{number}"

    async def change(self, statement: str) -> None:
        """Change the registry with psql, and wait until every replica uses the change."""
        await self.served(self.database.sql(f"{statement}; select registry_version()", EDITOR).splitlines()[-1])

    async def command(self, *arguments: str, stdin: str | None = None) -> None:
        """Change the registry with ``authbackend ARGUMENTS --json``, and wait like :meth:`change`."""
        version = json.loads(self.service.command(*arguments, "--json", stdin=stdin))["version"]
        if version is not None:
            await self.served(version)

    async def served(self, version: str) -> None:
        """
        Wait until every replica uses a registry version, like ``authbackend wait``.

        The transaction id alone is not enough: after a crash, PostgreSQL reuses ids that a replica has seen.
        """
        await replicas.wait(Target(self.database.dsn_of(EDITOR)), version, CONFIRMED_TIMEOUT_S)
