"""The code of ``docs/method.md`` is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from conftest import tiny_unet, unet_inputs
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale

PAGE = Path(__file__).parents[1] / "docs" / "method.md"


def test_the_code_of_the_page_learns() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    unet = tiny_unet().requires_grad_(False)
    known = {"torch": torch, "unet": unet, "Partition": Partition, "Mixture": Mixture, "MixtureSpec": MixtureSpec}
    exec(code, known := {**known, "RouterForm": RouterForm, "Scale": Scale})
    latents, text = unet_inputs(3)
    losses = []
    for _ in range(40):
        loss = unet(latents, torch.tensor([10, 500, 990]), text).sample.square().mean()
        loss.backward()
        known["optimizer"].step()
        known["optimizer"].zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(bool(table.any()) for table in known["tables"])
