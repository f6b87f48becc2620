"""The four questions, one by one: what is allowed, and for every denial its reason."""

import pytest

from authbackend.policy import decide
from authbackend.policy.decide import Decision, DecisionSettings, PasswordCheck
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest, ResourceRequest, TopicRequest, VhostRequest
from authbackend.policy.rules import Login, Networks, RuleSet, resource_matches
from tests.unit.fleet import APM, FLEET, NOW, account, device, registry, rule

SETTINGS = DecisionSettings()


def login(username, password=None, client_id=None, fleet=FLEET):
    return decide.login(fleet, LoginRequest(username, password, client_id), NOW)


def vhost(username, client_id, name="/", ip="127.0.0.1"):
    return decide.vhost(FLEET, VhostRequest(username, name, ip, client_id), NOW)


def resource(username, client_id, kind, name, permission, vhost_name="/", settings=SETTINGS):
    return decide.resource(
        FLEET, ResourceRequest(username, vhost_name, kind, name, permission, client_id), NOW, settings
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
    ("APM", "APM_1_pub", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),  # the longest device id owns it
    ("APM", "APM_1", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),  # it equals a device's id
    ("APM", "APM_2_pub", Reason.ALLOWED),
    ("APM", "APM_10_pub", Reason.ALLOWED),  # APM_1 is no prefix that ends before a separator
    ("OFF", "OFF_9_pub", Reason.CLIENT_ID_OF_ANOTHER_DEVICE),  # devices in every status own theirs
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
    """APM_1 is of a type whose devices use nothing but their id: APM_1_pub does not fit it."""
    fleet = registry(device("APM"), device("APM_1", "MUTE"))
    assert login("APM", client_id="APM_1_pub", fleet=fleet).allowed
    assert login("APM", client_id="APM_1", fleet=fleet).reason is Reason.CLIENT_ID_OF_ANOTHER_DEVICE


def test_a_device_speaks_mqtt_only():
    """Only a login may lack a client id, because RabbitMQ 3.x sends none there."""
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
    """Bound to amq.topic, amq.fanout would carry any topic there: write on the one and read on the other are asked."""
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
        ("queue", "mqtt-subscription-APM0001qos1", "read"),  # its own device's, but another connection's
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
    """Write where some rule could allow a publish, read where some rule could allow a subscription."""
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
    mine = DecisionSettings(mqtt_exchange="fleet")
    assert resource("APM0001", C, "exchange", "fleet", "write", settings=mine).allowed
    assert (
        resource("APM0001", C, "exchange", "amq.topic", "write", settings=mine).reason is Reason.RESOURCE_NOT_PERMITTED
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
    ],
)
def test_resource_patterns(pattern, name, expected):
    assert resource_matches(pattern, name) is expected


def test_an_empty_registry_denies_everything():
    nothing = registry(types=())
    assert not login("APM0001", fleet=nothing).allowed
    assert not topic("APM0001", "APM0001", "write", "x", fleet=nothing).allowed
    no_lists = registry(device("D", "T"), accounts=(account("a", vhosts=()),), types=(APM.__class__("T"),))
    assert not decide.vhost(no_lists, VhostRequest("D", "/", "127.0.0.1", "D"), NOW).allowed
    assert not decide.vhost(no_lists, VhostRequest("a", "/", "127.0.0.1", None), NOW).allowed
