"""
A small certificate authority in a folder: a root, whose key goes offline, and an intermediate, which signs.

::

    DIR/authority.toml      its name and profiles
    DIR/root.pem            the root's certificate
    DIR/intermediate.pem    the intermediate's certificate
    DIR/intermediate.key    its key, encrypted, mode 600
    DIR/ca.pem              both certificates: the trusted authorities of both the broker and the devices
    ROOT/NAME-root.key      the root's key, encrypted with a different passphrase, mode 600; needed again only to renew
                            the intermediate
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from authbackend.pki import signing
from authbackend.pki.crl import CrlEntry, RevocationList, is_signed_by, sign_list
from authbackend.pki.files import write_file
from authbackend.pki.parsing import (
    KEY_KINDS,
    PKIError,
    PrivateKey,
    PublicKey,
    Record,
    is_authority,
    new_key,
    read_certificate,
    read_key,
    record_of,
    server_name,
)
from authbackend.pki.profiles import EXAMPLE, Profile, read_configuration
from authbackend.policy.names import common_name_fault

ROOT_LIFETIME = timedelta(days=20 * 365)
INTERMEDIATE_LIFETIME = timedelta(days=5 * 365)
AUTHORITY_FILES = ("authority.toml", "root.pem", "intermediate.pem", "intermediate.key")
"""The files that :meth:`AuthorityFolder.open` reads."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,48}")


@dataclass(frozen=True, slots=True)
class Signed:
    """
    A newly signed certificate.

    Attributes:
        chain_pem: The certificate followed by the intermediate's, PEM: what its holder presents.
        shortened: Whether it ends earlier than its profile says, because the authority ends first.
    """

    record: Record
    certificate_pem: bytes
    chain_pem: bytes
    shortened: bool


def create_authority(
    folder: Path,
    name: str,
    passphrase: bytes,
    root_passphrase: bytes,
    *,
    root_folder: Path,
    key_kind: str = KEY_KINDS[0],
) -> Path:
    """
    Create a root and an intermediate and return the path of the root's key, which should be taken offline.

    There is no database to ask, so the validity follows this machine's clock; see :meth:`AuthorityFolder.sign`.

    Args:
        folder: Absent or empty.
        passphrase: For the intermediate's key, which is used every day to issue certificates.
        root_passphrase: For the root's key; a different one, so that learning the first does not give away the root.
        root_folder: Where to write the root's key; preferably a removable medium.
    Raises:
        PKIError: The name or a passphrase is invalid, or a file already exists; nothing was written.
        OSError: A file cannot be written.
    """
    root_file = root_folder / f"{name}-root.key"
    _check_new(folder, name, root_file)
    if root_passphrase == passphrase:
        raise PKIError(
            "the root's key and the intermediate's have the same passphrase: whoever learns the one that is used every day "
            "must not be able to open the root's key; choose a different one for the root"
        )
    root_key, key = new_key(key_kind), new_key(key_kind)
    root_name, subject = signing.subject_of([f"{name} root"]), signing.subject_of([f"{name} intermediate"])
    root_pem, intermediate_pem = signing.key_pem(root_key, root_passphrase), signing.key_pem(key, passphrase)
    valid = signing.validity(None, None, ROOT_LIFETIME)
    root = signing.sign_authority(
        root_name, root_key.public_key(), issuer=root_name, key=root_key, valid=valid, path_length=1
    )
    valid = signing.validity(None, None, INTERMEDIATE_LIFETIME)
    intermediate = _sign_intermediate(subject, key.public_key(), root, root_key, valid)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    root_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(root_file, root_pem, 0o600)
    write_file(folder / "root.pem", signing.certificate_pem(root), 0o644)
    write_file(folder / "intermediate.key", intermediate_pem, 0o600)
    _write_intermediate(folder, root, intermediate)
    text = EXAMPLE.format(name=name, kinds=", ".join(KEY_KINDS))
    write_file(folder / "authority.toml", text.encode(), 0o644)
    return root_file


