"""A device's own rules are compiled once, and decisions always follow the current registry."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authbackend.policy import decide
from authbackend.policy.model import NO_RULES
from authbackend.policy.requests import TopicRequest
from authbackend.policy.rules import Effect
from authbackend.registry import records
from authbackend.registry.device_cache import CompiledDevices
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch
from tests.support.registry import new_store

TYPE = json.dumps(
    {
        "name": "T",
        "client_ids": ["{device_id}"],
        "vhosts": ["/"],
        "networks": None,
        "max_staleness_s": None,
        "rules": [],
        "move": None,
    }
).encode()


def rule(rule_id, topic, effect="allow"):
    return [rule_id, effect, "publish", topic, None]


def record(*rules, status="a", device_id="", held_until=""):
    return f"{status}T\t{device_id}\t\t\t{json.dumps(rules) if rules else ''}\t{held_until}".encode()


class Registry:
    """A store with one reader, used as a worker uses it."""

    def __init__(self):
        self.store = new_store()
        self.reader = self.store.reader()
        self.put(Patch(device_types={"T": TYPE}))

    def put(self, patch):
        self.store.apply(patch, FeedPosition("epoch", "incarnation", "1:1:"), 0.0)

    def write(self, name, text, device_id=None):
        row = None if text is None else DeviceRow(name.encode(), text, device_id and device_id.encode())
        self.put(Patch(devices={device_id or name: row}))

    def may_publish(self, key, name="D1", client_id="D1"):
        request = TopicRequest(name, "/", "amq.topic", "write", key, client_id)
        with self.reader as registry:
            return decide.topic(registry, request, 0.0, decide.DecisionSettings()).allowed


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def compiled(monkeypatch):
    """The topics of rules that were compiled."""
    topics = []
    made = records.TopicRule

    def counted(effect, permission, topic, **others):
        topics.append(topic)
        return made(effect, permission, topic, **others)

    monkeypatch.setattr(records, "TopicRule", counted)
    return topics


def test_own_rules_are_compiled_once(registry, compiled):
    registry.write("D1", record(rule(1, "a/#"), rule(2, "b")))
    for _ in range(3):
        assert registry.may_publish("a.b")
        assert registry.may_publish("b")
    assert compiled == ["a/#", "b"]
    registry.write("D2", record(rule(3, "c")))  # another version of the registry, the same device
    assert registry.may_publish("b")
    assert compiled == ["a/#", "b"]


def test_a_change_decides_at_once_and_compiles_what_is_new(registry, compiled):
    registry.write("D1", record(rule(1, "a/#"), rule(2, "b")))
    assert registry.may_publish("a.b")
    registry.write("D1", record(rule(1, "a/#"), rule(2, "b"), rule(3, "a/b", "deny")))
    assert not registry.may_publish("a.b")
    assert registry.may_publish("b")
    registry.write("D1", record(rule(2, "b")))
    assert not registry.may_publish("a.c")
    registry.write("D1", record(rule(2, "b"), status="r"))
    assert not registry.may_publish("b")
    registry.write("D1", None)
    assert not registry.may_publish("b")
    registry.write("D1", record())
    assert not registry.may_publish("b")
    assert compiled == ["a/#", "b", "a/b"]


def test_a_change_that_leaves_the_rules_alone_leaves_all_that_was_compiled_of_them(registry):
    own = rule(1, "a/#"), rule(2, "b")
    registry.write("D1", record(*own))
    assert registry.may_publish("a.b")
    with registry.reader as reader:
        before = reader.device_by_name("D1").rules
    registry.write("D1", record(*own, status="s", held_until="99"))
    assert not registry.may_publish("a.b")
    with registry.reader as reader:
        now = reader.device_by_name("D1")
        assert (now.status, now.held_until, now.rules is before) == ("suspended", 99.0, True)
    registry.write("D1", record(*own, rule(3, "c")))
    assert registry.may_publish("c")
    registry.write("D1", record(*own, device_id="D2"), "D2")
    with registry.reader as reader:
        assert {one.owner for one in reader.device_by_name("D1").rules} == {"device_id D2"}


def test_a_rule_that_was_edited_under_its_number_is_compiled_anew(registry):
    registry.write("D1", record(rule(1, "a")))
    assert registry.may_publish("a")
    registry.write("D1", record(rule(1, "a", "deny")))
    assert not registry.may_publish("a")
    registry.write("D1", record(rule(1, "c")))
    assert not registry.may_publish("a")
    assert registry.may_publish("c")


def test_a_common_name_that_passes_to_another_device_takes_no_rule_along(registry):
    registry.write("cn", record(rule(1, "{device_id}/x"), device_id="D1"), "D1")
    assert registry.may_publish("D1.x", "cn", "D1")
    registry.put(Patch(devices={"D1": None}))
    registry.write("cn", record(rule(1, "{device_id}/x"), device_id="D2"), "D2")
    assert not registry.may_publish("D1.x", "cn", "D2")
    assert registry.may_publish("D2.x", "cn", "D2")
    with registry.reader as reader:
        assert {one.owner for one in reader.device_by_name("cn").rules} == {"device_id D2"}


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["D1", "D2", "D3"]),
        st.one_of(
            st.none(),
            st.lists(
                st.tuples(st.integers(1, 3), st.sampled_from(["a", "b", "+", "{device_id}"]), st.sampled_from(Effect)),
                max_size=3,
            ),
        ),
        st.sampled_from("ar"),
    ),
    max_size=20,
)


@settings(deadline=None)
@given(CHANGES, st.integers(0, 5))
def test_what_is_kept_is_what_the_record_says(changes, most_rules):
    kept = CompiledDevices(most_rules)
    for name, rules, status in changes:
        if rules is None:
            kept.forget(name)
            continue
        text = record(*(rule(number, topic, str(effect)) for number, topic, effect in rules), status=status)
        for _ in range(2):
            cached, fresh = kept.device(name, text), records.device(name, text)
            assert (cached.rules, cached.status, cached.device_id) == (fresh.rules, fresh.status, fresh.device_id)
            assert (cached.rules is NO_RULES) == (not rules)
        assert kept.rules <= max(most_rules, 3)  # one device is kept, however many rules it has


def test_no_more_rules_are_kept_than_allowed(compiled):
    kept = CompiledDevices(most_rules=4)
    one, two, three = (record(rule(n, f"t{n}"), rule(n + 1, f"t{n}")) for n in (10, 20, 30))
    for name, text in (("D1", one), ("D2", two), ("D1", one), ("D3", three)):
        kept.device(name, text)
    assert kept.rules == 4
    compiled.clear()
    kept.device("D1", one)  # used more recently than D2
    assert compiled == []
    kept.device("D2", two)
    assert compiled == ["t20", "t20"]
    kept.forget("D2")
    kept.forget("nobody")
    assert kept.rules == 2
