"""
The files for users: this broker supports every key in them, README.md lists the versions, and a node starts with each.

A node does not start with an unknown key, so users would notice a wrong one.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT
from .identities import Certificates, anonymous_context
from .mqtt import HOST
from .node import RABBITMQ_FILES, Broker, Doors
from .processes import HarnessError
from .schemas import KnownKeys, keys_of

OPTIONAL = sorted((RABBITMQ_FILES / "conf.d-optional").iterdir())
CONF = [RABBITMQ_FILES / "rabbitmq.conf", *(file for file in OPTIONAL if file.suffix == ".conf")]
PORTS = Doors(amqp_tls=6671, mqtt_tls=9883, management_tls=16671, web_mqtt_tls=16676, distribution=26672)
PLUGINS = {"web-mqtt.conf": "rabbitmq_web_mqtt", "web-mqtt.advanced.config": "rabbitmq_web_mqtt"}
"""What README.md says to enable for a file."""
OTHER_PORTS = {"15676": str(PORTS.web_mqtt_tls), "[1883]": "[2883]"}
"""Because the lax node may be running."""


@pytest.fixture(scope="module")
def supported() -> KnownKeys:
    """The keys that the tested broker supports."""
    return KnownKeys(Path(ROOT))


def test_the_schemas_are_read_as_the_broker_reads_them(supported: KnownKeys) -> None:
    """Plain keys, placeholders, included parts, and keys that disable a block are supported; all others are not."""
    assert len(supported) > 500
    for key in ("mqtt.durable_queue_type", "ssl_options.versions.1", "web_mqtt.ssl.verify", "listeners.ssl.default"):
        assert key in supported, key
    assert "ssl_options" in supported
    for key in ("mqtt.durable_queue_types", "ssl_options.versions", "web_mqtt.ssl", "verify", "mqtt.listeners.ssl.a.b"):
        assert key not in supported, key


@pytest.mark.parametrize("file", CONF, ids=lambda file: file.name)
def test_the_broker_knows_every_key(supported: KnownKeys, file: Path) -> None:
    """In each file of ``rabbitmq/``."""
    keys = keys_of(file)
    assert keys
    assert [key for key in keys if key not in supported] == [], (
        f"RabbitMQ {supported.version} does not start with these"
    )
    assert len(keys) == len(set(keys))


def _table() -> dict[str, str]:
    """Return the keys of the table in README.md, with the version that introduced them."""
    text = (RABBITMQ_FILES / "README.md").read_text(encoding="utf-8")
    section = text.split("## Which setting exists from which version\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {key: row[1].strip() for row in rows for key in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize("file", CONF, ids=lambda file: file.name)
def test_the_version_of_every_key_is_told(file: Path) -> None:
    """In the table of README.md, by name or as part of a family (``auth_http.ssl_options.*``)."""
    patterns = [re.compile(re.escape(name).replace(r"\*", ".+")) for name in _table()]
    assert [key for key in keys_of(file) if not any(p.fullmatch(key) for p in patterns)] == []


def test_the_table_tells_of_keys_that_there_are(supported: KnownKeys) -> None:
    """Each of its names is a key of this broker, or a family of keys that one of the files sets."""
    shipped = {key for file in CONF for key in keys_of(file)}
    families = {name: re.compile(re.escape(name).replace(r"\*", ".+")) for name in _table()}
    assert families
    wrong = [
        name
        for name, pattern in families.items()
        if not (name in supported or any(pattern.fullmatch(key) for key in shipped))
    ]
    assert wrong == []


@pytest.fixture
def spare(workplace: Path, certificates: Certificates) -> Iterator[Broker]:
    """A separate node on separate ports, not prepared yet."""
    state = workplace / "spare"
    state.mkdir()
    ports = workplace / "90-ports.conf"
    ports.write_text(
        f"listeners.ssl.default = {PORTS.amqp_tls}\n"
        f"mqtt.listeners.ssl.default = {PORTS.mqtt_tls}\n"
        f"management.ssl.port = {PORTS.management_tls}\n"
    )
    node = Broker(Path(ROOT), state, certificates, "spare", PORTS, [ports])
    yield node
    node.close()
    node.remove()


def _with(node: Broker, file: Path) -> None:
    """Install a file as described in README.md, with its plugin, and with free ports."""
    text = file.read_text(encoding="utf-8")
    for port, other in OTHER_PORTS.items():
        text = text.replace(port, other)
    copy = node.state.with_name("copies") / file.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(text, encoding="utf-8")
    if file.name.endswith(".advanced.config"):
        node.advanced = copy
    else:
        node.overlays = [*node.overlays, copy]
    node.plugins = [PLUGINS[file.name]] if file.name in PLUGINS else []
    node.prepare()


@pytest.mark.parametrize("file", [f for f in OPTIONAL if f.name != "cluster.conf"], ids=lambda file: file.name)
def test_a_node_starts_with_each_optional_file(spare: Broker, file: Path) -> None:
    """Each file alone and unchanged. (test_cluster starts three nodes with cluster.conf.)"""
    _with(spare, file)
    spare.start()
    listeners = spare.control("eval", "[element(3, L) || L <- rabbit_networking:node_listeners(node())].")
    assert "'mqtt/ssl'" in listeners
    assert ("'https/web-mqtt'" in listeners) == file.name.startswith("web-mqtt")
    assert "'http/web-mqtt'" not in listeners


def test_a_node_does_not_start_with_a_key_that_it_does_not_know(spare: Broker, workplace: Path) -> None:
    """The log names the key, as it does on an older node with a newer key."""
    newer = workplace / "newer.conf"
    newer.write_text("web_mqtt.ssl.not_yet = true\n")
    _with(spare, newer)
    with pytest.raises(HarnessError, match="failed_to_prepare_configuration"):
        spare.start()
    text = "".join(log.read_text(errors="replace") for log in spare.logs if log.exists())
    assert "web_mqtt.ssl.not_yet" in text


def test_the_form_for_older_nodes_asks_for_a_certificate(spare: Broker, certificates: Certificates) -> None:
    """``web-mqtt.advanced.config`` has no key newer than the plugin, and closes the same listeners."""
    _with(spare, RABBITMQ_FILES / "conf.d-optional/web-mqtt.advanced.config")
    spare.start()
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert _asked(certificates.device("APM0001").context(), request).startswith(b"HTTP/1.1 404 ")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        _asked(anonymous_context(certificates.ca_file), request)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, 15675), timeout=5).close()


def _asked(context: ssl.SSLContext, request: bytes) -> bytes:
    with socket.create_connection((HOST, PORTS.web_mqtt_tls), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            tls.sendall(request)
            return tls.recv(100)
