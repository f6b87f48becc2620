"""While client ids move from one device to another, neither may log in with them; nothing else changes for the two."""

import json
from dataclasses import replace

import pytest

from authbackend.policy import decide
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.model import ClientIdMove
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest, TopicRequest, VhostRequest
from authbackend.registry import records
from tests.unit.fleet import APM, NOW, device, registry

HELD = Reason.ENFORCEMENT_IN_PROGRESS


def fleet(held=None, until=NOW + 1, former=("{device_id}",)):
    wide = replace(APM, name="WIDE", move=ClientIdMove(former, held, until))
    return registry(device("APM"), device("APM_1", "WIDE"), types=(APM, wide))


def reason_for(user, client_id, registry_copy):
    login = decide.login(registry_copy, LoginRequest(user, None, client_id), NOW)
    vhost = decide.vhost(registry_copy, VhostRequest(user, "/", "127.0.0.1", client_id), NOW)
    assert login.reason == vhost.reason
    return vhost.reason


@pytest.mark.parametrize(
    ("user", "client_id", "registry_copy", "reason"),
    [
        ("APM_1", "APM_1_x", fleet(), HELD),
        ("APM", "APM_1_x", fleet(), Reason.CLIENT_ID_OF_ANOTHER_DEVICE),
        ("APM_1", "APM_1", fleet(), Reason.ALLOWED),
        ("APM", "APM_2", fleet(), Reason.ALLOWED),
        ("APM_1", "APM_1_x", fleet(until=NOW), Reason.ALLOWED),
        ("APM_1", "APM_1_x", fleet(held=frozenset({"APM_1_x"})), HELD),
        ("APM_1", "APM_1_y", fleet(held=frozenset({"APM_1_x"})), Reason.ALLOWED),
        ("APM_1", "APM_1_x", fleet(held=frozenset()), Reason.ALLOWED),
        ("APM_1", "APM_1_x", fleet(former=("{device_id}", "{device_id}_x")), Reason.ALLOWED),
    ],
)
def test_what_moves_is_held_and_nothing_else(user, client_id, registry_copy, reason):
    assert reason_for(user, client_id, registry_copy) is reason


def test_what_nobody_had_is_not_held():
    registry_copy = registry(
        device("APM_1", "WIDE"), types=(replace(APM, name="WIDE", move=fleet().device_type("WIDE").move),)
    )
    assert reason_for("APM_1", "APM_1_x", registry_copy) is Reason.ALLOWED


def test_what_is_connected_is_not_asked_for_the_hold():
    request = TopicRequest("APM_1", "/", "amq.topic", "write", "fleet.APM_1.telemetry.x", "APM_1_x")
    assert decide.topic(fleet(), request, NOW, DecisionSettings()).allowed


def test_a_login_that_names_no_client_id_is_left_to_the_virtual_host():
    assert decide.login(fleet(), LoginRequest("APM_1", None, None), NOW).allowed


@pytest.mark.parametrize(
    ("text", "move"),
    [
        ("null", None),
        ('[["a"], null, "1800000000.5"]', ClientIdMove(("a",), None, 1800000000.5)),
        ('[["a"], ["x"], "Infinity"]', ClientIdMove(("a",), frozenset({"x"}), float("inf"))),
    ],
)
def test_a_move_is_read_from_the_record(text, move):
    row = {"name": "T", "client_ids": [], "vhosts": [], "networks": None, "max_staleness_s": None, "rules": None}
    assert records.device_type(json.dumps({**row, "move": json.loads(text)}).encode()).move == move
