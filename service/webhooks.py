"""Tells a client's server that a job has ended: signed, only to listed hosts, again if it fails.

`X-Timesformer-Signature: sha256=` and the HMAC-SHA256, in hex, of the timestamp of
`X-Timesformer-Timestamp`, a full stop and the body, with the secret of
`TIMESFORMER_WEBHOOK_SECRET_FILE`. Redirects are not followed. A call may come twice: the receiver
knows jobs by their id.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from concurrent.futures import ThreadPoolExecutor

from service.errors import WebhookRefusedError
from service.outgoing import (
    DestinationRefusedError,
    Exchange,
    ExchangeFailedError,
    Policy,
    check_url,
)
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
TIMESTAMP_HEADER, SIGNATURE_HEADER = "X-Timesformer-Timestamp", "X-Timesformer-Signature"
# Seven waits of 5 s to 5.7 h make eight calls within half a day.
_MOST_CALLS, _FIRST_WAIT_S, _GROWTH = 8, 5.0, 4.0
AT_ONCE = 8
"""Calls that are made at the same time."""
_SILENCE_S, _CALL_S = 10.0, 30.0
_LEAST_SECRET = 16


class Webhooks:
    """Makes the calls.

    Raises:
        SettingsError: the secret cannot be read or is too short.
    """

    def __init__(self, settings: Settings) -> None:
        self._policy = Policy(
            settings.hosts_of_webhooks, settings.webhook_http, settings.webhook_private
        )
        self._secret = _read_secret(settings) if self._policy.hosts else b""
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhook")

    def check(self, url: str) -> None:
        """Looks at the text of a URL.

        Raises:
            WebhookRefusedError: it will not be called.
        """
        if not self._policy.hosts:
            raise WebhookRefusedError(
                "This service calls no webhooks: TIMESFORMER_WEBHOOK_HOSTS lists no host."
            )
        try:
            check_url(url, self._policy)
        except DestinationRefusedError as error:
            raise WebhookRefusedError(str(error)) from None

    async def call(self, url: str, body: bytes, now: float) -> bool:
        """Says whether the other side took it, with a status of 200 to 299."""
        try:
            exchange = Exchange(url, self._policy, _SILENCE_S)
        except DestinationRefusedError as error:  # the list has changed since
            logger.warning("webhook refused", extra={"reason": str(error)})
            return False
        timestamp = str(int(now))
        headers = {
            "Content-Type": "application/json",
            TIMESTAMP_HEADER: timestamp,
            SIGNATURE_HEADER: sign(self._secret, timestamp, body),
        }
        try:
            async with asyncio.timeout(_CALL_S):
                response = await asyncio.wrap_future(
                    self._threads.submit(exchange.begin, "POST", headers, body)
                )
            if 200 <= response.status < 300:
                return True
            reason = f"{exchange.destination.host} answers with status {response.status}"
        except (DestinationRefusedError, ExchangeFailedError) as error:
            reason = str(error)
        except TimeoutError:
            reason = f"{exchange.destination.host} took longer than {_CALL_S:g} s"
        finally:
            exchange.end()
        logger.warning("webhook failed", extra={"reason": reason})
        return False

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of the signature's header."""
    digest = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"sha256={digest}"


def wait_after(calls: int) -> float | None:
    """Seconds until the next call after so many failed; None: no more."""
    return None if calls >= _MOST_CALLS else _FIRST_WAIT_S * _GROWTH ** (calls - 1)


def _read_secret(settings: Settings) -> bytes:
    path = settings.webhook_secret_file
    if path is None:
        raise SettingsError(
            "TIMESFORMER_WEBHOOK_SECRET_FILE: webhooks are signed; name a file with a secret"
        )
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(
            f"TIMESFORMER_WEBHOOK_SECRET_FILE: cannot read {path}: {error.strerror}"
        ) from error
    if len(secret) < _LEAST_SECRET:
        raise SettingsError(
            f"TIMESFORMER_WEBHOOK_SECRET_FILE: the secret in {path} is shorter than "
            f"{_LEAST_SECRET} bytes"
        )
    return secret
