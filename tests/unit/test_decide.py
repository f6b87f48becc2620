"""Decisions of the four endpoints: what is allowed, and the reason of each denial."""

import pytest

from authbackend.policy import client_ids, decide
from authbackend.policy.decide import Decision, DecisionSettings, PasswordCheck
from authbackend.policy.model import Login, RuleSet, resource_matches
from authbackend.policy.networks import Networks
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest, ResourceRequest, TopicRequest, VhostRequest
from authbackend.policy.rules import Values
from tests.unit.fleet import APM, FLEET, NOW, account, device, registry, rule

SETTINGS = DecisionSettings()


def login(username, password=None, client_id=None, fleet=FLEET):
    return decide.login(fleet, LoginRequest(username, password, client_id), NOW)


def vhost(username, client_id, name="/", ip="127.0.0.1", fleet=FLEET):
    return decide.vhost(fleet, VhostRequest(username, name, ip, client_id), NOW)


def resource(username, client_id, kind, name, permission, vhost_name="/", settings=SETTINGS, fleet=FLEET):
    return decide.resource(
        fleet, ResourceRequest(username, vhost_name, kind, name, permission, client_id), NOW, settings
    )


def topic(username, client_id, permission, key, exchange="amq.topic", vhost_name="/", fleet=FLEET):
    return decide.topic(fleet, TopicRequest(username, vhost_name, exchange, permission, key, client_id), NOW, SETTINGS)


@pytest.mark.parametrize(
    ("username", "reason"),
    [
        ("APM0001", Reason.ALLOWED),
        ("cn one", Reason.ALLOWED),
        ("CN1", Reason.UNKNOWN_IDENTITY),
        ("SOON", Reason.ALLOWED),
        ("nobody", Reason.UNKNOWN_IDENTITY),
        ("apm0001", Reason.UNKNOWN_IDENTITY),
        ("APM0001 ", Reason.UNKNOWN_IDENTITY),
        ("", Reason.UNKNOWN_IDENTITY),
        ("#", Reason.UNKNOWN_IDENTITY),
        ("%", Reason.UNKNOWN_IDENTITY),
        (".*", Reason.UNKNOWN_IDENTITY),
        ("APM0001,APM0002", Reason.UNKNOWN_IDENTITY),
        ("/:APM0001", Reason.UNKNOWN_IDENTITY),
        ("PENDING", Reason.DEVICE_PENDING),
        ("SUSPENDED", Reason.DEVICE_SUSPENDED),
        ("REVOKED", Reason.DEVICE_REVOKED),
        ("EXPIRED", Reason.DEVICE_EXPIRED),
        ("ORPHAN", Reason.DEVICE_TYPE_UNKNOWN),
    ],
)
def test_login_by_certificate(username, reason):
    decision = login(username)
    assert isinstance(decision, Decision)
    assert decision.reason is reason
    assert decision.allowed == (reason is Reason.ALLOWED)
    assert decision.tags == ()


@pytest.mark.parametrize("password", ["none", "", "x"])
@pytest.mark.parametrize("username", ["APM0001", "REVOKED", "amqp-machine"])
def test_a_password_on_a_certificate_identity_is_an_impersonation(username, password):
    decision = login(username, password)
    assert decision.reason is Reason.PASSWORD_ON_CERTIFICATE_IDENTITY
    assert not decision.allowed


def test_a_password_account_needs_its_password():
    assert login("monitoring").reason is Reason.PASSWORD_MISSING
    check = login("monitoring", "secret")
    assert isinstance(check, PasswordCheck)
    assert check.then.allowed
    assert check.then.tags == ("monitoring",)
    assert check.account is FLEET.account("monitoring")  # the account that the password is checked for
    assert check.otherwise.reason is Reason.PASSWORD_WRONG
    assert not check.otherwise.allowed


def test_an_unknown_name_costs_the_work_of_a_known_one():
    check = login("nobody", "secret")
    assert isinstance(check, PasswordCheck)
    assert check.account is None
    assert not check.then.allowed
    assert not check.otherwise.allowed


def test_a_certificate_account_logs_in_without_password_and_client_id():
    assert login("amqp-machine").allowed


def test_a_password_is_not_in_the_repr_of_a_request():
    assert "hunter2" not in repr(LoginRequest("a", "hunter2"))


