"""
One frozen tree of settings, built once from the environment or a TOML file and handed down as values.

``AUTHBACKEND_DATABASE__DSN`` in the environment is ``dsn`` under ``[database]`` in the file; the environment wins.
Secrets are typed as secrets: they show as ``**********`` in a ``repr`` and in errors.
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
"""Variables of this prefix that other parts read: the acting person and passphrase of commands, tools' cache, the file."""


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
        raise ValueError("a cluster without a URL")
    return value


def host_and_port(listen: str) -> tuple[str, int]:
    """Return the parts of a ``host:port`` setting; brackets around an IPv6 address are dropped."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(listen: str) -> bool:
    """Return whether a ``host:port`` setting can be reached only from this host."""
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
    def _empty_is_unset(cls, given: Any) -> Any:
        """Leave out what is empty: as a path it would mean the current folder, as a list one empty entry."""
        if not isinstance(given, Mapping):
            return given
        return {name: _without_empty(value) for name, value in given.items() if not _is_empty(value)}


class Database(_Section):
    """PostgreSQL, the truth."""

    dsn: SecretStr | None = Field(
        None,
        description="Connection URI of the PostgreSQL primary, for example `postgresql://authbackend_service@db/authbackend`.",
    )
    password_file: Path | None = Field(
        None,
        description="File that holds the password of the connection URI's role; the last newline is dropped. Read again for every new connection.",
    )
    connect_timeout_s: float = Field(
        5.0,
        ge=0.01,
        le=300,
        description="Longest wait for a connection to a host; `connect_timeout` of the connection URI wins.",
    )
    statement_timeout_s: float = Field(
        10.0,
        ge=0.1,  # PostgreSQL counts milliseconds, and takes 0 as no limit at all
        le=3600,
        description="Longest single statement of the service; a database that hangs is noticed by it.",
    )


class TLS(_Section):
    """Certificates of a listener, TLS 1.3; all three together are mutual TLS."""

    certificate_file: Path | None = Field(
        None, description="Server certificate with its chain, PEM. Read again within 2 s of a change."
    )
    key_file: Path | None = Field(
        None,
        description="Private key of the server certificate, PEM, not encrypted. Read again within 2 s of a change.",
    )
    client_ca_file: Path | None = Field(
        None,
        description="Authority whose client certificates are let in, PEM. Not the authority of the devices. Read again within 2 s of a change.",
    )


class Broker(_Section):
    """The listener that RabbitMQ asks."""

    listen: Listen = Field("127.0.0.1:8080", description="Where RabbitMQ asks, host:port.")
    insecure: bool = Field(
        False,
        description="Allow a listener that is not on loopback without mutual TLS. Anybody who reaches it can guess passwords.",
    )
    deny_reasons: bool = Field(
        False,
        description="Answer `deny REASON` instead of `deny`. RabbitMQ 4.3 and later only: older brokers crash the connection.",
    )
    mqtt_exchange: str = Field("amq.topic", min_length=1, max_length=255, description="RabbitMQ's `mqtt.exchange`.")
    request_timeout_s: float = Field(
        1.0, ge=0.01, le=10, description="Every request is answered within this time or fails by itself."
    )
    keepalive_timeout_s: float = Field(
        150.0,
        ge=120,
        le=86400,
        description="How long an idle connection stays open; RabbitMQ's HTTP client keeps one for 120 s.",
    )
    backlog: int = Field(
        4096, ge=128, le=65535, description="Connections that may wait to be accepted, for each worker."
    )
    max_connections: int = Field(
        8192, ge=16, le=1000000, description="Connections of a worker; one more is closed at once and counted."
    )
    tls: TLS = TLS()


class Admin(_Section):
    """The listener for people."""

    listen: Listen = Field("127.0.0.1:8081", description="Where people ask, host:port.")
    request_timeout_s: float = Field(
        5.0, ge=0.01, le=60, description="Longest time to send a request; who takes longer is cut off and counted."
    )
    max_connections: int = Field(
        256,
        ge=4,
        le=100000,
        description="Connections at once, at most half of the files that the process may open; one more is closed at once and counted.",
    )


class Health(_Section):
    """The listener for balancers, brokers' hosts and Prometheus: health, revocation lists, metrics. Nobody logs in."""

    listen: Listen = Field(
        "127.0.0.1:8082", description="Where balancers, brokers' hosts and Prometheus ask, host:port."
    )
    request_timeout_s: float = Field(
        5.0, ge=0.01, le=60, description="Longest time to send a request; who takes longer is cut off and counted."
    )
    max_connections: int = Field(
        256,
        ge=4,
        le=100000,
        description="Connections at once, at most half of the files that the process may open; one more is closed at once and counted. Each broker's host keeps one.",
    )
    tls: TLS = TLS()


