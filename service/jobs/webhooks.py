"""Calls a client's server when a job has ended: signed, only listed hosts, again if a call fails.

Calls are signed as https://www.standardwebhooks.com says: `webhook-signature` is `v1,` and the
HMAC-SHA256, in base64, of the values of `webhook-id` and `webhook-timestamp` and of the body, with
full stops between. `webhook-id` is the job's id, the same in every call of the job. Redirects are
not followed.

Deprecated: `X-Timesformer-Signature`, which signs the timestamp and the body alone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
from urllib.parse import urlsplit

from service.errors import WebhookRefusedError
from service.ingest.http_client import HttpClient
from service.ingest.url_policy import (
    DestinationRefusedError,
    ExchangeFailedError,
    Policy,
    check_url,
)
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
# Seven waits of 5 s to 5.7 h make eight calls within half a day.
_MOST_CALLS, _FIRST_WAIT_S, _GROWTH = 8, 5.0, 4.0
AT_ONCE = 8
"""Calls that are made at the same time."""
_SILENCE_S, _CALL_S = 10.0, 30.0
_SECRET_PREFIX = b"whsec_"
_MIN_KEY_BYTES, _MAX_KEY_BYTES = 24, 64
"""Of a secret with the prefix, as the specification says."""
_MIN_SECRET_BYTES = 16
"""Of a secret without the prefix."""


class Webhooks:
    """Makes the calls.

    Raises:
        SettingsError: the secret cannot be read or is too short.
    """

    def __init__(self, settings: Settings) -> None:
        policy = Policy(settings.hosts_of_webhooks, settings.webhook_http, settings.webhook_private)
        self._key = _read_key(settings) if policy.hosts else b""
        self._client = HttpClient(policy, _SILENCE_S, AT_ONCE)

    def check(self, url: str) -> None:
        """Looks at the text of a URL.

        Raises:
            WebhookRefusedError: it will not be called.
        """
        if not self._client.policy.hosts:
            raise WebhookRefusedError(
                "This service calls no webhooks: TIMESFORMER_WEBHOOK_HOSTS lists no host."
            )
        try:
            check_url(url, self._client.policy)
        except DestinationRefusedError as error:
            raise WebhookRefusedError(str(error)) from None

    async def call(self, url: str, event: str, body: bytes, now: float) -> bool:
        """Returns whether the receiver answers with a status of 200 to 299.

        Args:
            event: id of what has happened; the same in every call about it.
        """
        headers = {"Content-Type": "application/json", **sign(self._key, event, int(now), body)}
        try:
            async with (
                asyncio.timeout(_CALL_S),
                self._client.request("POST", url, headers, body) as reply,
            ):
                if 200 <= reply.status < 300:
                    return True
                reason = f"{reply.host} answers with status {reply.status}"
        except (DestinationRefusedError, ExchangeFailedError) as error:
            reason = str(error)
        except TimeoutError:
            reason = f"{urlsplit(url).hostname} took longer than {_CALL_S:g} s"
        logger.warning("webhook failed", extra={"reason": reason})
        return False

    def close(self) -> None:
        self._client.close()


def sign(key: bytes, event: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Returns the headers that prove where a call comes from."""
    signed = hmac.new(key, f"{event}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    deprecated = hmac.new(key, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return {
        "webhook-id": event,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        "X-Timesformer-Timestamp": str(timestamp),
        "X-Timesformer-Signature": f"sha256={deprecated}",
    }


def wait_after(calls: int) -> float | None:
    """Seconds until the next call after so many failed; None: no more."""
    return None if calls >= _MOST_CALLS else _FIRST_WAIT_S * _GROWTH ** (calls - 1)


def _read_key(settings: Settings) -> bytes:
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
    try:
        return parse_secret(secret)
    except ValueError as error:
        raise SettingsError(f"TIMESFORMER_WEBHOOK_SECRET_FILE: {path}: {error}") from None


def parse_secret(secret: bytes) -> bytes:
    """Returns the key of a secret: `whsec_` and base64, or any bytes.

    Raises:
        ValueError: the secret is too short, too long or no base64.
    """
    if not secret.startswith(_SECRET_PREFIX):
        if len(secret) < _MIN_SECRET_BYTES:
            raise ValueError(f"a secret has at least {_MIN_SECRET_BYTES} bytes")
        return secret
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError("what follows whsec_ must be base64") from None
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise ValueError(
            f"what follows whsec_ must be base64 of {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} bytes"
        )
    return key
