"""The table of results: its columns, once, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table
from rich.text import Text

from timestep_experts.errors import UserError
from timestep_experts.evaluation import Result
from timestep_experts.intervals import Interval

BASE_ARM = "base"
MISSING = "\N{EN DASH}"
LOSS, LOSS_BY_INTERVAL = "validation loss", "validation loss by interval of t"
JUDGED, PICTURES, PARAMETERS, TRAINING = "promises kept", "pictures", "parameters", "training"

Value = str | float | int | None
Row = dict[str, Value]


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Args:
        key: in the rows of `results_rows`.
        group: what it stands under.
        heading: its own name.
        less_is_better: or more is.
        unit: of the numbers as shown; empty where there is none.
        factor: from a row's value to the number shown.
        decimals: shown.
        best: the text of the best value; ``None`` where the compared rows show no difference.
    """

    key: str
    group: str
    heading: str
    less_is_better: bool
    unit: str
    factor: float
    decimals: int
    best: str | None = None

    @property
    def is_interval(self) -> bool:
        """Whether it is the loss of one interval."""
        return self.group == LOSS_BY_INTERVAL

    def text(self, row: Row) -> str:
        """The number as shown; a dash where nothing was measured."""
        value = _number(row[self.key])
        if value is None:
            return MISSING
        shown = value * self.factor
        if not shown or not math.isfinite(shown):
            return f"{shown:g}"
        return f"{shown:.3g}" if abs(shown) >= 1e7 else f"{shown:,.{self.decimals}f}"

    def competes(self, row: Row) -> bool:
        """Whether a row may be the best: it has a finite number, and the base wins no prize for costing nothing."""
        value = _number(row[self.key])
        costs = self.group in (PARAMETERS, TRAINING)
        return value is not None and math.isfinite(value) and not (costs and is_base(row))

    def is_best(self, row: Row) -> bool:
        """Whether the row shows the column's best value."""
        return self.best is not None and self.competes(row) and self.text(row) == self.best

    def with_best_of(self, rows: Sequence[Row]) -> Column:
        """The same column, knowing its best value."""
        compared = [row for row in rows if self.competes(row)]
        if len({self.text(row) for row in compared}) < 2:
            return self
        choose = min if self.less_is_better else max
        return replace(self, best=self.text(choose(compared, key=lambda row: _number(row[self.key]) or 0.0)))


def interval_key(interval: Interval) -> str:
    """The key of an interval's loss in the rows."""
    return f"loss {interval}"


def is_base(row: Row) -> bool:
    """Whether a row is the untouched base model."""
    return row["label"] == BASE_ARM


def results_rows(results: Sequence[Result], intervals: Sequence[Interval]) -> list[Row]:
    """One flat row per result.

    Args:
        results: what was measured.
        intervals: the reported ones, from low to high noise, in units of t.

    Returns:
        Rows with ``label``, ``loss``, one ``loss [lo, hi)`` per interval, ``colour``, ``shape``, ``texture`` and
        ``relation`` (shares in [0, 1]), ``frechet``, ``trained``, ``stored`` and ``active`` (parameters),
        ``num_images_seen`` and ``seconds``. ``None``: not measured.

    Raises:
        UserError: a result has not as many interval losses as there are intervals.
    """
    return [_row(result, intervals) for result in results]


def results_columns(rows: Sequence[Row], intervals: Sequence[Interval]) -> list[Column]:
    """The columns in which at least one row has a value, in the order of the page."""
    each = [(interval_key(i), LOSS_BY_INTERVAL, str(i), True, _loss_format) for i in intervals]
    columns = []
    for key, group, heading, less_is_better, choose_format in (*_LEADING, *each, *_TRAILING):
        values = [value for row in rows if (value := _number(row[key])) is not None]
        if values:
            unit, factor, decimals = choose_format([value for value in values if math.isfinite(value)])
            columns.append(Column(key, group, heading, less_is_better, unit, factor, decimals).with_best_of(rows))
    return columns


def results_table(results: Sequence[Result], intervals: Sequence[Interval]) -> Table:
    """For a terminal of 120 columns: everything but the losses per interval."""
    rows = results_rows(results, intervals)
    columns = [column for column in results_columns(rows, intervals) if not column.is_interval]
    return _terminal_table("Results", rows, columns)


