"""HTTP requests to URLs of clients, by the policy of `service/ingest/url_policy.py`.

A connection goes to an address that was checked, so that a name which resolves to another address
a moment later gains nothing. Redirects are not followed, proxies and credentials of the environment
are not used, and each request has a connection of its own.

The module uses httpcore2, the connections of httpx2, and not httpx2 itself: a network backend of
one's own is public API of httpcore2 alone, and httpx2 costs more at start (240 against 60 ms,
2.2 against 1.0 MB) for redirects, cookies and decoding, which must not happen here. TLS is anyio's,
over the backend of httpcore2: the TLS of uvloop discards the rest of a body if the host closes the
connection while reading is paused. A MiB read by TLS costs 8 to 10 ms of CPU (12 to 14 with
http.client in threads), a MiB without TLS 3.3 ms (1.5), both on two busy cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import anyio
import httpcore2

from service.ingest.url_policy import (
    Destination,
    ExchangeFailedError,
    Policy,
    check_url,
    find_addresses,
)

_USER_AGENT = "timesformer-service"
_BLOCKS_AT_ONCE = 64
# At DEBUG the library logs headers of responses; a Location may hold credentials.
logging.getLogger("httpcore2").setLevel(logging.INFO)


class Reply:
    """The head of a response, and its body as it arrives."""

    def __init__(self, host: str, response: httpcore2.Response) -> None:
        self.host = host
        self.status = response.status
        self._response = response
        self._headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in response.headers
        }

    def header(self, name: str, default: str = "") -> str:
        """Returns a header's value; the name is in lower case."""
        return self._headers.get(name, default)

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yields the body in blocks of at most 64 KiB."""
        count = 0
        async for block in self._response.aiter_stream():
            yield block
            count += 1
            if count % _BLOCKS_AT_ONCE == 0:  # a host may send thousands of tiny chunks at once
                await asyncio.sleep(0)


class HttpClient:
    """Makes requests to the hosts that a policy allows.

    Args:
        silence_s: limit on the time without a byte from the host.
        resolvers: threads that resolve names. They are the client's own, so that a name server
            that does not answer delays nothing but other requests of this client.
    """

    def __init__(self, policy: Policy, silence_s: float, resolvers: int) -> None:
        self.policy = policy
        self._silence_s = silence_s
        self._resolvers = ThreadPoolExecutor(resolvers, thread_name_prefix="resolver")
        self._tls = ssl.create_default_context() if policy.hosts else None

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> AsyncIterator[Reply]:
        """Sends a request and yields the reply; the connection is closed when the block ends.

        Raises:
            DestinationRefusedError: the policy does not allow the URL or an address of its host.
            ExchangeFailedError: there is no reply, or the reply breaks off, also in the block.
        """
        where = check_url(url, self.policy)
        usual = {
            "Host": where.authority,
            "User-Agent": _USER_AGENT,
            "Accept-Encoding": "identity",
        }
        limits = dict.fromkeys(("connect", "read", "write"), self._silence_s)
        backend = _GuardedBackend(self.policy, self._resolvers)
        origin = _url_of(where).origin
        try:
            async with (
                httpcore2.AsyncHTTPConnection(
                    origin, self._tls, network_backend=backend
                ) as connection,
                connection.stream(
                    method,
                    _url_of(where),
                    headers=[*{**usual, **(headers or {})}.items()],
                    content=body or None,
                    extensions={"timeout": limits},
                ) as response,
            ):
                yield Reply(where.host, response)
        except (
            httpcore2.TimeoutException,
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            ssl.SSLError,
        ) as error:
            raise ExchangeFailedError(
                f"The host {where.host} cannot be read from: {self._reason(error)}."
            ) from None
        finally:
            await backend.close()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, httpcore2.TimeoutException):
            return f"silent for {self._silence_s:g} s"
        if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
            return "TLS fails"
        if isinstance(error, httpcore2.ProtocolError):
            return "it does not speak HTTP"
        return "the connection fails"

    def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)


def _url_of(where: Destination) -> httpcore2.URL:
    return httpcore2.URL(
        scheme=b"https" if where.secure else b"http",
        host=where.host.strip("[]").encode(),
        port=where.port,
        target=where.target.encode(),
    )


class _GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Connects one request to an address that the policy allows."""

    def __init__(self, policy: Policy, resolvers: Executor) -> None:
        self._policy = policy
        self._resolvers = resolvers
        self._stream: httpcore2.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the interface of the library
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        resolving = self._resolvers.submit(find_addresses, host, port, self._policy)
        try:
            async with asyncio.timeout(timeout):
                addresses = await asyncio.wrap_future(resolving)
        except TimeoutError:
            raise httpcore2.ConnectTimeout from None
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return await self._connect(address, port, timeout)
        return await self._connect(addresses[-1], port, timeout)

    async def _connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        self._stream = await httpcore2.AnyIOBackend().connect_tcp(address, port, timeout_s)
        return self._stream

    async def close(self) -> None:
        """Closes the connection, also in the middle of a TLS handshake that was cancelled."""
        if self._stream is not None:
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()
