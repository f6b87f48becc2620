"""Violations of connections, sessions and subscriptions, and whether a change of rules takes anything away."""

from datetime import UTC, datetime

import pytest

from authbackend.enforcement.checks import (
    CertificatesOnRecord,
    Checker,
    contradiction,
    fits,
    narrowed_actions,
    serial,
    session_queue,
    shows_certificate,
)
from authbackend.enforcement.management_api import Binding, LiveConnection, Queue
from authbackend.enforcement.sweep import connection_fault
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.model import Account, Device, DeviceType, Login, RuleSet, Status
from authbackend.policy.networks import Networks
from authbackend.policy.reasons import Reason
from authbackend.policy.rules import Effect, Permission, TopicRule
from tests.support.memory_registry import MemoryRegistry

NOW = 1_800_000_000.0


def registry():
    rules = RuleSet(
        [
            TopicRule(Effect.ALLOW, Permission.READ, "fleet/{device_id}/#"),
            TopicRule(Effect.ALLOW, Permission.READ, "svc/{client_id}"),
            TopicRule(Effect.DENY, Permission.READ, "fleet/+/secrets/#"),
        ]
    )
    devices = (
        Device("A", "A", "APM"),
        Device("B", "cn-b", "APM", held_until=NOW + 10),
        Device("R", "R", "APM", Status.REVOKED),
        Device("E", "E", "APM", expires_at=NOW - 1),
        Device("N", "N", "NEAR"),
        Device("K", "K", "KNOWN"),
        Device("G", "G", "GONE"),
    )
    types = (
        DeviceType("APM", ("{device_id}", "{device_id}_*"), ("/",), rules=rules),
        DeviceType("NEAR", ("{device_id}_*",), ("/",), networks=Networks.parse(["10.0.0.0/24"])),
        DeviceType("KNOWN", ("{device_id}",), ("/",), require_known_certificate=True),
    )
    return MemoryRegistry(
        devices, types, (Account("svc", Login.PASSWORD, client_ids=("svc-1",), vhosts=("/",), rules=rules),)
    )


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
        (live("cn-b", "B"), None),  # held: it may not log in now, but its connections stay
        (live("A", "B"), Reason.CLIENT_ID_NOT_BOUND),
        (live("A"), None),  # it has one that is not in the list
        (live("A", protocol="AMQP 0-9-1"), Reason.CLIENT_ID_MISSING),
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
    ("vhost", "name", "expected"),
    [
        ("other", "mqtt-subscription-Aqos1", Reason.VHOST_NOT_LISTED),
        ("other", "mqtt-subscription-svc-1qos1", Reason.VHOST_NOT_LISTED),
        ("/", "mqtt-subscription-Eqos1", Reason.DEVICE_EXPIRED),
        ("/", "mqtt-subscription-Bqos1", None),  # held: its sessions stay
        ("/", "mqtt-will-G", Reason.DEVICE_TYPE_UNKNOWN),
    ],
)
def test_a_session_is_where_and_while_its_owner_may_be(vhost, name, expected):
    assert checker().session(session_queue(Queue(vhost, name, 0))) == expected


@pytest.mark.parametrize(
    ("name", "client_id", "will"),
    [
        ("mqtt-subscription-Aqos0", "A", False),
        ("mqtt-subscription-Aqos1qos1", "Aqos1", False),
        ("mqtt-subscription-a\nbqos1", "a\nb", False),
        ("mqtt-will-Aqos1", "Aqos1", True),
        ("mqtt-will-", "", True),
    ],
)
def test_a_queues_name_tells_the_client_id_and_whether_it_is_a_will(name, client_id, will):
    queue = Queue("/", name, 0)
    session = session_queue(queue)
    assert (session.queue, session.client_id, session.will) == (queue, client_id, will)


@pytest.mark.parametrize(
    "name", ["mqtt-subscription-A", "amq.gen-1", "x-mqtt-subscription-Aqos1", "mqtt-subscription-Aqos2"]
)
def test_other_queues_are_nobodys_session(name):
    assert session_queue(Queue("/", name, 0)) is None


def test_a_subscription_is_judged_by_the_rules_of_the_owner():
    session = session_queue(Queue("/", "mqtt-subscription-Aqos1", 0))
    reasons = {
        key: checker().binding(session, Binding("amq.topic", key, "k"))
        for key in ("fleet.A.x", "fleet.A.#", "fleet.B.x")
    }
    assert reasons == {"fleet.A.x": None, "fleet.A.#": Reason.RULE_DENIES, "fleet.B.x": Reason.NO_RULE_ALLOWS}
    assert checker().binding(session, Binding("amq.fanout", "fleet.A.x", "k")) == Reason.EXCHANGE_NOT_PERMITTED


