"""The life of a certificate: enrolled, used, revoked, listed, on the list of the node, and never accepted again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.examples import assert_shown

from .conftest import make_service
from .fleet import Fleet
from .identities import Certificates, Identity
from .mqtt import MQTTClient
from .processes import HarnessError, Process, until
from .revocation import DOORS, Revocable, Tls
from .service import Database
from .test_crl import REVOKED

Clients = Callable[..., MQTTClient]
REVOKE = "authbackend cert revoke --device {} --all --reason keyCompromise --wait"


@pytest.fixture(scope="module")
def chain(workplace: Path, certificates: Certificates, database: Database, fleet: Fleet) -> Iterator[Revocable]:
    """A node that checks CRLs, and a replica that signs them and enforces on the node, without sweeps."""
    replica = make_service(workplace, certificates, database, broker_port=8090, health_port=8091)
    revocable = Revocable(workplace, Path(os.environ["AUTHBACKEND_TEST_RABBITMQ_ROOT"]), certificates, replica, "chain")
    replica.enforce(f"https://localhost:{DOORS.management_tls}", sweep_interval_s="3600")
    replica.configure(
        PKI__AUTHORITY_DIR=str(revocable.ca),
        PKI__PASSPHRASE_FILE=str(revocable.secret),
        ENFORCEMENT__CA_FILE=str(revocable.ca / "ca.pem"),
    )
    try:
        revocable.start()
        yield revocable
    finally:
        revocable.close()
        replica.command("enforcement", "disable")


@pytest.fixture
def reporting(chain: Revocable, database: Database) -> Iterator[Process]:
    """Run ``crl sync --node`` for the node, with the role of that node."""
    database.sql("create role crl_chain login in role authbackend_crl_sync")
    chain.stop_sync()
    yield chain.start_sync(database.dsn_of("crl_chain"))
    chain.stop_sync()
    chain.replica.command("crl", "hosts", "--forget", chain.node_name)
    database.sql("drop role crl_chain")
    chain.start_sync()


async def revoke(chain: Revocable, identity: Identity, *options: str) -> str:
    """Revoke a device's certificate and wait; return the output of the command, also if it fails."""
    command = ("cert", "revoke", "--device", identity.name, "--all", "--reason", "keyCompromise", "--wait", *options)
    try:
        output = "exit status 0\n" + await asyncio.to_thread(chain.replica.command, *command)
    except HarnessError as error:
        output = str(error)
    print(f"$ authbackend {' '.join(command)}\n{output}")
    return output


def assert_documented(output: str, device: str, identity: Identity, options: str = "") -> None:
    """Compare the output of a revocation with the block of docs/certificates.md that revokes this device."""
    first, _, printed = output.partition("\n")
    shown = {REVOKE.format(device) + options: printed, "echo $?": first.rpartition("exit status ")[2]}
    assert_shown("docs/certificates.md", shown, {device: identity.name})


async def test_without_a_report_the_receipt_says_that_the_node_is_not_known_to_check(
    mqtt: Clients, chain: Revocable, fleet: Fleet
) -> None:
    identity = chain.enroll(fleet.device())
    client = mqtt(identity, port=DOORS.mqtt_tls)
    assert await client.connect() == 0
    output = await revoke(chain, identity)
    assert "exit status 8" in output
    assert f"not known to check a revocation list: {chain.node_name}; there it can log in again" in output
    assert f"connections closed: 1 on {chain.node_name}" in output
    assert f"committed, but {chain.node_name} is not known to check a revocation list" in output
    assert_documented(output, "APM1001", identity)
    assert await client.disconnected() is not None


async def test_a_revocation_is_done_when_the_node_has_the_list_and_the_device_stays_out(
    mqtt: Clients, chain: Revocable, reporting: Process, fleet: Fleet
) -> None:
    """While the sync is stopped, the device can reconnect with the certificate, and no output claims otherwise."""
    identity = chain.enroll(fleet.device())
    await until(lambda: chain.node_name in chain.replica.command("crl", "hosts"))
    client = mqtt(identity, port=DOORS.mqtt_tls)
    assert await client.connect() == 0

    os.kill(reporting.pid, signal.SIGSTOP)
    try:
        assert "exit status 8" in await revoke(chain, identity, "--timeout", "1")
        assert await client.disconnected() is not None
        back = mqtt(identity, port=DOORS.mqtt_tls)
        assert await back.connect() == 0
        why = f"is not installed yet on {chain.node_name}"
        await until(lambda: why in chain.replica.command("enforcement", "list", "--state", "open"), 60)
        output = await revoke(chain, identity, "--timeout", "1")
        assert "exit status 8" in output
        assert why in output
        assert " is done" not in output
        assert_documented(output, "APM1002", identity, " --timeout 1")
    finally:
        os.kill(reporting.pid, signal.SIGCONT)

    output = await revoke(chain, identity)
    assert "exit status 0" in output
    assert "revoked already" in output
    assert "is done" in output
    assert f"or a later one is installed on {chain.node_name}" in output
    assert "nothing connected with it was found" in output
    assert await back.disconnected() is not None
    assert Tls(identity).login() == REVOKED
    assert "crl_chain" in chain.replica.command("crl", "hosts")


async def test_a_stolen_device(mqtt: Clients, chain: Revocable, fleet: Fleet) -> None:
    """README.md and docs/enforcement.md show what the command prints."""
    me = fleet.device()
    client = mqtt(chain.enroll(me), port=DOORS.mqtt_tls, clean=False, session_expiry_s=600)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/commands/#") == [1]
    output = await asyncio.to_thread(
        chain.replica.command, "device", "revoke", me, "--reason", "stolen", "--wait", "--timeout", "60"
    )
    print(f"$ authbackend device revoke {me} --reason stolen --wait\n{output}")
    assert await client.disconnected() is not None
    for page in ("README.md", "docs/enforcement.md"):
        assert_shown(page, {"authbackend device revoke APM1003 --reason stolen --wait": output}, {"APM1003": me})


async def test_in_one_go(mqtt: Clients, chain: Revocable, reporting: Process, fleet: Fleet) -> None:
    """The receipt of docs/certificates.md, when the node reports its list."""
    identity = chain.enroll(fleet.device())
    await until(lambda: chain.node_name in chain.replica.command("crl", "hosts"))
    client = mqtt(identity, port=DOORS.mqtt_tls)
    assert await client.connect() == 0
    output = await revoke(chain, identity)
    assert "exit status 0" in output
    assert f"connections closed: 1 on {chain.node_name}" in output
    assert_documented(output, "APM1004", identity)
    assert await client.disconnected() is not None
    assert Tls(identity).login() == REVOKED
