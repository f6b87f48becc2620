"""
RabbitMQ's protocol: parse the forms that it sends, and format the answers that it understands. Pure.

Source: rabbitmq_auth_backend_http; the tests replay requests recorded from RabbitMQ 3.10.8, 4.0.5 and
4.3.6.
"""

from __future__ import annotations

import re
from enum import StrEnum
from urllib.parse import unquote

from authbackend.policy.decide import Decision
from authbackend.policy.requests import LoginRequest, ResourceRequest, TopicRequest, VhostRequest

LONGEST_BODY_BYTES = 256 * 1024
LONGEST_REQUEST_LINE_BYTES = 8 * 1024
LONGEST_TOPIC_BYTES = 65_535
LONGEST_NAME_BYTES = 65_535 + 32  # a queue name contains a client id, which may have 65,535 bytes in MQTT
LONGEST_USERNAME_BYTES = 1024
LONGEST_PASSWORD_BYTES = 4096
MOST_PARAMETERS = 64


class Malformed(StrEnum):
    """Why RabbitMQ would not send such a request."""

    TOO_LARGE = "too_large"
    BAD_ENCODING = "bad_encoding"
    NUL = "nul"
    PARAMETER_MISSING = "parameter_missing"
    PARAMETER_TWICE = "parameter_twice"
    PARAMETERS_CONTRADICT = "parameters_contradict"
    TOO_MANY_PARAMETERS = "too_many_parameters"
    PARAMETER_TOO_LONG = "parameter_too_long"
    BAD_VALUE = "bad_value"
    NOT_HTTP = "not_http"


class MalformedRequest(Exception):
    """A request that RabbitMQ would not send; it is denied and counted by cause."""

    def __init__(self, cause: Malformed) -> None:
        super().__init__(cause)
        self.cause = cause


_LIMITS = {
    "username": LONGEST_USERNAME_BYTES,
    "password": LONGEST_PASSWORD_BYTES,
    "vhost": 255,
    "client_id": LONGEST_TOPIC_BYTES,
    "ip": 255,
    "resource": 32,
    "name": LONGEST_NAME_BYTES,
    "permission": 32,
    "routing_key": LONGEST_TOPIC_BYTES,
    "variable_map.client_id": LONGEST_TOPIC_BYTES,
    "variable_map.username": LONGEST_USERNAME_BYTES,
    "variable_map.vhost": 255,
}
_SAME = (
    ("client_id", "variable_map.client_id"),
    ("username", "variable_map.username"),
    ("vhost", "variable_map.vhost"),
)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_form(form: bytes) -> dict[str, str]:  # noqa: PLR0912 - one loop: function calls would cost more than their work
    """
    Parse a body or query and return the known parameters; others are ignored.

    Args:
        form: ``application/x-www-form-urlencoded``, up to :data:`LONGEST_BODY_BYTES`.
    Raises:
        MalformedRequest: Not UTF-8, badly escaped, too large, too many parameters, or a parameter that is duplicate,
            too long, contains NUL or contradicts another.
    """
    if len(form) > LONGEST_BODY_BYTES:
        raise MalformedRequest(Malformed.TOO_LARGE)
    if form.count(b"&") >= MOST_PARAMETERS:
        raise MalformedRequest(Malformed.TOO_MANY_PARAMETERS)
    try:
        text = form.decode()
        if "%" in text and _BAD_ESCAPE.search(text):
            raise MalformedRequest(Malformed.BAD_ENCODING)
        parameters: dict[str, str] = {}
        for field in text.split("&"):
            name, _, value = field.partition("=")
            if name not in _LIMITS:
                name = _unescaped(name)
                if name not in _LIMITS:
                    _unescaped(value)  # must still be UTF-8
                    continue
            if "%" in value or "+" in value:
                value = _unescaped(value)
            if name in parameters:
                raise MalformedRequest(Malformed.PARAMETER_TWICE)
            limit = _LIMITS[name]
            if len(value) * 4 > limit and len(value.encode()) > limit:
                raise MalformedRequest(Malformed.PARAMETER_TOO_LONG)
            parameters[name] = value
    except UnicodeDecodeError:
        raise MalformedRequest(Malformed.BAD_ENCODING) from None
    if ("%00" in text or "\x00" in text) and any("\x00" in value for value in parameters.values()):
        raise MalformedRequest(Malformed.NUL)
    for one, other in _SAME:
        if other in parameters and parameters.setdefault(one, parameters[other]) != parameters[other]:
            raise MalformedRequest(Malformed.PARAMETERS_CONTRADICT)
    return parameters


def _unescaped(text: str) -> str:
    """
    Decode a form-encoded name or value.

    Source: WHATWG URL, application/x-www-form-urlencoded parsing.
    """
    if text == "%2F":
        return "/"  # the default virtual host: twice in every request
    if "+" in text:
        text = text.replace("+", " ")
    return unquote(text, errors="strict") if "%" in text else text


def _required(parameters: dict[str, str], *names: str) -> list[str]:
    try:
        return [parameters[name] for name in names]
    except KeyError:
        raise MalformedRequest(Malformed.PARAMETER_MISSING) from None


def login_request(parameters: dict[str, str]) -> LoginRequest:
    """Parse ``/auth/user``; an empty password counts as a password."""
    (username,) = _required(parameters, "username")
    return LoginRequest(username, parameters.get("password"), parameters.get("client_id"))


def vhost_request(parameters: dict[str, str]) -> VhostRequest:
    """Parse ``/auth/vhost``."""
    username, vhost, ip = _required(parameters, "username", "vhost", "ip")
    return VhostRequest(username, vhost, ip, parameters.get("client_id"))


def resource_request(parameters: dict[str, str]) -> ResourceRequest:
    """Parse ``/auth/resource``."""
    username, vhost, resource, name, permission = _required(
        parameters, "username", "vhost", "resource", "name", "permission"
    )
    if resource not in ("queue", "exchange") or permission not in ("configure", "write", "read"):
        raise MalformedRequest(Malformed.BAD_VALUE)
    return ResourceRequest(username, vhost, resource, name, permission, parameters.get("client_id"))


def topic_request(parameters: dict[str, str]) -> TopicRequest:
    """Parse ``/auth/topic``; the routing key may be empty but not missing."""
    try:
        permission = parameters["permission"]
        request = TopicRequest(
            parameters["username"],
            parameters["vhost"],
            parameters["name"],
            permission,
            parameters["routing_key"],
            parameters.get("client_id"),
        )
        if parameters["resource"] != "topic" or permission not in ("write", "read"):
            raise MalformedRequest(Malformed.BAD_VALUE)
    except KeyError:
        raise MalformedRequest(Malformed.PARAMETER_MISSING) from None
    return request


def answer(decision: Decision, *, with_reason: bool = False) -> str:
    """
    Return the exact text for RabbitMQ: ``allow``, ``allow TAGS``, ``deny`` or ``deny REASON``.

    Anything else crashes RabbitMQ's connection process. So does a tag in the answer to anything but a login, and a
    reason before RabbitMQ 4.3.
    """
    if decision.allowed:
        return " ".join(("allow", *decision.tags))
    return f"deny {decision.reason}" if with_reason else "deny"
