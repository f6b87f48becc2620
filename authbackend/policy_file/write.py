"""Write a policy file; applying an export changes nothing."""

from __future__ import annotations

from typing import Any

import yaml

from authbackend.policy_file.model import SCHEMA, AccountEntry, DeviceEntry, DeviceTypeEntry, Document, RuleEntry


def as_tree(document: Document) -> dict[str, Any]:
    """Return the document as plain values, sorted by name, with absent values left out."""
    tree: dict[str, Any] = {"schema": SCHEMA}
    if document.device_types is not None:
        tree["device_types"] = {name: _device_type(entry) for name, entry in sorted(document.device_types.items())}
    if document.devices is not None:
        tree["devices"] = [_device(entry) for _, entry in sorted(document.devices.items())]
    if document.accounts is not None:
        tree["accounts"] = [_account(entry) for _, entry in sorted(document.accounts.items())]
    return tree


def write(document: Document) -> str:
    """Return the document as YAML."""
    tree = as_tree(document)
    return yaml.dump(
        tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True, width=120
    )


def _present(**values: Any) -> dict[str, Any]:
    """Drop absent values; empty lists and texts are the default, so they are dropped too."""
    return {name: value for name, value in values.items() if value not in (None, "", [], {}, False)}


def _device_type(entry: DeviceTypeEntry) -> dict[str, Any]:
    return _present(
        description=entry.description,
        client_ids=list(entry.client_ids),
        vhosts=list(entry.vhosts),
        networks=None if entry.networks is None else list(entry.networks),
        max_staleness_s=entry.max_staleness_s,
        require_known_certificate=entry.require_known_certificate,
        rules=_rules(entry.rules),
    )


def _device(entry: DeviceEntry) -> dict[str, Any]:
    return _present(
        device_id=entry.device_id,
        common_name=None if entry.common_name == entry.device_id else entry.common_name,
        type=entry.type,
        status=entry.status,
        status_reason=entry.status_reason,
        attributes=dict(entry.attributes or ()),
        expires_at=entry.expires_at.isoformat() if entry.expires_at else None,
        rules=_rules(entry.rules),
    )


def _account(entry: AccountEntry) -> dict[str, Any]:
    permissions = _present(configure=list(entry.configure), write=list(entry.write), read=list(entry.read))
    return _present(
        name=entry.name,
        login=entry.login,
        tags=list(entry.tags),
        password_hash=entry.password_hash,
        vhosts=list(entry.vhosts),
        networks=None if entry.networks is None else list(entry.networks),
        client_ids=list(entry.client_ids),
        permissions=permissions,
        unchecked_dead_lettering=entry.unchecked_dead_lettering,
        rules=_rules(entry.rules),
    )


def _rules(rules: tuple[RuleEntry, ...]) -> list[dict[str, str]]:
    return [
        _present(effect=rule.effect, action=rule.action, topic=rule.topic, exchange=rule.exchange, note=rule.note)
        for rule in rules
    ]
