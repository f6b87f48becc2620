"""The listener's TLS: mutual, and its files can be exchanged while it runs."""

import asyncio
import ssl

import aiohttp
import pytest

from authbackend.broker.listener import TLSFiles
from authbackend.errors import ConfigurationError
from authbackend.pki.authority import Authority
from tests.service.conftest import HASH, POLICY, apply, running, until


class Bench:
    """Files of a listener and clients of it."""

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
        for stranger in (None, bench.server_ca, Authority.create("somebody")):
            with pytest.raises(aiohttp.ClientError):
                await service.ask("user", form, ssl=bench.context(stranger))


async def test_files_are_read_again_while_it_runs(dsn, bench):
    """A new authority lets its clients in and the old one's out; connections and process stay."""
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
    files = TLSFiles(*(bench.folder / name for name in ("server.pem", "server.key", "client-ca.pem")))
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


async def _greet(_, writer):
    writer.write(b"hello")
    writer.close()
