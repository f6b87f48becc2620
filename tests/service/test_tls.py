"""TLS of the listener: mutual TLS, and files that are replaced while it runs."""

import asyncio
import contextlib
import os
import pty
import signal
import socket
import ssl
import sys
from urllib.parse import urlsplit

import aiohttp
import pytest
import structlog.testing
from cryptography.hazmat.primitives import serialization

from authbackend.broker import tls
from authbackend.broker.tls import TLSFiles
from authbackend.errors import ConfigurationError
from authbackend.pki.bench_ca import Authority
from tests.service.conftest import HASH, POLICY, apply, running, until


class Bench:
    """The files of a listener, and its clients."""

    def __init__(self, folder):
        self.folder = folder
        self.server_ca = Authority.create("server authority")
        self.client_ca = Authority.create("client authority")
        self.write(self.server_ca.issue_server(["localhost", "127.0.0.1"]), "server")
        (folder / "client-ca.pem").write_bytes(_bytes(self.client_ca.certificate_pem))
        (folder / "server-ca.pem").write_bytes(_bytes(self.server_ca.certificate_pem))

    def write(self, issued, name):
        (self.folder / f"{name}.key").write_bytes(_bytes(issued.key_pem))
        (self.folder / f"{name}.pem").write_bytes(_bytes(issued.certificate_pem))

    @property
    def environment(self):
        return {
            "BROKER__TLS__CERTIFICATE_FILE": str(self.folder / "server.pem"),
            "BROKER__TLS__KEY_FILE": str(self.folder / "server.key"),
            "BROKER__TLS__CLIENT_CA_FILE": str(self.folder / "client-ca.pem"),
        }

    def context(self, authority=None):
        context = ssl.create_default_context(cafile=self.folder / "server-ca.pem")
        if authority is not None:
            self.write(authority.issue_client("broker"), "client")
            context.load_cert_chain(self.folder / "client.pem", self.folder / "client.key")
        return context


def _bytes(pem):
    return pem if isinstance(pem, bytes) else pem.encode()


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


async def test_mutual_tls(dsn, bench):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn, **bench.environment) as service:
        form = {"username": "APM0001"}
        assert await service.ask("user", form, ssl=bench.context(bench.client_ca)) == (200, "allow")
        for authority in (None, bench.server_ca, Authority.create("somebody")):
            with pytest.raises(aiohttp.ClientError):
                await service.ask("user", form, ssl=bench.context(authority))


async def test_connections_that_never_finish_a_handshake_count_as_connections(dsn, bench):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn, BROKER__MAX_CONNECTIONS="16", **bench.environment) as service:
        where = urlsplit(service.broker)
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(contextlib.closing(socket.create_connection((where.hostname, where.port))))

            async def refused():
                return await service.metric("authbackend_connections_closed_total", cause="too_many") == 4

            await until(refused, "those beyond the limit are closed and counted")

        context = bench.context(bench.client_ca)

        async def let_in():
            with contextlib.suppress(aiohttp.ClientError):
                return await service.ask("user", {"username": "APM0001"}, ssl=context) == (200, "allow")

        await until(let_in, "there is room again when they have gone")


async def test_files_are_read_again_while_it_runs(dsn, bench):
    """With a new authority, its clients are accepted and the old one's refused; connections and process stay."""
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn, **bench.environment) as service:
        old = bench.client_ca
        new = Authority.create("new client authority")
        bench.write(bench.server_ca.issue_server(["localhost", "127.0.0.1"]), "server")
        (bench.folder / "client-ca.pem").write_bytes(_bytes(new.certificate_pem))
        context = bench.context(new)

        async def let_in():
            try:
                return await service.ask("user", {"username": "APM0001"}, ssl=context) == (200, "allow")
            except aiohttp.ClientError:
                return False

        await until(let_in, "the new authority is trusted")
        async with aiohttp.ClientSession() as fresh:
            service.http, before = fresh, service.http
            with pytest.raises(aiohttp.ClientError):
                await service.ask("user", {"username": "APM0001"}, ssl=bench.context(old))
            service.http = before


async def test_files_that_do_not_fit_are_refused_and_the_old_ones_stay(bench):
    files = TLSFiles("broker", *(bench.folder / name for name in ("server.pem", "server.key", "client-ca.pem")))
    (bench.folder / "server.key").write_text("half a ke")
    with pytest.raises(ConfigurationError, match="cannot be used together"):
        files.reload_if_changed()
    server = await asyncio.start_server(_greet, "127.0.0.1", 0, ssl=files.context)
    async with server:
        host, port = server.sockets[0].getsockname()
        context = bench.context(bench.client_ca)
        reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname="localhost")
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()


def encrypted(key):
    """Write the same key, encrypted with a passphrase."""
    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"hunter2")
    )


def test_an_encrypted_key_is_refused_with_words_and_nobody_is_asked(bench):
    """OpenSSL prompts at the terminal of the process, if there is one, and everything waits for the answer."""
    key = bench.folder / "server.key"
    key.write_bytes(encrypted(key.read_bytes()))
    code = (
        "import sys, pathlib; from authbackend.broker.tls import TLSFiles\n"
        "try: TLSFiles('broker', *map(pathlib.Path, sys.argv[1:]), None)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, str(bench.folder / "server.pem"), str(key)])
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while b"pass phrase" not in output and (data := os.read(terminal, 65536)):
            output += data
    if b"pass phrase" in output:
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(terminal)
    assert b"pass phrase" not in output
    assert output.startswith(b"ConfigurationError broker.tls: the key ")
    assert b"is encrypted" in output
    assert b"openssl pkey -in" in output


async def test_an_encrypted_key_that_is_rotated_in_is_refused_and_the_old_one_stays(dsn, bench):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    with structlog.testing.capture_logs() as lines:
        async with running(dsn, **bench.environment) as service:
            key = bench.folder / "server.key"
            key.write_bytes(encrypted(key.read_bytes()))

            async def reported():
                return [line for line in lines if line["event"] == "certificates.not_reloaded"]

            assert "is encrypted" in (await until(reported, "the key is refused"))[0]["fault"]
            form = {"username": "APM0001"}
            assert await service.ask("user", form, ssl=bench.context(bench.client_ca)) == (200, "allow")


async def test_files_are_read_at_once_when_that_is_asked_for(bench, monkeypatch):
    monkeypatch.setattr(tls, "_CHECK_INTERVAL_S", 3600.0)
    files = TLSFiles("broker", *(bench.folder / name for name in ("server.pem", "server.key", "client-ca.pem")))
    reload = asyncio.Event()
    watching = asyncio.create_task(tls.watch(files, reload))
    with structlog.testing.capture_logs() as lines:
        for number in (1, 2):
            reload.set()  # changed or not

            async def reported(number=number):
                return len(lines) == number

            await until(reported, "they are read")
        (bench.folder / "server.key").unlink()
        reload.set()

        async def refused():
            return lines[-1]["event"] == "certificates.not_reloaded"

        await until(refused, "the fault is reported")
    assert {line["event"] for line in lines[:2]} == {"certificates.reloaded"}
    watching.cancel()


async def _greet(_, writer):
    writer.write(b"hello")
    writer.close()
