"""The port that several workers share, and nobody else."""

from __future__ import annotations

import socket

import pytest

from service.listening import bind, url_of
from service.settings import SettingsError


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def test_each_worker_gets_a_socket_and_connections_are_spread_over_them() -> None:
    (first,), (second,) = bind("127.0.0.1", 0, 2)
    port = first.getsockname()[1]
    assert second.getsockname()[1] == port
    assert url_of(first) == f"http://localhost:{port}"
    with first, second:
        for listener in (first, second):
            listener.listen(128)
            listener.setblocking(False)
        clients = [connect(port) for _ in range(64)]
        for listener in (first, second):
            accepted = []
            while True:
                try:
                    accepted.append(listener.accept()[0])
                except BlockingIOError:
                    break
            assert accepted
            for each in (*accepted,):
                each.close()
        for client in clients:
            client.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_that_another_service_has_is_refused_though_both_would_share(workers: int) -> None:
    (taken,), (other,) = bind("127.0.0.1", 0, 2)
    with taken, other:
        taken.listen()
        with pytest.raises(SettingsError, match="TIMESFORMER_PORT: cannot listen on"):
            bind("127.0.0.1", taken.getsockname()[1], workers)


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0, 2)


def test_a_socket_that_was_shut_takes_connections_again_once_it_listens() -> None:
    """So it is with the socket of a worker that does not come up for a while."""
    (first,), (second,) = bind("127.0.0.1", 0, 2)
    port = first.getsockname()[1]
    with first, second:
        first.listen()
        second.listen()
        first.shutdown(socket.SHUT_RDWR)
        for _ in range(16):  # all go to the other one
            with connect(port), second.accept()[0]:
                pass
        second.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionError):
            connect(port)
        first.listen()
        with connect(port), first.accept()[0]:
            pass
