"""What a run of the benchmark does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BACKENDS = ("authbackend", "always-allow", "internal")
FAULTS = ("postgres", "worker", "listener", "connections")


@dataclass(frozen=True, slots=True)
class Options:
    """
    One run.

    Attributes:
        devices: in the fleet, each with a certificate of its own.
        rounds: storms for each backend, in turn.
        backends: of :data:`BACKENDS`.
        processes: of the load generator.
        in_flight: cycles not finished at a time; 0 lets the whole fleet connect at once.
        tls: mutual TLS between the broker and the HTTP backends, as in ``rabbitmq/``; otherwise plain HTTP.
        max_sessions: connections to the backend that the broker keeps (httpc); 64 as in ``rabbitmq/``, its default is 2.
        workers: processes of ``authbackend serve`` that answer.
        steps: also storms that stop after the handshake, the login and the subscription: what each step costs.
        refusals: also what refused publishes cost, with ``mqtt.disconnect_on_unauthorized`` on and off.
        logins: also what the broker's log lines of logins cost, with ``quiet-logins.conf`` and without.
        faults: of :data:`FAULTS`; storms while something is broken.
        fault_s: how long each fault lasts at least.
        outage_s: how long PostgreSQL is away.
        revoked: devices beside the fleet that must be refused during the faults.
        time_limit_s: for each storm.
    """

    devices: int = 5000
    rounds: int = 3
    backends: tuple[str, ...] = BACKENDS
    processes: int = 1
    in_flight: int = 500
    tls: bool = True
    max_sessions: int = 64
    workers: int = 2
    steps: bool = True
    refusals: bool = True
    logins: bool = False
    faults: tuple[str, ...] = FAULTS
    fault_s: float = 30.0
    outage_s: float = 30.0
    revoked: int = 50
    time_limit_s: float = 300.0

    def as_dict(self) -> dict[str, Any]:
        """Return the options for JSON."""
        return asdict(self)