@pytest.mark.parametrize(
    ("vhost", "client_id", "key", "expected"),
    [
        ("/", "svc-1", "fleet.x", Reason.NO_RULE_ALLOWS),  # an account has no device id
        ("/", "svc-1", "svc.svc-1", None),
        ("/", "svc-1", "fleet.B.secrets", Reason.NO_RULE_ALLOWS),
        ("other", "svc-1", "svc.svc-1", Reason.VHOST_NOT_LISTED),
        ("/", "B", "fleet.B.x", None),  # by its common name, not its id
        ("other", "A", "fleet.A.x", Reason.VHOST_NOT_LISTED),
        ("/", "E", "fleet.E.x", Reason.DEVICE_EXPIRED),
        ("/", "nobody", "fleet.A.x", Reason.UNKNOWN_IDENTITY),
    ],
)
def test_a_subscription_is_judged_as_its_owner_would_be_answered(vhost, client_id, key, expected):
    session = session_queue(Queue(vhost, f"mqtt-subscription-{client_id}qos1", 0))
    assert checker().binding(session, Binding("amq.topic", key, "k")) == expected


def test_a_connection_is_judged_by_its_address():
    types = (DeviceType("APM", ("{device_id}",), ("/",), Networks.parse(["10.0.0.0/8"])),)
    inspect = Checker(MemoryRegistry((Device("A", "A", "APM"),), types), NOW, DecisionSettings())
    assert inspect.connection(live("A", "A")) is None
    assert inspect.connection(live("A", "A", address="192.0.2.1")) == Reason.ADDRESS_NOT_IN_NETWORKS


@pytest.mark.parametrize(
    ("client_id", "patterns", "was_its"),
    [
        ("D", ["{device_id}_*"], True),  # a device id always belongs to its device, whatever the patterns
        ("D", None, True),
        ("D_1", ["{device_id}", "{device_id}_*"], True),
        ("D_1", ["{device_id}"], False),
        ("D_1", [], False),
        ("D_1", None, False),
        ("E", ["{device_id}"], False),
    ],
)
def test_whose_a_client_id_was_by_patterns_that_may_be_gone(client_id, patterns, was_its):
    assert fits(client_id, "D", patterns) is was_its


def rule(effect, action, topic, exchange=None):
    values = {"effect": effect, "action": action, "topic": topic}
    return values if exchange is None else {**values, "exchange": exchange}


@pytest.mark.parametrize(
    ("rules", "current", "narrowed"),
    [
        ([rule("allow", "publish", "a/b")], [("publish", "a/#", None)], set()),
        ([rule("allow", "publish", "a/b")], [("subscribe", "a/#", None)], {"publish"}),
        ([rule("allow", "publish", "a/#")], [("publish", "a/b", None)], {"publish"}),
        ([rule("allow", "publish", "{attr.x}/b")], [("publish", "+/b", None)], set()),
        ([rule("allow", "publish", "{attr.x}/b")], [("publish", "+/+/b", None)], {"publish"}),
        ([rule("allow", "publish", "{device_id}/b")], [("publish", "{client_id}/b", None)], {"publish"}),
        ([rule("allow", "publish", "{attr.x}")], [("publish", "{attr.x}", None)], set()),
        ([rule("allow", "publish", "{attr.x}")], [("publish", "{attr.y}", None)], {"publish"}),
        ([rule("deny", "subscribe", "a")], [("subscribe", "#", None)], {"subscribe"}),
        ([rule("deny", "subscribe", "a"), rule("allow", "publish", "b")], [], {"publish", "subscribe"}),
        ([rule("allow", "publish", "a", "x")], [("publish", "a", "y")], {"publish"}),
        ([rule("allow", "publish", "a", "x")], [("publish", "a", "x")], set()),
        ([rule("allow", "publish", "a", "x")], [("publish", "a", None)], {"publish"}),
        ([rule("allow", "publish", "a")], [("publish", "a", "amq.topic")], set()),
    ],
)
def test_a_change_of_rules_narrows_unless_what_is_there_allows_as_much(rules, current, narrowed):
    assert narrowed_actions(rules, current, "amq.topic") == narrowed


ISSUER = "CN=Fleet CA,O=Org"
VALIDITY = "2026-11-24T11:39:36Z - 2027-12-25T11:39:36Z"
RECORD = {
    "serial": "ab",
    "issuer": ISSUER,
    "subject": "CN=K,2.5.4.5=SN 7",
    "common_name": "K",
    "not_before": datetime(2026, 11, 24, 11, 39, 36, tzinfo=UTC),
    "not_after": datetime(2027, 12, 25, 11, 39, 36, tzinfo=UTC),
    "state": "active",
}