def interval_table(results: Sequence[Result], intervals: Sequence[Interval]) -> Table:
    """For a terminal: the validation loss of each interval of t, from low to high noise."""
    rows = results_rows(results, intervals)
    columns = [column for column in results_columns(rows, intervals) if column.is_interval]
    return _terminal_table("Validation loss per interval of t", rows, columns)


def _row(result: Result, intervals: Sequence[Interval]) -> Row:
    if len(result.interval_losses) != len(intervals):
        raise UserError(
            f"result {result.label!r} has {len(result.interval_losses)} interval losses;"
            f" {len(intervals)} intervals are reported"
        )
    verdict = result.verdict
    return {
        "label": result.label,
        "loss": result.curve.mean,
        **{interval_key(i): loss for i, loss in zip(intervals, result.interval_losses, strict=True)},
        "colour": verdict.colour if verdict else None,
        "shape": verdict.shape if verdict else None,
        "texture": verdict.texture if verdict else None,
        "relation": verdict.relation if verdict else None,
        "frechet": result.frechet,
        "trained": result.parameters.trainable,
        "stored": result.parameters.stored,
        "active": result.parameters.active,
        "num_images_seen": result.num_images_seen,
        "seconds": result.seconds,
    }


def _terminal_table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(
        title=title,
        caption="bold: best of its column",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(Text(_terminal_heading(column)), justify="right", no_wrap=True)
    for row in rows:
        cells = (Text(column.text(row), style="bold" if column.is_best(row) else "") for column in columns)
        table.add_row(Text(str(row["label"])), *cells, end_section=is_base(row))
    return table


def _terminal_heading(column: Column) -> str:
    if column.is_interval:
        return column.heading.replace(", ", ",\n")
    heading = "mean\nloss" if column.key == "loss" else column.heading
    return f"{heading}\n{column.unit}" if column.unit else heading


def _number(value: Value) -> float | None:
    assert not isinstance(value, str)
    return None if value is None else float(value)


# Unit, factor and decimals that suit the finite values of a column.
_Format = tuple[str, float, int]


def _loss_format(values: Sequence[float]) -> _Format:
    return "", 1.0, _decimals(values, 4)


def _distance_format(values: Sequence[float]) -> _Format:
    return "", 1.0, _decimals(values, 3)


def _share_format(_: Sequence[float]) -> _Format:
    return "%", 100.0, 1


def _count_format(values: Sequence[float]) -> _Format:
    largest = max(values, default=0.0)
    if largest < 10_000:
        return "", 1.0, 0
    return ("k", 1e-3, 1) if largest < 10_000_000 else ("M", 1e-6, 2)


def _seconds_format(values: Sequence[float]) -> _Format:
    return "s", 1.0, 0 if max(values, default=0.0) >= 100 else 1


def _decimals(values: Sequence[float], significant: int) -> int:
    """Decimals with which the smallest magnitude shows that many digits, between 0 and 8."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    return min(max(significant - 1 - math.floor(math.log10(smallest)), 0), 8)


# Key, group, heading, whether less is better, format. The losses of the intervals stand in between.
_Spec = tuple[str, str, str, bool, Callable[[Sequence[float]], _Format]]
_LEADING: tuple[_Spec, ...] = (("loss", LOSS, "mean", True, _loss_format),)
_TRAILING: tuple[_Spec, ...] = (
    ("colour", JUDGED, "colour", False, _share_format),
    ("shape", JUDGED, "shape", False, _share_format),
    ("texture", JUDGED, "texture", False, _share_format),
    ("relation", JUDGED, "relation", False, _share_format),
    ("frechet", PICTURES, "Frechet", True, _distance_format),
    ("trained", PARAMETERS, "trained", True, _count_format),
    ("stored", PARAMETERS, "stored", True, _count_format),
    ("active", PARAMETERS, "active", True, _count_format),
    ("num_images_seen", TRAINING, "samples", True, _count_format),
    ("seconds", TRAINING, "time", True, _seconds_format),
)
