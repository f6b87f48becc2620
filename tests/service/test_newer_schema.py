"""A running replica whose database gets a newer schema."""

from authbackend import __version__
from tests.service.conftest import HASH, POLICY, apply, until
from tests.service.test_processes import replica


async def test_a_replica_that_is_too_old_for_the_schema_says_why_and_is_stale_in_time(dsn, sql):
    oldest = (
        "create or replace function registry_oldest_program() returns text language sql stable as $$ select '{}' $$"
    )
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with replica(dsn, workers=1, REGISTRY__MAX_STALENESS_S="3") as running:
        assert await running.login("APM0001") == "allow"
        await sql(oldest.format("99.0.0"))

        async def stale():
            return (await running.status())[0] == 503

        await until(stale, "the copy is stale")
        health = (await running.status())[1]
        assert health["status"] == "not ready: the copy of the registry is stale, everything is denied"
        assert f"needs authbackend 99.0.0 or later, and this is {__version__}" in health["fault"]
        assert [line["fault"] for line in running.logged("registry.refresh_failed")] == [health["fault"]]
        assert await running.login("APM0001") == "deny"
        await sql(oldest.format(__version__))
        await until(running.ready, "it follows again")
        assert await running.login("APM0001") == "allow"


async def test_a_replica_in_service_counts_what_it_does_not_know(dsn, sql):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with replica(dsn, workers=1) as running:
        await sql("create table zone (id text); call change_watch('zone', 'zone', 'id'); insert into zone values ('a')")
        await sql("update device set status = 'revoked' where device_id = 'APM0001'")

        async def denied():
            return await running.login("APM0001") == "deny"

        async def counted():
            return await running.metric("authbackend_registry_changes_ignored_total") == 1

        await until(denied, "the revocation is followed")
        await until(counted, "the change of a zone is counted")
        assert [line["entity"] for line in running.logged("registry.entity_unknown")] == ["zone"]
        assert (await running.status())[1]["fault"] is None
