"""Measurements of earlier builds, and earlier plans with new weights. Both need a GPU, also with
TensorRT-RTX: here the calls and their order, on stand-ins."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.runtime.plans import Plan, PlanError, PlanKey
from export.runtime.tensorrt import Wanted
from export.tensorrt import build_cache as reuse
from export.tensorrt.builder import BuildJob, build_plan
from tests.export.tensorrt.test_builder import Loading, built_here, colours, folder, job, key
from tests.export.tensorrt.test_inspector import INSPECTED, engine

__all__ = ["colours", "folder"]  # fixtures


class FakeCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, other: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "another GPU's measurements would be taken for this one's"
        if other.content == b"other gpu":
            return False
        self.content += b"+" + other.content
        return True

    def serialize(self) -> bytes:
        return self.content


class FakeConfig:
    """Of another GPU is what says so."""

    cache: FakeCache | None = None

    def create_timing_cache(self, content: bytes) -> FakeCache | None:
        return None if content == b"damaged" else FakeCache(content)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content == b"other gpu":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> FakeCache | None:
        return FakeCache(b"measured") if self.cache else None


class TestTimings:
    @pytest.mark.parametrize(
        ("before", "used"),
        [(None, b""), (b"known", b"known"), (b"damaged", b""), (b"other gpu", b"")],
    )
    def test_they_are_used_and_begun_anew_where_they_do_not_fit(
        self, tmp_path: Path, before: bytes | None, used: bytes
    ) -> None:
        path = tmp_path / "timings"
        if before is not None:
            path.write_bytes(before)
        config, log = FakeConfig(), SimpleNamespace(warnings=[])
        reuse.use_timings(config, (path,), log)
        assert config.cache is not None
        assert config.cache.content == used
        assert bool(log.warnings) == (before in (b"damaged", b"other gpu"))

    @pytest.mark.parametrize(
        ("others", "kept"),
        [
            (None, b"measured"),
            (b"another build's", b"measured+another build's"),
            (b"damaged", b"measured"),
            (b"other gpu", b"measured"),
        ],
    )
    def test_they_are_kept_beside_those_of_other_builds_of_this_gpu_alone(
        self, tmp_path: Path, others: bytes | None, kept: bytes
    ) -> None:
        path = tmp_path / "caches" / "timings"
        if others is not None:
            path.parent.mkdir()
            path.write_bytes(others)
        config, log = FakeConfig(), SimpleNamespace(warnings=[])
        reuse.use_timings(config, (), log)
        reuse.keep_timings(config, path, log)
        assert path.read_bytes() == kept
        assert bool(log.warnings) == (others == b"other gpu")

    def test_a_folder_that_cannot_be_written_to_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "a file").touch()
        config, log = FakeConfig(), SimpleNamespace(warnings=[])
        reuse.use_timings(config, (), log)
        reuse.keep_timings(config, tmp_path / "a file" / "timings", log)
        assert "were not kept" in log.warnings[0]

    def test_each_gpu_and_tensorrt_has_a_file_of_its_own(self, tmp_path: Path) -> None:
        files = {
            reuse.timings_file(tmp_path, each)
            for each in (
                key(),
                key(precision="fp16"),
                key(batches=(1,)),
                key(gpu="NVIDIA L4", compute_capability="8.9"),
                key(tensorrt="11.5"),
            )
        }
        assert len(files) == 3

    def test_a_version_begins_with_what_the_one_before_measured(
        self, colours: Path, tmp_path: Path
    ) -> None:
        files = []
        for age, version in enumerate(("2", "1")):
            file = reuse.timings_file(tmp_path / version / "engines", key())
            file.parent.mkdir(parents=True)
            file.write_bytes(version.encode())
            os.utime(file, (1000 - age, 1000 - age))
            files.append(file)
        found = BuildJob.of(wanted(colours, tmp_path / "3" / "engines", key()))
        assert found.earlier_timings == tuple(files)
        config, log = FakeConfig(), SimpleNamespace(warnings=[])
        assert found.timings is not None
        reuse.use_timings(config, (found.timings, *found.earlier_timings), log)
        assert config.cache is not None
        assert config.cache.content == b"2"

    def test_a_build_keeps_them_beside_its_plan(self, colours: Path, folder: Path) -> None:
        """The calls are real; what TensorRT-RTX measures is nothing."""
        found = BuildJob.of(wanted(colours, folder, key()))
        built_here(Loading(engine(INSPECTED)), found)
        assert found.timings == folder / "nvidia-h200_sm90_trt11.4.0.106.timings"
        assert found.timings.stat().st_size > 0


def wanted(graph: Path, folder: Path, of: PlanKey) -> Wanted:
    return Wanted(of, graph, job(graph, folder).graph_sha256, folder)


def refitting(
    missing: tuple[str, ...] = (), fits: bool = True, **more: Any
) -> tuple[list[str], dict[str, Any]]:
    """Calls that are made, and the parts of TensorRT that refit."""
    calls: list[str] = []
    config = SimpleNamespace(
        clear_flag=lambda flag: calls.append(f"clear {flag}"),
        set_flag=lambda flag: calls.append(f"set {flag}"),
    )
    loaded = SimpleNamespace(
        create_serialization_config=lambda: config,
        serialize_with_config=lambda config: b"new plan",
        create_engine_inspector=engine(INSPECTED).create_engine_inspector,
    )
    refitter = SimpleNamespace(
        get_missing_weights=lambda: missing,
        refit_cuda_engine=lambda: calls.append("refit") or True,
    )
    parser = SimpleNamespace(refit_from_file=lambda path: fits)
    return calls, {
        "engine": loaded,
        "Refitter": lambda engine, log: refitter,
        "OnnxParserRefitter": lambda refitter, log: parser,
        "SerializationFlag": SimpleNamespace(EXCLUDE_WEIGHTS="weights", INCLUDE_REFIT="refit"),
        **more,
    }


def refittable(colours: Path, folder: Path, **changes: Any) -> Plan:
    """A plan of another version, said to be refittable: TensorRT-RTX builds such ones on GPUs."""
    old = build_plan(job(colours, folder))
    facts = old.facts.model_copy(update={"refittable": True, **changes})
    old.path.with_suffix(".json").write_text(facts.model_dump_json())
    return Plan(old.path, facts)


class TestRefit:
    def refit(self, module: dict[str, Any], plan: Plan, colours: Path) -> bytes:
        trt: Any = Loading(**module)
        return reuse.refit(trt, plan, colours, SimpleNamespace(why=lambda: "shapes differ"))

    def test_the_new_plan_has_its_weights_and_can_be_refitted_again(
        self, colours: Path, folder: Path
    ) -> None:
        calls, module = refitting()
        assert self.refit(module, refittable(colours, folder), colours) == b"new plan"
        assert calls == ["refit", "clear weights", "set refit"]

    def test_weights_that_are_missing_or_do_not_fit_are_an_error(
        self, colours: Path, folder: Path
    ) -> None:
        plan = refittable(colours, folder)
        with pytest.raises(PlanError, match=r"no weights for head\.bias"):
            self.refit(refitting(("head.bias",))[1], plan, colours)
        with pytest.raises(PlanError, match="shapes differ"):
            self.refit(refitting(fits=False)[1], plan, colours)

    def test_only_a_refittable_plan_of_the_same_network_is_refitted(
        self, colours: Path, tmp_path: Path
    ) -> None:
        old = refittable(colours, tmp_path / "1" / "engines")
        folder = tmp_path / "2" / "engines"
        sources = reuse.refit_sources(folder, key())
        assert sources == (old.path.with_suffix(".json"),)
        assert reuse.fitting_source(sources, key(), old.facts.structure, 3) == old
        assert reuse.fitting_source(sources, key(), old.facts.structure, 4) is None
        assert reuse.fitting_source(sources, key(), "another", 3) is None
        assert reuse.refit_sources(folder, key(precision="fp16")) == ()
        for refits in (True, False):
            found = BuildJob.of(wanted(colours, folder, key()), refittable=refits)
            assert found.refit_from == (sources if refits else ())

    def test_the_newest_that_fits_is_taken_and_not_the_newest(
        self, colours: Path, tmp_path: Path
    ) -> None:
        old = refittable(colours, tmp_path / "1" / "engines")
        newer = refittable(colours, tmp_path / "2" / "engines", structure="of a larger network")
        sources = reuse.refit_sources(tmp_path / "3" / "engines", key())
        assert sources == (newer.path.with_suffix(".json"), old.path.with_suffix(".json"))
        assert reuse.fitting_source(sources, key(), old.facts.structure, 3) == old


class TestBuildingByRefit:
    def job(self, colours: Path, tmp_path: Path) -> BuildJob:
        old = refittable(colours, tmp_path / "1" / "engines")
        source = old.path.with_suffix(".json")
        return job(colours, tmp_path / "2" / "engines", refit_from=(source,))

    def test_an_earlier_plan_becomes_the_new_one(self, colours: Path, tmp_path: Path) -> None:
        facts = built_here(Loading(**refitting()[1]), self.job(colours, tmp_path))
        assert (facts.refitted, facts.refittable, facts.plan.size) == (True, True, len(b"new plan"))

    def test_one_that_cannot_be_refitted_is_no_reason_not_to_build(
        self, colours: Path, tmp_path: Path
    ) -> None:
        def fail(engine: object, log: object) -> None:
            raise TypeError("factory function returned nullptr")

        for module in (refitting(fits=False)[1], refitting(Refitter=fail)[1]):
            told = self.job(colours, tmp_path).model_copy(update={"rebuild": True})
            facts = built_here(Loading(**module), told)
            assert (facts.refitted, facts.plan.size > 1000) == (False, True)
            (warning,) = facts.warnings
            assert warning.startswith("not refitted but built: ")
        told.refit_from[0].with_suffix(".plan").write_bytes(b"damaged")
        facts = built_here(Loading(**refitting()[1]), told)
        assert not facts.refitted
        assert "not the plan that was built" in facts.warnings[0]
