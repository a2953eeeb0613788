"""What experts cost in time and memory, beside the bare base and PEFT's LoRA, as ratios inside one run.

Run: python benchmarks/speed.py                                  (or make bench)
     python benchmarks/speed.py --sections layers growth --rounds 9

Prints tables and writes results/speed_<device>.json, speed_<device>.png and speed_growth_<device>.png; a section that
is not run again stays in the file. Sections:

layers      one linear layer or convolution at the widths of known models
denoisers   whole networks of random weights, experts on attention as in the papers
world       pictures per second of the embedded Stable Diffusion, through its pipeline
start       until experts can be used: attached, loaded from a folder, fused in
growth      cost against the number of experts, of contexts, rank, batch and tokens, beside a formula
gap         what a profiler sees more of than beside the bare layer
tricks      what each trick of the fast arithmetic is worth: a routed mixture without it, beside one with all
gates       gates per rank on a LoRA of rank 32, beside the same LoRA without gates

Every variant runs once per round, in an order that moves on, after a warm-up; a ratio is the median over rounds of its
time over the base's right before it. On a GPU: CUDA events, bf16, torch.compile with CUDA graphs. On the CPU: fp32,
and torch.compile on single layers alone unless --compile asks for all. docs/performance.md says what each variant is.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers.utils import logging
from rich.console import Console
from transformers.utils import logging as transformers_logging

from speed_cases import Case, denoiser_cases, layer_cases, passes_of
from speed_gap import gap
from speed_gates import gates
from speed_growth import Sizes, describe, grow
from speed_passes import Findings, Setting, build, compiler_problem, measure
from speed_report import print_tables, save_growth, save_ratios
from speed_start import start
from speed_targets import print_targets
from speed_timing import Budget
from speed_tricks import comparison_cases, tricks
from speed_variants import PASSES, VARIANTS, Form
from speed_world import draw
from timestep_experts.formats.atomic import write_json

SECTIONS = ("layers", "denoisers", "world", "start", "growth", "gap", "tricks", "gates")
LIST_CASES: dict[str, Callable[..., list[Case]]] = {
    "layers": layer_cases,
    "denoisers": denoiser_cases,
    "tricks": comparison_cases,
    "gates": comparison_cases,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = Path(__file__).parent / "results"
FORM = Form(num_experts=8, rank=4)


def main() -> None:
    """Measure the sections that were asked for; write after each."""
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    device = choose_device(options.device)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    output = options.output / f"speed_{device.type}.json"
    budget = Budget(options.rounds or 15, options.seconds)
    if options.quick:
        budget = Budget(2, 1, min_seconds=0.001)
    setting = Setting(device, dtype, budget)
    console = Console(width=max(Console().width, 130))
    document = json.loads(output.read_text()) if output.exists() else {"sections": {}}
    problem = "" if options.compile is False else compiler_problem(device)
    for section in SECTIONS:
        if section not in options.sections:
            continue
        findings, about = Findings(), environment(setting, options.quick)
        before = document["sections"].get(section, {})
        if section in LIST_CASES:
            require_same_table(section, options, device, before, about)
        for compiled in kinds(section, options.compile, problem, device, findings):
            more = run_section(section, replace(setting, compiled=compiled), options, console)
            findings.rows += more.rows
            findings.skipped += more.skipped
        if section in LIST_CASES and options.cases.pattern:
            keep_other_cases(findings, before)
        document["sections"][section] = {"environment": about, "rows": findings.rows, "skipped": findings.skipped}
        write_json(output, document)
        print_tables(console, section, findings.rows, findings.skipped)
    sections = {name: document["sections"][name]["rows"] for name in SECTIONS if name in document["sections"]}
    print_targets(console, sections)
    draw_figures(document, sections, output, device)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    help_cases = "of layers, denoisers, tricks and gates what has this in 'case, pass', as in 'SD3.*one t'"
    parser.add_argument("--cases", metavar="REGEX", type=re.compile, default=re.compile(""), help=help_cases)
    parser.add_argument(
        "--rounds", type=int, help="at most so many (15; fewer where a round takes long, never below 3)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="about so long for the rounds of one case and pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="bf16 on a GPU, fp32 on the CPU")
    help_compile = "everywhere, or nowhere; left out, on a GPU everywhere and on the CPU for single layers"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help=help_compile)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: whether it runs, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}")
    if options.quick and options.output == RESULTS:
        parser.error("--quick measures nothing: name another folder with --output")
    return options


def choose_device(name: str) -> torch.device:
    """The one asked for; a GPU if there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and found != "cuda":
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    return torch.device(found if name == "auto" else name)


