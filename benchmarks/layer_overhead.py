"""What experts cost on one layer, beside the bare layer and PEFT's LoRA, as ratios inside one run.

Run: python benchmarks/layer_overhead.py            (one minute; prints a table, writes results/layer_overhead.json)

Linear 640 -> 640 on 8 x 1024 tokens, and Conv2d 320 -> 320, kernel 3, on 8 x 32 x 32; rank 4; fp32 on the CPU. Variants
are timed in turn, round after round, and the ratio is the median over rounds, so that a busy moment hits all of them.
Samples have timesteps of their own, as in training, or share one, as in pipelines; folded ones only so.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, asymmetric

RANK = 4


class Denoiser(nn.Module):
    """One layer behind a timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # noqa: ARG002 - read by the mixture's hook
        """Apply the layer."""
        output: Tensor = self.layer(sample)
        return output


def main() -> None:
    """Time all variants on both layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layer_overhead.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = {
        "Linear 640": (nn.Linear(640, 640), torch.randn(8, 1024, 640)),
        "Conv2d 320, 3x3": (nn.Conv2d(320, 320, 3, padding=1), torch.randn(8, 320, 32, 32)),
    }
    columns = ("forward", "forward and backward", "forward, one timestep")
    table = Table("layer", "variant", *columns, title="time relative to the bare layer")
    results = []
    for name, (layer, x) in layers.items():
        variants = make_variants(layer)
        forward = relative_times({key: forward_of(model, x) for key, model in variants.items()}, options.rounds)
        both = relative_times({key: training_of(model, x) for key, model in variants.items()}, options.rounds)
        variants["switch, folded"] = make_folded(layer)
        shared = relative_times({key: forward_of(m, x, is_shared=True) for key, m in variants.items()}, options.rounds)
        for key in variants:
            times = {"forward": forward.get(key), "forward_backward": both.get(key), "forward_shared": shared[key]}
            table.add_row(name, key, *("" if time is None else f"{time:.2f}" for time in times.values()))
            results.append({"layer": name, "variant": key, **times})
    Console().print(table)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    options.output.write_text(json.dumps({"environment": environment, "results": results}, indent=2) + "\n")


def make_variants(layer: nn.Module) -> dict[str, Denoiser]:
    """The bare layer, PEFT's LoRA, and the mixture switched and routed; base weights frozen."""
    layer.requires_grad_(False)
    bare, lora, switched, routed = (Denoiser(copy.deepcopy(layer)) for _ in range(4))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"]), lora)
    scales = asymmetric([Scale(f"n{n}", Partition.uniform(n), RANK, RANK) for n in (8, 1)])
    Mixture.attach(switched, MixtureSpec(scales[:1]), ["layer"]).mode = "switch"
    Mixture.attach(routed, MixtureSpec(scales), ["layer"]).mode = "route"
    return {"bare": bare, "PEFT LoRA": lora, "switch, 8 experts": switched, "route, 8 experts + context": routed}


def make_folded(layer: nn.Module) -> Denoiser:
    """The mixture switched, its experts in the weight."""
    folded = Denoiser(copy.deepcopy(layer)).eval()
    mixture = Mixture.attach(folded, MixtureSpec((Scale("n8", Partition.uniform(8), RANK, RANK),)), ["layer"])
    mixture.mode = "switch"
    mixture.fold()
    return folded


def forward_of(model: Denoiser, x: Tensor, *, is_shared: bool = False) -> Callable[[], None]:
    """A forward pass at mixed timesteps, or at one."""
    t = torch.tensor(437.0) if is_shared else torch.linspace(0, 999, len(x))

    @torch.no_grad()
    def run() -> None:
        model(x, t)

    return run


def training_of(model: Denoiser, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass, to the input and to whatever is trained."""
    t, x = torch.linspace(0, 999, len(x)), x.clone().requires_grad_(True)

    def run() -> None:
        model(x, t).sum().backward()
        x.grad = None

    return run


def relative_times(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median over rounds of each variant's time divided by the bare layer's in the same round."""
    ratios: dict[str, list[float]] = {key: [] for key in variants}
    for turn in range(rounds + 2):
        seconds = {key: _time(run) for key, run in variants.items()}
        if turn >= 2:  # warm-up
            for key, value in seconds.items():
                ratios[key].append(value / seconds["bare"])
    return {key: statistics.median(values) for key, values in ratios.items()}


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
