"""The registry as the tests see it: devices nobody has used yet, and changes that the service has taken over."""

from __future__ import annotations

import itertools
import json
import time

from .processes import HarnessError, until
from .service import Database, Service

FIRST, LAST = 1001, 1400
EDITOR = "authbackend_admin"
"""The role of the security team (sql/roles.sql)."""


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

    async def change(self, statement: str) -> float:
        """Change the registry with psql and wait until the service decides by it: how long that took, in s."""
        version = int(self.database.sql(f"{statement}; select pg_current_xact_id()", EDITOR).splitlines()[-1])
        return await self.served(version)

    async def command(self, *arguments: str, stdin: str | None = None) -> float:
        """Change the registry with ``authbackend ARGUMENTS --json`` and wait as :meth:`change` does."""
        version = json.loads(self.service.command(*arguments, "--json", stdin=stdin))["version"]
        return 0.0 if version is None else await self.served(int(version.partition("@")[0]))

    async def served(self, version: int) -> float:
        """Wait until the service decides by a registry version."""
        begin = time.monotonic()
        await until(lambda: self.service.version() > version)
        return time.monotonic() - begin
