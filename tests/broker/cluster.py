"""A RabbitMQ cluster of three nodes with the files of ``rabbitmq/``, on one loopback interface."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .identities import Certificates
from .node import RABBITMQ_FILES, Broker, Doors
from .processes import HarnessError

NODES = 3


class Cluster:
    """
    Three nodes that form a cluster by ``conf.d-optional/cluster.conf``, with separate names and ports, no balancer.

    Args:
        root: Output of ``tools/rabbitmq-root``.
        workplace: An existing directory.
        prepare: Called with each node before it is prepared, to give it other files.
    """

    def __init__(
        self,
        root: Path,
        workplace: Path,
        certificates: Certificates,
        prepare: Callable[[Broker], None] = lambda _: None,
    ) -> None:
        cookie = secrets.token_hex(20)
        self.nodes: list[Broker] = []
        for number in range(1, NODES + 1):
            name = f"rabbitmq{number}"
            state = workplace / name
            state.mkdir()
            base = 1000 * number
            doors = Doors(5671 + base, 8883 + base, 15671 + base, distribution=25672 + base)
            overlay = workplace / f"{name}.conf"
            overlay.write_text(_overlay(doors))
            node = Broker(root, state, certificates, name, doors, [overlay], cookie=cookie)
            prepare(node)
            node.prepare()
            self.nodes.append(node)

    @property
    def management(self) -> str:
        """The management URLs of all nodes, in the format of ``enforcement.clusters``."""
        return " ".join(f"https://localhost:{node.doors.management_tls}" for node in self.nodes)

    def start(self) -> None:
        """
        Start all nodes and wait until they form one cluster.

        Raises:
            HarnessError: A node did not start, or they did not form a cluster.
        """
        with ThreadPoolExecutor(NODES) as pool:
            list(pool.map(Broker.start, self.nodes))
        running = self.nodes[0].control("eval", "length(rabbit_nodes:list_running()).").strip()
        if running != str(NODES):
            raise HarnessError(f"{running} of {NODES} nodes have joined the cluster")

    def close(self) -> None:
        """Stop and remove all nodes."""
        with ThreadPoolExecutor(NODES) as pool:
            list(pool.map(Broker.close, reversed(self.nodes)))

    def cut_off(self, node: Broker) -> None:
        """Cut the links between a node and the others, like a network partition; it and its clients stay up."""
        self._links(node, "partitioned")

    def join_again(self, node: Broker) -> None:
        """Restore the links."""
        self._links(node, node.cookie)

    def _links(self, node: Broker, cookie: str) -> None:
        # Nodes with different ideas of each other's cookie cannot communicate.
        others = ", ".join(f"'{other.name}@localhost'" for other in self.nodes if other is not node)
        node.control(
            "eval", f"[begin erlang:set_cookie(N, '{cookie}'), erlang:disconnect_node(N) end || N <- [{others}]], ok."
        )


def _overlay(doors: Doors) -> str:
    lines = (RABBITMQ_FILES / "conf.d-optional/cluster.conf").read_text().splitlines()
    kept = [line.replace("rabbit@rabbitmq", "rabbitmq") for line in lines if not line.startswith("mqtt.proxy_protocol")]
    kept = [f"{line}@localhost" if ".nodes." in line else line for line in kept]
    ports = (
        f"listeners.ssl.default = {doors.amqp_tls}",
        f"mqtt.listeners.ssl.default = {doors.mqtt_tls}",
        f"management.ssl.port = {doors.management_tls}",
    )
    return "\n".join((*kept, *ports)) + "\n"
