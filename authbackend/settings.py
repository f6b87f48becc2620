"""
Frozen settings, read once from a TOML file and the environment and passed down as values.

``AUTHBACKEND_DATABASE__DSN`` in the environment is ``dsn`` under ``[database]`` in the file; the environment wins.
Secrets have secret types, so they show as ``**********`` in a ``repr`` and in errors.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from authbackend.errors import ConfigurationError

_LISTS = {("accounts", "reserved"), ("enforcement", "clusters"), ("enforcement", "sweep_closes")}
PREFIX = "AUTHBACKEND_"
CONFIG_FILE_VARIABLE = "AUTHBACKEND_CONFIG"
_SERVICE_LINK = re.compile(
    "AUTHBACKEND(_[A-Z0-9]+)*?"
    "(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR|START|END))?|_ENV_.+)"
)
_LINK_VALUES = {"_PORT": re.compile("(tcp|udp|sctp)://.*"), "_NAME": re.compile("/[^/]+/[^/]+")}
NOT_SETTINGS = (
    "AUTHBACKEND_ACTOR",
    "AUTHBACKEND_CACHE",
    "AUTHBACKEND_CA_PASSPHRASE",
    "AUTHBACKEND_CA_ROOT_PASSPHRASE",
    "AUTHBACKEND_CA_ROOT_PASSPHRASE_FILE",
    "AUTHBACKEND_CA_PASSPHRASE_FILE",
    CONFIG_FILE_VARIABLE,
)
"""Variables with this prefix that are not settings: actor, cache of the tools, passphrases, path of the TOML file."""


def _listen_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 <= int(port) <= 65535:
        raise ValueError("write it as host:port, for example 127.0.0.1:8080 or [::1]:8080")
    return value


Listen = Annotated[str, AfterValidator(_listen_address)]


def _management_urls(value: str) -> str:
    urls = value.split()
    for url in urls:
        scheme, _, rest = url.partition("://")
        if scheme not in ("https", "http") or not rest or "@" in rest or "/" in rest.rstrip("/"):
            raise ValueError("write each node as https://host:15671, without path, user or password")
        if scheme == "http" and not is_loopback(rest if ":" in rest else f"{rest}:80"):
            raise ValueError("http:// would send the password in clear text: use https://, or http:// to loopback only")
    if not urls:
        raise ValueError("a cluster has no URL; write each node as https://host:15671")
    return value


def host_and_port(listen: str) -> tuple[str, int]:
    """Split a ``host:port`` setting; brackets around an IPv6 address are dropped."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(listen: str) -> bool:
    """Return whether a ``host:port`` address can be reached only from this host."""
    host, _ = host_and_port(listen)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def _without_empty(value: object) -> object:
    return [entry for entry in value if not _is_empty(entry)] if isinstance(value, list) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        """Drop empty values: as a path one would mean the current directory, as a list one empty entry."""
        if not isinstance(values, Mapping):
            return values
        return {name: _without_empty(value) for name, value in values.items() if not _is_empty(value)}


class Database(_Section):
    """PostgreSQL, which holds the registry."""

    dsn: SecretStr | None = Field(
        None,
        description="Connection URI of the PostgreSQL primary, for example `postgresql://authbackend_service@db/authbackend`.",
    )
    password_file: Path | None = Field(
        None,
        description="File that holds the password of the connection URI's role; the last newline is dropped. Read again for each new connection.",
    )
    connect_timeout_s: float = Field(
        5.0,
        ge=0.01,
        le=300,
        description="Longest wait when connecting to a host; `connect_timeout` in the connection URI wins.",
    )
    statement_timeout_s: float = Field(
        10.0,
        ge=0.1,  # PostgreSQL counts whole milliseconds, and 0 means no limit
        le=3600,
        description="Longest time for a single SQL statement; also how a database that hangs is detected.",
    )


