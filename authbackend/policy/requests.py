"""RabbitMQ's requests as values. Treat them as immutable; frozen, each would take three times as long to create."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LoginRequest:
    """
    ``/auth/user``. RabbitMQ 3.x, and 4.1 and later, send a password only if the client sent one.

    Args:
        password: None if the parameter is absent; an empty one counts as present.
        client_id: None if absent: RabbitMQ 3.x sends none with a certificate login.
    """

    username: str
    password: str | None = None
    client_id: str | None = None

    def __repr__(self) -> str:
        return f"LoginRequest(username={self.username!r}, client_id={self.client_id!r})"


@dataclass(slots=True)
class VhostRequest:
    """``/auth/vhost``, the last request before RabbitMQ closes an existing connection with the same client id."""

    username: str
    vhost: str
    ip: str
    client_id: str | None = None


@dataclass(slots=True)
class ResourceRequest:
    """``/auth/resource``: configure, write or read on a queue or exchange."""

    username: str
    vhost: str
    resource: str
    name: str
    permission: str
    client_id: str | None = None


@dataclass(slots=True)
class TopicRequest:
    """``/auth/topic``: write to a routing key or bind with a filter."""

    username: str
    vhost: str
    name: str
    permission: str
    routing_key: str
    client_id: str | None = None
