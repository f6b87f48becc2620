"""The HTTP answers to RabbitMQ: exact texts, never an error page, and failures of authbackend distinct from denials."""

import asyncio
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from urllib.parse import urlencode, urlsplit

import asyncpg
import pytest
import structlog.testing

from authbackend.broker import server
from tests.service.conftest import HASH, POLICY, apply, running, until


def raw(service, data):
    """Send bytes on a new connection and return everything that comes back."""
    where = urlsplit(service.broker)
    with socket.create_connection((where.hostname, where.port), timeout=5) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def body_of(answer):
    return answer.partition(b"\r\n\r\n")[2]


async def test_the_four_questions(service):
    form = {"username": "APM0001", "vhost": "/", "client_id": "APM0001"}
    assert await service.ask("user", form) == (200, "allow")
    assert await service.ask("vhost", {**form, "ip": "127.0.0.1", "tags": ""}) == (200, "allow")
    queue = {**form, "resource": "queue", "name": "mqtt-subscription-APM0001qos0", "permission": "configure"}
    assert await service.ask("resource", queue) == (200, "allow")
    assert await service.publish("APM0001", "fleet.APM0001.telemetry.x") == "allow"
    assert await service.publish("APM0001", "fleet.APM0002.telemetry.x") == "deny"


async def test_get_answers_the_same(service):
    query = urlencode({"username": "APM0001", "client_id": "APM0001_x y+z/ü"})
    async with service.http.get(f"{service.broker}/auth/user?{query}") as response:
        assert (response.status, await response.text()) == (200, "allow")
    async with service.http.get(f"{service.broker}/auth/user?username=nobody") as response:
        assert (response.status, await response.text()) == (200, "deny")


async def test_tags_come_with_a_login_only(service):
    assert await service.login("ops", password="correct horse") == "allow monitoring management"
    assert await service.login("ops", password="wrong horse") == "deny"
    assert await service.login("ops") == "deny"
    assert await service.ask("vhost", {"username": "ops", "vhost": "/", "ip": "unknown"}) == (200, "allow")


async def test_the_answer_has_no_newline_and_ignores_accept(service):
    where = urlsplit(service.broker)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=5)

    def ask():
        headers = {"Accept": "text/html, application/json", "Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/auth/user", "username=nobody", headers)
        response = connection.getresponse()
        return response.status, response.read(), response.getheader("Content-Type")

    status, body, kind = await asyncio.to_thread(ask)
    connection.close()
    assert (status, body) == (200, b"deny")
    assert kind.startswith("text/plain")


MALFORMED = [
    ("parameter_missing", b"POST", b"vhost=%2F"),
    ("parameter_twice", b"POST", b"username=APM0001&username=APM0002"),
    ("parameters_contradict", b"POST", b"username=APM0001&variable_map.username=APM0002"),
    ("bad_encoding", b"POST", b"username=%FF"),
    ("nul", b"POST", b"username=APM0001%00"),
    ("too_large", b"POST", b"username=APM0001&x=" + b"a" * 300_000),
    ("parameter_too_long", b"POST", b"username=" + b"a" * 2000),
    ("too_many_parameters", b"POST", b"&".join(b"x=1" for _ in range(100))),
    ("too_large", b"GET", b"username=APM0001&x=" + b"a" * 8200),
    ("too_large", b"GET", b"username=APM0001&x=" + b"a" * 100_000),
    ("bad_encoding", b"GET", b"username=%FF"),
    ("not_http", b"PUT", b"username=APM0001"),
    ("not_http", b"HEAD", b"username=APM0001"),
    ("not_http", b"\x16\x03\x01", b"username=APM0001"),
]


@pytest.mark.parametrize(("cause", "method", "form"), MALFORMED)
async def test_what_is_not_rabbitmqs_is_denied_and_counted(service, cause, method, form):
    if method == b"GET":
        request = b"GET /auth/user?" + form + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    else:
        request = (
            method + b" /auth/user HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Length: " + str(len(form)).encode() + b"\r\n\r\n" + form
        )
    answer = await asyncio.to_thread(raw, service, request)
    assert answer.split(b" ")[1] == b"200"
    assert body_of(answer) == (b"" if method == b"HEAD" else b"deny")

    async def counted():
        values = [
            await service.metric("authbackend_malformed_requests_total", endpoint=e, cause=cause)
            for e in ("user", "none")
        ]
        return sum(values) == 1

    await until(counted, "the malformed request is counted by its cause")


