"""A family of one's own: what a base model that the package does not know takes, in code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny import seeded
from torch import Tensor

from conftest import tiny_autoencoder
from timestep_experts.errors import UserError
from timestep_experts.inference import SampleSettings, sample
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import Family, Samples, load_family
from timestep_experts.models.family import Conditioning
from timestep_experts.models.noise import DiscreteNoise
from timestep_experts.models.registry import FAMILIES

NUM_CLASSES = 3


class DiT(Family):
    """Diffusion transformers on classes (Peebles and Xie); the denoiser predicts the noise and its own variance."""

    pipeline_class = DiTPipeline
    denoiser_name = "transformer"
    text_encoder_names = ()
    tokenizer_names = ()

    def make_noise(self) -> DiscreteNoise:
        return DiscreteNoise(self.parts.scheduler, self.source)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        empty = self.parts.transformer.config.num_embeds_ada_norm
        return {"class_labels": torch.tensor([int(caption or empty) for caption in captions])}

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tokens)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        said = self.parts.transformer(noisy, timestep=t, class_labels=conditioning["class_labels"]).sample
        return said[:, : noisy.shape[1]]


@seeded
def tiny_dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=1,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    return DiTPipeline(transformer, tiny_autoencoder(), DDIMScheduler())


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    tiny_dit().save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, "DiTPipeline", DiT)
    return load_family(str(tmp_path), torch.device("cpu"))


def test_a_family_is_one_short_class_and_one_entry(family: Family) -> None:
    assert isinstance(family, DiT)
    assert len(inspect.getsource(DiT).splitlines()) < 80


def test_experts_of_a_new_family_learn_at_their_own_timesteps_alone(family: Family) -> None:
    spec = MixtureSpec((Scale("n2", Partition.uniform(2, 1000), rank=2, alpha=2.0),))
    mixture = Mixture.attach({family.denoiser_name: family.denoiser}, spec, ["to_q", "to_v"], seed=0)
    mixture.foster("n2")
    latents = family.encode_pixels(torch.zeros(2, 3, 16, 16))
    t = torch.tensor([10, 20])
    conditioning = family.encode_captions(["1", ""])
    for stack in mixture.stacks("n2"):
        torch.nn.init.normal_(stack.B)
        stack.B.requires_grad_(True)
    denoised = family.denoise(Samples(latents, torch.randn_like(latents), t, conditioning))
    assert denoised.predicted.shape == denoised.target.shape == latents.shape
    torch.nn.functional.mse_loss(denoised.predicted, denoised.target).backward()
    for stack in mixture.stacks("n2"):
        assert stack.B.grad[0].abs().max() > 0
        assert stack.B.grad[1].abs().max() == 0


def test_pictures_of_numbered_classes_are_generated() -> None:
    settings = SampleSettings(None, 2, 1.0, (16, 16), 2, 0)
    pictures = sample(DiT(tiny_dit()).pipeline(), ["1", "2", "1"], settings, progress=None)
    assert pictures.shape[0] == 3
    assert (pictures[0] != pictures[1]).any()
    with pytest.raises(UserError, match=r"prompts must be their numbers; got \['a star'\]"):
        sample(DiT(tiny_dit()).pipeline(), ["a star"], settings, progress=None)
