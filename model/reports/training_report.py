"""`report.html`: a run, and what its model says of the validation videos, as one page for people.

One file without scripts, which loads nothing: its policy forbids it. No torch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import Preprocessing
from model.data.process_pool import in_processes
from model.data.remote import without_secrets
from model.evaluation.calibration import Calibration
from model.evaluation.metrics import Predictions, confidence_bins, measure
from model.reports.html import Html, join, tag
from model.reports.page import facts_table, folded, percent, section, table, tiles, write_page
from model.reports.plots import confusion_matrix, line_chart, reliability_diagram, share_bar
from model.reports.thumbnails import FRAMES, SIDE, load_strip
from model.scores import mean_scores
from model.video import UndecodableVideo, VideoError

PAGE = "report.html"
_MATRIX_CLASSES = 40  # more make no picture that can be read
_PAIRS, _WORST, _REPLACED, _OPEN_CLASSES = 40, 24, 100, 60  # rows shown


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What a model says of validation videos, and how its scores are made of it."""

    predictions: Predictions
    preprocessing: Preprocessing
    temperature: float = 1.0
    calibration: Calibration | None = None

    @functools.cached_property
    def scores(self) -> NDArray[np.float64]:
        """(videos, classes), as served."""
        return mean_scores(self.predictions.logits, self.temperature)

    @functools.cached_property
    def given(self) -> NDArray[np.int64]:
        """The class with the highest score of each video."""
        return np.asarray(self.scores.argmax(1), np.int64)  # of equal scores the first


def write_report(
    path: Path,
    title: str,
    about: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    evaluated: Evaluated | None = None,
    *,
    processes: int = 0,
) -> None:
    """Writes the page, or replaces it whole.

    Args:
        title: the run's, or the model's.
        about: what stands in `training.json`; sections of what is not there are left out.
        events: of the run's log.
        evaluated: None where there are no validation videos.
        processes: that decode the thumbnails; 0 decodes here.

    Raises:
        OSError: it cannot be written.
    """
    body = [tag("h1", title), _summary(about, evaluated)]
    if events:
        body.append(section("Curves", *_curves(events)))
    if evaluated is None:
        body.append(
            section("Evaluation", tag("p", "There were no validation videos.", class_="soft"))
        )
    else:
        body += [
            section("Confusion", *_confusion(evaluated)),
            section("Classes", _classes(evaluated)),
            section("Worst clips", *_worst(evaluated, processes)),
            section("Calibration", *_calibration(evaluated)),
        ]
    if "refresh" in about:
        body.append(section("Beside the active version", *_comparison(about["refresh"])))
    body += [
        section("Videos that were left out", *_left_out(events, evaluated)),
        section("Recipe", *_facts(about)),
    ]
    write_page(path, title, body)


# ---- sections -----------------------------------------------------------------------------------


def _summary(about: Mapping[str, Any], evaluated: Evaluated | None) -> Html:
    facts: list[tuple[str, str]] = []
    if evaluated is not None:
        metrics = measure(evaluated.predictions, evaluated.temperature)
        facts += [
            ("top-1", percent(metrics.top1)),
            ("top-5", percent(metrics.top5)),
            ("mean class accuracy", percent(metrics.mean_class_accuracy)),
            ("log loss", f"{metrics.log_loss:.3f}"),
            ("calibration error", percent(metrics.calibration_error)),
            ("videos evaluated", f"{metrics.videos:,}"),
        ]
    if "steps" in about:
        facts.append(("steps", f"{about['steps']:,}"))
    if "videos" in about:
        facts.append(("videos trained on", f"{about['videos']:,}"))
    if "seconds" in about:
        facts.append(("training, minutes", f"{about['seconds'] / 60:,.1f}"))
    return tiles(facts)


