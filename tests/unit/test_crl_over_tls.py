"""``crl sync`` over TLS: which servers it trusts, its messages, and files that change while it runs."""

import asyncio
import contextlib
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import structlog.testing
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from authbackend.api.server import show_errors
from authbackend.certificates.crl_endpoint import PublishedCrl, PublishedCrls
from authbackend.errors import InvalidInput, Unavailable
from authbackend.pki import signing
from authbackend.pki.bench_ca import Authority
from authbackend.pki.client_tls import ClientTLS
from authbackend.pki.crl import issuer_hash, list_pem
from authbackend.pki.crl_sync import Sync
from tests.unit.test_crl import CA, _until, authority, signed

AGO = datetime.now(UTC) - timedelta(days=2)


class Files:
    """Authorities and their certificates, as files."""

    def __init__(self, folder):
        self.folder = folder
        self.ours = Authority.create("ours")
        self.others = Authority.create("another")
        self.write("ours.pem", self.ours.certificate_pem)
        self.write("another.pem", self.others.certificate_pem)

    def write(self, name, content):
        """Write a file and return its path."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def pair(self, name, issued):
        """Write a certificate and its key and return their paths."""
        return self.write(f"{name}.pem", issued.certificate_pem), self.write(f"{name}.key", issued.key_pem)

    def server(self, *names, **validity):
        """Return the TLS context of a server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.pair("server", self.ours.issue_server(names or ["127.0.0.1"], **validity)))
        return context


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@contextlib.asynccontextmanager
async def serving(context):
    """Serve one list; yield the port and the list."""
    lists, made = PublishedCrls(), signed()
    lists.replace({"fleet": PublishedCrl(made.der, made.this_update)})
    app = web.Application(middlewares=[show_errors])
    app.router.add_get("/crl/{name}.crl", lists.show)
    app.on_shutdown.append(lists.close)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1], made
    finally:
        await runner.cleanup()


def syncer(files, port, tls, scheme="https"):
    return Sync([f"{scheme}://127.0.0.1:{port}/crl/fleet.crl"], [CA], files.folder / "crl", tls=tls)


async def test_a_list_comes_over_tls_from_a_server_of_the_authority(files):
    async with serving(files.server()) as (port, made):
        synced = await syncer(files, port, ClientTLS(files.folder / "ours.pem")).once()
    assert (synced.new, synced.list.number) == (True, made.number)


async def test_an_intermediate_is_authority_enough(files):
    root, root_key = authority()
    key, valid = ec.generate_private_key(ec.SECP256R1()), signing.validity(None, None, timedelta(days=30))
    name = signing.subject_of(["intermediate"])
    made = signing.sign_authority(name, key.public_key(), issuer=root.subject, key=root_key, valid=valid, path_length=0)
    files.ours = Authority(made, key)
    trusted = files.write("intermediate.pem", files.ours.certificate_pem)
    async with serving(files.server()) as (port, _):
        assert (await syncer(files, port, ClientTLS(trusted)).once()).new


@pytest.mark.parametrize(
    ("trusted", "names", "validity", "message"),
    [
        (
            "another.pem",
            ["127.0.0.1"],
            {},
            r"is not from an authority in \S+/another\.pem: give the one that signed it",
        ),
        (
            None,
            ["127.0.0.1"],
            {},
            "is from no authority that this host knows: give the one that signed it with --tls-ca",
        ),
        ("ours.pem", ["replica1"], {}, "is for another address: use a name from the certificate in --url"),
        ("ours.pem", ["127.0.0.1"], {"not_before": AGO, "not_after": AGO + timedelta(days=1)}, "has expired"),
        (
            "ours.pem",
            ["127.0.0.1"],
            {"not_before": AGO + timedelta(days=4), "not_after": AGO + timedelta(days=5)},
            "is not valid yet: is this host's clock right",
        ),
    ],
)
async def test_a_server_that_is_not_believed_is_told_with_its_cause(files, trusted, names, validity, message):
    async with serving(files.server(*names, **validity)) as (port, _):
        tls = ClientTLS(trusted and files.folder / trusted)
        with pytest.raises(Unavailable, match=f"https://127.0.0.1:{port}/crl/fleet.crl cannot be reached: .*{message}"):
            await syncer(files, port, tls).once()
    assert not list((files.folder / "crl").iterdir())