async def test_a_key_of_65535_bytes_is_answered(service):
    key = "fleet.APM0001.telemetry." + "é" * 32755
    assert len(key.encode()) <= 65535
    assert await service.publish("APM0001", key) == "allow"


async def test_another_path_is_no_answer(service):
    status, text = await service.ask("users", {"username": "APM0001"})
    assert (status, "allow" in text) == (404, False)


async def test_reasons_are_sent_only_when_the_setting_says_so(dsn):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn, BROKER__DENY_REASONS="true") as service:
        assert await service.login("GONE") == "deny device_revoked"
        assert await service.login("APM0001") == "allow"
        assert await service.login("APM0001", password="none") == "deny password_on_certificate_identity"


async def test_decisions_are_counted_by_reason_and_type(service):
    await service.login("GONE")
    await service.login("GONE")
    labels = {"endpoint": "user", "verdict": "deny", "reason": "device_revoked", "device_type": "APM"}
    assert await service.metric("authbackend_decisions_total", **labels) == 2
    assert await service.metric("authbackend_requests_in_flight") == 0
    assert await service.metric("authbackend_request_duration_seconds_count", endpoint="user") == 2


async def test_the_number_of_series_does_not_grow_with_devices(service):
    of_their_own = ("registry", "replica", "certificates", "crl", "authority")  # after the first read

    async def series():
        _, text = await service.get("/metrics")
        return [
            line for line in text.splitlines() if not line.startswith(tuple(f"authbackend_{n}" for n in of_their_own))
        ]

    for number in range(3):
        await service.login(f"first{number}")
    before = await series()
    for number in range(200):
        await service.login(f"unknown{number}")
    after = await series()
    assert [line for line in after if line.startswith("authbackend_decisions_total")]
    assert len(after) == len(before)


async def test_promtool_finds_the_metrics_clean(service):
    promtool = shutil.which("promtool")
    if promtool is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed (Debian package prometheus)")
    await service.login("APM0001")
    _, text = await service.get("/metrics")
    done = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_a_slow_sender_gets_no_more_than_its_time(dsn):
    """The headers arrive, the body does not: only this request fails, and counts as a failure, not a denial."""
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn, BROKER__REQUEST_TIMEOUT_S="0.2") as service:
        request = b"POST /auth/user HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nusername="

        def send():
            where = urlsplit(service.broker)
            with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
                connection.sendall(request)
                return connection.recv(65536)

        assert (await asyncio.to_thread(send)).startswith(b"HTTP/1.1 503")
        assert await service.metric("authbackend_request_failures_total", endpoint="user", cause="timeout") == 1


async def test_before_the_first_load_it_is_unavailable_and_not_ready(postgres):
    nowhere = "postgresql://nobody@/nowhere?host=/nonexistent"
    async with running(nowhere, wait=False) as service:
        assert (await service.ask("user", {"username": "APM0001"}))[0] == 503
        status, text = await service.get("/health/ready")
        assert status == 503
        assert "has not been loaded" in json.loads(text)["status"]
        assert (await service.get("/health/live"))[0] == 200
        assert await service.metric("authbackend_request_failures_total", endpoint="user", cause="not_ready") == 1