def kinds(section: str, asked: bool | None, problem: str, device: torch.device, findings: Findings) -> Iterator[bool]:
    """Eager, and compiled where that is wanted and works; what is left out is said."""
    yield False
    everywhere = device.type == "cuda" or section in ("layers", "tricks", "gates")
    if section in ("start", "growth", "gap") or asked is False:
        return
    if asked is None and not everywhere:
        reason = "compiling takes long on a CPU; --compile asks for it"
    elif problem:
        reason = problem
    else:
        yield True
        return
    findings.skipped.append({"case": "all", "pass": "compiled", "compiled": True, "variant": "all", "reason": reason})


def require_same_table(
    section: str, options: argparse.Namespace, device: torch.device, before: dict[str, Any], about: dict[str, Any]
) -> None:
    """Stop where no case is meant, or where those that would stay were measured under other conditions."""
    cases = LIST_CASES[section](device, quick=options.quick)
    if not any(passes_of(case, options.cases) for case in cases):
        raise SystemExit(
            f"--cases: nothing in {section} is called {options.cases.pattern!r}; it has:"
            f" {', '.join(case.name for case in cases)}; each with {', with '.join(PASSES)}"
        )
    is_part = any(len(passes_of(case, options.cases)) < len(PASSES) for case in cases)
    if is_part and before.get("environment", about) != about:
        raise SystemExit(
            f"--cases: the other {section} in the file were measured under other conditions, {before['environment']}"
            f" and not {about}; measure all of them again, or name another folder with --output"
        )


def keep_other_cases(findings: Findings, before: dict[str, Any]) -> None:
    """Put what an earlier run has of other cases and passes before what was found of these."""
    measured = {_key(row) for row in findings.rows}
    for name in ("rows", "skipped"):
        own = getattr(findings, name)
        own[:0] = [row for row in before.get(name, []) if _key(row) not in measured and row not in own]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["pass"], row["compiled"]


def run_section(section: str, setting: Setting, options: argparse.Namespace, console: Console) -> Findings:
    """All cases of a section under all passes, eager or compiled."""
    quick = options.quick
    if section == "world":
        return draw(setting, FORM, quick=quick)
    if section == "start":
        return start(denoiser_cases(setting.device, quick=quick)[0], setting, FORM)
    if section == "growth":
        return grow(replace(setting, memory=False), quick=quick)
    if section == "gap":
        return gap(setting, FORM, quick=quick)
    if section == "gates":
        return gates(setting, FORM, options.cases, quick=quick, console=console)
    if section == "tricks":
        return tricks(setting, FORM, options.cases, quick=quick, console=console)
    findings = Findings()
    for case in LIST_CASES[section](setting.device, quick=quick):
        if not (passes := passes_of(case, options.cases)):
            continue
        base = build(case, setting)
        for kind in passes:
            with console.status(f"{case.name}, {kind}{', compiled' if setting.compiled else ''}"):
                more = measure(case, base, kind, VARIANTS, FORM, setting)
            findings.rows += more.rows
            findings.skipped += more.skipped
    return findings


def environment(setting: Setting, quick: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    is_cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "num_experts": FORM.num_experts,
        "rank": FORM.rank,
        "quick": quick,
        "memory": "max_memory_allocated" if is_cuda else "torch.profiler",
    }


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def draw_figures(document: dict[str, Any], sections: dict[str, Any], output: Path, device: torch.device) -> None:
    """Of all sections in the file, those of earlier runs too."""
    about = next(iter(document["sections"].values()))["environment"]
    machine = f"{about['device']}, {about['dtype']}, {about['threads']} thread(s)"
    save_ratios(output.with_suffix(".png"), sections, f"{machine}; rank {FORM.rank}, {FORM.num_experts} experts")
    grown = f"One linear layer, one size changed at a time from {describe(Sizes())}; {machine}"
    save_growth(output.with_name(f"speed_growth_{device.type}.png"), sections.get("growth", []), grown)


if __name__ == "__main__":
    main()
