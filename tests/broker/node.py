"""Runs a RabbitMQ node in a chroot, with the files of ``rabbitmq/``."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .identities import Certificates
from .mounts import mount, remove_tree
from .processes import HarnessError, Process

REPOSITORY = Path(__file__).resolve().parents[2]
RABBITMQ_FILES = REPOSITORY / "rabbitmq"
BOOT_TIMEOUT_S = 90.0
_DEVICES = {"null": (1, 3), "zero": (1, 5), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}


@dataclass(frozen=True, slots=True)
class Doors:
    """The ports of a node; 0 if it has no such listener."""

    amqp_tls: int = 5671
    mqtt_tls: int = 8883
    management_tls: int = 15671
    mqtt_plain: int = 0
    web_mqtt_tls: int = 0
    stream_tls: int = 0
    distribution: int = 25672


STRICT = Doors()
"""The node with the files of ``rabbitmq/`` as they are."""

LAX = Doors(
    amqp_tls=5771,
    mqtt_tls=8983,
    management_tls=15771,
    mqtt_plain=1883,
    web_mqtt_tls=15676,
    stream_tls=5551,
    distribution=25673,
)
"""The second node: with ``overlay/plain.conf``, the optional plain MQTT and WebSocket doors, and streams."""


@dataclass(slots=True)
class Broker:
    """
    A RabbitMQ node in a chroot, with the files of ``rabbitmq/`` in its /etc/rabbitmq.

    The root is mounted read-only; the node writes to ``state`` (a tmpfs), which disappears with the namespaces.

    Attributes:
        root: Output of ``tools/rabbitmq-root``.
        state: An existing empty directory.
        certificates: The files for /etc/rabbitmq/certs.
        name: The node's name before the @.
        doors: Its ports, for clients; must match the configuration files.
        overlays: Additional files for /etc/rabbitmq/conf.d.
        advanced: The file for /etc/rabbitmq/advanced.config.
        plugins: Plugins to enable in addition to those of ``rabbitmq/enabled_plugins``.
        cookie: The Erlang cookie, the same for all nodes of a cluster; a new one by default.
    """

    root: Path
    state: Path
    certificates: Certificates
    name: str = "rabbit"
    doors: Doors = STRICT
    overlays: Sequence[Path] = ()
    advanced: Path = RABBITMQ_FILES / "advanced.config"
    plugins: Sequence[str] = ()
    cookie: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)
    _process: Process | None = field(default=None, init=False)
    _epmd: Process | None = field(default=None, init=False)

    @property
    def chroot(self) -> Path:
        """Where the root is mounted."""
        return self.state / "root"

    @property
    def logs(self) -> tuple[Path, ...]:
        """The node's log and its console output."""
        return (self.state / "log" / f"{self.name}@localhost.log", self.state / "console.log")

    def prepare(self) -> None:
        """
        Mount the root and install the files; call it once, before the first start.

        Raises:
            HarnessError: A mount failed, usually because ``tools/test-broker`` was not used.
        """
        mount("-t", "tmpfs", "-o", "mode=755,size=2g", "authbackend-test", self.state)
        writable = {
            "etc": self.chroot / "etc/rabbitmq",
            "lib": self.chroot / "var/lib/rabbitmq",
            "log": self.chroot / "var/log/rabbitmq",
            "tmp": self.chroot / "tmp",
        }
        for place in [self.chroot, *(self.state / name for name in writable)]:
            place.mkdir(mode=0o755)
        self._write_files(self.state / "etc")
        mount("--bind", self.root, self.chroot)
        mount("-o", "remount,bind,ro", self.chroot)
        for name, target in writable.items():
            mount("--bind", self.state / name, target)
        mount("--bind", self.state / "etc/hosts", self.chroot / "etc/hosts")
        mount("-t", "proc", "proc", self.chroot / "proc")
        # Never the machine's /dev: the directory is removed later, with everything that is mounted below it.
        mount("-t", "tmpfs", "-o", "mode=755,size=1m", "authbackend-test-dev", self.chroot / "dev")
        for name, (major, minor) in _DEVICES.items():
            node = self.chroot / "dev" / name
            os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(major, minor))
            node.chmod(0o666)
        (self.chroot / "dev/fd").symlink_to("/proc/self/fd")

    def _write_files(self, etc: Path) -> None:
        for file in ("rabbitmq.conf", "rabbitmq-env.conf"):
            shutil.copy(RABBITMQ_FILES / file, etc / file)
        shutil.copy(self.advanced, etc / "advanced.config")
        enabled = (RABBITMQ_FILES / "enabled_plugins").read_text()
        (etc / "enabled_plugins").write_text(enabled.replace("].", "".join(f",{p}" for p in self.plugins) + "]."))
        (etc / "conf.d").mkdir()
        for overlay in self.overlays:
            shutil.copy(overlay, etc / "conf.d" / overlay.name)
        (etc / "certs").mkdir()
        for name in (
            "ca.pem",
            "internal-ca.pem",
            "rabbitmq.pem",
            "rabbitmq.key",
            "broker-client.pem",
            "broker-client.key",
        ):
            shutil.copy(self.certificates.directory / name, etc / "certs" / name)
        (etc / "hosts").write_text("127.0.0.1 localhost authbackend\n::1 localhost\n")
        cookie = self.state / "lib/.erlang.cookie"
        cookie.write_text(self.cookie)
        cookie.chmod(0o400)
        user, group = self._user()
        for place in ("etc", "lib", "log", "tmp"):
            for path in [self.state / place, *(self.state / place).rglob("*")]:
                os.chown(path, user, group)

    def _user(self) -> tuple[int, int]:
        for line in (self.root / "etc/passwd").read_text().splitlines():
            parts = line.split(":")
            if parts[0] == "rabbitmq":
                return int(parts[2]), int(parts[3])
        raise HarnessError(f"no user rabbitmq in {self.root}: build it again with tools/rabbitmq-root")

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": "/var/lib/rabbitmq",
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "RABBITMQ_NODENAME": f"{self.name}@localhost",
            # In addition to rabbitmq-env.conf: schedulers that busy-wait take CPU time from other processes.
            "ERL_ZFLAGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_DIST_PORT": str(self.doors.distribution),
        }

    def _command(self, program: str, *arguments: str) -> list[str | Path]:
        user, group = self._user()
        server = next((self.root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*"))
        path = f"/{server.relative_to(self.root)}/sbin/{program}" if program.startswith("rabbit") else program
        return ["chroot", f"--userspec={user}:{group}", self.chroot, path, *arguments]

    def start(self) -> None:
        """
        Start the node and wait until it logs that all plugins have started.

        Raises:
            HarnessError: It did not within 90 s; the message ends with its last output.
        """
        if self._epmd is None or not self._epmd.running:
            # A node that starts epmd itself leaves it running. One serves all nodes; a second one exits.
            self._epmd = Process(self._command("epmd"), self.state / "epmd.log", self._environment())
        self._process = Process(self._command("rabbitmq-server"), self.state / "console.log", self._environment())
        self._process.wait_for_line("completed with", BOOT_TIMEOUT_S)

    def stop(self) -> None:
        """Stop the node cleanly; its data stays for the next start."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @property
    def pid(self) -> int:
        """The process id of the command that started the node, in whose session all of its processes are."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the node, as in a crash."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def close(self) -> None:
        """Stop the node and its epmd."""
        self.stop()
        if self._epmd is not None:
            self._epmd.stop()
            self._epmd = None

    def remove(self) -> None:
        """Unmount and remove all files of a closed node, so that another can be prepared in its place."""
        remove_tree(self.state)

    def control(self, *arguments: str) -> str:
        """
        Run ``rabbitmqctl`` on the node, which takes about a second, and return its output.

        Raises:
            HarnessError: It failed; the message contains its output.
        """
        command = self._command("rabbitmqctl", "--quiet", *arguments)
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HarnessError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout
