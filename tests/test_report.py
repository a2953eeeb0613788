"""The report: one file that needs nothing else, honest tables, figures and sheets that survive odd numbers and text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from timestep_experts.errors import UserError
from timestep_experts.evaluation import GateMap, LossCurve, Result
from timestep_experts.intervals import Partition
from timestep_experts.mixture import ParameterCount
from timestep_experts.report import (
    ReportContent,
    gate_heat_map,
    interval_table,
    loss_per_timestep,
    results_rows,
    results_table,
    save_sheet,
    training_curves,
    write_report,
)
from timestep_experts.report.html import summarise
from timestep_experts.report.labels import line_styles, short_names, spread
from timestep_experts.report.pictures import resize_to_view
from timestep_experts.report.table import MISSING, results_columns
from timestep_experts.world.judge import Verdict

INTERVALS = Partition.uniform(4).intervals
MODULES = ("down_blocks.0.attentions.0.to_q", "down_blocks.0.attentions.0.to_k", "mid_block.attentions.0.to_q")
HOSTILE = "<script>alert(1)</script> & $x$ \"quoted\" 'too'"
VOID = {"meta", "img", "br", "link", "input"}


def result(variant: str, losses: Sequence[float], mode: str = "switch", **changes: object) -> Result:
    parameters = ParameterCount(0, 0, 0) if variant == "base" else ParameterCount(4096, 1024, 4096)
    row = Result(
        variant=variant,
        mode="off" if variant == "base" else mode,
        curve=LossCurve(INTERVALS, tuple(losses), (0.01,) * len(losses)),
        interval_losses=tuple(losses),
        verdict=None,
        frechet=None,
        parameters=parameters,
        num_images_seen=0 if variant == "base" else 32_000,
        seconds=0.0 if variant == "base" else 61.0,
        gates=(),
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def gates(modules: Sequence[str] = MODULES, scale: str = "n1") -> GateMap:
    values = tuple(tuple(0.1 * (m - 1) + 0.01 * b for b in range(4)) for m in range(len(modules)))
    return GateMap(scale, tuple(modules), (125.0, 375.0, 625.0, 875.0), values, values)


BASE = result("base", (0.8, 0.4, 0.2, 0.1))
PLAIN = result("plain", (0.7, 0.35, 0.15, 0.09))
ROUTED = result("main", (0.6, 0.36, 0.14, 0.08), "route", gates=(gates(), gates(scale="n2")))


def content(results: Sequence[Result] = (BASE, PLAIN, ROUTED)) -> ReportContent:
    shades = {row.label: np.full((2, 32, 32, 3), 60 * i, np.uint8) for i, row in enumerate(results)}
    return ReportContent(
        title="A title",
        recipe_yaml="resolution: 64\n",
        command="timestep-experts run recipe.yaml",
        results=results,
        intervals=INTERVALS,
        training_logs={"main, foster": [{"step": i, "num_images_seen": 8.0 * i, "loss": 1 / i} for i in range(1, 90)]},
        prompts=("a star", "a circle"),
        pictures={**shades, "real": np.zeros((2, 32, 32, 3), np.uint8)},
        notes=("A note.",),
        skipped=(("a.png", "truncated"),),
        environment={"torch": "2.13.0"},
    )


class Page(HTMLParser):
    """What a page holds: attributes by tag, text by section, and whether its tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open_tags = text, []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.bold: list[str] = []
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags[-1:] == ["strong"]:
            self.bold.append(data)

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for name, value in attributes.items() if name in names]


def write(tmp_path: Path, shown: ReportContent) -> Page:
    write_report(tmp_path / "deep" / "report.html", shown)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    return Page((tmp_path / "deep" / "report.html").read_text(encoding="utf-8"))


def terminal(table: Table, width: int = 120) -> list[str]:
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue().splitlines()


