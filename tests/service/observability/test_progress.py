"""How far a command is: a bar on a terminal, lines in a log, and nothing where none is wanted."""

from __future__ import annotations

import pytest
from rich.console import Console

from service.observability import progress
from service.observability.progress import bar


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_bar_in_a_log_prints_the_first_and_the_last_and_one_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bar(line_every_s=600) as shown:
        for count in range(1, 5):
            shown.show(f"video {count} of 4 [x]", count, 4)
    first, last = lines(capsys)
    assert first == "video 1 of 4 [x]"
    assert last == "video 4 of 4 [x]"
    with bar(line_every_s=0) as shown:
        for count in range(1, 5):
            shown.show(f"video {count} of 4", count, 4)
    assert [line[:7] for line in lines(capsys)] == ["video 1", "video 2", "video 3", "video 4"]


def test_bar_without_lines_prints_only_what_it_is_asked_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options in ({"shown": False}, {"lines": False}):
        with bar(**options) as shown:
            shown.show("video 1 of 1", 1, 1)
            shown.print("a video is broken [/x]")
        assert lines(capsys) == ["a video is broken [/x]"]


def test_bar_on_a_terminal_shows_the_text_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminal(stderr: bool) -> Console:
        return Console(stderr=stderr, force_terminal=True, width=100)

    monkeypatch.setattr(progress, "Console", terminal)
    with bar() as shown:
        shown.show("video 1 of 2 [x]", 1, 2)
        shown.print("a video is broken [/x]")
    captured = capsys.readouterr()
    assert "video 1 of 2 [x]" in captured.err
    assert "a video is broken [/x]" in captured.err
    assert captured.out == ""
