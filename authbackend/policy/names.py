"""
Validation of names and identifiers, with messages for people.

The database refuses the same names with the same messages (``sql/migrations``); a test keeps the two in step.
"""

from __future__ import annotations

import re
from typing import NewType

DeviceId = NewType("DeviceId", str)
"""1 to 64 characters of ``[A-Za-z0-9_-]``."""

DEVICE_ID_PLACEHOLDER = "{device_id}"
SEPARATORS = "_-./"
LONGEST_DEVICE_ID = 64

RABBITMQ_TAGS = ("administrator", "monitoring", "policymaker", "management", "impersonator")
"""The user tags that RabbitMQ knows. A closed list, because each tag becomes an Erlang atom."""

_DEVICE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DEVICE_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_ATTRIBUTE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_TEXT = r"A-Za-z0-9_.:@/-"
_CLIENT_ID_PATTERN = re.compile(rf"\{{device_id\}}([_./-]([{_TEXT}]*[_./-])?\*|[_./-][{_TEXT}]+)?")


def device_id_fault(device_id: str) -> str | None:
    """Return what is wrong with a device id, or None."""
    if _DEVICE_ID.fullmatch(device_id):
        return None
    return '1 to 64 letters, digits, "_" and "-" are possible, nothing else'


def device_type_fault(name: str) -> str | None:
    """Return what is wrong with a device type's name, or None."""
    if _DEVICE_TYPE.fullmatch(name):
        return None
    return 'a name is a letter, then at most 62 letters, digits, "_" and "-"'


def attribute_fault(name: str) -> str | None:
    """Return what is wrong with an attribute's name, or None."""
    if _ATTRIBUTE.fullmatch(name):
        return None
    return 'names are a letter or "_", then at most 62 letters, digits, "_" and "-"'


def common_name_fault(name: str) -> str | None:
    """
    Return what is wrong with a common name or an account's name, or None.

    Source: before it asks any backend, RabbitMQ joins several common names of one subject with ``,`` and splits
    ``vhost:user`` at the last ``:``.
    """
    if not name:
        return "it is empty"
    if len(name.encode("utf-8", "surrogatepass")) > 128:
        return f"it has {len(name.encode('utf-8', 'surrogatepass'))} bytes; at most 128 are possible"
    if "," in name:
        return '"," is not possible: RabbitMQ joins several common names of one certificate with it'
    if ":" in name:
        return '":" is not possible: RabbitMQ splits "vhost:user" at it'
    if _CONTROL.search(name):
        return "a control character is not possible"
    if name != name.strip():
        return "white space at an end is not possible"
    return None


def client_id_pattern_fault(pattern: str) -> str | None:
    """
    Return what is wrong with a client id pattern of a device type, or None.

    A pattern is ``{device_id}``, optionally followed by a separator (``_ - . /``), text, and a final ``*`` directly
    after a separator. The ``*`` matches one or more characters.
    """
    if _CLIENT_ID_PATTERN.fullmatch(pattern) and len(pattern) <= 128:
        return None
    if not pattern.startswith(DEVICE_ID_PLACEHOLDER):
        return "it must begin with {device_id}, else devices could share client ids"
    rest = pattern[len(DEVICE_ID_PLACEHOLDER) :]
    if "*" in rest[:-1]:
        return '"*" is possible only at the end'
    if rest.endswith("*") and rest[-2:-1] not in SEPARATORS:
        return '"*" is possible only straight after a separator (_ - . /)'
    if rest and rest[0] not in SEPARATORS:
        return "after {device_id} comes a separator (_ - . /), else APM1 would fit the devices APM1 and APM10"
    return (
        "it must be {device_id}, optionally followed by a separator (_ - . /), text of A-Z a-z 0-9 _ . : @ / - "
        "and a final * straight after a separator"
    )


def client_id_fits(client_id: str, device_id: str, patterns: tuple[str, ...]) -> bool:
    """
    Return whether a client id matches one of the patterns of a device's type.

    A match alone is not ownership: if several devices match, the one with the longest device id owns it.
    """
    for pattern in patterns:
        full = device_id + pattern[len(DEVICE_ID_PLACEHOLDER) :]
        if full.endswith("*"):
            if len(client_id) >= len(full) and client_id.startswith(full[:-1]):
                return True
        elif client_id == full:
            return True
    return False


def possible_owners(client_id: str) -> list[str]:
    """
    Return the device ids that could own a client id, longest first.

    These are the whole client id and each prefix that ends before a separator; at most 64, because a device id has at
    most 64 characters.
    """
    longest = min(len(client_id), LONGEST_DEVICE_ID)
    return [client_id[:n] for n in range(longest, 0, -1) if n == len(client_id) or client_id[n] in SEPARATORS]