# Client ids: (device, client id, reason)
BINDINGS = [
    ("APM0001", "APM0001", Reason.ALLOWED),
    ("APM0001", "APM0001_pub", Reason.ALLOWED),
    ("APM0001", "APM0001_", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "APM0001-pub", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "APM0001x", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "APM0002", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "APM0002_pub", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "apm0001", Reason.CLIENT_ID_NOT_BOUND),
    ("APM0001", "fY9-generated-by-broker", Reason.CLIENT_ID_NOT_BOUND),
    ("APM_1", "APM_1_pub", Reason.ALLOWED),
    ("APM", "APM_1_pub", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),  # it belongs to the longest matching device id
    ("APM", "APM_1", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),  # it equals a device's id
    ("APM", "APM_2_pub", Reason.ALLOWED),
    ("APM", "APM_10_pub", Reason.ALLOWED),  # APM_1 is not a prefix followed by a separator
    ("OFF", "OFF_9_pub", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),  # whatever the device's status
    ("TIED1", "TIED1", Reason.ALLOWED),
    ("TIED1", "TIED1_x", Reason.CLIENT_ID_NOT_BOUND),
    ("cn one", "CN1_a", Reason.ALLOWED),
    ("cn one", "cn one", Reason.CLIENT_ID_NOT_BOUND),
]


@pytest.mark.parametrize(("username", "client_id", "reason"), BINDINGS)
def test_client_ids_are_bound_at_every_question(username, client_id, reason):
    ip = "10.20.1.1"
    answers = [
        login(username, client_id=client_id),
        vhost(username, client_id, ip=ip),
        resource(username, client_id, "queue", f"mqtt-subscription-{client_id}qos1", "read"),
        topic(username, client_id, "write", "nothing"),
    ]
    for decision in answers[:3]:
        assert decision.reason is reason
    assert answers[3].reason is (Reason.NO_RULE_ALLOWS if reason is Reason.ALLOWED else reason)


def test_a_client_id_that_only_the_shorter_id_fits_is_the_shorter_ones():
    """The type of APM_1 allows only the device id as client id, so APM_1_pub does not fit it."""
    fleet = registry(device("APM"), device("APM_1", "MUTE"))
    assert login("APM", client_id="APM_1_pub", fleet=fleet).allowed
    assert login("APM", client_id="APM_1", fleet=fleet).reason is Reason.CLIENT_ID_OF_ANOTHER_DEVICE


def test_a_device_speaks_mqtt_only():
    """Only a login may have no client id, because RabbitMQ 3.x sends none there."""
    assert login("APM0001").allowed
    assert vhost("APM0001", None).reason is Reason.CLIENT_ID_MISSING
    assert (
        resource("APM0001", None, "queue", "mqtt-subscription-APM0001qos1", "read").reason is Reason.CLIENT_ID_MISSING
    )
    assert resource("APM0001", None, "exchange", "amq.default", "write").reason is Reason.CLIENT_ID_MISSING
    assert topic("APM0001", None, "write", "fleet.APM0001.telemetry.x").reason is Reason.CLIENT_ID_MISSING


@pytest.mark.parametrize("question", ["vhost", "resource", "topic"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PENDING", Reason.DEVICE_PENDING),
        ("SUSPENDED", Reason.DEVICE_SUSPENDED),
        ("REVOKED", Reason.DEVICE_REVOKED),
        ("EXPIRED", Reason.DEVICE_EXPIRED),
        ("ORPHAN", Reason.DEVICE_TYPE_UNKNOWN),
    ],
)
def test_a_device_that_is_not_active_is_denied_at_every_question(question, name, reason):
    ask = {
        "vhost": lambda: vhost(name, name),
        "resource": lambda: resource(name, name, "exchange", "amq.topic", "write"),
        "topic": lambda: topic(name, name, "write", f"fleet.{name}.telemetry.x"),
    }[question]
    assert not ask().allowed
    assert ask().reason is reason


def test_an_account_cannot_forward_past_its_topic_rules_by_binding_exchanges():
    """If bound to amq.topic, amq.fanout would carry any topic there; a binding needs write on one, read on the other."""
    everything = account("wide", login=Login.CERTIFICATE, password_hash=None, write=("*",), read=("*",))
    split_rights = account("split", login=Login.CERTIFICATE, password_hash=None, write=("amq.topic",), read=("*",))
    own_exchange = account(
        "own",
        write=("events", "amq.fanout"),
        read=("amq.fanout",),
        rules=RuleSet([rule("allow", "write", "x", "events")]),
    )
    fleet = registry(accounts=(everything, split_rights, own_exchange))

    def ask(name, exchange, permission):
        request = ResourceRequest(name, "/", "exchange", exchange, permission)
        return decide.resource(fleet, request, NOW, SETTINGS).reason

    assert ask("wide", "amq.topic", "write") is Reason.ALLOWED
    assert ask("wide", "amq.topic", "read") is Reason.ALLOWED
    assert ask("wide", "amq.fanout", "write") is Reason.ALLOWED
    assert ask("wide", "amq.fanout", "read") is Reason.UNCHECKED_DEAD_LETTERING
    assert ask("split", "amq.fanout", "read") is Reason.ALLOWED
    assert ask("own", "amq.fanout", "read") is Reason.UNCHECKED_DEAD_LETTERING