async def test_a_name_that_is_not_in_the_certificate_is_told(files):
    async with serving(files.server("replica1")) as (port, _):
        tls = ClientTLS(files.folder / "ours.pem")
        sync = Sync([f"https://localhost:{port}/crl/fleet.crl"], [CA], files.folder / "crl", tls=tls)
        with pytest.raises(Unavailable, match="is for another name: use a name from the certificate in --url"):
            await sync.once()


async def test_https_to_a_server_without_tls_and_http_to_one_with_it_are_told(files):
    tls = ClientTLS(files.folder / "ours.pem")
    async with serving(None) as (port, _):
        with pytest.raises(Unavailable, match="does not speak TLS: use http://"):
            await syncer(files, port, tls).once()
    async with serving(files.server()) as (port, _):
        with pytest.raises(Unavailable, match="if it speaks TLS .* use https://"):
            await syncer(files, port, tls, "http").once()


async def test_a_server_that_demands_a_client_certificate_gets_one(files):
    context = files.server()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(files.folder / "another.pem")
    async with serving(context) as (port, _):
        with pytest.raises(Unavailable, match="give --tls-cert and --tls-key"):
            await syncer(files, port, ClientTLS(files.folder / "ours.pem")).once()
        refused = files.pair("refused", files.ours.issue_client("host"))
        with pytest.raises(Unavailable, match="refused --tls-cert|does not know the authority of --tls-cert"):
            await syncer(files, port, ClientTLS(files.folder / "ours.pem", *refused)).once()
        pair = files.pair("client", files.others.issue_client("host"))
        assert (await syncer(files, port, ClientTLS(files.folder / "ours.pem", *pair)).once()).new


async def test_files_that_change_are_read_while_it_runs_and_what_is_no_use_is_told(files):
    trusted = files.write("trusted.pem", files.others.certificate_pem)
    async with serving(files.server()) as (port, made):
        sync = syncer(files, port, ClientTLS(trusted))
        with structlog.testing.capture_logs() as lines:
            following = asyncio.create_task(sync.run(0.05))
            await _until(lambda: any("not from an authority" in line.get("error", "") for line in lines))
            trusted.write_text("half a certif")
            await _until(lambda: any(line["event"] == "crl.tls_files_not_reloaded" for line in lines))
            trusted.write_bytes(files.ours.certificate_pem)
            file = files.folder / "crl" / f"{issuer_hash(CA)}.r0"
            await _until(lambda: file.exists() and file.read_bytes() == list_pem(made.der))
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following


def test_files_that_cannot_be_used_are_refused_with_words(files):
    certificate, key = files.pair("client", files.ours.issue_client("host"))
    with pytest.raises(InvalidInput, match="--tls-cert and --tls-key go together"):
        ClientTLS(None, certificate)
    with pytest.raises(InvalidInput, match=r"cannot read \S+/nosuch\.pem: No such file"):
        ClientTLS(files.folder / "nosuch.pem")
    with pytest.raises(InvalidInput, match=r"--tls-ca \S+\.key cannot be used"):
        ClientTLS(key)
    with pytest.raises(InvalidInput, match="cannot be used together"):
        ClientTLS(None, certificate, files.pair("other", files.ours.issue_client("other"))[1])


def test_an_encrypted_key_is_refused_and_nobody_is_asked(files):
    from tests.service.test_tls import encrypted

    certificate, key = files.pair("client", files.ours.issue_client("host"))
    key.write_bytes(encrypted(key.read_bytes()))
    with pytest.raises(InvalidInput, match="is encrypted; store it without a passphrase"):
        ClientTLS(None, certificate, key)
