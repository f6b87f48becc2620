"""Format explanations as JSON and as text, for both the admin listener and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from authbackend.errors import InvalidInput
from authbackend.policy.explain import Attempt, Explanation
from authbackend.policy.model import Device
from authbackend.policy.rules import Permission, TopicRule

ACTIONS = {"publish": Permission.WRITE, "subscribe": Permission.READ}
_NAMES = {permission: action for action, permission in ACTIONS.items()}


def read_attempt(query: Mapping[str, str]) -> tuple[str, Attempt]:
    """
    Parse the parameters ``device``, ``action`` and ``topic``, and optionally ``client_id``, ``vhost`` and ``ip``.

    Raises:
        InvalidInput: A parameter is missing or invalid.
    """
    missing = [name for name in ("device", "action", "topic") if name not in query]
    if missing:
        raise InvalidInput(f"missing: {', '.join(missing)}; try ?device=APM0001&action=publish&topic=fleet/x")
    if query["action"] not in ACTIONS:
        raise InvalidInput("action must be one of: publish, subscribe")
    attempt = Attempt(
        ACTIONS[query["action"]], query["topic"], query.get("client_id"), query.get("vhost"), query.get("ip")
    )
    return query["device"], attempt


def as_json(device: Device, attempt: Attempt, explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as a JSON object."""
    decision = explanation.decision
    return {
        "device": device.device_id,
        "device_type": device.type,
        "status": str(device.status),
        "action": _NAMES[attempt.permission],
        "topic": attempt.topic,
        "routing_key": explanation.routing_key,
        "client_id": explanation.client_id,
        "vhost": explanation.vhost,
        "verdict": "allow" if decision.allowed else "deny",
        "reason": str(decision.reason),
        "decided_at": explanation.steps[-1].question,
        "rule": _rule(decision.rule),
        "nearest": [{**(_rule(near.rule) or {}), "missing": near.missing} for near in explanation.nearest],
    }


def _rule(rule: TopicRule | None) -> dict[str, Any] | None:
    if rule is None:
        return None
    return {
        "id": rule.rule_id,
        "of": rule.owner,
        "effect": str(rule.effect),
        "action": _NAMES[rule.permission],
        "topic": rule.topic,
    }


def as_text(explanation: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a readable explanation, from its JSON object."""
    yield (
        f"{explanation['verdict'].upper()}: device {explanation['device']} ({explanation['device_type']}, "
        f"{explanation['status']}) {explanation['action']} {explanation['topic']}"
    )
    yield f"  as client id {explanation['client_id']} in vhost {explanation['vhost']}"
    yield f"  reason: {explanation['reason']}, at the {explanation['decided_at']} question"
    if explanation["rule"]:
        yield f"  decided by {_line(explanation['rule'])}"
    for near in explanation["nearest"]:
        yield f"  nearest: {_line(near)}"
        yield f"           {near['missing']}"
    if explanation["reason"] == "no_rule_allows" and not explanation["nearest"]:
        yield f"  neither the type nor the device has an allow rule for {explanation['action']}"


def _line(rule: Mapping[str, Any]) -> str:
    return f"rule {rule['id']} of {rule['of']}: {rule['effect']} {rule['action']} {rule['topic']}"