def test_accounts_use_mqtt_only_with_listed_client_ids_and_never_a_devices():
    assert login("mqtt-service", "p", "service-1").then.allowed
    assert login("mqtt-service", "p", "service-2").then.reason is Reason.CLIENT_ID_NOT_BOUND
    assert login("mqtt-service", "p", "APM0001_x").then.reason is Reason.CLIENT_ID_OF_ANOTHER_DEVICE
    assert login("monitoring", "p", "monitoring").then.reason is Reason.CLIENT_ID_NOT_BOUND
    assert vhost("mqtt-service", "service-1").allowed
    assert vhost("mqtt-service", None).allowed
    for client_id in ("APM0001", "APM0001_x", "REVOKED"):
        assert not vhost("mqtt-service", client_id).allowed
        assert not topic("mqtt-service", client_id, "read", "x").allowed


@pytest.mark.parametrize(
    ("username", "name", "ip", "reason"),
    [
        ("APM0001", "/", "anything", Reason.ALLOWED),
        ("APM0001", "other", "127.0.0.1", Reason.VHOST_NOT_LISTED),
        ("APM0001", "", "127.0.0.1", Reason.VHOST_NOT_LISTED),
        ("TIED1", "plant", "10.20.3.4", Reason.ALLOWED),
        ("TIED1", "/", "::ffff:10.20.3.4", Reason.ALLOWED),
        ("TIED1", "/", "::1", Reason.ALLOWED),
        ("TIED1", "/", "0:0:0:0:0:0:0:1", Reason.ALLOWED),
        ("TIED1", "/", "10.21.3.4", Reason.ADDRESS_NOT_IN_NETWORKS),
        ("TIED1", "/", "::ffff:10.21.3.4", Reason.ADDRESS_NOT_IN_NETWORKS),
        ("TIED1", "/", "::2", Reason.ADDRESS_NOT_IN_NETWORKS),
        ("TIED1", "/", "unknown", Reason.ADDRESS_NOT_IN_NETWORKS),
        ("TIED1", "/", "", Reason.ADDRESS_NOT_IN_NETWORKS),
        ("TIED1", "/", "10.20.3.4/32", Reason.ADDRESS_NOT_IN_NETWORKS),
        ("TIED1", "/", "169090600", Reason.ADDRESS_NOT_IN_NETWORKS),
    ],
)
def test_vhost(username, name, ip, reason):
    assert vhost(username, username, name, ip).reason is reason


def test_an_ipv4_mapped_network_is_the_network_it_stands_for():
    assert "10.1.2.3" in Networks.parse(["::ffff:0.0.0.0/96"])
    assert "10.1.2.3" in Networks.parse(["::ffff:10.1.2.3/128"])
    assert "::1" in Networks.parse(["10.0.0.0/8", "::1/128"])
    assert "::1" not in Networks.parse(["::ffff:0.0.0.0/96"])
    assert "10.1.2.3" in Networks.parse(["::ffff:10.0.0.0/104"])
    assert "11.1.2.3" not in Networks.parse(["::ffff:10.0.0.0/104"])
    assert "10.1.2.3" not in Networks.parse(["::/0"])


C = "APM0001_a"
OWN = [(f"mqtt-subscription-{C}qos0"), (f"mqtt-subscription-{C}qos1"), (f"mqtt-will-{C}")]


@pytest.mark.parametrize("permission", ["configure", "write", "read"])
@pytest.mark.parametrize("name", OWN)
def test_a_device_has_its_own_queues(name, permission):
    assert resource("APM0001", C, "queue", name, permission).allowed


@pytest.mark.parametrize(
    ("kind", "name", "permission"),
    [
        ("queue", "mqtt-subscription-APM0002qos1", "read"),
        ("queue", "mqtt-subscription-APM0001qos1", "read"),  # of its own device, but of another connection
        ("queue", f"mqtt-subscription-{C}qos2", "read"),
        ("queue", f"mqtt-subscription-{C}qos1x", "read"),
        ("queue", f"mqtt-subscription-{C}qos1qos1", "configure"),
        ("queue", f"mqtt-subscription-{C}", "configure"),
        ("queue", "mqtt-will-APM0002", "configure"),
        ("queue", "amq.gen-x", "configure"),
        ("queue", "", "configure"),
        ("queue", "amq.topic", "write"),
        ("exchange", f"mqtt-subscription-{C}qos1", "write"),
        ("exchange", "amq.topic", "configure"),
        ("exchange", "amq.default", "read"),
        ("exchange", "amq.default", "configure"),
        ("exchange", "", "write"),
        ("exchange", "amq.direct", "write"),
        ("exchange", "amq.topic2", "write"),
        ("topic", "amq.topic", "write"),
        ("user", "amq.topic", "write"),
        ("queue", OWN[0], "delete"),
    ],
)
def test_a_device_has_nothing_else(kind, name, permission):
    assert resource("APM0001", C, kind, name, permission).reason is Reason.RESOURCE_NOT_PERMITTED


