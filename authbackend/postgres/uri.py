"""
The connection URI: each parameter of libpq is honoured, or named as one that is not.

asyncpg takes what it does not know for a setting of the server. Therefore nothing reaches it that is not listed here.
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
    "channel_binding": (("prefer", "disable"), "the driver has none; sslmode=verify-full proves who the server is"),
    "gssencmode": (("prefer", "disable"), "the driver cannot encrypt with GSSAPI; use TLS, sslmode=verify-full"),
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
    "require_auth": "the driver takes what the server asks for; allow only scram-sha-256 in pg_hba.conf",
    "requirepeer": "let the folder of the Unix socket be writable by PostgreSQL's user only",
    "servicefile": "set PGSERVICEFILE in the environment",
    "sslcrldir": "put the lists into one file: sslcrl",
    "sslkeylogfile": "it would write down the keys of the connection",
    **dict.fromkeys(("scram_client_key", "scram_server_key"), "give the password"),
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
    A connection URI that has been understood; never shown, since it may hold a password.

    Args:
        dsn: For asyncpg, without hosts and what it does not know.
        hosts: Host or folder of the Unix socket, and port; empty: asyncpg's default places.
        session: ``target_session_attrs``; None leaves it to the environment.
        connect_timeout_s: For each host; None if the URI does not say.
        application_name: What the URI calls its connections.
        options: Command line options for the server's process.
        socket_options: Level, name and value, for TCP.
        parameters: As they were written.
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
    Understand a connection URI.

    Raises:
        ConfigurationError: It is not valid, or has a parameter that cannot be honoured. No value is shown that could
            be part of a password.
    """
    parts, parameters = _split(dsn)
    for name, value in parameters.items():
        _check(name, value)
    hosts = _hosts(parts, parameters)
    session = parameters.get("target_session_attrs") or None
    if session is None and len(hosts) > 1:
        session = "primary"  # a standby cannot be followed, and may be the first that answers
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
        hint = f"; did you mean {nearest[0]}?" if nearest else ". A setting of the server: options=-c%20name%3Dvalue"
        raise ConfigurationError(f"the connection URI has {shown}, which is no parameter of libpq{hint}")


def _check_system_mode(sslmode: str | None) -> None:
    if sslmode not in (None, "verify-full"):
        raise ConfigurationError(
            "the connection URI's sslrootcert=system needs sslmode=verify-full: anybody can have a certificate of a public authority"
        )


def _hosts(parts: SplitResult, parameters: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    netloc = parts.netloc.rpartition("@")[2]
    hosts, ports = [], []
    for part in (netloc or parameters.get("host", "")).split(","):
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]]*)(?::(\d*))?", part)
        if found is None and not part.startswith("/"):
            raise ConfigurationError(
                "the connection URI is not valid: a host is written host:port or [IPv6 address]:port. Special characters "
                "in a role or password must be percent-encoded"
            )
        hosts.append(unquote(found[1].strip("[]")) if found else part)
        ports.append((found[2] or "") if found else "")
    if not hosts[0] and len(hosts) == 1:
        named = parameters.get("host", "").split(",")
        hosts, ports = named, ports * len(named)
    given = [port for port in parameters.get("port", "").split(",") if port] or os.environ.get("PGPORT", "").split(",")
    if len(given) == 1:
        given *= len(hosts)
    if len(given) != len(hosts):
        raise ConfigurationError("the connection URI is not valid: as many ports as hosts, or one for all")
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
            "the connection URI's connect_timeout must be at least 1: without a limit, a host that is silent is waited for without end"
        )
    return number


def _socket_options(parameters: Mapping[str, str]) -> tuple[tuple[int, int, int], ...]:
    found = []
    options = {
        "keepalives": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "keepalives_idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        "keepalives_interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        "keepalives_count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        "tcp_user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    }
    for name, option in options.items():
        number = _number(parameters, name)
        if number is not None and (number > 0 or name == "keepalives"):  # 0: the system's own
            found.append((*option, number))
    if found and "keepalives" not in parameters:
        found.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    return tuple(found)


def tls_context(uri: ConnectionURI, environment: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """
    Read the files that TLS needs, and return a context where asyncpg could not make it itself.

    Raises:
        Unavailable: One is missing or not what it should be, and which.
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
            "KEY_VALUES_MISMATCH": "the key is not that of the certificate",
            "BAD_DECRYPT": "the passphrase (sslpassword) is not that of the key",
            "BAD_PASSWORD_READ": "the key needs a passphrase (sslpassword)",
        }.get(error.reason or "", "it is not what is expected there, in PEM")
        raise Unavailable(f"no connection to PostgreSQL: {name} {path}: {what}") from error
    except OSError as error:
        raise Unavailable(f"no connection to PostgreSQL: {name} {path} cannot be read: {error.strerror}") from error
