"""RabbitMQ's requests are parsed strictly, and the answers are exact."""

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authbackend.broker import protocol
from authbackend.broker.protocol import Malformed, MalformedRequest, parse_form
from authbackend.policy.decide import Decision
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest, ResourceRequest, TopicRequest, VhostRequest


@pytest.mark.parametrize(
    ("form", "cause"),
    [
        (b"username=a&username=b", Malformed.PARAMETER_TWICE),
        (b"username=a&username=a", Malformed.PARAMETER_TWICE),
        (b"username=a&variable_map.username=b", Malformed.PARAMETERS_CONTRADICT),
        (b"client_id=a&variable_map.client_id=b", Malformed.PARAMETERS_CONTRADICT),
        (b"vhost=a&variable_map.vhost=b", Malformed.PARAMETERS_CONTRADICT),
        (b"username=%FF", Malformed.BAD_ENCODING),
        (b"username=\xff", Malformed.BAD_ENCODING),
        (b"username=%C0%80", Malformed.BAD_ENCODING),
        (b"username=%zz", Malformed.BAD_ENCODING),
        (b"username=%", Malformed.BAD_ENCODING),
        (b"username=a%00b", Malformed.NUL),
        (b"username=a\x00b", Malformed.NUL),
        (b"username=" + b"a" * 1025, Malformed.PARAMETER_TOO_LONG),
        (b"routing_key=" + b"a" * 65536, Malformed.PARAMETER_TOO_LONG),
        (b"routing_key=" + "é".encode() * 32768, Malformed.PARAMETER_TOO_LONG),
        (b"&".join(b"x%d=1" % n for n in range(65)), Malformed.TOO_MANY_PARAMETERS),
        (b"x=" + b"a" * protocol.LONGEST_BODY_BYTES, Malformed.TOO_LARGE),
    ],
)
def test_refused_forms(form, cause):
    with pytest.raises(MalformedRequest) as refused:
        parse_form(form)
    assert refused.value.cause is cause
    assert str(refused.value) == cause


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (b"", {}),
        (b"username=%2F", {"username": "/"}),
        (b"username=%2f", {"username": "/"}),
        (b"username=a+b", {"username": "a b"}),
        (b"username=a+%2B%2F", {"username": "a +/"}),
        (b"user%6eame=a", {"username": "a"}),
        (b"username=a=b&vhost", {"username": "a=b", "vhost": ""}),
        (b"variable_map.vhost=v", {"vhost": "v", "variable_map.vhost": "v"}),
        (b"vhost=v&variable_map.vhost=v", {"vhost": "v", "variable_map.vhost": "v"}),
        (b"new=%00&username=a", {"username": "a"}),  # what is not read need not be text
        (b"new=\x00&username=a", {"username": "a"}),
        (b"username=" + b"a" * 1024, {"username": "a" * 1024}),
        (b"username=" + b"%C3%A9" * 512, {"username": "é" * 512}),
        (b"&".join([b"username=a"] + [b"x=1"] * 63), {"username": "a"}),
        (b"x=" + b"a" * (protocol.LONGEST_BODY_BYTES - 2), {}),
    ],
)
def test_forms_that_are_read(form, read):
    assert parse_form(form) == read


LONGEST = {
    "username": 1024,
    "password": 4096,
    "vhost": 255,
    "client_id": 65_535,
    "ip": 255,
    "resource": 32,
    "name": 65_567,
    "permission": 32,
    "routing_key": 65_535,
    "variable_map.client_id": 65_535,
    "variable_map.username": 1024,
    "variable_map.vhost": 255,
}


@pytest.mark.parametrize(("name", "longest"), LONGEST.items())
def test_every_parameter_has_a_longest_value(name, longest):
    assert parse_form(f"{name}={'a' * longest}".encode())[name] == "a" * longest
    for value in ("a" * (longest + 1), "é" * (longest // 2 + 1)):
        with pytest.raises(MalformedRequest) as refused:
            parse_form(f"{name}={value}".encode())
        assert refused.value.cause is Malformed.PARAMETER_TOO_LONG


ASKED = {"username": "u", "vhost": "v", "ip": "i", "name": "n", "routing_key": "k", "client_id": "c"}


@pytest.mark.parametrize("kind", ["queue", "exchange"])
@pytest.mark.parametrize("permission", ["configure", "write", "read"])
def test_requests_are_read_whole(kind, permission):
    asked = {**ASKED, "password": "p", "resource": kind, "permission": permission}
    without = {name: value for name, value in asked.items() if name not in ("client_id", "password")}
    assert protocol.login_request(asked) == LoginRequest("u", "p", "c")
    assert protocol.login_request(without) == LoginRequest("u", None, None)
    assert protocol.vhost_request(asked) == VhostRequest("u", "v", "i", "c")
    assert protocol.vhost_request(without) == VhostRequest("u", "v", "i", None)
    assert protocol.resource_request(asked) == ResourceRequest("u", "v", kind, "n", permission, "c")
    assert protocol.resource_request(without) == ResourceRequest("u", "v", kind, "n", permission, None)
    if permission != "configure":
        asked["resource"] = without["resource"] = "topic"
        assert protocol.topic_request(asked) == TopicRequest("u", "v", "n", permission, "k", "c")
        assert protocol.topic_request(without) == TopicRequest("u", "v", "n", permission, "k", None)


@pytest.mark.parametrize(
    ("read", "form"),
    [
        (protocol.login_request, b"vhost=%2F"),
        (protocol.vhost_request, b"username=a&vhost=%2F"),
        (protocol.resource_request, b"username=a&vhost=%2F&resource=queue&name=q"),
        (protocol.topic_request, b"username=a&vhost=%2F&resource=topic&name=amq.topic&permission=write"),
    ],
)
def test_required_parameters(read, form):
    with pytest.raises(MalformedRequest) as refused:
        read(parse_form(form))
    assert refused.value.cause is Malformed.PARAMETER_MISSING


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (protocol.resource_request, {"resource": "topic", "permission": "write"}),
        (protocol.resource_request, {"resource": "queue", "permission": "Write"}),
        (protocol.topic_request, {"resource": "queue", "permission": "write"}),
        (protocol.topic_request, {"resource": "topic", "permission": "configure"}),
    ],
)
def test_closed_values(read, values):
    form = urlencode({"username": "a", "vhost": "/", "name": "n", "routing_key": "k", **values}).encode()
    with pytest.raises(MalformedRequest) as refused:
        read(parse_form(form))
    assert refused.value.cause is Malformed.BAD_VALUE


