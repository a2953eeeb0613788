"""Figures as SVG text, ready to stand inside a page: letters stay letters, ids are its own."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from timestep_experts.errors import UserError
from timestep_experts.evaluation import GateMap, Result
from timestep_experts.report.labels import Style, line_styles, short_names, spread
from timestep_experts.report.table import BASE_ARM

_INK, _GRID, _NOTHING = "#2d343c", "#e4e7ea", "#d8dbde"
_WIDTH = 9.0  # inches
_MAX_POINTS = 300
_HEAT_COLUMNS = 400
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#9aa1a8",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": "#9aa1a8",
    "ytick.color": "#9aa1a8",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.6,
}


def loss_per_timestep(results: Sequence[Result], reference: str) -> str:
    """Validation loss over t: as it is, on a logarithmic axis, and below as a ratio to one row's loss.

    The lower panel is scaled to the trained rows; the base leaves it where it lies far from them.

    Args:
        results: at least one.
        reference: label of the row that the others are divided by, bin by bin.

    Raises:
        UserError: no row of that label.
    """
    rows = {result.label: result for result in results}
    if reference not in rows:
        raise UserError(f"no row {reference!r} to compare with: there are {', '.join(map(repr, rows))}")
    styles = line_styles(list(rows), BASE_ARM)
    losses = {label: np.asarray(row.curve.loss, float) for label, row in rows.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {label: loss / losses[reference] for label, loss in losses.items()}
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, 6.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.set_yscale("log")
        upper.set_title("Validation loss")
        lower.set_title(f"Loss divided by that of {reference!r}")
        _scale_ratios(lower, [ratio for label, ratio in ratios.items() if label != BASE_ARM] or list(ratios.values()))
        bins = rows[reference].curve.bins
        for axes, curves in ((upper, losses), (lower, ratios)):
            axes.set_xlim(bins[0].lo, bins[-1].hi)
            for label, curve in curves.items():
                middles = [(b.lo + b.hi) / 2 for b in rows[label].curve.bins]
                _draw_line(axes, middles, np.where(np.isfinite(curve), curve, np.nan), styles[label])
            if axes is upper:
                _number_log_axis(axes.yaxis)
        lower.set_xlabel("timestep t (noise grows to the right)")
        figure.draw_without_rendering()  # settles the axes, which the labels need
        _label_ends(upper, styles)
        _label_ends(lower, styles)
        return _to_svg(figure, "loss")


def training_curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Training loss against samples seen, both smoothed and on a logarithmic axis.

    Args:
        logs: by name, records with ``num_images_seen`` and ``loss``; records without them are left out, and so is a
            log without any.
    """
    curves = {name: curve for name, records in logs.items() if len((curve := _training_curve(records))[0])}
    styles = line_styles(list(logs), BASE_ARM)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_title("Training loss, smoothed")
        axes.set_xlabel("training samples of the stage")
        for name, (samples, loss) in curves.items():
            _draw_line(axes, samples, loss, styles[name])
        axes.set_xlim(0, max((samples[-1] for samples, _ in curves.values()), default=1.0))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _number_log_axis(axes.yaxis)
        figure.draw_without_rendering()
        _label_ends(axes, styles)
        return _to_svg(figure, "training")


