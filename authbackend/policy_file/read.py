"""Parse a policy file and report every problem once, with its line and column; nothing is applied."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypeVar

import yaml

from authbackend.policy import names
from authbackend.policy.model import Status
from authbackend.policy.topics import topic_filter_fault
from authbackend.policy_file.model import (
    SCHEMA,
    AccountEntry,
    DeviceEntry,
    DeviceTypeEntry,
    Document,
    Problem,
    RuleEntry,
)

T = TypeVar("T")
Node = yaml.Node
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_STRING = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"


def read(text: str, file: str) -> tuple[Document, list[Problem]]:
    """Return the document and its problems, sorted by line. Do not apply it if one of them is an error."""
    reader = _Reader(file)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                reader.fault(event, "YAML aliases are not supported; write the value out")
        root = None if reader.problems else yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        return Document(), [Problem(file, *_place_of(error, text), f"not YAML: {problem}")]
    document = reader.document(root) if root is not None else Document()
    if root is None and not reader.problems:
        reader.problems.append(Problem(file, 1, 1, f"the file is empty; it must begin with: schema: {SCHEMA}"))
    return document, sorted(reader.problems)


def decode(content: bytes, file: str) -> tuple[str, Problem | None]:
    """Return a file's text without its byte order mark, and a problem if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        return "", Problem(file, line, column, f"not UTF-8: {error.reason}; save the file as UTF-8")