def test_present_and_empty_is_not_absent():
    assert protocol.login_request(parse_form(b"username=a&password=")).password == ""
    assert protocol.login_request(parse_form(b"username=a")).password is None
    request = protocol.topic_request(
        parse_form(b"username=a&vhost=%2F&resource=topic&name=amq.topic&permission=read&tags=&routing_key=")
    )
    assert request.routing_key == ""


def test_the_variable_map_gives_the_client_id():
    form = b"username=a&vhost=%2F&resource=topic&name=x&permission=read&routing_key=k&variable_map.client_id=c"
    assert protocol.topic_request(parse_form(form)).client_id == "c"


def test_a_name_is_only_separated_by_ampersands():
    assert parse_form(b"username=a;vhost=b") == {"username": "a;vhost=b"}


def test_unknown_parameters_are_ignored_also_twice():
    assert parse_form(b"username=a&new=1&new=2&tags=&tags=x") == {"username": "a"}


def test_a_key_of_65535_bytes_passes_in_its_longest_form():
    key = "é" * 32767 + "a"
    form = urlencode({"routing_key": key}).encode()
    assert parse_form(form)["routing_key"] == key
    assert len(b"routing_key=" + b"%41" * 65535) <= protocol.LONGEST_BODY_BYTES


text = st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=40)


@given(text, text)
@settings(max_examples=500, deadline=None)
def test_what_the_broker_encodes_is_read_back_unchanged(name, key):
    """``+`` in a topic stays ``+``, and no value can inject a parameter."""
    form = urlencode({"username": name, "routing_key": key}).encode()
    assert parse_form(form) == {"username": name, "routing_key": key}


@given(st.binary(max_size=200))
@settings(max_examples=1000, deadline=None)
def test_no_bytes_make_anything_but_parameters_or_a_refusal(form):
    try:
        for read in (protocol.login_request, protocol.vhost_request, protocol.resource_request, protocol.topic_request):
            read(parse_form(form))
    except MalformedRequest:
        pass


def test_answers_are_exact():
    allow = Decision(True, Reason.ALLOWED)
    assert protocol.answer(allow) == "allow"
    assert (
        protocol.answer(Decision(True, Reason.ALLOWED, tags=("monitoring", "management")))
        == "allow monitoring management"
    )
    deny = Decision(False, Reason.NO_RULE_ALLOWS)
    assert protocol.answer(deny) == "deny"
    assert protocol.answer(deny, with_reason=True) == "deny no_rule_allows"


def test_a_denial_never_carries_tags():
    assert protocol.answer(Decision(False, Reason.PASSWORD_WRONG, tags=("administrator",))) == "deny"


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text("ab=&+%20Fé;\x00", max_size=40).map(str.encode),
        st.from_regex(
            rb"(username|vhost|name|ip)=[a-z%+=0-9A-F]{0,8}(&(user%6eame|vhost|x)=?[a-z%2+]{0,6}){0,4}", fullmatch=True
        ),
    )
)
def test_a_form_is_read_as_the_standard_library_does(form):
    try:
        expected = parse_qsl(
            form.decode(), keep_blank_values=True, errors="strict", max_num_fields=protocol.MOST_PARAMETERS
        )
    except ValueError:
        expected = None
    try:
        parsed = parse_form(form)
    except MalformedRequest as fault:
        if fault.cause is Malformed.BAD_ENCODING:
            assert expected is None or protocol._BAD_ESCAPE.search(form.decode())
        return
    assert expected is not None
    supported = [(name, value) for name, value in expected if name in protocol._LIMITS]
    assert len(dict(supported)) == len(supported)
    assert {name: value for name, value in parsed.items() if name in dict(supported)} == dict(supported)
