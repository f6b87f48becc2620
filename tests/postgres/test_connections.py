"""Each cause of a failed connection has its own message, and parameters of the URI take effect."""

import asyncio
import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest

from authbackend.errors import ConfigurationError, Unavailable
from authbackend.pki.bench_ca import Authority
from authbackend.postgres import connection as connections
from authbackend.postgres.change_feed import ChangeFeed
from authbackend.postgres.connection import Target, connect, connected
from authbackend.service import replica
from authbackend.settings import load
from tests.support.tls_front import TLSFront

PAST = {"not_before": datetime.now(UTC) - timedelta(days=3), "not_after": datetime.now(UTC) - timedelta(days=1)}
FUTURE = {"not_before": datetime.now(UTC) + timedelta(days=1), "not_after": datetime.now(UTC) + timedelta(days=3)}


class Files:
    """An authority, and files with certificates that it issued."""

    def __init__(self, folder):
        self.folder = folder
        self.authority = Authority.create("database authority")
        (folder / "ca.pem").write_bytes(self.authority.certificate_pem)

    def issued(self, issued, name):
        """Write a certificate and its key to files, and return their paths."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(issued.certificate_pem)
        key.write_bytes(issued.key_pem)
        return certificate, key

    def context(self, *, names=("localhost",), authority=None, client_authority=None, **validity):
        """Return the TLS context of a server."""
        issued = (authority or self.authority).issue_server(list(names), **validity)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self.issued(issued, "server"))
        if client_authority is not None:
            (self.folder / "clients.pem").write_bytes(client_authority.certificate_pem)
            context.load_verify_locations(self.folder / "clients.pem")
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self, authority, **validity):
        """Return the URI parameters for a client certificate."""
        certificate, key = self.issued(authority.issue_client("role", **validity), "client")
        return f"&sslcert={certificate}&sslkey={key}"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return Files(tmp_path)


@pytest.fixture
def front(postgres, files):
    with TLSFront(postgres.folder / ".s.PGSQL.5432", files.context()).running() as running:
        yield running


def uri(front, database, query):
    return f"postgresql://postgres@localhost:{front.port}/{database}?{query}"


def verified(front, database, files, more=""):
    return uri(front, database, f"sslmode=verify-full&sslrootcert={files.folder / 'ca.pem'}{more}")


async def told(dsn):
    """Return the message of a failed connection."""
    with pytest.raises(Unavailable) as caught:
        await connect(Target(dsn))
    assert "hunter2" not in caught.value.detail
    return caught.value.detail


async def test_a_certificate_that_expires_while_running_is_told_as_that(front, database, files):
    feed = ChangeFeed(Target(verified(front, database, files)))
    await feed.prune()
    await feed.close()
    front.context = files.context(**PAST)
    with pytest.raises(Unavailable, match="the server's certificate has expired"):
        await feed.prune()


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (FUTURE, "certificate is not valid yet: is this host's clock right"),
        ({"names": ["other.example"]}, "certificate is for another name: connect by a name in the certificate"),
        ({"authority": Authority.create("somebody")}, "certificate is not from an authority in sslrootcert"),
    ],
)
async def test_a_server_that_cannot_be_trusted(front, database, files, server, words):
    front.context = files.context(**server)
    assert words in await told(verified(front, database, files))


async def test_a_client_certificate_that_the_server_refuses(front, database, files):
    clients = Authority.create("clients")
    front.context = files.context(client_authority=clients)
    async with connected(Target(verified(front, database, files, files.client(clients)))) as connection:
        assert await connection.fetchval("select 1") == 1
    assert "the server requires a client certificate: set sslcert and sslkey" in await told(
        verified(front, database, files)
    )
    expired = verified(front, database, files, files.client(clients, **PAST))
    assert "refuses this client's certificate (sslcert), which has expired" in await told(expired)
    unknown = verified(front, database, files, files.client(Authority.create("somebody")))
    assert "whose authority it does not know" in await told(unknown)


async def test_a_server_without_tls(front, database, files):
    front.context = None
    assert "the server has no TLS, which sslmode of the connection URI requires" in await told(
        verified(front, database, files)
    )


async def test_a_file_that_is_missing_or_another_is_named(front, database, files):
    folder = files.folder
    missing = uri(front, database, f"sslmode=verify-full&sslrootcert={folder}/none.pem")
    assert f"sslrootcert {folder}/none.pem cannot be read: No such file" in await told(missing)
    default = uri(front, database, "sslmode=verify-full")
    assert "sslrootcert" in await told(default)
    assert "/.postgresql/root.crt cannot be read: No such file" in await told(default)
    (folder / "text.pem").write_text("hunter2")
    text = uri(front, database, f"sslmode=verify-full&sslrootcert={folder}/text.pem")
    assert f"sslrootcert {folder}/text.pem: it does not contain the expected PEM data" in await told(text)
    certificate, _ = files.issued(files.authority.issue_client("one"), "one")
    _, key = files.issued(files.authority.issue_client("two"), "two")
    mixed = verified(front, database, files, f"&sslcert={certificate}&sslkey={key}")
    assert "the key does not belong to the certificate" in await told(mixed)
    no_key = verified(front, database, files, f"&sslcert={certificate}&sslkey={folder}/none.key")
    assert f"sslkey {folder}/none.key cannot be read: No such file" in await told(no_key)


async def test_the_authorities_of_the_system(front, database, files, monkeypatch):
    dsn = uri(front, database, "sslrootcert=system")
    assert "certificate is not from an authority" in await told(dsn)
    monkeypatch.setenv("SSL_CERT_FILE", str(files.folder / "ca.pem"))
    async with connected(Target(dsn)) as connection:
        assert await connection.fetchval("select 1") == 1


async def test_hosts_that_cannot_be_reached(database):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        assert "nothing listens there" in await told(f"postgresql://postgres@{nobody}/{database}")
    assert "host name is not known" in await told(f"postgresql://postgres@no.invalid/{database}")
    assert "Unix socket does not exist" in await told(f"postgresql://postgres@/{database}?host=/nowhere")


async def test_the_path_of_a_unix_socket_that_is_too_long(database):
    with pytest.raises(Unavailable, match="the path of its Unix socket is longer than Linux allows"):
        await connect(Target(f"postgresql://u@/{database}?host=/{'long' * 40}"))


async def test_several_hosts_are_named_each_with_its_fault(front, database):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        fault = await told(f"postgresql://postgres:hunter2@{nobody},no.invalid:1/{database}")
        assert f"no host of the connection URI can be used: {nobody}: PostgreSQL cannot be reached: nothing" in fault
        assert "no.invalid:1: PostgreSQL cannot be reached: its host name" in fault
        async with connected(Target(f"postgresql://postgres@{nobody},localhost:{front.port}/{database}")) as connection:
            assert await connection.fetchval("select 1") == 1


async def test_a_host_that_is_silent_does_not_keep_the_next_one_from_being_tried(front, database, monkeypatch):
    monkeypatch.setattr(connections, "NEXT_HOST_S", 0.01)
    ended = asyncio.Event()

    async def silent(reader, writer):
        await reader.read()
        writer.close()
        ended.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        dsn = f"postgresql://postgres@127.0.0.1:{port},localhost:{front.port}/{database}?sslmode=disable"
        async with connected(Target(dsn, connect_timeout_s=3600)) as connection:
            assert await connection.fetchval("select 1") == 1
        await asyncio.wait_for(ended.wait(), 30)  # the silent connection is closed
    finally:
        server.close()


async def test_what_the_uri_asks_for_is_done(front, database):
    dsn = uri(
        front, database, "application_name=fleet&options=-c%20work_mem%3D5MB&keepalives_idle=77&channel_binding=prefer"
    )
    async with connected(Target(dsn)) as connection:
        assert await connection.fetchval("show application_name") == "fleet (authbackend)"
        assert await connection.fetchval("show work_mem") == "5MB"
        found = connection._transport.get_extra_info("socket")
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77


async def test_an_address_of_a_unix_socket_has_no_keepalives(postgres, database):
    async with connected(Target(postgres.dsn(database) + "&keepalives_idle=77")) as connection:
        assert await connection.fetchval("select 1") == 1


async def test_a_database_that_is_not_there_and_a_role_that_is_refused(postgres):
    assert 'database "nowhere" does not exist' in await told(postgres.dsn("nowhere"))
    assert 'role "nobody" does not exist' in await told(postgres.dsn("postgres", "nobody"))


async def test_a_new_password_in_the_file_is_used_for_the_next_connection(postgres, database, tmp_path):
    file, access = tmp_path / "password", postgres.data / "pg_hba.conf"
    before = access.read_text()
    dsn = postgres.dsn(database, "rotating")
    settings = load({"AUTHBACKEND_DATABASE__DSN": dsn, "AUTHBACKEND_DATABASE__PASSWORD_FILE": str(file)})
    async with connected(Target(postgres.dsn(database))) as owner:
        try:
            access.write_text("local all rotating scram-sha-256\n" + before)
            await owner.execute("create role rotating login password 'first'")
            await owner.execute("select pg_reload_conf()")
            file.write_text("first\n")
            target = replica.target(settings)
            async with connected(target) as connection:
                await owner.execute("alter role rotating password 'second'")
                with pytest.raises(Unavailable, match="refuses the role"):
                    await connect(target)
                file.write_text("second\n")
                async with connected(target) as another:
                    assert await another.fetchval("select current_user") == "rotating"
                assert await connection.fetchval("select 1") == 1
            file.unlink()
            with pytest.raises(ConfigurationError, match="cannot read database.password_file"):
                await connect(target)
        finally:
            access.write_text(before)
            await owner.execute("select pg_reload_conf()")
            await owner.execute("drop role if exists rotating")
