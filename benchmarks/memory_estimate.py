"""Memory of a training step: what ``--dry-run`` estimates against what a process on the CPU takes.

    python benchmarks/memory_estimate.py [--write benchmarks/results/memory_estimate.json]

Every case runs two optimiser steps of random weights, each time in a process of its own. "measured" is the peak of
PyTorch's allocations in them, by torch.profiler; "RSS" is the growth of the resident set as Linux counts it, with what
kernels and the allocator keep for themselves. All leave out the base. Takes ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from rich.console import Console
from rich.table import Table
from torch import Tensor

from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import DDPM, Family, Flux, PixArt, StableDiffusion, StableDiffusion3, Wan
from timestep_experts.training import FosterSettings, LoopSettings, OptimiserSettings, foster
from timestep_experts.training.loop import run_stage
from timestep_experts.training.memory import fake_networks, step_peak
from timestep_experts.training.optimiser import state_bytes
from timestep_experts.training.stage import Stage, Training

INTERVALS, RANK, PER_INTERVAL = 4, 8, 2
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
OPTIMISER = OptimiserSettings("AdamW", {})
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion() -> Family:
    """A UNet of 74 million parameters."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 512),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": scheduler}
    return StableDiffusion(diffusers.StableDiffusionPipeline(**parts, **NO_CHECKER))


def ddpm() -> Family:
    """A pixel UNet."""
    unet = diffusers.UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 512))
    return DDPM(diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()))


