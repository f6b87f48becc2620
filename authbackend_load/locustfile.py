"""
A Locust file, to run the load test on several machines: each of Locust's users drives one device.

    locust -f "$(python -m authbackend_load.locustfile)" --host BROKER --certificates DIR --users 1000 --spawn-rate 100

Locust runs users as greenlets. The devices run on an asyncio event loop in a separate thread; a user passes work for
its device to that loop and waits for the result. When a test begins, the master assigns each worker a share of the
devices in DIR, so that no certificate is used twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]  # its stubs are not a dependency
import gevent.event  # type: ignore[import-untyped]
import gevent.monkey  # type: ignore[import-untyped]
import uvloop
from locust import User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from authbackend_load.device import Device, Failed
from authbackend_load.fleet import resolve
from authbackend_load.plan import CA_FILE, PUBLISH, SUBSCRIBE, Identity, LoadError, Plan, read_identities, share
from authbackend_load.record import Record
from authbackend_load.worker import raise_file_limit

SHARE = "authbackend-share"
MQTT = "MQTT"


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--certificates", env_var="AUTHBACKEND_LOAD_CERTIFICATES", help="DIR of authbackend-load certificates")
    add("--mqtt-port", type=int, default=8883, help="the broker's port for MQTT over TLS")
    add("--mqtt-version", choices=["3.1.1", "5"], default="5")
    add("--server-name", default="", help="name in the broker's certificate; default: the host")
    add("--subscribe", default=SUBSCRIBE, help="topic filters, separated by spaces")
    add("--publish", default=PUBLISH, help="topics, separated by spaces; {device_id} and {n} are filled in")
    add("--interval", type=float, default=10.0, help="seconds between two publishes of a device")
    add("--reconnect-every", type=float, default=0.0, help="cut all devices at each multiple of this time, in seconds")


class ToLocust(Record):
    """A record that also keeps each event until a user reports it to Locust."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, float, str | None]] = []

    def latency(self, name: str, duration_s: float) -> None:
        """Count a latency, and keep it."""
        super().latency(name, duration_s)
        self.events.append((name, duration_s, None))

    def failure(self, step: str, cause: str) -> None:
        """Count a failure, and keep it."""
        super().failure(step, cause)
        self.events.append((step, 0.0, cause))


class Engine:
    """An asyncio event loop in a real thread, to which greenlets pass work."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        gevent.monkey.get_original("_thread", "start_new_thread")(self._run, ())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the loop while other greenlets run, and return or raise what it returns or raises."""
        done = gevent.event.AsyncResult()
        outcome: list[Any] = []
        watcher = gevent.get_hub().loop.async_()
        watcher.start(lambda: done.set(None))

        async def run() -> None:
            try:
                outcome.append((await work, None))
            except Exception as error:
                outcome.append((None, error))
            finally:
                watcher.send()

        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(run()))
        try:
            done.get()
        finally:
            watcher.stop()
            watcher.close()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value


class Share:
    """The share of the fleet that this process runs."""

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.engine: Engine | None = None
        self.woken = gevent.event.Event()
        self.devices: list[Device] = []
        self._identities: Iterator[Identity] = iter(())
        self._plan: Plan | None = None
        self._address = ("", 0)

    def begin(self, environment: Environment) -> None:
        """
        Read the certificates of this share, when a test begins.

        Raises:
            LoadError: There are none, or the host cannot be resolved.
        """
        options = environment.parsed_options
        if not options or not options.certificates or not environment.host:
            raise LoadError("give the broker with --host and the devices with --certificates DIR")
        directory = Path(options.certificates)
        identities = [one for one in read_identities(directory) if one.active]
        shared = share(identities, self.index, self.count)
        raise_file_limit(len(shared))
        host = environment.host.rpartition("//")[2].rstrip("/")
        self._identities = iter(shared)
        self._address = resolve(host, options.mqtt_port)
        self.engine = self.engine or Engine()
        self.devices = []
        self._plan = Plan(
            host=host,
            port=options.mqtt_port,
            server_name=options.server_name,
            ca_file=str(directory / CA_FILE),
            version=5 if options.mqtt_version == "5" else 4,
            subscribe=tuple(options.subscribe.split()),
            publish=tuple(options.publish.split()),
            # A device sends nothing between two publishes.
            keep_alive_s=int(max(60, min(65_535, 2 * options.interval))),
        )

    def device(self) -> Device | None:
        """Return the next device of the share, None if all are in use."""
        identity = next(self._identities, None)
        if identity is None or self._plan is None:
            return None
        device = Device(self._plan, identity, ToLocust(), address=self._address)
        self.devices.append(device)
        return device

    def cut_all(self) -> None:
        """Abort all connections at the same time and wake all users, which reconnect."""

        async def cut() -> None:
            for device in self.devices:
                device.cut()

        assert self.engine is not None
        self.engine.call(cut())
        woken, self.woken = self.woken, gevent.event.Event()
        woken.set()


