"""The page says what happened, is one file, and takes nobody's words for markup."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from model.config import Preprocessing
from model.data.lists import Sample
from model.evaluation.calibration import calibrate
from model.evaluation.metrics import Failure, Predictions
from model.reports.html import Html, join, tag
from model.reports.thumbnails import film_strip
from model.reports.training_report import PAGE, Evaluated, write_report
from tests.model.conftest import flat, write_video
from tests.model.reports.pages import LOADING, Page, read

SEES = Preprocessing(num_frames=4, image_size=32, frame_stride=4)
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'
ABOUT: dict[str, Any] = {
    "steps": 40,
    "videos": 1234,
    "seconds": 90.0,
    "device": "cpu",
    "identity": {
        "recipe": {"batch_size": 32, "optimisation": {"betas": [0.9, 0.98], "warm_up": 0.7},
                   "augmentation": {"flip_labels": {"left": "right"}}},
        "config": {"attention_type": "axial"},
    },
    "software": {"torch": "2.13.0"},
}  # fmt: skip


def page(folder: Path, evaluated: Evaluated | None = None, **changes: Any) -> Page:
    title, events = changes.pop("title", "a run"), changes.pop("events", ())
    write_report(folder / PAGE, title, {**ABOUT, **changes}, events, evaluated)
    return read(folder / PAGE)


def evaluated(
    targets: list[int], given: list[int], labels: tuple[str, ...], path: str = "gone.mp4"
) -> Evaluated:
    """One clip a video; `given` gets most of the score, more for later videos."""
    logits = np.zeros((len(targets), 1, len(labels)), np.float32)
    for video, label in enumerate(given):
        logits[video, 0, label] = 2 + 0.1 * video
    samples = tuple(Sample(path, target, str(video)) for video, target in enumerate(targets))
    found = Predictions(logits, np.array(targets), samples, labels, ())
    return Evaluated(found, SEES, calibration=calibrate(found))


def events() -> list[dict[str, Any]]:
    steps = [
        {"event": "step", "step": step, "loss": 2 / step, "learning_rate": 0.1}
        for step in range(1, 41)
    ]
    evaluations = [
        {"event": "evaluation", "step": step, "top1": step / 40, "log_loss": 1.0}
        for step in (10, 20, 30)
    ]
    replaced = {"event": "replaced", "step": 3, "path": "bad.mp4", "code": "x", "detail": "Broken."}
    return [{"event": "start", "step": 0}, *steps, *evaluations, replaced, {**replaced, "step": 9}]


LABELS = ("left", "right", "up")


def test_it_shows_curves_mistakes_calibration_recipe_and_what_was_left_out(tmp_path: Path) -> None:
    found = evaluated([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 0], LABELS)
    failure = Failure("https://host/b.mp4?sig=secret", "undecodable", "It is no video.")
    predictions = dataclasses.replace(found.predictions, failures=(failure,))
    shown = page(tmp_path, dataclasses.replace(found, predictions=predictions), events=events())
    text = re.sub(r"\s+", " ", shown.text)
    for words in (
        "top-1 71.4%", "1,234", "Loss of the steps", "Learning rate", "Validation: top-1",
        "left taken for right: 1", "2 of 7 videos got a wrong label", "temperature 1,",
        "attention type axial", "betas 0.9, 0.98", "flip labels left → right", "torch 2.13.0",
        "bad.mp4 Broken. 2 in training", "https://host/b.mp4 It is no video. validation",
    ):  # fmt: skip
        assert words in text, words
    assert "secret" not in text
    # Of two mistakes the surer one is the worse.
    assert re.findall(r"is (\w+) [0-9.]+% taken for", text) == ["up", "left"]


def test_it_loads_nothing(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", paint=flat(200, 20, 20))
    shown = page(tmp_path, evaluated([0, 1], [1, 1], LABELS, str(video)), events=events())
    assert not shown.names() & LOADING
    policy = next(a["content"] for name, a in shown.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for _, attributes in shown.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "data", "action"):
                assert (value or "").startswith("data:image/jpeg;base64,")
    assert "url(" not in (tmp_path / PAGE).read_text()
    assert "@import" not in (tmp_path / PAGE).read_text()


def test_a_mistaken_clip_is_shown(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", paint=flat(200, 20, 20))
    shown = page(tmp_path, evaluated([0, 1], [1, 1], LABELS, str(video)))
    (source,) = (attributes["src"] for name, attributes in shown.tags if name == "img")
    picture = jpeg(source or "")
    assert picture.shape == (96, 4 * 96, 3)
    assert np.abs(picture.mean((0, 1)) - (200, 20, 20)).max() < 8


def test_frames_of_a_strip_are_in_their_order_and_evenly_spread() -> None:
    levels = np.linspace(0, 250, 8).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (8, 50, 50, 3))
    picture = jpeg(film_strip(frames))
    shown = [picture[:, 96 * place + 20 : 96 * place + 76].mean() for place in range(4)]
    assert shown == pytest.approx(levels[[0, 2, 5, 7]].astype(float), abs=4)
    assert jpeg(film_strip(frames[:1])).shape == (96, 96, 3)


def jpeg(url: str) -> np.ndarray:
    head, _, content = url.partition(",")
    assert head == "data:image/jpeg;base64"
    with av.open(io.BytesIO(base64.b64decode(content)), format="jpeg_pipe") as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


def test_words_of_others_are_no_markup(tmp_path: Path) -> None:
    labels = (HOSTILE, f"{HOSTILE}'&", "c")
    found = evaluated([0, 1, 2], [1, 0, 2], labels, path=f"{HOSTILE}.mp4")
    log = [*events(), {"event": "replaced", "step": 1, "path": HOSTILE, "detail": HOSTILE}]
    recipe = {"recipe": {HOSTILE: HOSTILE}}
    shown = page(tmp_path, found, title=HOSTILE, events=log, identity=recipe, device=HOSTILE)
    assert not shown.names() & {"script", "img"}
    assert shown.text.count(HOSTILE) > 10


def test_a_name_that_is_no_utf8_can_be_written(tmp_path: Path) -> None:
    path = os.fsdecode(b"caf\xe9.mp4")
    assert "caf" in page(tmp_path, evaluated([0], [1], LABELS, path=path)).text


def test_without_validation_videos_it_says_so(tmp_path: Path) -> None:
    shown = page(tmp_path, events=events()[:41])
    assert "There were no validation videos." in shown.text
    assert "Confusion" not in shown.text
    assert "Validation: top-1" not in shown.text
    assert "None: every video could be decoded." in shown.text


def test_one_class_and_one_video(tmp_path: Path) -> None:
    shown = page(tmp_path, evaluated([0], [0], ("only",)))
    assert "Every video got the right label." in shown.text
    assert "No temperature was fitted." in shown.text


def test_of_many_classes_the_pairs_that_are_mistaken_most_are_listed(tmp_path: Path) -> None:
    labels = tuple(f"class {number}" for number in range(400))
    targets = [number % 400 for number in range(800)]
    given = [7 if target == 3 else target for target in targets]
    shown = page(tmp_path, evaluated(targets, given, labels))
    text = re.sub(r"\s+", " ", shown.text)
    assert "Of 400 classes" in text
    assert "class 3 class 7 2 100.0%" in text
    assert "400 classes, the worst first" in text
    assert not [a for name, a in shown.tags if name == "rect" and a.get("class") == "cell"]
    assert (tmp_path / PAGE).stat().st_size < 500_000


def test_a_long_list_of_mistakes_is_cut_and_says_so(tmp_path: Path) -> None:
    shown = page(tmp_path, evaluated([0] * 50, [1] * 50, LABELS))
    assert "50 of 50 videos got a wrong label; these 24 are those" in shown.text
    assert shown.text.count("No picture:") == 24


def test_markup_is_kept_and_text_is_escaped() -> None:
    assert tag("b", "<", Html("<i></i>"), class_='a"b', stroke_width=1.5) == (
        '<b class="a&quot;b" stroke-width="1.5">&lt;<i></i></b>'
    )
    assert join(["&", Html("&")]) == "&amp;&"
    with pytest.raises(ValueError, match="nan"):
        tag("rect", x=float("nan"))