def labels_of(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_report_fetches_nothing(tmp_path: Path) -> None:
    page = write(tmp_path, content())
    addresses = page.values("src", "href", "xlink:href", "srcset", "data", "action", "poster")
    assert addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\((?!#)", page.text)
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_report_ids_are_unique_and_every_inner_link_has_its_target(tmp_path: Path) -> None:
    other = replace(ROUTED, variant="other", gates=(gates(MODULES[:2]),))  # a scale of the same name
    page = write(tmp_path, content((BASE, PLAIN, ROUTED, other)))
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    targets = {value[1:] for value in page.values("href", "xlink:href") if value.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", page.text))
    assert targets <= set(ids)


def test_report_escapes_what_others_wrote(tmp_path: Path) -> None:
    hostile = replace(ROUTED, variant=HOSTILE, gates=(gates([f"{HOSTILE}.{i}" for i in range(3)]),))
    shown = replace(
        content((BASE, PLAIN, hostile)),
        title=HOSTILE,
        command=HOSTILE,
        recipe_yaml=HOSTILE,
        prompts=(HOSTILE, HOSTILE),
        notes=(HOSTILE,),
        skipped=((HOSTILE, HOSTILE),),
        environment={HOSTILE: HOSTILE},
        training_logs={HOSTILE: [{"num_images_seen": 8.0, "loss": 1.0}]},
    )
    page = write(tmp_path, shown)
    assert "<script" not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert f"real: {HOSTILE}" in page.values("alt")


def test_report_leaves_out_what_is_empty(tmp_path: Path) -> None:
    bare = ReportContent("t", "", "", (BASE, PLAIN), INTERVALS, {}, (), {}, (), (), {})
    page = write(tmp_path, bare)
    assert {value for value in page.values("id") if "-" not in value} == {"results", "loss"}
    page = write(tmp_path, replace(bare, results=(), intervals=()))
    assert page.values("id") == []


def test_report_shows_true_pictures_then_base_then_rows(tmp_path: Path) -> None:
    page = write(tmp_path, content())
    assert page.values("alt") == [
        f"{label}: {prompt}"
        for prompt in ("a star", "a circle")
        for label in ("real", "base", "plain, switch", "main, route")
    ]


def test_report_opens_the_first_gate_map_only(tmp_path: Path) -> None:
    page = write(tmp_path, replace(content(), skipped=()))
    assert ["open" in attributes for tag, attributes in page.tags if tag == "details"] == [True, False]


def test_best_values_are_bold_and_the_base_wins_nothing_for_costing_nothing(tmp_path: Path) -> None:
    small = replace(PLAIN, parameters=ParameterCount(1000, 1000, 1000), seconds=61.04)
    page = write(tmp_path, content((BASE, small, ROUTED)))
    # First table: the small row's parameters, the routed row's mean loss; samples and shown times do not differ.
    # Second table: the plain row's second interval, the routed row's others.
    assert page.bold == ["1,000", "1,000", "1,000", "0.2950", "0.3500", "0.6000", "0.1400", "0.08000"]


def test_columns_without_values_are_left_out() -> None:
    def keys(*results: Result) -> set[str]:
        return {column.key for column in results_columns(results_rows(results, INTERVALS), INTERVALS)}

    optional = {"colour", "shape", "texture", "relation", "frechet"}
    judged = replace(PLAIN, verdict=Verdict(1.0, 0.5, 0.25, 0.0), frechet=0.0)
    assert keys(BASE, judged) - keys(BASE, PLAIN) == optional
    assert optional.isdisjoint(keys(BASE, PLAIN))


def test_rows_hold_the_measured_numbers() -> None:
    judged = replace(ROUTED, verdict=Verdict(1.0, 0.5, 0.25, 0.0), frechet=3.5)
    assert results_rows([judged], INTERVALS) == [
        {
            "label": "main, route",
            "loss": pytest.approx(0.295),
            "loss [0, 250)": 0.6,
            "loss [250, 500)": 0.36,
            "loss [500, 750)": 0.14,
            "loss [750, 1000)": 0.08,
            "colour": 1.0,
            "shape": 0.5,
            "texture": 0.25,
            "relation": 0.0,
            "frechet": 3.5,
            "trained": 4096,
            "stored": 4096,
            "active": 1024,
            "num_images_seen": 32_000,
            "seconds": 61.0,
        }
    ]


def test_rows_refuse_losses_of_other_intervals() -> None:
    with pytest.raises(ValueError, match=r"'plain, switch' has 4 interval losses; 2 intervals are reported"):
        results_rows([PLAIN], INTERVALS[:2])


def test_numbers_share_unit_and_decimals_within_a_column() -> None:
    def texts(key: str, *results: Result) -> tuple[str, list[str]]:
        rows = results_rows(results, INTERVALS)
        column = next(column for column in results_columns(rows, INTERVALS) if column.key == key)
        return column.unit, [column.text(row) for row in rows]

    large = replace(PLAIN, parameters=ParameterCount(12_340_000, 1, 1_800_000))
    assert texts("stored", BASE, PLAIN, large) == ("M", ["0", "0.00", "12.34"])
    assert texts("trained", BASE, PLAIN, large) == ("k", ["0", "4.1", "1,800.0"])
    assert texts("frechet", BASE, replace(PLAIN, frechet=1.234), replace(PLAIN, frechet=45.6)) == (
        "",
        [MISSING, "1.23", "45.60"],
    )


def test_rows_that_diverged_are_shown_and_never_best() -> None:
    diverged = result("bad", (math.nan, math.inf, 0.5, 0.5), frechet=math.nan)
    rows = results_rows([BASE, PLAIN, diverged], INTERVALS)
    columns = {column.key: column for column in results_columns(rows, INTERVALS)}
    assert columns["loss"].text(rows[2]) == "nan"
    assert columns["loss [250, 500)"].text(rows[2]) == "inf"
    assert columns["frechet"].text(rows[2]) == "nan"
    assert [columns["loss"].is_best(row) for row in rows] == [False, True, False]
    assert not any(column.is_best(rows[2]) for key, column in columns.items() if key.startswith("loss [0"))
    assert "1 row has no finite loss" in summarise(rows)


def test_report_survives_numbers_that_are_not_finite(tmp_path: Path) -> None:
    nan = math.nan
    hollow = replace(gates(), mean=((nan,) * 4,) * 3, spread=((nan,) * 4,) * 3)
    bad = result(
        "bad", (nan, math.inf, nan, nan), "route", gates=(hollow,), frechet=nan, verdict=Verdict(nan, nan, 0, 0)
    )
    logs = {"bad, foster": [{"num_images_seen": 8.0, "loss": nan}], "worse, foster": [{"step": 1.0}]}
    for results in ((bad,), (BASE, bad, PLAIN), (BASE, bad)):
        write(tmp_path, replace(content(results), training_logs=logs))


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        ((BASE, PLAIN, ROUTED), "“main, route” has the lowest mean validation loss, 0.295:"
         " 21.3 % below the base and 8.5 % below the next best, “plain, switch”."),
        ((PLAIN, result("worse", (9, 9, 9, 9)), BASE), "“plain, switch” has the lowest mean validation loss, 0.3225:"
         " 14.0 % below the base."),
        ((BASE, result("worse", (0.8, 0.4, 0.2, 0.1001))), "No trained row improves on the base, whose mean validation"
         " loss is 0.375: less than 0.1 % below the next best, “worse, switch”."),
        ((PLAIN,), "“plain, switch” alone was measured: its mean validation loss is 0.3225."),
        ((result("bad", (math.nan,) * 4),), "No finite validation loss was measured."),
    ],
)  # fmt: skip
def test_summary_is_what_the_losses_say(results: Sequence[Result], sentence: str) -> None:
    assert summarise(results_rows(results, INTERVALS)) == sentence


def test_terminal_tables_fit_120_columns() -> None:
    partition = Partition.uniform(8)
    losses = tuple(0.4321 / 2**i for i in range(8))
    row = result("coarse-to-fine", losses, verdict=Verdict(1, 1, 0.875, 1), frechet=123.456, num_images_seen=256_000)
    row = replace(row, curve=LossCurve(partition.intervals, losses, losses), seconds=12_345.6)
    row = replace(row, parameters=ParameterCount(9_876_543, 9_876_543, 9_876_543))
    for make in (results_table, interval_table):
        lines = terminal(make([row, replace(row, variant="main")], partition.intervals))
        assert max(map(len, lines)) <= 120
        assert "…" not in "".join(lines)
        assert len([line for line in lines if line.startswith(" coarse-to-fine, switch ")]) == 1
    text = "\n".join(terminal(results_table([row], partition.intervals)))
    assert all(word in text for word in ("100.0", "87.5", "123", "9,876.5", "256.0", "12,346"))


def test_tables_survive_square_brackets_in_a_name() -> None:
    assert any(
        "[bold]x[/], switch" in line
        for line in terminal(results_table([replace(PLAIN, variant="[bold]x[/]")], INTERVALS))
    )


def test_loss_figure_names_every_row_and_the_reference() -> None:
    texts = labels_of(loss_per_timestep([BASE, PLAIN, ROUTED], "plain, switch"))
    assert texts.count("plain, switch") == texts.count("main, route") == 2
    assert "Loss divided by that of 'plain, switch'" in texts
    with pytest.raises(ValueError, match=r"no row 'lora' .* 'base', 'plain, switch'"):
        loss_per_timestep([BASE, PLAIN], "lora")


def test_loss_figure_says_where_a_row_left_the_ratio() -> None:
    far = result("base", (80.0, 40.0, 20.0, 10.0))
    assert "base (above)" in labels_of(loss_per_timestep([far, PLAIN, ROUTED], "plain, switch"))


def test_figures_are_deterministic_and_plain() -> None:
    svg = gate_heat_map(gates())
    assert svg == gate_heat_map(gates())
    assert svg.startswith("<svg")
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert {"down.0.to_q", "down.0.to_k", "mid.to_q"} <= set(labels_of(svg))


def test_gate_heat_map_holds_130_modules_or_one() -> None:
    many = [f"up_blocks.{i // 10}.attentions.{i % 10}.to_q" for i in range(130)]
    assert len(set(short_names(many)) & set(labels_of(gate_heat_map(gates(many))))) == 130
    assert "to_q" in labels_of(gate_heat_map(gates(["to_q"])))


def test_training_curves_skip_records_without_losses() -> None:
    logs = {
        "main, foster": [
            {"num_images_seen": 8.0, "loss": 1.0},
            {"validation/mean": 3.0},
            {"num_images_seen": 16.0, "loss": 0.5},
        ],
        "main, assemble": [{"validation/mean": 3.0}],
    }
    texts = labels_of(training_curves(logs))
    assert "main, foster" in texts
    assert "main, assemble" not in texts


def test_line_styles_tell_variants_by_colour_and_modes_by_dash() -> None:
    names = ["base", *(f"variant{i}, {mode}" for i in range(10) for mode in ("switch", "route"))]
    styles = line_styles(names, "base")
    assert len({(style.colour, str(style.dash)) for style in styles.values()}) == len(names)
    assert styles["variant0, switch"].colour == styles["variant0, route"].colour != styles["variant1, route"].colour
    assert [name for name in names if styles[name].is_muted] == ["base"]


def test_short_names_stay_different_and_keep_what_tells_them_apart() -> None:
    full = [f"down_blocks.{i}.attentions.{a}.transformer_blocks.0.attn1.to_q" for i in (0, 1) for a in (0, 1)]
    assert short_names(full) == [
        "down.0.0.attn1.to_q",
        "down.0.1.attn1.to_q",
        "down.1.0.attn1.to_q",
        "down.1.1.attn1.to_q",
    ]
    assert short_names(["mid_block.attentions.0.proj"]) == ["mid.attn.0.proj"]


@pytest.mark.parametrize(
    ("wanted", "gap", "places"),
    [
        ([], 0.1, []),
        ([0.5], 0.1, [0.5]),
        ([0.5, 0.5], 0.2, [0.4, 0.6]),
        ([0.9, 0.1], 0.2, [0.9, 0.1]),
        ([1.0, 1.0, 1.0], 0.1, [0.8, 0.9, 1.0]),
        ([7.0, -7.0], 0.1, [1.0, 0.0]),
        ([0.5, 0.5, 0.5], 9.0, [0.0, 0.5, 1.0]),
    ],
)
def test_spread_keeps_labels_apart_and_near(wanted: list[float], gap: float, places: list[float]) -> None:
    assert spread(wanted, gap) == pytest.approx(places)


def open_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(("side", "shown"), [(32, 160), (64, 192), (100, 200), (200, 200), (1024, 512)])
def test_pictures_are_shown_at_a_readable_size(side: int, shown: int) -> None:
    assert resize_to_view(noise(side, side, 3)).size == (shown, shown)


def test_sheet_holds_every_picture_and_its_whole_caption(tmp_path: Path) -> None:
    pictures = np.stack([np.full((160, 160, 3), shade, np.uint8) for shade in (10, 20, 30)])
    for name, caption in (("short", "a"), ("long", "many words " * 12), ("endless", "x" * 200)):
        save_sheet(tmp_path / "new" / f"{name}.png", pictures, ["", caption, ""], columns=2)
    sheets = {path.stem: open_picture(path) for path in (tmp_path / "new").iterdir()}
    assert set(sheets) == {"short", "long", "endless"}
    colours = {colour for _, colour in sheets["long"].getcolors(1 << 20)}
    assert {(10, 10, 10), (20, 20, 20), (30, 30, 30)} <= colours
    assert sheets["long"].width == sheets["endless"].width == sheets["short"].width
    assert min(sheets["long"].height, sheets["endless"].height) > sheets["short"].height + 100


def test_sheet_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sheet.png"
    save_sheet(path, noise(1, 32, 32, 3), ["before"])
    before = path.read_bytes()

    def fail(self: Image.Image, draft: Path, **_: object) -> None:
        draft.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*sheet.png: disk full"):
        save_sheet(path, noise(1, 32, 32, 3), ["after"])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("pictures", "captions", "columns", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), [], 4, "at least|N >= 1"),
        (np.zeros((1, 8, 8), np.uint8), ["a"], 4, r"got \(1, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), ["a"], 4, "got 1 for 2 pictures"),
        (np.zeros((1, 8, 8, 3), np.uint8), ["a"], 0, "at least 1 column; got 0"),
    ],
)
def test_sheet_refuses_what_it_cannot_show(
    pictures: NDArray[np.uint8], captions: list[str], columns: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_sheet(tmp_path / "sheet.png", pictures, captions, columns)
    assert list(tmp_path.iterdir()) == []
