"""Faults of the service itself: none of them causes a wrong verdict."""

import asyncio
import os
import re
import signal
import ssl
import sys

import aiohttp
import pytest

from authbackend.registry.follower import RegistryFollower
from authbackend.service import components
from authbackend.settings import load
from tests.service.conftest import HASH, POLICY, apply, memory, running, until
from tests.service.test_tls import bench  # noqa: F401 - a fixture


def where_it_answers(descriptor):
    """Read the output of a service until it prints its URL for RabbitMQ; return the URL."""
    printed = b""
    while not (match := re.search(rb"answering RabbitMQ on (\S+),", printed)):
        part = os.read(descriptor, 65536)
        assert part, f"it ended: {printed.decode()}"
        printed += part
    return match[1].decode()


async def test_a_log_that_cannot_be_written_loses_lines_and_no_decision(dsn, sql):
    """Standard error is a pipe without a reader, as after the crash of a log collector."""
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    read_end, write_end = os.pipe()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "authbackend", "serve"),
        env={
            **environment,
            "AUTHBACKEND_DATABASE__DSN": dsn,
            "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_HEALTH__LISTEN": "127.0.0.1:0",
        },
        stderr=write_end,
    )
    os.close(write_end)
    try:
        url = await asyncio.wait_for(asyncio.to_thread(where_it_answers, read_end), 60)
        async with aiohttp.ClientSession() as http:

            async def login():
                try:
                    async with http.post(f"{url}/auth/user", data={"username": "APM0001"}) as response:
                        return await response.text()
                except aiohttp.ClientError:
                    return None

            async def answers(text):
                return await login() == text

            await until(lambda: answers("allow"), "the service decides", 60)
            os.close(read_end)
            await sql("update device set status = 'suspended' where device_id = 'APM0001'")
            await until(lambda: answers("deny"), "the suspension is decided by")
            await sql("update device set status = 'active' where device_id = 'APM0001'")
            await until(lambda: answers("allow"), "the copy still follows")
            await sql("update device set status = 'revoked' where device_id = 'APM0001'")
            await until(lambda: answers("deny"), "the revocation is decided by")
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def test_it_is_told_when_the_task_that_keeps_the_copy_ends(dsn, monkeypatch):
    async def broken(_):
        raise RuntimeError("a fault that nobody thought of")

    monkeypatch.setattr(RegistryFollower, "run", broken)
    settings = load(
        {
            "AUTHBACKEND_DATABASE__DSN": dsn,
            "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_HEALTH__LISTEN": "127.0.0.1:0",
        }
    )
    ended = asyncio.get_running_loop().create_future()
    async with memory() as folder, components.service(settings, folder, ended.set_result):
        assert await asyncio.wait_for(ended, 30) == "registry"


async def test_tls_1_2_whose_sessions_outlive_an_authority_is_refused(dsn, bench):  # noqa: F811
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    context = bench.context(bench.client_ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running(dsn, **bench.environment) as service:
        with pytest.raises(aiohttp.ClientError):
            await service.ask("user", {"username": "APM0001"}, ssl=context)


async def test_a_broken_body_is_malformed_and_not_our_failure(service):
    from tests.service.test_answers import raw

    head = b"POST /auth/user HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope"
    answer = await asyncio.to_thread(raw, service, head)
    assert answer.endswith(b"deny")
    assert await service.metric("authbackend_request_failures_total") == 0
