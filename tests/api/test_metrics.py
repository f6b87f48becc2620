"""The metrics as Prometheus reads them."""

import math

from prometheus_client.parser import text_string_to_metric_families

from authbackend import clocks


async def series(client):
    async with client.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = text_string_to_metric_families(await answer.text())
    return {(sample.name, *sample.labels.values()): sample.value for one in families for sample in one.samples}


async def test_the_registry_and_its_age_are_told(client, replica):
    replica.store.note(synced_at=clocks.uptime() - 50)
    metrics = await series(client)
    assert metrics["authbackend_registry_entries", "device"] == 2
    assert metrics["authbackend_registry_entries", "account"] == 0
    assert metrics["authbackend_registry_sync_age_seconds",] >= 50
    assert metrics["authbackend_registry_version",] == 100


async def test_failed_looks_and_workers_that_were_started_again_are_counted(client, replica):
    replica.counted.refresh_failed("PostgreSQL cannot be reached")
    replica.heartbeats.gone(0)
    metrics = await series(client)
    assert metrics["authbackend_registry_sync_failures_total",] == 1
    assert metrics["authbackend_worker_restarts",] == 1


async def test_before_the_first_load_there_is_something_to_read(aiohttp_client, empty):
    metrics = await series(await aiohttp_client(empty.health_application()))
    assert metrics["authbackend_registry_entries", "device"] == 0
    assert ("authbackend_registry_version",) not in metrics
    assert math.isnan(metrics["authbackend_registry_sync_age_seconds",])


async def test_certificates_and_lists_are_told_when_they_are_known(client, replica):
    before = await series(client)
    assert ("authbackend_certificates_expired_active",) not in before
    replica.certificates.expired = 3
    replica.certificates.within = {"APM": (1, 2, 4)}
    replica.certificates.next_updates = {"fleet": 1_800_000_000.0}
    metrics = await series(client)
    assert metrics["authbackend_certificates_expired_active",] == 3
    assert [metrics["authbackend_certificates_expiring", days, "APM"] for days in ("7", "30", "90")] == [1, 2, 4]
    assert metrics["authbackend_crl_next_update_timestamp_seconds", "fleet"] == 1_800_000_000


async def test_metrics_are_read_only_and_other_paths_are_nothing(client):
    async with client.post("/metrics") as answer:
        assert answer.status == 405
    async with client.get("/metric") as answer:
        assert answer.status == 404
