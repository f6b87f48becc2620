"""Publishing and subscribing: topics allowed by the rules work, and nothing passes on others."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Callable

import aiomqtt
import pytest

from .clients import Mosquitto
from .fleet import Fleet
from .identities import Identity
from .mqtt import HOST, Disconnected, MQTTClient, connect_all
from .node import Broker
from .service import Service

Clients = Callable[..., MQTTClient]
NOBODY_SUBSCRIBED = 0x10
LONGEST_TOPIC_BYTES = 65_535

OUTSIDE_TO_PUBLISH = (
    "fleet/{victim}/telemetry/speed",
    "fleet/{victim}/commands/stop",
    "fleet/{own}/commands/stop",  # only subscribing is allowed there
    "fleet/+/telemetry/speed",  # RabbitMQ accepts wildcards in a publish
    "fleet/*/telemetry/speed",
    "+/{victim}/telemetry/speed",
    "fleet/#",
    "#",
    "/fleet/{own}/telemetry/speed",
    "fleet/{own}/telemetryx",
    "Fleet/{own}/telemetry/speed",
    "$SYS/x",
)
OUTSIDE_TO_SUBSCRIBE = (
    "fleet/#",
    "#",
    "+/#",
    "+/{victim}/#",
    "fleet/*/x",
    "fleet/*/telemetry/#",
    "fleet/+/commands/#",
    "fleet/{own}/#",
    "fleet/{victim}/commands/#",
    "fleet.{victim}.commands.#",  # RabbitMQ treats a dot like a slash
    "fleet/#/{own}/commands/#",
    "$SYS/#",
    "$share/group/fleet/{victim}/commands/#",
)


@pytest.mark.parametrize("version", [4, 5])
async def test_a_device_publishes_and_subscribes(mqtt: Clients, fleet: Fleet, version: int) -> None:
    """Two connections of one device with its own client ids; messages of both QoS levels arrive."""
    me = fleet.device()
    reader, writer = mqtt(me, version=version), mqtt(me, version=version, client_id=f"{me}_pub")
    assert await connect_all(reader, writer) == [0, 0]
    assert await reader.subscribe(f"fleet/{me}/telemetry/#", f"fleet/{me}/commands/#") == [1, 1]
    for qos in (0, 1):
        assert await writer.publish(f"fleet/{me}/telemetry/speed", b"3.5", qos=qos) == 0
        message = await reader.message()
        assert (message.topic, message.payload, message.qos) == (f"fleet/{me}/telemetry/speed", b"3.5", qos)
    assert await reader.alive()


async def test_mosquittos_command_line(mosquitto: Callable[[str], Mosquitto], fleet: Fleet) -> None:
    """The two commands of the README."""
    me = fleet.device()
    device = mosquitto(me)
    options = ["-V", "mqttv5", "-t", "test", "-q", "1"]
    user = ["--property", "CONNECT", "user-property", "client_type", "APM"]
    # A persistent session is made first, so that the message waits for the subscriber and timing does not matter.
    session = ["-i", me, "-c", "-x", "60"]
    assert (await device.subscribe(*options, *session, *user, "-E")).status == 0
    sent = await device.publish(*options, "-i", f"{me}_pub", "-m", "hello")
    assert (sent.status, sent.errors) == (0, "")
    received = await device.subscribe(*options, *session, "-C", "1")
    assert (received.status, received.output) == (0, "hello\n")


async def test_mosquittos_command_line_outside_the_rules(mosquitto: Callable[[str], Mosquitto], fleet: Fleet) -> None:
    """The output after a typing mistake: the publish fails, and the refused subscription is named."""
    me, other = fleet.device(), fleet.device()
    device = mosquitto(me)
    sent = await device.publish("-V", "mqttv311", "-t", f"fleet/{other}/telemetry/x", "-q", "1", "-i", me, "-m", "x")
    assert sent.status != 0
    received = await device.subscribe("-V", "mqttv311", "-t", "fleet/#", "-i", me, "-W", "10")
    assert received.output == ""
    assert "denied" in received.errors


async def test_aiomqtt(broker: Broker, service: Service, device: Callable[..., Identity], fleet: Fleet) -> None:
    """Another common Python client, used as in its manual."""
    me = fleet.device()
    tls = device(me).context()
    async with aiomqtt.Client(HOST, broker.doors.mqtt_tls, identifier=me, tls_context=tls) as client:
        await client.subscribe(f"fleet/{me}/telemetry/#", qos=1)
        await client.publish(f"fleet/{me}/telemetry/speed", b"3.5", qos=1)
        async with asyncio.timeout(10):
            message = await anext(aiter(client.messages))
        assert (str(message.topic), message.payload) == (f"fleet/{me}/telemetry/speed", b"3.5")


@pytest.mark.parametrize("version", [4, 5])
async def test_a_publish_outside_the_rules_ends_the_connection(mqtt: Clients, fleet: Fleet, version: int) -> None:
    """RabbitMQ refuses it by closing the connection. Refused messages reach nobody: the first to arrive is allowed."""
    me, victim = fleet.device(), fleet.device()
    reader, owner = mqtt(victim), mqtt(victim, client_id=f"{victim}_pub")
    assert await connect_all(reader, owner) == [0, 0]
    assert await reader.subscribe(f"fleet/{victim}/telemetry/#", f"fleet/{victim}/commands/#") == [1, 1]
    denied = fleet.service.denials(endpoint="topic", reason="no_rule_allows")

    async def attempt(number: int, topic: str) -> None:
        client = mqtt(me, client_id=f"{me}_{number}", version=version)
        assert await client.connect() == 0
        with pytest.raises(Disconnected):
            await client.publish(topic.format(own=me, victim=victim), b"denied")

    await asyncio.gather(*(attempt(number, topic) for number, topic in enumerate(OUTSIDE_TO_PUBLISH)))
    assert fleet.service.denials(endpoint="topic", reason="no_rule_allows") == denied + len(OUTSIDE_TO_PUBLISH)
    assert await owner.publish(f"fleet/{victim}/telemetry/speed", b"allowed") == 0
    assert (await reader.message()).payload == b"allowed"


async def test_a_denied_publish_without_acknowledgement_ends_the_connection(mqtt: Clients, fleet: Fleet) -> None:
    """QoS 0 has no acknowledgement, but is refused in the same way."""
    me, victim = fleet.device(), fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.publish(f"fleet/{victim}/telemetry/speed", b"denied", qos=0) == 0
    await client.disconnected()


@pytest.mark.parametrize(("version", "refused"), [(4, 0x80), (5, 0x87)])
async def test_a_subscription_outside_the_rules_is_refused(
    mqtt: Clients, fleet: Fleet, version: int, refused: int
) -> None:
    """SUBACK reports the refusal, the connection ends, and the session does not contain the refused subscription."""
    me, victim = fleet.device(), fleet.device()
    session = {"version": version, "clean": False, "session_expiry_s": 60 if version == 5 else 0}
    denied = fleet.service.denials(endpoint="topic", reason="no_rule_allows")

    async def attempt(number: int, topic: str) -> None:
        options = {"client_id": f"{me}_{number}", **session}
        client = mqtt(me, **options)
        assert await client.connect() == 0
        assert await client.subscribe(f"fleet/{me}/telemetry/#") == [1]
        assert await client.subscribe(topic.format(own=me, victim=victim)) == [refused]
        await client.disconnected()
        again = mqtt(me, **options)
        assert await again.connect() == 0
        assert again.session_present
        sessions.append(again)

    sessions: list[MQTTClient] = []
    await asyncio.gather(*(attempt(number, topic) for number, topic in enumerate(OUTSIDE_TO_SUBSCRIBE)))
    assert fleet.service.denials(endpoint="topic", reason="no_rule_allows") == denied + len(OUTSIDE_TO_SUBSCRIBE)
    other, own = mqtt(victim), mqtt(me)
    assert await connect_all(other, own) == [0, 0]
    assert await other.publish(f"fleet/{victim}/telemetry/speed", b"of the victim") == NOBODY_SUBSCRIBED
    assert await own.publish(f"fleet/{me}/telemetry/speed", b"mine") == 0
    assert {(await session.message()).payload for session in sessions} == {b"mine"}


async def test_of_several_subscriptions_the_allowed_ones_are_not_lost(mqtt: Clients, fleet: Fleet) -> None:
    """One SUBSCRIBE with both kinds: each filter has its own reason code."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/telemetry/#", "fleet/#", f"fleet/{me}/commands/#") == [1, 0x87, 0x87]
    await client.disconnected()


