"""Generate with a trained bundle: switched, routed, and without it, from the same seed.

Run: timestep-experts run recipes/quickstart.yaml
     python examples/use_a_bundle.py runs/quickstart/variants/main/bundle
"""

from __future__ import annotations

import sys

import torch
from diffusers import StableDiffusionPipeline

from timestep_experts.inference import attach, detach
from timestep_experts.models import resolve_model

PROMPT = "a red plain star above a blue dotted circle"


def main(bundle: str) -> None:
    """Write ``switch.png``, ``route.png`` and ``base.png``."""
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_model("world/base")).to(torch.float32)
    mixture = attach(pipeline, bundle)
    for mode in ("switch", "route"):
        mixture.mode = mode  # type: ignore[assignment]  # a loop over literals
        pipeline(PROMPT, generator=torch.Generator().manual_seed(0)).images[0].save(f"{mode}.png")
    detach(pipeline)
    pipeline(PROMPT, generator=torch.Generator().manual_seed(0)).images[0].save("base.png")


if __name__ == "__main__":
    main(sys.argv[1])
