"""Measure the shipped base and judge: held-out renders for the judge, 300 held-out captions for the base.

Run: python scripts/measure_base.py       (about two minutes on two cores)
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from timestep_experts.evaluation import judge_pictures
from timestep_experts.inference import SampleSettings, sample
from timestep_experts.models import StableDiffusion
from timestep_experts.world.judge import ASSETS, Verdict
from timestep_experts.world.render import DOMAINS, render
from timestep_experts.world.scenes import draw_scenes


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ASSETS / "base")
    parser.add_argument("--num-captions", type=int, default=300)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    table = Table("what", *asdict(Verdict(0, 0, 0, 0)), title="promises kept, %")
    scenes = draw_scenes(options.num_captions, seed=2024, held_out=True)
    captions = [scene.caption for scene in scenes]
    for domain in DOMAINS:
        add_row(table, f"judge, held-out {domain} renders", judge_pictures(render(scenes, domain, seed=2025), captions))
    family = StableDiffusion.load(str(options.base), torch.device("cpu"))
    settings = SampleSettings("DPMSolverMultistepScheduler", options.steps, options.guidance, 64, 50, seed=42)
    drawn = sample(family.pipeline(), captions, settings)
    add_row(table, f"base, {len(captions)} held-out captions", judge_pictures(drawn, captions))
    Console().print(table)
    size = sum(path.stat().st_size for path in options.base.rglob("*") if path.is_file())
    print(f"size of the base: {size / 1e6:.2f} MB")


def add_row(table: Table, name: str, verdict: Verdict) -> None:
    """One line of percentages."""
    table.add_row(name, *(f"{100 * value:.1f}" for value in asdict(verdict).values()))


if __name__ == "__main__":
    main()
