"""Starts a real RabbitMQ with the files of ``rabbitmq/``, PostgreSQL, and the authorization backends."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from authbackend_load import certificates
from authbackend_load.plan import Identity, read_identities
from benchmarks.storm import processes
from benchmarks.storm.options import Options
from tests.broker.identities import Certificates
from tests.broker.mounts import remove_tree
from tests.broker.node import REPOSITORY, Broker
from tests.broker.processes import HarnessError, Process
from tests.broker.service import Database, Service

SERVICE_PORT, ALLOW_PORT, RELAY_PORT = 8080, 8090, 8079
_PATHS = ("user", "vhost", "resource", "topic")
_EMPTY_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 30.0


class TunedService(Service):
    """``authbackend serve`` with the options of this run."""

    def tune(self, options: Options) -> None:
        """Apply the options; call it before the start."""
        if not options.tls:
            for name in ("CERTIFICATE_FILE", "KEY_FILE", "CLIENT_CA_FILE"):
                self._environment.pop(f"AUTHBACKEND_BROKER__TLS__{name}")
        if options.workers > 1:
            self._environment["AUTHBACKEND_REPLICA__WORKERS"] = str(options.workers)
        self._environment["AUTHBACKEND_LOG__LEVEL"] = "warning"

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid


class Environment:
    """
    All parts; created by :func:`running_environment`.

    Attributes:
        fleet: Devices that must be let in.
        revoked: Devices that must be refused.
    """

    def __init__(self, options: Options, workplace: Path, broker: Broker, database: Database) -> None:
        self.options = options
        self.workplace = workplace
        self.broker = broker
        self.database = database
        self.certificates = broker.certificates
        identities = read_identities(self.certificates.directory)
        self.fleet: list[Identity] = [each for each in identities if each.active]
        self.revoked: list[Identity] = [each for each in identities if not each.active]
        dsn = database.dsn_of()
        self.service = TunedService(workplace, self.certificates, dsn, dsn, broker_port=SERVICE_PORT)
        self.service.tune(options)
        self.broker_pid = 0
        self._allow: Process | None = None

    def prepare(self) -> None:
        """Register the devices in all backends, and start the backends."""
        directory = self.certificates.directory
        self.service.command("migrate")
        self.service.command("policy", "apply", directory / "policy.yaml", "--devices", directory / "devices.csv")
        self.service.start()
        self._allow = self._python("always_allow", str(ALLOW_PORT), *([str(directory)] if self.options.tls else []))
        self._find_broker()
        if "internal" in self.options.backends:
            self._import_users()

    def _find_broker(self) -> None:
        self.broker_pid = int(self.control("os:getpid()").strip('"'))
        self.control(f"httpc:set_options([{{max_sessions,{self.options.max_sessions}}}])")

    def _python(self, module: str, *arguments: str) -> Process:
        command = [sys.executable, "-m", f"benchmarks.storm.{module}", *arguments]
        process = Process(command, self.workplace / f"{module}.log", dict(os.environ), REPOSITORY)
        process.wait_for_line("ready", _START_TIMEOUT_S)
        return process

    def relay(self, every_s: float) -> Process:
        """Start a relay in front of the service that cuts its connections."""
        return self._python("relay", str(RELAY_PORT), str(SERVICE_PORT), str(every_s))

    def _import_users(self) -> None:
        """Give RabbitMQ's internal backend the same devices with the same permissions."""
        own = {"vhost": "/", "configure": "^mqtt-", "write": "^(mqtt-|amq\\.topic$)", "read": "^(mqtt-|amq\\.topic$)"}
        topic = {"vhost": "/", "exchange": "amq.topic", "write": r"^fleet\.{username}\.telemetry\..*$"}
        topic["read"] = r"^fleet\.{username}\.commands\..*$"
        names = [each.device_id for each in self.fleet]
        definitions = {
            "users": [
                {"name": n, "password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": []}
                for n in names
            ],
            "vhosts": [{"name": "/"}],
            "permissions": [{"user": name, **own} for name in names],
            "topic_permissions": [{"user": name, **topic} for name in names],
        }
        file = self.broker.state / "tmp/definitions.json"
        file.write_text(json.dumps(definitions))
        self.broker.control("--timeout", "600", "import_definitions", "/tmp/definitions.json")  # noqa: S108

    def control(self, *expressions: str) -> str:
        """Evaluate Erlang expressions on the broker and return the value of the last one."""
        return self.broker.control("eval", ", ".join(expressions) + ".").strip()

    def use(self, backend: str, port: int | None = None) -> None:
        """Make the broker use this backend from now on, without a restart."""
        if backend == "internal":
            self.control("application:set_env(rabbit, auth_backends, [rabbit_auth_backend_internal])")
            return
        port = port or (SERVICE_PORT if backend == "authbackend" else ALLOW_PORT)
        url = f"{'https' if self.options.tls else 'http'}://authbackend:{port}/auth"
        self.control(
            "application:set_env(rabbit, auth_backends, [rabbit_auth_backend_http])",
            *(f'application:set_env(rabbitmq_auth_backend_http, {each}_path, "{url}/{each}")' for each in _PATHS),
        )

    def restart_broker(self, conf: Path | None) -> None:
        """Restart the node with or without an additional file in conf.d; it then uses authbackend, as configured."""
        self.broker.stop()
        place = self.broker.state / "etc/conf.d/50-benchmark.conf"
        place.write_text(conf.read_text() if conf else "")
        self.broker.start()
        self._find_broker()

    def wait_until_empty(self) -> None:
        """
        Wait until the broker has forgotten all connections and their queues.

        Raises:
            HarnessError: It has not within two minutes.
        """
        deadline = time.monotonic() + _EMPTY_TIMEOUT_S
        expression = "{length(rabbit_mqtt:local_connection_pids()), rabbit_amqqueue:count()}"
        while (left := self.control(expression)) != "{0,0}":
            if time.monotonic() > deadline:
                raise HarnessError(f"after {_EMPTY_TIMEOUT_S:g} s, the broker still has {left} (connections, queues)")

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds used so far by the broker, the backends and PostgreSQL."""
        postmaster = self.database.server.data / "postmaster.pid"
        assert self._allow is not None
        return {
            "broker": processes.cpu_s([self.broker_pid]),
            "authbackend": processes.cpu_s([self.service.pid]),
            "always-allow": processes.cpu_s([self._allow.pid]),
            "postgresql": processes.cpu_s([int(postmaster.read_text().split()[0])]) if postmaster.exists() else 0.0,
        }

    def log_size(self) -> int:
        """Return the size of the broker's log in bytes."""
        return self.broker.logs[0].stat().st_size

    def log_since(self, begin: int) -> list[str]:
        """Return the lines of the broker's log after this size."""
        return self.broker.logs[0].read_bytes()[begin:].decode(errors="replace").splitlines()

    def versions(self) -> dict[str, Any]:
        """Return the versions of RabbitMQ, Erlang and PostgreSQL."""
        eval_ = 'io_lib:format("~s ~s", [rabbit:product_version(), erlang:system_info(otp_release)])'
        rabbitmq, _, otp = self.control(f"list_to_binary({eval_})").strip('<>"').partition(" ")
        postgresql = self.database.sql("show server_version")
        return {"rabbitmq": rabbitmq, "erlang": otp, "postgresql": postgresql}

    def close(self) -> None:
        """Stop the backends."""
        if self._allow is not None:
            self._allow.stop()
        self.service.stop()


@contextmanager
def running_environment(options: Options) -> Iterator[Environment]:
    """
    Run all parts for the duration of the block.

    Raises:
        HarnessError: A part did not start.
    """
    workplace = Path(tempfile.mkdtemp(prefix="authbackend-storm-"))
    workplace.chmod(0o755)
    try:
        bench = Certificates(workplace / "certs")
        count = options.devices + options.revoked
        ids = certificates.device_ids("APM", count)
        cores = len(os.sched_getaffinity(0))
        certificates.make(bench.directory, ids, device_type="APM", revoked=options.revoked, processes=cores)
        (workplace / "rabbit").mkdir()
        broker = Broker(Path(os.environ["AUTHBACKEND_TEST_RABBITMQ_ROOT"]), workplace / "rabbit", bench)
        broker.prepare()
        database = Database()
        try:
            broker.start()
            environment = Environment(options, workplace, broker, database)
            try:
                environment.prepare()
                yield environment
            finally:
                environment.close()
        finally:
            broker.close()
            database.server.remove()
    finally:
        remove_tree(workplace)
