"""What is wrong with a connection, a session or a subscription; and whether a change of rules took anything away."""

import pytest

from authbackend.enforcement.checks import Checker, common_name, contradiction, narrowed_actions, session_queue
from authbackend.enforcement.management_api import Binding, LiveConnection, Queue
from authbackend.enforcement.sweep import connection_fault, serial
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.reasons import Reason
from authbackend.policy.rules import Account, Device, DeviceType, Effect, Login, Permission, RuleSet, Status, TopicRule
from tests.support.memory_registry import MemoryRegistry

NOW = 1_800_000_000.0


def registry():
    rules = RuleSet(
        [
            TopicRule(Effect.ALLOW, Permission.READ, "fleet/{device_id}/#"),
            TopicRule(Effect.DENY, Permission.READ, "fleet/+/secrets/#"),
        ]
    )
    devices = (
        Device("A", "A", "APM"),
        Device("B", "cn-b", "APM", held_until=NOW + 10),
        Device("R", "R", "APM", Status.REVOKED),
        Device("E", "E", "APM", expires_at=NOW - 1),
    )
    types = (DeviceType("APM", ("{device_id}", "{device_id}_*"), ("/",), rules=rules),)
    return MemoryRegistry(devices, types, (Account("svc", Login.PASSWORD, client_ids=("svc-1",), vhosts=("/",)),))


def checker():
    return Checker(registry(), NOW, DecisionSettings())


def live(user, client_id=None, **changes):
    values = {
        "name": "x",
        "node": "n",
        "user": user,
        "vhost": "/",
        "protocol": "MQTT 5-0",
        "address": "::ffff:10.0.0.1",
        "client_id": client_id,
        "certificate_subject": None,
        "certificate_serial": None,
        "user_properties": {},
        "connected_at": 0.0,
    }
    return LiveConnection(**{**values, **changes})


@pytest.mark.parametrize(
    ("connection", "reason"),
    [
        (live("A", "A"), None),
        (live("A", "A_pub"), None),
        (live("cn-b", "B"), None),  # held: it may not log in now, and what is connected is not ended for that
        (live("A", "B"), Reason.CLIENT_ID_NOT_BOUND),
        (live("A"), Reason.CLIENT_ID_MISSING),
        (live("A", "A", vhost="other"), Reason.VHOST_NOT_LISTED),
        (live("R", "R"), Reason.DEVICE_REVOKED),
        (live("E", "E"), Reason.DEVICE_EXPIRED),
        (live("nobody", "A"), Reason.UNKNOWN_IDENTITY),
        (live("svc"), None),
        (live("svc", "svc-1"), None),
        (live("svc", "A"), Reason.CLIENT_ID_NOT_BOUND),
    ],
)
def test_a_connection_is_judged_as_its_login_would_be(connection, reason):
    assert checker().connection(connection) == reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mqtt-subscription-Aqos0", None),
        ("mqtt-subscription-Aqos1", None),
        ("mqtt-will-A_x", None),
        ("mqtt-subscription-svc-1qos1", None),
        ("mqtt-subscription-Rqos1", Reason.DEVICE_REVOKED),
        ("mqtt-subscription-A-xqos1", Reason.UNKNOWN_IDENTITY),
        ("mqtt-subscription-qos1qos1", Reason.UNKNOWN_IDENTITY),
        ("mqtt-will-", Reason.UNKNOWN_IDENTITY),
    ],
)
def test_a_session_belongs_to_somebody_who_may_have_it(name, expected):
    session = session_queue(Queue("/", name, 0))
    assert session is not None
    assert checker().session(session) == expected


@pytest.mark.parametrize(
    "name", ["mqtt-subscription-A", "amq.gen-1", "x-mqtt-subscription-Aqos1", "mqtt-subscription-Aqos2"]
)
def test_other_queues_are_nobodys_session(name):
    assert session_queue(Queue("/", name, 0)) is None


