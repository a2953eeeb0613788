"""Base models that are not what they claim to be: one message says what is wrong, and nothing random is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiny_video import tiny_video_crafter

from timestep_experts.models import load_family, read_meta_model

CPU = torch.device("cpu")
MAKERS = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "pixart": pixart}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MAKERS.items():
        make().save_pretrained(folder / name)
    return folder


def drop(*parts: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, _: Path) -> None:
        path = folder.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(content: bytes, *parts: str) -> Callable[[Path, Path], None]:
    return lambda folder, _: folder.joinpath(*parts).write_bytes(content) and None


def claim(kind: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, _: Path) -> None:
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))

    return change


def exchange(part: str, *other: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, bases: Path) -> None:
        shutil.rmtree(folder / part)
        shutil.copytree(bases.joinpath(*other), folder / part)

    return change


def forget(part: str, words: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, _: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        kept = {key: value for key, value in load_file(path).items() if words not in key}
        save_file(kept, path, metadata={"format": "pt"})

    return change


UNET_WEIGHTS = ("unet", "diffusion_pytorch_model.safetensors")
FAULTS: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "no unet": ("sd", drop("unet"), "lists a UNet2DConditionModel, but there is no folder .*unet"),
    "no tokenizer": ("sd", drop("tokenizer"), "lists a CLIPTokenizer, but there is no folder .*tokenizer"),
    "no scheduler": ("sd", drop("scheduler"), "lists a DDIMScheduler, but there is no folder .*scheduler"),
    "no weights": ("sd", drop(*UNET_WEIGHTS), r"unet has no weights of its UNet2DConditionModel; expected .*safetens"),
    "no text weights": ("sd", drop("text_encoder", "model.safetensors"), "has no weights of its CLIPTextModel"),
    "no configuration": ("sd", drop("vae", "config.json"), "vae has no configuration of its AutoencoderKL; expected"),
    "broken configuration": ("sd", write(b"{no", "unet", "config.json"), r"unet/config\.json is no JSON"),
    "broken weights": ("sd", write(b"nothing", *UNET_WEIGHTS), r"Unable to load weights .*unet/diffusion"),
    "sd as sdxl": ("sd", claim("StableDiffusionXLPipeline"), "lists no text_encoder_2, tokenizer_2; a StableD.* has "),
    "sd as sd3": ("sd", claim("StableDiffusion3Pipeline"), "lists no .*transformer and lists unet; a StableDiffusion3"),
    "sdxl as sd": ("sdxl", claim("StableDiffusionPipeline"), "lists text_encoder_2, tokenizer_2; a StableDiffusionP"),
    "pixart as sd3": ("pixart", claim("StableDiffusion3Pipeline"), "lists no text_encoder_2, text_encoder_3"),
    "a unet of sdxl": ("sd", exchange("unet", "sdxl", "unet"), "text features of width 24, its text encoder gives 8"),
    "a transformer": (
        "sd",
        exchange("unet", "sd3", "transformer"),
        "unet holds a SD3Transformer2DModel; model_index.json says UNet2DConditionModel",
    ),
    "a t5": (
        "sd",
        exchange("text_encoder", "pixart", "text_encoder"),
        "text_encoder holds a T5EncoderModel; model_index.json says CLIPTextModel",
    ),
    "lost parameters": (
        "sd",
        forget("unet", "mid_block"),
        r"unet lacks \d+ parameters of its UNet2DCon.*: mid_block\.",
    ),
    "lost text parameters": (
        "sdxl",
        forget("text_encoder_2", "layers.1"),
        r"lacks 16 parameters of its CLIP.*layers\.1",
    ),
    "lost t5 parameters": (
        "pixart",
        forget("text_encoder", "SelfAttention.q"),
        "lacks 1 parameters of its T5Enc.*q.wei",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_what_it_says_is_refused(fault: str, bases: Path, tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(bases / name, folder)
    load_family(str(folder), CPU)
    change(folder, bases)
    with pytest.raises(ValueError, match=message) as refusal:
        load_family(str(folder), CPU)
    assert str(folder) in str(refusal.value)


def test_what_is_not_loaded_may_be_missing(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bases / "sd", folder)
    index = folder / "model_index.json"
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | checker))
    assert load_family(str(folder), CPU).parts.safety_checker is None


FILES = {
    "unet.to_q.experts.n4.A": "a mixture of timestep experts",
    "lora_unet_x.lora_down.weight": "a LoRA",
    "conditioner.embedders.0.x": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.0.x": "Stable Diffusion 3",
    "double_blocks.0.x": "FLUX",
    "conv_in.weight": "one network of a pipeline",
    "something.else": "something.else",
}


@pytest.mark.parametrize("key", FILES)
def test_a_single_file_of_another_model_is_refused_by_what_it_holds(key: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"{path}': it seems to hold {FILES[key]}; a single file must be a whole"):
        load_family(str(path), CPU)


def test_a_single_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.safetensors': there is no such file or folder"):
        load_family(str(tmp_path / "nowhere.safetensors"), CPU)


def test_a_unet_with_a_frame_rate_has_an_outline(tmp_path: Path) -> None:
    tiny_video_crafter().save_pretrained(tmp_path)
    meta_model = read_meta_model(str(tmp_path))
    assert type(meta_model.denoisers["unet"]).__name__ == "FpsUNet3DConditionModel"
