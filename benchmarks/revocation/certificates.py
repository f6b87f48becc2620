"""Measures how soon a revoked certificate is refused and its connection closed, while its device uses a new one."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.revocation.environment import Device, accounts_file
from tests.broker.identities import Certificates, Identity
from tests.broker.mounts import remove_tree
from tests.broker.revocation import DOORS, VERSIONS, Revocable, Tls
from tests.broker.service import Database, Service

_REVOKED = "SSLV3_ALERT_CERTIFICATE_REVOKED"


def certificates(number: int) -> dict[str, Any]:
    """
    Revoke certificates one after the other, and return the raw times in seconds.

    Raises:
        HarnessError: A part did not start.
        AssertionError: A revoked certificate was accepted, for example with a saved session.
    """
    workplace = Path(tempfile.mkdtemp(prefix="authbackend-certificates-"))
    workplace.chmod(0o755)
    database = Database()
    try:
        bench = Certificates(workplace / "certs")
        dsn = database.dsn_of()
        service = Service(workplace, bench, dsn, dsn)
        replica = Service(workplace, bench, dsn, dsn, broker_port=8090, health_port=8091)
        service.command("migrate")
        service.command("policy", "apply", accounts_file(workplace))
        database.sql(
            "insert into device_type (name, client_ids, vhosts) values ('APM', array['{device_id}', '{device_id}_*'], '{/}');"
            f"insert into device (device_id, type) select 'dev' || n, 'APM' from generate_series(1, {number}) n"
        )
        revocable = Revocable(workplace, Path(os.environ["AUTHBACKEND_TEST_RABBITMQ_ROOT"]), bench, replica)
        replica.configure(PKI__AUTHORITY_DIR=str(revocable.ca), PKI__PASSPHRASE_FILE=str(revocable.secret))
        service.start()
        try:
            revocable.start()
            service.stop()
            (workplace / "enforcer-ca.pem").write_bytes((revocable.ca / "ca.pem").read_bytes())
            service.enforce(f"https://localhost:{DOORS.management_tls}", sweep_interval_s="3600")
            service.configure(ENFORCEMENT__CA_FILE=str(workplace / "enforcer-ca.pem"))
            service.start()
            return asyncio.run(_measure(revocable, number))
        finally:
            revocable.close()
            service.stop()
    finally:
        database.server.remove()
        remove_tree(workplace)


async def _measure(revocable: Revocable, number: int) -> dict[str, Any]:
    refused, closed = [], []
    dropped = 0
    for n in range(1, number + 1):
        name = f"dev{n}"
        old = revocable.enroll(name)
        serial = revocable.replica.command("cert", "list", "--device", name).splitlines()[1].split()[0]
        new = revocable.enroll(name)
        with_old = await _device(old).connect(client_id=f"{name}_old")
        with_new = await _device(new).connect(client_id=f"{name}_new")
        saved = {version: Tls(old, version) for version in VERSIONS}
        for client in saved.values():
            assert await asyncio.to_thread(client.login) == "accepted"
        begin = time.monotonic()
        await asyncio.to_thread(
            revocable.sign, "cert", "revoke", serial, "--ca", revocable.ca, "--reason", "superseded"
        )
        signed_at = time.monotonic()
        refused.append(await asyncio.to_thread(saved["TLS 1.3"].seconds_until, _REVOKED, signed_at))
        assert await asyncio.to_thread(saved["TLS 1.2"].login) == _REVOKED
        async with asyncio.timeout(30):
            await with_old.lost
        closed.append(time.monotonic() - begin)
        dropped += with_new.lost.done()
        with_new.cut()
    return {"refused_s": refused, "closed_s": closed, "dropped": dropped}


def _device(identity: Identity) -> Device:
    return Device(identity.name, identity.context(), DOORS.mqtt_tls)