def _check_new(folder: Path, name: str, root_file: Path) -> None:
    if not _NAME.fullmatch(name):
        raise PKIError(f"the authority's name {name!r} must be 1 to 48 letters, digits, '_' and '-'")
    if folder.exists() and any(path.name != root_file.parent.name for path in folder.iterdir()):
        raise PKIError(f"{folder} is not empty: an authority is never overwritten")
    if root_file.exists():
        raise PKIError(f"{root_file} already exists: an authority is never overwritten")


def _sign_intermediate(
    subject: x509.Name,
    key: PublicKey,
    root: x509.Certificate,
    root_key: PrivateKey,
    valid: tuple[datetime, datetime],
) -> x509.Certificate:
    valid = (valid[0], min(valid[1], root.not_valid_after_utc))
    return signing.sign_authority(subject, key, issuer=root.subject, key=root_key, valid=valid, path_length=0)


def _write_intermediate(folder: Path, root: x509.Certificate, intermediate: x509.Certificate) -> None:
    pem = signing.certificate_pem(intermediate)
    write_file(folder / "intermediate.pem", pem, 0o644)
    write_file(folder / "ca.pem", pem + signing.certificate_pem(root), 0o644)


class AuthorityFolder:
    """An authority with its key loaded, ready to sign. Create one with :meth:`open`."""

    def __init__(
        self,
        name: str,
        profiles: dict[str, Profile],
        certificates: tuple[x509.Certificate, x509.Certificate],
        key: PrivateKey,
    ) -> None:
        self.name = name
        self.profiles = profiles
        self.certificate, self.root = certificates
        self._key = key
        self._pem = signing.certificate_pem(self.certificate)

    @classmethod
    def open(cls, folder: Path, passphrase: bytes) -> AuthorityFolder:
        """
        Load an authority.

        Raises:
            PKIError: Something is missing, the passphrase is wrong, or the files do not belong together.
        """
        name, profiles = read_configuration(folder / "authority.toml")
        if not _NAME.fullmatch(name):
            raise PKIError(f"{folder}/authority.toml: name must be 1 to 48 letters, digits, '_' and '-'")
        root = _read(folder / "root.pem")
        certificate = _read(folder / "intermediate.pem")
        try:
            key = read_key(_bytes(folder / "intermediate.key"), passphrase)
        except PKIError as error:
            raise PKIError(f"{folder / 'intermediate.key'}: {error.detail}") from error
        if key.public_key() != certificate.public_key():
            raise PKIError(f"{folder}: intermediate.key is not the key of intermediate.pem")
        if not is_authority(certificate) or not _signed_by(certificate, root):
            raise PKIError(f"{folder}: intermediate.pem is not an authority signed by root.pem")
        return cls(name, profiles, (certificate, root), key)

    @property
    def certificate_pem(self) -> bytes:
        """The intermediate's certificate, PEM."""
        return self._pem

    @property
    def subject(self) -> str:
        """Its subject, which is the issuer of what it signs; RFC 4514."""
        return self.certificate.subject.rfc4514_string()

    @property
    def not_after(self) -> datetime:
        """When the intermediate's certificate ends; nothing it signed lasts longer."""
        return self.certificate.not_valid_after_utc

    def profile(self, name: str, purpose: str) -> Profile:
        """
        Return a profile by name.

        Raises:
            PKIError: There is no such profile for that purpose.
        """
        profile = self.profiles.get(name)
        if profile is None or profile.purpose != purpose:
            names = ", ".join(sorted(name for name, each in self.profiles.items() if each.purpose == purpose))
            raise PKIError(f"authority {self.name} has no profile {name!r} for a {purpose}; use one of {names}")
        return profile

    def has_signed(self, certificate: x509.Certificate) -> bool:
        """Return whether this authority signed the certificate."""
        return _signed_by(certificate, self.certificate)

    def has_signed_list(self, der: bytes) -> bool:
        """Return whether this authority's key signed a revocation list."""
        key = self.certificate.public_key()
        return isinstance(key, PublicKey) and is_signed_by(der, key)

    def sign(
        self, common_name: str, key: PublicKey, profile: Profile, names: Sequence[str] = (), *, now: datetime
    ) -> Signed:
        """
        Sign a certificate.

        Args:
            names: Subject alternative names: a server's host names and IP addresses, or a client's DNS names unchanged.
            now: The database's time if the certificate goes on record: with a wrong clock, this machine would issue
                certificates that are not valid yet or have already expired.
        Raises:
            PKIError: RabbitMQ could mistake the common name for another, it is too long, or the authority is not valid.
        """
        fault = common_name_fault(common_name)
        if fault is None and len(common_name) > signing.LONGEST_COMMON_NAME:
            fault = f"a common name in a certificate has at most {signing.LONGEST_COMMON_NAME} characters (RFC 5280)"
        if fault is not None:
            raise PKIError(f"common name {common_name!r}: {fault}")
        if self.not_after <= now:
            raise PKIError(f"authority {self.name} expired on {self.not_after:%Y-%m-%d}; see: authbackend ca renew")
        begins = max(self.certificate.not_valid_before_utc, self.root.not_valid_before_utc)
        if begins > now:
            raise PKIError(
                f"authority {self.name} is not valid before {begins:%Y-%m-%d %H:%M} UTC: the clock was wrong when it was "
                "created, or is wrong now; nobody would accept what it signs"
            )
        begin = now - signing.CLOCK_SKEW
        end = begin + profile.lifetime
        certificate = signing.sign_leaf(
            signing.subject_of([common_name]),
            key,
            issuer=self.certificate.subject,
            key=self._key,
            valid=(begin, min(end, self.not_after)),
            usage=profile.usage,
            alternative=[server_name(name) if profile.purpose == "server" else x509.DNSName(name) for name in names],
        )
        pem = signing.certificate_pem(certificate)
        return Signed(record_of(certificate), pem, pem + self._pem, end > self.not_after)

    def sign_list(self, entries: Sequence[CrlEntry], number: int, now: datetime, lifetime: timedelta) -> RevocationList:
        """Sign a revocation list with these entries, which must be all of this authority's revocations."""
        return sign_list(entries, issuer=self.certificate, key=self._key, number=number, now=now, lifetime=lifetime)


