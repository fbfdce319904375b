"""Which URLs of clients the service calls: listed hosts at public addresses.

No message contains more of a URL than its host, because the rest may be a credential.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from service.settings import HOST

MAX_URL = 4096
# IPv6 addresses that stand for IPv4 ones: RFC 6052. Those of RFC 3056 and 4380 Python knows.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class DestinationRefusedError(ValueError):
    """The URL is not one that requests are made to; the message says why."""


class ExchangeFailedError(Exception):
    """The host did not answer, or not as it should; the message says why."""


class Policy(NamedTuple):
    """Where requests may go.

    `hosts`: `name`, `*.suffix` for the names below it, each with `:port` if it is not the usual
    one. `http`: also without TLS. `private`: also to addresses that are not public.
    """

    hosts: tuple[str, ...] = ()
    http: bool = False
    private: bool = False


class Destination(NamedTuple):
    """A URL that the policy allows."""

    secure: bool
    host: str
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        usual = 443 if self.secure else 80
        return self.host if self.port == usual else f"{self.host}:{self.port}"


def check_url(url: str, policy: Policy) -> Destination:
    """What a URL leads to, by its text alone.

    Raises:
        DestinationRefusedError: not to where the policy allows.
    """
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise DestinationRefusedError(
            f"A URL has at most {MAX_URL} printable ASCII characters and no spaces."
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise DestinationRefusedError("This is not a URL.") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and policy.http):
        raise DestinationRefusedError("The URL must begin with https://.")
    if parts.username is not None or parts.password is not None:
        raise DestinationRefusedError("The URL must not hold a user name or a password.")
    if ":" in host:
        host = f"[{host}]"
    if "\\" in url or not HOST.fullmatch(host) or ".." in host:
        raise DestinationRefusedError("The URL has no host that can be used.")
    secure = parts.scheme == "https"
    usual = 443 if secure else 80
    destination = Destination(
        secure=secure,
        host=host,
        port=port or usual,
        target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
    )
    if not any(_allows(entry, destination) for entry in policy.hosts):
        raise DestinationRefusedError(
            f"The host {destination.authority} is not on this service's list."
        )
    return destination


def _allows(entry: str, destination: Destination) -> bool:
    if entry.startswith("*."):
        return destination.authority.endswith(entry[1:])
    return destination.authority == entry


def find_addresses(host: str, port: int, policy: Policy) -> list[str]:
    """Returns the addresses of a host, all of which the policy allows. The function blocks.

    Raises:
        DestinationRefusedError: one of the addresses is not public.
        ExchangeFailedError: the host has no address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ExchangeFailedError(f"The host {host} cannot be found.") from None
    addresses = [str(item[4][0]) for item in found]
    if not policy.private and not all(map(is_public, addresses)):
        raise DestinationRefusedError(f"The host {host} is not on the public internet.")
    return addresses


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also where it holds another in itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.ipv4_mapped or found.sixtofour or found.teredo:
            return False  # nobody's server is reached so; a way around the check is
    return found.is_global and not found.is_multicast and not found.is_reserved
