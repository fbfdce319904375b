"""The `timesformer` command: what it does, what it prints, and how it fails."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import service
from export.bundle.bundle import ACTIVE, Bundle, BundleStore
from export.bundle.manifest import MANIFEST, ONNX_FLOAT32
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.torch_reference import run_reference
from model.checkpoints import load_checkpoint, save_safetensors
from model.config import VARIANTS
from model.network.cost import cost
from service.cli.main import cli
from tests.export.conftest import publish_colours, write_video
from tests.model.conftest import random_model, tiny_config

TIMESFORMER = Path(sys.executable).with_name("timesformer")
pytestmark = pytest.mark.usefixtures("one_export_of_each_network")
NEED_RAY = {"service.offline.ray_runner", "service.server.ray_serve"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TIMESFORMER_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "red.mp4", "red")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = tiny_config(depth=1)
    save_safetensors(random_model(config), path, config)
    return path


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two versions of a model that says which colour a video has; the first is active."""
    store = BundleStore(tmp_path / "a store")
    publish_colours(store), publish_colours(store)
    store.activate("colours", "1")
    return store


def timesformer(*arguments: object, code: int = 0) -> Result:
    """Runs the command in this process. Whatever it answers, it answers in whole lines."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    assert unexpected is None, repr(unexpected)
    assert result.exit_code == code, result.output
    return result


def failure(*arguments: object, code: int = 1) -> str:
    """Runs a command that must fail with one line on stderr, which is returned.

    Before it only the steps of an export, or how the command is used.
    """
    result = timesformer(*arguments, code=code)
    *before, line = result.stderr.splitlines()
    assert all(each.endswith(" ...") or not each or code == 2 for each in before)
    assert line.startswith("Error: ")
    assert result.stdout == ""
    return line


# ---- export -----------------------------------------------------------------------------------


class Exported(NamedTuple):
    store: BundleStore
    bundle: Bundle
    result: Result
    labels: list[str]


SIZE = ("--num-frames", "2", "--image-size", "16")


@pytest.fixture(scope="module")
def exported(weights: Path, red: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One real export for all tests: resized, with labels and metrics from files."""
    folder = tmp_path_factory.mktemp("exported")
    labels = [f"label {index}" for index in range(5)]
    (folder / "labels.json").write_text(json.dumps({str(i): each for i, each in enumerate(labels)}))
    (folder / "training.json").write_text('{"top1": 0.25}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.demo.SAMPLE_CLIP", red)
        result = CliRunner().invoke(
            cli,
            [
                *("export", str(weights), "--name", "tiny", "--store", str(folder / "store")),
                *SIZE,
                *("--labels", str(folder / "labels.json"), "--verify-on", str(red)),
                *("--training", str(folder / "training.json"), "--json"),
            ],
        )
    store = BundleStore(folder / "store")
    return Exported(store, store.open("tiny"), result, labels)


@pytest.fixture
def quick_export(exported: Exported, red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is copied, not made again: for exports of the same size."""
    graph = exported.bundle.file(ONNX_FLOAT32)
    monkeypatch.setattr("model.demo.SAMPLE_CLIP", red)
    monkeypatch.setattr("export.pipeline.export_onnx", lambda model, path: shutil.copy(graph, path))


class TestExport:
    def test_prints_one_json_object_and_nothing_else(self, exported: Exported) -> None:
        answer = json.loads(exported.result.stdout)
        parity = answer.pop("verification")[ONNX_FLOAT32]
        assert answer == {
            "name": "tiny",
            "version": "1",
            "path": str(exported.bundle.path),
            "active": True,
            "temperature": 1.0,
            "products": {},
            "auto": {},
            "rejected": {},
        }
        assert parity["passed"]
        assert parity["clips"] == 7  # three crops of two videos, and noise
        assert list(exported.bundle.manifest.labels) == exported.labels
        assert exported.bundle.manifest.training == {"top1": 0.25}
        assert exported.result.stderr == ""

    def test_resizes_to_the_frames_and_pixels_asked_for(
        self, exported: Exported, weights: Path
    ) -> None:
        config = exported.bundle.config
        assert (config.num_frames, config.image_size) == (2, 16)
        assert exported.bundle.manifest.inputs[0].shape == (-1, 2, 16, 16, 3)

        clips = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)
        model = load_checkpoint(weights, num_frames=2, image_size=16).build()
        actual = OnnxRuntime(exported.bundle.file(ONNX_FLOAT32), cuda=False).run(clips)
        np.testing.assert_allclose(actual.logits, run_reference(model, clips).logits, atol=1e-5)

    @pytest.mark.usefixtures("quick_export")
    def test_a_later_version_waits_and_the_commands_it_prints_work(
        self, weights: Path, tmp_path: Path
    ) -> None:
        arguments = ("export", weights, "--name", "tiny", "--store", tmp_path / "a store", *SIZE)
        store = BundleStore(tmp_path / "a store")
        first = timesformer(*arguments)
        assert "activate:" not in first.stdout
        assert first.stderr.splitlines()[0] == f"reading {weights} ..."
        assert first.stderr.splitlines()[-1] == "publishing ..."
        assert first.stdout.startswith("model.onnx: logits within ")
        assert f"published tiny version 1 in {store.root}/tiny/1\n" in first.stdout
        second = timesformer(*arguments)
        assert "published tiny version 2" in second.stdout
        assert store.active("tiny") == "1"
        hints = dict(line.split(": ", 1) for line in second.stdout.splitlines() if ": " in line)
        timesformer(*shlex.split(hints["activate"])[1:])
        assert store.active("tiny") == "2"
        serve = cli.commands["serve"].make_context("serve", shlex.split(hints["serve it"])[2:])
        assert (serve.params["store"], serve.params["model"]) == (str(store.root), "tiny")
        timesformer(*arguments, "--activate")
        assert store.active("tiny") == "3"

    @pytest.mark.usefixtures("quick_export")
    def test_int8_is_exported_on_request_and_served_on_request(
        self, weights: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "store"
        arguments = ("export", weights, "--name", "tiny", "--store", store, *SIZE)
        printed = timesformer(*arguments, "--precision", "int8", "--precision", "float32").stdout
        assert re.search(r"^model\.onnx: logits within .* \(limit \S+\)$", printed, re.M)
        assert re.search(
            r"^model\.int8\.onnx: .*, cosine [01]\.\d{4} \(limit 0\.995\)$", printed, re.M
        )

        classify = ("classify", red, "--store", store, "--device", "cpu", "--json")
        exact = timesformer(*classify).stdout
        assert timesformer(*classify).stdout == exact
        monkeypatch.setenv("TIMESFORMER_PRECISION", "int8")
        assert timesformer(*classify).stdout != exact

    @pytest.mark.usefixtures("quick_export")
    def test_config_says_what_the_file_does_not(self, weights: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"sampling": "uniform", "note": "ours"}')
        store = tmp_path / "store"
        config = ("--config", tmp_path / "config.json")
        timesformer("export", weights, "--name", "tiny", "--store", store, *SIZE, *config)
        assert BundleStore(store).open("tiny").config.preprocessing.sampling == "uniform"

    @pytest.mark.parametrize(
        ("option", "content", "message"),
        [
            ("--config", "{", "is no JSON"),
            ("--config", "[]", "must hold a JSON object"),
            ("--config", '{"num_heads": 3.5}', "num_heads"),
            ("--config", '{"depth": 9}', "depth is 1 in"),
            ("--labels", "one\ntwo\n", "2 labels for a model of 5 classes"),
            ("--labels", "one\none\n", "stands already"),
            ("--name", "", "'../x' is no bundle name"),
            ("checkpoint", "this is text", "file: not a checkpoint"),
            ("checkpoint", None, "file"),
        ],
    )
    def test_what_cannot_be_exported_is_named_in_one_line(
        self, option: str, content: str | None, message: str, weights: Path, tmp_path: Path
    ) -> None:
        file, store = tmp_path / "file", tmp_path / "store"
        if content is not None:
            file.write_text(content)
        arguments: dict[str, object] = {"checkpoint": weights, "--name": "x", "--store": store}
        arguments[option] = "../x" if option == "--name" else file
        checkpoint = arguments.pop("checkpoint")
        options = (word for pair in arguments.items() for word in pair)
        assert message in failure("export", checkpoint, *options)
        assert not store.exists()

    @pytest.mark.usefixtures("quick_export")
    def test_a_broken_video_to_verify_on_is_named(self, weights: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(b"no video")
        arguments = ("export", weights, "--name", "x", "--store", tmp_path / "store", *SIZE)
        assert f"cannot verify on {broken}: " in failure(*arguments, "--verify-on", broken)

    @pytest.mark.usefixtures("quick_export")
    def test_a_full_disk_is_one_line_and_publishes_nothing(
        self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(model: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr("export.pipeline.export_onnx", no_space)
        store = tmp_path / "store"
        line = failure("export", weights, "--name", "x", "--store", store, *SIZE)
        assert (
            line == f"Error: cannot write {store}/x: No space left on device; nothing has changed"
        )
        assert list((store / "x").iterdir()) == []


# ---- bundles ----------------------------------------------------------------------------------


class TestBundles:
    def test_lists_what_is_there(self, store: BundleStore) -> None:
        rows = json.loads(timesformer("bundles", "--store", store.root, "--json").stdout)
        assert [(row["name"], row["version"], row["active"]) for row in rows] == [
            ("colours", "1", True),
            ("colours", "2", False),
        ]
        assert rows[0]["attention_type"] == "divided_space_time"
        assert (rows[0]["classes"], rows[0]["verified"]) == (3, True)
        assert rows[0]["path"] == str(store.root / "colours/1")
        lines = timesformer("bundles", "--store", store.root).stdout.splitlines()
        assert lines[0] == str(store.root)
        assert lines[1].split() == [
            "name", "version", "active", "created", "attention", "type", "classes", "verified",
        ]  # fmt: skip
        created = store.open("colours", "1").manifest.created.isoformat(timespec="seconds")
        assert lines[2].split() == [
            "colours", "1", "yes", created, "divided_space_time", "3", "yes",
        ], "whole, also where there is no terminal"  # fmt: skip
        assert len(lines) == 4

    def test_a_store_without_bundles_says_how_to_make_one(self, tmp_path: Path) -> None:
        assert (
            "`timesformer export` makes one" in timesformer("bundles", "--store", tmp_path).stdout
        )
        assert timesformer("bundles", "--store", tmp_path, "--json").stdout == "[]\n"

    def test_one_that_cannot_be_read_does_not_hide_the_others(self, store: BundleStore) -> None:
        (store.root / "colours/2" / MANIFEST).write_text("{}")
        result = timesformer("bundles", "--store", store.root, "--json", code=3)
        assert [row["version"] for row in json.loads(result.stdout)] == ["1"]
        (line,) = result.stderr.splitlines()
        assert line.startswith("colours 2: ")
        assert "cannot be used: name: Field required; " in line

    def test_activates_and_rolls_back(self, store: BundleStore) -> None:
        option = ("--store", store.root)
        result = timesformer("bundles", "activate", "colours", "2", *option)
        assert result.stdout == "colours version 2 is active\n"
        assert store.active("colours") == "2"
        result = timesformer("bundles", "rollback", "colours", *option, "--json")
        assert json.loads(result.stdout) == {"name": "colours", "version": "1", "active": True}
        assert store.active("colours") == "1"
        assert "no earlier active version" in failure("bundles", "rollback", "colours", *option)

    def test_the_store_may_stand_before_or_after_or_in_the_environment(
        self, store: BundleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        activate = ("activate", "colours")
        timesformer("bundles", *activate, "2", "--store", store.root)
        assert store.active("colours") == "2"
        timesformer("bundles", "--store", store.root, *activate, "1")
        assert store.active("colours") == "1"
        monkeypatch.setenv("TIMESFORMER_STORE", str(store.root))
        timesformer("bundles", *activate, "2")
        assert store.active("colours") == "2"
        monkeypatch.setenv("TIMESFORMER_STORE", str(tmp_path / "another"))
        timesformer("bundles", "--store", store.root, *activate, "1")
        assert store.active("colours") == "1"

    def test_a_candidate_is_named_told_and_taken_back(self, store: BundleStore) -> None:
        def candidate(*arguments: str) -> str:
            command = ("bundles", "candidate", "colours", *arguments, "--store", store.root)
            return timesformer(*command).stdout

        assert candidate() == "no version of colours is tried\n"
        told = "colours version 2: 5.00% of the requests are answered by it\n"
        assert candidate("2", "--canary", "0.05") == candidate() == told
        assert "10.00% of the requests are copied" in candidate("2", "--shadow", "0.1")
        found = json.loads(candidate("--json"))["candidate"]
        assert (found["version"], found["mode"], found["share"]) == ("2", "shadow", 0.1)
        assert candidate("--off") == "no version of colours is tried\n"
        candidate("2", "--canary", "1")
        timesformer("bundles", "activate", "colours", "2", "--store", store.root)
        assert store.candidate("colours") is None, "it is promoted, and tried no more"

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("colours", "2"), 2, "one of --shadow and --canary"),
            (("colours", "--canary", "1"), 2, "one of --shadow and --canary"),
            (("colours", "2", "--canary", "1", "--shadow", "1"), 2, "one of --shadow and --canary"),
            (("colours", "2", "--canary", "1", "--off"), 2, "one of --shadow and --canary"),
            (("colours", "2", "--canary", "0"), 2, "0<x<=1"),
            (("colours", "1", "--canary", "1"), 1, "is the active one"),
            (("colours", "7", "--canary", "1"), 1, "has no version 7"),
            (("nobody", "--off"), 1, "no bundle named nobody"),
        ],
    )
    def test_a_candidate_that_cannot_be_is_refused(
        self, store: BundleStore, arguments: tuple[str, ...], code: int, message: str
    ) -> None:
        command = ("bundles", "candidate", *arguments, "--store", store.root)
        assert message in failure(*command, code=code)
        assert store.candidate("colours") is None

    def test_what_the_store_refuses_is_one_line(self, store: BundleStore, tmp_path: Path) -> None:
        def refused(*arguments: str, store: Path = store.root) -> str:
            return failure("bundles", *arguments, "--store", store)

        assert "has no version 7" in refused("activate", "colours", "7")
        (store.root / "colours/2/labels.txt").write_text("changed")
        assert "its hash is off" in refused("activate", "colours", "2")
        assert store.active("colours") == "1"
        (store.root / "colours" / ACTIVE).write_text("{")
        assert "remove it and activate a version" in refused("rollback", "colours")
        assert "there are no bundles" in refused("verify", store=tmp_path / "empty")
        assert "no bundle named x" in refused("verify", "x", store=tmp_path / "empty")

    def test_verify_checks_one_or_a_name_or_everything(self, store: BundleStore) -> None:
        publish_colours(store, "shapes")
        lines = {
            asked: timesformer("bundles", "verify", *asked, "--store", store.root).stdout
            for asked in ((), ("colours",), ("colours", "2"))
        }
        assert lines == {
            (): "colours 1: ok\ncolours 2: ok\nshapes 1: ok\n",
            ("colours",): "colours 1: ok\ncolours 2: ok\n",
            ("colours", "2"): "colours 2: ok\n",
        }

    def test_verify_goes_on_after_a_damaged_one_and_exits_with_3(self, store: BundleStore) -> None:
        file = store.root / "colours/1" / ONNX_FLOAT32
        file.write_bytes(b"\0" + file.read_bytes()[1:])
        arguments = ("bundles", "verify", "--store", store.root)

        first, second = timesformer(*arguments, code=3).stdout.splitlines()
        assert first == f"colours 1: {file} is not the file that was published: its hash is off"
        assert second == "colours 2: ok"

        output = timesformer(*arguments, "--json", code=3).stdout
        rows = [json.loads(line) for line in output.splitlines()]
        assert [row["ok"] for row in rows] == [False, True]
        assert "its hash is off" in rows[0]["problem"]


# ---- classify ---------------------------------------------------------------------------------


class TestClassify:
    def test_answers_each_file_with_its_options_and_exits_with_3_if_one_is_broken(
        self, store: BundleStore, red: Path, tmp_path: Path
    ) -> None:
        blue = write_video(tmp_path / "blue.mp4", "blue")
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(b"no video")
        options = ("--json", "--store", store.root, "--device", "cpu", "--top-k", "2")
        more = ("--views", "2", "--crops", "3", "--threshold", "0.01")
        result = timesformer("classify", *options, *more, red, broken, blue, code=3)

        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert [answer["file"] for answer in answers] == [str(red), str(broken), str(blue)]
        assert answers[0]["predictions"][0]["label"] == "red"
        assert answers[1]["error"]["code"] == "undecodable_video"
        assert answers[2]["predictions"][0]["label"] == "blue"
        assert (answers[0]["sampling"]["views"], answers[0]["sampling"]["crops"]) == (2, 3)
        assert len(answers[0]["predictions"]) == 2
        lines = timesformer("classify", *options[1:], red).stdout.splitlines()
        assert (lines[0], lines[2].split()[0]) == (str(red), "red"), "a table for people"

    def test_needs_no_torch(self, store: BundleStore, red: Path) -> None:
        process = without_torch("classify", "--json", "--store", store.root, red)
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout)["predictions"][0]["label"] == "red"

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--top-k", "0"), ("--views", "0"), ("--threshold", "2"), ("--threshold", "nan")],
    )
    def test_values_out_of_range_are_usage_errors(self, option: str, value: str) -> None:
        assert failure("classify", option, value, "x.mp4", code=2).startswith(f"Error: {option}: ")

    def test_a_name_is_needed_where_there_are_several(self, store: BundleStore, red: Path) -> None:
        empty = failure("classify", "--store", store.root / "empty", red)
        assert empty == f"Error: the bundle store {store.root / 'empty'} is empty"
        publish_colours(store, "shapes")
        arguments = ("classify", "--store", store.root, "--device", "cpu", red)
        assert "holds colours, shapes: set TIMESFORMER_MODEL" in failure(*arguments)
        assert "shapes has no active version" in failure(*arguments, "--model", "shapes")
        timesformer(*arguments, "--model", "colours")

    def test_the_device_comes_from_the_environment_unless_it_is_given(
        self, store: BundleStore, red: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TIMESFORMER_DEVICE", "cuda")
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
        assert "CUDAExecutionProvider" in failure("classify", "--store", store.root, red)
        timesformer("classify", "--store", store.root, "--device", "cpu", red)


# ---- info -------------------------------------------------------------------------------------


class TestInfo:
    def test_counts_a_variant_with_any_scheme_and_number_of_classes(self) -> None:
        changed = ("--scheme", "axial", "--classes", "174")
        answer = json.loads(timesformer("info", "--variant", "hr", *changed, "--json").stdout)
        config = VARIANTS["hr"].replace(attention_type="axial", num_classes=174)
        assert (answer["variant"], answer["scheme"], answer["classes"]) == ("hr", "axial", 174)
        assert dataclasses.asdict(cost(config)).items() <= answer.items()

    def test_lists_all_variants(self) -> None:
        rows = json.loads(timesformer("info", "--json").stdout)
        assert [row["variant"] for row in rows] == list(VARIANTS)
        lines = timesformer("info").stdout.splitlines()
        assert lines[0] == "divided_space_time: one view, float32, batch 1"
        assert [line.split()[0] for line in lines[2:]] == list(VARIANTS)
        assert max(map(len, lines)) <= 80

    @pytest.mark.parametrize(
        "wrong", [("--variant", "giant"), ("--scheme", "x"), ("--classes", "0")]
    )
    def test_what_does_not_exist_is_a_usage_error(self, wrong: tuple[str, str]) -> None:
        assert f"Invalid value for '{wrong[0]}'" in timesformer("info", *wrong, code=2).stderr


# ---- the command itself -----------------------------------------------------------------------


def all_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for key, each in command.commands.items():
            yield from all_commands(each, f"{name} {key}")


def test_every_command_and_every_option_says_what_it_is_for() -> None:
    silent = [
        f"{name} {parameter.name}"
        for name, command in all_commands(cli, "timesformer")
        for parameter in command.params
        if isinstance(parameter, click.Option) and not (parameter.help or parameter.hidden)
    ]
    silent += [name for name, command in all_commands(cli, "timesformer") if not command.help]
    assert silent == []


def test_a_wrong_command_line_exits_with_2() -> None:
    for wrong in (["nonsense"], ["serve", "--nonsense"], ["classify"], ["export", "x"]):
        result = timesformer(*wrong, code=2)
        assert "Error: " in result.stderr
        assert result.stdout == ""


def test_an_error_that_is_not_known_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("model.network.cost.cost", broken)
    assert isinstance(CliRunner().invoke(cli, ["info"]).exception, ZeroDivisionError)


@pytest.mark.parametrize("end", ["interrupt", "closed pipe"])
def test_interrupted_or_no_longer_read_it_ends_without_a_traceback(
    store: BundleStore, red: Path, end: str
) -> None:
    with subprocess.Popen(
        [TIMESFORMER, "classify", "--json", "--store", store.root, *[red] * 5000],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # each answer is seen as soon as it is there
        if end == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if end == "interrupt" else 1)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


# ---- without torch ----------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "safetensors", "onnx", "onnxscript"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = f"{WITHOUT_TORCH}\nfrom service.__main__ import main\nmain()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_serving_imports_where_torch_is_not_installed() -> None:
    modules = [each.name for each in pkgutil.walk_packages(service.__path__, "service.")]
    # Ray has an environment of its own: `make test-ray`.
    modules = [name for name in modules if name not in NEED_RAY]
    modules += ["export.bundle.bundle", "export.verification.parity", "export.runtime"]
    modules += ["model.demo", "model.network.cost"]
    assert "service.server.app" in modules
    script = WITHOUT_TORCH + "".join(f"import {module}\n" for module in modules)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_help_needs_neither_torch_nor_an_engine() -> None:
    script = """
import sys
from click.testing import CliRunner
from service.cli.main import cli

assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
assert "onnxruntime" not in sys.modules
for command in ("serve", "classify", "export", "bundles", "info"):
    assert CliRunner().invoke(cli, [command, "--help"]).exit_code == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_exporting_without_torch_says_what_to_install(tmp_path: Path) -> None:
    process = without_torch("export", "x.pyth", "--name", "x", "--store", tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("Error: ")
    assert "is not installed: this needs the extra `export`" in process.stderr
    assert len(process.stderr.splitlines()) == 1
