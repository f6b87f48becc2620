"""RabbitMQ's cache in front of authbackend delays revocations, which is why rabbitmq/README.md advises against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import ROOT
from .fleet import Fleet
from .identities import Certificates
from .mqtt import MQTTClient
from .node import Broker, Doors

Clients = Callable[..., MQTTClient]
PORTS = Doors(amqp_tls=6871, mqtt_tls=10083, management_tls=16871, distribution=26872)
REFUSED = 0x86
CONF = f"""
auth_backends.1 = cache
auth_cache.cached_backend = http
auth_cache.cache_ttl = 600000
listeners.ssl.default = {PORTS.amqp_tls}
mqtt.listeners.ssl.default = {PORTS.mqtt_tls}
management.ssl.port = {PORTS.management_tls}
"""


@pytest.fixture(scope="module")
def caching(workplace: Path, certificates: Certificates) -> Iterator[Broker]:
    """A node that caches allowed requests for ten minutes."""
    conf = workplace / "cache.conf"
    conf.write_text(CONF)
    state = workplace / "caching"
    state.mkdir()
    node = Broker(Path(ROOT), state, certificates, "caching", PORTS, [conf])
    node.plugins = ["rabbitmq_auth_backend_cache"]
    node.prepare()
    node.start()
    yield node
    node.close()


async def test_a_revoked_device_is_let_in_until_the_cache_forgets(mqtt: Clients, fleet: Fleet, caching: Broker) -> None:
    """With the same client id, no request is sent. The cache can only be cleared for all devices, not for one."""
    me = fleet.device()
    client = mqtt(me, port=PORTS.mqtt_tls)
    assert await client.connect() == 0
    await client.disconnect()
    requests = fleet.service.count("authbackend_decisions")
    again = mqtt(me, port=PORTS.mqtt_tls)
    assert await again.connect() == 0
    await again.disconnect()
    assert fleet.service.count("authbackend_decisions") == requests
    await fleet.command("device", "revoke", me, "--reason", "stolen")
    revoked = mqtt(me, port=PORTS.mqtt_tls)
    assert await revoked.connect() == 0
    assert fleet.service.count("authbackend_decisions") == requests
    assert await mqtt(me, client_id=f"{me}_2", port=PORTS.mqtt_tls).connect() == REFUSED
    caching.control("eval", "rabbit_auth_backend_cache:clear_cache_cluster_wide().")
    assert await mqtt(me, port=PORTS.mqtt_tls).connect() == REFUSED
