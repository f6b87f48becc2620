"""
Each denial reason: what the client sees, in MQTT 3.1.1 and 5, and what RabbitMQ logs.

The expectations are in ``docs/broker-answers.toml``, from which docs/reasons.md is generated. What a client sees
depends on the endpoint that denies, never on the reason.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from authbackend.policy.reasons import Reason

from .answers import BrokerLog, connack, expected, publish, subscribe
from .fleet import Fleet
from .mqtt import MQTTClient, Will, connect_all
from .node import Broker
from .processes import HarnessError, until

Clients = Callable[..., MQTTClient]
EXPECTED = expected()
OUTAGE = "no replica answers"
VERSIONS = {4: "mqtt_3_1_1", 5: "mqtt_5"}
CHANGES = {
    "device_pending": "update device set status = 'pending' where device_id = '{device}'",
    "device_suspended": "update device set status = 'suspended' where device_id = '{device}'",
    "device_revoked": "update device set status = 'revoked' where device_id = '{device}'",
    "device_expired": "update device set expires_at = now() - interval '1 second' where device_id = '{device}'",
    "unknown_identity": "delete from device where device_id = '{device}'",
    "vhost_not_listed": "update device set type = 'MOVED' where device_id = '{device}'",
    "registry_stale": "update device set type = 'STALE' where device_id = '{device}'",
    "client_id_not_bound": "update device set type = 'RENAMED' where device_id = '{device}'",
    "rule_denies": (
        "insert into topic_rule (device_id, effect, action, topic) values"
        " ('{device}', 'deny', 'publish', 'fleet/{device}/telemetry/#'),"
        " ('{device}', 'deny', 'subscribe', 'fleet/{device}/telemetry/#')"
    ),
    "no_rule_allows": "select 1",
}
"""What somebody changes while the device is connected, so that its next question is denied for this reason."""
TYPES = """
insert into device_type (name, client_ids, vhosts, max_staleness_s) values
  ('MOVED', '{"{device_id}"}', '{elsewhere}', null),
  ('STALE', '{"{device_id}"}', '{/}', 0.000001),
  ('RENAMED', '{"{device_id}_only"}', '{/}', null) on conflict (name) do nothing
"""


NARROW = """
insert into account (name, login, password_hash, vhosts, client_ids)
  select 'narrow', 'password', password_hash, '{/}', '{narrow-1}' from account where name = 'enforcer'
  on conflict (name) do nothing
