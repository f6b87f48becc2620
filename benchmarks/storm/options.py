"""The options of a storm benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BACKENDS = ("authbackend", "always-allow", "internal")
FAULTS = ("postgres", "worker", "listener", "connections")


@dataclass(frozen=True, slots=True)
class Options:
    """
    The options of a run.

    Attributes:
        devices: Devices in the fleet, each with its own certificate.
        rounds: Storms for each backend, in turn.
        backends: Some of :data:`BACKENDS`.
        processes: Processes of the load generator.
        in_flight: Limit of unfinished cycles; 0: none, the whole fleet connects at the same time.
        tls: Mutual TLS between the broker and the HTTP backends, as in ``rabbitmq/``; otherwise plain HTTP.
        max_sessions: Connections to the backend that httpc keeps; 64 as in ``rabbitmq/``, its default is 2.
        workers: Workers of ``authbackend serve``.
        steps: Also run storms that stop after the handshake, the login and the subscription, for the cost of each step.
        refusals: Also measure refused publishes, with ``mqtt.disconnect_on_unauthorized`` on and off.
        logins: Also measure the broker's logging of logins, with and without ``quiet-logins.conf``.
        faults: Some of :data:`FAULTS`, for storms during faults.
        fault_s: Minimum duration of each fault.
        outage_s: Minimum duration of a PostgreSQL outage.
        revoked: Devices in addition to the fleet that must be refused during the faults.
        time_limit_s: Time limit of each storm.
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
