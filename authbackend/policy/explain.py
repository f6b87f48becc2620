"""
Explain why a device may or may not do something: RabbitMQ's four requests in order, and the nearest rules.

The verdict comes from the functions that answer RabbitMQ; nothing is decided a second time here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from authbackend.policy import decide
from authbackend.policy.decide import Decision, PasswordCheck
from authbackend.policy.lookups import Registry
from authbackend.policy.model import Device, DeviceType
from authbackend.policy.names import DEVICE_ID_PLACEHOLDER
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest, ResourceRequest, TopicRequest, VhostRequest
from authbackend.policy.rules import Permission, TopicRule, Values
from authbackend.policy.topics import MANY, ONE, split, to_routing_key

MOST_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Step:
    """One request that RabbitMQ would send, and the decision."""

    question: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class NearRule:
    """An allow rule that did not match, and why."""

    rule: TopicRule
    missing: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """
    The outcome of an attempt, step by step.

    Args:
        steps: Up to and including the first denial.
        decision: The decision of the last step.
        nearest: If no rule allows it, the allow rules that come closest, best first.
    """

    client_id: str
    vhost: str
    routing_key: str
    steps: tuple[Step, ...]
    decision: Decision
    nearest: tuple[NearRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """
    What a device tries: publish to or subscribe to an MQTT topic.

    Args:
        client_id: None takes the first that the type's patterns allow.
        vhost: None takes the type's first.
        ip: The device's address; None takes one that its networks contain.
    """

    permission: Permission
    topic: str
    client_id: str | None = None
    vhost: str | None = None
    ip: str | None = None


def explain(
    registry: Registry, device: Device, attempt: Attempt, now: float, settings: decide.DecisionSettings
) -> Explanation:
    """Decide the four requests that RabbitMQ would send for a device with a certificate, until one is denied."""
    device_type = registry.device_type(device.type)
    client_id = attempt.client_id if attempt.client_id is not None else usual_client_id(device, device_type)
    vhost = attempt.vhost or (device_type.vhosts[0] if device_type and device_type.vhosts else "/")
    ip = attempt.ip or _usual_address(device_type)
    key = to_routing_key(attempt.topic)
    exchange = settings.mqtt_exchange
    name = device.common_name
    login = LoginRequest(name, None, client_id)
    on_vhost = VhostRequest(name, vhost, ip, client_id)
    on_exchange = ResourceRequest(name, vhost, "exchange", exchange, attempt.permission, client_id)
    on_topic = TopicRequest(name, vhost, exchange, attempt.permission, key, client_id)
    questions: tuple[tuple[str, Callable[[], Decision | PasswordCheck]], ...] = (
        ("login", lambda: decide.login(registry, login, now)),
        ("vhost", lambda: decide.vhost(registry, on_vhost, now)),
        ("exchange", lambda: decide.resource(registry, on_exchange, now, settings)),
        ("topic", lambda: decide.topic(registry, on_topic, now, settings)),
    )
    steps: list[Step] = []
    for question, ask in questions:
        decision = ask()
        assert isinstance(decision, Decision)  # only a login with a password needs a check
        steps.append(Step(question, decision))
        if not decision.allowed:
            break
    decision = steps[-1].decision
    nearest: tuple[NearRule, ...] = ()
    if decision.reason is Reason.NO_RULE_ALLOWS:
        values = decide.device_values(device, client_id, vhost)
        rules = [rule for rule_set in decide.rule_sets(registry, device) for rule in rule_set]
        nearest = nearest_rules(rules, values, attempt.permission, split(key))
    return Explanation(client_id, vhost, key, tuple(steps), decision, nearest)


def usual_client_id(device: Device, device_type: DeviceType | None) -> str:
    """Return the default client id: the first that the type's patterns allow."""
    for pattern in device_type.client_ids if device_type else ():
        return pattern.replace(DEVICE_ID_PLACEHOLDER, device.device_id).replace("*", "1")
    return device.device_id


def _usual_address(device_type: DeviceType | None) -> str:
    networks = device_type.networks.networks if device_type and device_type.networks else ()
    return str(networks[0].network_address) if networks else "127.0.0.1"


def nearest_rules(
    rules: Sequence[TopicRule], values: Values, permission: Permission, words: Sequence[str]
) -> tuple[NearRule, ...]:
    """Return the allow rules with this permission that come closest to matching, best first."""
    scored = []
    for rule in rules:
        if rule.permission is permission and rule.effect == "allow":
            score, missing = _compare(rule, values, words)
            scored.append((score, -rule.rule_id, NearRule(rule, missing)))
    scored.sort(key=lambda item: item[:2], reverse=True)
    return tuple(near for _, _, near in scored[:MOST_NEAREST])


def _compare(rule: TopicRule, values: Values, words: Sequence[str]) -> tuple[int, str]:
    """Return how many leading levels match, and what does not."""
    pattern = rule.pattern(values)
    if pattern is None:
        unusable = [name for name in rule.placeholders if values.get(name) is None]
        if not unusable:
            return -1, "its filter is malformed, so it grants nothing"
        return -1, f"{{{unusable[0]}}} has no value that is one topic level"
    agreed = 0
    for expected, word in zip(pattern.words, words, strict=False):
        if expected == MANY:
            break
        if expected != word and (expected != ONE or word == MANY):
            if word in (ONE, MANY):
                return (
                    agreed,
                    f'level {agreed + 1} asks for a wildcard "{_shown(word)}", the rule covers only "{_shown(expected)}" there',
                )
            return agreed, f'level {agreed + 1} is "{word}", the rule wants "{expected}"'
        agreed += 1
    wanted = [word for word in pattern.words if word != MANY]
    if len(words) < len(wanted):
        return agreed, f"the topic has {len(words)} levels, the rule wants {len(wanted)}"
    return agreed, f"the topic goes on after level {agreed}, the rule does not"


def _shown(word: str) -> str:
    return "+" if word == ONE else word
