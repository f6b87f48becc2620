"""Measures the most expensive topic decisions, in this process, without HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from authbackend.policy import decide
from authbackend.policy.model import RuleSet
from authbackend.policy.rules import Effect, Permission, TopicRule, Values
from authbackend.policy.topics import MOST_WORDS_WITH_MANY
from authbackend.registry.device_cache import CompiledDevices

LONG = 32_000
_SAME = ".".join(["a"] * LONG)
_DEEP = ".".join(["#"] + ["a"] * (MOST_WORDS_WITH_MANY - 1))
"""Overlaps none of the rules, so that all of them are checked."""
_DENIED = ("fleet/{client_id}/secret/%d", "{client_id}/a/{client_id}/a/a/b%d", "dev-{client_id}/+/%d")


def measure(rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each round, by kind of request."""
    return {
        "ms": {
            f"{words}, {rules} deny rules, client id {'usable' if client_id else 'unusable'}": _milliseconds(
                rounds, _decision(permission, key, rules, client_id)
            )
            for words, permission, key in (
                ("subscription of 32,000 levels", Permission.READ, _SAME),
                ("subscription of 4,096 levels with #", Permission.READ, _DEEP),
                ("topic of 4,096 levels", Permission.WRITE, _SAME[: 2 * MOST_WORDS_WITH_MANY - 1]),
            )
            for rules in (50, 2000)
            for client_id in ("c1", None)
        },
        "own_rules_ms": {"first question": _own_rules(rounds, cached=False), "later": _own_rules(rounds, cached=True)},
    }


def _decision(permission: Permission, key: str, number: int, client_id: str | None) -> Callable[[], object]:
    deny = [TopicRule(Effect.DENY, permission, _DENIED[n % len(_DENIED)] % n) for n in range(number)]
    rules = (RuleSet([*deny, TopicRule(Effect.ALLOW, permission, "#")]),)
    return lambda: decide.by_rules(rules, Values({"client_id": client_id}), permission, key)


def _own_rules(rounds: int, *, cached: bool) -> list[float]:
    rules = json.dumps([[n, "allow", "publish", f"fleet/{{device_id}}/{n}/#", None] for n in range(2000)])
    record = f"aT\t\t\t\t{rules}\t".encode()
    devices = CompiledDevices()
    devices.device("D1", record)
    return _milliseconds(rounds, lambda: (devices if cached else CompiledDevices()).device("D1", record))


def _milliseconds(rounds: int, decide_once: Callable[[], object]) -> list[float]:
    decide_once()  # the first decision builds the indexes
    times_ms = []
    for _ in range(rounds):
        began = time.perf_counter()
        decide_once()
        times_ms.append(round(1000 * (time.perf_counter() - began), 3))
    return times_ms