def _curves(events: Sequence[Mapping[str, Any]]) -> Iterator[Html]:
    def values(event: str, field: str) -> list[tuple[float, float]]:
        return [(each["step"], each[field]) for each in events if each["event"] == event]

    charts = [
        ("Loss of the steps", line_chart(values("step", "loss"))),
        ("Learning rate", line_chart(values("step", "learning_rate"))),
    ]
    if any(each["event"] == "evaluation" for each in events):
        top1 = line_chart(values("evaluation", "top1"), dots=True, form=percent)
        log_loss = line_chart(values("evaluation", "log_loss"), dots=True)
        charts += [("Validation: top-1", top1), ("Validation: log loss", log_loss)]
    figures = [tag("figure", tag("figcaption", name), chart) for name, chart in charts]
    yield tag("div", join(figures), class_="charts")
    note = "Over steps. Where a line stands for many steps it is their mean, the shade their range."
    if len(charts) > 2:
        note += " Validation while training is by one clip a video; everything below is by three."
    yield tag("p", note, class_="soft")


def _confusion(evaluated: Evaluated) -> Iterator[Html]:
    labels = evaluated.predictions.labels
    counts = _counts(evaluated)
    if len(labels) <= _MATRIX_CLASSES:
        note = "A row is a class, a column what its videos were taken for."
        yield tag("p", note, class_="soft")
        yield tag("div", confusion_matrix(counts, labels), class_="scroll")
        return
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(place), len(labels)) for place in order if wrong.flat[place]]
    yield tag("p", f"Of {len(labels)} classes, what is mistaken most often.", class_="soft")
    rows = [
        [labels[true], labels[given], str(wrong[true, given]), _of(wrong, counts, true, given)]
        for true, given in pairs
    ]
    yield table(["class", "taken for", "videos", "of the class"], rows)


def _of(part: NDArray[np.int64], counts: NDArray[np.int64], true: int, given: int) -> str:
    return percent(part[true, given] / counts[true].sum())


def _counts(evaluated: Evaluated) -> NDArray[np.int64]:
    """Videos by (true, given) class."""
    size = len(evaluated.predictions.labels)
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (evaluated.predictions.targets, evaluated.given), 1)
    return counts


def _classes(evaluated: Evaluated) -> Html:
    labels, counts = evaluated.predictions.labels, _counts(evaluated)
    videos = counts.sum(1)
    accuracy = np.diag(counts) / np.maximum(videos, 1)
    rows = []
    for index in np.argsort(accuracy, kind="stable").tolist():
        if not videos[index]:
            continue
        mistakes = counts[index].copy()
        mistakes[index] = 0
        most = int(mistakes.argmax())
        taken_for = f"{labels[most]} ({mistakes[most]})" if mistakes[most] else ""
        share = join([share_bar(float(accuracy[index])), percent(accuracy[index])])
        rows.append([labels[index], str(videos[index]), share, taken_for])
    classes = table(["class", "videos", "accuracy", "most often taken for"], rows)
    if len(rows) <= _OPEN_CLASSES:
        return classes
    return folded(f"{len(rows)} classes, the worst first", classes)


def _worst(evaluated: Evaluated, processes: int) -> Iterator[Html]:
    """The videos whose right label has the least score, of those that another one was given."""
    found = evaluated.predictions
    rows = np.arange(len(found.targets))
    right = evaluated.scores[rows, found.targets]
    wrong = np.flatnonzero(evaluated.given != found.targets)
    if not len(wrong):
        yield tag("p", "Every video got the right label.", class_="soft")
        return
    worst = wrong[np.argsort(right[wrong], kind="stable")][:_WORST].tolist()
    note = f"{len(wrong):,} of {len(rows):,} videos got a wrong label"
    if len(worst) < len(wrong):
        note += f"; these {len(worst)} are those whose right label scored least"
    yield tag("p", f"{note}. {FRAMES} frames of the middle of each.", class_="soft")
    load = functools.partial(load_strip, preprocessing=evaluated.preprocessing)
    paths = [found.samples[index].path for index in worst]
    strips = in_processes(load, paths, min(processes, len(paths)), crashed=_crashed)
    cards = [_card(evaluated, index, strip) for index, strip in zip(worst, strips, strict=True)]
    yield tag("div", join(cards), class_="cards")


def _crashed(path: str) -> VideoError:
    return UndecodableVideo("It crashes the decoder.")


