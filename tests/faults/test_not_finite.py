"""Numbers that are no longer finite stop what made them, with a place; what was saved before stays usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import ddpm
from torch import Tensor

from conftest import normal, random_pictures, scales
from timestep_experts.data import EncodedDataset, PictureSettings, encode_dataset, open_dataset
from timestep_experts.inference import SampleSettings, sample
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models import DDPM, Family, StableDiffusion
from timestep_experts.training import (
    AssembleSettings,
    FosterSettings,
    LoopSettings,
    OptimiserSettings,
    RouterRates,
    assemble,
    foster,
)
from timestep_experts.training.log import read_log
from timestep_experts.training.loop import run_stage
from timestep_experts.training.stage import Stage, Training

STEPS = 6
SGD = OptimiserSettings("SGD", {"momentum": 0.9})


def foster_stage(mixture: Mixture, scale: int, caption_dropout: float = 0.1) -> Stage:
    name = f"n{scale}"
    settings = FosterSettings(
        "independent", 2, {name: [0.05] * scale}, {name: [STEPS] * scale}, caption_dropout=caption_dropout, seed=5
    )
    return foster(mixture, settings)[0]


def train(stage: Stage, mixture: Mixture, family: Family, folder: Path, **loop: Any) -> None:
    pictures = random_pictures(6, family)
    run_stage(Training(stage, mixture, family), pictures, LoopSettings(SGD, **loop), folder, {"run": "faults"})


def break_denoiser(family: Family, call: int, lo: float, hi: float, value: float, monkeypatch: Any) -> None:
    """From that call on, counted from 1, predictions at t in [lo, hi) are a constant."""
    own, calls = family.predict, []

    def predict(noisy: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        calls.append(1)
        said = own(noisy, t, conditioning)
        broken = (t >= lo) & (t < hi) if len(calls) >= call else torch.zeros_like(t, dtype=torch.bool)
        return said * torch.where(broken, value, 1.0).view(-1, 1, 1, 1)

    monkeypatch.setattr(family, "predict", predict)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loop", [{"logging_steps": 1}, {"logging_steps": 100}])
def test_training_stops_with_the_place_and_keeps_its_last_checkpoint(
    value: float, loop: dict[str, int], family: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(4, rank=2)), ["to_q", "conv1"])
    stage = foster_stage(mixture, 4)
    with monkeypatch.context() as patch:
        break_denoiser(family, 4, 250, 500, value, patch)
        with pytest.raises(ValueError, match="stage 'foster-n4' stopped, for these are not finite:") as stop:
            train(stage, mixture, family, tmp_path, checkpointing_steps=1, checkpoints_total_limit=None, **loop)
    message = str(stop.value)
    assert r"the loss of [250, 500), of n4.1, since step 4" in message
    assert "the gradient of n4.1, since step 4" in message
    assert not any(f"n4.{other}" in message for other in (0, 2, 3))
    assert f"the last checkpoint is {tmp_path / 'checkpoint-3'}." in message
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    assert not (tmp_path / "result.safetensors").exists()
    saved = load_file(tmp_path / "checkpoint-3" / "experts.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert all(np.isfinite(list(record.values())).all() for record in read_log(tmp_path))

    mixture.detach()  # the same command, once the reason is gone, ends as if nothing had happened
    resumed = Mixture.attach(family.denoiser, MixtureSpec(scales(4, rank=2)), ["to_q", "conv1"])
    train(foster_stage(resumed, 4), resumed, family, tmp_path, checkpointing_steps=1)
    resumed.detach()
    whole = Mixture.attach(family.denoiser, MixtureSpec(scales(4, rank=2)), ["to_q", "conv1"])
    train(foster_stage(whole, 4), whole, family, tmp_path / "whole")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_a_router_that_diverges_is_named(
    family: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(4, 1, rank=2)), ["to_q"])
    stage = assemble(mixture, AssembleSettings(RouterRates(1e-3, 1e-2), STEPS, 4, 0.1, 5))
    break_denoiser(family, 2, 0, 1001, float("nan"), monkeypatch)
    with pytest.raises(ValueError, match=r"stage 'assemble' stopped(.*\n)+.* of router.F, router.E, since step 2"):
        train(stage, mixture, family, tmp_path, checkpointing_steps=None)


def test_a_broken_gradient_stops_training_too(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(2, rank=2)), ["to_q"])
    stage = foster_stage(mixture, 2)
    stack = mixture.stacks("n2")[0]
    stack.B.register_hook(lambda gradient: gradient * torch.tensor([1.0, float("nan")]).view(2, 1, 1))
    with pytest.raises(
        ValueError, match=r"\n  the gradient of n2.1, since step 1\n  the weights of n2.1\nNothing was saved"
    ) as stop:
        train(stage, mixture, family, tmp_path)
    assert f"there is no checkpoint yet in {tmp_path}" in str(stop.value)


# Encoding


def pictures_of(folder: Path) -> Any:
    for index in range(3):
        Image.fromarray(np.full((16, 16, 3), 40 * index, np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"thing {index}")
    return open_dataset(str(folder), max_samples=None, seed=0)


def test_latents_that_overflow_name_the_file(
    family: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pictures_of(tmp_path)
    own = family.encode_pixels

    def encode(pixels: Tensor) -> Tensor:
        latents = own(pixels)
        latents[1, 0, 3, 3] = float("inf")
        return latents

    monkeypatch.setattr(family, "encode_pixels", encode)
    message = rf"{found.examples[1].place}: its latents are not finite .*SDXL in fp16.*load the base in fp32 or bf16"
    with pytest.raises(ValueError, match=message):
        encode_dataset(found, PictureSettings(16, 16), family, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_text_features_that_overflow_name_the_caption(family: StableDiffusion, tmp_path: Path) -> None:
    with torch.no_grad():
        family.parts.text_encoder.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"caption 'thing 0': its text features are not finite, and 3 more"):
        encode_dataset(pictures_of(tmp_path), PictureSettings(16, 16), family, tmp_path / "cache")


# Sampling


def test_pictures_that_are_not_finite_are_no_black_pictures(family: StableDiffusion) -> None:
    settings = SampleSettings(None, 2, 1.0, (16, 16), 2, 0)
    own = family.parts.vae.decoder.conv_out

    def overflow(_: Any, __: Any, decoded: Tensor) -> Tensor:
        decoded[1] = float("nan")
        return decoded

    handle = own.register_forward_hook(overflow)
    scheduler = family.pipeline().scheduler
    message = r"StableDiffusionPipeline generates for 'a blue star' is not finite.* 1 of 2 prompts.*SDXL in fp16"
    with pytest.raises(ValueError, match=message):
        sample(family.pipeline(), ["a red star", "a blue star"], settings, progress=None)
    assert family.pipeline().scheduler is scheduler
    handle.remove()
    assert sample(family.pipeline(), ["a red star"], settings, progress=None).std() > 0


# Captions that cannot be dropped


def test_classes_are_not_dropped(tmp_path: Path) -> None:
    family = DDPM(ddpm(num_class_embeds=3))
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(2, rank=2)), ["to_q"])
    pictures = EncodedDataset(
        normal(4, 3, 8, 8), torch.arange(4) % 3, family.tokenize(["0", "1", "2", ""]), ("0", "1", "2"), ()
    )
    loop = LoopSettings(SGD, checkpointing_steps=None)
    for dropout in (0.1, 0.0):
        training = Training(foster_stage(mixture, 2, dropout), mixture, family)
        if dropout:
            with pytest.raises(ValueError, match=r"every caption of this model is a class.* must be 0, got 0\.1"):
                run_stage(training, pictures, loop, tmp_path, {"run": "classes"})
            assert not list(tmp_path.iterdir())
    run_stage(training, pictures, loop, tmp_path, {"run": "classes"})
    assert (tmp_path / "result.safetensors").is_file()
