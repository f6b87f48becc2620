"""
Errors of this project; a refusal by policy is never one of them but a value (``policy.decide.Decision``).

::

    AuthbackendError
    ├── ConfigurationError   a setting is wrong or missing; nothing was started
    ├── InvalidInput         what was given breaks a rule; nothing was changed
    ├── NotFound             what was named does not exist
    ├── Conflict             what was given collides with what is there
    ├── Forbidden            the database role lacks the right
    ├── Unavailable          the database or a peer cannot be reached now, or somebody else holds what is needed
    │   ├── NoRoom           there is no memory for the registry
    │   └── Unwritable       the database can be read and not written
    └── Unconfirmed          a change is committed, and what was waited for is not known to be true

Each has a ``detail`` that is safe to show to the person who asked; the cause is chained for the log.
"""

from __future__ import annotations

from typing import ClassVar


class AuthbackendError(Exception):
    """Base of all; ``exit_code`` is what the command line ends with, ``http_status`` what the API answers."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ConfigurationError(AuthbackendError):
    """A setting is wrong or missing."""

    exit_code = 2
    http_status = 500


class InvalidInput(AuthbackendError):
    """What was given breaks a rule; nothing was changed."""

    exit_code = 2
    http_status = 400


class NotFound(AuthbackendError):
    """What was named does not exist."""

    exit_code = 3
    http_status = 404


class Conflict(AuthbackendError):
    """What was given collides with what is there."""

    exit_code = 4
    http_status = 409


class Unavailable(AuthbackendError):
    """The database or a peer cannot be reached now, or somebody else holds what is needed."""

    exit_code = 5
    http_status = 503


class NoRoom(Unavailable):
    """There is no memory for the registry; trying again soon does not help."""


class Unwritable(Unavailable):
    """The database can be read and not written: it is read-only, or its disk is full."""


class Forbidden(AuthbackendError):
    """The database role lacks the right."""

    exit_code = 7
    http_status = 403


class Unconfirmed(AuthbackendError):
    """A change is committed, and what was waited for is not known to be true."""

    exit_code = 8
    http_status = 504
