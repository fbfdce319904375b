"""`data check`: what cannot be used is found and named, the rest is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from model.config import Preprocessing
from model.data.check import Report, check
from model.data.lists import read_videos
from service.cli.main import cli
from tests.model.conftest import flat, write_video

SHORT_CLIPS = Preprocessing(num_frames=4, image_size=16, frame_stride=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a", "b"):
        (folder / name).mkdir()
    good = write_video(folder / "a" / "good.mp4")
    shutil.copy(good, folder / "a" / "same.mp4")
    (folder / "a" / "text.mp4").write_text("no video")
    whole = good.read_bytes()
    (folder / "b" / "empty.mp4").touch()
    write_video(folder / "b" / "fine.mp4", paint=flat(9, 9, 200))
    write_video(folder / "b" / "short.mp4", frames=6)
    (folder / "b" / "link.mp4").symlink_to("nowhere")
    (folder / "b" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


def kinds(report: Report) -> dict[str, str]:
    return {Path(problem.path).name: problem.kind for problem in report.problems}


@pytest.mark.parametrize("processes", [0, 2])
def test_every_problem_is_found_and_the_rest_kept(folder: Path, processes: int) -> None:
    counted: list[int] = []
    report = check(read_videos(folder), SHORT_CLIPS, processes=processes, done=counted.append)
    assert kinds(report) == {
        "same.mp4": "duplicate",
        "text.mp4": "undecodable",
        "cut.mp4": "undecodable",  # its index was at the end
        "empty.mp4": "undecodable",
        "link.mp4": "unreadable",
        "short.mp4": "too_short",
    }
    assert [Path(sample.path).name for sample in report.clean.samples] == ["good.mp4", "fine.mp4"]
    assert report.clean.labels == ("a", "b")
    assert counted == list(range(1, 9))
    assert all(
        problem.path == read_videos(folder).samples[problem.line - 1].path
        for problem in report.problems
    )


def test_short_videos_may_be_kept(folder: Path) -> None:
    report = check(read_videos(folder), SHORT_CLIPS, keep_short=True)
    assert "short.mp4" not in kinds(report)


def test_uniform_clips_need_frames_not_seconds(folder: Path) -> None:
    uniform = Preprocessing(num_frames=7, image_size=16, sampling="uniform")
    (problem,) = (p for p in check(read_videos(folder), uniform).problems if "short" in p.path)
    assert problem.detail == "It has 6 frames, a clip 7."
    uniform = Preprocessing(num_frames=6, image_size=16, sampling="uniform")
    assert "short.mp4" not in kinds(check(read_videos(folder), uniform))


def test_a_file_with_two_labels_is_kept_under_neither(folder: Path, tmp_path: Path) -> None:
    good = folder / "a" / "good.mp4"
    (tmp_path / "list.csv").write_text(f"{good},run\n{good},sit\n{folder}/b/fine.mp4,sit\n")
    report = check(read_videos(tmp_path / "list.csv"), SHORT_CLIPS)
    assert [problem.kind for problem in report.problems] == ["contradictory"] * 2
    assert "run, sit" in report.problems[0].detail
    assert report.clean.counts() == [0, 1]


def test_the_command_names_problems_and_leaves_a_clean_list(folder: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean.csv"
    command = ["data", "check", str(folder), "--variant", "demo", "--workers", "0"]
    result = CliRunner().invoke(cli, [*command, "--clean", str(clean), "--json"])
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert summary["videos"] == 8
    assert summary["usable"] == 2
    assert summary["classes"] == {"a": 1, "b": 1}
    assert {problem["kind"] for problem in summary["problems"]} >= {"duplicate", "undecodable"}
    assert [Path(sample.path).name for sample in read_videos(clean).samples] == [
        "good.mp4",
        "fine.mp4",
    ]
    result = CliRunner().invoke(cli, command)
    assert "2 of 8 videos can be used" in result.stdout
    assert "short.mp4" in result.stdout

    result = CliRunner().invoke(cli, ["data", "check", str(clean), *command[3:]])
    assert result.exit_code == 0, result.output


def test_a_source_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("just-a-path\n")
    result = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "x.csv")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
