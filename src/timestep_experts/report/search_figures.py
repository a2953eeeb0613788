"""Figures of a search for merge weights, and of what it rests on: pictures of their own, for files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from timestep_experts.evaluation.merges import MergeLosses
from timestep_experts.intervals import Interval
from timestep_experts.merging import Evaluated, Quadratic, fit_around, num_coefficients
from timestep_experts.report.figures import figure_style
from timestep_experts.report.labels import PALETTE

_DPI = 150
_WIDTH = 7.5  # inches
_INK, _MUTED, _FOUND = "#2d343c", "#9aa1a8", "#d7263d"
_RESOLUTION = 120


def loss_landscape(evaluated: Sequence[Evaluated], labels: Sequence[str]) -> Figure:
    """The loss over two weights (of one: along it): contours of the fit, through the best point, and what was measured.

    Of more than two, the two along which the fit curves most. Points that lie off the drawn plane are small.

    Args:
        evaluated: at least one of a finite loss.
        labels: of the weights.
    """
    points = [point for point in evaluated if np.isfinite(point.loss)]
    weights = np.asarray([point.weights for point in points], float)
    losses = np.asarray([point.loss for point in points], float)
    reach = float(np.median(np.linalg.norm(weights - weights[losses.argmin()], axis=1)))
    model = fit_around(points, reach) if len(points) >= num_coefficients(weights.shape[1]) else None
    with figure_style():
        if weights.shape[1] == 1:
            return _along_one(weights[:, 0], losses, model, labels[0])
        pair = _chosen_pair(weights, model)
        return _over_two(weights, losses, model, pair, [labels[i] for i in pair])


def range_losses(rows: Sequence[MergeLosses], ranges: Sequence[Interval]) -> Figure:
    """How much each row gains or loses on the base in every range of t, on pictures that no choice has seen.

    Args:
        rows: the base first, what was found last.
        ranges: of t.
    """
    base, *others = rows
    columns = [str(interval) for interval in ranges] + ["all t"]
    with figure_style():
        figure = Figure(figsize=(max(_WIDTH, 1.5 + 1.1 * len(columns)), 3.6), layout="constrained", dpi=_DPI)
        axes = figure.subplots()
        axes.set_xlabel("range of t (more noise to the right)")
        axes.axhline(0, color=_INK, linewidth=0.9)
        axes.grid(visible=False, axis="x")
        width = 0.8 / len(others)
        for number, row in enumerate(others):
            values = [100 * (a / b - 1) for a, b in zip(_all(row), _all(base), strict=True)]
            at = np.arange(len(columns)) + (number - (len(others) - 1) / 2) * width
            bars = axes.bar(at, values, 0.9 * width, color=_colour(row.name, number), label=row.name)
            if number >= len(PALETTE):  # whose colours begin again
                for bar in bars:
                    bar.set(hatch="////", edgecolor="white", linewidth=0)
        for edge in np.arange(len(columns) - 1) + 0.5:
            axes.axvline(edge, color=_MUTED, linewidth=1.2 if edge == len(columns) - 1.5 else 0.4)
        axes.set_xticks(np.arange(len(columns)), columns)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "base"))
        axes.set_title("Loss against the base's, on pictures that no choice has seen")
        figure.legend(loc="outside right center", frameon=False)
        return figure


def similarity_map(similarity: NDArray[np.floating], bins: Sequence[Interval], cuts: Sequence[Interval]) -> Figure:
    """Cosines between the gradients of timesteps, and the intervals that a cut makes of them.

    Args:
        similarity: ``(K, K)``.
        bins: the K bins that the timesteps stand for, from low to high noise.
        cuts: intervals, outlined.
    """
    low, high = bins[0].lo, bins[-1].hi
    least = float(similarity.min())
    with figure_style():
        figure = Figure(figsize=(5.6, 4.8), layout="constrained", dpi=_DPI)
        axes = figure.subplots()
        axes.grid(visible=False)
        mode: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1} if least < -0.2 else {"cmap": "viridis", "vmin": least}
        extent = (low, high, low, high)
        image = axes.imshow(similarity, origin="lower", extent=extent, vmax=1, interpolation="none", **mode)
        for interval in cuts:
            corners = np.asarray([interval.lo, interval.hi, interval.hi, interval.lo, interval.lo])
            sides = np.asarray([interval.lo, interval.lo, interval.hi, interval.hi, interval.lo])
            axes.plot(corners, sides, color="white", linewidth=2.6)
            axes.plot(corners, sides, color=_FOUND, linewidth=1.4)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        for name in ("x", "y"):
            getattr(axes, f"set_{name}label")("timestep t (more noise to the " + ("right)" if name == "x" else "top)"))
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("cosine of gradients")
        axes.set_title(f"Where gradients agree, cut into {len(cuts)}")
        return figure


def task_vector_map(norms: NDArray[np.floating], experts: Sequence[str], blocks: Sequence[str]) -> Figure:
    """How far every expert went from the base in every block, in percent of the base's norm there.

    Args:
        norms: ``(experts, blocks)``, relative.
        experts: their names.
        blocks: their names.
    """
    with figure_style():
        size = (max(4.0, 1.6 + 0.62 * len(blocks)), 1.5 + 0.42 * len(experts))
        figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.imshow(100 * norms, cmap="YlOrRd", vmin=0, aspect="auto", interpolation="none")
        axes.set_xticks(np.arange(len(blocks)), blocks, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(experts)), experts)
        axes.tick_params(length=0)
        top = float(norms.max()) or 1.0
        for row, column in np.ndindex(*norms.shape):
            colour = "white" if norms[row, column] > 0.6 * top else _INK
            text = f"{100 * norms[row, column]:.2g}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title("Norm of task vectors, % of the base's")
        return figure


def _along_one(
    weights: NDArray[np.floating], losses: NDArray[np.floating], model: Quadratic | None, label: str
) -> Figure:
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    low, high = _span(weights)
    if model is not None:
        at = np.linspace(low, high, _RESOLUTION)
        axes.plot(at, [model((x,)) for x in at], color=_MUTED, linewidth=1.4, label="quadratic fit")
    best = int(losses.argmin())
    axes.scatter(weights, losses, s=26, color=_INK, zorder=3, label="measured")
    axes.scatter(
        weights[best], losses[best], s=90, facecolor="none", edgecolor=_FOUND, linewidth=1.8, zorder=4, label="found"
    )
    axes.set_xlim(low, high)
    axes.set_xlabel(f"{label} (0: the base, 1: the expert)")
    axes.set_title("Loss on the selection pictures")
    axes.legend(frameon=False)
    return figure


def _over_two(
    weights: NDArray[np.floating],
    losses: NDArray[np.floating],
    model: Quadratic | None,
    pair: tuple[int, int],
    labels: Sequence[str],
) -> Figure:
    figure = Figure(figsize=(6.4, 5.2), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    axes.grid(visible=False)
    best = int(losses.argmin())
    (left, right), (bottom, top) = _span(weights[:, pair[0]]), _span(weights[:, pair[1]])
    others = [i for i in range(weights.shape[1]) if i not in pair]
    in_plane = (np.abs(weights[:, others] - weights[best, others]) < 1e-9).all(1)
    scale: dict[str, Any] = {"vmin": float(losses.min()), "vmax": float(np.quantile(losses, 0.9)), "cmap": "viridis_r"}
    if model is not None:
        x, y = np.linspace(left, right, _RESOLUTION), np.linspace(bottom, top, _RESOLUTION)
        surface = _surface(model, weights[best], pair, x, y)
        scale |= {"vmin": min(scale["vmin"], float(surface.min())), "vmax": max(scale["vmax"], scale["vmin"] + 1e-12)}
        levels = np.linspace(scale["vmin"], scale["vmax"], 15)
        axes.contourf(x, y, surface, levels=levels, extend="both", cmap=scale["cmap"], alpha=0.75)
        axes.contour(x, y, surface, levels=levels, colors="white", linewidths=0.5)
    for mask, size in ((in_plane, 52), (~in_plane, 18)):
        shown = axes.scatter(
            weights[mask, pair[0]],
            weights[mask, pair[1]],
            s=size,
            c=losses[mask],
            edgecolor=_INK,
            linewidth=0.7,
            zorder=3,
            **scale,
        )
    axes.scatter(
        weights[best, pair[0]],
        weights[best, pair[1]],
        s=150,
        facecolor="none",
        edgecolor=_FOUND,
        linewidth=2.0,
        zorder=4,
    )
    _name(axes, "found", weights[best, pair], _FOUND)
    if not others:
        _name(axes, "base", np.zeros(2), _INK)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    bar = figure.colorbar(shown, ax=axes, pad=0.02, extend="max")
    bar.outline.set_visible(False)
    bar.set_label("loss on the selection pictures")
    small = " (small: off this plane)" if not in_plane.all() else ""
    axes.set_title(f"Measured points{small}" + (", on the quadratic fitted around the best" if model else ""))
    return figure


def _surface(
    model: Quadratic,
    through: NDArray[np.floating],
    pair: tuple[int, int],
    x: NDArray[np.floating],
    y: NDArray[np.floating],
) -> NDArray[np.floating]:
    grid = np.tile(through, (len(y), len(x), 1))
    grid[..., pair[0]], grid[..., pair[1]] = np.meshgrid(x, y)
    gradient, hessian = model.gradient.numpy(), model.hessian.numpy()
    values: NDArray[np.floating] = model.constant + grid @ gradient + ((grid @ hessian) * grid).sum(-1) / 2
    return values


def _chosen_pair(weights: NDArray[np.floating], model: Quadratic | None) -> tuple[int, int]:
    """The two weights along which the fit curves most; without a fit, those that were moved most."""
    strength = weights.std(0) if model is None else model.hessian.diagonal().numpy()
    first, second = sorted(np.argsort(-strength, kind="stable")[:2].tolist())
    return first, second


def _span(values: NDArray[np.floating]) -> tuple[float, float]:
    low, high = float(min(values.min(), 0.0)), float(max(values.max(), 1.0))
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def _name(axes: Any, text: str, at: NDArray[np.floating], colour: str) -> None:
    axes.annotate(
        text, at, xytext=(9, 7), textcoords="offset points", color=colour, fontsize=9, fontweight="bold", zorder=5
    )


def _all(row: MergeLosses) -> tuple[float, ...]:
    return (*row.confirmation, row.confirmation_mean)


def _colour(name: str, number: int) -> str:
    known = {"found": _FOUND, "uniform": _MUTED, "shares": _MUTED}
    return known.get(name, PALETTE[number % len(PALETTE)])