@pytest.fixture
async def cut_off(postgres, database):
    """Blocks connections to the database of this test, and allows them again."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))

    async def switch(allowed):
        await admin.execute(f"alter database {database} allow_connections {allowed}")
        await admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", database)

    yield switch
    await switch(True)
    await admin.close()


async def test_an_outage_changes_no_verdict(service, cut_off):
    await cut_off(False)

    async def missed():
        return await service.metric("authbackend_registry_sync_failures_total") > 0

    await until(missed, "a read of the database failed")
    assert await service.login("APM0001") == "allow"
    status, text = await service.get("/health/ready")
    assert status == 200
    assert json.loads(text)["fault"]


async def test_a_stale_copy_denies_everything_and_says_so(dsn, cut_off):
    """The status is 200, as always."""
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    staleness = {"REGISTRY__MAX_STALENESS_S": "1.5", "REGISTRY__POLL_INTERVAL_S": "0.1", "BROKER__DENY_REASONS": "true"}
    async with running(dsn, **staleness) as service:
        await cut_off(False)

        async def stale():
            return await service.login("APM0001") == "deny registry_stale"

        await until(stale, "the copy is stale")
        assert (await service.get("/health/ready"))[0] == 503
        await cut_off(True)

        async def back():
            return await service.login("APM0001") == "allow"

        await until(back, "the copy follows again")


async def test_a_keep_alive_connection_serves_many_requests(service):
    where = urlsplit(service.broker)

    def ask():
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=5)
        ports = set()
        for _ in range(20):
            connection.request("POST", "/auth/user", "username=APM0001")
            assert connection.getresponse().read() == b"allow"
            ports.add(connection.sock.getsockname())
        connection.close()
        return ports

    assert len(await asyncio.to_thread(ask)) == 1


async def test_explanations_are_for_this_host_only(service):
    path = "/api/explain?device=APM0001&action=publish&topic=fleet/APM0002/telemetry/x"
    status, text = await service.get(path)
    explanation = json.loads(text)
    assert (status, explanation["verdict"], explanation["reason"]) == (200, "deny", "no_rule_allows")
    assert 'level 2 is "APM0002", the rule wants "APM0001"' in explanation["nearest"][0]["missing"]
    async with service.http.get(service.admin + path, headers={"Host": "evil.example"}) as response:
        assert response.status == 421
    assert (await service.get("/api/explain?device=nobody&action=publish&topic=x"))[0] == 404
    assert (await service.get("/api/explain?device=APM0001"))[0] == 400


async def test_nothing_of_a_request_with_a_password_is_logged(service, capfd):
    await service.login("ops", password="hunter2")
    async with service.http.get(f"{service.broker}/auth/user?username=ops&password=hunter2") as response:
        assert await response.text() == "deny"
    await asyncio.to_thread(raw, service, b"GET /auth/user?password=hunter2 BROKEN\r\n\r\n")
    captured = capfd.readouterr()
    assert "hunter2" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api/auth/topic", "/auth/topic"),
        ("/auth/topic/", "/auth/topic"),
        ("/AUTH/user", "/auth/user"),
        ("/", "/auth/user, /auth/vhost, /auth/resource, /auth/topic"),
        (
            "http://ops:hunter2@backend/auth/users?password=hunter2",
            "/auth/user, /auth/vhost, /auth/resource, /auth/topic",
        ),
    ],
)
async def test_a_wrong_path_is_counted_and_the_log_says_what_is_expected(service, path, expected):
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            assert (await asyncio.to_thread(raw, service, request.encode())).startswith(b"HTTP/1.1 404 ")
    (line,) = [line for line in lines if line["event"] == "broker.unknown_path"]
    assert line["expected"] == expected
    assert "auth_http" in line["fix"]
    assert "hunter2" not in str(lines)
    assert await service.metric("authbackend_unknown_paths_total") == 3


async def test_a_wrong_path_is_logged_once_a_minute(service, monkeypatch):
    began = time.monotonic()
    with structlog.testing.capture_logs() as lines:
        for passed in (0, 59, 59, 61, 62):
            monkeypatch.setattr(server.time, "monotonic", lambda passed=passed: began + passed)
            async with service.http.post(f"{service.broker}/topic", data=b"") as response:
                assert response.status == 404
    logged = [line for line in lines if line["event"] == "broker.unknown_path"]
    assert [line["unlogged"] for line in logged] == [0, 2]


async def test_a_client_that_waits_to_be_told_may_send_its_body(service):
    """curl sends ``Expect: 100-continue`` before a large body."""
    where = urlsplit(service.broker)
    form = b"username=APM0001"
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    for _ in range(2):
        writer.write(
            b"POST /auth/user HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(form)
        )
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(form)
        assert (await asyncio.wait_for(reader.readuntil(b"allow"), 30)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.write(b"POST /auth/user HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 300000\r\n\r\n")
    refused = await asyncio.wait_for(reader.read(), 30)
    assert refused.startswith(b"HTTP/1.1 200 OK\r\n")
    assert refused.endswith(b"deny")
    writer.close()
    await writer.wait_closed()
