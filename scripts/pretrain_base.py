"""Pretrain a tiny, complete Stable Diffusion pipeline from scratch on captioned pictures.

The shipped base (64-pixel scenes, about 45 minutes on two cores):

    python scripts/pretrain_base.py --pictures scenes/flat --autoencoder-pictures scenes/flat scenes/neon \
        --work work/scenes --output src/timestep_experts/world/assets/base

A folder with a ``metadata.jsonl`` (``file_name``, ``text``) works in place of ``scenes/<domain>``. The autoencoder
sees broad data (an adapter cannot repair a decoder); the text encoder and the UNet see ``--pictures`` alone. The same
command continues a killed run from the last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from timestep_experts.world.render import DOMAINS, render
from timestep_experts.world.scenes import draw_scenes

SNR_GAMMA = 5.0
CAPTION_DROPOUT = 0.1


def main() -> None:
    """Autoencoder, then latents, then text encoder and UNet together; the folder is an ordinary diffusers pipeline."""
    options = _parse()
    options.work.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(options)
    pictures, captions = load_pictures(options.pictures, options.resolution, options.num_pictures, options.seed)
    if options.flip:
        pictures, captions = np.concatenate([pictures, pictures[:, :, ::-1]]), captions * 2
    latents = encode(autoencoder, pictures, options.work / "latents.safetensors")
    tokenizer = train_tokenizer(captions, options.max_tokens)
    token_ids = tokenizer(
        [*captions, ""], padding="max_length", truncation=True, max_length=options.max_tokens, return_tensors="pt"
    ).input_ids
    model = make_model(options, len(tokenizer))
    train_denoiser(model, latents, token_ids, options)
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        unet=model["unet"],
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(options.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="scenes/flat, scenes/neon or a folder")
    parser.add_argument("--autoencoder-pictures", required=True, nargs="+", help="the same, several")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--autoencoder-widths", type=int, nargs="+", default=[32, 32, 64, 64])
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--num-pictures", type=int, default=32000, help="rendered scenes per domain")
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--checkpointing-steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--dropout", type=float, default=0.0, help="in the UNet; for small picture sets")
    parser.add_argument("--flip", action="store_true", help="mirror half of the pictures; wrong where sides matter")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_pictures(source: str, resolution: int, num_scenes: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures ``(N, resolution, resolution, 3)`` uint8 and their captions."""
    name = source.removeprefix("scenes/")
    if name in DOMAINS:
        scenes = draw_scenes(num_scenes, seed=seed, held_out=False)
        return render(scenes, name, seed=seed, resolution=resolution), [scene.caption for scene in scenes]
    rows = [json.loads(line) for line in (Path(source) / "metadata.jsonl").read_text().splitlines()]
    opened = (Image.open(Path(source) / row["file_name"]).convert("RGB") for row in rows)
    resized = [np.asarray(picture.resize((resolution, resolution), Image.Resampling.LANCZOS)) for picture in opened]
    return np.stack(resized), [row["text"] for row in rows]