class TLS(_Section):
    """Certificates of a listener, TLS 1.3 only; setting all three enables mutual TLS."""

    certificate_file: Path | None = Field(
        None, description="Server certificate with its chain, PEM. Read again within 2 s of a change."
    )
    key_file: Path | None = Field(
        None,
        description="Private key of the server certificate, PEM, not encrypted. Read again within 2 s of a change.",
    )
    client_ca_file: Path | None = Field(
        None,
        description="CA whose client certificates are accepted, PEM. Not the CA of the devices. Read again within 2 s of a change.",
    )


class Broker(_Section):
    """The listener for RabbitMQ."""

    listen: Listen = Field("127.0.0.1:8080", description="Address for requests from RabbitMQ, host:port.")
    insecure: bool = Field(
        False,
        description="Allow listening on an address other than loopback without mutual TLS. Anybody who can reach it can guess passwords.",
    )
    deny_reasons: bool = Field(
        False,
        description="Answer `deny REASON` instead of `deny`. Only for RabbitMQ 4.3 and later: in older versions it crashes the connection.",
    )
    mqtt_exchange: str = Field("amq.topic", min_length=1, max_length=255, description="RabbitMQ's `mqtt.exchange`.")
    request_timeout_s: float = Field(
        1.0, ge=0.01, le=10, description="Longest time to answer a request; after that, it fails."
    )
    keepalive_timeout_s: float = Field(
        150.0,
        ge=120,
        le=86400,
        description="How long an idle connection stays open; RabbitMQ's HTTP client keeps one for 120 s.",
    )
    backlog: int = Field(4096, ge=128, le=65535, description="Connections that may wait to be accepted, per worker.")
    max_connections: int = Field(
        8192, ge=16, le=1000000, description="Open connections per worker; any more are closed immediately and counted."
    )
    tls: TLS = TLS()


class Admin(_Section):
    """The listener for people, with the API."""

    listen: Listen = Field("127.0.0.1:8081", description="Address for people, host:port.")
    request_timeout_s: float = Field(
        5.0,
        ge=0.01,
        le=60,
        description="Longest time for a client to send a request; slower connections are closed and counted.",
    )
    max_connections: int = Field(
        256,
        ge=4,
        le=100000,
        description="Open connections, at most half of the process's open-file limit; any more are closed immediately and counted.",
    )


class Health(_Section):
    """The listener for load balancers, RabbitMQ hosts and Prometheus: health, CRLs and metrics, without login."""

    listen: Listen = Field(
        "127.0.0.1:8082", description="Address for load balancers, RabbitMQ hosts and Prometheus, host:port."
    )
    request_timeout_s: float = Field(
        5.0,
        ge=0.01,
        le=60,
        description="Longest time for a client to send a request; slower connections are closed and counted.",
    )
    max_connections: int = Field(
        256,
        ge=4,
        le=100000,
        description="Open connections, at most half of the process's open-file limit; any more are closed immediately and counted. Each RabbitMQ host keeps one open.",
    )
    tls: TLS = TLS()


class Registry(_Section):
    """The copy of the registry in memory."""

    poll_interval_s: float = Field(
        1.0,
        ge=0.01,
        le=60,
        description="Longest time between two reads of the change feed, even without a notification.",
    )
    max_staleness_s: float = Field(
        900.0,
        ge=0.001,
        le=2592000,
        description="After this time without a successful read, everything is denied with reason `registry_stale`.",
    )
    compare_interval_s: float = Field(
        3600.0, ge=0.1, le=604800, description="How often the copy is compared with the database row by row."
    )
    prune_interval_s: float = Field(60.0, ge=0.1, le=86400, description="How often the change feed is pruned.")
    change_retention_s: float = Field(
        3600.0,
        ge=60,
        le=2592000,
        description="How long rows of the change feed are kept; a replica that is away for longer reloads the whole registry.",
    )

    memory_dir: Path = Field(
        Path("/dev/shm"),  # noqa: S108
        description="Directory for the copy that all workers share, on a file system in memory. Needs about 110 bytes per device, twice that during a full reload.",
    )
    snapshot_dir: Path | None = Field(
        None,
        description="Directory for a copy on disk, so that the replica can start without the database; each replica needs its own. Unset: it can only start when the database is reachable.",
    )


