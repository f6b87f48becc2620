"""haproxy in front of two replicas, with the settings of ``deploy/haproxy.cfg``."""

from __future__ import annotations

import csv
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from .node import REPOSITORY
from .processes import HarnessError, Process
from .service import Service

DEPLOYED = REPOSITORY / "deploy/haproxy.cfg"
COMMANDS = "haproxy.sock"
_SECTIONS = ("global", "defaults", "listen authbackend")


def start(directory: Path, replicas: Sequence[Service]) -> Process:
    """Listen on 127.0.0.1:8080, where RabbitMQ sends its requests, and forward them to the replicas."""
    file = directory / "haproxy.cfg"
    commands = f"global\n    stats socket {directory / COMMANDS} mode 600\n"
    file.write_text(_configuration(replicas).replace("global\n", commands, 1))
    return Process(["haproxy", "-db", "-f", file], directory / "haproxy.log", {"PATH": "/usr/sbin:/usr/bin"})


def servers_up(directory: Path) -> int:
    """Return the number of replicas that it forwards requests to."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(directory / COMMANDS))
        asking.sendall(b"show stat\n")
        answer = b""
        while part := asking.recv(65536):
            answer += part
    rows = csv.DictReader(answer.decode().removeprefix("# ").splitlines())
    return sum(row["svname"] not in ("FRONTEND", "BACKEND") and row["status"].startswith("UP") for row in rows)


def _configuration(replicas: Sequence[Service]) -> str:
    """Return the deployment's configuration for the listener for RabbitMQ, with the names and ports of the tests."""
    sections = re.split(r"(?m)^(?=[a-z])", DEPLOYED.read_text())
    text = "".join(section for section in sections if section.startswith(_SECTIONS))
    for pattern, replacement in (
        (r"(?m)^ *default-server resolvers .*$", ""),  # there is no name to resolve
        (r"bind :8080\b", "bind 127.0.0.1:8080"),
        *(
            (rf"server (\w+) authbackend{n}:8080", rf"server \1 127.0.0.1:{each.broker_port} port {each.health_port}")
            for n, each in enumerate(replicas, 1)
        ),
    ):
        text, count = re.subn(pattern, replacement, text)
        if count != 1:
            raise HarnessError(f"{DEPLOYED}: {pattern} fits {count} lines")
    return text