def shown(user="K", **changes):
    certificate = {
        "certificate_serial": "AB",
        "certificate_issuer": ISSUER,
        "certificate_subject": f"CN={user},SERIALNUMBER=SN 7",
        "certificate_validity": VALIDITY,
    }
    return live(user, user, **{**certificate, **changes})


def fault(connection, *records):
    checks = checker()
    return connection_fault(checks, checks.registry, connection, CertificatesOnRecord(records))


def test_a_sweep_tells_what_is_wrong_by_cause():
    revoked = RECORD | {"state": "revoked", "subject": "CN=A", "common_name": "A"}
    causes = {
        cause: fault(connection, revoked)[0]
        for cause, connection in {
            "unknown_identity": live("nobody"),
            "wrong_client_id": live("A", "B"),
            "device_not_permitted": live("R", "R"),
            "account_not_permitted": live("svc", vhost="other"),
            "name_not_of_certificate": live("A", "A", certificate_subject="O=x,CN=B"),
            "certificate_revoked": shown("A", certificate_serial="00AB"),
            "certificate_unknown": shown("K", certificate_serial="AC"),
            "incomplete_facts": live("A"),
        }.items()
    }
    assert causes == {cause: cause for cause in causes}
    assert fault(shown("A", certificate_serial="00AC"), revoked) == (None, None)


@pytest.mark.parametrize(
    ("protocol", "cause", "why"),
    [
        ("AMQP 0-9-1", "device_not_permitted", "client_id_missing"),
        ("AMQP 1-0", "device_not_permitted", "client_id_missing"),
        ("STOMP 1.2", "device_not_permitted", "client_id_missing"),
        ("Web STOMP 1.2", "device_not_permitted", "client_id_missing"),
        ("stream", "device_not_permitted", "client_id_missing"),
        ("Direct 0-9-1", "device_not_permitted", "client_id_missing"),
        ("MQTT 5-0", "incomplete_facts", "not reported: client id"),
        ("Web MQTT 3-1-1", "incomplete_facts", "not reported: client id"),
        ("SOMETHING 1-0", "incomplete_facts", "not reported: protocol"),
        ("", "incomplete_facts", "not reported: protocol"),
    ],
)
def test_a_device_without_a_client_id_is_not_permitted_only_where_the_protocol_has_none(protocol, cause, why):
    assert fault(live("A", protocol=protocol)) == (cause, why)


@pytest.mark.parametrize("protocol", ["", "MQTT 5-0", "SOMETHING 1-0"])
@pytest.mark.parametrize(
    ("connection", "cause"),
    [
        (live("R"), "device_not_permitted"),
        (live("E"), "device_not_permitted"),
        (live("A", vhost="other"), "device_not_permitted"),
        (live("N", address="10.0.1.1"), "device_not_permitted"),
        (live("nobody"), "unknown_identity"),
        (live("svc", vhost="other"), "account_not_permitted"),
        (live("A", certificate_subject="CN=B"), "name_not_of_certificate"),
    ],
)
def test_what_is_certain_counts_although_something_is_not_told(protocol, connection, cause):
    values = {name: getattr(connection, name) for name in connection.__slots__} | {"protocol": protocol}
    assert fault(LiveConnection(**values))[0] == cause


@pytest.mark.parametrize(
    ("connection", "why"),
    [
        (live("N", "N_1", address=""), "not reported: address"),
        (live("N", "N_1", address="unknown"), "not reported: address"),
        (live("A", "A", vhost=""), "not reported: virtual host"),
        (live("", "A", vhost="", protocol=""), "not reported: user, protocol, virtual host"),
        (live("svc", protocol=""), "not reported: protocol"),
        (live("A", "A", certificate_subject="nonsense"), "unknown: the common name of its certificate"),
    ],
)
def test_what_is_not_told_is_reported_as_that(connection, why):
    assert fault(connection) == ("incomplete_facts", why)


@pytest.mark.parametrize(
    ("connection", "shows"),
    [
        (shown(), True),
        (shown(certificate_issuer="O=org,CN=Fleet CA"), True),
        (shown(certificate_subject="CN=other"), True),  # revocation lists contain only issuer and serial number
        (shown(certificate_serial="AC"), False),
        (shown(certificate_serial="-AB"), False),
        (shown(certificate_issuer="CN=Other CA,O=Org"), False),
        (shown(certificate_issuer=None), None),
        (shown(certificate_issuer=None, certificate_subject="CN=other"), False),
        (shown(certificate_serial=None), None),
        (shown(certificate_serial="?"), None),
        (shown(certificate_serial=None, certificate_issuer="CN=Other CA,O=Org"), False),
        (shown(certificate_serial=None, certificate_subject="CN=other"), False),
        (shown(certificate_serial=None, certificate_validity="2026-11-24T11:39:37Z - 2027-12-25T11:39:36Z"), False),
        (shown(certificate_serial=None, certificate_validity="soon"), None),
        (live("K", "K"), None),
    ],
)
def test_whether_a_connection_shows_a_certificate(connection, shows):
    assert shows_certificate(connection, RECORD) is shows
    as_json = RECORD | {"not_before": "2026-11-24T11:39:36+00:00", "not_after": "2027-12-25T12:39:36+01:00"}
    assert shows_certificate(connection, as_json) is shows


