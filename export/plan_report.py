"""The page beside a TensorRT plan, for people: what it is for, in what its layers compute, and what
TensorRT warned of. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from export.inspection import Inspected, by_type, in_words
from export.runtime.plans import PlanFacts
from model.training.markup import Html, tag
from model.training.page import facts_table, folded, section, table, tiles, write_page

_MIB = 1024 * 1024


def plan_report(plan: Path) -> Path:
    """Where the page of a plan lies."""
    return plan.with_suffix(".html")


def write_plan_report(path: Path, facts: PlanFacts, inspected: Inspected | None) -> None:
    """Writes the page.

    Args:
        inspected: what the engine consists of, if the machine could tell.

    Raises:
        OSError: it cannot be written.
    """
    key = facts.key
    title = f"TensorRT plan in {key.precision} for {key.gpu}"
    numbers = [
        ("batches", ", ".join(map(str, key.batches))),
        ("TensorRT", key.tensorrt),
        ("compute capability", key.compute_capability),
        ("MiB", f"{facts.plan.size / _MIB:,.0f}"),
        ("refitted in s" if facts.refitted else "built in s", f"{facts.seconds:,.0f}"),
    ]
    body = [tag("h1", title), tiles(numbers)]
    if facts.warnings:
        told = [tag("p", warning) for warning in facts.warnings]
        body.append(section("Warnings", *told))
    body.append(section("Matrix products of the engine", *_products(inspected)))
    body.append(section("Layers of the engine", *_layers(inspected)))
    note = (
        "As it was read, by kind and by the type of what they give; what only moves data left out."
    )
    network = tag("p", note, class_="soft"), _by_kind(facts.network)
    body.append(section("Layers of the network", *network))
    origin = facts.model_dump(
        mode="json", include={"graph_sha256", "created", "level", "refittable", "refitted"}
    )
    body.append(section("Origin", facts_table({**origin, "sha256_of_the_plan": facts.plan.sha256})))
    write_page(path, title, body)


def _products(inspected: Inspected | None) -> Iterator[Html]:
    if inspected is None:
        yield tag("p", "The engine could not be inspected where it was built.")
        return
    yield tag(
        "p", f"By what they compute in: {in_words(inspected.products_by_type) or 'none named'}."
    )
    rows = [[product.type, product.name, product.kernel] for product in inspected.products]
    yield folded(f"all {len(rows)}", table(["computes in", "layer", "kernel"], rows))


def _layers(inspected: Inspected | None) -> Iterator[Html]:
    if inspected is None:
        return
    yield tag("p", f"By the type of what they give: {in_words(by_type(inspected.layers))}.")
    yield folded("by kind, in TensorRT's words", _by_kind(inspected.layers))


def _by_kind(layers: Mapping[str, Mapping[str, int]]) -> Html:
    rows = [[kind, type_, str(count)] for kind in layers for type_, count in layers[kind].items()]
    return table(["kind", "type", "layers"], rows)
