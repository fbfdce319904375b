"""New data becomes the next version once, is judged on videos it never saw, and serves if better.

Bundles here are run as networks, so that nothing is exported: tests/e2e/test_readme.py does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from export.bundle.bundle import Bundle, BundleStore, sha256_of
from export.bundle.manifest import LABELS, ONNX_FLOAT32, WEIGHTS
from export.refresh import refresh as module
from export.refresh.comparison import Rule
from export.refresh.refresh import (
    HoldOut,
    Listeners,
    Refreshed,
    RefreshError,
    Task,
    record,
    refresh,
)
from export.runtime.interface import Outputs
from model.checkpoints import Checkpoint, load_checkpoint, save_safetensors
from model.data.lists import VideoList, read_videos
from model.network.timesformer import TimeSformer
from model.training.config import Job, Machine
from model.training.errors import DataError, RecipeError
from model.training.initialisation import grown
from model.training.loop import train
from model.training.recipe import PRESETS
from model.training.trainer import classifier
from service.cli.main import cli
from tests.export.conftest import colour_manifest, write_colour_graph
from tests.model.conftest import flat, random_frames, random_model, tiny_config, write_video

REPOSITORY = Path(__file__).parents[3]
CONFIG = tiny_config(
    num_classes=2, depth=1, num_frames=2, image_size=16, frame_stride=4, drop_path_rate=0.0
)
QUICK = PRESETS["refresh"].replace(
    {"epochs": 10.0, "batch_size": 2, "learning_rate": 0.01, "warm_up": 0.0, "layer_decay": 1.0,
     "ema": 0.0}
)  # fmt: skip
PAINTS = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0)}


def publish_network(
    checkpoint: Checkpoint,
    name: str,
    store: BundleStore,
    *,
    labels: tuple[str, ...],
    **ignored: Any,
) -> Bundle:
    """Publishes weights as `export_bundle` does, with a graph that nobody runs."""
    with store.staging(name) as staging:
        save_safetensors(checkpoint.build(), staging / WEIGHTS, checkpoint.config, labels=labels)
        write_colour_graph(staging / ONNX_FLOAT32)
        (staging / LABELS).write_text("\n".join(labels) + "\n")
        fields = checkpoint.config.to_dict()
        seen = {key: fields.pop(key) for key in colour_manifest().preprocessing}
        changes = {
            "architecture": fields,
            "preprocessing": seen,
            "labels": labels,
            "weights_sha256": sha256_of(staging / WEIGHTS),
        }
        return store.publish(staging, colour_manifest(name).model_copy(update=changes))


class NetworkRuntime:
    """The bundle's network, in the place of its engine."""

    def __init__(self, bundle: Bundle, *ignored: object, **more: object) -> None:
        self._classify = classifier(load_checkpoint(bundle.file(WEIGHTS)).build())

    def run(self, frames: NDArray[np.uint8]) -> Outputs:
        return Outputs(self._classify(frames), np.zeros((len(frames), 1), np.float32))

    def close(self) -> None: ...


def replace_the_export(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "export_bundle", publish_network)
    patch.setattr(module, "load_runtime", NetworkRuntime)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_the_export(monkeypatch)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refresh")
    for name, (red, green, blue) in PAINTS.items():
        (folder / name).mkdir()
        for index in range(4):
            level = 120 + 30 * index
            paint = flat(*(level if on else 20 for on in (red, green, blue)))
            write_video(folder / name / f"{index}.mp4", frames=8, paint=paint)
    return folder


@pytest.fixture(scope="session")
def every(videos: Path) -> VideoList:
    return read_videos(videos)


@pytest.fixture(scope="session")
def known(every: VideoList) -> VideoList:
    """The videos of the first two classes only."""
    labels = ("blue", "red")
    return VideoList(
        tuple(
            sample._replace(label=labels.index(every.labels[sample.label]))
            for sample in every.samples
            if every.labels[sample.label] in labels
        ),
        labels,
    )


def swapped(videos: VideoList) -> VideoList:
    """Every video under a wrong name."""
    return VideoList(
        tuple(s._replace(label=(s.label + 1) % len(videos.labels)) for s in videos.samples),
        videos.labels,
    )


