"""Pictures per second of the embedded tiny Stable Diffusion, end to end through its diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import timestep_experts
from speed_cases import ATTENTION
from speed_passes import (
    COMPILES_ANEW,
    Findings,
    Setting,
    compile_network,
    compiler_at_rest,
    middles,
    num_graphs,
    row_of,
)
from speed_timing import Job, Stopwatch, interleave
from speed_variants import ADAPTERS, BASE, ONE_T, VARIANTS, Form, Maker, UnavailableError, Variant

ASSETS = Path(timestep_experts.__file__).parent / "world" / "assets" / "base"
PROMPTS = ("a red plain star above a blue dotted circle", "a blue dotted circle above a red plain star")
CASE = "tiny Stable Diffusion"


def draw(setting: Setting, form: Form, *, quick: bool, makers: Mapping[str, Maker] = VARIANTS) -> Findings:
    """One row per variant: the same prompts, guidance and seed."""
    findings = Findings()
    steps, num_pictures = (1, 1) if quick else (20, 8)
    about = {"case": CASE, "pass": ONE_T, "compiled": setting.compiled}
    base = load(setting)
    base.unet.requires_grad_(False)
    runs, graphs = {}, {}
    with compiler_at_rest() if setting.compiled else nullcontext():
        for name, make in makers.items():
            before = num_graphs() if setting.compiled else 0
            try:
                if setting.compiled and name == ADAPTERS:
                    raise UnavailableError(COMPILES_ANEW)
                variant = make(base.unet, ATTENTION, form, ONE_T, [])
                run = _Drawing(_with_unet(base, variant, setting), variant, steps, num_pictures)
                run(0.0)
            except UnavailableError as error:
                findings.skipped.append({**about, "variant": name, "reason": str(error)})
                continue
            runs[name], graphs[name] = run, num_graphs() - before if setting.compiled else 0
        jobs = {name: Job(run) for name, run in runs.items()}
        timings = interleave(jobs, BASE, Stopwatch(setting.device), middles(1), setting.budget)
    for name, timing in timings.items():
        row = {**about, "variant": name, "batch": num_pictures, "steps": steps, **row_of(timing)}
        more = {"graphs": graphs[name]} if setting.compiled else {}
        findings.rows.append({**row, "pictures_per_second": num_pictures / timing.seconds, **more})
    return findings


def load(setting: Setting) -> Any:
    """The pipeline, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS, dtype=setting.dtype, local_files_only=True)
    pipeline.to(setting.device).set_progress_bar_config(disable=True)
    return pipeline


def _with_unet(base: Any, variant: Variant, setting: Setting) -> Any:
    pipeline = type(base)(**{**base.components, "unet": variant.model}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    if setting.compiled:
        pipeline.unet = compile_network(variant.model, setting.device)
    return pipeline


class _Drawing:
    """Draw pictures; before every step the variant is told its t, as by a pipeline's callback."""

    def __init__(self, pipeline: Any, variant: Variant, steps: int, num_pictures: int) -> None:
        self.pipeline, self.variant = pipeline, variant
        self.steps = steps
        self.prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_pictures)]

    def __call__(self, t: float) -> None:  # noqa: ARG002 - a pipeline goes through all of them
        self.pipeline.scheduler.set_timesteps(self.steps)
        ts: Sequence[float] = self.pipeline.scheduler.timesteps.tolist()
        self.variant.before(ts[0])

        def tell_next(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
            if step + 1 < len(ts):
                self.variant.before(ts[step + 1])
            return state

        generator = torch.Generator().manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            self.pipeline(
                self.prompts,
                num_inference_steps=self.steps,
                generator=generator,
                output_type="np",
                callback_on_step_end=tell_next,
            )
