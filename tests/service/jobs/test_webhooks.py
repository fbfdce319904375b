"""Signatures of webhooks, checked against the Standard Webhooks specification."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest

from service.jobs.webhooks import parse_secret, sign

# The vector of the specification's own libraries.
SECRET = b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
EVENT, TIMESTAMP, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_sign_gives_the_signature_of_the_specification() -> None:
    headers = sign(parse_secret(SECRET), EVENT, TIMESTAMP, BODY)
    assert headers["webhook-id"] == EVENT
    assert headers["webhook-timestamp"] == str(TIMESTAMP)
    assert headers["webhook-signature"] == SIGNATURE


def test_sign_sends_the_deprecated_headers_too() -> None:
    headers = sign(b"sixteen bytes and more", EVENT, TIMESTAMP, BODY)
    expected = hmac.new(b"sixteen bytes and more", b"1614265330." + BODY, hashlib.sha256)
    assert headers["X-Timesformer-Timestamp"] == str(TIMESTAMP)
    assert headers["X-Timesformer-Signature"] == f"sha256={expected.hexdigest()}"


def test_parse_secret_without_the_prefix_uses_the_bytes_as_they_are() -> None:
    assert parse_secret(b"sixteen bytes...") == b"sixteen bytes..."


@pytest.mark.parametrize("size", [24, 64])
def test_parse_secret_with_the_prefix_decodes_base64(size: int) -> None:
    assert parse_secret(b"whsec_" + base64.b64encode(b"k" * size)) == b"k" * size


@pytest.mark.parametrize(
    "secret",
    [
        b"fifteen bytes..",
        b"whsec_" + base64.b64encode(b"k" * 23),
        b"whsec_" + base64.b64encode(b"k" * 65),
        b"whsec_" + b"?" * 32,
        b"whsec_" + b"k" * 33,
        b"whsec_",
    ],
)
def test_parse_secret_refuses_what_is_too_short_too_long_or_no_base64(secret: bytes) -> None:
    with pytest.raises(ValueError, match=r"base64|bytes") as refusal:
        parse_secret(secret)
    assert "kkk" not in str(refusal.value)