class Replica(_Section):
    """Name, processes and shutdown of this replica."""

    name: str | None = Field(
        None,
        min_length=1,
        max_length=255,
        description="Name shown in `authbackend replicas`; unset: the host name.",
    )
    workers: int = Field(1, ge=1, le=64, description="Processes that answer RabbitMQ; each can use one core.")
    drain_timeout_s: float = Field(
        10.0,
        ge=0.1,
        le=3600,
        description="Longest time to finish requests in flight after SIGTERM; then the processes are killed.",
    )


class Accounts(_Section):
    """Password checks of accounts."""

    hashing_threads: int = Field(
        2, ge=1, le=64, description="Password checks that may run at the same time, per worker."
    )
    hashing_queue: int = Field(
        16, ge=0, le=10000, description="Password checks that may wait; any more are refused immediately."
    )
    reserved: tuple[str, ...] = Field(
        (), description="Accounts with their own hashing thread, which password guesses at other names cannot block."
    )
    remember_s: float = Field(60.0, ge=0, le=60, description="How long a successful login is remembered.")
    remember_most: int = Field(1000, ge=0, le=100000, description="How many successful logins are remembered.")


SweepCause = Literal[
    "unknown_identity",
    "device_not_permitted",
    "account_not_permitted",
    "wrong_client_id",
    "name_not_of_certificate",
    "certificate_revoked",
    "certificate_unknown",
    "session_without_owner",
]


class Enforcement(_Section):
    """Closing connections and deleting sessions that the registry no longer allows."""

    clusters: tuple[Annotated[str, AfterValidator(_management_urls)], ...] = Field(
        (),
        description="RabbitMQ clusters to enforce on: for each, the management URLs of its nodes, separated by spaces; any node can answer for its cluster. In the environment, separate clusters by commas. Empty: nothing is enforced.",
    )
    username: str = Field(
        "enforcer", description="Account for the management API; it needs RabbitMQ's tag `administrator`."
    )
    password_file: Path | None = Field(
        None,
        description="File that holds this account's password; the last newline is dropped. Read again when a node refuses the password.",
    )
    ca_file: Path | None = Field(
        None,
        description="CA of the nodes' management certificates, PEM; unset: the system's CAs. Read again at the first request after a change.",
    )
    timeout_s: float = Field(
        5.0, ge=0.01, le=60, description="Longest time for a single request to the management API."
    )
    kicks_per_second: float = Field(
        100.0,
        ge=0.1,
        le=1000000,
        description="How many users' connections are closed per second, so that a mass change does not cause a reconnect storm.",
    )
    hold_limit_s: float = Field(
        30.0,
        ge=0.1,
        le=86400,
        description="Longest time that a device which lost a right is denied login while its sessions are repaired.",
    )
    hold_until_done: bool = Field(
        False,
        description="Deny such a device until its sessions are repaired, however long that takes, instead of allowing it after `hold_limit_s` with an alarm.",
    )
    sweep_interval_s: float = Field(
        60.0, ge=0.1, le=86400, description="How often live connections and sessions are compared with the registry."
    )
    sweep_closes: tuple[SweepCause, ...] = Field(
        (
            "device_not_permitted",
            "account_not_permitted",
            "wrong_client_id",
            "name_not_of_certificate",
            "certificate_revoked",
        ),
        description="Violations that a sweep ends; all others are only reported.",
    )


class Pki(_Section):
    """Certificates and CRLs."""

    authority_dir: Path | None = Field(
        None,
        description="Directory of a CA created with `authbackend ca init`; this replica signs its CRL. Unset: `authbackend crl sign` or an external CA does. Its files are read again within 30 s of a change.",
    )
    passphrase_file: Path | None = Field(
        None,
        description="File that holds the passphrase of the CA's key; the last newline is dropped. Read again within 30 s of a change.",
    )
    crl_lifetime_s: float = Field(
        604800.0,
        ge=60,
        le=31536000,
        description="Time from thisUpdate to nextUpdate of a CRL, after which brokers refuse every certificate. A new one is signed at half that time, and immediately when a certificate is revoked.",
    )