def _place_of(error: yaml.YAMLError, text: str) -> tuple[int, int]:
    position = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if position is not None:
        last = len(_LINE_BREAK.findall(text)) + 1  # the parser reports a missing end one line after the last
        return min(position.line + 1, last), position.column + 1
    before = text.encode()[: getattr(error, "position", 0)].decode(errors="ignore")  # an illegal character
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def parse_time(text: str) -> datetime:
    """
    Parse an ISO 8601 time; without a time zone it is UTC.

    Raises:
        ValueError: The text is not a time, or its year is not between 1970 and 9998.
    """
    parsed = datetime.fromisoformat(text)
    if not 1970 <= parsed.year < 9999:
        raise ValueError(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


class _Reader:
    """Walk the YAML nodes; a value with a problem becomes its default, so that reading can continue."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.places: dict[tuple[str, ...], tuple[int, int]] = {}
        self.where = ""

    def place(self, node: Node, *key: str) -> None:
        """Record the position of a part of the current entry, for warnings."""
        self.places.setdefault((self.where, *key), (node.start_mark.line + 1, node.start_mark.column + 1))

    def fault(self, node: Any, message: str) -> None:
        position = node.start_mark
        self.problems.append(Problem(self.file, position.line + 1, position.column + 1, message))

    def document(self, root: Node) -> Document:
        nodes = self.mapping(root, "the document", ("schema", "device_types", "devices", "accounts"))
        if "schema" not in nodes:
            self.fault(root, f"schema is missing; the file must begin with: schema: {SCHEMA}")
        elif self.text(nodes["schema"]) != SCHEMA:
            self.fault(nodes["schema"], f"this version reads schema {SCHEMA}")
        document = Document(places=self.places)
        if "device_types" in nodes:
            document.device_types = self.section(nodes["device_types"], self.device_type)
        if "devices" in nodes:
            self.where = "devices"
            self.place(nodes["devices"])
            document.devices = self.listed(nodes["devices"], self.device, "device_id")
            self.unique_common_names(nodes["devices"], document.devices)
        if "accounts" in nodes:
            document.accounts = self.listed(nodes["accounts"], self.account, "name")
        return document

    def section(self, node: Node, entry: Callable[[Node, str], T]) -> dict[str, T]:
        return {key: entry(value, key) for key, value in self.mapping(node, "device_types", None).items()}

    def listed(self, node: Node, entry: Callable[[Node], T | None], key: str) -> dict[str, T]:
        entries: dict[str, T] = {}
        for item in self.items(node):
            value = entry(item)
            if value is None:
                continue
            name = getattr(value, key)
            if name in entries:
                self.fault(item, f"duplicate {key} {name}")
            entries[name] = value
        return entries

    def unique_common_names(self, node: Node, devices: dict[str, DeviceEntry]) -> None:
        seen: dict[str, str] = {}
        for device in devices.values():
            other = seen.setdefault(device.common_name, device.device_id)
            if other != device.device_id:
                self.fault(
                    node, f"devices {other} and {device.device_id} have the same common name {device.common_name}"
                )

    def device_type(self, node: Node, name: str) -> DeviceTypeEntry:
        if fault := names.device_type_fault(name):
            self.fault(node, f"device type {name!r}: {fault}")
        self.where = f"device type {name}"
        self.place(node)
        nodes = self.mapping(node, f"device type {name}", _names(DeviceTypeEntry, "name"))
        return DeviceTypeEntry(
            name,
            description=self.text(nodes.get("description")),
            client_ids=self.texts(nodes.get("client_ids"), names.client_id_pattern_fault, "client id pattern"),
            vhosts=self.texts(nodes.get("vhosts"), _vhost_fault, "vhost"),
            networks=self.networks(nodes.get("networks")),
            max_staleness_s=self.seconds(nodes.get("max_staleness_s")),
            require_known_certificate=self.flag(nodes.get("require_known_certificate")),
            rules=self.rules(nodes.get("rules"), account=False),
        )

    def device(self, node: Node) -> DeviceEntry | None:
        nodes = self.mapping(node, "a device", _names(DeviceEntry))
        device_id = self.checked(nodes.get("device_id"), names.device_id_fault, "device id", node)
        self.where = f"device {device_id}"
        self.place(node)
        common_name = device_id
        if "common_name" in nodes:
            common_name = self.checked(nodes["common_name"], names.common_name_fault, "common name", node)
        if "type" not in nodes:
            self.fault(node, f"device {device_id} has no type")
        status = self.text(nodes["status"]) if "status" in nodes else None
        if status is not None and status not in tuple(Status):
            self.fault(nodes["status"], f"status {status!r}: must be one of: {', '.join(Status)}")
        return DeviceEntry(
            device_id,
            common_name,
            type=self.text(nodes.get("type")),
            status=status,
            status_reason=self.text(nodes["status_reason"]) if "status_reason" in nodes else None,
            attributes=self.attributes(nodes.get("attributes")),
            expires_at=self.time(nodes.get("expires_at")),
            rules=self.rules(nodes.get("rules"), account=False),
        )

    def account(self, node: Node) -> AccountEntry | None:
        nodes = self.mapping(node, "an account", (*_names(AccountEntry, "configure", "write", "read"), "permissions"))
        name = self.checked(nodes.get("name"), names.common_name_fault, "account", node)
        self.where = f"account {name}"
        self.place(node)
        login = self.text(nodes["login"]) if "login" in nodes else ""
        if login not in ("password", "certificate"):
            self.fault(nodes.get("login", node), f"account {name}: login must be password or certificate")
        permissions: Mapping[str, Node] = {}
        if "permissions" in nodes:
            permissions = self.mapping(nodes["permissions"], f"permissions of {name}", ("configure", "write", "read"))
        password_hash = self.text(nodes["password_hash"]) if "password_hash" in nodes else None
        if password_hash is not None and not password_hash.startswith("$argon2id$"):
            self.fault(nodes["password_hash"], f"account {name}: password_hash is not argon2id in PHC form")
            password_hash = None
        return AccountEntry(
            name,
            login,
            password_hash=password_hash,
            tags=self.texts(nodes.get("tags"), _tag_fault, "tag"),
            vhosts=self.texts(nodes.get("vhosts"), _vhost_fault, "vhost"),
            networks=self.networks(nodes.get("networks")),
            client_ids=self.texts(nodes.get("client_ids"), _account_client_id_fault, "client id"),
            configure=self.texts(permissions.get("configure"), _vhost_fault, "name"),
            write=self.texts(permissions.get("write"), _vhost_fault, "name"),
            read=self.texts(permissions.get("read"), _vhost_fault, "name"),
            unchecked_dead_lettering=self.flag(nodes.get("unchecked_dead_lettering")),
            rules=self.rules(nodes.get("rules"), account=True),
        )

    def rules(self, node: Node | None, *, account: bool) -> tuple[RuleEntry, ...]:
        rules: dict[tuple[str, str, str, str], RuleEntry] = {}
        for item in self.items(node):
            rule = self.rule(item, account=account)
            if (key := (rule.effect, rule.action, rule.topic, rule.exchange or "")) in rules:
                self.fault(item, f"duplicate rule {rule.effect} {rule.action} {rule.topic}")
            rules[key] = rule
            self.place(item, "rule", *key)
        return tuple(rules.values())

    def rule(self, node: Node, *, account: bool) -> RuleEntry:
        known = _names(RuleEntry) if account else _names(RuleEntry, "exchange")
        nodes = self.mapping(node, "a rule", known)
        for name, allowed in (("effect", ("allow", "deny")), ("action", ("publish", "subscribe"))):
            if self.text(nodes.get(name)) not in allowed:
                self.fault(nodes.get(name, node), f"{name} must be {' or '.join(allowed)}")
        topic = self.checked(nodes.get("topic"), topic_filter_fault, "topic filter", node)
        exchange = self.text(nodes["exchange"]) if "exchange" in nodes else None
        if exchange == "":
            self.fault(nodes["exchange"], "exchange is empty; leave it out for the MQTT exchange")
        return RuleEntry(
            self.text(nodes.get("effect")),
            self.text(nodes.get("action")),
            topic,
            exchange,
            self.text(nodes.get("note")),
        )

    def attributes(self, node: Node | None) -> tuple[tuple[str, str], ...]:
        if node is None:
            return ()
        attributes = []
        for name, value in self.mapping(node, "attributes", None).items():
            if fault := names.attribute_fault(name):
                self.fault(value, f"attribute {name!r}: {fault}")
            attributes.append((name, self.text(value)))
        return tuple(sorted(attributes))

    def time(self, node: Node | None) -> datetime | None:
        if node is None:
            return None
        try:
            return parse_time(str(node.value))
        except ValueError:
            self.fault(node, f"{node.value!r} is not a time; write it as 2027-01-31T12:00:00Z")
            return None

    def networks(self, node: Node | None) -> tuple[str, ...] | None:
        if node is None:
            return None
        networks = self.texts(node, _network_fault, "network")
        if not networks:
            self.fault(node, "an empty list would match no address; leave networks out to allow any address")
        return networks

    def mapping(self, node: Node, what: str, known: tuple[str, ...] | None) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, f"{what} must be a mapping (name: value)")
            return nodes
        for key, value in node.value:
            name = self.text(key)
            if known is not None and name not in known:
                nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
                self.fault(key, f"{what} has no {name!r}; did you mean {nearest}?")
            elif name in nodes:
                self.fault(key, f"duplicate key {name}")
            elif known is None or value.tag != _NULL:
                nodes[name] = value
        return nodes

    def items(self, node: Node | None) -> list[Node]:
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.fault(node, "this must be a list")
            return []
        return list(node.value)

    def texts(self, node: Node | None, fault_of: Callable[[str], str | None], what: str) -> tuple[str, ...]:
        texts: list[str] = []
        for item in self.items(node):
            text = self.checked(item, fault_of, what, item)
            if text in texts:
                self.fault(item, f"duplicate {what} {text!r}")
            texts.append(text)
            self.place(item, text)
        return tuple(texts)

    def checked(self, node: Node | None, fault_of: Callable[[str], str | None], what: str, outer: Node) -> str:
        if node is None:
            self.fault(outer, f"the {what} is missing")
            return ""
        text = self.text(node)
        if fault := fault_of(text):
            self.fault(node, f"{what} {text!r}: {fault}")
        return text

    def text(self, node: Node | None) -> str:
        if node is None:
            return ""
        if not isinstance(node, yaml.ScalarNode) or node.tag != _STRING:
            self.fault(node, "this must be text; put it in quotes")
            return ""
        if "\x00" in node.value:
            self.fault(node, "text must not contain NUL")
            return ""
        return str(node.value)

    def seconds(self, node: Node | None) -> float | None:
        if node is None:
            return None
        try:
            number = float(node.value)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < float("inf"):
            self.fault(node, "this must be a number of seconds above 0")
        return number

    def flag(self, node: Node | None) -> bool:
        if node is None:
            return False
        if node.value not in ("true", "false"):
            self.fault(node, "this must be true or false")
        return bool(node.value == "true")


def _names(entry: Any, *without: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(entry) if field.name not in without)


def _vhost_fault(name: str) -> str | None:
    if not name:
        return "it is empty"
    return "it is longer than 255 bytes" if len(name.encode()) > 255 else None


def _tag_fault(tag: str) -> str | None:
    return None if tag in names.RABBITMQ_TAGS else f"must be one of RabbitMQ's tags: {', '.join(names.RABBITMQ_TAGS)}"


def _account_client_id_fault(client_id: str) -> str | None:
    if any(character in "*#+{}" or not character.isprintable() for character in client_id):
        return "an account must list exact client ids, without wildcards or control characters"
    return _vhost_fault(client_id)


def _network_fault(text: str) -> str | None:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        return f"not a network in CIDR form: {error}"
    if "%" in text or not text.endswith((f"/{network.prefixlen}", str(network.network_address))):
        return f"not a network in CIDR form; write it as {network.network_address}/{network.prefixlen}"
    return None
