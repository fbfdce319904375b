"""HTTP requests to where a client says: only to listed hosts, and never into our own network.

The address that was checked is the one that is connected to, so that a name which resolves to
another one a moment later gains nothing. Redirects are not followed, proxies of the environment
not used, and no message of ours holds more of a URL than its host: the rest may be a credential.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

MAX_URL = 4096
_USER_AGENT = "timesformer-service"
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?|\[[0-9a-f:.]+\]")
_ENTRY = re.compile(rf"(\*\.)?({_HOST.pattern})(:[0-9]{{1,5}})?")
# IPv6 addresses that stand for IPv4 ones: RFC 6052. Those of RFC 3056 and 4380 Python knows.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class DestinationRefusedError(ValueError):
    """The URL is not one that requests are made to; the message says why."""


class ExchangeFailedError(Exception):
    """The other side did not answer as it should; the message says how."""


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


def parse_hosts(text: str) -> tuple[str, ...]:
    """The entries of a list of hosts, as settings have it: with commas between.

    Raises:
        ValueError: one is none.
    """
    entries = tuple(entry.strip().lower() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if not _ENTRY.fullmatch(entry):
            raise ValueError(f"{entry!r} is no host; write name, *.suffix or name:port")
    return entries


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
    if "\\" in url or not _HOST.fullmatch(host) or ".." in host:
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


def find_address(destination: Destination, policy: Policy) -> str:
    """Resolves the host, in a thread; every address must be allowed, the first is taken.

    Raises:
        DestinationRefusedError: one is not public.
        ExchangeFailedError: there is none.
    """
    try:
        found = socket.getaddrinfo(
            destination.host.strip("[]"), destination.port, type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise ExchangeFailedError(f"The host {destination.host} cannot be found.") from None
    addresses = [str(item[4][0]) for item in found]
    if not policy.private and not all(map(is_public, addresses)):
        raise DestinationRefusedError(f"The host {destination.host} is not on the public internet.")
    return addresses[0]


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


class Exchange:
    """One request and its answer; `begin` and `read` block, so they are for threads.

    Args:
        timeout_s: longest silence of the other side.

    Raises:
        DestinationRefusedError: as `check_url`.
    """

    def __init__(self, url: str, policy: Policy, timeout_s: float) -> None:
        self.destination = check_url(url, policy)
        self._policy = policy
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._left: int | None = None
        self._lock = threading.Lock()  # over the two below
        self._working = False
        self._over = False

    def begin(
        self, method: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """Sends the request and reads the head of the answer.

        Raises:
            DestinationRefusedError: as `find_address`.
            ExchangeFailedError: there is no answer.
        """
        where = self.destination
        address = find_address(where, self._policy)
        with self._work():
            self._connection = _Connection(where, address, self._timeout_s)
            usual = {
                "Host": where.authority,
                "User-Agent": _USER_AGENT,
                "Accept-Encoding": "identity",
            }
            self._connection.request(method, where.target, body, {**usual, **(headers or {})})
            self._response = self._connection.getresponse()
            self._left = self._response.length
        return self._response

    def read(self, most: int) -> bytes:
        """The next bytes of the answer, as they come; none at its end.

        Raises:
            ExchangeFailedError: it broke off.
        """
        with self._work():
            if self._response is None or self._left == 0:
                return b""
            data = self._response.read1(most if self._left is None else min(most, self._left))
            if self._left is not None:
                if not data:
                    raise ConnectionError("the answer is shorter than its length")
                self._left -= len(data)
            return data

    def end(self) -> None:
        """Closes the connection; a thread that waits for the other side wakes up."""
        with self._lock:
            self._over = True
            if not self._working:
                self._close()
            elif self._connection is not None:
                self._connection.wake()

    @contextlib.contextmanager
    def _work(self) -> Iterator[None]:
        with self._lock:
            if self._over:
                raise ExchangeFailedError("It was given up.")
            self._working = True
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ExchangeFailedError(
                f"The host {self.destination.host} cannot be read from: {self._why(error)}."
            ) from None
        finally:
            with self._lock:
                self._working = False
                if self._over:
                    self._close()

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"silent for {self._timeout_s:g} s"
        if isinstance(error, ssl.SSLError):
            return "TLS fails"
        return "the connection fails" if isinstance(error, OSError) else "it does not speak HTTP"

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.close()


class _Connection(http.client.HTTPConnection):
    """To an address that was checked, with the name that it was found by in the TLS handshake."""

    def __init__(self, destination: Destination, address: str, timeout_s: float) -> None:
        super().__init__(destination.host, destination.port, timeout=timeout_s)
        self._destination = destination
        self._address = address
        self._wire: socket.socket | None = None

    def connect(self) -> None:
        where = self._destination
        self.sock = socket.create_connection((self._address, where.port), self.timeout)
        if where.secure:
            context = ssl.create_default_context()
            try:
                self.sock = context.wrap_socket(self.sock, server_hostname=where.host.strip("[]"))
            except BaseException:
                self.sock.close()
                raise
        self._wire = self.sock

    def wake(self) -> None:
        if self._wire is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._wire, socket.SHUT_RDWR)