FLEET_SHARE = Share()


@events.init.add_listener  # type: ignore[untyped-decorator]
def _init(environment: Environment, **_unused: Any) -> None:
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        runner.register_message(SHARE, _take_share)


def _take_share(msg: Any, **_unused: Any) -> None:
    FLEET_SHARE.index, FLEET_SHARE.count = msg.data["index"], msg.data["count"]


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _test_start(environment: Environment, **_unused: Any) -> None:
    runner = environment.runner
    if isinstance(runner, MasterRunner):
        # These messages precede, on the same connections, those that start the users.
        workers = sorted(each.id for each in (*runner.clients.ready, *runner.clients.running, *runner.clients.spawning))
        for index, worker in enumerate(workers):
            runner.send_message(SHARE, {"index": index, "count": len(workers)}, client_id=worker)
        return
    FLEET_SHARE.begin(environment)
    assert environment.parsed_options is not None
    if every_s := environment.parsed_options.reconnect_every:
        gevent.spawn(_storms, environment.runner, every_s)


def _storms(runner: Any, every_s: float) -> None:
    """Cut all devices whenever the clock shows a multiple of ``every_s``: on all machines at the same moment."""
    gevent.sleep(every_s - time.time() % every_s)
    while runner.state in ("spawning", "running"):
        FLEET_SHARE.cut_all()
        gevent.sleep(every_s - time.time() % every_s)


class MQTTDevice(User):
    """One device: it connects, subscribes, and keeps publishing."""

    def on_start(self) -> None:
        """Take a device that no other user has."""
        self.device = FLEET_SHARE.device()
        if self.device is None:
            self._report("certificate", 0.0, "all in use on this worker: make more with authbackend-load certificates")
            raise StopUser

    @task
    def cycle(self) -> None:
        """Connect and subscribe if not connected, and publish."""
        assert FLEET_SHARE.engine is not None and self.device is not None
        record = self.device.record
        assert isinstance(record, ToLocust)
        try:
            FLEET_SHARE.engine.call(self.device.cycle())
        except Failed:
            gevent.sleep(1)
        to_report, record.events = record.events, []
        for name, duration_s, cause in to_report:
            self._report(name, duration_s, cause)

    def wait_time(self) -> float:
        """Wait until the next publish is due or all devices are cut; return 0, so that Locust does not wait as well."""
        assert self.environment.parsed_options is not None
        FLEET_SHARE.woken.wait(self.environment.parsed_options.interval)
        return 0.0

    def on_stop(self) -> None:
        """Disconnect the device."""
        if self.device is None or FLEET_SHARE.engine is None:
            return

        async def disconnect() -> None:
            assert self.device is not None
            self.device.disconnect()

        FLEET_SHARE.engine.call(disconnect())

    def _report(self, name: str, duration_s: float, cause: str | None) -> None:
        self.environment.events.request.fire(
            request_type=MQTT,
            name=name,
            response_time=duration_s * 1000,
            response_length=0,
            exception=None if cause is None else Failed(name, cause),
            context={},
        )


if __name__ == "__main__":
    print(Path(__file__).absolute())  # noqa: T201