REVOKED = RECORD | {"state": "revoked"}
UNREADABLE = "CN=Fleet CA,O={asn1_OPENTYPE\\,\\<\\<48\\,0\\>\\>}"


@pytest.mark.parametrize(
    ("connection", "records", "cause"),
    [
        (shown(), [RECORD], None),
        (shown(), [], "certificate_unknown"),
        (shown(), [RECORD | {"issuer": "CN=Other CA"}], "certificate_unknown"),
        (shown(), [RECORD | {"issuer": "CN=Other CA"}, RECORD], None),
        (shown(), [RECORD | {"issuer": "CN=Other CA", "state": "revoked"}, RECORD], None),
        (shown(), [RECORD | {"issuer": "CN=Other CA", "state": "revoked"}], "certificate_unknown"),
        (shown(), [REVOKED], "certificate_revoked"),
        (shown(certificate_subject="CN=K"), [RECORD], "certificate_unknown"),
        (shown(certificate_subject="CN=K"), [REVOKED], "certificate_revoked"),
        (shown(certificate_validity=VALIDITY.replace("2027", "2037")), [RECORD], "certificate_unknown"),
        (shown(certificate_validity=None), [RECORD], "incomplete_facts"),
        (shown(certificate_issuer=UNREADABLE), [RECORD], "incomplete_facts"),
        (shown(certificate_issuer=UNREADABLE), [REVOKED], "incomplete_facts"),
        (shown(certificate_serial=None), [RECORD], "incomplete_facts"),
        (live("K", "K"), [RECORD], "incomplete_facts"),
    ],
)
def test_a_certificate_is_compared_with_its_record(connection, records, cause):
    assert fault(connection, *records)[0] == cause


@pytest.mark.parametrize(
    ("connection", "records", "cause"),
    [
        (shown("A"), [], None),
        (shown("A", certificate_serial=None), [], None),
        (shown("A", certificate_serial=None), [REVOKED], None),  # of another name
        (shown("A", certificate_serial=None), [REVOKED | {"common_name": "A"}], None),  # its subject is another
        (
            shown("A", certificate_serial=None),
            [REVOKED | {"common_name": "A", "subject": "CN=A,2.5.4.5=SN 7"}],
            "incomplete_facts",
        ),
    ],
)
def test_without_a_serial_number_only_a_certificate_that_may_be_revoked_is_in_doubt(connection, records, cause):
    assert fault(connection, *records)[0] == cause


def test_the_time_of_an_old_certificate_is_no_difference():
    """RabbitMQ shows a UTCTime of 1975 as 2075, and a GeneralizedTime of 2051 correctly."""
    record = RECORD | {"not_before": datetime(1975, 2, 3, 4, 5, 6, tzinfo=UTC)}
    record["not_after"] = datetime(2051, 2, 3, 4, 5, 6, tzinfo=UTC)
    assert fault(shown(certificate_validity="2075-02-03T04:05:06Z - 2051-02-03T04:05:06Z"), record)[0] is None


def test_what_a_client_claims_in_user_properties_is_compared():
    assert contradiction(registry(), live("A", "A", user_properties={"client_type": "APM", "client_name": "A"})) is None
    assert contradiction(registry(), live("cn-b", "B", user_properties={"client_name": "cn-b"})) is None
    assert "client_type 'AGV'" in contradiction(registry(), live("A", "A", user_properties={"client_type": "AGV"}))
    long = contradiction(registry(), live("A", "A", user_properties={"client_type": "x" * 100}))
    assert long == f"client_type {'x' * 64!r}, registered: 'APM'"
    assert "client_name 'B'" in contradiction(registry(), live("A", "A", user_properties={"client_name": "B"}))


def test_serials_are_compared_in_one_form():
    assert serial("00:AB:0C") == serial("AB0C") == "ab0c"
    assert serial("00") == "0"


def test_a_hold_does_not_hide_that_a_connection_is_in_a_virtual_host_that_is_gone():
    assert checker().connection(live("cn-b", "B")) is None
    assert checker().connection(live("cn-b", "B", vhost="gone")) is Reason.VHOST_NOT_LISTED