"""
"""An account that may use MQTT, and no queue behind a subscription."""


@dataclass(slots=True)
class Walk:
    """The clients of one MQTT version, the counts by reason, and the observations."""

    mqtt: Clients
    fleet: Fleet
    broker: Broker
    version: int

    def client(self, identity: Any, **options: Any) -> MQTTClient:
        """Return a client of this MQTT version."""
        return self.mqtt(identity, version=self.version, **options)

    def expected(self, question: str) -> str:
        """Return what a client of this version must see."""
        answer: str = EXPECTED["question"][question][VERSIONS[self.version]]
        return answer

    def denied(self) -> Counter[str]:
        """Return how often each reason has been given, on all endpoints."""
        return Counter({reason: self.fleet.service.denials(reason=reason) for reason in Reason})

    async def logged(self, log: BrokerLog, question: str, names: dict[str, str]) -> None:
        """Wait until the broker has logged exactly the expected lines."""
        lines = EXPECTED["question"][question]["log"]
        try:
            await until(lambda: log.lines(names) == lines, 5)
        except HarnessError:
            assert log.lines(names) == lines

    async def login(self, client: MQTTClient) -> str:
        """Connect, and return what the client sees."""
        return connack(self.version, await client.connect())


@pytest.fixture(params=VERSIONS)
def walk(mqtt: Clients, fleet: Fleet, broker: Broker, request: pytest.FixtureRequest) -> Walk:
    """Run for MQTT 3.1.1 and for 5."""
    return Walk(mqtt, fleet, broker, request.param)


def test_every_reason_is_in_the_file() -> None:
    """With the endpoints at which a test shows it, or why MQTT clients never get it."""
    assert set(EXPECTED["reason"]) | set(EXPECTED["not_over_mqtt"]) == set(Reason) - {Reason.ALLOWED}
    assert not set(EXPECTED["reason"]) & set(EXPECTED["not_over_mqtt"])
    met = {question for questions in EXPECTED["reason"].values() for question in questions}
    assert met | {OUTAGE} == set(EXPECTED["question"])


def reasons_of(question: str) -> set[str]:
    """Return the reasons of an endpoint, according to the file."""
    return {reason for reason, questions in EXPECTED["reason"].items() if question in questions}


async def _hold(fleet: Fleet, device: str) -> None:
    hold = f"insert into device_hold (device_id, until) values ('{device}', 'infinity')"
    await fleet.served(fleet.database.sql(f"{hold}; select registry_version()").splitlines()[-1])


async def test_logins(walk: Walk, fleet: Fleet) -> None:
    """One client for each reason, concurrently, since RabbitMQ takes three seconds for each refusal."""
    await fleet.change(TYPES)
    device = {name: fleet.device() for name in ("held", "stale", "victim", "short", "not_bound", "carrier")}
    long = f"{device['short']}_2"
    await fleet.change(
        f"update device set type = 'STALE' where device_id = '{device['stale']}';"
        f"insert into device (device_id, type, status) values ('{long}', 'APM', 'active')"
    )
    await _hold(fleet, device["held"])
    await fleet.change(NARROW)
    account = {"username": "narrow", "client_id": "narrow-1"}
    clients = {
        "unknown_identity": walk.client("APM9999"),
        "device_pending": walk.client("APM0010"),
        "device_suspended": walk.client("APM0011"),
        "device_revoked": walk.client("APM0012"),
        "device_expired": walk.client("APM0013"),
        "enforcement_in_progress": walk.client(device["held"]),
        "registry_stale": walk.client(device["stale"]),
        "password_on_certificate_identity": walk.client(
            device["carrier"], username=device["victim"], password="none", client_id=device["victim"]
        ),
        "password_missing": walk.client("narrow", client_id="narrow-1"),
        "password_wrong": walk.client(device["carrier"], password="wrong", **account),
        "client_id_not_bound": walk.client(device["not_bound"], client_id="another"),
        "client_id_of_another_device": walk.client(device["short"], client_id=long),
        "malformed_request": walk.client(device["carrier"], username="x" * 2000, password="x"),
    }
    assert reasons_of("login") == {*clients, "password_checks_busy"}
    log, before = BrokerLog(walk.broker), walk.denied()
    seen = await asyncio.gather(*(walk.login(client) for client in clients.values()))
    assert dict(zip(clients, seen, strict=True)) == dict.fromkeys(clients, walk.expected("login"))
    assert walk.denied() - before == Counter(dict.fromkeys(clients, 1))
    await walk.logged(log, "login", {"APM0012": "NAME"})


async def test_too_many_passwords_at_once(walk: Walk, fleet: Fleet) -> None:
    """A password that cannot be checked in time is refused like a wrong one."""
    await fleet.change(NARROW)
    fleet.service.configure(ACCOUNTS__HASHING_THREADS="1", ACCOUNTS__HASHING_QUEUE="0")
    await asyncio.to_thread(fleet.service.restart)
    try:
        account = {"username": "narrow", "client_id": "narrow-1"}
        carrier, before = fleet.device(), walk.denied()
        guesses = [walk.client(carrier, password=f"guess {number}", **account) for number in range(20)]
        seen = await asyncio.gather(*(walk.login(guess) for guess in guesses))
        assert set(seen) == {walk.expected("login")}
        assert "password_checks_busy" in walk.denied() - before
    finally:
        fleet.service.configure(ACCOUNTS__HASHING_THREADS="", ACCOUNTS__HASHING_QUEUE="")
        await asyncio.to_thread(fleet.service.restart)


async def test_virtual_hosts(walk: Walk, fleet: Fleet) -> None:
    """The login is allowed, the virtual host is not."""
    clients = {"address_not_in_networks": walk.client("FAR0001"), "vhost_not_listed": walk.client("ELSE001")}
    assert reasons_of("virtual host") == set(clients)
    log, before = BrokerLog(walk.broker), walk.denied()
    seen = await asyncio.gather(*(walk.login(client) for client in clients.values()))
    assert dict(zip(clients, seen, strict=True)) == dict.fromkeys(clients, walk.expected("virtual host"))
    assert walk.denied() - before == Counter(dict.fromkeys(clients, 1))
    await walk.logged(log, "virtual host", {"ELSE001": "NAME"})


SnapshotRefused = Callable[[MQTTClient, str], Awaitable[str]]
ATTEMPTS: dict[str, SnapshotRefused] = {
    "publish, QoS 0": lambda client, topic: publish(client, topic, 0),
    "publish, QoS 1": lambda client, topic: publish(client, topic, 1),
    "subscribe": subscribe,
}


@pytest.mark.parametrize("question", ATTEMPTS)
async def test_what_is_already_connected(walk: Walk, fleet: Fleet, question: str) -> None:
    """A device for each reason logs in, then the registry changes; enforcement, which would disconnect it, is off."""
    devices = {reason: fleet.device() for reason in CHANGES}
    clients = {reason: walk.client(device) for reason, device in devices.items()}
    if question == "subscribe":
        devices["too_many_wildcards"] = fleet.device()
        clients["too_many_wildcards"] = walk.client(devices["too_many_wildcards"])
    assert set(await connect_all(*clients.values())) == {0}
    await fleet.change(TYPES)
    await fleet.change(";".join(c.replace("{device}", devices[r]) for r, c in CHANGES.items() if "{device}" in c))
    topics = {reason: f"fleet/{device}/telemetry/x" for reason, device in devices.items()}
    topics |= {"no_rule_allows": "fleet/nobody/telemetry/x", "too_many_wildcards": "fleet/#/#/#"}
    assert reasons_of(question) == set(clients)
    log, before = BrokerLog(walk.broker), walk.denied()
    attempt = ATTEMPTS[question]
    seen = await asyncio.gather(*(attempt(client, topics[reason]) for reason, client in clients.items()))
    assert dict(zip(clients, seen, strict=True)) == dict.fromkeys(clients, walk.expected(question))
    assert walk.denied() - before == Counter(dict.fromkeys(clients, 1))
    key = topics["rule_denies"].replace("/", ".")
    await walk.logged(log, question, {devices["rule_denies"]: "NAME", key: "TOPIC"})


async def test_wills(walk: Walk, fleet: Fleet) -> None:
    """The login is allowed; the will is dropped when the connection is lost."""
    devices = {reason: fleet.device() for reason in CHANGES}
    topics = {reason: f"fleet/{device}/telemetry/will" for reason, device in devices.items()}
    topics["no_rule_allows"] = "fleet/nobody/telemetry/will"
    clients = {r: walk.client(device, will=Will(topics[r], b"refused")) for r, device in devices.items()}
    assert reasons_of("will") == set(clients)
    log = BrokerLog(walk.broker)
    assert {await walk.login(client) for client in clients.values()} == {walk.expected("will")}
    await fleet.change(TYPES)
    await fleet.change(";".join(c.replace("{device}", devices[r]) for r, c in CHANGES.items() if "{device}" in c))
    before = walk.denied()
    await asyncio.gather(*(client.drop() for client in clients.values()))
    await until(lambda: (walk.denied() - before).total() == len(clients))
    assert walk.denied() - before == Counter(dict.fromkeys(clients, 1))
    key = topics["rule_denies"].replace("/", ".")
    await walk.logged(log, "will", {devices["rule_denies"]: "NAME", key: "TOPIC"})


async def test_the_exchange(walk: Walk, fleet: Fleet) -> None:
    """A type without publish rules is refused at the exchange, one request before the topic."""
    client, before = walk.client("READER1"), walk.denied()
    assert await client.connect() == 0
    log = BrokerLog(walk.broker)
    assert await publish(client, "fleet/x/telemetry/y", 1) == walk.expected("publish, no rule at all")
    assert walk.denied() - before == Counter({"no_rule_allows": 1})
    await walk.logged(log, "publish, no rule at all", {"READER1": "NAME"})


async def test_the_queue_of_a_session(walk: Walk, fleet: Fleet) -> None:
    """An account without permission for the queue of its subscription."""
    await fleet.change(NARROW)
    client = walk.client(fleet.device(), username="narrow", password="enforcer-password", client_id="narrow-1")
    assert await client.connect() == 0
    log, before = BrokerLog(walk.broker), walk.denied()
    assert await subscribe(client, "fleet/+/telemetry/#") == walk.expected("subscribe, queue")
    assert walk.denied() - before == Counter({"resource_not_permitted": 1})
    await walk.logged(log, "subscribe, queue", {"narrow-1": "CLIENT", "narrow": "NAME"})


async def test_no_replica_answers(walk: Walk, fleet: Fleet) -> None:
    """To the client, an outage looks like a denial; the broker's log differs."""
    client = walk.client(fleet.device())
    assert await client.connect() == 0
    await asyncio.to_thread(fleet.service.stop)
    try:
        log, me = BrokerLog(walk.broker), fleet.device()
        assert await walk.login(walk.client(me)) == walk.expected(OUTAGE)
        assert await publish(client, "fleet/x", 1) == walk.expected("publish, QoS 1")
        await walk.logged(log, OUTAGE, {me: "NAME"})
    finally:
        await asyncio.to_thread(fleet.service.start)