def _card(evaluated: Evaluated, index: int, strip: str | VideoError) -> Html:
    found, scores = evaluated.predictions, evaluated.scores[index]
    true, given = int(found.targets[index]), int(evaluated.given[index])
    if isinstance(strip, VideoError):
        picture = tag("p", f"No picture: {strip}", class_="soft")
    else:
        picture = Html(f'<img src="{strip}" alt="" width="{FRAMES * SIDE}" height="{SIDE}">')
    lines = [
        tag("dt", "is"),
        tag("dd", f"{found.labels[true]} ", tag("span", percent(scores[true]), class_="soft")),
        tag("dt", "taken for"),
        tag("dd", f"{found.labels[given]} ", tag("span", percent(scores[given]), class_="soft")),
    ]
    path = without_secrets(found.samples[index].path)
    name = tag("p", path, class_="path soft")
    return tag("div", picture, tag("dl", join(lines)), name, class_="card")


def _calibration(evaluated: Evaluated) -> Iterator[Html]:
    found, fitted = evaluated.predictions, evaluated.calibration
    temperatures = [("as the network has them", 1.0)]
    for what, value in (
        ("as served", evaluated.temperature),
        ("fitted on these videos", fitted.temperature if fitted else 1.0),
    ):
        if value not in (each for _, each in temperatures):
            temperatures.append((what, value))
    figures = []
    for what, value in temperatures:
        scores = mean_scores(found.logits, value)
        right = scores.argmax(1) == found.targets
        error = measure(found, value).calibration_error
        caption = f"{what}: temperature {value:g}, calibration error {percent(error)}"
        diagram = reliability_diagram(confidence_bins(scores.max(1), right))
        figures.append(tag("figure", tag("figcaption", caption), diagram))
    yield tag("div", join(figures), class_="charts")
    note = (
        "A bar is the share of right labels among the videos of a score, the dot their mean score."
    )
    if fitted is None:
        yield tag("p", f"{note} No temperature was fitted.", class_="soft")
        return
    before, after = fitted.before, fitted.after
    if fitted.temperature == 1.0:
        note += " A temperature did not help:"
    yield tag(
        "p",
        f"{note} Fitted on {fitted.fitted_on} of the videos and judged on the {fitted.judged_on} "
        f"others, temperature {fitted.trial_temperature:g} takes the calibration error "
        f"from {percent(before['calibration_error'])} to {percent(after['calibration_error'])}, "
        f"the log loss from {before['log_loss']:.4f} to {after['log_loss']:.4f}.",
        class_="soft",
    )


def _comparison(refresh: Mapping[str, Any]) -> Iterator[Html]:
    yield tag("p", refresh["reason"])
    for part, models in refresh["comparison"].items():
        rows = [
            [name.replace("_", " "), *(f"{models[each][name]:.4g}" for each in ("active", "new"))]
            for name in ("videos", "top1", "top5", "mean_class_accuracy", "log_loss")
        ]
        yield tag("h3", part.replace("_", " "))
        yield table(["measure", f"version {refresh['compared_with']}", "new"], rows)


def _left_out(events: Sequence[Mapping[str, Any]], evaluated: Evaluated | None) -> Iterator[Html]:
    replaced = collections.Counter(
        (each["path"], each["detail"]) for each in events if each["event"] == "replaced"
    )
    failures = evaluated.predictions.failures if evaluated else ()
    rows = [
        [path, detail, f"{times} in training"] for (path, detail), times in replaced.most_common()
    ]
    rows += [[without_secrets(each.path), each.detail, "validation"] for each in failures]
    if not rows:
        yield tag("p", "None: every video could be decoded.", class_="soft")
        return
    yield table(["video", "why", "clips"], rows[:_REPLACED])
    if len(rows) > _REPLACED:
        more = f"And {len(rows) - _REPLACED:,} more, which the log names."
        yield tag("p", more, class_="soft")


def _facts(about: Mapping[str, Any]) -> Iterator[Html]:
    identity = about.get("identity", {})
    tables = [
        ("Recipe", identity.get("recipe", {})),
        ("Network", identity.get("config", {})),
        ("Software", about.get("software", {})),
        ("Run", {k: v for k, v in about.items() if isinstance(v, str | int | float)}),
    ]
    for name, facts in tables:
        if facts:
            yield folded(name, facts_table(facts))
