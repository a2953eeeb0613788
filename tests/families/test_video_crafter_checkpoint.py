"""VideoCrafter2's whole checkpoint as a pipeline: a tiny one is renamed to the original code's names, and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import max_error, normal
from families.tiny_video import tiny_fps_unet, tiny_video_crafter
from timestep_experts.formats.video_crafter import to_checkpoint
from timestep_experts.models import VideoCrafter
from timestep_experts.models.video_crafter import FPS
from timestep_experts.models.video_crafter_checkpoint import convert_checkpoint, read_checkpoint

LAYERS = 3  # of which the last is left out

AUTOENCODER_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
TEXT_NAMES = (
    ("text_model.", ""),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)


def autoencoder_state(autoencoder: AutoencoderKL) -> dict[str, Tensor]:
    """Its tensors by the original names: up blocks count from the other end, attention is a 1x1 convolution."""
    levels = len(autoencoder.config.block_out_channels)
    state = {}
    for key, value in autoencoder.state_dict().items():
        name = key
        if found := re.match(r"decoder\.up_blocks\.(\d+)", key):
            level = levels - 1 - int(found[1])
            name = re.sub(r"up_blocks\.\d+\.resnets\.(\d+)", rf"up.{level}.block.\1", name)
            name = re.sub(r"up_blocks\.\d+\.upsamplers\.0", f"up.{level}.upsample", name)
        for new, old in AUTOENCODER_NAMES:
            name = re.sub(new, old, name)
        is_map = "attn_1" in name and name.endswith("weight") and "norm" not in name
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if is_map else value
    return state


def text_state(encoder: CLIPTextModel) -> dict[str, Tensor]:
    """Its tensors by OpenCLIP's names: one matrix for q, k and v."""
    state, own = {}, encoder.state_dict()
    for key, value in own.items():
        name = key
        for new, old in TEXT_NAMES:
            name = name.replace(new, old)
        if found := re.search(r"self_attn\.q_proj\.(weight|bias)$", name):
            parts = [own[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = name.replace(found[0], f"attn.in_proj_{found[1]}"), torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name:
            continue
        state[f"cond_stage_model.model.{name}"] = value
    return state | {"cond_stage_model.model.logit_scale": torch.ones(())}


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """A pipeline whose text encoder still has its last layer."""
    pipeline = tiny_video_crafter()
    config = CLIPTextConfig(**{**pipeline.text_encoder.config.to_dict(), "num_hidden_layers": LAYERS})
    torch.manual_seed(1)
    return {"unet": tiny_fps_unet(), "vae": pipeline.vae, "text": CLIPTextModel(config).eval(), "pipeline": pipeline}


def checkpoint(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    state = to_checkpoint(parts["unet"].state_dict()) | autoencoder_state(parts["vae"]) | text_state(parts["text"])
    return {key: value.clone() for key, value in state.items()} | {"betas": torch.zeros(1000)}


def convert(parts: Mapping[str, Any], state: Mapping[str, Tensor], fps: float = FPS) -> Any:
    return convert_checkpoint(
        state,
        parts["pipeline"].tokenizer,
        fps,
        denoiser={key: value for key, value in parts["unet"].config.items() if not key.startswith("_")},
        autoencoder={key: value for key, value in parts["vae"].config.items() if not key.startswith("_")},
        text_encoder={**parts["text"].config.to_dict(), "num_hidden_layers": LAYERS - 1},
    )


def test_every_part_says_what_it_said_before(parts: dict[str, Any]) -> None:
    made = convert(parts, checkpoint(parts), fps=12.0)
    assert type(made.unet) is UNet3DConditionModel
    assert type(made.scheduler) is DDIMScheduler
    clip, text, t = normal(1, 4, 2, 8, 8), normal(1, 5, 8, seed=1), torch.tensor([300])
    parts["unet"].fps = 12.0
    with torch.no_grad():
        assert max_error(made.unet.eval()(clip, t, text).sample, parts["unet"](clip, t, text).sample) <= 1e-5
        pixels = normal(1, 3, 16, 16)
        assert torch.equal(
            made.vae.eval().encode(pixels).latent_dist.mean, parts["vae"].encode(pixels).latent_dist.mean
        )
        assert torch.equal(made.vae.decode(clip[:, :, 0]).sample, parts["vae"].decode(clip[:, :, 0]).sample)
        ids = torch.tensor([[0, 5, 7, 1]])
        before_last = parts["text"](ids, output_hidden_states=True).hidden_states[-2]
        norm = getattr(parts["text"], "text_model", parts["text"]).final_layer_norm
        assert max_error(made.text_encoder.eval()(ids).last_hidden_state, norm(before_last)) <= 1e-6


def test_it_is_a_video_crafter_of_a_fading_signal_and_pads_like_openclip(parts: dict[str, Any]) -> None:
    made = convert(parts, checkpoint(parts))
    family = VideoCrafter(made)
    assert family.noise.signal_scale[-1].item() == pytest.approx(0.7)
    assert made.tokenizer.pad_token == "!"


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_are_read_as_they_are(suffix: str, parts: dict[str, Any], tmp_path: Path) -> None:
    path, state = tmp_path / f"model{suffix}", checkpoint(parts)
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 5}, path)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    read = read_checkpoint(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


class Danger:
    """What a checkpoint must not be able to run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("ran"),)


def test_bad_checkpoints_are_refused(parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read missing\.ckpt"):
        read_checkpoint(Path("missing.ckpt"))
    torch.save({"state_dict": Danger()}, "danger.ckpt")
    with pytest.raises(ValueError, match=r"cannot read danger\.ckpt"):
        read_checkpoint(Path("danger.ckpt"))
    assert not Path("ran").exists()
    state = checkpoint(parts)
    save_file({key: value for key, value in state.items() if "first_stage" not in key}, "half.safetensors")
    with pytest.raises(ValueError, match=r"no tensor under 'first_stage_model\.'"):
        read_checkpoint(Path("half.safetensors"))
    del state["first_stage_model.decoder.conv_in.weight"]
    with pytest.raises(ValueError, match=r"the autoencoder .* lacks 1 tensors \['decoder\.conv_in\.weight'\]"):
        convert(parts, state)
