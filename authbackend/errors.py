"""
Exceptions raised by authbackend. A denied request is not an error but a ``policy.decide.Decision``.

::

    AuthbackendError
    ├── ConfigurationError   a setting is invalid or missing; nothing was started
    ├── InvalidInput         the input is invalid; nothing was changed
    ├── NotFound             the named object does not exist
    ├── Conflict             the input conflicts with existing data
    ├── Forbidden            the database role lacks a privilege
    ├── Unavailable          the database or a peer cannot be reached, or somebody else holds a needed lock
    │   ├── NoRoom           not enough memory for the registry
    │   └── Unwritable       the database can be read but not written
    └── Unconfirmed          a change is committed, but its effect could not be confirmed

Each has a ``detail`` that is safe to show to the user; the cause is chained for the log.
"""

from __future__ import annotations

from typing import ClassVar


class AuthbackendError(Exception):
    """Base class with the ``exit_code`` of the command line and the ``http_status`` of the API."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ConfigurationError(AuthbackendError):
    """A setting is invalid or missing; nothing was started."""

    exit_code = 2
    http_status = 500


class InvalidInput(AuthbackendError):
    """The input is invalid; nothing was changed."""

    exit_code = 2
    http_status = 400


class NotFound(AuthbackendError):
    """The named object does not exist."""

    exit_code = 3
    http_status = 404


class Conflict(AuthbackendError):
    """The input conflicts with existing data."""

    exit_code = 4
    http_status = 409


class Unavailable(AuthbackendError):
    """The database or a peer cannot be reached, or somebody else holds a needed lock."""

    exit_code = 5
    http_status = 503


class NoRoom(Unavailable):
    """There is not enough memory for the registry; a quick retry does not help."""


class Unwritable(Unavailable):
    """The database can be read but not written: it is read-only, or its disk is full."""


class Forbidden(AuthbackendError):
    """The database role lacks a privilege."""

    exit_code = 7
    http_status = 403


class Unconfirmed(AuthbackendError):
    """A change is committed, but its effect could not be confirmed."""

    exit_code = 8
    http_status = 504