def renew_intermediate(folder: Path, root_key_file: Path, root_passphrase: bytes) -> datetime:
    """
    Issue the intermediate a new certificate with the same name and key, and return when it ends.

    Only the end of validity changes, so everything it signed stays valid. It begins when the old one did: renewal runs
    where the root's key is, without the database, and a fast clock there must not make it begin in the future.

    Raises:
        PKIError: A file is missing or belongs to another authority, or the new certificate would not end later.
        OSError: A file cannot be written.
    """
    root, current = _read(folder / "root.pem"), _read(folder / "intermediate.pem")
    try:
        root_key = read_key(_bytes(root_key_file), root_passphrase)
    except PKIError as error:
        raise PKIError(f"{root_key_file}: {error.detail}") from error
    if root_key.public_key() != root.public_key():
        raise PKIError(f"{root_key_file} is not the key of {folder / 'root.pem'}")
    key = current.public_key()
    if not isinstance(key, PublicKey):
        raise PKIError(f"{folder / 'intermediate.pem'} has a key that is neither EC nor RSA")
    if root.not_valid_after_utc <= datetime.now(UTC):
        raise PKIError(f"the root expired on {root.not_valid_after_utc:%Y-%m-%d}: create a new authority")
    valid = (current.not_valid_before_utc, datetime.now(UTC) + INTERMEDIATE_LIFETIME)
    renewed = _sign_intermediate(current.subject, key, root, root_key, valid)
    if renewed.not_valid_after_utc <= current.not_valid_after_utc:
        raise PKIError(
            f"the intermediate would end on {renewed.not_valid_after_utc:%Y-%m-%d}, no later than now "
            f"({current.not_valid_after_utc:%Y-%m-%d}): the root ends then, or the clock of this machine is behind"
        )
    _write_intermediate(folder, root, renewed)
    return renewed.not_valid_after_utc


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PKIError(f"{path}: {error.strerror}") from error


def _read(path: Path) -> x509.Certificate:
    try:
        return read_certificate(_bytes(path))
    except PKIError as error:
        raise PKIError(error.detail if str(path) in error.detail else f"{path}: {error.detail}") from error