class Log(_Section):
    """Logging, to standard error."""

    format: Literal["json", "console"] = Field("json", description="`json`, one object per line, or `console`.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Lowest level that is logged. Denials are logged at `info`; allowed requests are not logged.",
    )
    denials_per_device: int = Field(
        5,
        ge=1,
        le=1000000,
        description="Denials logged per name in ten seconds; any more are only counted, in one line.",
    )
    denials: int = Field(
        500,
        ge=1,
        le=1000000,
        description="Denials logged in ten seconds per worker, over all names; any more are only counted.",
    )


class Settings(_Section):
    """All settings, one field per section."""

    database: Database = Database()
    broker: Broker = Broker()
    admin: Admin = Admin()
    health: Health = Health()
    registry: Registry = Registry()
    replica: Replica = Replica()
    accounts: Accounts = Accounts()
    enforcement: Enforcement = Enforcement()
    pki: Pki = Pki()
    log: Log = Log()


def setting_names(model: type[BaseModel] = Settings, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every setting, for example ``("broker", "tls", "key_file")``."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, (*path, name))
        else:
            yield (*path, name)


def variable(path: tuple[str, ...]) -> str:
    """Return a setting's environment variable."""
    return PREFIX + "__".join(path).upper()


def load(environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """
    Build the settings from a TOML file, if there is one, and the environment, which wins.

    An empty value counts as unset. Variables that Kubernetes or Docker set for a Service of this name are ignored.

    Args:
        file: Overrides ``AUTHBACKEND_CONFIG``.
    Raises:
        ConfigurationError: A name is unknown, a value is invalid, or the file cannot be read. Lists every fault, but
            never the value of a secret.
    """
    tree: dict[str, Any] = {}
    faults: list[str] = []
    path = file or (Path(environment[CONFIG_FILE_VARIABLE]) if environment.get(CONFIG_FILE_VARIABLE) else None)
    if path is not None:
        tree = _read_file(path, faults)
    paths = {variable(setting): setting for setting in setting_names()}
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        if name not in paths:
            if _is_service_link(name, value):
                continue
            faults.append(_unknown(name, list(paths)))
            continue
        if _is_empty(value):
            continue
        branch = tree
        setting = paths[name]
        for part in setting[:-1]:
            branch = branch.setdefault(part, {})
        branch[setting[-1]] = [entry.strip() for entry in value.split(",")] if setting in _LISTS else value
    if faults:
        raise ConfigurationError("\n".join(faults))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explain(error))) from None


def _read_file(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    settings = list(setting_names())
    dotted = [".".join(setting) for setting in settings]
    for leaf in _leaves(tree, {setting[:-1] for setting in settings}):
        if leaf not in settings:
            faults.append(f"{path}: " + _unknown(".".join(leaf), dotted))
    return tree


def _leaves(
    tree: Mapping[str, Any], sections: set[tuple[str, ...]], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and any(section[: len(path) + 1] == (*path, name) for section in sections):
            yield from _leaves(value, sections, (*path, name))
        else:
            yield (*path, name)


def _is_service_link(name: str, value: str) -> bool:
    """
    Return whether Kubernetes or Docker set this variable, for a Service or container that is named like authbackend.

    People also misspell settings with ``_PORT`` and ``_NAME``, so for these the value decides: a port that a person
    sets does not begin with ``tcp://``, and is refused like any other unknown name.

    Source: Kubernetes, "Accessing the Service", environment variables; Docker, "Legacy container links".
    """
    if _SERVICE_LINK.fullmatch(name):
        return True
    return any(name.endswith(end) and shape.fullmatch(value) for end, shape in _LINK_VALUES.items())


def _unknown(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name, names, 1, 0.0)
    return f"unknown setting {name}; did you mean {nearest[0]}?"


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_input=False, include_url=False, include_context=False):
        path = tuple(str(part) for part in fault["loc"])
        yield f"{variable(path)} ({'.'.join(path)}): {fault['msg'].removeprefix('Value error, ')}"
