"""What a load test does: one value, made by the command line, handed to every process."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STEPS = ("handshake", "login", "subscribe", "publish")
"""How far a device goes, in order: TLS handshake, CONNACK, SUBACK, PUBACK."""

SUBSCRIBE = "fleet/{device_id}/commands/#"
PUBLISH = "fleet/{device_id}/telemetry/speed"
CERTIFICATES = "devices"
DEVICES_FILE = "devices.csv"
CA_FILE = "ca.pem"


class LoadError(Exception):
    """The load test cannot run as asked; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """
    One device.

    Attributes:
        device_id: also the common name of its certificate.
        certificate_file: certificate and private key, PEM.
        active: whether the broker should let it in.
    """

    device_id: str
    certificate_file: str
    active: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What every device does, and when.

    Attributes:
        host: name or address of the broker; connections go to its first address.
        port: of MQTT over TLS.
        ca_file: authority of the broker's certificate, PEM; empty trusts any broker.
        server_name: what must be in the broker's certificate; the host if empty.
        tls_version: ``1.2`` or ``1.3`` for just that one; empty lets the broker choose.
        version: 4 is MQTT 3.1.1, 5 is 5.0.
        keep_alive_s: MQTT's keep-alive; a PINGREQ is sent after three quarters of it. 0 sends none.
        clean: start without a session of before.
        session_expiry_s: how long a session outlives its connection, MQTT 5 only.
        client_id: with ``{device_id}``.
        subscribe: topic filters with ``{device_id}``, in one SUBSCRIBE.
        subscribe_qos: 0 or 1.
        publish: topics with ``{device_id}`` and ``{n}``, the number of the device's publish; used in turn.
        publish_qos: 0 or 1.
        publishes: how many in each cycle.
        interval_s: time between two publishes of a connected device after its cycle; 0 sends none.
        payload_bytes: size of each message.
        until: the last step of a cycle, one of :data:`STEPS`.
        rate_per_s: cycles begun in a second, by the whole fleet; 0 begins all at once.
        ramp_s: time in which the rate grows from nothing to ``rate_per_s``.
        in_flight: cycles not finished at a time, by the whole fleet; 0 is no limit.
        retry_delay_s: time until a failed cycle is tried again, half as much more or less by chance.
        timeout_s: longest wait for each answer.
        sources: local addresses to connect from, in turn; each has room for about 28,000 connections.
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
        """Return whether a cycle has this step."""
        return STEPS.index(step) <= STEPS.index(self.until)

    def begins_after_s(self, place: int) -> float:
        """
        Return when the device at a place of the fleet begins, counted from the beginning of all.

        While the rate grows evenly to its full height, rate times t squared over two ramps have begun after t.
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
    """Return a topic, a filter or a client id of a device."""
    return template.replace("{device_id}", device_id).replace("{n}", str(number))


def read_identities(directory: Path, count: int | None = None, skip: int = 0) -> list[Identity]:
    """
    Read the devices that ``authbackend-load certificates`` made.

    Args:
        count: as many; None is all.
        skip: leave out so many at the beginning.
    Raises:
        LoadError: there is no such directory, a certificate is missing, or there are fewer.
    """
    file = directory / DEVICES_FILE
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise LoadError(
            f"{file}: {error.strerror}. Make certificates first: authbackend-load certificates {directory}"
        ) from error
    wanted = rows[skip:] if count is None else rows[skip : skip + count]
    if not wanted or (count is not None and len(wanted) < count):
        raise LoadError(
            f"{file} has {len(rows)} devices, wanted are {skip + (count or 1)}: authbackend-load certificates"
            f" {directory} --count {skip + (count or 1)}"
        )
    folder = directory / CERTIFICATES
    present = {path.name for path in folder.glob("*.pem")}
    identities = [_identity(folder, row) for row in wanted]
    for identity in identities:
        if Path(identity.certificate_file).name not in present:
            raise LoadError(
                f"{identity.certificate_file} is missing; make it: authbackend-load certificates {directory}"
            )
    return identities


def _identity(folder: Path, row: dict[str, str]) -> Identity:
    device_id = row["device_id"]
    return Identity(device_id, str(folder / f"{device_id}.pem"), row.get("status") in ("", None, "active"))


def share(identities: Sequence[Identity], index: int, count: int) -> list[Identity]:
    """Return the part of one of ``count`` processes or machines: every ``count``-th device, beginning at ``index``."""
    return list(identities[index::count])
