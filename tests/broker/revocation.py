"""A node that checks CRLs, the authority that it trusts, and TLS clients that resume sessions."""

from __future__ import annotations

import shutil
import socket
import ssl
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from authbackend.pki.ca import AuthorityFolder

from .identities import Certificates, Identity, with_serial
from .mqtt import HOST
from .node import RABBITMQ_FILES, REPOSITORY, Broker, Doors
from .processes import Process
from .service import Service

HERE = Path(__file__).parent
CRL_CONFIG = RABBITMQ_FILES / "conf.d-optional/crl.advanced.config"
CRL_CONF = HERE / "overlay/crl.conf"
DOORS = Doors(amqp_tls=5871, mqtt_tls=9083, management_tls=15871, web_mqtt_tls=15677, distribution=25674)
PASSPHRASE = "correct horse battery"
VERSIONS = {"TLS 1.2": ssl.TLSVersion.TLSv1_2, "TLS 1.3": ssl.TLSVersion.TLSv1_3}


@dataclass(slots=True)
class Directory:
    """A folder with the certificate files that a node needs, like that of :class:`Certificates`."""

    directory: Path


class Revocable:
    """
    An authority of ``authbackend ca``, the node that trusts it, the replica that signs its list, and ``crl sync``.

    Args:
        replica: Not started; it gets the authority, and serves the list.
        name: Name of the authority, and of the node before the @.
    """

    def __init__(self, workplace: Path, root: Path, bench: Certificates, replica: Service, name: str = "fleet") -> None:
        self.name = name
        self.place = workplace / f"revocable-{name}"
        self.place.mkdir()
        self.replica = replica
        self.secret = self.place / "passphrase"
        self.secret.write_text(PASSPHRASE + "\n")
        self.ca = self.place / name
        self._count = 0
        self._sync: Process | None = None
        of_root = self.place / "root-passphrase"
        of_root.write_text("staple in a vault\n")
        self.sign("ca", "init", self.ca, "--root-out", self.place / "offline", "--root-passphrase-file", of_root)
        self.authority = AuthorityFolder.open(self.ca, PASSPHRASE.encode())
        self.node = self._node(workplace / f"node-{name}", root, bench)

    def _node(self, state: Path, root: Path, bench: Certificates) -> Broker:
        certs = self.place / "certs"
        shutil.copytree(bench.directory, certs)
        shutil.copy(self.ca / "ca.pem", certs / "ca.pem")
        for name in ("rabbitmq.pem", "rabbitmq.key"):
            (certs / name).unlink()
        self.sign("ca", "issue-server", self.ca, "--name", "localhost", "--name", HOST, "--out", certs / "rabbitmq")
        advanced = self.place / "advanced.config"
        advanced.write_text(CRL_CONFIG.read_text().replace("{port, 15676}", f"{{port, {DOORS.web_mqtt_tls}}}"))
        state.mkdir()
        node = Broker(root, state, cast("Certificates", Directory(certs)), self.name, DOORS, [CRL_CONF], advanced)
        node.plugins = ["rabbitmq_web_mqtt"]
        node.prepare()
        return node

    @property
    def node_name(self) -> str:
        """RabbitMQ's name for the node."""
        return f"{self.name}@localhost"

    @property
    def lists(self) -> Path:
        """The directory that the node has as /etc/rabbitmq/crl."""
        return self.node.state / "etc/crl"

    @property
    def file(self) -> Path:
        """The only list in that directory."""
        (file,) = self.lists.glob("*.r0")
        return file

    def sign(self, *arguments: str | Path) -> str:
        """Run a command that needs the authority's passphrase."""
        return self.replica.command(*arguments, "--passphrase-file", self.secret)

    def start(self) -> None:
        """Publish a first list, copy it to the node's folder, and start replica, sync and node."""
        self.sign("crl", "sign", self.ca)
        self.replica.start()
        self.replica.command(*self._sync_command(), "--once")
        self.start_sync()
        self.node.start()

    def _sync_command(self) -> list[str | Path]:
        url = f"{self.replica.url}/crl/{self.name}.crl"
        return ["crl", "sync", "--url", url, "--ca", self.ca / "ca.pem", "--dir", self.lists]

    def start_sync(self, reports_to: str | None = None) -> Process:
        """
        Start ``crl sync``.

        Args:
            reports_to: The database, with the role that reports for the node; None: do not report.
        """
        command = [sys.executable, "-m", "authbackend", *self._sync_command()]
        environment = {"PATH": "/usr/bin:/bin"}
        if reports_to is not None:
            command += ["--node", self.node_name]
            environment["AUTHBACKEND_DATABASE__DSN"] = reports_to
        self._sync = Process(command, self.place / "sync.log", environment, REPOSITORY)
        return self._sync

    def stop_sync(self) -> None:
        """Stop ``crl sync``: the list stays as it is."""
        if self._sync is not None:
            self._sync.stop()
            self._sync = None

    def close(self) -> None:
        """Stop everything."""
        self.stop_sync()
        self.replica.stop()
        self.node.close()

    def enroll(self, device_id: str) -> Identity:
        """Enroll a registered device and return its certificate with the key."""
        self._count += 1
        path = self.place / f"device-{self._count}"
        self.sign("device", "enroll", device_id, "--ca", self.ca, "--generate", "--out", path)
        return Identity(device_id, path.with_suffix(".pem"), path.with_suffix(".key"), self.ca / "ca.pem")

    def certificate(self, name: str, *, serial: int | None = None, point: str | None = None) -> Identity:
        """Issue a certificate that is not on record, with any serial number and optionally a CRL distribution point."""
        self._count += 1
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(minutes=5))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        if point is not None:
            where = x509.DistributionPoint([x509.UniformResourceIdentifier(point)], None, None, None)
            builder = builder.add_extension(x509.CRLDistributionPoints([where]), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        path = self.place / f"device-{self._count}"
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        if serial is not None:
            pem = with_serial(certificate, serial, self.key)
        path.with_suffix(".pem").write_bytes(pem + self.authority.certificate_pem)
        path.with_suffix(".key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Identity(name, path.with_suffix(".pem"), path.with_suffix(".key"), self.ca / "ca.pem")

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """Return the key of the authority."""
        key = self.authority._key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


@dataclass(slots=True)
class Tls:
    """
    A client with one TLS version that tries to resume the session of its last connection.

    Attributes:
        reused: Whether the last connection resumed a session.
    """

    identity: Identity
    version: str = "TLS 1.3"
    port: int = DOORS.mqtt_tls
    reused: bool = False
    context: ssl.SSLContext = field(init=False)
    session: ssl.SSLSession | None = None

    def __post_init__(self) -> None:
        self.context = self.identity.context()
        self.context.minimum_version = self.context.maximum_version = VERSIONS[self.version]

    def login(self) -> str:
        """
        Connect and log in over MQTT; return "accepted", or the TLS alert or other end of the connection.

        With TLS 1.3, a client learns only when it reads that its certificate was refused.
        """
        name = self.identity.name.encode()
        body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(name).to_bytes(2, "big") + name
        try:
            with socket.create_connection((HOST, self.port), timeout=10) as plain:
                with self.context.wrap_socket(plain, server_hostname="localhost", session=self.session) as tls:
                    self.reused = bool(tls.session_reused)
                    tls.sendall(b"\x10" + bytes([len(body)]) + body)
                    answer = tls.recv(4)
                    self.session = tls.session
        except OSError as error:
            return getattr(error, "reason", None) or type(error).__name__
        return "accepted" if answer == b"\x20\x02\x00\x00" else f"refused by MQTT: {answer.hex()}"

    def handshake(self) -> str:
        """Do only the TLS handshake; return the alert, or "accepted" if the listener waits for data."""
        try:
            with socket.create_connection((HOST, self.port), timeout=10) as plain:
                with self.context.wrap_socket(plain, server_hostname="localhost") as tls:
                    tls.settimeout(1)
                    return "accepted" if tls.recv(1) else "closed"
        except TimeoutError:
            return "accepted"
        except OSError as error:
            return getattr(error, "reason", None) or type(error).__name__

    def seconds_until(self, refused: str, begin: float) -> float:
        """Log in repeatedly until this alert comes; return the seconds since ``begin`` (monotonic)."""
        while time.monotonic() < begin + 20:
            answer = self.login()
            if answer == refused:
                return time.monotonic() - begin
            assert answer == "accepted", answer
        raise AssertionError("not refused within 20 s")
