"""Parsing the management API's list of connections, even if fields are missing, and reloading the CA file."""

import ssl
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from authbackend.enforcement.management_api import Access, ClusterUnreachable, ManagementAPI
from authbackend.pki.bench_ca import Authority

FULL = {
    "name": "full",
    "node": "rabbit@a",
    "user": "APM1",
    "vhost": "/",
    "protocol": "Web MQTT 5-0",
    "peer_host": "10.0.0.1",
    "client_properties": {"client_id": "APM1", "user_property": {"client_type": "APM", "n": 1}},
    "connected_at": 1795606776951,
    "peer_cert_serial_number": "2F84",
    "peer_cert_issuer": "CN=CA",
    "peer_cert_subject": "CN=APM1",
    "peer_cert_validity": "2026-11-24T11:39:36Z - 2026-12-25T11:39:36Z",
}


async def listed(*entries):
    async def answer(request):
        assert {*FULL} == {*request.query["columns"].split(",")}
        return web.json_response(entries)

    app = web.Application()
    app.router.add_get("/api/connections", answer)
    async with TestServer(app) as server:
        cluster = ManagementAPI(Access((str(server.make_url("")),), lambda: ("u", "p")))
        try:
            return [each async for part in cluster.connections() for each in part]
        finally:
            await cluster.aclose()


async def test_all_that_is_told_is_taken():
    (live,) = await listed(FULL)
    assert (live.mqtt, live.client_id, live.user_properties) == (True, "APM1", {"client_type": "APM"})
    assert (live.name, live.node, live.user, live.vhost, live.address) == ("full", "rabbit@a", "APM1", "/", "10.0.0.1")
    assert live.connected_at == 1795606776.951
    assert (live.certificate_serial, live.certificate_issuer, live.certificate_subject, live.certificate_validity) == (
        "2F84",
        "CN=CA",
        "CN=APM1",
        "2026-11-24T11:39:36Z - 2026-12-25T11:39:36Z",
    )


@pytest.mark.parametrize(
    "entry",
    [
        {},
        dict.fromkeys(FULL),
        {name: [] for name in FULL},
        dict.fromkeys(FULL, ""),
        {"client_properties": {"client_id": None, "user_property": []}},
    ],
)
async def test_what_is_not_told_is_empty_and_the_connection_is_not_left_out(entry):
    (live,) = await listed(entry)
    assert (live.name, live.user, live.vhost, live.protocol, live.address, live.mqtt) == ("", "", "", "", "", None)
    assert {live.client_id, live.certificate_serial, live.certificate_issuer, live.certificate_validity} == {None}
    assert (live.user_properties, live.connected_at) == ({}, 0.0)


@pytest.mark.parametrize("protocol", ["AMQP 0-9-1", "stream", "STOMP 1.2", "SOMETHING 1-0"])
async def test_a_client_id_is_that_of_an_mqtt_client_only(protocol):
    (live,) = await listed(FULL | {"protocol": protocol})
    assert live.client_id is None


@pytest.fixture
async def node(tmp_path):
    """A node whose certificate can be replaced by one of another authority; the client trusts ca.pem."""

    async def answer(request):
        return web.json_response([{"name": "rabbit@a", "running": True}])

    app = web.Application()
    app.router.add_get("/api/nodes", answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def use(authority):
        pair = authority.issue_server(["127.0.0.1"])
        (tmp_path / "node.pem").write_bytes(pair.certificate_pem)
        (tmp_path / "node.key").write_bytes(pair.key_pem)
        context.load_cert_chain(tmp_path / "node.pem", tmp_path / "node.key")

    first = Authority.create("first")
    use(first)
    (tmp_path / "ca.pem").write_bytes(first.certificate_pem)
    server = TestServer(app, scheme="https", host="127.0.0.1")
    await server.start_server(ssl=context)
    async with server:
        url = str(server.make_url(""))
        cluster = ManagementAPI(Access((url,), lambda: ("u", "p"), str(tmp_path / "ca.pem")))
        try:
            yield SimpleNamespace(cluster=cluster, use=use, ca=tmp_path / "ca.pem")
        finally:
            await cluster.aclose()


async def test_a_new_authority_is_trusted_from_the_next_request_on(node):
    assert await node.cluster.nodes() == {"rabbit@a": True}
    second = Authority.create("second")
    node.ca.write_bytes(second.certificate_pem)
    with pytest.raises(ClusterUnreachable, match="ClientConnectorCertificateError"):
        await node.cluster.nodes()  # not over a connection opened with the old authority
    node.use(second)
    assert await node.cluster.nodes() == {"rabbit@a": True}


async def test_half_a_file_changes_nothing_and_is_said_once(node):
    assert await node.cluster.nodes() == {"rabbit@a": True}
    node.ca.write_text("-----BEGIN CERT")
    with capture_logs() as lines:
        assert await node.cluster.nodes() == await node.cluster.nodes() == {"rabbit@a": True}
    assert [line["event"] for line in lines] == ["enforcement.ca_not_reloaded"]
    assert lines[0]["file"] == str(node.ca)
    second = Authority.create("second")
    node.ca.write_bytes(second.certificate_pem)
    node.use(second)
    assert await node.cluster.nodes() == {"rabbit@a": True}
