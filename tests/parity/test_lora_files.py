"""The LoRA files written here are those that diffusers reads, on every family whose pipeline loads LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from conftest import max_error, randomise, scales
from timestep_experts.formats import Bundle, save_bundle
from timestep_experts.merging import weighted_sum
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.mixture.carriers import named_layers
from timestep_experts.weights.lora import LoraSettings, merge_lora, read_parts

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, while they load

CASES = [
    ("stable_diffusion", "unet", ["text_encoder"], ["to_q", "conv1", "proj_in"]),
    ("stable_diffusion_xl", "unet", ["text_encoder", "text_encoder_2"], ["to_q", "conv1", "ff.net.2"]),
    ("stable_diffusion_3", "transformer", ["text_encoder", "text_encoder_2"], ["to_q", "to_out.0", "add_q_proj"]),
    ("flux", "transformer", ["text_encoder"], ["to_q", "proj_out"]),
]


@pytest.mark.parametrize(("name", "denoiser", "encoders", "targets"), CASES, ids=[case[0] for case in CASES])
def test_fused_weights_are_the_base_and_the_sum(
    tmp_path: Path, name: str, denoiser: str, encoders: list[str], targets: list[str]
) -> None:
    pipeline: Any = getattr(tiny, name)()
    pipeline.save_pretrained(tmp_path / "base")
    parts = {denoiser: targets, **{encoder: ["q_proj", "fc1"] for encoder in encoders}}
    networks = {part: getattr(pipeline, part) for part in parts}
    spec = MixtureSpec(scales(2, 1, rank=2))
    mixture = randomise(Mixture.attach(networks, spec, parts))
    tensors = {key: value.clone() for key, value in mixture.state_dict().items()}
    bundle = Bundle(spec, tuple(mixture.layers), tensors, "switch", str(tmp_path / "base"), "x", {})
    mixture.detach()
    save_bundle(bundle, tmp_path / "bundle")
    merged = merge_lora(tmp_path / "bundle", tmp_path / "out", LoraSettings(6))
    updates, _ = read_parts(bundle, str(tmp_path / "base"))
    expected = {}
    for path, experts in updates.items():
        part, _, inner = path.partition(".")
        weight = named_layers(networks[part])[inner].weight
        product = weighted_sum(experts, merged.weights).product()
        expected[path] = weight.detach().clone() + product.reshape(weight.shape)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora(components=list(parts))
    for path, goal in expected.items():
        part, _, inner = path.partition(".")
        fused = named_layers(getattr(pipeline, part))[inner].weight
        assert max_error(torch.as_tensor(fused), goal) < 1e-5, path