def pixart() -> Family:
    """A DiT of 12 blocks."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        num_layers=12,
        cross_attention_dim=512,
        caption_channels=512,
        sample_size=32,
    )
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": transformer}
    return PixArt(diffusers.PixArtAlphaPipeline(**parts, scheduler=diffusers.DDPMScheduler()))


def stable_diffusion_3() -> Family:
    """An MM-DiT of 8 blocks."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        num_attention_heads=8,
        joint_attention_dim=512,
        caption_projection_dim=512,
        pooled_projection_dim=512,
        pos_embed_max_size=32,
    )
    names = ("vae", *(f"{kind}{end}" for kind in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {**dict.fromkeys(names), "transformer": transformer, "scheduler": scheduler}
    return StableDiffusion3(diffusers.StableDiffusion3Pipeline(**parts))


def flux() -> Family:
    """Two double and six single blocks."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        pooled_projection_dim=512,
        axes_dims_rope=(8, 28, 28),
    )
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Flux(diffusers.FluxPipeline(**dict.fromkeys(names), transformer=transformer, scheduler=scheduler))


def wan() -> Family:
    """A video DiT of 6 blocks."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, text_dim=512, ffn_dim=2048, num_layers=6, rope_max_seq_len=64
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return Wan(diffusers.WanPipeline(**parts, transformer=transformer, scheduler=scheduler))


def _text(length: int = 77, width: int = 512, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (length, width), **more}


FAMILIES: dict[str, tuple[Callable[[], Family], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "StableDiffusion": (stable_diffusion, (4, 32, 32), _text(width=768)),
    "DDPM": (ddpm, (3, 32, 32), {"nothing": (0,)}),
    "PixArt": (pixart, (4, 32, 32), _text(120, encoder_attention_mask=(120,))),
    "StableDiffusion3": (stable_diffusion_3, (4, 32, 32), _text(333, pooled_projections=(512,))),
    "Flux": (flux, (4, 32, 32), _text(256, pooled_projections=(512,))),
    "Wan": (wan, (16, 3, 32, 32), _text(512)),
}
OPTIONS = ("", "checkpointing", "bf16", "checkpointing,bf16", "checkpointing,accumulation")
CASES = [(name, options) for name in FAMILIES for options in (OPTIONS if name == "StableDiffusion" else ("",))]


def prepare(name: str, options: str) -> tuple[Family, Mixture]:
    """A family with experts, on the default device."""
    family = FAMILIES[name][0]()
    if "checkpointing" in options:
        family.checkpoint_gradients()
    spec = MixtureSpec((Scale("n4", Partition.uniform(INTERVALS), RANK, RANK),))
    return family, Mixture.attach(family.denoisers, spec, TARGETS)


def make_stage(mixture: Mixture) -> Stage:
    """Two steps of all experts."""
    rates, steps = {"n4": [1e-4] * INTERVALS}, {"n4": [2] * INTERVALS}
    return foster(mixture, FosterSettings("joint", PER_INTERVAL, rates, steps, caption_dropout=0.0, seed=0))[0]


def make_settings(options: str) -> LoopSettings:
    """See `OPTIONS`."""
    return LoopSettings(
        OPTIMISER,
        gradient_accumulation_steps=4 if "accumulation" in options else 1,
        mixed_precision="bf16" if "bf16" in options else "no",
        checkpointing_steps=None,
    )


def make_pictures(name: str) -> EncodedDataset:
    """One picture and one caption."""
    _, latents, features = FAMILIES[name]
    made: dict[str, Tensor] = {key: torch.ones(2, *shape) for key, shape in features.items()}
    return EncodedDataset(torch.ones(1, *latents), torch.zeros(1, dtype=torch.long), made, ("",), ())


def estimate(name: str, options: str) -> tuple[int, int]:
    """Parameters of the base, and bytes of gradients, activations and optimiser state, as the dry run counts them."""
    with torch.device("meta"):
        family, mixture = prepare(name, options)
    settings = make_settings(options)
    with fake_networks(family.denoisers.values()):
        stage = make_stage(mixture)
        micro_batches = settings.gradient_accumulation_steps
        training, pictures = Training(stage, mixture, family), make_pictures(name)
        peak = step_peak(training, pictures, micro_batches, settings.mixed_precision, on_accelerator=False)
    shapes = [leaf.shape for group in stage.param_groups for leaf in group.leaves]
    base = sum(p.numel() for p in family.denoiser.parameters()) - mixture.count_parameters().stored
    return base, peak + state_bytes(OPTIMISER.name, OPTIMISER.options, shapes)


def measure(name: str, options: str, by: str) -> int:
    """The peak of two real steps in this process, by the profiler or by the resident set."""
    family, mixture = prepare(name, options)
    pictures, stage = make_pictures(name), make_stage(mixture)
    profile = torch.profiler.profile(profile_memory=True)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
    with tempfile.TemporaryDirectory() as folder, profile if by == "profiler" else nullcontext():
        run_stage(Training(stage, mixture, family), pictures, make_settings(options), Path(folder), {})
    if by != "profiler":
        return _status("VmHWM") - before
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def compare(name: str, options: str) -> dict[str, Any]:
    """One row."""
    base, estimated = estimate(name, options)
    row: dict[str, Any] = {"family": name, "options": options, "base": base, "estimated": estimated}
    for key, by in (("measured", "profiler"), ("rss", "resident set")):
        command = [sys.executable, __file__, "--measure", name, options, by]
        run = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this script
        row[key] = int(run.stdout)
    return row


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="also write the rows as JSON")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.measure:
        print(measure(*arguments.measure))
        return
    rows = []
    console = Console(width=120)
    titles = ("family", "options", "base", "estimated", "measured", "ratio", "RSS", "ratio")
    table = Table(*titles, title="peak of training on the CPU, without the base")
    for name, options in CASES:
        row = compare(name, options)
        rows.append(row)
        estimated, measured, rss = (row[key] for key in ("estimated", "measured", "rss"))
        cells = [f"{row['base'] / 1e6:.0f} M", *(f"{value / 2**20:,.0f} MiB" for value in (estimated, measured))]
        more = [f"{estimated / measured:.2f}", f"{rss / 2**20:,.0f} MiB", f"{estimated / rss:.2f}"]
        table.add_row(name, options or "-", *cells, *more)
    console.print(table)
    if arguments.write:
        arguments.write.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