def test_a_subscription_is_judged_by_the_rules_of_the_owner():
    session = session_queue(Queue("/", "mqtt-subscription-Aqos1", 0))
    found = {
        key: checker().binding(session, Binding("amq.topic", key, "k"))
        for key in ("fleet.A.x", "fleet.A.#", "fleet.B.x")
    }
    assert found == {"fleet.A.x": None, "fleet.A.#": Reason.RULE_DENIES, "fleet.B.x": Reason.NO_RULE_ALLOWS}
    assert checker().binding(session, Binding("amq.fanout", "fleet.A.x", "k")) == Reason.EXCHANGE_NOT_PERMITTED


def rule(effect, action, topic, exchange=None):
    found = {"effect": effect, "action": action, "topic": topic}
    return found if exchange is None else {**found, "exchange": exchange}


@pytest.mark.parametrize(
    ("rules", "present", "narrowed"),
    [
        ([rule("allow", "publish", "a/b")], [("publish", "a/#", None)], set()),
        ([rule("allow", "publish", "a/b")], [("subscribe", "a/#", None)], {"publish"}),
        ([rule("allow", "publish", "a/#")], [("publish", "a/b", None)], {"publish"}),
        ([rule("allow", "publish", "{attr.x}/b")], [("publish", "+/b", None)], set()),
        ([rule("allow", "publish", "{attr.x}/b")], [("publish", "+/+/b", None)], {"publish"}),
        ([rule("allow", "publish", "{device_id}/b")], [("publish", "{client_id}/b", None)], {"publish"}),
        ([rule("deny", "subscribe", "a")], [("subscribe", "#", None)], {"subscribe"}),
        ([rule("allow", "publish", "a", "x")], [("publish", "a", "y")], {"publish"}),
        ([rule("allow", "publish", "a", "x")], [("publish", "a", "x")], set()),
        ([rule("allow", "publish", "a", "x")], [("publish", "a", None)], {"publish"}),
        ([rule("allow", "publish", "a")], [("publish", "a", "amq.topic")], set()),
    ],
)
def test_a_change_of_rules_narrows_unless_what_is_there_allows_as_much(rules, present, narrowed):
    assert narrowed_actions(rules, present, "amq.topic") == narrowed


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("CN=APM0001", "APM0001"),
        ("O=Org,CN=APM0001", "APM0001"),
        ('SERIALNUMBER=SN-77,CN=APM0003,OU=Field \\"x\\",O=Acme\\, Inc,C=SE', "APM0003"),
        ("CN=APM0002,CN=APM0001", "APM0001,APM0002"),
        ("CN=a\\,b", "a,b"),
        ("O=CN\\, Inc", None),
    ],
)
def test_the_common_name_of_a_subject(subject, name):
    assert common_name(subject) == name


def test_a_sweep_tells_what_is_wrong_by_cause():
    inspect_session = checker()
    found = {
        cause: connection_fault(inspect_session, inspect_session.registry, connection, {"ab": "revoked"})[0]
        for cause, connection in {
            "unknown_identity": live("nobody"),
            "wrong_client_id": live("A", "B"),
            "device_not_permitted": live("R", "R"),
            "account_not_permitted": live("svc", vhost="other"),
            "name_not_of_certificate": live("A", "A", certificate_subject="O=x,CN=B"),
            "certificate_revoked": live("A", "A", certificate_subject="CN=A", certificate_serial="00AB"),
        }.items()
    }
    assert found == {cause: cause for cause in found}
    fine = live("A", "A", certificate_subject="CN=A", certificate_serial="00AC")
    assert connection_fault(inspect_session, inspect_session.registry, fine, {"ab": "revoked"}) == (None, None)


def test_what_a_client_claims_in_user_properties_is_compared():
    assert contradiction(registry(), live("A", "A", user_properties={"client_type": "APM", "client_name": "A"})) is None
    assert contradiction(registry(), live("cn-b", "B", user_properties={"client_name": "cn-b"})) is None
    assert "client_type 'AGV'" in contradiction(registry(), live("A", "A", user_properties={"client_type": "AGV"}))
    assert "client_name 'B'" in contradiction(registry(), live("A", "A", user_properties={"client_name": "B"}))


def test_serials_are_compared_in_one_form():
    assert serial("00:AB:0C") == serial("AB0C") == "ab0c"
