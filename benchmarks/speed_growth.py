"""How the cost of a mixture grows: one size at a time, on one linear layer, beside the formula of speed_formula.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from speed_cases import linear
from speed_formula import Layer, predicted_ratio
from speed_passes import Findings, Setting, build, measure
from speed_timing import machine_rates
from speed_variants import (
    BASE,
    MIXED_T,
    PEFT,
    SWITCH,
    TRAINING,
    Form,
    Pass,
    make_base,
    make_peft,
    make_route,
    make_switch,
)

ROUTE = "route"
MAKERS = {BASE: make_base, PEFT: make_peft, SWITCH: make_switch, ROUTE: make_route}


@dataclass(frozen=True)
class Sizes:
    """A linear layer and what is attached to it."""

    experts: int = 8
    contexts: int = 1
    rank: int = 4
    batch: int = 4
    tokens: int = 1024
    width: int = 640


AXES: dict[str, tuple[int, ...]] = {
    "experts": (1, 2, 4, 8, 16, 32, 64),
    "contexts": (0, 1, 2, 3, 4),
    "rank": (4, 8, 16, 32, 64),
    "batch": (1, 2, 4, 8, 16),
    "tokens": (64, 256, 1024, 4096),
}
QUICK = Sizes(batch=2, tokens=8, width=16)


def describe(sizes: Sizes) -> str:
    """In words."""
    layer = f"width {sizes.width}, {sizes.tokens:,} tokens, {sizes.batch} samples"
    return f"{layer}, {sizes.experts} experts, {sizes.contexts} context(s), rank {sizes.rank}"


def points(*, quick: bool) -> Iterator[tuple[str, int, Sizes]]:
    """Axis, value and sizes; quickly, two values of each axis on a tiny layer."""
    for axis, values in AXES.items():
        for value in values[:2] if quick else values:
            yield axis, value, dataclasses.replace(QUICK if quick else Sizes(), **{axis: value})


def grow(setting: Setting, *, quick: bool) -> Findings:
    """All points under mixed t, inference and training, eager."""
    rate, bandwidth = machine_rates(setting.device, setting.dtype)
    all_findings = Findings()
    for axis, value, sizes in points(quick=quick):
        case = linear("growth", sizes.width, sizes.tokens, (sizes.batch, sizes.batch))
        base = build(case, setting)
        form = Form(sizes.experts, sizes.rank, sizes.contexts)
        for kind in (MIXED_T, TRAINING):
            findings = measure(case, base, kind, MAKERS, form, setting)
            for row in findings.rows:
                predicted = _predict(row["variant"], sizes, kind, setting.dtype, rate, bandwidth)
                place = {"axis": axis, "value": value, "predicted": predicted}
                all_findings.rows.append({**row, **place, "sizes": dataclasses.asdict(sizes)})
            all_findings.skipped += findings.skipped
    for row in all_findings.rows:
        row |= {"flops_per_second": rate, "bytes_per_second": bandwidth}
    return all_findings


def _predict(variant: str, sizes: Sizes, kind: Pass, dtype: torch.dtype, rate: float, bandwidth: float) -> float | None:
    """The formula's ratio; ``None`` for what is not ours."""
    contexts: dict[str, Any] = {SWITCH: 0, ROUTE: sizes.contexts}
    if variant == BASE:
        return 1.0
    if variant not in contexts:
        return None
    layer = Layer(sizes.batch, sizes.tokens, sizes.width, sizes.width, element=dtype.itemsize)
    training = kind == TRAINING
    extra = layer.mixture(sizes.experts, sizes.rank, contexts[variant], training=training)
    return predicted_ratio(layer.bare(training=training), extra, rate, bandwidth)
