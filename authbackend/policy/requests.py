"""What RabbitMQ asks, as values; nothing changes one. Frozen, each would take three times as long to make."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LoginRequest:
    """
    ``/auth/user``. RabbitMQ 4.1 and later and 3.x send a password only when the client gave one.

    Args:
        password: None when the parameter is absent; empty is present.
        client_id: None when absent: RabbitMQ 3.x sends none with a certificate login.
    """

    username: str
    password: str | None = None
    client_id: str | None = None

    def __repr__(self) -> str:
        return f"LoginRequest(username={self.username!r}, client_id={self.client_id!r})"


@dataclass(slots=True)
class VhostRequest:
    """``/auth/vhost``, the last question before RabbitMQ takes over a connection with the same client id."""

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
