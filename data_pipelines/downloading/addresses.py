"""Which addresses a table of URLs may make this machine connect to: those of the public internet alone."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address (RFC 6052)
# Public by their numbers, but answered within the data centre: of the IETF (RFC 6890; one is Oracle's), and Azure's.
WITHIN = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))


class PrivateAddress(OSError):
    """Nothing was sent: the address is one of this machine or of a private network."""

    def __init__(self) -> None:  # alike for all addresses of a name: aiohttp then raises the first
        super().__init__(errno.EACCES, "the address is of this machine or of a private network")


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is one of the public internet, and so is the IPv4 address within it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        special = found.is_multicast or found.is_reserved or any(found in network for network in WITHIN)
        return found.is_global and not special
    inner = found.ipv4_mapped or found.sixtofour
    if found in NAT64:
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(str(inner))
    return found in GLOBAL_UNICAST and found.is_global


def public_socket(address: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
    """What aiohttp connects with, to what a name was resolved to. Raises PrivateAddress."""
    family, kind, protocol, _, place = address
    if not is_public(place[0]):
        raise PrivateAddress
    return socket.socket(family, kind, protocol)