def gate_heat_map(gate_map: GateMap) -> str:
    """Mean gates of one context scale, modules by timesteps; white is 0, the colours reach equally far both ways."""
    mean = np.asarray(gate_map.mean, float).reshape(len(gate_map.modules), len(gate_map.t))
    finite = np.abs(mean[np.isfinite(mean)])
    limit = float(finite.max()) if finite.any() else 1.0
    edges = _edges(gate_map.t)
    rows = len(gate_map.modules)
    with matplotlib.rc_context({**_SETTINGS, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.145 * rows), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(_NOTHING)
        image = axes.imshow(
            np.ma.masked_invalid(_on_even_grid(mean, edges)),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="none",
            extent=(edges[0], edges[-1], rows, 0),
        )
        axes.set_yticks(np.arange(rows) + 0.5, short_names(gate_map.modules), fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("timestep t (noise grows to the right)")
        for row, (above, below) in enumerate(pairwise(gate_map.modules), 1):
            if above.split(".")[:2] != below.split(".")[:2]:
                axes.axhline(row, color="white", linewidth=1.5)
        bar = figure.colorbar(image, ax=axes, location="top", aspect=60, shrink=0.5, anchor=(0, 0), pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("mean gate", loc="left")
        return _to_svg(figure, f"gates-{gate_map.scale}")


def figure_style() -> AbstractContextManager[None]:
    """The style of all figures, for those that are drawn elsewhere."""
    style: AbstractContextManager[None] = matplotlib.rc_context(_SETTINGS)
    return style


def _draw_line(axes: Any, x: Sequence[float] | NDArray[np.floating], y: NDArray[np.floating], style: Style) -> None:
    axes.plot(x, y, color=style.colour, linestyle=style.dash, label=style.label, zorder=2 if style.is_muted else 3)


def _scale_ratios(axes: Any, ratios: Sequence[NDArray[np.floating]]) -> None:
    """Show 1 and all ratios, but none above four times the median: one diverged row must not flatten the others."""
    values = np.concatenate([ratio[np.isfinite(ratio)] for ratio in ratios] + [np.ones(1)])
    low, high = min(values.min(), 1.0), max(min(values.max(), 4 * float(np.median(values))), 1.0)
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))


def _number_log_axis(axis: Any) -> None:
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 1.0
    steps: tuple[float, ...] = (1, 1.5, 2, 3, 4, 5, 6, 8)
    if decades >= 0.7:
        steps = (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _label_ends(axes: Any, styles: Mapping[str, Style]) -> None:
    """Name every line at its right end, with a leader in its own colour and dashes; names keep apart."""
    to_share = axes.transScale + axes.transLimits
    labels, ends, places = [], [], []
    for line in axes.get_lines():
        x, y = (np.asarray(values, float) for values in line.get_data())
        finite = np.flatnonzero(np.isfinite(y) & (y > 0))
        if len(finite):
            end = to_share.transform((x[finite[-1]], y[finite[-1]]))
            labels.append(line.get_label())
            ends.append((end[0], min(max(end[1], 0.0), 1.0)))
            places.append(end[1])
    height = axes.get_window_extent().height
    gap = 15.0 / (height * 72 / axes.figure.dpi)
    for label, (x_end, y_end), place, y_text in zip(labels, ends, places, spread(places, gap), strict=True):
        style = styles[label]
        corners = [(1.015, y_text), (1.04, y_text)]
        if x_end > 0.95:  # a leader from further inside would be taken for the line
            corners.insert(0, (x_end, y_end))
        axes.plot(
            *zip(*corners, strict=True),
            transform=axes.transAxes,
            color=style.colour,
            linestyle=style.dash,
            linewidth=1.2,
            clip_on=False,
        )
        outside = " (above)" if place > 1.001 else " (below)" if place < -0.001 else ""
        axes.text(1.048, y_text, label + outside, transform=axes.transAxes, va="center", fontsize=9)


def _training_curve(records: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Samples seen and loss, averaged over a window of a fifteenth of the log that is cut off at its ends."""
    pairs = [(r["num_images_seen"], r["loss"]) for r in records if "num_images_seen" in r and "loss" in r]
    pairs = [pair for pair in pairs if all(math.isfinite(value) for value in pair) and pair[1] > 0]
    samples, loss = np.asarray(pairs, float).reshape(-1, 2).T
    reach = len(loss) // 30
    sums = np.concatenate([[0.0], np.cumsum(loss)])
    start = np.maximum(np.arange(len(loss)) - reach, 0)
    stop = np.minimum(np.arange(len(loss)) + reach + 1, len(loss))
    smooth = (sums[stop] - sums[start]) / (stop - start)
    kept = np.unique(np.linspace(0, len(loss) - 1, min(len(loss), _MAX_POINTS)).round().astype(int))
    return samples[kept], smooth[kept]


def _edges(middles: Sequence[float]) -> NDArray[np.floating]:
    """Edges of side-by-side bins of which the middles are known, from 0 on, where every partition begins."""
    edges = [0.0]
    for middle in middles:
        edges.append(2 * middle - edges[-1])
    return np.asarray(edges)


def _on_even_grid(mean: NDArray[np.floating], edges: NDArray[np.floating]) -> NDArray[np.floating]:
    """Repeat bins of unequal width onto columns of equal width, so that a picture of cells can show them."""
    step = (edges[-1] - edges[0]) / _HEAT_COLUMNS
    at = edges[0] + (np.arange(_HEAT_COLUMNS) + 0.5) * step
    columns: NDArray[np.floating] = mean[:, np.clip(np.searchsorted(edges, at) - 1, 0, mean.shape[1] - 1)]
    return columns


def _to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element without prolog, metadata or page-wide style; deterministic."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    prefix = f"{name}-{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|url\(#|href="#)', lambda found: found[0] + prefix, svg)
