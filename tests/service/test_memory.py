"""The file system in memory is full: no process dies, the old version is still served, and the fault is reported."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
import pytest

from authbackend.errors import NoRoom
from authbackend.metrics.files import FILE_BYTES
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch
from authbackend.registry.store import Store
from tests.service.conftest import HASH, POLICY, apply, until
from tests.service.test_processes import children, replica

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
MARK = FeedPosition("epoch", "incarnation", "10:10:")
MIB = 1024**2


@contextlib.asynccontextmanager
async def small(mebibytes):
    """Mount an empty file system in memory of this size in MiB."""
    folder = Path(tempfile.mkdtemp(prefix="authbackend-test-"))
    await run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "authbackend-test", str(folder))
    try:
        yield folder
    finally:
        await run("umount", "--lazy", str(folder))
        folder.rmdir()


async def run(*command):
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0


@pytest.fixture
async def folder():
    async with small(4) as folder:
        yield folder


def free_bytes(folder):
    filesystem = os.statvfs(folder)
    return filesystem.f_bavail * filesystem.f_frsize


def fill(folder):
    """Use up all free memory."""
    with (folder / "full").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert free_bytes(folder) == 0


def load(store, number):
    with store.loading(MARK, 1.0) as loader:
        loader.add("device_type", "T", b'{"name": "T"}')
        loader.add_devices((b"d%07d" % one, b"aT\t\t\t\t" + b"x" * 60, None) for one in range(number))


def rows(store):
    with store.reader() as reader:
        return sum(1 for _ in reader.rows())


def test_a_load_that_does_not_fit_is_refused_before_it_is_written_and_a_smaller_one_goes_on(folder):
    with contextlib.closing(Store(folder)) as store:
        load(store, 5_000)
        before = free_bytes(folder)
        for _ in range(3):
            with pytest.raises(NoRoom, match="MiB more are needed"):
                load(store, 100_000)
            assert free_bytes(folder) == before
            assert rows(store) == 5_000
        load(store, 100)
        load(store, 6_000)
        assert rows(store) == 6_000


def test_a_change_that_does_not_fit_gives_back_what_it_took(folder):
    with contextlib.closing(Store(folder)) as store:
        load(store, 100)
        reader = store.reader()
        before = free_bytes(folder)
        record = b"aT\t\t\t\t" + b"x" * 400
        many = {f"n{one:06d}": DeviceRow(b"n%06d" % one, record, None) for one in range(20_000)}
        for _ in range(3):
            with pytest.raises(NoRoom):
                store.apply(Patch({}, many, {}), MARK, 2.0)
            assert free_bytes(folder) >= before - 64 * 1024  # the page with the list of free pages may have moved
            assert rows(store) == 100
            with reader as version:
                assert (b"d0000099", b"aT\t\t\t\t" + b"x" * 60) in version.rows()
        few = dict(list(many.items())[:100])
        store.apply(Patch({}, few, {}), MARK, 3.0)
        assert rows(store) == 200


def worker_of(running, place):
    """Return the process id of a worker; the supervisor starts the follower and the two other listeners first."""
    return children(running.process.pid)[3 + place]


async def test_a_full_file_system_kills_no_worker_and_keeps_no_new_one_from_starting(dsn, sql):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with small(16) as folder, replica(dsn, REGISTRY__MEMORY_DIR=str(folder)) as running:
        assert await running.login("APM0001") == "allow"  # warmed up, with few series
        fill(folder)
        before = set(children(running.process.pid))

        async def every_answer():
            """Send requests that create series of all kinds to both workers, over new connections."""
            for _ in range(8):
                async with aiohttp.ClientSession() as running.http:
                    assert await running.login("APM0001") == "allow"
                    assert await running.login("nobody-knows-it") == "deny"
                    assert await running.publish("APM0001", "fleet.APM0001.telemetry.x") == "allow"
                    assert await running.publish("APM0001", "somewhere.else") == "deny"
                    assert (await running.ask("vhost", {"username": "APM0001"}))[1] == "deny"
                    assert (await running.ask("resource", b"%zz"))[1] == "deny"

        await every_answer()
        assert set(children(running.process.pid)) == before
        assert not running.logged("process.died")
        os.kill(worker_of(running, 0), signal.SIGKILL)

        async def restarted():
            async with aiohttp.ClientSession() as running.http:
                return (await running.metric("authbackend_worker_restarts")) == 1 and (await running.status())[1][
                    "workers"
                ]["serving"] == 2

        await until(restarted, "a cold worker starts on the full file system")
        await every_answer()
        assert len(running.logged("process.died")) == 1
        await sql("insert into device (device_id, type) select 'new' || g, 'APM' from generate_series(1, 20000) as g")

        async def reported():
            async with aiohttp.ClientSession() as running.http:
                return "does not fit into the memory" in ((await running.status())[1]["fault"] or "")

        await until(reported, "the fault is reported")
        await every_answer()
        (folder / "full").unlink()

        async def followed():
            async with aiohttp.ClientSession() as running.http:
                return await running.login("new20000") == "allow"

        await until(followed, "it follows when there is room again", 60)
        async with aiohttp.ClientSession() as running.http:
            assert await running.end() == 0


async def test_a_registry_that_outgrows_the_memory_is_not_taken_over_and_is_told(dsn, sql):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with small(8) as folder, replica(dsn, REGISTRY__MEMORY_DIR=str(folder)) as running:
        await sql(
            "insert into device (device_id, type) select 'new-' || repeat('x', 50) || g, 'APM' from generate_series(1, 100000) as g"
        )

        async def reported():
            fault = (await running.status())[1]["fault"] or ""
            return "does not fit into the memory" in fault and running.logged("registry.refresh_failed")

        await until(reported, "the fault is reported and logged")
        assert running.logged("registry.refresh_failed")[-1]["fault"].startswith("the registry does not fit")
        assert await running.metric("authbackend_registry_sync_failures_total") >= 1
        assert await running.metric("authbackend_registry_memory_available_bytes") > 0
        assert await running.login("APM0001") == "allow"
        assert await running.login("GONE") == "deny"
        assert await running.metric("authbackend_registry_entries", entity="device") == 3
        await sql("delete from device where device_id like 'new-%'")

        async def followed():
            return (await running.status())[1]["fault"] is None

        await until(followed, "it follows again", 60)
        assert not running.logged("process.died")
        assert await running.end() == 0


async def test_the_files_of_metrics_have_all_their_memory_from_the_start(dsn):
    await apply(dsn, POLICY.replace("HASH", f'"{HASH}"'))
    async with small(16) as folder, replica(dsn, REGISTRY__MEMORY_DIR=str(folder)) as running:
        assert await running.login("APM0001") == "allow"
        files = [*folder.glob("authbackend-*/metrics/*.db")]
        assert len(files) == 15  # three kinds for each of five processes: none was created later
        assert all(file.stat().st_blocks * 512 >= FILE_BYTES for file in files)
        (lock,) = folder.glob("authbackend-*/lock.mdb")
        assert lock.stat().st_blocks * 512 >= lock.stat().st_size


def test_the_gauges_of_a_process_that_is_gone_are_forgotten_and_their_memory_is_kept_for_the_next(tmp_path):
    code = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry, Gauge
from authbackend import metrics
from authbackend.metrics import files as metric_files
folder = Path(sys.argv[1]) / "metrics"
metric_files.reserve(folder, ["worker-0"])
metric_files.share(folder, "worker-0")
Gauge("connections", "x", registry=CollectorRegistry(), multiprocess_mode="livesum").set(7)
before = metrics.exposition(CollectorRegistry(), folder)
metric_files.forget_gauges(folder, "worker-0")
after = metrics.exposition(CollectorRegistry(), folder)
size = (folder / "gauge_livesum_worker-0.db").stat()
print(b"connections 7.0" in before, b"connections" in after, size.st_blocks * 512 >= metric_files.FILE_BYTES)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True"]


def test_a_series_for_which_there_is_no_memory_is_counted_from_when_there_is(folder):
    code = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter
from authbackend import metrics
from authbackend.metrics import files as metric_files
from tests.service.test_memory import fill
folder = Path(sys.argv[1])
metric_files.reserve(folder / "metrics", ["worker-0"])
metric_files.share(folder / "metrics", "worker-0")
counter = Counter("requests", "x", ["name"], registry=CollectorRegistry())
fill(folder)
for _ in range(2):
    for number in range(2000):
        counter.labels(f"{number:0100d}").inc()
full = metrics.exposition(CollectorRegistry(), folder / "metrics").count(b"requests_total{")
(folder / "full").unlink()
for number in range(2000):
    counter.labels(f"{number:0100d}").inc()
text = metrics.exposition(CollectorRegistry(), folder / "metrics")
print(0 < full < 2000, text.count(b"requests_total{"), text.count(b" 3.0"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "2000", "2000"]