async def test_dots_are_slashes(mqtt: Clients, fleet: Fleet) -> None:
    """To RabbitMQ, ``a.b`` and ``a/b`` are the same topic, and so they are in rules, for publishing and subscribing."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet.{me}/telemetry.#") == [1]
    assert await client.publish(f"fleet.{me}.telemetry/speed", b"x") == 0
    assert (await client.message()).topic == f"fleet/{me}/telemetry/speed"


async def test_odd_names_reach_the_service_to_the_letter(mqtt: Clients, fleet: Fleet) -> None:
    """
    Characters that a form must escape match rules exactly; what a wrong decoder would turn them into does not.
    """
    topics = ["sp ace", "100%", "a%2Fb", "a&b=c;d", "ünï/日本", "\U0001f4e6", "quote\"'\\$?"]
    others = [
        "sp+ace",
        "sp%20ace",
        "100%25",
        "100",
        "a/b",
        "a%252Fb",
        "a",
        "a&b",
        "a%26b%3Dc%3Bd",
        "%C3%BCn%C3%AF/日本",
    ]
    others += [unicodedata.normalize("NFD", "ünï/日本"), "ÜNÏ/日本"]
    client = mqtt("ODD0001")
    assert await client.connect() == 0
    assert await client.subscribe("odd/#") == [1]
    for topic in topics:
        assert await client.publish(f"odd/{topic}", b"x") == 0
        assert (await client.message()).topic == f"odd/{topic}"
    await client.disconnect()
    malformed = fleet.service.count("authbackend_malformed_requests")
    for topic in others:
        attempt = mqtt("ODD0001")
        assert await attempt.connect() == 0
        with pytest.raises(Disconnected):
            await attempt.publish(f"odd/{topic}", b"x")
    assert fleet.service.count("authbackend_malformed_requests") == malformed


@pytest.mark.parametrize("letter", ["x", "日"])
async def test_the_longest_topic(mqtt: Clients, fleet: Fleet, letter: str) -> None:
    """65,535 bytes, up to three times as many in a form: the rules decide, for the device's own topics and others."""
    me, other = fleet.device(), fleet.device()
    denied = fleet.service.denials(endpoint="topic", reason="no_rule_allows")
    malformed = fleet.service.count("authbackend_malformed_requests")
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.publish(_longest(f"fleet/{me}/telemetry/", letter), b"x") == NOBODY_SUBSCRIBED
    with pytest.raises(Disconnected):
        await client.publish(_longest(f"fleet/{other}/telemetry/", letter), b"x")
    assert fleet.service.denials(endpoint="topic", reason="no_rule_allows") == denied + 1
    assert fleet.service.count("authbackend_malformed_requests") == malformed


