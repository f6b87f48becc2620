"""Runs the service as a separate process, and its database."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support.postgres import DEFAULT_VERSION, SUPERUSER, ProgramFailed, Server

from .identities import Certificates
from .processes import HarnessError, Process, tail

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 30.0


class Database:
    """A PostgreSQL server for the tests, on a Unix socket."""

    NAME = "postgres"

    def __init__(self, version: str = DEFAULT_VERSION) -> None:
        self.server = Server(version)
        self.server.create()
        self.server.start()

    def dsn_of(self, role: str = SUPERUSER) -> str:
        """Return the connection URI for a role."""
        return self.server.dsn(self.NAME, role)

    def sql(self, statement: str, role: str = SUPERUSER) -> str:
        """
        Run SQL with psql, as a security team would, in one transaction; return its output.

        Raises:
            HarnessError: PostgreSQL refused it; the message is PostgreSQL's.
        """
        options = ["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.NAME, "-U", role]
        try:
            return self.server.run("psql", *options, "-c", statement).strip()
        except ProgramFailed as error:
            raise HarnessError(str(error)) from None


class Service:
    """
    A process of ``authbackend serve``.

    The command is ``python -m authbackend``, or that in AUTHBACKEND_TEST_COMMAND.

    Args:
        dsn: Connection URI of the service's role.
        admin_dsn: Connection URI of the role that edits the registry, for all commands but ``serve``.
        broker_port: Port for RabbitMQ; 8080 unless there is a balancer in front.
    """

    def __init__(
        self,
        directory: Path,
        certificates: Certificates,
        dsn: str,
        admin_dsn: str,
        *,
        broker_port: int = 8080,
        health_port: int = 8082,
    ) -> None:
        self.log = directory / f"authbackend-{broker_port}.log"
        self.name = f"authbackend-{broker_port}"
        self.broker_port = broker_port
        self.health_port = health_port
        self._command = os.environ.get("AUTHBACKEND_TEST_COMMAND", f"{sys.executable} -m authbackend").split()
        self._process: Process | None = None
        keep = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
        files = certificates.directory
        self._ca_file = certificates.ca_file
        self._dsns = (dsn, admin_dsn)
        self._environment = keep | {
            "AUTHBACKEND_BROKER__LISTEN": f"127.0.0.1:{broker_port}",
            "AUTHBACKEND_BROKER__TLS__CERTIFICATE_FILE": str(files / "authbackend.pem"),
            "AUTHBACKEND_BROKER__TLS__KEY_FILE": str(files / "authbackend.key"),
            "AUTHBACKEND_BROKER__TLS__CLIENT_CA_FILE": str(files / "internal-ca.pem"),
            "AUTHBACKEND_ADMIN__LISTEN": "127.0.0.1:0",
            "AUTHBACKEND_HEALTH__LISTEN": f"127.0.0.1:{health_port}",
            "AUTHBACKEND_REPLICA__NAME": self.name,
        }

    @property
    def url(self) -> str:
        """The URL of health, metrics and CRLs."""
        return f"http://127.0.0.1:{self.health_port}"

    def _environment_for(self, dsn: str) -> dict[str, str]:
        return self._environment | {"AUTHBACKEND_DATABASE__DSN": dsn}

    @property
    def pid(self) -> int:
        """The process id of the parent."""
        assert self._process is not None
        return self._process.pid

    def command(self, *arguments: str | Path, stdin: str | None = None, dsn: str | None = None) -> str:
        """
        Run ``authbackend ARGUMENTS`` as the role that edits, or with ``dsn``; return its standard output.

        Raises:
            HarnessError: The exit status is not 0; the message contains the output.
        """
        command = [*self._command, *arguments]
        done = subprocess.run(
            command,
            env=self._environment_for(dsn or self._dsns[1]),
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

    def configure(self, **settings: str) -> None:
        """Change settings for the next start, named as environment variables without ``AUTHBACKEND_``; empty: default."""
        for name, value in settings.items():
            self._environment.pop(f"AUTHBACKEND_{name}", None)
            if value:
                self._environment[f"AUTHBACKEND_{name}"] = value

    def enforce(self, clusters: str, sweep_interval_s: str = "") -> None:
        """Enforce on these clusters from the next start; on none if empty."""
        password = self.log.with_name("enforcer-password")
        password.write_text("enforcer-password\n")
        self.configure(
            ENFORCEMENT__CLUSTERS=clusters,
            ENFORCEMENT__PASSWORD_FILE=str(password) if clusters else "",
            ENFORCEMENT__CA_FILE=str(self._ca_file) if clusters else "",
            ENFORCEMENT__SWEEP_INTERVAL_S=sweep_interval_s,
        )

    def start(self) -> None:
        """
        Start the service and wait until it is ready.

        Raises:
            HarnessError: It ended, or was not ready within 30 s; the message contains its last output.
        """
        environment = self._environment_for(self._dsns[0])
        self._process = Process([*self._command, "serve"], self.log, environment, REPOSITORY)
        deadline = time.monotonic() + READY_TIMEOUT_S
        why = "no answer"
        while time.monotonic() < deadline and self._process.running:
            why = _get(f"{self.url}/health/ready")
            if why == "":
                return
            time.sleep(0.02)  # Between two polls; there is no event to wait for from outside.
        self._process.stop()
        raise HarnessError(f"authbackend serve is not ready: {why}\n{tail(self.log)}")

    def stop(self) -> None:
        """Stop the service cleanly."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """Kill the service, as in a crash, and record that this replica never answers again."""
        if self._process is not None:
            self._process.kill()
            self._process = None
            self.command("replicas", "forget", self.name)

    def restart(self) -> None:
        """Stop the service and start it again."""
        self.stop()
        self.start()

    def metrics(self) -> str:
        """
        Return the metrics as Prometheus reads them.

        Raises:
            HarnessError: The status is not 200; the message contains the answer and the end of the log.
        """
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
                body: bytes = answer.read()
                return body.decode()
        except urllib.error.HTTPError as error:
            raise HarnessError(f"{error}: {error.read().decode()}\n{tail(self.log)}") from None

    def count(self, name: str, **labels: str) -> int:
        """Return the sum of a counter's series with these labels; 0 if there are none."""
        return int(
            sum(
                sample.value
                for family in text_string_to_metric_families(self.metrics())
                for sample in family.samples
                if sample.name == f"{name}_total" and labels.items() <= sample.labels.items()
            )
        )

    def denials(self, **labels: str) -> int:
        """Return the number of denials with these labels (``endpoint``, ``reason``, ``device_type``)."""
        return self.count("authbackend_decisions", verdict="deny", **labels)


def _get(url: str) -> str:
    """Return an empty text if the status is 200, otherwise the cause."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode(errors='replace')[:500]}"
    except OSError as error:
        return str(error)
