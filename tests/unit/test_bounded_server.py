"""Caches and metrics stay bounded, however long a process runs."""

import json

from prometheus_client import CollectorRegistry

from authbackend.broker import metrics
from authbackend.broker.metrics import BrokerMetrics
from authbackend.policy.decide import Decision
from authbackend.registry import store as store_module
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import Patch
from tests.support.registry import new_store


def test_types_and_accounts_that_come_and_go_are_not_kept(monkeypatch):
    monkeypatch.setattr(store_module, "MOST_KNOWN", 10)
    store = new_store()
    reader = store.reader()
    for number in range(100):
        name = f"n{number}"
        device_type = {
            "name": name,
            "client_ids": [],
            "vhosts": [],
            "networks": None,
            "max_staleness_s": None,
            "rules": [],
        }
        account = {
            "name": name,
            "login": "password",
            "password_hash": None,
            "tags": [],
            "vhosts": [],
            "networks": None,
            "client_ids": [],
            "configure": [],
            "write": [],
            "read": [],
            "unchecked_dead_lettering": False,
            "rules": [],
        }
        rows = {name: json.dumps(device_type).encode()}, {}, {name: json.dumps(account).encode()}
        store.apply(Patch(*rows), FeedPosition("e", "i", "1:1:"), 1.0)
        with reader as version:
            assert version.device_type(name) is not None
            assert version.account(name) is not None
        store.apply(Patch({name: None}, {}, {name: None}), FeedPosition("e", "i", "1:1:"), 1.0)
        assert len(reader._types_parsed) <= 11
        assert len(reader._accounts_parsed) <= 11
    store.close()


def test_device_types_that_come_and_go_do_not_add_series_for_ever(monkeypatch):
    monkeypatch.setattr(metrics, "MOST_DECISIONS", 10)
    registry = CollectorRegistry()
    counted = BrokerMetrics(registry)
    for number in range(100):
        counted.decided("user", Decision(True, "allowed", f"type{number}"))
        counted.decided("user", Decision(True, "allowed", "type0"))
    counts = {
        sample.labels["device_type"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "authbackend_decisions_total"
    }
    assert len(counts) == 11
    assert counts["(other)"] == 90
    assert counts["type0"] == 101