class Registry(_Section):
    """The copy in memory."""

    poll_interval_s: float = Field(
        1.0, ge=0.01, le=60, description="Longest time between two looks at the change feed, notification or not."
    )
    max_staleness_s: float = Field(
        900.0,
        ge=0.001,
        le=2592000,
        description="After this time without a successful look, everything is denied with reason `registry_stale`.",
    )
    compare_interval_s: float = Field(
        3600.0, ge=0.1, le=604800, description="How often the copy is compared with the database row by row."
    )
    prune_interval_s: float = Field(60.0, ge=0.1, le=86400, description="How often the change feed is pruned.")
    change_retention_s: float = Field(
        3600.0,
        ge=60,
        le=2592000,
        description="How long change rows are kept; a replica silent for longer loads everything anew.",
    )

    memory_dir: Path = Field(
        Path("/dev/shm"),  # noqa: S108
        description="Where the copy lies that all workers share: a file system in memory, about 110 bytes a device, twice that while everything is loaded anew.",
    )
    snapshot_dir: Path | None = Field(
        None,
        description="Where the copy is kept on disk, so that a replica can start while the database is away; a folder for each replica. Unset: it starts only with the database.",
    )


class Replica(_Section):
    """One replica among others."""

    name: str | None = Field(
        None,
        min_length=1,
        max_length=255,
        description="How people call it, in `authbackend replicas`; unset: the host's name.",
    )
    workers: int = Field(1, ge=1, le=64, description="Processes that answer RabbitMQ, each on a core of its own.")
    drain_timeout_s: float = Field(
        10.0,
        ge=0.1,
        le=3600,
        description="Longest time to finish what is in flight after SIGTERM; then processes are killed.",
    )


class Accounts(_Section):
    """Password checks of accounts."""

    hashing_threads: int = Field(2, ge=1, le=64, description="Password checks at once, for each worker.")
    hashing_queue: int = Field(
        16, ge=0, le=10000, description="Password checks that may wait; more are refused at once."
    )
    reserved: tuple[str, ...] = Field(
        (), description="Accounts with a hashing slot of their own, which guessing at other names cannot occupy."
    )
    remember_s: float = Field(60.0, ge=0, le=60, description="How long a successful login is remembered.")
    remember_most: int = Field(1000, ge=0, le=100000, description="Successful logins remembered at most.")


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
    """Ending what is connected when the registry stops allowing it."""

    clusters: tuple[Annotated[str, AfterValidator(_management_urls)], ...] = Field(
        (),
        description="RabbitMQ clusters to enforce on: for each, the management URLs of its nodes, separated by spaces; any node speaks for its cluster. In the environment, clusters are separated by commas. Empty: nothing is enforced.",
    )
    username: str = Field(
        "enforcer", description="Account with RabbitMQ's tag `administrator`, as whom the management API is used."
    )
    password_file: Path | None = Field(
        None,
        description="File that holds its password; the last newline is dropped. Read again when a node refuses the password.",
    )
    ca_file: Path | None = Field(
        None,
        description="Authority of the nodes' management certificates, PEM; unset: the system's. Read again at the next request after a change.",
    )
    timeout_s: float = Field(5.0, ge=0.01, le=60, description="Longest single request to the management API.")
    kicks_per_second: float = Field(
        100.0,
        ge=0.1,
        le=1000000,
        description="Users whose connections are closed a second, so that a mass change is no storm.",
    )
    hold_limit_s: float = Field(
        30.0,
        ge=0.1,
        le=86400,
        description="Longest time that a device which lost a right is kept from logging in while its sessions are put right.",
    )
    hold_until_done: bool = Field(
        False,
        description="Keep such a device out until the work is done, whatever it takes, instead of letting it in after `hold_limit_s` with an alarm.",
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
        description="What a sweep ends when it finds it; the rest is reported only.",
    )