def _longest(begin: str, letter: str) -> str:
    room = LONGEST_TOPIC_BYTES - len(begin)
    count = room // len(letter.encode())
    return begin + letter * count + "." * (room - count * len(letter.encode()))


@pytest.mark.parametrize("version", [4, 5])
async def test_a_retained_message_waits_for_its_reader(mqtt: Clients, fleet: Fleet, version: int) -> None:
    """A retained message needs no other permission than a publish."""
    me = fleet.device()
    writer = mqtt(me, client_id=f"{me}_pub", version=version)
    assert await writer.connect() == 0
    assert await writer.publish(f"fleet/{me}/telemetry/state", b"parked", retain=True) in (0, NOBODY_SUBSCRIBED)
    reader = mqtt(me, version=version)
    assert await reader.connect() == 0
    # RabbitMQ delivers it to subscriptions of exactly this topic, and stores it after it has acknowledged it.
    async with asyncio.timeout(10):
        while not (messages := reader.messages()):
            assert await reader.subscribe(f"fleet/{me}/telemetry/state") == [1]
            assert await reader.alive()
    assert (messages[0].payload, messages[0].retain) == (b"parked", True)


async def test_unsubscribing_works_after_idleness(mqtt: Clients, fleet: Fleet) -> None:
    """RabbitMQ drops its cache after a second without traffic, and sends a request for an UNSUBSCRIBE."""
    me = fleet.device()
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.subscribe(f"fleet/{me}/telemetry/#") == [1]
    requests, denied = fleet.service.count("authbackend_decisions", endpoint="topic"), fleet.service.denials()
    await asyncio.sleep(2)  # There is no event for the broker's idle timer.
    assert await client.unsubscribe(f"fleet/{me}/telemetry/#") == [0]
    assert fleet.service.count("authbackend_decisions", endpoint="topic") == requests + 1
    assert fleet.service.denials() == denied
    assert await client.publish(f"fleet/{me}/telemetry/speed", b"x") == NOBODY_SUBSCRIBED


