"""
Break-glass access: with the commands of docs/operations.md, operators can use the management API while no replica
answers, and nobody else gains access.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from aio_pika.exceptions import AMQPConnectionError

from .clients import Management, connect_amqp
from .fleet import Fleet
from .identities import Certificates
from .mqtt import Disconnected, MQTTClient, connect_all
from .node import REPOSITORY, Broker

Clients = Callable[..., MQTTClient]
Managements = Callable[..., Management]
REFUSED = 0x86
NAME, PASSWORD = "break-glass", "a password that nobody else has"
DEFAULT = ("guest", "guest")


def commands(heading: str) -> list[list[str]]:
    """Return the rabbitmqctl commands below a heading of the page."""
    page = (REPOSITORY / "docs/operations.md").read_text(encoding="utf-8")
    section = page.split(f"\n#### {heading}\n")[1].split("\n#")[0]
    return [shlex.split(line) for line in re.findall(r"^\$ rabbitmqctl (.+)$", section, re.MULTILINE)]


def run(broker: Broker, heading: str) -> None:
    """Run the commands of the page, with the password of this test."""
    listed = commands(heading)
    assert listed
    users = broker.control("list_users", "--no-table-headers").split()
    for arguments in listed:
        if arguments == ["delete_user", "guest"] and "guest" not in users:
            continue
        broker.control(*(PASSWORD if word == "PASSWORD" else word for word in arguments))


async def status(management: Managements, name: str, password: str, path: str = "overview") -> int:
    """Return the management API's status for a user."""
    async with management(name, password) as api:
        return (await api.get(path))[0]


@pytest_asyncio.fixture
async def outage(fleet: Fleet, broker: Broker) -> AsyncIterator[None]:
    """Stop all replicas; afterwards restore the broker's settings and start the service."""
    await asyncio.to_thread(fleet.service.stop)
    yield
    await asyncio.to_thread(fleet.service.start)
    broker.control("eval", "application:unset_env(rabbitmq_web_dispatch, auth_backends).")
    for line in broker.control("list_users", "--no-table-headers").splitlines():
        broker.control("delete_user", line.split()[0])


async def test_an_operator_gets_in_and_nobody_else(
    mqtt: Clients, management: Managements, broker: Broker, certificates: Certificates, fleet: Fleet
) -> None:
    """From the first command to the last; the default user is the risk that the page warns about."""
    me, other, victim = fleet.device(), fleet.device(), fleet.device()
    sleeper, online = mqtt(victim, clean=False, session_expiry_s=600), mqtt(me)
    assert await connect_all(sleeper, online) == [0, 0]
    assert await sleeper.subscribe(f"fleet/{victim}/telemetry/#") == [1]
    await asyncio.to_thread(fleet.service.stop)
    try:
        assert await status(management, NAME, PASSWORD) == 401
        assert await status(management, *DEFAULT) == 401
        run(broker, "Open")
        assert await status(management, *DEFAULT) == 401
        async with management(NAME, PASSWORD) as api:
            code, user = await api.get("whoami")
            assert (code, user["tags"]) == (200, ["administrator"])
            assert (await api.get("overview"))[0] == 200
            assert (await api.delete(f"connections/username/{victim}"))[0] == 204
            await sleeper.disconnected()
            assert (await api.delete(f"queues/%2F/mqtt-subscription-{victim}qos1"))[0] == 204
            message = {"properties": {}, "routing_key": f"fleet.{me}.commands.stop", "payload": "x"}
            code, _ = await api.request(
                "POST", "exchanges/%2F/amq.topic/publish", message | {"payload_encoding": "string"}
            )
            assert code != 200
        await _nobody_gets_more(mqtt, management, broker, certificates, me=me, other=other, online=online)
        await asyncio.to_thread(fleet.service.start)
        assert await mqtt(other).connect() == 0
        assert await status(management, "monitoring", "monitoring") == 200
        run(broker, "Close")
        assert await status(management, NAME, PASSWORD) == 401
        assert await status(management, "monitoring", "monitoring") == 200
        assert broker.control("list_users", "--no-table-headers").strip() == ""
    finally:
        await asyncio.to_thread(fleet.service.restart)
        broker.control("eval", "application:unset_env(rabbitmq_web_dispatch, auth_backends).")


async def _nobody_gets_more(
    mqtt: Clients,
    management: Managements,
    broker: Broker,
    certificates: Certificates,
    *,
    me: str,
    other: str,
    online: MQTTClient,
) -> None:
    """Check that devices gain nothing, neither with the operator's password nor by a local user with their name."""
    broker.control("add_user", other, "local")
    broker.control("set_permissions", other, ".*", ".*", ".*")
    attempts = [
        mqtt(other),
        mqtt(me, client_id=f"{me}_2"),
        mqtt(other, username=other, password="local"),
        mqtt(other, username=NAME, password=PASSWORD),
    ]
    assert await connect_all(*attempts) == [REFUSED] * len(attempts)
    with pytest.raises(Disconnected):
        await online.publish(f"fleet/{me}/telemetry/new", b"x")
    for name, password in ((NAME, PASSWORD), (other, "local")):
        with pytest.raises(AMQPConnectionError):
            await connect_amqp(
                certificates.device(me).context(), port=broker.doors.amqp_tls, username=name, password=password
            )
    assert await status(management, other, "local") == 401  # without a tag
    assert await status(management, me, "none") == 401
    broker.control("delete_user", other)


async def test_the_default_user_is_the_danger(management: Managements, broker: Broker, outage: None) -> None:
    """Without the first command, anybody can log in as guest with its well-known password."""
    broker.control("add_user", *DEFAULT)
    broker.control("set_user_tags", "guest", "administrator")
    (opening,) = (each for each in commands("Open") if each[0] == "eval")
    broker.control(*opening)
    assert await status(management, *DEFAULT) == 200


def test_a_node_has_the_default_user_from_its_first_start(lax_broker: Broker) -> None:
    """It is not used for logins as long as auth_backends contains only authbackend."""
    assert lax_broker.control("list_users", "--no-table-headers").split() == ["guest", "[administrator]"]
