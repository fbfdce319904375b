"""Where requests of ours may go: not by any spelling of a URL into our own network."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from service.ingest.url_policy import (
    DestinationRefusedError,
    ExchangeFailedError,
    Policy,
    check_url,
    find_addresses,
    is_public,
)
from service.settings import parse_hosts

POLICY = Policy(("videos.example.org", "*.store.example", "odd.example:8443"))


@pytest.mark.parametrize(
    "url",
    [
        "https://videos.example.org/a.mp4",
        "https://VIDEOS.example.org/a.mp4?signature=a%2Fb",
        "https://videos.example.org:443/",
        "https://bucket.store.example/a",
        "https://odd.example:8443/a",
    ],
)
def test_listed_hosts_may_be_read(url: str) -> None:
    assert check_url(url, POLICY).secure


@pytest.mark.parametrize(
    "url",
    [
        "http://videos.example.org/a.mp4",
        "file:///etc/passwd",
        "ftp://videos.example.org/a",
        "gopher://videos.example.org/",
        "//videos.example.org/a",
        "videos.example.org/a",
        "",
        "https://",
        "https:///a",
        "https://store.example/a",
        "https://evilstore.example/a",
        "https://videos.example.org.evil.example/a",
        "https://videos.example.org:22/",
        "https://odd.example/",
        "https://odd.example:99999/",
        "https://user@videos.example.org/",
        "https://user:secret@videos.example.org/",
        "https://evil.example@videos.example.org/",
        "https://videos.example.org@evil.example/",
        "https://evil.example\\@videos.example.org/",
        "https://videos.example.org\\.evil.example/",
        "https://videos.example.org%00.evil.example/",
        "https://videos.example.org\n/",
        "https://videos.example.org/a b",
        "https://vidéos.example.org/",
        "https://videos。example。org/",
        "https://videos.example.org/" + "a" * 5000,
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://2130706433/",
        "https://0177.0.0.1/",
        "https://0x7f.1/",
        "https://localhost/",
    ],
)
def test_all_else_is_refused_by_its_text(url: str) -> None:
    with pytest.raises(DestinationRefusedError) as refusal:
        check_url(url, POLICY)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),  # noqa: S104
        *("100.64.0.1", "169.254.169.254", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1"),
        *("ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"),
        *("64:ff9b::a9fe:a9fe", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "words"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1",), ("8.8.8.8", "10.0.0.1"), ("169.254.169.254",), ("::1",)]
)
def test_a_listed_name_that_resolves_into_our_network_is_refused(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, *addresses)
    with pytest.raises(DestinationRefusedError, match="public"):
        find_addresses("videos.example.org", 443, POLICY)
    found = find_addresses("videos.example.org", 443, POLICY._replace(private=True))
    assert found == list(addresses)


@pytest.mark.parametrize("host", ["2130706433", "0177.0.0.1", "0x7f000001", "127.1"])
def test_numbers_that_stand_for_an_address_are_resolved_before_they_are_judged(host: str) -> None:
    policy = Policy((host,))
    assert check_url(f"https://{host}/", policy).host == host
    with pytest.raises(DestinationRefusedError, match="public"):
        find_addresses(host, 443, policy)


def test_a_host_that_cannot_be_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ExchangeFailedError, match=r"videos\.example\.org"):
        find_addresses("videos.example.org", 443, POLICY)


def test_lists_of_hosts_are_read_and_checked() -> None:
    assert parse_hosts(" A.example, *.b.example ,c.example:80,") == (
        "a.example",
        "*.b.example",
        "c.example:80",
    )
    assert parse_hosts("") == ()
    for wrong in ("https://a.example", "*", "*.", "a.example/", "a b", "a.*.example", "a:b"):
        with pytest.raises(ValueError, match="no host"):
            parse_hosts(wrong)