async def test_a_type_without_publish_rules_cannot_reach_the_exchange(mqtt: Clients, fleet: Fleet) -> None:
    """No rule of the type could allow a publish, so it is refused one request earlier; subscribing is allowed."""
    client = mqtt("READER1")
    assert await client.connect() == 0
    assert await client.subscribe("fleet/+/telemetry/#") == [1]
    denied = fleet.service.denials(endpoint="resource", reason="no_rule_allows", device_type="READER")
    with pytest.raises(Disconnected):
        await client.publish("fleet/x/telemetry/y", b"x")
    assert fleet.service.denials(endpoint="resource", reason="no_rule_allows", device_type="READER") == denied + 1


async def test_who_stays_connected_after_a_refused_publish_is_told_only_in_mqtt_5(
    mqtt: Clients, fleet: Fleet, broker: Broker
) -> None:
    """Why ``conf.d-optional/stay-connected.conf`` is optional: in 3.1.1, the message is lost in spite of a PUBACK."""
    broker.control("eval", "application:set_env(rabbitmq_mqtt, disconnect_on_unauthorized, false).")
    try:
        codes = {}
        for version in (4, 5):
            client = mqtt(fleet.device(), version=version)
            assert await client.connect() == 0
            codes[version] = await client.publish("forbidden/x", b"x")
            assert await client.alive()
        assert codes == {4: 0, 5: 0x87}
    finally:
        broker.control("eval", "application:set_env(rabbitmq_mqtt, disconnect_on_unauthorized, true).")


async def test_a_shared_subscription_is_a_topic_of_that_name(mqtt: Clients, fleet: Fleet) -> None:
    """RabbitMQ does not support them: even if a rule allows the filter, nothing from the intended topic arrives."""
    me = fleet.device()
    own, shared = f"fleet/{me}/telemetry/x", f"$share/group/fleet/{me}/telemetry/#"
    denied = fleet.service.denials(endpoint="topic", reason="no_rule_allows")
    refused = mqtt(me)
    assert await refused.connect() == 0
    assert await refused.subscribe(shared) == [0x87]
    assert fleet.service.denials(endpoint="topic", reason="no_rule_allows") == denied + 1
    await fleet.change(
        "insert into topic_rule (device_id, effect, action, topic) values"
        f" ('{me}', 'allow', 'subscribe', '$share/+/fleet/{me}/#'), ('{me}', 'allow', 'publish', '$share/+/fleet/{me}/#')"
    )
    client = mqtt(me)
    assert await client.connect() == 0
    assert await client.subscribe(shared) == [1]
    assert await client.publish(own, b"not shared") == NOBODY_SUBSCRIBED
    assert await client.publish(f"$share/group/{own}", b"by its whole name") == 0
    assert (await client.message()).payload == b"by its whole name"