class Pki(_Section):
    """Certificates and revocation lists."""

    authority_dir: Path | None = Field(
        None,
        description="An authority made with `authbackend ca init`, whose revocation list this replica signs. Unset: `authbackend crl sign` or an outside authority does. Its files are read again within 30 s of a change.",
    )
    passphrase_file: Path | None = Field(
        None,
        description="File that holds the passphrase of the authority's key; the last newline is dropped. Read again within 30 s of a change.",
    )
    crl_lifetime_s: float = Field(
        604800.0,
        ge=60,
        le=31536000,
        description="From thisUpdate to nextUpdate of a revocation list, after which brokers refuse everybody. It is signed anew after half of it, and at once when something is revoked.",
    )


class Log(_Section):
    """Logging, to standard error."""

    format: Literal["json", "console"] = Field("json", description="`json`, one object a line, or `console`.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Allowed requests are logged at `debug`, denials at `info`."
    )
    denials_per_device: int = Field(
        5, ge=1, le=1000000, description="Denials logged per name in ten seconds; the rest is counted in one line."
    )
    denials: int = Field(
        500,
        ge=1,
        le=1000000,
        description="Denials logged in ten seconds by a worker, whatever the names; the rest is counted.",
    )


class Settings(_Section):
    """Everything that can be set."""

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
    """Return the name of a setting in the environment."""
    return PREFIX + "__".join(path).upper()


def load(environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """
    Build the settings from a TOML file, if there is one, and the environment, which wins.

    An empty value is no value. Variables that Kubernetes or Docker make for a Service of this name are left alone.

    Args:
        file: Overrides ``AUTHBACKEND_CONFIG``.
    Raises:
        ConfigurationError: A name is unknown, a value does not fit, or the file cannot be read. Every fault is
            listed; no value of a secret is printed.
    """
    tree: dict[str, Any] = {}
    faults: list[str] = []
    path = file or (Path(environment[CONFIG_FILE_VARIABLE]) if environment.get(CONFIG_FILE_VARIABLE) else None)
    if path is not None:
        tree = _read_file(path, faults)
    known = {variable(name): name for name in setting_names()}
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        if name not in known:
            if _is_service_link(name, value):
                continue
            faults.append(_unknown(name, list(known)))
            continue
        if _is_empty(value):
            continue
        branch = tree
        for part in known[name][:-1]:
            branch = branch.setdefault(part, {})
        branch[known[name][-1]] = [entry.strip() for entry in value.split(",")] if known[name] in _LISTS else value
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
    known = list(setting_names())
    dotted = [".".join(name) for name in known]
    for name in _leaves(tree, {name[:-1] for name in known}):
        if name not in known:
            faults.append(f"{path}: " + _unknown(".".join(name), dotted))
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
    Return whether Kubernetes or Docker set a variable, because a Service or container has a name like ours.

    ``_PORT`` and ``_NAME`` are also how people misspell settings, so their values decide: a port that a person meant has
    no ``tcp://`` before it, and is refused like any other unknown name.

    Source: Kubernetes, "Accessing the Service", environment variables; Docker, "Legacy container links".
    """
    if _SERVICE_LINK.fullmatch(name):
        return True
    return any(name.endswith(end) and shape.fullmatch(value) for end, shape in _LINK_VALUES.items())


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, 1, 0.0)
    return f"unknown setting {name}; did you mean {nearest[0]}?"


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_input=False, include_url=False, include_context=False):
        path = tuple(str(part) for part in fault["loc"])
        yield f"{variable(path)} ({'.'.join(path)}): {fault['msg'].removeprefix('Value error, ')}"
