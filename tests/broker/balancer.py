"""haproxy in front of two replicas, with the settings of ``deploy/haproxy.cfg``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .node import REPOSITORY
from .processes import HarnessError, Process
from .service import Service

DEPLOYED = REPOSITORY / "deploy/haproxy.cfg"
_SECTIONS = ("global", "defaults", "listen authbackend")


def start(directory: Path, replicas: Sequence[Service]) -> Process:
    """Listen on 127.0.0.1:8080, where RabbitMQ asks, and pass on to the replicas."""
    file = directory / "haproxy.cfg"
    file.write_text(_configuration(replicas))
    return Process(["haproxy", "-db", "-f", file], directory / "haproxy.log", {"PATH": "/usr/sbin:/usr/bin"})


def _configuration(replicas: Sequence[Service]) -> str:
    """What the deployment says about this service's door; only names and ports are those of the tests."""
    sections = re.split(r"(?m)^(?=[a-z])", DEPLOYED.read_text())
    text = "".join(section for section in sections if section.startswith(_SECTIONS))
    for pattern, replacement in (
        (r"(?m)^ *default-server resolvers .*$", ""),  # there is no name to look up
        (r"bind :8080\b", "bind 127.0.0.1:8080"),
        *(
            (rf"server (\w+) authbackend{n}:8080", rf"server \1 127.0.0.1:{each.broker_port} port {each.admin_port}")
            for n, each in enumerate(replicas, 1)
        ),
    ):
        text, count = re.subn(pattern, replacement, text)
        if count != 1:
            raise HarnessError(f"{DEPLOYED}: {pattern} fits {count} lines")
    return text
