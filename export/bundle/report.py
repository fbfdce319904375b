"""`report.html` of a bundle, for people: what was exported, how near it is to the network, and what
was given up for that. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from export.bundle.manifest import GRAPHS, MANIFEST, Manifest, Parity, ProductReport
from model.reports.html import Html, tag
from model.reports.page import facts_table, folded, percent, section, table, tiles, write_page

_MIB = 1024 * 1024


def write_report(path: Path, manifest: Manifest) -> None:
    """Writes the page beside the files that it is about.

    Args:
        manifest: all but its `version`, `created` and `files`, which publishing fills in.

    Raises:
        OSError: it cannot be written.
    """
    body = [
        tag("h1", f"Export of {manifest.name}"),
        _summary(manifest),
        section("Agreement with the network", *_agreement(manifest)),
        section("What is served", *_served(manifest)),
    ]
    if manifest.products:
        body.append(section("Matrix products", *_products(manifest)))
    if manifest.calibration is not None:
        body.append(section("Calibration", *_calibration(manifest)))
    body.append(section("Network", *_network(manifest)))
    if manifest.training:
        body.append(section("Training", facts_table(manifest.training)))
    body.append(section("Files and software", *_files(manifest, path.parent)))
    write_page(path, f"Export of {manifest.name}", body)


def _summary(manifest: Manifest) -> Html:
    config = manifest.config
    facts = [
        ("frames of a clip", f"{config.num_frames} x {config.image_size} x {config.image_size}"),
        ("classes", f"{len(manifest.labels):,}"),
    ]
    if manifest.network_cost and manifest.graph_cost:
        facts += [
            ("parameters", _short(manifest.network_cost.parameters)),
            ("multiply-adds", _short(manifest.graph_cost.multiply_adds)),
        ]
    facts += [
        ("graphs that passed", str(len(manifest.verification))),
        ("graphs that failed", str(len(manifest.rejected))),
    ]
    return tiles(facts)


def _agreement(manifest: Manifest) -> Iterator[Html]:
    yield tag(
        "p",
        "Each graph beside the float32 network in PyTorch, on the same clips. Cosines are of the "
        "worst clip, each clip's mean taken away; errors are how long what it is off by is beside "
        "that, the worst clip's too; divergence is of the scores, in nats. Close "
        "calls are clips whose best two logits are within noise of each other, and on how many of "
        "them the label stays. After a sign stands the limit.",
        class_="soft",
    )
    columns = [
        *("graph", "clips", "logits off by", "mean", "cosine", "error"),
        *("embedding off by", "cosine", "error"),
        *("divergence", "top-1", "top-5", "close calls"),
    ]
    yield table(columns, [[name, *_row(each)] for name, each in manifest.verification.items()])
    if not any(each.low_margin_clips for each in manifest.verification.values()):
        yield tag(
            "p",
            "No clip was a close call, so what becomes of those is not known: export with more "
            "--verify-on videos.",
            class_="soft",
        )


def _row(parity: Parity) -> list[str]:
    close = "none"
    if parity.low_margin_clips:
        share = _share(parity.low_margin_agreement)
        close = f"{share} of {parity.low_margin_clips}"
    return [
        str(parity.clips),
        _limited(f"{parity.max_difference:.2g}", parity.limit, "≤"),
        f"{parity.mean_difference:.2g}",
        _limited(_cosine(parity.centred_cosine), parity.cosine_limit, "≥"),
        _limited(_short_of(parity.relative_error), parity.error_limit, "≤"),
        f"{parity.embedding_max_difference:.2g}",
        _limited(_cosine(parity.embedding_cosine), parity.cosine_limit, "≥"),
        _limited(_short_of(parity.embedding_relative_error), parity.error_limit, "≤"),
        _limited(_short_of(parity.softmax_divergence), parity.divergence_limit, "≤"),
        percent(parity.top1_agreement),
        _share(parity.top5_agreement),
        close,
    ]


def _limited(value: str, limit: float | None, sign: str) -> str:
    """What was measured, and what it had to be."""
    return value if limit is None else f"{value} {sign} {limit:.4g}"


def _short_of(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _served(manifest: Manifest) -> Iterator[Html]:
    if manifest.rejected:
        yield tag("p", "Graphs that were tried and are left out:")
        yield table(["graph", "why"], [list(each) for each in manifest.rejected.items()])
    if not manifest.fastest:
        yield tag("p", "Which graph is the fastest was not asked: see --precision auto.")
    for device, choice in manifest.fastest.items():
        order = ", ".join(choice.order)
        yield tag("p", f"{device.upper()}, the fastest first: {order}; {choice.reason}.")
    yield tag("p", f"Logits are divided by {manifest.temperature:g} to become scores.")


def _products(manifest: Manifest) -> Iterator[Html]:
    note = (
        "Largest numbers on the calibration clips: of both factors and of the result. FP16 ends at "
        "65,504. Off by: what 8 bits cost the result, of its own length."
    )
    yield tag("p", note, class_="soft")
    columns = ["product", "computed in", "first factor", "second factor", "result", "off by"]
    for name in (file for file in GRAPHS.values() if file in manifest.products):
        products = manifest.products[name]
        counted = Counter(each.precision for each in products)
        told = ", ".join(f"{count} in {precision}" for precision, count in counted.most_common())
        yield tag("h3", f"{name}: {told}")
        stays = [each for each in products if each.reason]
        if stays:
            rows = [[*_product(each), each.reason or ""] for each in stays]
            yield table([*columns, "why not in fewer bits"], rows)
        else:
            yield tag("p", "None was held back.", class_="soft")
        largest = sorted(products, key=lambda each: -max(*each.inputs, each.output))
        everything = table(columns, [_product(each) for each in largest])
        yield folded(f"all {len(products)} products, the largest numbers first", everything)


def _product(product: ProductReport) -> list[str]:
    error = "" if product.error is None else percent(product.error)
    numbers = [f"{value:.4g}" for value in (*product.inputs, product.output)]
    return [product.name, product.precision, *numbers, error]


def _calibration(manifest: Manifest) -> Iterator[Html]:
    calibration = manifest.calibration
    if calibration is None:
        return
    yield tag("p", f"Ranges were measured on {calibration.clips} clips: {calibration.source}.")
    if calibration.methods:
        note = "How much of the range 8 bits cover, and the least cosine with each way:"
        yield tag("p", note, class_="soft")
        columns = sorted({way for ways in calibration.agreement.values() for way in ways})
        rows = [
            [file, taken, *(_cosine(calibration.agreement[file].get(way)) for way in columns)]
            for file, taken in calibration.methods.items()
        ]
        yield table(["graph", "taken", *columns], rows)


def _network(manifest: Manifest) -> Iterator[Html]:
    before, after = manifest.network_cost, manifest.graph_cost
    if before and after:
        rows = [
            ["parameters", f"{before.parameters:,}", f"{after.parameters:,}"],
            ["multiply-adds of a view", f"{before.multiply_adds:,}", f"{after.multiply_adds:,}"],
        ]
        yield table(["", "as trained", "as exported"], rows)
    yield tag("h3", "Architecture and preprocessing")
    yield facts_table({**manifest.architecture, **manifest.preprocessing})
    yield folded(f"{len(manifest.labels):,} labels", tag("p", ", ".join(manifest.labels)))


def _files(manifest: Manifest, folder: Path) -> Iterator[Html]:
    """What lies in the folder by now; `manifest.json` is written last and has the hashes."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    rows = [[path.name, f"{path.stat().st_size / _MIB:,.2f}"] for path in files]
    yield table(["file", "MiB"], rows)
    yield tag("p", f"Their hashes, and all of this for programs, are in {MANIFEST}.", class_="soft")
    origin = {
        "weights from": manifest.source,
        "sha256 of the weights": manifest.weights_sha256,
        "version before": manifest.parent or "none",
    }
    yield facts_table({**origin, **manifest.software})


def _short(count: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:,.2f} {letter}"
    return f"{count:,}"
