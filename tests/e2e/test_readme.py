"""The README, followed word for word: its commands run, its answer has the fields it shows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from export.bundle.bundle import BundleStore
from model.demo import SAMPLE_CLIP
from service.cli.commands.refresh import EXIT_NOT_ACTIVATED
from tests.e2e.conftest import TIMESFORMER, StartService

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WHOLE_WAY = "### All of it, once, on a laptop\n"


def commands(text: str) -> list[list[str]]:
    """The lines of all blocks of shell, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = commands(re.sub(f"{WHOLE_WAY}.*?\n## ", "## ", README, flags=re.DOTALL))


def test_the_curl_lines_get_the_answer_that_is_shown(start_service: StartService) -> None:
    inline = re.findall(r"`(curl [^`]+) \.\.\.`", README)
    curls = [command for command in COMMANDS if command[0] == "curl"]
    url = next(word for word in curls[0] if word.startswith("http"))
    curls += [[*shlex.split(line), url] for line in inline]
    assert len(curls) == 2
    with start_service() as service:
        for command in curls:
            words = [
                word.replace("http://localhost:8000", str(service.client.base_url).rstrip("/"))
                for word in command
            ]
            run = subprocess.run(
                [*words, "--silent", "--fail"], cwd=ROOT, capture_output=True, check=True
            )
            answer = json.loads(run.stdout)
            shown = json.loads(re.findall(r"```json\n(.*?)```", README, re.DOTALL)[0])
            assert answer.keys() == shown.keys()
            assert answer["predictions"][0]["label"] == shown["predictions"][0]["label"]
            assert answer["timings_ms"].keys() == shown["timings_ms"].keys()
            assert answer["sampling"].keys() == shown["sampling"].keys()
            assert shown["video"].keys() - {"..."} <= answer["video"].keys()
        assert service.client.get("/docs").status_code == 200


def test_the_commands_run_in_their_order(tmp_path: Path, start_service: StartService) -> None:
    pytest.importorskip("torch")
    _published_weights(tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{TIMESFORMER.parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran = []
    for command in COMMANDS:
        if command[0] == "export":
            environment |= dict(word.split("=", 1) for word in command[1:])
        if command[0] != "timesformer":
            continue
        ran.append(command[1])
        if command[1] == "serve":
            store = str(tmp_path / environment["TIMESFORMER_STORE"])
            with start_service("--store", store, *command[2:]) as service:
                assert service.client.get("/health/ready").status_code == 200
            continue
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stdout, run.stderr)
    assert {"export", "serve", "bundles", "classify", "label", "info"} <= set(ran)


# How many videos, steps ... of the README's way are enough to see that every command works.
FEW = {"--videos": ("12", "24"), "--held-out": ("12",), "--clips": ("48",), "--steps": ("2",),
       "--epochs": ("1",)}  # fmt: skip


def test_the_whole_way_from_no_data_to_a_refreshed_service(
    tmp_path: Path, start_service: StartService
) -> None:
    """With few videos and steps, after which the refresh may be better or not."""
    pytest.importorskip("torch")
    (setup, *steps) = commands(README.partition(WHOLE_WAY)[2].partition("\n## ")[0])
    assert setup == ["make", "setup", "&&", ".", ".venv/bin/activate"]
    (tmp_path / "model/demo").mkdir(parents=True)
    (tmp_path / "model/demo/recipe.json").write_bytes(
        (ROOT / "model/demo/recipe.json").read_bytes()
    )
    environment = {
        **os.environ,
        "PATH": f"{TIMESFORMER.parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    few = {option: iter(values) for option, values in FEW.items()}
    with contextlib.ExitStack() as stack:
        for words in steps:
            for place, word in enumerate(words):
                if word in few:
                    words[place + 1] = next(few[word], FEW[word][-1])
            if words[1] == "serve":
                store = str(tmp_path / words[words.index("--store") + 1])
                flags = [store if word == "store" else word for word in words[2:]]
                service = stack.enter_context(start_service(*flags))
                continue
            run = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            refused = words[1] == "refresh" and run.returncode == EXIT_NOT_ACTIVATED
            assert run.returncode == 0 or refused, (words, run.stdout, run.stderr)
        answer = service.client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes()).json()
    assert answer["model"]["name"] == "motions"
    refreshed = BundleStore(tmp_path / "store").open("motions", "2")
    refreshed.verify()
    assert "comparison" in (refreshed.manifest.training or {})["refresh"]
    assert (tmp_path / "run/report.html").exists()
    assert (tmp_path / "evaluation.html").exists()


def _published_weights(folder: Path) -> None:
    """Small stand-ins under the names that the README uses, of a published width."""
    from model.checkpoints import save_huggingface, save_official
    from model.config import ModelConfig
    from model.network.timesformer import TimeSformer

    config = ModelConfig().replace(embed_dim=192, num_heads=3, depth=1, image_size=32, num_frames=2)
    network = TimeSformer(config)
    labels = [f"action {number}" for number in range(400)]
    save_official(network, folder / "TimeSformer_divST_8x32_224_K400.pyth")
    (folder / "kinetics400.txt").write_text("\n".join(labels) + "\n")
    hub = folder / "facebook/timesformer-base-finetuned-k400"
    hub.parent.mkdir()
    save_huggingface(network, hub, labels)
    (folder / "videos").mkdir()
    for video in ("clip.mp4", "videos/clip.mp4"):
        (folder / video).write_bytes(SAMPLE_CLIP.read_bytes())
