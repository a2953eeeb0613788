"""What the speed benchmark shows: tables on the terminal, and two figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from rich.console import Console
from rich.table import Table

from speed_growth import AXES, ROUTE
from speed_variants import ADAPTERS, BASE, FUSED, FUSED_IN, MIXED_T, PASSES, PEFT, ROUTE_3, SWITCH, TRAINING
from speed_variants import ROUTE as ROUTE_1
from timestep_experts.formats.atomic import atomic_path
from timestep_experts.report.figures import figure_style
from timestep_experts.report.labels import PALETTE

Row = Mapping[str, Any]
_MUTED, _GAP = "#6b737b", 1.6
COLOURS = {
    BASE: _MUTED,
    PEFT: PALETTE[1],
    ADAPTERS: PALETTE[4],
    FUSED: PALETTE[3],
    SWITCH: PALETTE[0],
    FUSED_IN: PALETTE[5],
    ROUTE_1: PALETTE[2],
    ROUTE_3: PALETTE[6],
    ROUTE: PALETTE[2],
}
AXIS_LABELS = {
    "experts": "experts n",
    "contexts": "contexts m",
    "rank": "rank r",
    "batch": "samples of mixed t",
    "tokens": "tokens per sample",
}


def print_tables(console: Console, section: str, rows: Sequence[Row], skipped: Sequence[Row]) -> None:
    """Ratios to the base, median and quartiles over rounds, and below them what was left out and why."""
    if section == "growth":
        _print_growth(console, rows)
        return
    if section == "start":
        _print_start(console, rows)
        return
    if section == "gap":
        _print_gap(console, rows)
        return
    other = {"tricks": "a mixture with all tricks", "gates": "one LoRA without gates"}.get(section, "the base")
    for compiled in (False, True):
        own = [row for row in rows if row["compiled"] is compiled]
        if own:
            _print_passes(console, f"{section}, {'compiled' if compiled else 'eager'}", own, other)
    for reason in dict.fromkeys((row["variant"], row["pass"], row["reason"]) for row in skipped):
        console.print(f"  left out: {reason[0]}, {reason[1]}: {reason[2]}", style="dim")


def _print_passes(console: Console, title: str, rows: Sequence[Row], other: str) -> None:
    passes = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    with_memory = [kind for kind in passes if any(row["pass"] == kind and "memory_ratio" in row for row in rows)]
    table = Table("variant", title=f"{title}: time (quartiles) and peak memory relative to {other}")
    for kind in passes:
        table.add_column(kind, justify="right", no_wrap=True)
        if kind in with_memory:
            table.add_column("memory", justify="right")
    with_speed = any("pictures_per_second" in row for row in rows)
    if with_speed:
        table.add_column("pictures/s", justify="right")
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        for variant in dict.fromkeys(row["variant"] for row in own):
            found = {row["pass"]: row for row in own if row["variant"] == variant}
            cells = []
            for kind in passes:
                cells.append(_ratio(found.get(kind)))
                if kind in with_memory:
                    cells.append(f"{found[kind]['memory_ratio']:.2f}" if kind in found else "")
            if with_speed:
                speed = next(iter(found.values())).get("pictures_per_second")
                cells.append("" if speed is None else f"{speed:.2f}")
            table.add_row(f"  {variant}" if variant != own[0]["variant"] else case, *cells)
        table.add_section()
    console.print(table)


def _print_start(console: Console, rows: Sequence[Row]) -> None:
    table = Table("", "variant", title=f"start: {rows[0]['case']}, experts on attention, median of {rows[0]['rounds']}")
    table.add_column("seconds (quartiles)", justify="right")
    for row in rows:
        low, high = row["quartiles"]
        table.add_row(row["pass"], row["variant"], f"{row['seconds']:.2f} ({low:.2f}-{high:.2f})")
    console.print(table)


def _print_gap(console: Console, rows: Sequence[Row]) -> None:
    title = "gap: milliseconds of a call beyond the base's, and as a share of the base's, by torch.profiler"
    table = Table("operator", title=title)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for variant in variants:
        table.add_column(variant, justify="right")
    for case, kind in dict.fromkeys((row["case"], row["pass"]) for row in rows):
        own = [row for row in rows if (row["case"], row["pass"]) == (case, kind)]
        found = {(row["operator"], row["variant"]): row for row in own}
        sums = [[row for row in own if row["variant"] == variant] for variant in variants]
        table.add_row(f"{case}, {kind}", *(_excess(*_sum(each)) if each else "" for each in sums))
        for operator in dict.fromkeys(row["operator"] for row in own):
            cells = [found.get((operator, variant)) for variant in variants]
            table.add_row(
                f"  {operator}", *("" if c is None else _excess(c["milliseconds"], c["share"]) for c in cells)
            )
        table.add_section()
    console.print(table)


def _sum(rows: Sequence[Row]) -> tuple[float, float]:
    return sum(row["milliseconds"] for row in rows), sum(row["share"] for row in rows)


def _excess(milliseconds: float, share: float) -> str:
    return f"{milliseconds:+.2f} ({share:+.1%})"


def _print_growth(console: Console, rows: Sequence[Row]) -> None:
    table = Table("axis", "value", "variant", title="growth: time relative to the base, and by the formula")
    for kind in (MIXED_T, TRAINING):
        table.add_column(kind, justify="right")
        table.add_column("formula", justify="right")
    for axis, value, variant in dict.fromkeys((row["axis"], row["value"], row["variant"]) for row in rows):
        if variant == BASE:
            continue
        cells = []
        for kind in (MIXED_T, TRAINING):
            key = (axis, value, variant, kind)
            row = next(r for r in rows if (r["axis"], r["value"], r["variant"], r["pass"]) == key)
            cells += [_ratio(row), "" if row["predicted"] is None else f"{row['predicted']:.2f}"]
        table.add_row(AXIS_LABELS[axis], str(value), variant, *cells)
    console.print(table)


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = row["quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"


def save_ratios(path: Path, sections: Mapping[str, Sequence[Row]], title: str) -> None:
    """Every case and variant as a dot with its quartiles, one column per pass; hollow dots are compiled."""
    left_out = ("start", "growth", "gap", "tricks", "gates")
    sections = {name: rows for name, rows in sections.items() if name not in left_out and rows}
    if not sections:
        return
    cases = {name: list(dict.fromkeys(row["case"] for row in rows)) for name, rows in sections.items()}
    variants = [name for name in COLOURS if any(row["variant"] == name for rows in sections.values() for row in rows)]
    variants.remove(BASE)
    heights = [len(own) * (len(variants) + _GAP) for own in cases.values()]
    with figure_style():
        size = (11.0, 1.5 + 0.088 * sum(heights) + 0.6 * len(heights))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(sections), len(PASSES), squeeze=False, height_ratios=heights)
        for line, (name, rows) in enumerate(sections.items()):
            for column, kind in enumerate(PASSES):
                axes = grid[line][column]
                own = [row for row in rows if row["pass"] == kind and row["variant"] != BASE]
                if not own:
                    axes.set_axis_off()
                    continue
                _draw_panel(axes, own, cases[name], variants)
                axes.set_title(f"{name}: {kind}")
                if column:
                    axes.set_yticklabels([])
        _add_legend(figure, variants, any(row["compiled"] for rows in sections.values() for row in rows), title)
        _save(figure, path)


def _draw_panel(axes: Any, rows: Sequence[Row], cases: Sequence[str], variants: Sequence[str]) -> None:
    step = len(variants) + _GAP
    for row in rows:
        y = cases.index(row["case"]) * step + variants.index(row["variant"])
        colour, (low, high) = COLOURS[row["variant"]], row["quartiles"]
        axes.plot([low, high], [y, y], color=colour, linewidth=1.2, solid_capstyle="butt")
        face = "white" if row["compiled"] else colour
        axes.plot([row["ratio"]], [y], "o", markersize=4, color=colour, markerfacecolor=face, zorder=3)
    axes.axvline(1, color=_MUTED, linewidth=1)
    centre = (len(variants) - 1) / 2
    axes.set_yticks([i * step + centre for i in range(len(cases))], cases, fontsize=8)
    axes.set_ylim(len(cases) * step - (1 + _GAP) / 2, -(1 + _GAP) / 2)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for i in range(1, len(cases)):
        axes.axhline(i * step - (1 + _GAP) / 2, color="#e4e7ea", linewidth=0.6)
    _scale(axes.set_xlim, [row["ratio"] for row in rows])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axes.set_xlabel("time relative to the base")


def _scale(set_limits: Callable[..., Any], ratios: Sequence[float]) -> None:
    """Show 1 and all medians: quartiles of a busy moment may leave the panel."""
    low, high = min(*ratios, 1.0), max(*ratios, 1.0)
    margin = 0.06 * (high - low) or 0.05
    set_limits(low - margin, high + margin)


def _add_legend(figure: Figure, variants: Sequence[str], has_compiled: bool, title: str) -> None:
    handles = [Line2D([], [], color=COLOURS[name], marker="o", markersize=4.2, label=name) for name in variants]
    if has_compiled:
        for label, face in (("eager", _MUTED), ("compiled", "white")):
            handle = Line2D([], [], color=_MUTED, marker="o", markersize=4.2, linestyle="", markerfacecolor=face)
            handle.set_label(label)
            handles.append(handle)
    look = {"ncols": (len(handles) + 1) // 2, "frameon": False, "title": title, "alignment": "left"}
    figure.legend(handles=handles, loc="outside upper left", **look)


def save_growth(path: Path, rows: Sequence[Row], title: str) -> None:
    """Small multiples: measured dots with their quartiles, and the formula as a line."""
    if not rows:
        return
    with figure_style():
        figure = Figure(figsize=(12.5, 5.6), layout="constrained")
        grid = figure.subplots(2, len(AXES), sharex="col", sharey="row")
        for line, kind in enumerate((MIXED_T, TRAINING)):
            for column, axis in enumerate(AXES):
                own = [row for row in rows if row["axis"] == axis and row["pass"] == kind and row["variant"] != BASE]
                _draw_growth(grid[line][column], own)
                if line:
                    grid[line][column].set_xlabel(AXIS_LABELS[axis])
            grid[line][0].set_title(kind)
            grid[line][0].set_ylabel("time relative to the base")
            ratios = [row["ratio"] for row in rows if row["pass"] == kind]
            _scale(grid[line][0].set_ylim, ratios)
        handles = [
            Line2D([], [], color=COLOURS[v], marker="o", markersize=4, linestyle="", label=v) for v in _grown(rows)
        ]
        handles.append(Line2D([], [], color=_MUTED, label="formula: flops and bytes, a floor"))
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
        _save(figure, path)


def _grown(rows: Sequence[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["variant"] for row in rows) if name != BASE]


def _draw_growth(axes: Any, rows: Sequence[Row]) -> None:
    values = sorted({row["value"] for row in rows})
    axes.axhline(1, color=_MUTED, linewidth=1)
    for turn, variant in enumerate(_grown(rows)):
        own = [row for row in rows if row["variant"] == variant]
        places = [values.index(row["value"]) + 0.14 * (turn - 1) for row in own]
        colour = COLOURS[variant]
        axes.vlines(places, *zip(*(row["quartiles"] for row in own), strict=True), color=colour, linewidth=1.2)
        axes.plot(places, [row["ratio"] for row in own], "o", markersize=3.8, color=colour, zorder=3)
        if own[0]["predicted"] is not None:
            heights = [row["predicted"] for row in own]
            axes.plot([values.index(row["value"]) for row in own], heights, color=colour, linewidth=1.1, alpha=0.8)
    axes.xaxis.set_major_locator(FixedLocator(range(len(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{values[round(x)]:,}" if 0 <= x < len(values) else ""))
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.grid(visible=False, axis="x")


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as draft:
        figure.savefig(draft, format="png", dpi=150)
