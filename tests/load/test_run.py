"""``authbackend-load run`` against a fake broker with configurable faults."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from authbackend_load.cli import main
from authbackend_load.fleet import Fleet, Sample
from authbackend_load.plan import Plan, read_identities
from tests.load.broker import FakeBroker

ACTIVE = [f"APM{number:06d}" for number in range(1, 11)]
REVOKED = ["APM000011", "APM000012"]
REFUSED = dict.fromkeys(REVOKED, 0x86)


def invoke(directory: Path, port: int, *options: str) -> Result:
    """Run the command, by default with ``--processes 2``."""
    command = ["run", str(directory), "--port", str(port), "--processes", "2", "--quiet", "--retry-delay", "0.05"]
    return CliRunner().invoke(main, [*command, *options])


def result_of(done: Result) -> dict[str, Any]:
    """Return the JSON that the command printed."""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("mqtt", ["3.1.1", "5"])
@pytest.mark.parametrize("tls", ["1.2", "1.3"])
def test_every_device_connects_subscribes_and_publishes_with_its_own_certificate(
    directory: Path, mqtt: str, tls: str
) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "10", "--mqtt", mqtt, "--tls", tls)
    assert done.exit_code == 0, done.output
    result = result_of(done)
    assert broker.names == dict.fromkeys(ACTIVE, 1)
    assert sorted(broker.topics) == [f"fleet/{device}/telemetry/speed" for device in ACTIVE]
    assert broker.received == {"connect": 10, "subscribe": 10, "publish": 10, "disconnect": 10}
    assert [(one["name"], one["devices"], one["complete"]) for one in result["storms"]] == [("connect", 10, 10)]
    assert result["failures"] == {}
    assert {name: each["count"] for name, each in result["latency_ms"].items()} == dict.fromkeys(
        ["handshake", "connack", "suback", "puback", "cycle"], 10
    )


def test_all_are_cut_at_once_and_come_back(directory: Path) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "10", "--reconnect-all", "2")
    assert done.exit_code == 0, done.output
    result = result_of(done)
    assert [(one["name"], one["complete"]) for one in result["storms"]] == [("connect", 10), *[("reconnect", 10)] * 2]
    assert broker.names == dict.fromkeys(ACTIVE, 3)
    assert broker.received["disconnect"] == 10
    assert result["failures"] == {}


@pytest.mark.parametrize(
    ("until", "sent"), [("handshake", set()), ("login", {"connect"}), ("subscribe", {"connect", "subscribe"})]
)
def test_a_cycle_can_end_early(directory: Path, until: str, sent: set[str]) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "3", "--until", until)
    assert done.exit_code == 0, done.output
    assert set(broker.received) - {"disconnect"} == sent


def test_a_cycle_counts_from_its_planned_start_waiting_for_its_turn_included(directory: Path) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "10", "--processes", "1", "--in-flight", "1")
    result = result_of(done)
    all_s = result["storms"][0]["duration_s"]  # one after the other, although all were planned for the beginning
    assert result["latency_ms"]["cycle"]["max"] == pytest.approx(all_s * 1000, abs=1)


def test_topics_can_be_new_each_time(directory: Path) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "1", "-p", "t/{device_id}/{n}", "--publishes", "3")
    assert done.exit_code == 0, done.output
    assert broker.topics == ["t/APM000001/0", "t/APM000001/1", "t/APM000001/2"]


def test_devices_that_must_be_refused_are_no_failure(directory: Path) -> None:
    with FakeBroker(directory, connack=REFUSED) as broker:
        done = invoke(directory, broker.port)
    assert done.exit_code == 0, done.output
    result = result_of(done)
    assert result["must_be_refused"] == 2
    assert result["counts"]["rightly_refused"] >= 2
    assert result["failures"] == {}


def test_a_revoked_device_that_gets_in_is_told(directory: Path) -> None:
    with FakeBroker(directory, connack={REVOKED[0]: 0x86}) as broker:
        done = invoke(directory, broker.port)
    assert done.exit_code == 1
    assert "1 times, a device that must be refused was let in" in done.stderr
    assert result_of(done)["counts"]["wrongly_let_in"] == 1


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        ({"connack": {"APM000001": 0x87}}, "connack: 0x87 not authorized"),
        ({"suback": {"APM000001": 0x87}}, "suback: 0x87 not authorized"),
        ({"closes_on_publish": frozenset({"APM000001"})}, "puback: closed by the broker"),
    ],
)
def test_a_device_that_is_refused_wrongly_is_told(directory: Path, faults: dict[str, Any], cause: str) -> None:
    """The other devices finish, this one does not; each attempt is counted."""
    with FakeBroker(directory, **faults) as broker:
        done = invoke(directory, broker.port, "--count", "3", "--time-limit", "2")
    assert done.exit_code == 1
    result = result_of(done)
    assert result["storms"][0]["complete"] == 2
    assert list(result["failures"]) == [cause]
    assert result["counts"]["wrongly_refused"] == result["failures"][cause] >= 2
    assert "1 of 3 devices did not finish" in done.stderr


def test_an_answer_that_does_not_come_is_counted_and_no_refusal(directory: Path) -> None:
    with FakeBroker(directory, silent=frozenset({"APM000002"})) as broker:
        done = invoke(directory, broker.port, "--count", "3", "--time-limit", "2", "--timeout", "0.5")
    assert done.exit_code == 1
    result = result_of(done)
    assert list(result["failures"]) == ["puback: no answer in 0.5 s"]
    assert "wrongly_refused" not in result["counts"]


def test_a_broker_that_is_not_there_is_counted(directory: Path) -> None:
    with FakeBroker(directory) as broker:
        port = broker.port
    done = invoke(directory, port, "--count", "3", "--time-limit", "1")
    assert done.exit_code == 1
    assert list(result_of(done)["failures"]) == ["handshake: tcp: connection refused"]


def test_a_broker_with_another_name_is_not_trusted(directory: Path) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "1", "--time-limit", "1", "--server-name", "elsewhere")
    assert done.exit_code == 1
    (cause,) = result_of(done)["failures"]
    assert cause.startswith("handshake: tls: the broker's certificate: Hostname mismatch")


def test_connections_that_the_broker_ends_are_counted_and_come_back(directory: Path) -> None:
    identities = read_identities(directory, 10)
    with FakeBroker(directory) as broker:
        again = threading.Event()

        def look(sample: Sample) -> None:
            if sample.counts["lost"] == 10 and sample.connected == 10:
                again.set()

        plan = Plan(host="127.0.0.1", port=broker.port, ca_file=str(directory / "ca.pem"), retry_delay_s=0.05)
        with Fleet(plan, identities, 2, look) as fleet:
            fleet.storm(20)
            broker.close_all()
            for _ in range(200):
                if again.is_set():
                    break
                fleet.look()
            fleet.stop()
    assert again.is_set()
    assert fleet.record.counts["lost"] == 10
    assert fleet.record.failures.total() == 10
    assert all(cause.startswith("connected: ") for cause in fleet.record.failures)
    assert broker.names == dict.fromkeys(ACTIVE, 2)


def test_connected_devices_publish_and_ping(directory: Path) -> None:
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "2", "--interval", "0.1", "--duration", "1")
        assert done.exit_code == 0, done.output
        assert broker.received["publish"] >= 8
        done = invoke(directory, broker.port, "--count", "2", "--keep-alive", "1", "--duration", "2")
    assert done.exit_code == 0, done.output
    assert broker.received["ping"] >= 2


def test_shares_do_not_overlap(directory: Path) -> None:
    seen = []
    for part in ("1/3", "2/3", "3/3"):
        with FakeBroker(directory, connack=REFUSED) as broker:
            assert invoke(directory, broker.port, "--share", part, "--processes", "1").exit_code == 0
            seen += list(broker.names)
    assert sorted(seen) == [*ACTIVE, *REVOKED]


def test_the_result_is_written_and_drawn(directory: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    with FakeBroker(directory) as broker:
        done = invoke(directory, broker.port, "--count", "3", "--output", str(output), "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert "connect: 3 of 3 devices in" in done.stdout
    assert json.loads(output.read_text())["schema"] == "authbackend-load/1"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "99"], "has only 12 of 99 devices"),
        (["--share", "4/3"], "write it as 2/3"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--ca", "/no/such/file"], "/no/such/file is missing"),
    ],
)
def test_what_cannot_run_says_why(directory: Path, options: list[str], message: str) -> None:
    done = invoke(directory, 1, *options)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_certificate_that_is_broken_is_named(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "fleet")
    broken = tmp_path / "fleet/devices/APM000002.pem"
    broken.write_text("x")
    done = invoke(tmp_path / "fleet", 1, "--count", "3")
    assert done.exit_code == 2
    assert str(broken) in done.stderr