def test_exchanges_follow_the_rules():
    """Write is allowed if some rule could allow a publish, read if some rule could allow a subscription."""
    assert resource("APM0001", C, "exchange", "amq.topic", "write").allowed
    assert resource("APM0001", C, "exchange", "amq.topic", "read").allowed
    assert resource("APM0001", C, "exchange", "amq.default", "write").allowed  # a delayed will
    for name in ("amq.topic", "amq.default"):
        assert resource("MUTE1", "MUTE1", "exchange", name, "write").reason is Reason.NO_RULE_ALLOWS
    assert resource("MUTE1", "MUTE1", "exchange", "amq.topic", "read").reason is Reason.NO_RULE_ALLOWS
    assert resource("APM0001", C, "exchange", "amq.topic", "write", "other").reason is Reason.VHOST_NOT_LISTED


def test_a_rule_whose_placeholder_has_no_value_opens_no_exchange():
    kind = registry(
        device("D1", "T"),
        types=(
            APM.__class__("T", ("{device_id}",), ("/",), None, RuleSet([rule("allow", "write", "a/{attr.site}/x")])),
        ),
    )
    request = ResourceRequest("D1", "/", "exchange", "amq.default", "write", "D1")
    assert decide.resource(kind, request, NOW, SETTINGS).reason is Reason.NO_RULE_ALLOWS


def test_another_mqtt_exchange_is_a_setting():
    other_exchange = DecisionSettings(mqtt_exchange="fleet")
    assert resource("APM0001", C, "exchange", "fleet", "write", settings=other_exchange).allowed
    assert (
        resource("APM0001", C, "exchange", "amq.topic", "write", settings=other_exchange).reason
        is Reason.RESOURCE_NOT_PERMITTED
    )


@pytest.mark.parametrize(
    ("permission", "key", "reason"),
    [
        ("write", "fleet.APM0001.telemetry", Reason.ALLOWED),
        ("write", "fleet.APM0001.telemetry.speed", Reason.ALLOWED),
        ("write", "fleet.APM0001.telemetryx", Reason.NO_RULE_ALLOWS),
        ("write", "fleet.APM0001.telemetry.raw.x", Reason.RULE_DENIES),
        ("write", "fleet.APM0001.telemetry.rawx", Reason.ALLOWED),
        ("write", "fleet.APM0002.telemetry.x", Reason.NO_RULE_ALLOWS),
        ("write", "fleet.*.telemetry.x", Reason.NO_RULE_ALLOWS),
        ("write", "fleet.{device_id}.telemetry.x", Reason.NO_RULE_ALLOWS),
        ("write", "fleet.+.telemetry.x", Reason.NO_RULE_ALLOWS),
        ("write", "#", Reason.NO_RULE_ALLOWS),
        ("write", "", Reason.NO_RULE_ALLOWS),
        ("read", "fleet.APM0001.commands.#", Reason.ALLOWED),
        ("read", "fleet.APM0001.commands.*.x", Reason.ALLOWED),
        ("read", "fleet.#", Reason.NO_RULE_ALLOWS),
        ("read", "#", Reason.NO_RULE_ALLOWS),
        ("read", "*.APM0001.commands", Reason.NO_RULE_ALLOWS),
        ("read", "fleet.*.x", Reason.NO_RULE_ALLOWS),
        ("read", "fleet.APM0001.commands.#.a.#.b.#", Reason.TOO_MANY_WILDCARDS),
        ("configure", "fleet.APM0001.telemetry", Reason.RESOURCE_NOT_PERMITTED),
    ],
)
def test_topics(permission, key, reason):
    assert topic("APM0001", "APM0001", permission, key).reason is reason


def test_a_decision_names_its_rule():
    assert topic("APM0001", "APM0001", "write", "fleet.APM0001.telemetry.raw.x").rule.topic.endswith("raw/#")
    assert topic("APM0001", "APM0001", "write", "fleet.APM0001.telemetry.x").rule.topic.endswith("telemetry/#")


def test_topics_are_decided_on_the_mqtt_exchange_only():
    denied = topic("APM0001", "APM0001", "write", "fleet.APM0001.telemetry.x", exchange="other")
    assert denied.reason is Reason.EXCHANGE_NOT_PERMITTED