@pytest.fixture(scope="session")
def good_weights(known: VideoList, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that tells blue from red."""
    out = tmp_path_factory.mktemp("good")
    recipe = QUICK.replace({"epochs": 10.0, "learning_rate": 0.01})
    train(random_model(CONFIG), Job(recipe, known, None, out))
    return out / WEIGHTS


@pytest.fixture
def good(good_weights: Path, store: BundleStore) -> Bundle:
    """Version 1, active."""
    publish_network(load_checkpoint(good_weights), "colours", store, labels=("blue", "red"))
    return store.activate("colours", "1")


@pytest.fixture
def bad(good_weights: Path, store: BundleStore) -> Bundle:
    """Version 1, active: it takes blue for red, and red for blue."""
    loaded = load_checkpoint(good_weights)
    head = {name: loaded.state[name].flip(0) for name in ("head.weight", "head.bias")}
    wrong = dataclasses.replace(loaded, state={**loaded.state, **head})
    publish_network(wrong, "colours", store, labels=("blue", "red"))
    return store.activate("colours", "1")


def task(parent: Bundle, data: VideoList, validation: VideoList | None = None, **more: Any) -> Task:
    store = BundleStore(parent.path.parents[1])
    return Task(store, parent, data, validation, **{"recipe": QUICK, **more})


def halves(videos: VideoList) -> tuple[VideoList, VideoList]:
    return tuple(dataclasses.replace(videos, samples=videos.samples[start::2]) for start in (0, 1))  # type: ignore[return-value]


# ---- the decision -------------------------------------------------------------------------------


def test_what_is_better_is_published_and_activated(bad: Bundle, known: VideoList) -> None:
    data, judged = halves(known)
    made = refresh(task(bad, data, judged))
    assert (made.accepted, made.activated, made.again) == (True, True, False)
    store = BundleStore(bad.path.parents[1])
    assert store.active("colours") == "2"
    manifest = made.bundle.manifest
    made.bundle.verify()
    assert manifest.parent == "1"
    assert manifest.training is not None
    assert manifest.training["steps"] == 20
    kept = record(made.bundle)
    assert kept["compared_with"] == "1"
    assert kept["parent"] == {"version": "1", "weights_sha256": bad.manifest.weights_sha256}
    compared = kept["comparison"]["all_classes"]
    assert compared["active"]["top1"] == 0.0
    assert compared["new"]["top1"] >= 0.5
    assert manifest.training["metrics"] == compared["new"]
    assert "top-1 went from 0.0000 to" in kept["reason"]
    assert kept["hold_out"]["fingerprint"] == judged.fingerprint()
    (page,) = (bad.path.parent / module.WORK).glob("*/report.html")
    assert kept["reason"] in page.read_text()
    assert "Beside the active version" in page.read_text()
    assert "Confusion" in page.read_text()
    assert "report.html" not in manifest.files  # it shows videos, which are not published
    assert store.rollback("colours").version == "1"


def test_what_is_worse_is_published_with_the_reason_and_not_activated(
    good: Bundle, known: VideoList
) -> None:
    data, judged = halves(known)
    made = refresh(task(good, swapped(data), judged))
    assert (made.accepted, made.activated) == (False, False)
    store = BundleStore(good.path.parents[1])
    assert (store.active("colours"), store.versions("colours")) == ("1", ["1", "2"])
    assert "top-1 went from 1.0000 to 0." in made.reason
    assert made.reason.count("short") == 1
    assert "accuracy on the old classes fell from 1.0000 to 0." in made.reason
    assert record(made.bundle)["reason"] == made.reason


def test_without_activation_it_is_published_only(bad: Bundle, known: VideoList) -> None:
    made = refresh(task(bad, *halves(known), activate=False))
    assert (made.accepted, made.activated) == (True, False)
    again = refresh(task(bad, *halves(known)))
    assert (again.again, again.activated) == (True, False)


def test_a_version_activated_meanwhile_is_not_replaced(
    bad: Bundle, known: VideoList, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BundleStore(bad.path.parents[1])
    publish = module._publish

    def meanwhile(*arguments: Any) -> Bundle:
        loaded = load_checkpoint(bad.file(WEIGHTS))
        other = publish_network(loaded, "colours", store, labels=("blue", "red"))
        store.activate("colours", other.version)
        return publish(*arguments)

    monkeypatch.setattr(module, "_publish", meanwhile)
    made = refresh(task(bad, *halves(known)))
    assert (made.accepted, made.activated) == (False, False)
    assert "version 2 was activated meanwhile" in made.reason
    assert store.active("colours") == "2"


# ---- new classes --------------------------------------------------------------------------------


def test_a_grown_head_gives_the_old_classes_the_same_logits(good_weights: Path) -> None:
    old = load_checkpoint(good_weights)
    new = grown(old, ("blue", "red", "green", "white"))
    frames = random_frames(CONFIG, batch=3)
    network = new.build()
    with torch.inference_mode():
        before, features = old.build()(frames)
        after, same_features = network(frames)
        # By a product of the same shape: of another one the sums may round in another order.
        kept = F.linear(same_features, network.head.weight[:2], network.head.bias[:2])
    assert torch.equal(same_features, features)
    assert kept.numpy().tobytes() == before.numpy().tobytes()
    np.testing.assert_allclose(after[:, :2], before, rtol=1e-6)
    assert torch.equal(after.argmax(1), before.argmax(1))
    np.testing.assert_allclose(after[:, 2:], before.mean(1, keepdim=True).expand(-1, 2), atol=1e-6)
    with pytest.raises(RecipeError, match="must begin with"):
        grown(old, ("red", "blue", "green"))


def test_new_classes_come_after_the_old_ones_and_are_learned(
    good: Bundle, every: VideoList
) -> None:
    recipe = QUICK.replace({"epochs": 12.0, "learning_rate": 0.01})
    made = refresh(task(good, *halves(every), recipe=recipe))
    assert made.bundle.manifest.labels == ("blue", "red", "green")
    assert made.bundle.config.num_classes == 3
    kept = record(made.bundle)
    assert kept["classes_added"] == ["green"]
    assert kept["comparison"]["all_classes"]["active"]["top1"] == pytest.approx(2 / 3, abs=1e-6)
    assert kept["comparison"]["old_classes"]["active"]["top1"] == 1.0
    assert made.activated, made.reason


def test_classes_that_the_new_data_lack_stay(good: Bundle, known: VideoList) -> None:
    data, judged = halves(known)
    red = dataclasses.replace(data, samples=tuple(s for s in data.samples if s.label == 1))
    made = refresh(task(good, red, judged, recipe=QUICK.replace({"epochs": 1.0})))
    assert made.bundle.manifest.labels == ("blue", "red")


# ---- the hold-out -------------------------------------------------------------------------------


def test_what_was_held_out_is_never_trained_on_when_the_data_grow(
    good: Bundle, known: VideoList, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[str]] = []

    def spy(model: TimeSformer, job: Job, *rest: Any, **more: Any) -> dict[str, Any]:
        trained.append({sample.path for sample in job.videos.samples})
        return train(model, job, *rest, **more)

    monkeypatch.setattr(module, "train", spy)
    recipe = QUICK.replace({"epochs": 1.0})
    share = HoldOut(0.4, seed=3)
    half = halves(known)[0]
    rule = Rule("not-worse", min_gain=-1.0, max_old_drop=1.0)
    first = refresh(task(good, half, hold_out=share, recipe=recipe, rule=rule)).bundle
    assert record(first)["hold_out"]["share"] == 0.4
    second = refresh(task(first, known, recipe=recipe)).bundle
    kept = record(second)["hold_out"]
    assert (kept["share"], kept["seed"]) == share
    held_out = {sample.path for sample in known.split(*share)[1].samples}
    earlier = {sample.path for sample in half.split(*share)[1].samples}
    assert earlier
    assert earlier <= held_out
    assert all(not held_out & paths for paths in trained)
    assert len(trained[1]) + len(held_out) == len(known.samples)


def test_videos_of_the_validation_list_are_taken_out_of_the_data(
    bad: Bundle, known: VideoList
) -> None:
    made = refresh(task(bad, known, halves(known)[1])).bundle
    assert made.manifest.training is not None
    assert made.manifest.training["videos"] == 4
    with pytest.raises(RefreshError, match="give --validation again"):
        refresh(task(made, known))
    with pytest.raises(DataError, match="nothing is left"):
        refresh(task(bad, known, known))


def test_several_processes_do_not_refresh_together(
    bad: Bundle, known: VideoList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would publish a version of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RefreshError, match="a refresh is one process"):
        refresh(task(bad, known))


# ---- stopped and called again -------------------------------------------------------------------


def stop(*arguments: Any, **more: Any) -> Any:
    """Ends the refresh as a process ends; no `except Exception` sees it."""
    raise KeyboardInterrupt


def test_stopped_anywhere_and_called_again_it_makes_one_version(
    bad: Bundle, store: BundleStore, known: VideoList
) -> None:
    def wanted() -> Task:
        return task(store.open("colours"), *halves(known))

    trained: list[int] = []

    def stop_once(step: Any) -> None:
        trained.append(step.step)
        if trained == [1, 2, 3, 4, 5]:
            stop()

    arguments: Any = Machine(checkpoint_every=2), "cpu", Listeners(training={"on_step": stop_once})
    with pytest.raises(KeyboardInterrupt):
        refresh(wanted(), *arguments)
    for place, name in ((module, "export_bundle"), (BundleStore, "activate")):
        assert store.versions("colours") == ["1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, stop)
            with pytest.raises(KeyboardInterrupt):
                refresh(wanted(), *arguments)
    assert trained == [1, 2, 3, 4, 5, *range(5, 21)], "training goes on, and is done once"
    assert (store.versions("colours"), store.active("colours")) == (["1", "2"], "1")
    stages: list[str] = []
    made = refresh(wanted(), listeners=Listeners(stages.append))
    assert stages == []
    assert (made.again, made.activated) == (True, True)
    assert (store.versions("colours"), store.active("colours")) == (["1", "2"], "2")
    (folder,) = (store.root / "colours" / ".refresh").glob("?" * 16)
    kept = {".lock", "log.jsonl", "report.html", "training.json"}
    assert {path.name for path in folder.iterdir()} == kept

    again = refresh(wanted())  # now its parent is version 2
    assert (again.again, again.bundle.version) == (True, "2")
    store.rollback("colours")
    after = refresh(wanted())
    assert (after.again, after.activated) == (True, False)
    assert store.active("colours") == "1"


def test_two_at_once_are_refused(bad: Bundle, known: VideoList) -> None:
    def second(text: str) -> None:
        with pytest.raises(RefreshError, match="another refresh works in"):
            refresh(task(bad, *halves(known)))

    assert isinstance(refresh(task(bad, *halves(known)), listeners=Listeners(second)), Refreshed)


# ---- the command --------------------------------------------------------------------------------


def timesformer_refresh(parent: Bundle, data: Path, *more: object, code: int = 0) -> Result:
    recipe = parent.path.parents[2] / "recipe.json"
    recipe.write_text(json.dumps({"warm_up": 0.0, "layer_decay": 1.0, "ema": 0.0}))
    options = ["--data", data, "--recipe", recipe, "--batch-size", 2, "--learning-rate", 0.01,
               "--workers", 0, "--device", "cpu", *more]  # fmt: skip
    result = CliRunner().invoke(cli, ["refresh", *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def test_the_exit_code_is_4_where_the_rule_keeps_it_from_serving(
    good: Bundle, videos: Path
) -> None:
    options = ("--from", good.path.parent, "--hold-out", 0.4, "--epochs", 0.1, "--min-gain", 0.9)
    result = timesformer_refresh(good, videos, *options, "--json", code=4)
    made = json.loads(result.stdout)
    assert (made["version"], made["accepted"], made["activated"]) == ("2", False, False)
    assert "where more than 0.9 is asked for" in made["reason"]
    assert made["refresh"]["classes_added"] == ["green"]
    said = timesformer_refresh(good, videos, *options, code=4).stdout
    assert "is published, not activated: top-1 went" in said
    assert f"timesformer bundles activate colours 2 --store {good.path.parents[1]}" in said


def write_list(folder: Path, videos: Path, names: dict[str, str]) -> Path:
    """Writes a list of four videos of each colour, with its label in `names`."""
    rows = (
        f"{videos}/{colour}/{index}.mp4,{label},{colour} {index}\n"
        for colour, label in names.items()
        for index in range(4)
    )
    (folder / "list.csv").write_text("path,label,group\n" + "".join(rows))
    return folder / "list.csv"


def test_the_command_says_what_came_of_it(bad: Bundle, videos: Path, tmp_path: Path) -> None:
    data = write_list(tmp_path, videos, {"blue": "blue", "red": "red"})
    result = timesformer_refresh(bad, data, "--from", bad.path, "--hold-out", 0.4, "--epochs", 10)
    assert "old classes" in result.stdout
    assert "colours version 2 is active: top-1 went from" in result.stdout
    assert "evaluating version 1 on" in result.stderr

    again = timesformer_refresh(bad, data, "--store", bad.path.parents[1], "--epochs", 10)
    assert "version 2 was made from these data and settings" in again.stdout


def test_a_list_of_indices_means_the_classes_of_the_parent(
    good: Bundle, videos: Path, tmp_path: Path
) -> None:
    data = write_list(tmp_path, videos, {"blue": "0", "red": "1"})
    options = ("--from", good.path.parent, "--hold-out", 0.4, "--epochs", 0.1)
    made = timesformer_refresh(good, data, *options, "--json", code=4)
    assert json.loads(made.stdout)["refresh"]["classes_added"] == []
    data = write_list(tmp_path, videos, {"blue": "0", "red": "1", "green": "2"})
    result = timesformer_refresh(good, data, *options, code=1)
    assert "indices beyond the 2 classes of the parent" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --from STORE/NAME, or --store STORE"),
        (("--store", "."), "give --model"),
        (("--validation", ".", "--hold-out", "0.5"), "give either --validation or"),
    ],
)
def test_what_is_missing_is_one_line(
    good: Bundle, videos: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in timesformer_refresh(good, videos, *options, code=2).stderr
