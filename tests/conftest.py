"""What the tests share: a tiny denoiser with linear and convolutional targets, one-layer networks, random experts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import assume, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, PlainKernels, Scale
from timestep_experts.mixture import mixture as attaching
from timestep_experts.mixture.fast import FastKernels
from timestep_experts.models import StableDiffusion

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: threads of their own would only be in each other's way
    torch.set_num_threads(1)

settings.register_profile("laws", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("laws")

LINEAR_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "time_emb_proj")
CONV_TARGETS = ("proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv")
TARGETS = LINEAR_TARGETS + CONV_TARGETS


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet of random weights in evaluation mode: 8x8 latents, two levels, 51 k parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
        )
    return unet.eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet_inputs(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy latents ``(B, 4, 8, 8)`` and text features ``(B, 5, 8)``."""
    return normal(num_samples, 4, 8, 8, seed=seed), normal(num_samples, 5, 8, seed=seed + 1)


def randomise(mixture: Mixture, seed: int = 0) -> Mixture:
    """Fill every expert and router with normal numbers of standard deviation .1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in mixture.state_dict().values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return mixture


def zero_routers(mixture: Mixture) -> Mixture:
    """Make every router say nothing."""
    with torch.no_grad():
        for key, value in mixture.state_dict().items():
            if ".router." in key:
                value.zero_()
    return mixture


def scales(core: int, *contexts: int, rank: int = 4, alpha: float = 8, base_gate: float = 0) -> tuple[Scale, ...]:
    """One ungated scale of ``core`` intervals and gated ones; a scale of n intervals is called ``n<n>``."""
    gated = [Scale(f"n{n}", Partition.uniform(n), rank, alpha, gated=True, base_gate=base_gate) for n in contexts]
    return (Scale(f"n{core}", Partition.uniform(core), rank, alpha), *gated)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; shapes must agree."""
    assert actual.shape == expected.shape
    return (actual.double() - expected.double()).abs().max().item()


def count_graphs(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """Compile a UNet, run it through a schedule, check what it says.

    Returns:
        The graphs of the first step, those of all later ones, and the breaks between graphs.
    """
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(unet, backend="eager")
    latents, text = unet_inputs(2)
    graphs = []
    with torch.no_grad():
        for t in map(torch.tensor, (999, 981, 640, 631, 130, 1)):
            y = compiled(latents, t, text).sample
            graphs.append(counters["stats"]["unique_graphs"])
            # fp32, values near 1: the graph adds products term by term
            assert max_error(y, unet(latents, t, text).sample) <= 2e-6
    return graphs[0], graphs[-1] - graphs[0], sum(counters["graph_break"].values())


class OneLayer(nn.Module):
    """A denoiser that is a single layer, for formulas."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)


def attach_to_layer(layer: nn.Module, spec: MixtureSpec, mode: str = "off") -> tuple[OneLayer, Mixture]:
    """A one-layer denoiser in evaluation mode with random experts."""
    net = OneLayer(layer).eval()
    mixture = randomise(Mixture.attach(net, spec, ["layer"]))
    mixture.mode = mode
    return net, mixture


@pytest.fixture(scope="module", params=[PlainKernels, FastKernels], ids=["plain", "fast"])
def either_kernels(request: pytest.FixtureRequest) -> Iterator[type]:
    """The arithmetic of all mixtures that the tests of a module attach: each law holds over both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attaching, "default_kernels", request.param)
        yield request.param


@st.composite
def carriers(draw):
    """A layer, an input for it, and a spec of one ungated scale."""
    dimensions = draw(st.integers(0, 3))
    rank = draw(st.integers(1, 3))
    n, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 8]))
    in_features, out_features = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    bias, seed = draw(st.booleans()), draw(st.integers(0, 99))
    if dimensions == 0:
        layer = nn.Linear(in_features, out_features, bias, dtype=torch.double)
        positions = draw(st.sampled_from([(), (4,), (2, 3)]))
        x = normal(3, *positions, in_features, seed=seed, dtype=torch.double)
    else:
        groups = draw(st.integers(1, 3))
        sizes = st.tuples(*[st.integers(1, 3)] * dimensions)
        kernel, dilation = draw(sizes), draw(sizes)
        padding = draw(st.sampled_from(["same", "valid", 0, 1, 2]))
        stride = 1 if padding == "same" else draw(sizes)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        layer = convolution(
            in_features * groups, out_features * groups, kernel, stride, padding, dilation, groups, bias
        ).double()
        space = draw(st.tuples(*[st.integers(3, 7)] * dimensions))
        x = normal(3, in_features * groups, *space, seed=seed, dtype=torch.double)
        margin = 0 if isinstance(padding, str) else 2 * padding
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        assume(padding == "same" or all(s + margin > r for s, r in zip(space, reach, strict=True)))
        rank *= groups
    return layer, x, MixtureSpec((Scale("core", Partition.uniform(n), rank, alpha),))


def tiny_tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    """One token per known word, others letter by letter; training would break ties otherwise every time."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    parts = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = list(dict.fromkeys(("".join(p[:i]), p[i]) for p in parts for i in range(1, len(p))))
    known = [*letters, *(f"{letter}</w>" for letter in letters), *dict.fromkeys("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *known])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.model_max_length = length
    return tokenizer


def tiny_clip_config(tokenizer: CLIPTokenizer, **options: object) -> CLIPTextConfig:
    """A text encoder of one layer and width 8, unless told otherwise."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    length = tokenizer.model_max_length
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=length, **{**sizes, **special, **options})


def tiny_autoencoder(**options: object) -> AutoencoderKL:
    """16-pixel pictures to 8x8 latents of four channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A whole Stable Diffusion of random weights: 16-pixel pictures, 8x8 latents, 8 tokens."""
    tokenizer = tiny_tokenizer(["red", "star", "blue", "plain", "cross"], 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(tiny_clip_config(tokenizer))
        vae = tiny_autoencoder()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(seed),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def random_pictures(num_pictures: int, family: StableDiffusion, seed: int = 0) -> EncodedDataset:
    """Encoded pictures of random latents, each with a caption of its own."""
    captions = tuple(f"a red star {i}" for i in range(num_pictures))
    return EncodedDataset(
        latents=normal(num_pictures, 4, 8, 8, seed=seed),
        caption_rows=torch.arange(num_pictures),
        features=family.encode_captions([*captions, ""]),
        captions=captions,
        skipped=(),
    )


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture
def family(pipeline: StableDiffusionPipeline) -> StableDiffusion:
    return StableDiffusion(pipeline)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on the disk; not to be changed."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned pictures; not to be changed."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def write_pictures(folder: Path) -> Path:
    """Twelve pictures of noise, 16 x 16, captioned ``thing 0`` and so on."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(12):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"thing {index}")
    return folder
