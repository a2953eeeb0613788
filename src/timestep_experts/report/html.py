"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from timestep_experts.evaluation import Result
from timestep_experts.formats.atomic import write_text
from timestep_experts.intervals import Interval
from timestep_experts.report.figures import gate_heat_map, loss_per_timestep, training_curves
from timestep_experts.report.pictures import to_data_uri
from timestep_experts.report.table import BASE_ARM, Column, Row, is_base, results_columns, results_rows

REAL = "real"
MAX_SKIPPED_SHOWN = 200


@dataclass(frozen=True)
class ReportContent:
    """What a report says; whatever is empty is left out.

    Args:
        title: of the page.
        recipe_yaml: the recipe's text.
        command: that made the run.
        results: the rows of the table, the base among them.
        intervals: the reported ones, from low to high noise, in units of t.
        training_logs: records with ``num_images_seen`` and ``loss``, by ``variant, stage``.
        prompts: what pictures were generated for, P of them.
        pictures: ``(K, H, W, 3)`` uint8, of clips ``(K, F, H, W, 3)``, by row label, K at most P, in the order of the
            prompts; ``real`` holds the true ones.
        notes: sentences on how to read the numbers.
        skipped: (place, reason) of unusable files.
        environment: versions and hardware by name.
        reference: label of the row by which losses are divided in the figure; ``None``: the first trained row.
    """

    title: str
    recipe_yaml: str
    command: str
    results: Sequence[Result]
    intervals: Sequence[Interval]
    training_logs: Mapping[str, Sequence[Mapping[str, float]]]
    prompts: Sequence[str]
    pictures: Mapping[str, NDArray[np.uint8]]
    notes: Sequence[str]
    skipped: Sequence[tuple[str, str]]
    environment: Mapping[str, str]
    reference: str | None = None


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report atomically.

    Raises:
        UserError: an unknown reference, or interval losses that do not fit the intervals.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = results_rows(content.results, content.intervals)
    columns = results_columns(rows, content.intervals)
    tables = [[c for c in columns if not c.is_interval], [c for c in columns if c.is_interval]]
    page = jinja.get_template("template.html.j2").render(
        content=content,
        summary=summarise(rows),
        rows=rows,
        tables=[_groups(table) for table in tables if table],
        is_base=is_base,
        loss_figure=_loss_figure(content),
        training_figure=_training_figure(content),
        gate_figures=list(_gate_figures(content.results)),
        picture_labels=_picture_labels(content),
        picture_rows=list(_picture_rows(content)),
        skipped_shown=content.skipped[:MAX_SKIPPED_SHOWN],
    )
    write_text(path, page)


def summarise(rows: Sequence[Row]) -> str:
    """One sentence: which row has the lowest mean validation loss, against the base and the next row."""
    losses = {str(row["label"]): float(row["loss"] or 0.0) for row in rows}
    finite = sorted((loss, label) for label, loss in losses.items() if math.isfinite(loss))
    if not finite:
        return "No finite validation loss was measured."
    (best, label), *others = finite
    sentence = f"“{label}” has the lowest mean validation loss, {best:.4g}"
    if len(rows) == 1:
        sentence = f"“{label}” alone was measured: its mean validation loss is {best:.4g}"
    elif label == BASE_ARM:
        sentence = f"No trained row improves on the base, whose mean validation loss is {best:.4g}"
    below = [f"{_distance(best, loss)} the base" for loss, other in others if other == BASE_ARM]
    below += [f"{_distance(best, loss)} the next best, “{other}”" for loss, other in others[:1] if other != BASE_ARM]
    diverged = len(losses) - len(finite)
    tail = f"; {diverged} {'row has' if diverged == 1 else 'rows have'} no finite loss" if diverged else ""
    return f"{sentence}{': ' if below else ''}{' and '.join(below)}{tail}."


def _distance(best: float, other: float) -> str:
    share = 100 * (1 - best / other) if other else 0.0
    if share == 0:
        return "the same as"
    return f"{share:.1f} % below" if share >= 0.1 else "less than 0.1 % below"


@dataclass(frozen=True)
class _Group:
    """Neighbouring columns under one heading, which carries their unit where they share one."""

    heading: str
    unit: str
    columns: Sequence[Column]


def _groups(columns: Sequence[Column]) -> list[_Group]:
    groups = []
    for name, members in groupby(columns, lambda column: column.group):
        inside = list(members)
        units = {column.unit for column in inside}
        groups.append(_Group(name, units.pop() if len(units) == 1 else "", inside))
    return groups


def _loss_figure(content: ReportContent) -> str | None:
    if not content.results:
        return None
    labels = [result.label for result in content.results]
    trained = [label for label in labels if label != BASE_ARM]
    # Against the base, all trained rows fall onto one line; against one of them their differences show.
    default = trained[0] if len(trained) > 1 else BASE_ARM if BASE_ARM in labels else labels[0]
    return loss_per_timestep(content.results, content.reference or default)


def _training_figure(content: ReportContent) -> str | None:
    is_shown = any("loss" in record for records in content.training_logs.values() for record in records)
    return training_curves(content.training_logs) if is_shown else None


def _gate_figures(results: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    """Caption, figure, and the typical spread of a gate over samples."""
    for result in results:
        for gates in result.gates:
            spread = float(np.nanmedian(gates.spread)) if np.isfinite(gates.spread).any() else math.nan
            yield f"{result.label}: gates of scale {gates.scale}", gate_heat_map(gates), f"{spread:.2g}"


def _picture_labels(content: ReportContent) -> list[str]:
    """The true pictures, the base, then the rows of the table, then whatever else there is."""
    wanted = [REAL, BASE_ARM, *(result.label for result in content.results), *content.pictures]
    return [label for label in dict.fromkeys(wanted) if len(content.pictures.get(label, ()))]


def _picture_rows(content: ReportContent) -> Iterator[tuple[str, list[str | None]]]:
    """Prompt and one data URI per label; ``None`` where a label has fewer pictures than others."""
    labels = _picture_labels(content)
    count = max((len(content.pictures[label]) for label in labels), default=0)
    for index, prompt in enumerate(content.prompts[:count]):
        pictures = (content.pictures[label] for label in labels)
        yield prompt, [to_data_uri(shown[index]) if index < len(shown) else None for shown in pictures]
