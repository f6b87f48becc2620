"""The load generator with a real broker and service: the verdicts are correct and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from authbackend_load import certificates as load
from authbackend_load.fleet import Fleet
from authbackend_load.plan import Identity, Plan, read_identities
from authbackend_load.run import run

from .fleet import Fleet as Registry
from .identities import Certificates
from .node import Broker

COUNT, REVOKED = 20, 2


@pytest.fixture
async def devices(certificates: Certificates, fleet: Registry, tmp_path: Path) -> list[Identity]:
    """Make certificates and register devices as users do: 18 active ones and two revoked."""
    for name in ("ca.pem", "ca.key"):
        (tmp_path / name).write_bytes((certificates.directory / name).read_bytes())
    load.make(tmp_path, load.device_ids("LOAD", COUNT), device_type="LOAD", revoked=REVOKED)
    await fleet.command("policy", "apply", str(tmp_path / "policy.yaml"), "--devices", str(tmp_path / "devices.csv"))
    return read_identities(tmp_path)


def _plan(broker: Broker, certificates: Certificates, **changes: object) -> Plan:
    values: dict[str, object] = {"port": broker.doors.mqtt_tls, "ca_file": str(certificates.ca_file), **changes}
    return Plan(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [4, 5])
async def test_the_fleet_comes_back_and_the_revoked_stay_out(
    broker: Broker, certificates: Certificates, fleet: Registry, devices: list[Identity], version: int
) -> None:
    del fleet
    result = run(_plan(broker, certificates, version=version), devices, reconnects=1, time_limit_s=60)
    assert [(storm["name"], storm["complete"]) for storm in result["storms"]] == [("connect", 18), ("reconnect", 18)]
    assert result["failures"] == {}
    assert result["counts"]["rightly_refused"] >= 2 * REVOKED
    assert "wrongly_let_in" not in result["counts"]
    assert "wrongly_refused" not in result["counts"]


async def test_a_refused_publish_is_counted_as_refused(
    broker: Broker, certificates: Certificates, fleet: Registry, devices: list[Identity]
) -> None:
    denied = fleet.service.denials(reason="no_rule_allows")
    plan = _plan(broker, certificates, publish=("somebody/else",), retry_delay_s=0.2)
    with Fleet(plan, devices[:2]) as generator:
        generator.storm(3)
        generator.stop()
    assert set(generator.record.failures) == {"puback: closed by the broker"}
    assert generator.record.counts["wrongly_refused"] == fleet.service.denials(reason="no_rule_allows") - denied
