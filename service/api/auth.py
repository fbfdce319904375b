"""API keys: who may do what, and how much of it.

A key is 256 random bits, shown once and stored as its SHA-256 (with that much randomness a slow
hash adds nothing). Keys live in one JSON file that `timesformer keys` edits and a running service
follows. Without a file everybody may infer, and nobody may administrate over HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.files import write_atomic
from service.errors import ForbiddenError, TooManyRequestsError, UnauthorizedError
from service.inference.scheduler import Priority

logger = logging.getLogger(__name__)
Scope = Literal["infer", "admin"]
PREFIX = "tsf_"  # so that scanners for leaked secrets find one


class KeyFileError(Exception):
    """The file of keys cannot be read or written; the message says why."""


class ApiKey(BaseModel):
    """What is known of one key. The key itself is not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    requests_per_minute: int | None = Field(None, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    priority: Priority = "normal"


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[ApiKey, ...] = ()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        KeyFileError: it is not there, or not a file of keys.
    """
    try:
        keys = _KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise KeyFileError(f"cannot read the API keys in {path}: {error.strerror}") from error
    except ValidationError as error:
        # Without the input: a person may have pasted a key where its hash belongs.
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise KeyFileError(f"{path} is no file of API keys: {problems}") from None
    names = [key.name for key in keys]
    if len(set(names)) != len(names):
        raise KeyFileError(f"{path} has two keys of one name")
    return keys


def write_keys(path: Path, keys: tuple[ApiKey, ...]) -> None:
    """Replaces the file in one step, readable by its owner alone.

    Raises:
        KeyFileError: it cannot be written; the old one is as it was.
    """
    content = _KeyFile(keys=keys).model_dump_json(indent=2, exclude_none=True) + "\n"
    try:
        write_atomic(path, content, durable=True, mode=0o600)
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error


def new_key() -> tuple[str, str]:
    """A fresh key, and the hash to keep of it."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, _hash(key)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class _Usage:
    """How much a key has used: a token bucket that holds a minute's worth, and what runs now."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spent = 0.0  # requests of the last minute that have not flowed back yet
        self._seen = clock()
        self.running = 0

    def spend(self, per_minute: int) -> float:
        """Takes one request out of the bucket; else says after how many seconds there is one."""
        now = self._clock()
        self._spent = max(0.0, self._spent - (now - self._seen) * per_minute / 60)
        self._seen = now
        if self._spent + 1 > per_minute:
            return (self._spent + 1 - per_minute) * 60 / per_minute
        self._spent += 1
        return 0.0


class Keyring:
    """The keys of a file, read again when it changes, and what each has used in this process.

    Raises:
        KeyFileError: the file cannot be used at start. Later on the keys known so far stay.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = self._stat()
        self._keys = read_keys(path)
        self._usage: dict[str, _Usage] = {}

    def find(self, presented: str) -> ApiKey | None:
        """The key that was presented, if it is one of ours; in the same time for any of them."""
        self._read_again_if_changed()
        digest = _hash(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    @contextlib.contextmanager
    def use(self, key: ApiKey) -> Iterator[None]:
        """Counts a request of a key for as long as the block runs.

        Raises:
            TooManyRequestsError: the key has used up its rate, or runs all it may at once.
        """
        usage = self._usage.setdefault(key.name, _Usage(self._clock))
        if key.max_concurrent is not None and usage.running >= key.max_concurrent:
            raise TooManyRequestsError(
                f"This key may run {key.max_concurrent} requests at once.", retry_after_s=1
            )
        if key.requests_per_minute is not None and (wait := usage.spend(key.requests_per_minute)):
            raise TooManyRequestsError(
                f"This key may send {key.requests_per_minute} requests a minute.",
                retry_after_s=math.ceil(wait),
            )
        usage.running += 1
        try:
            yield
        finally:
            usage.running -= 1

    def _stat(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            found = self._path.stat()
            return found.st_mtime_ns, found.st_ino
        return None

    def _read_again_if_changed(self) -> None:
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except KeyFileError as error:
            logger.error("the API keys known so far stay", extra={"reason": str(error)})


_bearer = HTTPBearer(auto_error=False, description="An API key, if the service asks for one.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same, in a header.")


@contextlib.asynccontextmanager
async def admitted(request: Request, scope: Scope) -> AsyncIterator[None]:
    """Runs the block if the request's API key has the scope. The `admin` scope includes `infer`.

    Raises:
        UnauthorizedError: no key, or none of ours.
        ForbiddenError: a key without the scope; or an admin route while there are no keys at all.
        TooManyRequestsError: the key's limits.
    """
    keyring: Keyring | None = request.app.state.keyring
    if keyring is None:
        if scope == "admin":
            raise ForbiddenError("Administration over HTTP needs TIMESFORMER_API_KEYS_FILE.")
        request.state.api_key = None
        yield
        return
    presented = _presented_key(request)
    key = keyring.find(presented) if presented else None
    if key is None:
        raise UnauthorizedError("Send an API key as `Authorization: Bearer KEY`.")
    if scope not in key.scopes and "admin" not in key.scopes:
        raise ForbiddenError(f"This key lacks the scope `{scope}`.")
    request.state.priority, request.state.api_key = key.priority, key
    with keyring.use(key):
        yield


def _presented_key(request: Request) -> str | None:
    """Returns the key in a request's headers, as the security schemes of `allow` describe it."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials
    return request.headers.get("X-API-Key")


def allow(scope: Scope) -> Callable[..., AsyncIterator[None]]:
    """Returns a dependency of routes that runs `admitted` around them, before the body is read.
    The security schemes are for OpenAPI.
    """

    async def check(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
        header: Annotated[str | None, Security(_header)],
    ) -> AsyncIterator[None]:
        async with admitted(request, scope):
            yield

    return check
