"""The closed list of decision reasons, used as they are in metrics and logs."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a request is allowed or denied; every decision has one."""

    ALLOWED = "allowed"

    # login and identity
    UNKNOWN_IDENTITY = "unknown_identity"
    DEVICE_PENDING = "device_pending"
    DEVICE_SUSPENDED = "device_suspended"
    DEVICE_REVOKED = "device_revoked"
    DEVICE_EXPIRED = "device_expired"
    ENFORCEMENT_IN_PROGRESS = "enforcement_in_progress"
    DEVICE_TYPE_UNKNOWN = "device_type_unknown"
    PASSWORD_ON_CERTIFICATE_IDENTITY = "password_on_certificate_identity"
    PASSWORD_MISSING = "password_missing"
    PASSWORD_WRONG = "password_wrong"
    PASSWORD_CHECKS_BUSY = "password_checks_busy"

    # client ids
    CLIENT_ID_MISSING = "client_id_missing"
    CLIENT_ID_NOT_BOUND = "client_id_not_bound"
    CLIENT_ID_OF_ANOTHER_DEVICE = "client_id_of_another_device"

    # virtual hosts, queues, exchanges, topics
    VHOST_NOT_LISTED = "vhost_not_listed"
    ADDRESS_NOT_IN_NETWORKS = "address_not_in_networks"
    RESOURCE_NOT_PERMITTED = "resource_not_permitted"
    UNCHECKED_DEAD_LETTERING = "unchecked_dead_lettering"
    EXCHANGE_NOT_PERMITTED = "exchange_not_permitted"
    TOO_MANY_WILDCARDS = "too_many_wildcards"
    NO_RULE_ALLOWS = "no_rule_allows"
    RULE_DENIES = "rule_denies"

    # the request itself, or the service
    MALFORMED_REQUEST = "malformed_request"
    REGISTRY_STALE = "registry_stale"
