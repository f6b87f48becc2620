"""
Parse the connection URI; each parameter of libpq is either honoured or rejected by name.

asyncpg passes unknown parameters to the server as settings. Therefore only parameters listed here reach it.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from authbackend.errors import ConfigurationError, Unavailable

_EXPECTED = "expected postgresql://role@host:port/database?parameter=value"
_DEFAULT_PORT = "5432"

_BY_ASYNCPG = {
    *("user", "password", "passfile", "dbname", "service", "krbsrvname", "gsslib"),
    *("sslmode", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl", "sslnegotiation"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version"),
}
_HERE = {
    *("host", "port", "connect_timeout", "application_name", "fallback_application_name", "options"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
    "target_session_attrs",
}
_ONLY: Mapping[str, tuple[tuple[str, ...], str]] = {
    "channel_binding": (
        ("prefer", "disable"),
        "the driver does not support it; sslmode=verify-full proves the server's identity",
    ),
    "gssencmode": (("prefer", "disable"), "the driver cannot encrypt with GSSAPI; use TLS (sslmode=verify-full)"),
    "gssdelegation": (("0",), "the driver delegates no credentials"),
    "client_encoding": (("utf8", "utf-8", "auto"), "the registry is read as UTF-8"),
    "sslcompression": (("0",), "TLS compression is unsafe"),
    "sslsni": (("1",), "the driver always sends the server's name"),
    "sslcertmode": (("allow",), "a client certificate is sent if there is one"),
    "requiressl": (("0",), "write sslmode=require"),
    "replication": (("false", "off", "no", "0"), "the registry is read with SQL"),
    "load_balance_hosts": (("disable",), "there is one primary"),
    "min_protocol_version": (("3.0",), "the driver speaks version 3.0"),
    "max_protocol_version": (("3.0", "3.2", "latest"), "the driver speaks version 3.0"),
}
_NEVER: Mapping[str, str] = {
    "hostaddr": "write the address as the host",
    "require_auth": "the driver uses the method that the server asks for; allow only scram-sha-256 in pg_hba.conf",
    "requirepeer": "make the folder of the Unix socket writable only by PostgreSQL's user",
    "servicefile": "set PGSERVICEFILE in the environment",
    "sslcrldir": "put the lists into one file and use sslcrl",
    "sslkeylogfile": "it would write the keys of the connection to a file",
    **dict.fromkeys(("scram_client_key", "scram_server_key"), "use a password"),
    **dict.fromkeys(
        ("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope", "oauth_ca_file"),
        "the driver has no OAuth; use a password or a client certificate",
    ),
}
_SESSIONS = ("any", "read-write", "primary")
_FILES: Mapping[str, str] = {
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
}
PARAMETERS = frozenset((*_BY_ASYNCPG, *_HERE, *_ONLY, *_NEVER))


@dataclass(frozen=True, slots=True, repr=False)
class ConnectionURI:
    """
    A parsed connection URI; never shown, because it may contain a password.

    Args:
        dsn: The URI for asyncpg, without hosts and without parameters that asyncpg does not know.
        hosts: Host (or folder of the Unix socket) and port of each; empty for asyncpg's defaults.
        session: ``target_session_attrs``; None leaves it to the environment.
        connect_timeout_s: Timeout per host; None if the URI has none.
        application_name: The URI's ``application_name``; None if it has none.
        options: Command-line options for the server process.
        socket_options: Level, name and value of each option for TCP sockets.
        parameters: All parameters as written in the URI.
    """

    dsn: str
    hosts: tuple[tuple[str, int], ...]
    session: str | None
    connect_timeout_s: float | None
    application_name: str | None
    options: str | None
    socket_options: tuple[tuple[int, int, int], ...]
    parameters: Mapping[str, str]


def parse(dsn: str) -> ConnectionURI:
    """
    Parse a connection URI.

    Raises:
        ConfigurationError: It is not valid, or has a parameter that cannot be honoured. The message shows nothing that
            could be part of a password.
    """
    parts, parameters = _split(dsn)
    for name, value in parameters.items():
        _check(name, value)
    hosts = _hosts(parts, parameters)
    session = parameters.get("target_session_attrs") or None
    if session is None and len(hosts) > 1:
        session = "primary"  # otherwise the first to answer may be a standby, which cannot be followed
    passed = {name: value for name, value in parameters.items() if name in _BY_ASYNCPG}
    if passed.get("sslrootcert") == "system":
        _check_system_mode(passed.get("sslmode"))
        del passed["sslrootcert"]
    userinfo, at, _ = parts.netloc.rpartition("@")
    query = urlencode(passed, quote_via=quote)
    return ConnectionURI(
        dsn=f"{parts.scheme}://{userinfo}{at}{parts.path}{'?' if query else ''}{query}",
        hosts=hosts,
        session=session,
        connect_timeout_s=_connect_timeout_s(parameters),
        application_name=parameters.get("application_name") or None,
        options=parameters.get("options") or None,
        socket_options=_socket_options(parameters),
        parameters=parameters,
    )


def _split(dsn: str) -> tuple[SplitResult, dict[str, str]]:
    try:
        parts = urlsplit(dsn)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ConfigurationError(f"the connection URI is not valid; {_EXPECTED}") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"the connection URI is not valid; {_EXPECTED}")
    ats = dsn.count("@")
    if parts.fragment or parts.netloc.count("@") > 1 or (ats and "@" not in parts.netloc):
        raise ConfigurationError(
            "the connection URI is not valid: @ : / ? # % in a role or password must be percent-encoded, for example @ as %40"
        )
    return parts, dict(pairs)


def _check(name: str, value: str) -> None:
    if name in _NEVER:
        raise ConfigurationError(f"the connection URI's {name} is not supported: {_NEVER[name]}")
    if name in _ONLY:
        allowed, why = _ONLY[name]
        if value.lower() not in allowed:
            raise ConfigurationError(
                f"the connection URI's {name} can only be {' or '.join(allowed)}: {why}. Change it or leave it out"
            )
    elif name == "target_session_attrs" and value not in _SESSIONS:
        raise ConfigurationError(
            f"the connection URI's target_session_attrs must be one of {', '.join(_SESSIONS)}: a standby cannot be followed"
        )
    elif name not in PARAMETERS:
        shown = name if re.fullmatch(r"[A-Za-z_.]{1,63}", name) else "a parameter"
        nearest = difflib.get_close_matches(name, sorted(PARAMETERS - _NEVER.keys()), 1)
        hint = (
            f"; did you mean {nearest[0]}?"
            if nearest
            else ". For a setting of the server, write options=-c%20name%3Dvalue"
        )
        raise ConfigurationError(f"the connection URI has {shown}, which is not a parameter of libpq{hint}")


def _check_system_mode(sslmode: str | None) -> None:
    if sslmode not in (None, "verify-full"):
        raise ConfigurationError(
            "the connection URI's sslrootcert=system needs sslmode=verify-full: anybody can get a certificate from a public authority"
        )


def _hosts(parts: SplitResult, parameters: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    netloc = parts.netloc.rpartition("@")[2]
    hosts, ports = [], []
    for part in (netloc or parameters.get("host", "")).split(","):
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]]*)(?::(\d*))?", part)
        if match is None and not part.startswith("/"):
            raise ConfigurationError(
                "the connection URI is not valid: a host is written host:port or [IPv6 address]:port. Special characters "
                "in a role or password must be percent-encoded"
            )
        hosts.append(unquote(match[1].strip("[]")) if match else part)
        ports.append((match[2] or "") if match else "")
    if not hosts[0] and len(hosts) == 1:
        named = parameters.get("host", "").split(",")
        hosts, ports = named, ports * len(named)
    given = [port for port in parameters.get("port", "").split(",") if port] or os.environ.get("PGPORT", "").split(",")
    if len(given) == 1:
        given *= len(hosts)
    if len(given) != len(hosts):
        raise ConfigurationError("the connection URI is not valid: give as many ports as hosts, or one port for all")
    if hosts == [""]:
        return ()
    return tuple((host, _port(own or other)) for host, own, other in zip(hosts, ports, given, strict=True))


def _port(text: str) -> int:
    number = int(text or _DEFAULT_PORT) if (text or _DEFAULT_PORT).isdigit() else 0
    if not 1 <= number <= 65535:
        raise ConfigurationError("the connection URI is not valid: a port is a number from 1 to 65535")
    return number


def _number(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name)
    if not text:
        return None
    if not re.fullmatch(r"-?\d{1,9}", text.strip()):
        raise ConfigurationError(f"the connection URI's {name} must be a whole number")
    return int(text)


def _connect_timeout_s(parameters: Mapping[str, str]) -> float | None:
    number = _number(parameters, "connect_timeout")
    if number is not None and number <= 0:
        raise ConfigurationError(
            "the connection URI's connect_timeout must be at least 1: without a limit, connecting to a silent host would never end"
        )
    return number


def _socket_options(parameters: Mapping[str, str]) -> tuple[tuple[int, int, int], ...]:
    result = []
    options = {
        "keepalives": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "keepalives_idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        "keepalives_interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        "keepalives_count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        "tcp_user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    }
    for name, option in options.items():
        number = _number(parameters, name)
        if number is not None and (number > 0 or name == "keepalives"):  # 0 keeps the system's default
            result.append((*option, number))
    if result and "keepalives" not in parameters:
        result.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    return tuple(result)


def tls_context(uri: ConnectionURI, environment: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """
    Check the files that TLS needs; return a TLS context for ``sslrootcert=system``, else None: asyncpg makes its own.

    Raises:
        Unavailable: A file is missing or not usable; the message names it.
    """
    given = uri.parameters
    files = {name: given.get(name) or environment.get(variable) or None for name, variable in _FILES.items()}
    mode = given.get("sslmode") or environment.get("PGSSLMODE") or "prefer"
    if given.get("sslrootcert") == "system":
        mode = "verify-full"
    if mode == "disable":
        return None
    system = files["sslrootcert"] == "system"
    if mode in ("verify-ca", "verify-full") and files["sslrootcert"] is None:
        files["sslrootcert"] = str(Path("~/.postgresql/root.crt").expanduser())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if system:
        _load("sslrootcert", "system", context.load_default_certs)
    elif (root := files["sslrootcert"]) and (mode not in ("allow", "prefer")):
        _load("sslrootcert", root, lambda: context.load_verify_locations(cafile=root))
    if crl := files["sslcrl"]:
        _load("sslcrl", crl, lambda: context.load_verify_locations(cafile=crl))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if certificate := files["sslcert"]:
        key = files["sslkey"]
        for name, path in (("sslcert", certificate), ("sslkey", key)):
            if path is not None:
                _load(name, path, Path(path).read_bytes)
        password = given.get("sslpassword", "")
        _load(
            "sslcert",
            f"{certificate} with its key",
            lambda: context.load_cert_chain(certificate, key, lambda: password),
        )
    if not system:
        return None
    _set_versions(context, given)
    return context


def _set_versions(context: ssl.SSLContext, parameters: Mapping[str, str]) -> None:
    for name, attribute in (("min", "minimum_version"), ("max", "maximum_version")):
        if version := parameters.get(f"ssl_{name}_protocol_version"):
            try:
                setattr(context, attribute, ssl.TLSVersion[version.replace(".", "_")])
            except KeyError:
                raise ConfigurationError(
                    f"the connection URI's ssl_{name}_protocol_version must be TLSv1.2 or TLSv1.3"
                ) from None


def _load(name: str, path: str, load: Callable[[], object]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        what = {
            "KEY_VALUES_MISMATCH": "the key does not belong to the certificate",
            "BAD_DECRYPT": "the passphrase (sslpassword) of the key is wrong",
            "BAD_PASSWORD_READ": "the key needs a passphrase (sslpassword)",
        }.get(error.reason or "", "it does not contain the expected PEM data")
        raise Unavailable(f"no connection to PostgreSQL: {name} {path}: {what}") from error
    except OSError as error:
        raise Unavailable(f"no connection to PostgreSQL: {name} {path} cannot be read: {error.strerror}") from error