def train_autoencoder(options: argparse.Namespace) -> AutoencoderKL:
    """Absolute plus squared error and a light KL term; the scaling factor makes the latents' spread one."""
    folder = options.work / "vae"
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder)
    per_source = options.num_pictures // 4
    loaded = [
        load_pictures(s, options.resolution, per_source, options.seed + 1)[0] for s in options.autoencoder_pictures
    ]
    pictures = torch.from_numpy(np.concatenate(loaded))
    torch.manual_seed(options.seed)
    levels = len(options.autoencoder_widths)
    autoencoder = AutoencoderKL(
        block_out_channels=tuple(options.autoencoder_widths),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=options.resolution,
    )
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=1.5e-3, weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimiser, 100, options.autoencoder_steps)
    for step in (bar := tqdm(range(options.autoencoder_steps), desc="autoencoder")):
        batch = to_signal(pictures[torch.randint(len(pictures), (16,))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(batch).latent_dist
            decoded = autoencoder.decode(posterior.sample()).sample
        residual = decoded.float() - batch
        error = residual.abs().mean() + 2 * residual.square().mean()
        (error + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(error=f"{error.item():.4f}", kl=f"{posterior.kl().mean().item():.0f}")
    with torch.no_grad():
        latents = autoencoder.encode(to_signal(pictures[torch.randperm(len(pictures))[:512]])).latent_dist.mean
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    autoencoder.save_pretrained(folder)
    return autoencoder


def to_signal(pictures: Tensor) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: np.ndarray, cache: Path) -> Tensor:
    """Scaled posterior means of all pictures, kept on disk."""
    if not cache.exists():
        batches = torch.from_numpy(pictures).split(64)
        encoded = [autoencoder.encode(to_signal(batch)).latent_dist.mean for batch in tqdm(batches, desc="latents")]
        save_file({"latents": (torch.cat(encoded) * autoencoder.config.scaling_factor).contiguous()}, cache)
    return load_file(cache)["latents"]


def train_tokenizer(captions: list[str], max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary learned from the captions."""
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = blank.train_new_from_iterator(captions, 2000, show_progress=False)
    tokenizer.model_max_length = max_tokens
    return tokenizer


def make_model(options: argparse.Namespace, vocab_size: int) -> nn.ModuleDict:
    """A 4 M-parameter UNet on 8 x 8 x 8 latents and a 3-layer CLIP text encoder."""
    torch.manual_seed(options.seed)
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=options.max_tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=options.resolution // 2 ** (len(options.autoencoder_widths) - 1),
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        dropout=options.dropout,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    return nn.ModuleDict({"text_encoder": CLIPTextModel(text_config), "unet": unet})


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def train_denoiser(model: nn.ModuleDict, latents: Tensor, token_ids: Tensor, options: argparse.Namespace) -> None:
    """Noise prediction with the Min-SNR weighting (gamma 5); ends with the averaged weights in ``model``.

    Step s draws from a generator seeded by (seed, s), so a resumed run ends with the same bytes.
    """
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    checkpoint = options.work / "denoiser.safetensors"
    start = restore(checkpoint, model, optimiser, average) if checkpoint.exists() else 0
    schedule = get_cosine_schedule_with_warmup(optimiser, 200, options.steps, last_epoch=start - 1)
    bar = tqdm(range(start, options.steps), desc="denoiser", initial=start, total=options.steps)
    running = None
    for step in bar:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        torch.manual_seed(options.seed * 1_000_003 + step)  # dropout
        loss = denoising_loss(model, latents, token_ids, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        average.step(parameters)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % options.checkpointing_steps == 0:
            save(checkpoint, model, optimiser, average, step + 1)
            print(json.dumps({"step": step + 1, "loss": running}), flush=True)
    average.copy_to(parameters)


def denoising_loss(model: nn.ModuleDict, latents: Tensor, token_ids: Tensor, generator: torch.Generator) -> Tensor:
    """One batch of 64: uniform t, caption dropout, Min-SNR weighted squared error."""
    scheduler = make_scheduler()
    rows = torch.randint(len(latents), (64,), generator=generator)
    clean, ids = latents[rows], token_ids[rows]
    dropped = torch.rand(64, generator=generator) < CAPTION_DROPOUT
    ids = torch.where(dropped[:, None], token_ids[-1], ids)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (64,), generator=generator)
    text = model["text_encoder"](ids).last_hidden_state
    predicted = model["unet"](scheduler.add_noise(clean, noise, t), t, text).sample
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(max=SNR_GAMMA) / snr
    return (weight * (predicted - noise).square().mean((1, 2, 3))).mean()


def save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, average: EMAModel, step: int) -> None:
    """Weights, averages and moments in one file, written whole or not at all."""
    tensors = {"step": torch.tensor(step), "average_step": torch.tensor(average.optimization_step)}
    for index, parameter in enumerate(model.parameters()):
        tensors[f"{index}.weight"] = parameter.detach()
        tensors[f"{index}.average"] = average.shadow_params[index]
        for name in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{index}.{name}"] = optimiser.state[parameter][name]
    draft = path.with_suffix(".draft")
    save_file(tensors, draft)
    draft.replace(path)


def restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, average: EMAModel) -> int:
    """Undo `save`; returns the step."""
    tensors = load_file(path)
    average.optimization_step = int(tensors["average_step"])
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(tensors[f"{index}.weight"])
        average.shadow_params[index].copy_(tensors[f"{index}.average"])
        optimiser.state[parameter] = {name: tensors[f"{index}.{name}"] for name in ("exp_avg", "exp_avg_sq", "step")}
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return int(tensors["step"])


if __name__ == "__main__":
    main()