@pytest.mark.parametrize(
    ("sparkplug", "topic", "refused"), [(False, "spBv1.0", "spBv1___0"), (True, "spBv1___0", "spBv1.0")]
)
async def test_sparkplug(
    mqtt: Clients, fleet: Fleet, broker: Broker, sparkplug: bool, topic: str, refused: str
) -> None:
    """Rules must match RabbitMQ's requests: with ``mqtt.sparkplug``, the dot of ``spBv1.0`` becomes ``___``."""
    me, other = fleet.device(), fleet.device()
    await fleet.change(
        "insert into topic_rule (device_id, effect, action, topic) values"
        f" ('{me}', 'allow', 'publish', '{topic}/plant/+/{me}'), ('{me}', 'allow', 'subscribe', '{topic}/plant/+/{me}'),"
        f" ('{other}', 'allow', 'publish', '{refused}/plant/+/{other}')"
    )

    if sparkplug:
        broker.control(
            "eval", "application:set_env(rabbitmq_mqtt, sparkplug, true), rabbit_mqtt_util:init_sparkplug()."
        )
    try:
        client, wrong = mqtt(me), mqtt(other)
        assert await connect_all(client, wrong) == [0, 0]
        assert await client.subscribe(f"spBv1.0/plant/NCMD/{me}") == [1]
        assert await client.publish(f"spBv1.0/plant/NCMD/{me}", b"rebirth") == 0
        message = await client.message()
        prefix = "spBv1.0" if sparkplug else "spBv1/0"
        assert (message.topic, message.payload) == (f"{prefix}/plant/NCMD/{me}", b"rebirth")
        with pytest.raises(Disconnected):
            await wrong.publish(f"spBv1.0/plant/NDATA/{other}", b"x")
    finally:
        terms = ("sparkplug_mp_mqtt_to_amqp", "sparkplug_mp_amqp_to_mqtt")
        erased = ", ".join(f"persistent_term:erase({term})" for term in terms)
        broker.control("eval", f"application:set_env(rabbitmq_mqtt, sparkplug, false), {erased}.")


async def test_who_may_have_and_end_a_retained_message(mqtt: Clients, fleet: Fleet) -> None:
    """Only subscribers to exactly its topic get it; whoever may publish there can delete it with an empty one."""
    me = fleet.device()
    topic = f"fleet/{me}/telemetry/retained"
    writer, reader = mqtt(me, client_id=f"{me}_pub"), mqtt(me)
    assert await connect_all(writer, reader) == [0, 0]
    assert await reader.subscribe(f"fleet/{me}/telemetry/#") == [1]
    assert await writer.publish(topic, b"parked", retain=True) == 0
    assert (await reader.message()).payload == b"parked"

    async def kept(topic_filter: str) -> list[bytes]:
        probe = mqtt(me, client_id=f"{me}_probe")
        assert await probe.connect() == 0
        assert await probe.subscribe(topic_filter) == [1]
        assert await probe.alive()
        payloads = [message.payload for message in probe.messages() if message.retain]
        await probe.disconnect()
        return payloads

    # RabbitMQ stores it only after it has acknowledged it.
    async with asyncio.timeout(10):
        while await kept(topic) != [b"parked"]:
            pass
    assert await kept(f"fleet/{me}/telemetry/#") == []
    assert await kept(f"fleet/{me}/telemetry/+") == []
    stranger = mqtt(fleet.device())
    assert await stranger.connect() == 0
    assert await stranger.subscribe(topic) == [0x87]
    assert stranger.messages() == []
    with pytest.raises(Disconnected):
        await _end_retained(mqtt, fleet.device(), topic)
    assert await kept(topic) == [b"parked"]
    assert await writer.publish(topic, b"", retain=True) == 0
    async with asyncio.timeout(10):
        while await kept(topic) != []:
            pass


async def _end_retained(mqtt: Clients, device: str, topic: str) -> int:
    """Delete a retained message as a device, by publishing an empty one."""
    client = mqtt(device)
    assert await client.connect() == 0
    return await client.publish(topic, b"", retain=True)