def test_a_devices_own_rules_stand_beside_its_types():
    own = RuleSet([rule("allow", "write", "extra"), rule("deny", "write", "fleet/{device_id}/telemetry/off")])
    fleet = registry(device("D", rules=own))
    assert topic("D", "D", "write", "extra", fleet=fleet).allowed
    assert topic("D", "D", "write", "fleet.D.telemetry.on", fleet=fleet).allowed
    assert topic("D", "D", "write", "fleet.D.telemetry.off", fleet=fleet).reason is Reason.RULE_DENIES


def test_a_type_change_changes_both_directions_at_once():
    fleet = registry(device("D"))
    assert topic("D", "D", "write", "fleet.D.telemetry.x", fleet=fleet).allowed
    fleet = registry(device("D", "MUTE"))
    assert topic("D", "D", "write", "fleet.D.telemetry.x", fleet=fleet).reason is Reason.NO_RULE_ALLOWS


@pytest.mark.parametrize(
    ("kind", "name", "permission", "reason"),
    [
        ("queue", "app.1", "configure", Reason.ALLOWED),
        ("queue", "app.1", "read", Reason.ALLOWED),
        ("exchange", "events", "write", Reason.ALLOWED),
        ("exchange", "events", "configure", Reason.RESOURCE_NOT_PERMITTED),
        ("queue", "mqtt-subscription-APM0001qos1", "read", Reason.ALLOWED),  # written out
        ("queue", "mqtt-subscription-APM0002qos1", "read", Reason.RESOURCE_NOT_PERMITTED),
        ("queue", "app", "read", Reason.RESOURCE_NOT_PERMITTED),
        ("exchange", "amq.default", "write", Reason.RESOURCE_NOT_PERMITTED),
    ],
)
def test_resources_of_accounts(kind, name, permission, reason):
    assert resource("amqp-machine", None, kind, name, permission).reason is reason


def test_topics_of_accounts_are_decided_per_exchange():
    assert topic("amqp-machine", None, "write", "app.x", exchange="events").allowed
    assert not topic("amqp-machine", None, "write", "app.x").allowed
    assert topic("amqp-machine", None, "read", "fleet.#").allowed
    assert topic("amqp-machine", None, "read", "fleet.#", vhost_name="other").reason is Reason.VHOST_NOT_LISTED


def test_dead_lettering_past_the_topic_rules_is_denied_for_any_mqtt_exchange():
    for exchange in ("amq.topic", "fleet"):
        answer = resource(
            "dead-letters", None, "exchange", exchange, "write", settings=DecisionSettings(mqtt_exchange=exchange)
        )
        assert answer.reason is Reason.UNCHECKED_DEAD_LETTERING


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "anything", True),
        ("*", "amq.default", False),
        ("*", "", False),
        ("*", "mqtt-subscription-xqos1", False),
        ("mqtt-*", "mqtt-will-x", False),
        ("mqtt-will-*", "mqtt-will-x", True),
        ("mqtt-subscription-*", "mqtt-subscription-xqos1", True),
        ("amq.default", "amq.default", True),
        ("amq.*", "amq.default", False),
        ("a*c", "abc", True),
        ("a*c", "ac", True),
        ("a*c", "acd", False),
        ("a*a", "a", False),
        ("a*b*c", "a1b2c", True),
        ("a*b*c", "a1c2b", False),
        ("a.c", "abc", False),
        ("a%", "ab", False),
        ("**", "x", True),
        ("a*b*c", "a1c", False),
        ("ab*b*c", "abc", False),  # no character is used twice
        ("a*b*b", "abb", True),
        ("a*bb*b", "abb", False),
        ("a*x*y*c", "axyc", True),
        ("a*y*x*c", "axyc", False),
        ("amq.*", "amq.topic", True),
        ("mqtt-subscription-*", "mqtt-will-x", False),
        ("mqtt-subscription*", "mqtt-subscription-xqos1", False),
    ],
)
def test_resource_patterns(pattern, name, expected):
    assert resource_matches(pattern, name) is expected


