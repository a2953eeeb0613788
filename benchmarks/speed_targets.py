"""What experts may cost, and in how many of the measured cases they cost no more."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from speed_variants import BASE, FUSED_IN, PEFT, ROUTE, ROUTE_3, SWITCH, TRAINING

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A limit on a variant's time.

    Args:
        variant: whose.
        limit: in units of the other's time.
        other: what it is compared with in the same run.
    """

    variant: str
    limit: float
    other: str = PEFT

    def __str__(self) -> str:
        limit = "" if self.limit == 1 else f"{self.limit:g} x "
        return f"{self.variant} <= {limit}{self.other}"


TARGETS = (Target(SWITCH, 1), Target(ROUTE, 1), Target(ROUTE_3, 1.25), Target(FUSED_IN, 1.01, BASE))


def print_targets(console: Console, sections: Mapping[str, Sequence[Row]]) -> None:
    """How many cases keep each limit, by section, eager and compiled, and the worst one.

    It is clearly missed where even the variant's lower quartile is beyond what the other's upper one allows.
    """
    table = Table("section", "", "target", title="targets: time by the medians, and memory in training")
    for column in ("kept in", "clearly missed", "median", "worst"):
        table.add_column(column, justify="right")
    table.add_column("worst case")
    for section, rows in sections.items():
        if section not in ("layers", "denoisers", "world"):
            continue
        for compiled in (False, True):
            own = [row for row in rows if row["compiled"] is compiled]
            for target in TARGETS:
                pairs = list(_pairs(own, target.variant, target.other))
                if pairs:
                    found = sorted((_quotient(*pair, target), _where(pair[0])) for pair in pairs)
                    kept = sum(value <= target.limit for value, _ in found)
                    missed = sum(_is_clearly_missed(*pair, target) for pair in pairs)
                    median, (worst, where) = statistics.median(value for value, _ in found), found[-1]
                    cells = (f"{kept} of {len(found)}", str(missed), f"{median:.3f}", f"{worst:.3f}", where)
                    table.add_row(section, "compiled" if compiled else "eager", str(target), *cells)
            shares = sorted(_memory(own))
            if shares:
                name, (worst, where) = "memory beyond PEFT LoRA's / experts stored beyond it", shares[-1]
                median = statistics.median(share for share, _ in shares)
                table.add_row(section, "eager", name, "", "", f"{median:.2f}", f"{worst:.2f}", where)
        table.add_section()
    if table.row_count:
        console.print(table)


def _quotient(own: Row, other: Row, target: Target) -> float:
    """The variant's time over the other's; both are known as ratios to the base."""
    return float(own["ratio"] / (1 if target.other == BASE else other["ratio"]))


def _is_clearly_missed(own: Row, other: Row, target: Target) -> bool:
    """The base's own quartiles are those of noise, and never stricter than the limit itself."""
    highest = max(1.0, other["quartiles"][1]) if target.other == BASE else other["quartiles"][1]
    return bool(own["quartiles"][0] > target.limit * highest)


def _where(row: Row) -> str:
    return f"{row['case']}, {row['pass']}"


def _memory(rows: Sequence[Row]) -> Iterator[tuple[float, str]]:
    """What training needs beyond one LoRA's, per byte of experts stored beyond it: 2 is experts and gradients."""
    for variant in (SWITCH, ROUTE, ROUTE_3):
        for own, other in _pairs(rows, variant, PEFT):
            if own["pass"] == TRAINING and "peak_bytes" in own:
                stored = own["extra_weight_bytes"] - other["extra_weight_bytes"]
                yield (stored + own["peak_bytes"] - other["peak_bytes"]) / stored, f"{own['case']}, {variant}"


def _pairs(rows: Sequence[Row], variant: str, other: str) -> Iterator[tuple[Row, Row]]:
    others = {(row["case"], row["pass"]): row for row in rows if row["variant"] == other}
    for row in rows:
        if row["variant"] == variant and (row["case"], row["pass"]) in others:
            yield row, others[row["case"], row["pass"]]
