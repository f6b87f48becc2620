"""Certificate profiles: purpose, lifetime and kind of key; built in, or set in an authority's ``authority.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from authbackend.pki.parsing import KEY_KINDS, PKIError

Purpose = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class Profile:
    """
    How one kind of certificate is signed.

    Attributes:
        purpose: Whether its holder connects (client) or accepts connections (server); never both.
        key: The kind of key generated here; a request may use any that is strong enough.
    """

    name: str
    purpose: Purpose
    lifetime: timedelta
    key: str

    @property
    def usage(self) -> x509.ObjectIdentifier:
        """The extended key usage for the purpose."""
        return ExtendedKeyUsageOID.CLIENT_AUTH if self.purpose == "client" else ExtendedKeyUsageOID.SERVER_AUTH


BUILT_IN = {
    profile.name: profile
    for profile in (
        Profile("device", "client", timedelta(days=398), "ec-p256"),
        Profile("device-rsa", "client", timedelta(days=398), "rsa-2048"),
        Profile("service", "client", timedelta(days=398), "ec-p256"),
        Profile("server", "server", timedelta(days=398), "ec-p256"),
    )
}
"""device, device-rsa (for devices without EC support), service (accounts), server."""

EXAMPLE = """\
# An authority of authbackend. Its revocation list is named after it: /crl/NAME.crl.
name = "{name}"

# To change built-in profiles or add others:
# [profiles.device]
# lifetime_days = 90
# [profiles.old-device]
# purpose = "client"
# lifetime_days = 365
# key = "rsa-2048"           # {kinds}
"""


def read_configuration(path: Path) -> tuple[str, dict[str, Profile]]:
    """
    Return an authority's name and profiles.

    Raises:
        PKIError: The file is missing, is not TOML, or contains an invalid value.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PKIError(f"{path}: {error.strerror}; create an authority with: authbackend ca init DIR") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PKIError(f"{path} is not TOML: {error}") from None
    if unknown := sorted(set(tree) - {"name", "profiles"}):
        raise PKIError(f"{path}: unknown: {', '.join(unknown)}; use only name and profiles")
    profiles = dict(BUILT_IN)
    changes = tree.get("profiles", {})
    if not isinstance(changes, dict) or not all(isinstance(values, dict) for values in changes.values()):
        raise PKIError(f"{path}: write profiles as [profiles.NAME]")
    for name, values in changes.items():
        profiles[name] = _profile(path, name, values)
    return str(tree.get("name", "")), profiles


def _profile(path: Path, name: str, values: dict[str, Any]) -> Profile:
    where = f"{path}: profile {name}"
    if unknown := sorted(set(values) - {"purpose", "lifetime_days", "key"}):
        raise PKIError(f"{where}: unknown: {', '.join(unknown)}; use only purpose, lifetime_days and key")
    base = BUILT_IN.get(name, Profile(name, "client", timedelta(days=398), "ec-p256"))
    purpose, key = values.get("purpose", base.purpose), values.get("key", base.key)
    days = values.get("lifetime_days", base.lifetime.days)
    if purpose not in {"client", "server"}:
        raise PKIError(f"{where}: purpose must be client or server")
    if key not in KEY_KINDS:
        raise PKIError(f"{where}: key must be one of {', '.join(KEY_KINDS)}")
    if isinstance(days, bool) or not isinstance(days, int | float) or not 0 < days <= 36500:
        raise PKIError(f"{where}: lifetime_days must be more than 0 and at most 36500")
    return replace(base, purpose=purpose, key=key, lifetime=timedelta(days=days))
