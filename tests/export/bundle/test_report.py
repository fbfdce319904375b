"""The page that a bundle is published with: it says what the manifest says, is one file, and takes
nobody's words for markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from export.bundle.bundle import Bundle
from export.bundle.manifest import (
    LABELS,
    ONNX_FLOAT32,
    ONNX_FP8,
    ONNX_FP16,
    ONNX_INT8,
    REPORT,
    CalibrationReport,
    Choice,
    Cost,
    ProductReport,
)
from export.bundle.report import write_report
from tests.export.conftest import PASSED, colour_manifest
from tests.model.reports.pages import LOADING, Page, read

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'
EIGHT_BITS = PASSED.model_copy(
    update={
        "limit": None,
        "cosine_limit": 0.995,
        "centred_cosine": 0.99712,
        "embedding_cosine": 0.99634,
        "low_margin_clips": 2,
        "low_margin_agreement": 0.5,
    }
)
FULL: dict[str, Any] = {
    "verification": {ONNX_FLOAT32: PASSED, ONNX_FP8: EIGHT_BITS},
    "network_cost": Cost(parameters=121_000_000, multiply_adds=195_830_000_000),
    "graph_cost": Cost(parameters=107_000_000, multiply_adds=173_120_000_000),
    "products": {
        ONNX_FP8: (
            ProductReport(name="head/MatMul", precision="fp8", inputs=(2.5, 0.5), output=9.75),
            ProductReport(
                name="mlp/MatMul",
                precision="fp16",
                inputs=(31_000, 0.5),
                output=12,
                error=0.137,
                reason="in FP8 it would be off",
            ),
        )
    },
    "calibration": CalibrationReport(
        source="clips",
        clips=12,
        methods={ONNX_FP8: "mse"},
        agreement={ONNX_FP8: {"max": 0.99611, "mse": 0.99722}},
    ),
    "fastest": {"gpu": Choice(order=("fp8", "float32"), reason="by rates")},
    "rejected": {ONNX_INT8: "differs by whole logits"},
    "temperature": 1.25,
    "training": {"top1": 0.875, "recipe": {"epochs": 7}},
    "parent": "3",
    "software": {"onnx": "1.19"},
}


def page(folder: Path, **changes: Any) -> Page:
    (folder / LABELS).write_text("red\n" * 200_000)
    write_report(folder / REPORT, colour_manifest().model_copy(update=changes))
    return read(folder / REPORT)


def test_it_says_what_the_manifest_says(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", page(tmp_path, **FULL).text)
    for words in (
        "Export of colours", "parameters 121.00 M", "multiply-adds 173.12 G",
        "parameters 121,000,000 107,000,000", "195,830,000,000 173,120,000,000",
        "model.onnx 2 0 ≤ 0.0001", "0.997120 ≥ 0.995", "0.996340 ≥ 0.995", "50.0% of 2",
        "model.int8.onnx differs by whole logits", "GPU, the fastest first: fp8, float32; by rates",
        "divided by 1.25", "model.fp8.onnx: 1 in fp8, 1 in fp16",
        "mlp/MatMul fp16 3.1e+04 0.5 12 13.7% in FP8 it would be off",
        "on 12 clips: clips", "model.fp8.onnx mse 0.996110 0.997220", "top1 0.875", "epochs 7",
        "labels.txt 0.76", "version before 3", "onnx 1.19", "attention type divided_space_time",
    ):  # fmt: skip
        assert words in text, words
    # All products, also those that nothing is to be said of, the largest numbers first.
    assert text.rindex("head/MatMul fp8 2.5 0.5 9.75") > text.rindex("mlp/MatMul fp16")


def test_a_bare_export_has_no_empty_sections(tmp_path: Path) -> None:
    text = page(tmp_path).text
    for words in ("Matrix products", "Calibration", "Training", "left out", "None", "None was"):
        assert words not in text, words


def test_it_loads_nothing_and_takes_no_words_for_markup(tmp_path: Path) -> None:
    product = ProductReport(
        name=HOSTILE, precision="fp16", inputs=(1, 1), output=1, error=0.5, reason=HOSTILE
    )
    shown = page(
        tmp_path,
        **{
            **FULL,
            "name": HOSTILE,
            "labels": (HOSTILE, "ä", "läuft 跑"),
            "source": HOSTILE,
            "products": {ONNX_FP16: (product,)},
            "calibration": CalibrationReport(source=HOSTILE, clips=1, methods={HOSTILE: HOSTILE},
                                             agreement={HOSTILE: {HOSTILE: 1.0}}),
            "fastest": {"cpu": Choice(order=(HOSTILE,), reason=HOSTILE)},
            "rejected": {HOSTILE: HOSTILE},
            "training": {HOSTILE: HOSTILE},
            "software": {HOSTILE: HOSTILE},
        },
    )  # fmt: skip
    assert not shown.names() & (LOADING | {"img"})
    assert shown.text.count(HOSTILE) >= 15
    assert "läuft 跑" in shown.text
    policy = next(a["content"] for name, a in shown.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "http" not in (tmp_path / REPORT).read_text().replace("http-equiv", "")


def test_it_is_published_hashed_and_of_this_export(exported: Bundle) -> None:
    text = read(exported.file(REPORT)).text
    assert "Export of tiny" in text
    assert "model.onnx" in text
    assert "top1" in text
    assert REPORT in exported.manifest.files
