"""Experts over a quantised base: torchao by whole pipelines, bitsandbytes by layers, as diffusers wants a GPU there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PIPELINES
from tiny_video import tiny_fps_unet, tiny_wan
from torch import Tensor, nn

from conftest import LINEAR_TARGETS, max_error, normal, randomise, scales, tiny_unet, unet_inputs
from timestep_experts.data import EncodedDataset
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models import Family, load_family
from timestep_experts.models.encoding import cast, plain_tensors
from timestep_experts.models.quantization import is_quantised, quantised_bytes
from timestep_experts.models.video_crafter import fold_fps
from timestep_experts.training import FosterSettings, LoopSettings, OptimiserSettings, foster
from timestep_experts.training.log import read_log
from timestep_experts.training.loop import run_stage
from timestep_experts.training.stage import Training

CPU = torch.device("cpu")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CAPTIONS = ("a red star", "a blue plain cross")
T = torch.tensor([0, 130, 500, 999])
FAMILIES = {**PIPELINES, "wan": tiny_wan, "wan 2.2": lambda: tiny_wan(0.875)}

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    # autocast on a CPU gives fp32 norms bf16 inputs
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


def load(name: str, folder: Path, quantization: str | None = "torchao-int8", dtype: torch.dtype = torch.float32) -> Any:
    if not folder.exists():
        FAMILIES[name]().save_pretrained(folder)
    return load_family(str(folder), CPU, dtype, quantization)


def inputs_of(family: Family) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    channels = {"DDPM": 3, "Wan": 16}.get(type(family).__name__, 4)
    latents = normal(len(T), channels, *((1,) if family.is_video else ()), 8, 8)
    captions = ["" if family.autoencoder_name is None else CAPTIONS[row % 2] for row in range(len(T))]
    return latents, T.float() if not family.noise.has_integer_timesteps else T, family.encode_captions(captions)


@needs_torchao
@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_family_predicts_nearly_the_same_and_experts_of_zero_change_nothing(
    name: str, tmp_path: Path
) -> None:
    full, few = load(name, tmp_path / "base", None), load(name, tmp_path / "base")
    assert all(is_quantised(denoiser) for denoiser in few.denoisers.values())
    inputs = inputs_of(full)
    with torch.no_grad():
        expected, base = full.predict(*inputs), few.predict(*inputs)
        error = (expected - base).abs().max().item()
        assert 0 < error < 0.05 * expected.abs().max().item()
        spec = MixtureSpec(scales(4, 1))
        mixture = Mixture.attach(few.denoisers, spec, ATTENTION, owned=few.owned_intervals)
        for mode in ("switch", "route"):
            mixture.mode = mode
            assert torch.equal(few.predict(*inputs), base)
        randomise(mixture)
        assert not torch.equal(few.predict(*inputs), base)
        assert all(value.dtype == torch.float32 for value in mixture.state_dict().values())
        mixture.detach()
        assert torch.equal(few.predict(*inputs), base)


@needs_torchao
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "no"), (torch.bfloat16, "no"), (torch.float32, "bf16")]
)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_experts_over_a_quantised_base_learn(name: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    family = load(name, tmp_path / "base", dtype=dtype)
    family.checkpoint_gradients()
    before = [t.clone() for value in family.denoiser.state_dict().values() for t in plain_tensors(value)]
    spec = MixtureSpec(scales(2, rank=8, alpha=8))
    targets = (*ATTENTION, "conv_in", "conv_out") if name == "sd" else ATTENTION
    mixture = Mixture.attach(family.denoisers, spec, targets)
    rates, budgets = {"n2": [2e-2] * 2}, {"n2": [15] * 2}
    stage = foster(mixture, FosterSettings("joint", 8, rates, budgets, caption_dropout=0.0, seed=5))[0]
    pictures = EncodedDataset(
        latents=normal(1, 4, 8, 8),
        caption_rows=torch.zeros(1, dtype=torch.long),
        features=family.encode_captions([CAPTIONS[0], ""]),
        captions=CAPTIONS[:1],
        skipped=(),
    )
    optimiser = OptimiserSettings("AdamW", {})
    settings = LoopSettings(optimiser, mixed_precision=precision, checkpointing_steps=None, logging_steps=5)
    run_stage(Training(stage, mixture, family), pictures, settings, tmp_path / "run", {})
    losses = [record["loss"] for record in read_log(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(value.isfinite().all() for value in mixture.state_dict().values())
    mixture.detach()
    after = [t for value in family.denoiser.state_dict().values() for t in plain_tensors(value)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@needs_torchao
def test_the_fingerprint_of_a_quantised_text_encoder_is_its_own_and_stays(tmp_path: Path) -> None:
    full, few = load("pixart", tmp_path / "base", None), load("pixart", tmp_path / "base")
    assert is_quantised(few.text_encoders["text_encoder"])
    assert full.encoder_fingerprint() != few.encoder_fingerprint()
    assert few.encoder_fingerprint() == load("pixart", tmp_path / "base").encoder_fingerprint()
    expected, features = (f.encode_captions(CAPTIONS)["encoder_hidden_states"] for f in (full, few))
    assert 0 < max_error(features, expected) < 0.1 * expected.abs().max().item()


@needs_torchao
def test_the_clips_and_the_autoencoder_are_never_quantised(tmp_path: Path) -> None:
    parts = load("sd3", tmp_path / "base").parts
    quantised = {name for name, part in parts.components.items() if isinstance(part, nn.Module) and is_quantised(part)}
    assert quantised == {"transformer", "text_encoder_3"}


@needs_torchao
def test_bytes_of_a_quantised_network_are_foreseen(tmp_path: Path) -> None:
    full, few = load("flux", tmp_path / "base", None), load("flux", tmp_path / "base")
    held = sum(t.nbytes for p in few.denoiser.state_dict().values() for t in plain_tensors(p))
    foreseen = quantised_bytes(full.denoiser, "torchao-int8")
    rows = sum(m.out_features for m in full.denoiser.modules() if isinstance(m, nn.Linear))
    assert foreseen <= held <= foreseen + 8 * rows  # a scale per row


@needs_torchao
def test_a_quantised_network_is_not_folded() -> None:
    unet = tiny_fps_unet()
    unet.hf_quantizer = object()
    with pytest.raises(ValueError, match="a quantised FpsUNet3DConditionModel cannot be folded"):
        fold_fps(unet, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("kind", ["bitsandbytes-8bit", "bitsandbytes-4bit"])
def test_bitsandbytes_through_diffusers_needs_an_accelerator(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="needs an accelerator; on a CPU, torchao-int8 is allowed"):
        load("sd", tmp_path / "base", kind)


def test_what_cannot_be_quantised_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.safetensors").touch()
    with pytest.raises(ValueError, match="needs a folder or a hub id, not a single file"):
        load_family(str(tmp_path / "base.safetensors"), CPU, torch.float32, "torchao-int8")
    monkeypatch.setattr("timestep_experts.models.quantization.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'timestep-experts\[torchao\]'"):
        load("sd", tmp_path / "base")


def with_bitsandbytes(network: nn.Module, kind: str) -> nn.Module:
    """Every linear layer that will carry experts quantised in place, on the CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(LINEAR_TARGETS):
            if kind == "8bit":
                new = bitsandbytes.nn.Linear8bitLt(*_sizes(layer), has_fp16_weights=False)
            else:
                new = bitsandbytes.nn.Linear4bit(*_sizes(layer), quant_type="nf4", compute_dtype=torch.float32)
            new.load_state_dict(layer.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, new.to("cpu"))
    return network.requires_grad_(False)


def _sizes(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


# 8-bit layers multiply in fp16, and say so
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_experts_over_layers_of_bitsandbytes(kind: str) -> None:
    full, few = tiny_unet(), with_bitsandbytes(tiny_unet(), kind)
    latents, text = unet_inputs(4)
    with torch.no_grad():
        expected, base = (net(latents, timestep=T, encoder_hidden_states=text).sample for net in (full, few))
    assert 0 < max_error(base, expected) < {"8bit": 0.05, "4bit": 0.3}[kind] * expected.abs().max().item()
    mixture = Mixture.attach(few, MixtureSpec(scales(4, 1)), LINEAR_TARGETS)
    mixture.mode = "route"
    with torch.no_grad():
        assert torch.equal(few(latents, timestep=T, encoder_hidden_states=text).sample, base)
    randomise(mixture)
    for enabled in (False, True):
        for parameter in mixture.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            said = few(latents, timestep=T, encoder_hidden_states=text).sample
        said.float().pow(2).mean().backward()
        gradients = [p.grad for p in mixture.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
    assert cast({"x": latents}, few)["x"].dtype == torch.float32
    assert not [key for key in mixture.state_dict() if "base_layer" in key]
