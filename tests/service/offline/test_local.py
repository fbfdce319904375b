"""`timesformer classify`: what it answers, file by file, without a server."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle.bundle import BundleError, BundleStore
from export.runtime import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from service.inference.parameters import ClassifyParameters
from service.offline.local import classify_files
from service.settings import Settings, load_settings
from tests.export.conftest import COLOURS, publish_colours, write_video

TIMESFORMER = Path(sys.executable).with_name("timesformer")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {colour: write_video(folder / f"{colour}.mp4", colour) for colour in COLOURS}


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Holds a model that says which colour a video has."""
    store = BundleStore(tmp_path / "store")
    store.activate("colours", publish_colours(store).version)
    return store


@pytest.fixture
def settings(store: BundleStore) -> Settings:
    return load_settings(store=store.root, device="cpu")


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(settings: Settings, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Classifies files; returns the answers in JSON, of which `failed` are errors."""

    def run(*files: Path, failed: int = 0, **parameters: Any) -> list[dict[str, Any]]:
        wanted = ClassifyParameters(**parameters)
        assert classify_files(list(files), settings, wanted, as_json=True) == failed
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_each_video_gets_its_own_answer_in_order(videos: dict[str, Path], ask: Ask) -> None:
    answers = ask(*videos.values())
    assert [answer["file"] for answer in answers] == [str(path) for path in videos.values()]
    assert [answer["predictions"][0]["label"] for answer in answers] == list(COLOURS)


def test_the_scores_are_those_of_the_bundle_s_temperature(
    videos: dict[str, Path], store: BundleStore, ask: Ask
) -> None:
    """Squared and normalised anew where it is a half."""
    answers = ask(videos["red"], top_k=3)
    store.activate("colours", publish_colours(store, temperature=0.5).version)
    answers += ask(videos["red"], top_k=3)
    plain, sharp = (
        np.array([each["score"] for each in answer["predictions"]]) for answer in answers
    )
    np.testing.assert_allclose(sharp, plain**2 / (plain**2).sum(), atol=2e-6)
    assert sharp[0] > plain[0]


def test_an_answer_says_what_was_seen_by_which_model(videos: dict[str, Path], ask: Ask) -> None:
    (answer,) = ask(videos["blue"], top_k=2, views=3, crops=3)
    assert answer["predictions"][0]["class_index"] == 2
    assert len(answer["predictions"]) == 2
    assert answer["model"] == {"name": "colours", "version": "1"}
    assert (answer["sampling"]["views"], answer["sampling"]["crops"]) == (3, 3)
    assert [len(times) for times in answer["sampling"]["times_s"]] == [4, 4, 4]
    assert (answer["video"]["width"], answer["video"]["height"]) == (48, 32)
    assert answer["video"]["frames"] == 40


def test_a_threshold_leaves_out_what_scores_less(videos: dict[str, Path], ask: Ask) -> None:
    (answer,) = ask(videos["red"], threshold=0.5)
    assert [each["label"] for each in answer["predictions"]] == ["red"]


def test_what_cannot_be_read_is_counted_and_the_rest_is_answered(
    videos: dict[str, Path], tmp_path: Path, ask: Ask
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video" * 100)
    broken = [tmp_path / name for name in ("empty.mp4", "text.mp4", "absent.mp4", ".")]
    files = [videos["red"], *broken, videos["green"]]
    answers = ask(*files, failed=4)
    assert [answer["file"] for answer in answers] == [str(file) for file in files]
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes[:3] == [None, "empty_file", "undecodable_video"]
    assert codes[3:] == ["unreadable_file", "unreadable_file", None]
    assert answers[3]["error"]["detail"] == "No such file or directory."
    assert answers[4]["error"]["detail"] == "Is a directory."


def test_people_get_a_table_under_the_file_and_errors_on_stderr(
    videos: dict[str, Path], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    classify_files([videos["green"], Path("absent.mp4")], settings, ClassifyParameters(), False)
    output, errors = capsys.readouterr()
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == [str(videos["green"])]
    assert lines[1] == ["label", "score"]
    assert lines[2][0] == "green"
    assert len(lines) == 5
    assert errors.splitlines() == ["absent.mp4: No such file or directory."]


def test_names_and_labels_of_any_form_are_neither_markup_nor_wrapped_nor_cut(
    videos: dict[str, Path],
    store: BundleStore,
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Something-Something has labels with brackets; rich would take them for markup."""
    labels = ("Pushing [something]", f"[/red] {'very ' * 40}long", "[bold]Holding")
    store.activate("colours", publish_colours(store, labels=labels).version)
    file = tmp_path / f"[bold] {'long ' * 30}.mp4"
    file.write_bytes(videos["red"].read_bytes())

    absent = tmp_path / "[red].mp4"
    assert classify_files([file, absent], settings, ClassifyParameters(), as_json=False) == 1

    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert lines[0] == str(file)
    assert all(any(line.startswith(label) for line in lines) for label in labels)
    assert str(absent) in errors


def test_a_cut_off_file_is_answered_and_said_to_be_one(
    videos: dict[str, Path], settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(tmp_path / "whole.mkv", "red", frames=300).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    assert classify_files([tmp_path / "cut.mkv"], settings, ClassifyParameters(), False) == 0
    assert "truncated or damaged; the rest was used" in capsys.readouterr().out


def test_clips_go_through_the_network_one_at_a_time(
    videos: dict[str, Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up too: a full batch of it would take a CPU longer than the answer."""
    sizes = []
    real = OnnxRuntime.run

    def recorded(self: OnnxRuntime, frames: NDArray[np.uint8]) -> Outputs:
        sizes.append(len(frames))
        return real(self, frames)

    monkeypatch.setattr(OnnxRuntime, "run", recorded)
    classify_files([videos["red"]], settings, ClassifyParameters(views=2, crops=3), as_json=True)
    assert sizes == [1] * 7


def test_a_damaged_bundle_answers_nothing(
    videos: dict[str, Path], store: BundleStore, settings: Settings
) -> None:
    file = store.open("colours").file("model.onnx")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match="its hash is off"):
        classify_files([videos["red"]], settings, ClassifyParameters(), as_json=True)


def test_answers_go_to_stdout_also_while_a_bar_is_on_the_terminal(
    videos: dict[str, Path], store: BundleStore
) -> None:
    """As in `timesformer classify *.mp4 > answers`: stderr is a terminal, stdout is not."""
    terminal, stderr = pty.openpty()
    command = [TIMESFORMER, "classify", "--store", store.root, "--device", "cpu"]
    try:
        process = subprocess.run(
            [*command, videos["red"], "absent.mp4", videos["blue"]],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "TERM": "xterm"},
            timeout=240,
            check=False,
        )
        shown = os.read(terminal, 100_000).decode()
    finally:
        os.close(stderr)
        os.close(terminal)
    lines = process.stdout.decode().splitlines()
    assert process.returncode == 3
    assert [line for line in lines if line.endswith(".mp4")] == [
        str(videos["red"]),
        str(videos["blue"]),
    ]
    assert "classifying" in shown
    assert "label" not in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "absent.mp4: No such file or directory." in re.split(r"[\r\n]+", plain)
