"""Runs a benchmark in its own namespaces, so that it cannot collide with other processes and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
# A loopback interface is down in a new namespace. Its addresses 127.0.0.x have about 28,000 ports each.
_LOOPBACK_UP = (
    'import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))'
)


class CannotRun(Exception):
    """The benchmark cannot run; the message says why, and what to do."""


def run_inside(module: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    Run ``python -m MODULE OPTIONS RESULT``, both JSON files, and return the result. Needs root.

    Raises:
        CannotRun: It could not run; what failed is on standard error.
    """
    if os.geteuid() != 0:
        raise CannotRun(f"{module} needs root, for its own network namespace: run it with sudo")
    root = _rabbitmq_root()
    with tempfile.TemporaryDirectory(prefix="authbackend-bench-") as place:
        request, result = Path(place) / "options.json", Path(place) / "result.json"
        request.write_text(json.dumps(options))
        environment = os.environ | {
            "AUTHBACKEND_TEST_RABBITMQ_ROOT": root,
            "AUTHBACKEND_TEST_OUTSIDE": str(Path("/proc/self/ns/mnt").readlink()),
        }
        inside = f'"$0" -c \'{_LOOPBACK_UP}\' && exec "$0" -m {module} "$@"'
        command = ["bash", "-c", inside, sys.executable, str(request), str(result)]
        namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
        done = subprocess.run([*namespaces, *command], cwd=REPOSITORY, env=environment, check=False)
        if done.returncode != 0 or not result.exists():
            raise CannotRun(f"{module} exited with status {done.returncode}; see its messages above")
        values: dict[str, Any] = json.loads(result.read_text())
        return values


def _rabbitmq_root() -> str:
    done = subprocess.run([REPOSITORY / "tools/rabbitmq-root"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise CannotRun("tools/rabbitmq-root could not provide a RabbitMQ; see its messages above")
    return done.stdout.strip()
