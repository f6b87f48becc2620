"""
The effect of each way to configure CRL checks in RabbitMQ; docs/certificates.md has the table.

One way works as intended (tested in test_crl). The others are traps: two accept revoked certificates, the others refuse
everybody or notice a revocation too late.
"""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from authbackend.pki.crl import CrlEntry, issuer_hash, list_pem, sign_list

from .conftest import ROOT
from .identities import Certificates, Identity
from .mqtt import HOST
from .node import Broker, Doors
from .revocation import CRL_CONFIG

PORTS = Doors(amqp_tls=6771, mqtt_tls=9983, management_tls=16771, distribution=26772)
LIST_PORT = 8110
ACCEPTED = "accepted"
REVOKED = "SSLV3_ALERT_CERTIFICATE_REVOKED"
BAD = "SSLV3_ALERT_BAD_CERTIFICATE"
HASH_DIR = '{crl_cache, {ssl_crl_hash_dir, {internal, [{dir, "/etc/rabbitmq/crl"}]}}}'


class Lists:
    """
    An authority, its list in a folder and on a web server, and valid or revoked clients with or without a distribution
    point.

    Attributes:
        fetched: How often the list was fetched from the web server.
    """

    def __init__(self, place: Path, bench: Certificates) -> None:
        self.place = place
        self.fetched = 0
        self._ca = x509.load_pem_x509_certificate((bench.directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((bench.directory / "ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._ca_file = bench.ca_file
        self._count = 0
        self._revoked: list[CrlEntry] = []
        self._der = b""
        self.publish()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", LIST_PORT), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def file(self) -> str:
        """The file name that Erlang looks for in the folder."""
        return f"{issuer_hash(self._ca)}.r0"

    @property
    def pem(self) -> bytes:
        """Return the current list, PEM."""
        return list_pem(self._der)

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        lists = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                lists.fetched += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(lists._der)))
                self.end_headers()
                self.wfile.write(lists._der)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def publish(self, lifetime: timedelta = timedelta(days=1)) -> None:
        """Sign a new list."""
        self._count += 1
        now = datetime.now(UTC) - timedelta(minutes=1)
        signed = sign_list(
            self._revoked, issuer=self._ca, key=self._key, number=self._count, now=now, lifetime=lifetime
        )
        self._der = signed.der

    def client(self, name: str, *, point: bool = True) -> tuple[Identity, str]:
        """Issue a certificate, with or without a distribution point; return it with its serial number."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)]))
            .issuer_name(self._ca.subject)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        if point:
            url = x509.UniformResourceIdentifier(f"http://127.0.0.1:{LIST_PORT}/ca.crl")
            builder = builder.add_extension(
                x509.CRLDistributionPoints([x509.DistributionPoint([url], None, None, None)]), critical=False
            )
        path = self.place / f"{name}-{serial:x}"
        certificate, private = path.with_suffix(".pem"), path.with_suffix(".key")
        certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Identity(name, certificate, private, self._ca_file), f"{serial:x}"

    def revoke(self, serial: str) -> None:
        """Put a certificate on the list."""
        self._revoked.append(CrlEntry(serial, "keyCompromise", datetime.now(UTC)))
        self.publish()

    def close(self) -> None:
        """Stop the web server."""
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True, slots=True)
class Form:
    """
    A way to configure CRL checks, and its effect.

    Attributes:
        conf: Lines for a file in conf.d.
        options: For ``rabbit.ssl_options`` in ``advanced.config``, instead of the two recommended ones.
        good: The result for a valid certificate.
        revoked: The result for a revoked one.
        listed: Whether the list is in the folder.
        point: Whether the certificates have a distribution point.
    """

    good: str
    revoked: str
    conf: str = ""
    options: str = ""
    listed: bool = True
    point: bool = True


_SOURCES_DIR = "ssl_options.crl_sources.1 = dir\nssl_options.crl_sources.1.path = /etc/rabbitmq/crl\n"
_SOURCES_HTTP = "ssl_options.crl_sources.1 = http\nssl_options.crl_sources.1.timeout = 5000\n"
FORMS = {
    "nothing": Form(ACCEPTED, ACCEPTED),
    "crl_check = peer": Form(BAD, BAD, "ssl_options.crl_check = peer\n"),
    "crl_check = best_effort": Form(ACCEPTED, ACCEPTED, "ssl_options.crl_check = best_effort\n"),
    "crl_sources dir": Form(BAD, BAD, f"ssl_options.crl_check = peer\n{_SOURCES_DIR}"),
    "crl_sources dir, best_effort": Form(ACCEPTED, ACCEPTED, f"ssl_options.crl_check = best_effort\n{_SOURCES_DIR}"),
    "crl_sources without crl_check": Form(ACCEPTED, ACCEPTED, _SOURCES_DIR),
    "crl_sources http": Form(BAD, BAD, f"ssl_options.crl_check = peer\n{_SOURCES_HTTP}"),
    "advanced, hash dir, peer": Form(ACCEPTED, REVOKED, options="{crl_check, peer}, " + HASH_DIR),
    "advanced, hash dir, no distribution point": Form(
        ACCEPTED, REVOKED, options="{crl_check, peer}, " + HASH_DIR, point=False
    ),
    "advanced, hash dir, no list": Form(BAD, BAD, options="{crl_check, peer}, " + HASH_DIR, listed=False),
    "advanced, hash dir, true": Form(ACCEPTED, REVOKED, options="{crl_check, true}, " + HASH_DIR),
    "advanced, hash dir, best_effort": Form(ACCEPTED, REVOKED, options="{crl_check, best_effort}, " + HASH_DIR),
    "advanced, hash dir, best_effort, no list": Form(
        ACCEPTED, ACCEPTED, options="{crl_check, best_effort}, " + HASH_DIR, listed=False
    ),
    "advanced, http": Form(
        BAD, BAD, options="{crl_check, peer}, {crl_cache, {ssl_crl_cache, {internal, [{http, 5000}]}}}"
    ),
    "advanced, http, allowed host": Form(
        ACCEPTED,
        REVOKED,
        options="{crl_check, peer}, {crl_cache, {ssl_crl_cache, {internal, [{http, 5000},"
        f' {{allowed_hosts, ["127.0.0.1:{LIST_PORT}"]}}]}}}}}}',
    ),
}


@pytest.fixture(scope="module")
def lists(workplace: Path, certificates: Certificates) -> Iterator[Lists]:
    """The bench authority and its list."""
    place = workplace / "lists"
    place.mkdir()
    made = Lists(place, certificates)
    yield made
    made.close()


class Node:
    """A node on separate ports that is restarted with each form."""

    def __init__(self, workplace: Path, certificates: Certificates, lists: Lists) -> None:
        self._lists = lists
        state = workplace / "forms"
        state.mkdir()
        ports = workplace / "forms-ports.conf"
        ports.write_text(
            f"listeners.ssl.default = {PORTS.amqp_tls}\nmqtt.listeners.ssl.default = {PORTS.mqtt_tls}\n"
            f"management.ssl.port = {PORTS.management_tls}\n"
        )
        self._broker = Broker(Path(ROOT), state, certificates, "forms", PORTS, [ports])
        self._broker.prepare()
        self._etc = state / "etc"
        (self._etc / "crl").mkdir()
        self._advanced = (self._etc / "advanced.config").read_text()

    def start(self, form: Form) -> None:
        """Restart the node with the files of a form."""
        self._broker.stop()
        (self._etc / "conf.d/99-form.conf").write_text(form.conf)
        text = self._advanced
        if form.options:
            recommended = CRL_CONFIG.read_text()
            text = recommended.replace("{crl_check, peer}", form.options, 1).replace(f"      {HASH_DIR},\n", "", 1)
            assert text != recommended
        (self._etc / "advanced.config").write_text(text)
        self.list(self._lists.pem if form.listed else None)
        self._broker.start()

    def list(self, content: bytes | None) -> None:
        """Put the list into the node's folder, or remove it."""
        file = self._etc / "crl" / self._lists.file
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)

    def forget(self) -> str:
        """Make the node drop the list that it has fetched."""
        return self._broker.control("eval", f'ssl_crl_cache:delete("http://127.0.0.1:{LIST_PORT}/ca.crl").')

    def close(self) -> None:
        """Stop and remove the node."""
        self._broker.close()


@pytest.fixture(scope="module")
def node(workplace: Path, certificates: Certificates, lists: Lists) -> Iterator[Node]:
    """The node, not started yet."""
    made = Node(workplace, certificates, lists)
    yield made
    made.close()


def meets(identity: Identity, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> str:
    """Begin AMQP as a client; return the broker's answer, or the TLS alert."""
    context = identity.context()
    context.minimum_version = context.maximum_version = version
    try:
        with socket.create_connection((HOST, PORTS.amqp_tls), timeout=15) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                tls.sendall(b"AMQP\x00\x00\x09\x01")
                return ACCEPTED if tls.recv(1) == b"\x01" else "closed"
    except OSError as error:
        return cast("str", getattr(error, "reason", None)) or type(error).__name__


@pytest.mark.parametrize("name", FORMS)
def test_what_a_form_does(node: Node, lists: Lists, name: str) -> None:
    """For a valid and a revoked certificate, with TLS 1.2 and 1.3."""
    form = FORMS[name]
    good, _ = lists.client("good", point=form.point)
    revoked, serial = lists.client("revoked", point=form.point)
    lists.revoke(serial)
    node.start(form)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        assert (meets(good, version), meets(revoked, version)) == (form.good, form.revoked)


def test_a_list_that_was_fetched_is_not_fetched_again(node: Node, lists: Lists) -> None:
    """So with HTTP, a certificate that is revoked later still works until the node drops the list."""
    node.start(FORMS["advanced, http, allowed host"])
    client, serial = lists.client("later")
    fetched = lists.fetched
    assert meets(client) == ACCEPTED
    assert lists.fetched == fetched + 1
    lists.revoke(serial)
    assert [meets(client) for _ in range(5)] == [ACCEPTED] * 5
    assert lists.fetched == fetched + 1
    node.forget()
    assert meets(client) == REVOKED