APM_AND = {
    "login": lambda: login("APM0001"),
    "vhost": lambda: vhost("APM0001", "APM0001"),
    "queue": lambda: resource("APM0001", C, "queue", OWN[0], "read"),
    "exchange": lambda: resource("APM0001", C, "exchange", "amq.topic", "write"),
    "topic": lambda: topic("APM0001", "APM0001", "write", "fleet.APM0001.telemetry"),
    "a password": lambda: login("APM0001", "x"),
    "a foreign client id": lambda: login("APM0001", client_id="APM0002"),
    "no client id": lambda: vhost("APM0001", None),
    "a foreign vhost": lambda: vhost("APM0001", "APM0001", "other"),
    "a foreign vhost at a topic": lambda: topic("APM0001", "APM0001", "write", "x", vhost_name="other"),
    "pending": lambda: login("PENDING"),
    "suspended": lambda: login("SUSPENDED"),
    "revoked": lambda: login("REVOKED"),
    "expired": lambda: login("EXPIRED"),
    "held": lambda: login("D", fleet=registry(device("D", held_until=NOW + 1))),
    "a foreign queue": lambda: resource("APM0001", C, "queue", "x", "read"),
    "no permission": lambda: topic("APM0001", "APM0001", "configure", "x"),
    "a foreign exchange": lambda: topic("APM0001", "APM0001", "write", "x", exchange="other"),
    "no rule": lambda: topic("APM0001", "APM0001", "write", "x"),
    "a deny rule": lambda: topic("APM0001", "APM0001", "write", "fleet.APM0001.telemetry.raw"),
    "wildcards": lambda: topic("APM0001", "APM0001", "read", "#.#.#"),
}
ACCOUNT_AND = {
    "login": lambda: login("amqp-machine"),
    "login by password": lambda: login("monitoring", "x").then,
    "vhost": lambda: vhost("monitoring", None),
    "queue": lambda: resource("amqp-machine", None, "queue", "app.1", "read"),
    "topic": lambda: topic("amqp-machine", None, "read", "fleet.#"),
    "a password": lambda: login("amqp-machine", "x"),
    "no password": lambda: login("monitoring"),
    "a wrong password": lambda: login("monitoring", "x").otherwise,
    "a foreign client id": lambda: login("monitoring", "x", "c").then,
    "a foreign client id at the vhost": lambda: vhost("monitoring", "c"),
    "a foreign client id at a topic": lambda: topic("monitoring", "c", "read", "x"),
    "a foreign vhost": lambda: vhost("monitoring", None, "other"),
    "a foreign vhost at a topic": lambda: topic("monitoring", None, "read", "x", vhost_name="other"),
    "a foreign queue": lambda: resource("amqp-machine", None, "queue", "x", "read"),
    "no queue": lambda: resource("amqp-machine", None, "user", "app.1", "read"),
    "dead letters": lambda: resource("dead-letters", None, "exchange", "amq.topic", "write"),
    "no permission": lambda: topic("amqp-machine", None, "configure", "x"),
    "no rule": lambda: topic("amqp-machine", None, "write", "x"),
    "wildcards": lambda: topic("amqp-machine", None, "read", "#.#.#"),
}
UNKNOWN_AND = {
    "login": lambda: login("nobody"),
    "a password": lambda: login("nobody", "x").otherwise,
    "vhost": lambda: vhost("nobody", None),
    "queue": lambda: resource("nobody", None, "queue", "x", "read"),
    "topic": lambda: topic("nobody", None, "read", "x"),
}


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        pytest.param(kind, ask, id=f"{kind} and {case}")
        for kind, asked in (("APM", APM_AND), ("account", ACCOUNT_AND), ("unknown", UNKNOWN_AND))
        for case, ask in asked.items()
    ],
)
def test_every_answer_is_counted_under_what_asked(kind, ask):
    """The label of the metrics is a device type, ``account`` or ``unknown``."""
    assert ask().kind == kind


def test_the_types_of_devices_without_rules_networks_or_a_type_are_counted_too():
    assert resource("MUTE1", "MUTE1", "exchange", "amq.topic", "write").kind == "MUTE"
    assert vhost("TIED1", "TIED1", ip="192.0.2.1").kind == "TIED"
    assert login("ORPHAN").kind == "GONE"
    stale = registry(device("D", "T"), types=(APM.__class__("T", max_staleness_s=1.0),), age_s=2.0)
    assert login("D", fleet=stale).kind == "T"


@pytest.mark.parametrize("question", ["vhost", "resource", "topic"])
def test_whom_nobody_knows_is_told_so_at_every_question(question):
    decision = {"vhost": UNKNOWN_AND["vhost"], "resource": UNKNOWN_AND["queue"], "topic": UNKNOWN_AND["topic"]}[
        question
    ]()
    assert decision == Decision(False, Reason.UNKNOWN_IDENTITY, "unknown")


@pytest.mark.parametrize(
    ("client_id", "reason"),
    [
        (None, Reason.ALLOWED),
        ("service-1", Reason.ALLOWED),
        ("service-2", Reason.CLIENT_ID_NOT_BOUND),
        ("APM0001_x", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),
    ],
)
def test_the_client_ids_of_an_account_are_checked_at_every_question(client_id, reason):
    fleet = registry(
        device("APM0001"),
        accounts=(
            account(
                "svc",
                client_ids=("service-1", "APM0001_x"),
                read=("q",),
                rules=RuleSet([rule("allow", "read", "#")]),
            ),
        ),
    )
    answers = [
        login("svc", "p", client_id, fleet=fleet).then,
        vhost("svc", client_id, fleet=fleet),
        resource("svc", client_id, "queue", "q", "read", fleet=fleet),
        topic("svc", client_id, "read", "a", fleet=fleet),
    ]
    assert [(answer.allowed, answer.reason) for answer in answers] == [(reason is Reason.ALLOWED, reason)] * 4


