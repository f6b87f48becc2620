"""``serve`` as a process: a newcomer's first ten minutes, and a port that is taken."""

import asyncio
import os
import shlex
import signal
import sys

import aiohttp
import pytest

from authbackend.postgres.migrate import migrations
from tests.service.conftest import until


@pytest.fixture
async def start(tmp_path):
    """Start ``python -m authbackend`` with these arguments; kill it at the end."""
    started = []

    async def call(*arguments, **environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "authbackend", *map(str, arguments)),
            env={**inherited, **environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def read_until(process, text):
    """Return what a process prints, up to the line that contains the text."""
    lines = []
    async with asyncio.timeout(60):
        while True:
            line = (await process.stdout.readline()).decode()
            lines.append(line)
            assert line, f"ended without {text!r}:\n{''.join(lines)}"
            if text in line:
                return "".join(lines)


async def test_first_and_second_start_with_a_database_of_its_own(start, tmp_path):
    """Like ``make run``: it prints addresses, and three curl lines that do what they say."""
    listen = {f"AUTHBACKEND_{name}__LISTEN": "127.0.0.1:0" for name in ("BROKER", "ADMIN", "HEALTH")}
    process = await start("serve", "--embedded", tmp_path / "data", "--sample", **listen)
    printed = await read_until(process, "Stop with Ctrl-C")
    assert f"applied {len(migrations())} migrations" in printed
    assert "loaded the sample fleet" in printed
    assert "export AUTHBACKEND_DATABASE__DSN=" in printed
    curls = [line.partition("curl ")[2].strip() for line in printed.splitlines() if "curl " in line]
    assert len(curls) == 3

    async def run_curl(line):
        """Send what curl would: POST with -d, else GET."""
        words = shlex.split(line)
        form = words[words.index("-d") + 1] if "-d" in words else None
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        async with aiohttp.ClientSession() as http:
            async with http.request("POST" if form else "GET", words[-1], data=form, headers=headers) as response:
                return await response.text()

    async def loaded():
        return await run_curl(curls[0]) == "allow"

    await until(loaded, "the first curl line says allow")
    assert await run_curl(curls[1]) == "deny"
    assert '"reason": "no_rule_allows"' in await run_curl(curls[2])
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0

    process = await start("serve", "--embedded", tmp_path / "data", "--sample", **listen)
    printed = await read_until(process, "Stop with Ctrl-C")
    assert "applied" not in printed
    assert "loaded the sample" not in printed
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_taken_port_is_told(start, dsn):
    process = await start(
        "serve",
        AUTHBACKEND_DATABASE__DSN=dsn,
        AUTHBACKEND_BROKER__LISTEN="127.0.0.1:0",
        AUTHBACKEND_ADMIN__LISTEN="127.0.0.1:0",
        AUTHBACKEND_HEALTH__LISTEN="127.0.0.1:0",
    )
    printed = await read_until(process, "answering RabbitMQ on")
    port = printed.rpartition("answering RabbitMQ on http://127.0.0.1:")[2].split(",")[0]
    other = await start(
        "serve",
        AUTHBACKEND_DATABASE__DSN=dsn,
        AUTHBACKEND_BROKER__LISTEN=f"127.0.0.1:{port}",
        AUTHBACKEND_ADMIN__LISTEN="127.0.0.1:0",
        AUTHBACKEND_HEALTH__LISTEN="127.0.0.1:0",
    )
    output, _ = await asyncio.wait_for(other.communicate(), 30)
    assert other.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}".encode() in output
    assert b"Traceback" not in output
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/health/live") as response:
        assert response.status == 200
