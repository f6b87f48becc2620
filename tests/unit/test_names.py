"""Names: which are valid, what is wrong with all others, and which devices a client id could belong to."""

import pytest

from authbackend.policy.names import (
    attribute_fault,
    client_id_fits,
    client_id_pattern_fault,
    common_name_fault,
    device_id_fault,
    device_type_fault,
    possible_owners,
)

DEVICE_ID = '1 to 64 letters, digits, "_" and "-" are possible, nothing else'
DEVICE_TYPE = 'a name is a letter, then at most 62 letters, digits, "_" and "-"'
ATTRIBUTE = 'names are a letter or "_", then at most 62 letters, digits, "_" and "-"'


@pytest.mark.parametrize(
    ("fault_of", "name", "fault"),
    [
        (device_id_fault, "A", None),
        (device_id_fault, "zZ09_-", None),
        (device_id_fault, "x" * 64, None),
        (device_id_fault, "x" * 65, DEVICE_ID),
        (device_id_fault, "", DEVICE_ID),
        (device_id_fault, "a.b", DEVICE_ID),
        (device_id_fault, "a/b", DEVICE_ID),
        (device_id_fault, "é", DEVICE_ID),
        (device_id_fault, "a\n", DEVICE_ID),
        (device_type_fault, "A", None),
        (device_type_fault, "aZz09_-", None),
        (device_type_fault, "x" * 63, None),
        (device_type_fault, "x" * 64, DEVICE_TYPE),
        (device_type_fault, "", DEVICE_TYPE),
        (device_type_fault, "9a", DEVICE_TYPE),
        (device_type_fault, "_a", DEVICE_TYPE),
        (device_type_fault, "a b", DEVICE_TYPE),
        (attribute_fault, "_", None),
        (attribute_fault, "aZz09_-", None),
        (attribute_fault, "x" * 63, None),
        (attribute_fault, "x" * 64, ATTRIBUTE),
        (attribute_fault, "", ATTRIBUTE),
        (attribute_fault, "9a", ATTRIBUTE),
        (attribute_fault, "-a", ATTRIBUTE),
        (attribute_fault, "a.b", ATTRIBUTE),
    ],
)
def test_names_of_devices_types_and_attributes(fault_of, name, fault):
    assert fault_of(name) == fault


CONTROL = "a control character is not possible"
WHITE = "white space at an end is not possible"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a b", None),
        ("Ünïcode/+#*.{}", None),
        ("x" * 128, None),
        ("é" * 64, None),
        ("", "it is empty"),
        ("x" * 129, "it has 129 bytes; at most 128 are possible"),
        ("é" * 65, "it has 130 bytes; at most 128 are possible"),
        ("\ud800" * 43, "it has 129 bytes; at most 128 are possible"),  # JSON can contain half a surrogate pair
        ("a,b", '"," is not possible: RabbitMQ joins several common names of one certificate with it'),
        ("/:a", '":" is not possible: RabbitMQ splits "vhost:user" at it'),
        ("a\x00", CONTROL),
        ("a\x1fb", CONTROL),
        ("a\x7fb", CONTROL),
        ("a\x9fb", CONTROL),
        ("a\u2028b", CONTROL),
        ("a\u2029b", CONTROL),
        (" a", WHITE),
        ("a ", WHITE),
        ("\u00a0a", WHITE),
    ],
)
def test_common_names(name, fault):
    assert common_name_fault(name) == fault


BEGIN = "it must begin with {device_id}, else devices could share client ids"
STAR_AT_THE_END = '"*" is possible only at the end'
STAR_AFTER_SEPARATOR = '"*" is possible only straight after a separator (_ - . /)'
SEPARATOR = "after {device_id} comes a separator (_ - . /), else APM1 would fit the devices APM1 and APM10"
SHAPE = (
    "it must be {device_id}, optionally followed by a separator (_ - . /), text of A-Z a-z 0-9 _ . : @ / - "
    "and a final * straight after a separator"
)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("{device_id}", None),
        *((f"{{device_id}}{separator}*", None) for separator in "_-./"),
        *((f"{{device_id}}{separator}x", None) for separator in "_-./"),
        *((f"{{device_id}}_a{separator}*", None) for separator in "_-./"),
        *((f"{{device_id}}_a{letter}z", None) for letter in "AZaz09_.:@/-"),
        ("{device_id}_" + "x" * 116, None),
        ("{device_id}_" + "x" * 117, SHAPE),
        ("", BEGIN),
        ("*", BEGIN),
        ("x{device_id}", BEGIN),
        ("{DEVICE_ID}", BEGIN),
        ("{device_id}_*_*", STAR_AT_THE_END),
        ("{device_id}_*x", STAR_AT_THE_END),
        ("{device_id}**", STAR_AT_THE_END),
        ("{device_id}*", SEPARATOR),
        ("{device_id}_a*", STAR_AFTER_SEPARATOR),
        ("{device_id}:*", STAR_AFTER_SEPARATOR),
        ("{device_id}x", SEPARATOR),
        ("{device_id}:x", SEPARATOR),
        ("{device_id}{device_id}", SEPARATOR),
        ("{device_id}x_*", SEPARATOR),
        ("{device_id}_", SHAPE),
        ("{device_id}_a b", SHAPE),
        ("{device_id}_a b_*", SHAPE),
        ("{device_id}_é", SHAPE),
        ("{device_id}_{device_id}", SHAPE),
        ("{device_id}_a\n", SHAPE),
    ],
)
def test_client_id_patterns(pattern, fault):
    assert client_id_pattern_fault(pattern) == fault


@pytest.mark.parametrize(
    ("client_id", "patterns", "fits"),
    [
        ("D", ("{device_id}",), True),
        ("D_1", ("{device_id}",), False),
        ("D", ("{device_id}_*",), False),
        ("D_", ("{device_id}_*",), False),  # "*" is at least one character
        ("D_1", ("{device_id}_*",), True),
        ("D_1_2", ("{device_id}_*",), True),
        ("D-1", ("{device_id}_*",), False),
        ("D_*", ("{device_id}_x",), False),
        ("D_x", ("{device_id}_x",), True),
        ("D_x", ("{device_id}", "{device_id}-*", "{device_id}_x"), True),
        ("D", (), False),
    ],
)
def test_a_client_id_fits_one_of_the_patterns(client_id, patterns, fits):
    assert client_id_fits(client_id, "D", patterns) is fits


@pytest.mark.parametrize(
    ("client_id", "owners"),
    [
        ("", []),
        ("A", ["A"]),
        ("A_1", ["A_1", "A"]),
        ("A_1-2.3/4", ["A_1-2.3/4", "A_1-2.3", "A_1-2", "A_1", "A"]),
        ("A:1", ["A:1"]),
        ("A_", ["A_", "A"]),
        ("_A", ["_A"]),
        ("x" * 64, ["x" * 64]),
        ("x" * 65, []),
        ("x" * 64 + "_1", ["x" * 64]),
        ("x" * 65 + "_1", []),
        ("y_" + "x" * 65, ["y"]),
    ],
)
def test_a_client_id_could_be_of_every_device_id_that_it_begins_with_longest_first(client_id, owners):
    assert possible_owners(client_id) == owners