@pytest.mark.parametrize("kind", ["topic", "user", ""])
def test_an_account_has_nothing_but_queues_and_exchanges(kind):
    decision = resource("amqp-machine", None, kind, "app.1", "read")
    assert decision == Decision(False, Reason.RESOURCE_NOT_PERMITTED, "account")


@pytest.mark.parametrize(
    ("ask", "held"),
    [
        (lambda fleet: login("D", fleet=fleet), True),
        (lambda fleet: vhost("D", "D", fleet=fleet), True),
        (lambda fleet: topic("D", "D", "write", "fleet.D.telemetry", fleet=fleet), False),
        (lambda fleet: resource("D", "D", "exchange", "amq.topic", "write", fleet=fleet), False),
    ],
)
def test_a_device_that_is_held_does_not_get_in_until_then(ask, held):
    """Its connections are closed, and its will is decided by the rules."""
    for held_until, expected in ((NOW + 1, held), (NOW, False), (NOW - 1, False), (None, False)):
        answer = ask(registry(device("D", held_until=held_until)))
        assert answer.reason is (Reason.ENFORCEMENT_IN_PROGRESS if expected else Reason.ALLOWED)
        assert answer.allowed is not expected


@pytest.mark.parametrize(("age_s", "allowed"), [(0.0, True), (5.0, True), (5.1, False)])
def test_a_copy_that_is_older_than_its_type_allows_lets_no_device_of_it_in(age_s, allowed):
    types = (APM.__class__("T", ("{device_id}",), ("/",), max_staleness_s=5.0), APM)
    fleet = registry(device("D", "T"), device("A"), types=types, age_s=age_s)
    for answer in (login("D", fleet=fleet), vhost("D", "D", fleet=fleet)):
        assert answer.allowed is allowed
        assert answer.reason is (Reason.ALLOWED if allowed else Reason.REGISTRY_STALE)
    assert login("A", fleet=fleet).allowed


@pytest.mark.parametrize("name", ["REVOKED", "EXPIRED", "ORPHAN"])
def test_why_a_device_may_do_nothing_comes_before_what_its_request_lacks(name):
    device = FLEET.device_by_name(name)
    fault = decide.device_fault(FLEET, device, NOW)
    assert not fault.allowed
    assert vhost(name, None).reason is fault.reason is login(name).reason
    assert decide.device_fault(FLEET, FLEET.device_by_name("APM0001"), NOW) is None


def test_a_device_is_on_no_vhost_but_those_of_its_type_at_every_question():
    for answer in (
        vhost("APM0001", "APM0001", "other"),
        resource("APM0001", C, "queue", OWN[0], "read", "other"),
        topic("APM0001", "APM0001", "write", "fleet.APM0001.telemetry", vhost_name="other"),
    ):
        assert answer == Decision(False, Reason.VHOST_NOT_LISTED, "APM")


@pytest.mark.parametrize(
    ("topic_filter", "key"),
    [
        ("{device_id}", "D"),
        ("{client_id}", "D_1"),
        ("{device_type}", "T"),
        ("{vhost}", "plant"),
        ("{attr.site}", "north"),
    ],
)
def test_a_request_gives_every_placeholder_its_value(topic_filter, key):
    kind = APM.__class__("T", ("{device_id}_*",), ("plant",), rules=RuleSet([rule("allow", "write", topic_filter)]))
    fleet = registry(device("D", "T", attributes={"site": "north"}), types=(kind,))

    def publish(routing_key):
        return topic("D", "D_1", "write", routing_key, vhost_name="plant", fleet=fleet)

    assert publish(key).allowed
    assert publish("x").reason is Reason.NO_RULE_ALLOWS
    opened = resource("D", "D_1", "exchange", "amq.topic", "write", "plant", fleet=fleet)
    assert opened == Decision(True, Reason.ALLOWED, "T", rule("allow", "write", topic_filter))


@pytest.mark.parametrize(
    ("topic_filter", "client_id", "allowed"),
    [("{client_id}", "c", True), ("{vhost}", "c", False), ("{client_id}", None, False), ("{device_id}", "c", False)],
)
def test_placeholders_in_the_rules_of_an_account(topic_filter, client_id, allowed):
    rules = RuleSet([rule("allow", "write", topic_filter)])
    fleet = registry(accounts=(account("svc", client_ids=("c",), rules=rules),))
    assert topic("svc", client_id, "write", "c", fleet=fleet).allowed is allowed


