"""Runs the service in this process, on free ports of loopback, with a separate database for each test."""

import asyncio
import contextlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from authbackend.policy_file.read import read
from authbackend.postgres import policy_apply
from authbackend.postgres.connection import Target
from authbackend.service import components
from authbackend.settings import load

PATIENT = {"BROKER__REQUEST_TIMEOUT_S": "10"}
"""As long as can be set: on a busy machine a login that waits its turn for a quarter of it is answered 503."""
POLICY = """
schema: authbackend/1
device_types:
  APM:
    client_ids: ["{device_id}", "{device_id}_*"]
    vhosts: ["/"]
    rules:
      - {effect: allow, action: publish, topic: "fleet/{device_id}/telemetry/#"}
      - {effect: allow, action: subscribe, topic: "fleet/{device_id}/commands/#"}
devices:
  - {device_id: APM0001, type: APM}
  - {device_id: APM0002, type: APM}
  - {device_id: GONE, type: APM, status: revoked}
accounts:
  - {name: ops, login: password, tags: [monitoring, management], vhosts: ["/"], password_hash: HASH}
"""
# Of "correct horse", with low cost: the tests are not about the speed of argon2id.
HASH = "$argon2id$v=19$m=64,t=1,p=1$ILOCj2QWgXeueD+AJ6035g$3iEr/r/DmyFDXcKU0O2MHtxAp8iWZzsl2J54aNKSTHE"


async def apply(dsn, text):
    """Load a policy file's text into a registry."""
    document, problems = read(text, "test.yaml")
    assert not problems, problems
    return await policy_apply.apply(Target(dsn), document, actor="test")


async def until(condition, what, deadline_s=30.0):
    """Wait until a condition holds; the deadline is only a safeguard."""
    end = time.monotonic() + deadline_s
    while True:
        result = await condition()
        if result:
            return result
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        await asyncio.sleep(0.01)


@dataclass
class Running:
    """A running service, and a client of its listeners."""

    broker: str
    admin: str
    health: str
    http: aiohttp.ClientSession

    async def ask(self, question, form, **kwargs):
        """POST a form (a dict, or the raw body) to /auth/QUESTION; return (status, text)."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with self.http.post(f"{self.broker}/auth/{question}", data=form, headers=headers, **kwargs) as response:
            return response.status, await response.text()

    async def login(self, username, **form):
        """Return the answer to a login."""
        return (await self.ask("user", {"username": username, **form}))[1]

    async def publish(self, username, key, client_id=None):
        """Return the answer to a publish."""
        form = {
            "username": username,
            "vhost": "/",
            "resource": "topic",
            "name": "amq.topic",
            "permission": "write",
            "routing_key": key,
            "variable_map.client_id": client_id or username,
        }
        return (await self.ask("topic", form))[1]

    async def get(self, url):
        """GET a path, from the admin listener if it begins with /api; return (status, text)."""
        where = self.admin if url.startswith("/api/") else self.health
        async with self.http.get(where + url) as response:
            return response.status, await response.text()

    async def ready(self):
        """Return whether the service reports that it is ready."""
        return (await self.get("/health/ready"))[0] == 200

    async def metric(self, name, **labels):
        """Return the value of one series; 0 if it does not exist."""
        _, text = await self.get("/metrics")
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            series, _, rest = head.partition("{")
            pairs = dict(part.split("=", 1) for part in rest.rstrip("}").split(",") if part)
            if series == name and all(json.loads(pairs.get(key, '""')) == expected for key, expected in labels.items()):
                return float(value)
        return 0.0


@contextlib.asynccontextmanager
async def memory():
    """Create an empty folder on a file system in memory."""
    with tempfile.TemporaryDirectory(prefix="authbackend-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@contextlib.asynccontextmanager
async def running(dsn, *, wait=True, **environment):
    """Run the service with additional settings, for example ``BROKER__DENY_REASONS="true"``."""
    variables = {f"AUTHBACKEND_{name}": value for name, value in {**PATIENT, **environment}.items()}
    settings = load(
        {
            "AUTHBACKEND_DATABASE__DSN": dsn,
            "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_HEALTH__LISTEN": "127.0.0.1:0",
            **variables,
        }
    )
    async with memory() as folder, components.service(settings, folder) as where, aiohttp.ClientSession() as http:
        service = Running(where["broker"], where["admin"], where["health"], http)
        if wait:
            await until(service.ready, "the service is ready")
        yield service


@pytest.fixture
async def service(dsn):
    """A running service with the sample registry."""
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn) as started:
        yield started


@pytest.fixture
async def sql(dsn):
    """Run a statement, as a person would with psql."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection.execute
    finally:
        await connection.close()
