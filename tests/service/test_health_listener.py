"""The listener for load balancers, brokers' hosts and Prometheus: TLS, the image's health check, and slow readers."""

import asyncio
import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from authbackend.pki.ca import create_authority
from tests.service.conftest import running, until
from tests.service.test_tls import Bench

HEALTHCHECK = Path(__file__).parent.parent.parent / "deploy" / "healthcheck"


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def tls(bench, *, client_ca=False):
    """Return the settings of a listener with TLS."""
    settings = {
        "HEALTH__TLS__CERTIFICATE_FILE": str(bench.folder / "server.pem"),
        "HEALTH__TLS__KEY_FILE": str(bench.folder / "server.key"),
    }
    return settings | ({"HEALTH__TLS__CLIENT_CA_FILE": str(bench.folder / "client-ca.pem")} if client_ca else {})


async def live(service, context):
    async with service.http.get(f"{service.health}/health/live", ssl=context) as answer:
        return answer.status


async def test_it_speaks_tls_and_reads_its_certificates_again(dsn, bench):
    async with running(dsn, wait=False, **tls(bench)) as service:
        assert service.health.startswith("https://")
        assert await live(service, bench.context()) == 200
        renewed = bench.client_ca.issue_server(["localhost", "127.0.0.1"])  # by the other authority
        bench.write(renewed, "server")
        (bench.folder / "server-ca.pem").write_bytes((bench.folder / "client-ca.pem").read_bytes())
        context = bench.context()

        async def reloaded():
            with contextlib.suppress(aiohttp.ClientError):
                return await live(service, context) == 200

        await until(reloaded, "the new certificate is shown")


async def test_with_an_authority_of_clients_strangers_are_refused(dsn, bench):
    async with running(dsn, wait=False, **tls(bench, client_ca=True)) as service:
        assert await live(service, bench.context(bench.client_ca)) == 200
        for authority in (None, bench.server_ca):
            with pytest.raises(aiohttp.ClientError):
                await live(service, bench.context(authority))


async def check(listen):
    """Run the image's health check; return its exit status and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", HEALTHCHECK),
        env={"AUTHBACKEND_HEALTH__LISTEN": listen},
        stderr=subprocess.PIPE,
    )
    _, output = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.parametrize("kind", ["http", "tls", "mutual tls"])
async def test_the_images_health_check_finds_a_service_that_answers(dsn, bench, kind):
    settings = {} if kind == "http" else tls(bench, client_ca=kind == "mutual tls")
    async with running(dsn, wait=False, **settings) as service:
        port = urlsplit(service.health).port
        assert await check(f"127.0.0.1:{port}") == (0, "")
        assert await check(f"0.0.0.0:{port}") == (0, "")


async def test_the_images_health_check_finds_that_nothing_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, but never answers, like a process that hangs
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        status, output = await check(address)
        assert (status, "timed out" in output) == (1, True)
    status, output = await check(address)
    assert (status, "Connection refused" in output) == (1, True)


@pytest.mark.parametrize("authority", ["server-ca.pem", "client-ca.pem"])
async def test_crl_sync_fetches_from_a_replica_of_the_authority_it_was_given(
    dsn,
    connection,
    bench,
    tmp_path,
    authority,
):
    create_authority(
        tmp_path / "fleet", "fleet", b"correct horse", b"staple in a vault", root_folder=tmp_path / "offline"
    )
    environment = {"AUTHBACKEND_DATABASE__DSN": dsn, "AUTHBACKEND_CA_PASSPHRASE": "correct horse"}

    async def command(*arguments):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "authbackend", *map(str, arguments)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        printed, _ = await process.communicate()
        return process.returncode, printed.decode()

    assert (await command("crl", "sign", tmp_path / "fleet"))[0] == 0
    async with running(dsn, wait=False, **tls(bench)) as service:

        async def served():
            async with service.http.get(f"{service.health}/crl/fleet.crl", ssl=bench.context()) as answer:
                return answer.status == 200

        await until(served, "the list is served")
        files = ("--ca", tmp_path / "fleet" / "ca.pem", "--dir", tmp_path / "crl")
        url = ("--url", f"{service.health}/crl/fleet.crl", "--tls-ca", bench.folder / authority)
        status, printed = await command("crl", "sync", "--once", *url, *files)
    if authority == "server-ca.pem":
        assert (status, "replaced: number" in printed) == (0, True), printed
        assert len(list((tmp_path / "crl").iterdir())) == 1
    else:
        assert status == 5
        assert f"is not from an authority in {bench.folder / authority}: give the one that signed it" in printed
        assert not list((tmp_path / "crl").iterdir())


async def test_clients_that_take_nothing_of_their_answers_are_cut_off(dsn, connection):
    """Lists are large, and a client that does not read them would occupy a connection forever."""
    await connection.execute(
        "insert into authority values ('big', 'CN=big', '-----BEGIN CERTIFICATE-----', now());"
        "insert into crl values ('big', 1, now(), now() + interval '1 day', convert_to(repeat('x', 16000000), 'UTF8'))"
    )
    async with running(dsn, HEALTH__REQUEST_TIMEOUT_S="0.5", HEALTH__MAX_CONNECTIONS="8") as service:
        where = urlsplit(service.health)

        async def served():
            async with service.http.get(f"{service.health}/crl/big.crl") as answer:
                return answer.status == 200 and len(await answer.read()) == 16000000

        await until(served, "the list is served")
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                opened = stack.enter_context(contextlib.closing(socket.socket()))
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                opened.connect((where.hostname, where.port))
                opened.sendall(b"GET /crl/big.crl HTTP/1.1\r\nHost: x\r\n\r\n")

            async def cut():
                with contextlib.suppress(aiohttp.ClientError):
                    return await service.metric("authbackend_health_connections_closed_total", cause="slow") >= 7

            await until(cut, "they are cut off, and others are answered")
