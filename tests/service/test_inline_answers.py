"""Complete requests are answered inline, in ``data_received``, others by aiohttp's task, with the same answers."""

import asyncio
import dataclasses
import socket
from urllib.parse import urlsplit

import pytest

from authbackend.broker.handlers import Handlers
from authbackend.broker.server import BrokerServer
from tests.service.conftest import HASH, POLICY, apply, running, until

FORM = (
    b"username=APM0001&vhost=%2F&resource=topic&name=amq.topic&permission=write"
    b"&routing_key=fleet.APM0001.telemetry.speed&variable_map.client_id=APM0001"
)
HEAD = b"POST /auth/topic HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(FORM)


def exchange(service, *parts, answers=1):
    """Send parts one by one and return everything received up to this number of answers, or until the end."""
    where = urlsplit(service.broker)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            connection.sendall(part)
        received = b""
        while received.count(b"\r\n\r\nallow") < answers and (data := connection.recv(65536)):
            received += data
        return received


@pytest.fixture
def tasks(monkeypatch):
    """Counts the requests that a task answers."""
    taken = []
    original = Handlers.handle

    async def counted(self, question, *args):
        taken.append(question.name)
        return await original(self, question, *args)

    monkeypatch.setattr(Handlers, "handle", counted)
    return taken


async def test_a_whole_request_is_answered_inline(service, tasks):
    received = await asyncio.to_thread(exchange, service, HEAD + b"\r\n" + FORM)
    assert received.endswith(b"allow")
    assert tasks == []


@pytest.mark.parametrize(
    ("parts", "answers"),
    [
        ((HEAD + b"\r\n" + FORM[:20], FORM[20:]), 1),
        ((HEAD[:30], HEAD[30:] + b"\r\n" + FORM), 1),
        ((HEAD + b"\r\n" + FORM + HEAD + b"\r\n" + FORM,), 2),
        ((HEAD + b"Connection: close\r\n\r\n" + FORM,), 1),
        ((HEAD.replace(b"1.1", b"1.0") + b"\r\n" + FORM,), 1),
        ((HEAD + b"Expect: 100-continue\r\n\r\n" + FORM,), 1),
        (
            (
                HEAD.replace(b"Content-Length: %d" % len(FORM), b"Transfer-Encoding: chunked")
                + b"\r\n%x\r\n" % len(FORM)
                + FORM
                + b"\r\n0\r\n\r\n",
            ),
            1,
        ),
        ((b"GET /auth/topic?" + FORM + b" HTTP/1.1\r\nHost: x\r\n\r\n",), 1),
    ],
    ids=["body in parts", "head in parts", "pipelined", "close", "http 1.0", "expect", "chunked", "get"],
)
async def test_what_is_not_one_whole_plain_request_gets_the_same_answer(service, parts, answers):
    received = await asyncio.to_thread(exchange, service, *parts, answers=answers)
    assert received.count(b"HTTP/1.1 200 OK") + received.count(b"HTTP/1.0 200 OK") == answers
    assert received.count(b"\r\n\r\nallow") == answers


async def test_many_requests_one_after_the_other_on_one_connection(service, tasks):
    def ask():
        where = urlsplit(service.broker)
        with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
            for _ in range(50):
                connection.sendall(HEAD + b"\r\n" + FORM)
                received = b""
                while not received.endswith(b"allow"):
                    received += connection.recv(65536)

    await asyncio.to_thread(ask)
    assert tasks == []


async def test_an_idle_connection_is_closed_after_its_time(dsn, monkeypatch):
    original = BrokerServer.__init__

    def impatient(self, *args):
        original(self, *args[:-1], dataclasses.replace(args[-1], keepalive_timeout_s=0.2))

    monkeypatch.setattr(BrokerServer, "__init__", impatient)
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with running(dsn) as service:

        def ask():
            where = urlsplit(service.broker)
            with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
                connection.sendall(HEAD + b"\r\n" + FORM)
                received = b""
                while data := connection.recv(65536):
                    received += data
                return received

        assert (await asyncio.to_thread(ask)).endswith(b"allow")

        async def none_open():
            return await service.metric("authbackend_connections") == 0

        await until(none_open, "the connection is gone")


async def test_a_fault_of_ours_is_503_and_the_connection_lives_on(service, monkeypatch):
    def broken(*_):
        raise RuntimeError("a fault that nobody thought of")

    with monkeypatch.context() as patched:
        patched.setattr(Handlers, "_decide", broken)
        received = await asyncio.to_thread(exchange_one, service)
    assert received.startswith(b"HTTP/1.1 503")
    assert await service.metric("authbackend_request_failures_total", cause="crash") == 1


def exchange_one(service):
    """Send one request and return the first bytes of the answer."""
    where = urlsplit(service.broker)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(HEAD + b"\r\n" + FORM)
        return connection.recv(65536)


async def test_a_login_by_certificate_is_answered_inline_and_one_by_password_is_not(service, tasks):
    """Only a password check has to wait; the parsed login is used for this request and no other."""
    head = "POST /auth/user HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"
    certificate = b"username=APM0001&client_id=APM0001"
    password = b"username=ops&password=correct+horse"
    nothing = head.format(0).replace("Host", "Connection: close\r\nHost").encode()  # answered by a task
    requests = [head.format(len(form)).encode() + form for form in (certificate, password)]
    received = await asyncio.to_thread(exchange, service, requests[0])
    assert received.endswith(b"allow")
    assert tasks == []
    received = await asyncio.to_thread(exchange, service, requests[1])
    assert b"\r\n\r\nallow monitoring management" in received
    assert tasks == ["user"]

    def both():
        where = urlsplit(service.broker)
        with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
            answers = []
            for request in (requests[1], nothing):
                connection.sendall(request)
                answers.append(connection.recv(65536).partition(b"\r\n\r\n")[2])
            return answers

    assert await asyncio.to_thread(both) == [b"allow monitoring management", b"deny"]