def test_the_vhost_is_a_value_in_the_rules_of_an_account():
    fleet = registry(accounts=(account("svc", vhosts=("plant",), rules=RuleSet([rule("allow", "write", "{vhost}")])),))
    assert topic("svc", None, "write", "plant", vhost_name="plant", fleet=fleet).allowed


def test_rules_without_an_exchange_are_the_mqtt_exchanges_and_of_no_other():
    rules = RuleSet(
        [rule("allow", "write", "a"), rule("allow", "write", "b", "events"), rule("allow", "write", "c", "amq.topic")]
    )
    fleet = registry(accounts=(account("svc", rules=rules),))
    allowed = {
        (exchange, key)
        for exchange in ("amq.topic", "events", "other")
        for key in "abc"
        if topic("svc", None, "write", key, exchange=exchange, fleet=fleet).allowed
    }
    assert allowed == {("amq.topic", "a"), ("amq.topic", "c"), ("events", "b")}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("#.x.#", Reason.ALLOWED),
        ("#.#.#", Reason.TOO_MANY_WILDCARDS),
        ("#" + ".x" * 4095, Reason.ALLOWED),
        ("#" + ".x" * 4096, Reason.TOO_MANY_WILDCARDS),
        ("x" + ".x" * 4096, Reason.ALLOWED),
        ("*" + ".x" * 4096, Reason.ALLOWED),
    ],
)
def test_the_wildcards_of_a_subscription_have_limits_and_those_of_a_topic_have_none(key, reason):
    rules = (RuleSet([rule("allow", "read", "#"), rule("allow", "write", "#")]),)
    assert decide.by_rules(rules, Values({}), "read", key) == Decision(
        reason is Reason.ALLOWED, reason, "unknown", rule("allow", "read", "#") if reason is Reason.ALLOWED else None
    )
    assert decide.by_rules(rules, Values({}), "write", key).allowed


def test_among_many_deny_rules_a_missing_value_denies_what_it_could_have_been():
    rules = RuleSet(
        [rule("allow", "write", "#"), *(rule("deny", "write", topic) for topic in ("n/1", "a/{client_id}/z", "n/2"))]
    )
    for client_id, allowed in ((None, False), ("#", False), ("c", True)):
        answer = decide.by_rules((rules,), Values({"client_id": client_id}), "write", "a.b.z")
        assert answer.allowed is allowed


def test_a_decision_says_all_that_is_known():
    """For logs and explanations: the verdict, its reason and the rule."""
    allow, deny = rule("allow", "write", "#"), rule("deny", "write", "a")
    fleet = registry(
        device("D", "T"), types=(APM.__class__("T", ("{device_id}",), ("/",), rules=RuleSet([allow, deny])),)
    )
    assert topic("D", "D", "write", "a", fleet=fleet) == Decision(False, Reason.RULE_DENIES, "T", deny)
    assert topic("D", "D", "write", "b", fleet=fleet) == Decision(True, Reason.ALLOWED, "T", allow)
    assert topic("D", "D", "write", "a", fleet=fleet).allowed is False
    assert login("amqp-machine") == Decision(True, Reason.ALLOWED, "account")
    assert login("monitoring", "x").then == Decision(True, Reason.ALLOWED, "account", None, ("monitoring",))


def test_no_rules_are_decided_by_for_a_type_that_is_gone():
    own = RuleSet([rule("allow", "write", "a")])
    assert decide.rule_sets(FLEET, device("D", "GONE", rules=own)) == (RuleSet(), own)


@pytest.mark.parametrize(
    ("client_id", "owner"),
    [
        ("APM0001", "APM0001"),
        ("APM0001_x", "APM0001"),
        ("APM_1_x", "APM_1"),  # the longest matching device id
        ("APM_2_x", "APM"),
        ("OFF_9_x", "OFF_9"),  # whatever the device's status
        ("TIED1", "TIED1"),
        ("TIED1_x", None),  # its type does not allow such client ids
        ("ORPHAN", "ORPHAN"),
        ("ORPHAN_x", None),
        ("nobody", None),
        ("", None),
    ],
)
def test_whose_a_client_id_is(client_id, owner):
    device = client_ids.owner_of(FLEET, client_id)
    assert (device and device.device_id) == owner


def test_an_empty_registry_denies_everything():
    nothing = registry(types=())
    assert not login("APM0001", fleet=nothing).allowed
    assert not topic("APM0001", "APM0001", "write", "x", fleet=nothing).allowed
    no_lists = registry(device("D", "T"), accounts=(account("a", vhosts=()),), types=(APM.__class__("T"),))
    assert not decide.vhost(no_lists, VhostRequest("D", "/", "127.0.0.1", "D"), NOW).allowed
    assert not decide.vhost(no_lists, VhostRequest("a", "/", "127.0.0.1", None), NOW).allowed
