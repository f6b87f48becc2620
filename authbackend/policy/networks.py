"""Allowed client networks in CIDR form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks that an identity may connect from; None in its place means any address."""

    networks: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Networks:
        """
        Parse networks in CIDR form.

        Raises:
            ValueError: A text is not a network.
        """
        return cls(tuple(_normal_network(ip_network(text)) for text in texts))

    def __contains__(self, address: str) -> bool:
        try:
            parsed = _normal_address(ip_address(address))
        except ValueError:  # RabbitMQ sends "unknown" when the management API publishes
            return False
        return any(parsed in network for network in self.networks if network.version == parsed.version)


def _normal_address(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Convert an IPv4-mapped IPv6 address, which a dual-stack listener reports, to the IPv4 address."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _normal_network(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network
