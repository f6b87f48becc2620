"""Explain why there is no connection to PostgreSQL, for people; of the URI, only hosts are shown."""

from __future__ import annotations

import socket
import ssl

import asyncpg

_SERVER_CERTIFICATE = {
    # OpenSSL's X509_V_ERR_* numbers
    9: "is not valid yet: is this host's clock right?",
    10: "has expired: give the server a new one",
    23: "is revoked",
    3: "cannot be checked for revocation: sslcrl has no revocation list of its authority",
    12: "cannot be checked for revocation: the revocation list (sslcrl) has expired",
    62: "is for another name: connect by a name in the certificate, or give the server one with the name in the connection URI",
    64: "is for another address: connect by a name in the certificate, or give the server one with the address in the connection URI",
    **dict.fromkeys((2, 18, 19, 20, 21), "is not from an authority in sslrootcert"),
}
_ALERTS = (
    ("CERTIFICATE_EXPIRED", "it refuses this client's certificate (sslcert), which has expired"),
    ("CERTIFICATE_REVOKED", "it refuses this client's certificate (sslcert), which is revoked"),
    ("CERTIFICATE_REQUIRED", "the server requires a client certificate: set sslcert and sslkey"),
    ("UNKNOWN_CA", "it refuses this client's certificate (sslcert), whose authority it does not know"),
    ("ALERT_BAD_CERTIFICATE", "it refuses this client's certificate (sslcert)"),
    ("CERTIFICATE_UNKNOWN", "it refuses this client's certificate (sslcert)"),
    ("PROTOCOL_VERSION", "no version of TLS that both sides allow"),
    ("UNSUPPORTED_PROTOCOL", "no version of TLS that both sides allow"),
    (
        "HANDSHAKE_FAILURE",
        "no cipher suite that both sides allow, or the server requires a client certificate (sslcert)",
    ),
    ("WRONG_VERSION_NUMBER", "the server there does not speak TLS"),
)


def connection_fault(error: BaseException) -> str:
    """Return the cause of a driver error, and what to do about it."""
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):
        # With TLS 1.3 a server refuses a client certificate after the handshake.
        if isinstance(error.__cause__, OSError):
            return connection_fault(error.__cause__)
        return f"PostgreSQL: {error.args[0]}"
    if isinstance(error, ssl.SSLCertVerificationError):
        why = _SERVER_CERTIFICATE.get(error.verify_code, f"is not accepted: {error.verify_message}")
        return f"no trusted connection to PostgreSQL: the server's certificate {why}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        why = next((words for part, words in _ALERTS if part in reason), reason or "the TLS handshake failed")
        return f"no TLS connection to PostgreSQL: {why}"
    if isinstance(error, ssl.CertificateError):
        return "no trusted connection to PostgreSQL: the server's certificate is not accepted"
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "the server is a standby or read-only, which target_session_attrs of the connection URI excludes. Connect to the primary"
    if isinstance(error, OSError):
        return f"PostgreSQL cannot be reached: {_network(error)}"
    if isinstance(error, (asyncpg.InternalClientError, asyncpg.InterfaceError)):
        # asyncpg's errors for a server that closes the connection, and for a connection that is already closed.
        return f"PostgreSQL cannot be reached: it ended the connection ({type(error).__name__})"
    return f"PostgreSQL cannot be reached: {type(error).__name__}"


def _network(error: OSError) -> str:
    name = type(error).__name__
    if isinstance(error, socket.gaierror):
        return f"its host name is not known or cannot be looked up now ({name})"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens there ({name})"
    if isinstance(error, FileNotFoundError):
        return f"its Unix socket does not exist ({name})"
    if isinstance(error, ConnectionResetError):
        return f"it closed the connection ({name}); its log may say why. Over TLS, it may have refused sslcert"
    if "rejected SSL upgrade" in str(error):
        return "the server has no TLS, which sslmode of the connection URI requires; set ssl = on in postgresql.conf"
    if "AF_UNIX path too long" in str(error):
        return "the path of its Unix socket is longer than Linux allows (107 bytes). Give a shorter folder as host in the connection URI"
    return name if error.strerror is None else f"{error.strerror} ({name})"
