"""The plan of a load test: one value, built from the command line and passed to every process."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STEPS = ("handshake", "login", "subscribe", "publish")
"""The steps of a cycle, in order; they end with the TLS handshake, CONNACK, SUBACK and PUBACK."""

SUBSCRIBE = "fleet/{device_id}/commands/#"
PUBLISH = "fleet/{device_id}/telemetry/speed"
CERTIFICATES = "devices"
DEVICES_FILE = "devices.csv"
CA_FILE = "ca.pem"


class LoadError(Exception):
    """The load test cannot run; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """
    A device and its certificate.

    Attributes:
        device_id: Also the common name of its certificate.
        certificate_file: Certificate and private key, PEM.
        active: Whether the broker must let it in; if not, the broker must refuse it.
    """

    device_id: str
    certificate_file: str
    active: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What every device does, and when.

    Attributes:
        host: Name or address of the broker; devices connect to its first address.
        port: The broker's port for MQTT over TLS.
        ca_file: Authority of the broker's certificate, PEM; empty: accept any certificate.
        server_name: The name that must be in the broker's certificate; empty: the host.
        tls_version: ``1.2`` or ``1.3`` for only that version; empty: the broker chooses.
        version: 4 is MQTT 3.1.1, 5 is 5.0.
        keep_alive_s: MQTT's keep-alive; a PINGREQ is sent after three quarters of it. 0: none.
        clean: Start without an earlier session.
        session_expiry_s: How long a session outlives its connection, MQTT 5 only.
        client_id: May contain ``{device_id}``.
        subscribe: Topic filters, which may contain ``{device_id}``, in one SUBSCRIBE.
        subscribe_qos: 0 or 1.
        publish: Topics, used in turn; may contain ``{device_id}`` and ``{n}``, the number of the device's publish.
        publish_qos: 0 or 1.
        publishes: Number of publishes in each cycle.
        interval_s: Time between two publishes of a connected device after its cycle; 0: no publishes.
        payload_bytes: Size of each message.
        until: The last step of a cycle, one of :data:`STEPS`.
        rate_per_s: Cycles started per second, by the whole fleet; 0: all at the same time.
        ramp_s: Time in which the rate grows from 0 to ``rate_per_s``.
        in_flight: Limit of unfinished cycles of the whole fleet; 0: none.
        retry_delay_s: Time before a failed cycle is retried, plus or minus up to half of it at random.
        timeout_s: Longest wait for each answer.
        sources: Local addresses to connect from, in turn; each allows about 28,000 connections.
    """

    host: str = "localhost"
    port: int = 8883
    ca_file: str = ""
    server_name: str = ""
    tls_version: str = ""
    version: int = 5
    keep_alive_s: int = 60
    clean: bool = True
    session_expiry_s: int = 0
    client_id: str = "{device_id}"
    subscribe: tuple[str, ...] = (SUBSCRIBE,)
    subscribe_qos: int = 1
    publish: tuple[str, ...] = (PUBLISH,)
    publish_qos: int = 1
    publishes: int = 1
    interval_s: float = 0.0
    payload_bytes: int = 64
    until: str = "publish"
    rate_per_s: float = 0.0
    ramp_s: float = 0.0
    in_flight: int = 0
    retry_delay_s: float = 1.0
    timeout_s: float = 30.0
    sources: tuple[str, ...] = field(default=())

    def goes_to(self, step: str) -> bool:
        """Return whether a cycle includes this step."""
        return STEPS.index(step) <= STEPS.index(self.until)

    def begins_after_s(self, place: int) -> float:
        """
        Return when the device at this place of the fleet begins, in seconds after the fleet does.

        While the rate grows linearly, rate * t² / (2 * ramp) devices have begun after t seconds.
        """
        if not self.rate_per_s:
            return 0.0
        in_the_ramp = self.rate_per_s * self.ramp_s / 2
        if place < in_the_ramp:
            return math.sqrt(2 * self.ramp_s * place / self.rate_per_s)
        return self.ramp_s + (place - in_the_ramp) / self.rate_per_s

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return asdict(self)


def fill(template: str, device_id: str, number: int = 0) -> str:
    """Return a device's topic, filter or client id, with the placeholders filled in."""
    return template.replace("{device_id}", device_id).replace("{n}", str(number))


def read_identities(directory: Path, count: int | None = None, skip: int = 0) -> list[Identity]:
    """
    Read the devices that ``authbackend-load certificates`` made.

    Args:
        count: How many to return; None: all.
        skip: How many to skip at the beginning.
    Raises:
        LoadError: There is no such directory, a certificate is missing, or there are too few devices.
    """
    file = directory / DEVICES_FILE
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise LoadError(
            f"{file}: {error.strerror}. Make certificates first: authbackend-load certificates {directory}"
        ) from error
    selected = rows[skip:] if count is None else rows[skip : skip + count]
    if not selected or (count is not None and len(selected) < count):
        raise LoadError(
            f"{file} has only {len(rows)} of {skip + (count or 1)} devices; make more: authbackend-load certificates"
            f" {directory} --count {skip + (count or 1)}"
        )
    folder = directory / CERTIFICATES
    existing = {path.name for path in folder.glob("*.pem")}
    identities = [_identity(folder, row) for row in selected]
    for identity in identities:
        if Path(identity.certificate_file).name not in existing:
            raise LoadError(
                f"{identity.certificate_file} is missing; make it: authbackend-load certificates {directory}"
            )
    return identities


def _identity(folder: Path, row: dict[str, str]) -> Identity:
    device_id = row["device_id"]
    return Identity(device_id, str(folder / f"{device_id}.pem"), row.get("status") in ("", None, "active"))


def share(identities: Sequence[Identity], index: int, count: int) -> list[Identity]:
    """Return the share of one of ``count`` processes or machines: every ``count``-th device, beginning at ``index``."""
    return list(identities[index::count])
