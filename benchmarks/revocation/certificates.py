"""A certificate is revoked while its device uses a new one: when the old one is refused, and when it is gone."""

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
    Revoke one certificate after the other, and return the times in seconds, raw.

    Raises:
        HarnessError: a part did not start.
        AssertionError: a revoked certificate was accepted, for example with a saved session.
    """
    workplace = Path(tempfile.mkdtemp(prefix="authbackend-certificates-"))
    workplace.chmod(0o755)
    database = Database()
    try:
        bench = Certificates(workplace / "certs")
        dsn = database.dsn_of()
        asked = Service(workplace, bench, dsn, dsn)
        replica = Service(workplace, bench, dsn, dsn, broker_port=8090, health_port=8091)
        asked.command("migrate")
        asked.command("policy", "apply", accounts_file(workplace))
        database.sql(
            "insert into device_type (name, client_ids, vhosts) values ('APM', array['{device_id}', '{device_id}_*'], '{/}');"
            f"insert into device (device_id, type) select 'dev' || n, 'APM' from generate_series(1, {number}) n"
        )
        found = Revocable(workplace, Path(os.environ["AUTHBACKEND_TEST_RABBITMQ_ROOT"]), bench, replica)
        replica.configure(PKI__AUTHORITY_DIR=str(found.ca), PKI__PASSPHRASE_FILE=str(found.secret))
        asked.start()
        try:
            found.start()
            asked.stop()
            (workplace / "enforcer-ca.pem").write_bytes((found.ca / "ca.pem").read_bytes())
            asked.enforce(f"https://localhost:{DOORS.management_tls}", sweep_interval_s="3600")
            asked.configure(ENFORCEMENT__CA_FILE=str(workplace / "enforcer-ca.pem"))
            asked.start()
            return asyncio.run(_measure(found, number))
        finally:
            found.close()
            asked.stop()
    finally:
        database.server.remove()
        remove_tree(workplace)


async def _measure(found: Revocable, number: int) -> dict[str, Any]:
    refused, closed = [], []
    dropped = 0
    for n in range(1, number + 1):
        name = f"dev{n}"
        old = found.enroll(name)
        serial = found.replica.command("cert", "list", "--device", name).splitlines()[1].split()[0]
        new = found.enroll(name)
        with_old = await _device(old).connect(client_id=f"{name}_old")
        with_new = await _device(new).connect(client_id=f"{name}_new")
        saved = {version: Tls(old, version) for version in VERSIONS}
        for client in saved.values():
            assert await asyncio.to_thread(client.login) == "accepted"
        begin = time.monotonic()
        await asyncio.to_thread(found.sign, "cert", "revoke", serial, "--ca", found.ca, "--reason", "superseded")
        told = time.monotonic()
        refused.append(await asyncio.to_thread(saved["TLS 1.3"].seconds_until, _REVOKED, told))
        assert await asyncio.to_thread(saved["TLS 1.2"].login) == _REVOKED
        async with asyncio.timeout(30):
            await with_old.lost
        closed.append(time.monotonic() - begin)
        dropped += with_new.lost.done()
        with_new.cut()
    return {"refused_s": refused, "closed_s": closed, "dropped": dropped}


def _device(identity: Identity) -> Device:
    return Device(identity.name, identity.context(), DOORS.mqtt_tls)
