"""
Names of certificates as texts, RFC 4514, and whether two of them are certainly the same name.

One side is written by RabbitMQ, the other stands in the registry, written by a library or by hand. What of a name
cannot be read is no difference: then it is not known.

Source: what RabbitMQ 4.3.6 was observed to write in ``peer_cert_subject`` and ``peer_cert_issuer``. It escapes the
octets of UTF-8, and where Erlang does not know an attribute's type, it prints the value as an Erlang term.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

_TYPES = {
    "2.5.4.3": ("cn", "commonname"),
    "2.5.4.4": ("sn", "surname"),
    "2.5.4.5": ("serialnumber",),
    "2.5.4.6": ("c", "countryname"),
    "2.5.4.7": ("l", "localityname"),
    "2.5.4.8": ("st", "s", "stateorprovincename"),
    "2.5.4.9": ("street", "streetaddress"),
    "2.5.4.10": ("o", "organizationname"),
    "2.5.4.11": ("ou", "organizationalunitname"),
    "2.5.4.12": ("t", "title"),
    "2.5.4.15": ("businesscategory",),
    "2.5.4.17": ("postalcode",),
    "2.5.4.41": ("name",),
    "2.5.4.42": ("gn", "g", "givenname"),
    "2.5.4.43": ("i", "initials"),
    "2.5.4.44": ("generationqualifier",),
    "2.5.4.45": ("x500uniqueidentifier",),
    "2.5.4.46": ("dnqualifier", "dnq"),
    "2.5.4.65": ("pseudonym",),
    "2.5.4.97": ("organizationidentifier",),
    "1.2.840.113549.1.9.1": ("e", "email", "emailaddress"),
    "1.2.840.113549.1.9.2": ("unstructuredname",),
    "0.9.2342.19200300.100.1.1": ("uid", "userid"),
    "0.9.2342.19200300.100.1.25": ("dc", "domaincomponent"),
}
_OIDS = {name: oid for oid, names in _TYPES.items() for name in names}
_COMMON_NAME = "2.5.4.3"

_ATTRIBUTE = re.compile(
    r"\s*(?P<type>[A-Za-z0-9][A-Za-z0-9.-]*)\s*=(?P<value>(?:[^\\,+;\"<>]|\\[0-9A-Fa-f]{2}|\\.)*+)(?P<end>[,+;]|\Z)",
    re.DOTALL,
)
_ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2}|.)", re.DOTALL)

_TERM = "{asn1_OPENTYPE,"
_NUMBERS = re.compile(r"\{asn1_OPENTYPE,\s*<<(\d+(?:,\s*\d+)*)>>\}")
_STRING = re.compile(r'\{asn1_OPENTYPE,\s*<<"((?:[ !#-\[\]-~]|\\.)*)">>\}')
_STRING_ESCAPE = re.compile(r"\\(.)")
_CONTROLS = {"b": "\b", "d": "\x7f", "e": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ENCODINGS = {12: "utf-8", 19: "ascii", 20: "latin-1", 22: "ascii", 28: "utf-32-be", 30: "utf-16-be"}
"""Of the DER tags of UTF8String, PrintableString, TeletexString, IA5String, UniversalString and BMPString."""


class Attribute(NamedTuple):
    """
    An attribute of a name.

    Args:
        type: Its object identifier; None if what is written is not known.
        value: None if it cannot be read.
    """

    type: str | None
    value: str | None


Name = list[list[Attribute]]
"""The relative distinguished names in the order of the text, each with its attributes."""


def parsed(text: str | None) -> Name | None:
    """Return the parts of a name, None if it cannot be read as RFC 4514."""
    if not text:
        return None
    name: Name = [[]]
    position = 0
    while found := _ATTRIBUTE.match(text, position):
        name[-1].append(Attribute(_type(found["type"]), _value(found["value"])))
        position = found.end()
        if not found["end"]:
            return name
        if found["end"] != "+":
            name.append([])
    return None


def common_name(subject: str) -> str | None:
    """
    Return the common name of a subject as RabbitMQ makes a user name of it: several are joined with commas.

    Empty if there is none, None if that cannot be read.
    """
    if (name := parsed(subject)) is None:
        return None
    names = [each.value for part in reversed(name) for each in part if each.type == _COMMON_NAME]
    return None if None in names else ",".join(filter(None, names))


def same_name(one: str | None, other: str | None) -> bool | None:
    """
    Return whether two texts are the same name, None if that is not known.

    The order of the parts does not count: some write them from the root down, others up. Values are compared as RFC
    5280 7.1 asks for, without regard to case and repeated spaces.
    """
    if one and one == other:
        return True
    left, right = parsed(one), parsed(other)
    if left is None or right is None:
        return None
    attributes = [[_plain(each) for part in name for each in part] for name in (left, right)]
    if None in {field for each in attributes for attribute in each for field in attribute}:
        return None if _may_be_same(*attributes) else False
    return Counter(map(_part, left)) == Counter(map(_part, right))


def _may_be_same(left: list[Attribute], right: list[Attribute]) -> bool:
    """Return whether each value that one side alone has can be one that cannot be read on the other."""
    if len(left) != len(right):
        return False
    types = {each.type for each in (*left, *right)}
    if None in types:
        return True
    for kind in types:
        ours, theirs = (Counter(each.value for each in side if each.type == kind) for side in (left, right))
        if ours.total() != theirs.total() or not (_covers(ours, theirs) and _covers(theirs, ours)):
            return False
    return True


def _covers(ours: Counter[str | None], theirs: Counter[str | None]) -> bool:
    return sum(number for value, number in (ours - theirs).items() if value is not None) <= theirs[None]


def _part(attributes: list[Attribute]) -> frozenset[tuple[Attribute, int]]:
    return frozenset(Counter(map(_plain, attributes)).items())


def _plain(attribute: Attribute) -> Attribute:
    """Return an attribute with its value in the form in which values are compared."""
    value = attribute.value
    if value is None:
        return attribute
    with contextlib.suppress(UnicodeError):
        value = value.encode("latin-1").decode()  # UTF-8 in a TeletexString, which RabbitMQ reads as Latin-1
    return Attribute(attribute.type, " ".join(unicodedata.normalize("NFKC", value).casefold().split()))


def _type(text: str) -> str | None:
    name = text.lower().removeprefix("oid.")
    return name if name.replace(".", "").isdigit() else _OIDS.get(name)


def _value(text: str) -> str | None:
    """Return an attribute's value without escapes."""
    if text.lstrip().startswith("#"):
        return None  # its DER form
    octets = _ESCAPE.sub(
        lambda found: bytes.fromhex(found[1].decode()) if len(found[1]) == 2 else found[1], text.encode()
    )
    try:
        value = octets.decode()
    except UnicodeDecodeError:
        return None
    return _value_of_term(value) if value.startswith(_TERM) else value


def _value_of_term(text: str) -> str | None:
    """Return the value of an attribute that Erlang did not decode: its DER form, printed as numbers or as a string."""
    if found := _NUMBERS.fullmatch(text):
        octets = bytes(int(number) % 256 for number in found[1].split(","))
    elif found := _STRING.fullmatch(text):
        octets = _STRING_ESCAPE.sub(lambda escape: _CONTROLS.get(escape[1], escape[1]), found[1]).encode("latin-1")
    else:
        return None
    if len(octets) < 2 or octets[0] not in _ENCODINGS:
        return None
    header = 2 + (octets[1] & 0x7F if octets[1] & 0x80 else 0)
    try:
        return octets[header:].decode(_ENCODINGS[octets[0]])
    except UnicodeDecodeError:
        return None
