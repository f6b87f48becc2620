"""
Parse and compare distinguished names written as text (RFC 4514). Pure; uses the standard library only.

One text comes from RabbitMQ, the other from the registry, where a library or a person wrote it. A part that cannot be
parsed is not counted as a difference: the result is then None, for unknown.

Source: what RabbitMQ 4.3.6 writes in ``peer_cert_subject`` and ``peer_cert_issuer``. It escapes UTF-8 byte by byte, and
prints the value of an attribute type that Erlang does not know as an Erlang term.
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
_TERM_OF_NUMBERS = re.compile(r"\{asn1_OPENTYPE,\s*<<(\d+(?:,\s*\d+)*)>>\}")
_TERM_OF_STRING = re.compile(r'\{asn1_OPENTYPE,\s*<<"((?:[ !#-\[\]-~]|\\.)*)">>\}')
_STRING_ESCAPE = re.compile(r"\\(.)")
_CONTROLS = {"b": "\b", "d": "\x7f", "e": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ENCODINGS = {12: "utf-8", 19: "ascii", 20: "latin-1", 22: "ascii", 28: "utf-32-be", 30: "utf-16-be"}
"""By DER tag: UTF8String, PrintableString, TeletexString, IA5String, UniversalString and BMPString."""


class Attribute(NamedTuple):
    """
    An attribute of a name.

    Args:
        type: Its object identifier; None if the written name is unknown.
        value: None if it cannot be parsed.
    """

    type: str | None
    value: str | None


Name = list[list[Attribute]]
"""The relative distinguished names (RDNs) in the order of the text, each a list of attributes."""


def _parse(text: str | None) -> Name | None:
    """Return a name's RDNs; None if the text is not RFC 4514."""
    if not text:
        return None
    name: Name = [[]]
    position = 0
    while match := _ATTRIBUTE.match(text, position):
        name[-1].append(Attribute(_type(match["type"]), _value(match["value"])))
        position = match.end()
        if not match["end"]:
            return name
        if match["end"] != "+":
            name.append([])
    return None


def common_name(subject: str) -> str | None:
    """
    Return a subject's common name as RabbitMQ uses it for the user name: several are joined with commas.

    Empty if there is none; None if it cannot be parsed.
    """
    if (name := _parse(subject)) is None:
        return None
    common_names = [attribute.value for rdn in reversed(name) for attribute in rdn if attribute.type == _COMMON_NAME]
    return None if None in common_names else ",".join(filter(None, common_names))


def same_name(one: str | None, other: str | None) -> bool | None:
    """
    Return whether two texts are the same name; None if that is unknown.

    The order of the RDNs is ignored, because some programs write the root first and others last. Values are compared
    without regard to case and repeated spaces (RFC 5280 7.1).
    """
    if one and one == other:
        return True
    left, right = _parse(one), _parse(other)
    if left is None or right is None:
        return None
    left_attributes, right_attributes = ([_normalized(each) for rdn in name for each in rdn] for name in (left, right))
    if any(None in attribute for attribute in (*left_attributes, *right_attributes)):
        return None if _may_be_same(left_attributes, right_attributes) else False
    return Counter(map(_comparable_rdn, left)) == Counter(map(_comparable_rdn, right))


def _may_be_same(left: list[Attribute], right: list[Attribute]) -> bool:
    """Return whether every value that only one side has may equal one that could not be parsed on the other side."""
    if len(left) != len(right):
        return False
    types = {each.type for each in (*left, *right)}
    if None in types:
        return True
    for type_ in types:
        left_values, right_values = (
            Counter(each.value for each in side if each.type == type_) for side in (left, right)
        )
        if left_values.total() != right_values.total():
            return False
        if not (_may_contain(right_values, left_values) and _may_contain(left_values, right_values)):
            return False
    return True


def _may_contain(values: Counter[str | None], others: Counter[str | None]) -> bool:
    """Return whether there are enough unparsed values (None) for all of the others that are not among the values."""
    return sum(number for value, number in (others - values).items() if value is not None) <= values[None]


def _comparable_rdn(attributes: list[Attribute]) -> frozenset[tuple[Attribute, int]]:
    """Return an RDN's attributes with how often each occurs, in no order."""
    return frozenset(Counter(map(_normalized, attributes)).items())


def _normalized(attribute: Attribute) -> Attribute:
    """Return an attribute with its value in the form in which values are compared."""
    value = attribute.value
    if value is None:
        return attribute
    with contextlib.suppress(UnicodeError):
        value = value.encode("latin-1").decode()  # UTF-8 in a TeletexString, which RabbitMQ reads as Latin-1
    return Attribute(attribute.type, " ".join(unicodedata.normalize("NFKC", value).casefold().split()))


def _type(text: str) -> str | None:
    """Return the object identifier of an attribute type, written as a number or as a name; None if it is unknown."""
    name = text.lower().removeprefix("oid.")
    return name if name.replace(".", "").isdigit() else _OIDS.get(name)


def _value(text: str) -> str | None:
    """Return an attribute's value without escapes; None if it cannot be parsed."""
    if text.lstrip().startswith("#"):
        return None  # DER in hexadecimal
    octets = _ESCAPE.sub(
        lambda match: bytes.fromhex(match[1].decode()) if len(match[1]) == 2 else match[1], text.encode()
    )
    try:
        value = octets.decode()
    except UnicodeDecodeError:
        return None
    return _value_of_term(value) if value.startswith(_TERM) else value


def _value_of_term(text: str) -> str | None:
    """Return the value in an Erlang term: DER that Erlang did not decode, printed as numbers or as a string."""
    if match := _TERM_OF_NUMBERS.fullmatch(text):
        octets = bytes(int(number) % 256 for number in match[1].split(","))
    elif match := _TERM_OF_STRING.fullmatch(text):
        octets = _STRING_ESCAPE.sub(lambda escape: _CONTROLS.get(escape[1], escape[1]), match[1]).encode("latin-1")
    else:
        return None
    if len(octets) < 2 or octets[0] not in _ENCODINGS:
        return None
    header_length = 2 + (octets[1] & 0x7F if octets[1] & 0x80 else 0)  # tag, and length in short or long form
    try:
        return octets[header_length:].decode(_ENCODINGS[octets[0]])
    except UnicodeDecodeError:
        return None
