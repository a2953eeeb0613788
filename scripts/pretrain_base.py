"""Pretrain a tiny, complete pipeline of a real class from scratch, on captioned pictures or clips.

The shipped base (64-pixel scenes, about 45 minutes on two cores):

    python scripts/pretrain_base.py --pictures scenes/flat --autoencoder-pictures scenes/flat scenes/neon \
        --work work/scenes --output src/timestep_experts/world/assets/base

The same world for a DiT (PixArt) or an MM-DiT (Stable Diffusion 3), on the shipped autoencoder:

    python scripts/pretrain_base.py --architecture dit --pictures scenes/flat \
        --autoencoder src/timestep_experts/world/assets/base/vae --work work/dit --output work/dit/base

Pixels without text, for ``recipes/cifar10.yaml`` (about 40 minutes on two cores):

    python scripts/pretrain_base.py --architecture ddpm --pictures work/cifar10/pictures/train --resolution 32 --flip \
        --weighting none --steps 3600 --work work/cifar10/base-training --output work/cifar10/base

``--pictures`` also takes a folder with a ``metadata.jsonl`` (``file_name``, ``text``); ``--architecture video`` wants a
folder of captioned clips, and ``--architecture ddpm`` has neither autoencoder nor text. The autoencoder sees broad data
(an adapter cannot repair a decoder); text encoders and denoiser see ``--pictures`` alone. The same command continues a
killed run from the last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from timestep_experts.data import ClipSettings, open_clips
from timestep_experts.intervals import Interval, draw_timesteps
from timestep_experts.models import FAMILIES, DiscreteNoise, Family
from timestep_experts.world.render import DOMAINS, render
from timestep_experts.world.scenes import draw_scenes
from tiny_bases import ARCHITECTURES, LATENT_CHANNELS, PIXELS, ddpm

SNR_GAMMA = 5.0
CAPTION_DROPOUT = 0.1


def main() -> None:
    """Autoencoder, then latents, then text encoders and denoiser together; the folder is an ordinary pipeline."""
    options = _parse()
    options.work.mkdir(parents=True, exist_ok=True)
    autoencoder = make_autoencoder(options)
    pictures, captions = load_pictures(options.pictures, options)
    if options.flip:
        pictures, captions = np.concatenate([pictures, pictures[..., ::-1, :]]), captions * 2
    torch.manual_seed(options.seed)
    if autoencoder is None:
        pipeline = ddpm(options.resolution, options.widths, options.layers_per_block, options.dropout)
    else:
        pipeline = ARCHITECTURES[options.architecture](autoencoder, captions, options.max_tokens, options.dropout)
    pipeline.to(options.device)
    family = FAMILIES[type(pipeline).__name__](pipeline)
    if options.max_sequence_length:
        family.set_max_sequence_length(options.max_sequence_length)
    is_encoded = autoencoder is not None
    latents = encode(family, pictures, options.work / "latents.safetensors") if is_encoded else torch.tensor(pictures)
    train_denoiser(family, latents, captions, options)
    pipeline.to("cpu", torch.float16 if is_encoded else torch.float32)
    if is_encoded:
        pipeline.text_encoder.float()  # transformers loads what is stored, diffusers fp32: one dtype for both
    pipeline.save_pretrained(options.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=(*ARCHITECTURES, PIXELS), default="unet")
    parser.add_argument("--pictures", required=True, help="scenes/flat, scenes/neon or a folder")
    parser.add_argument("--autoencoder-pictures", nargs="+", help="the same, several; unless --autoencoder is given")
    parser.add_argument("--autoencoder", type=Path, help="a trained one, instead of training one")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--autoencoder-widths", type=int, nargs="+", default=[32, 32, 64, 64])
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-sequence-length", type=int, help="of a T5, or of the zeros in its place")
    parser.add_argument("--num-frames", type=int, default=8, help="of clips")
    parser.add_argument("--num-pictures", type=int, default=32000, help="rendered scenes per domain")
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--checkpointing-steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--dropout", type=float, default=0.0, help="in the denoiser; for small picture sets")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 128], help="of a ddpm's levels")
    parser.add_argument("--layers-per-block", type=int, default=1, help="of a ddpm")
    parser.add_argument("--weighting", choices=("min_snr", "none"), default="min_snr", help="where noise is predicted")
    parser.add_argument("--device", default="cpu", help="of the denoiser's training")
    parser.add_argument("--flip", action="store_true", help="mirror half of the pictures; wrong where sides matter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    given = (options.autoencoder is not None) + (options.autoencoder_pictures is not None)
    if options.architecture == PIXELS and given:
        parser.error("a ddpm has no autoencoder; leave --autoencoder and --autoencoder-pictures out")
    if options.architecture != PIXELS and given != 1:
        parser.error("give either --autoencoder-pictures or --autoencoder")
    return options


def load_pictures(
    source: str, options: argparse.Namespace, num_scenes: int | None = None, seed_shift: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Pictures ``(N, H, W, 3)`` or clips ``(N, F, H, W, 3)``, uint8, and their captions."""
    name, side = source.removeprefix("scenes/"), options.resolution
    if name in DOMAINS:
        seed = options.seed + seed_shift
        scenes = draw_scenes(num_scenes or options.num_pictures, seed=seed, held_out=False)
        return render(scenes, name, seed=seed, resolution=side), [scene.caption for scene in scenes]
    if options.architecture == "video":
        settings, examples = ClipSettings(options.num_frames, side, side), open_clips(source).examples
        clips = [((settings.decode(example) + 1) * 127.5).round().byte().permute(1, 2, 3, 0) for example in examples]
        return torch.stack(clips).numpy(), [example.caption for example in examples]
    rows = [json.loads(line) for line in (Path(source) / "metadata.jsonl").read_text().splitlines()]
    opened = (Image.open(Path(source) / row["file_name"]).convert("RGB") for row in rows)
    resized = [np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) for picture in opened]
    return np.stack(resized), [row["text"] for row in rows]


def make_autoencoder(options: argparse.Namespace) -> AutoencoderKL | None:
    """A trained one in fp32, or one that is trained now; ``None`` for a denoiser of pixels."""
    if options.architecture == PIXELS:
        return None
    if options.autoencoder:
        return AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32)
    return train_autoencoder(options)


def train_autoencoder(options: argparse.Namespace) -> AutoencoderKL:
    """Absolute plus squared error and a light KL term; the scaling factor makes the latents' spread one."""
    folder = options.work / "vae"
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder)
    per_source = options.num_pictures // 4
    loaded = [load_pictures(s, options, per_source, seed_shift=1)[0] for s in options.autoencoder_pictures]
    pictures = torch.from_numpy(np.concatenate([p.reshape(-1, *p.shape[-3:]) for p in loaded]))  # or clips' frames
    torch.manual_seed(options.seed)
    levels = len(options.autoencoder_widths)
    autoencoder = AutoencoderKL(
        block_out_channels=tuple(options.autoencoder_widths),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS,
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
    """``(B, ..., H, W, 3)`` uint8 to ``(B, 3, ..., H, W)`` in [-1, 1]."""
    return pictures.movedim(-1, 1).float() / 127.5 - 1


def encode(family: Family, pictures: np.ndarray, cache: Path) -> Tensor:
    """Scaled posterior means of all pictures or clips, kept on disk."""
    if not cache.exists():
        batches = torch.from_numpy(np.ascontiguousarray(pictures)).split(64)
        encoded = [family.encode_pixels(to_signal(batch)) for batch in tqdm(batches, desc="latents")]
        save_file({"latents": torch.cat(encoded).contiguous()}, cache)
    return load_file(cache)["latents"]


def train_denoiser(family: Family, latents: Tensor, captions: list[str], options: argparse.Namespace) -> None:
    """The family's own loss; ends with the averaged weights in its denoiser and text encoders.

    Latents ``(N, C, ...)`` fp32, or pictures ``(N, H, W, 3)`` uint8 that are made a signal batch by batch.

    Step s draws from a generator seeded by (seed, s), so a resumed run ends with the same bytes.
    """
    model = nn.ModuleDict({**family.text_encoders, **family.denoisers}).requires_grad_().train()
    tokens = family.tokenize([*captions, ""])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    checkpoint = options.work / "denoiser.safetensors"
    start = restore(checkpoint, parameters, optimiser, average) if checkpoint.exists() else 0
    schedule = get_cosine_schedule_with_warmup(optimiser, 200, options.steps, last_epoch=start - 1)
    bar = tqdm(range(start, options.steps), desc="denoiser", initial=start, total=options.steps)
    running, began = None, time.perf_counter()
    for step in bar:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        torch.manual_seed(options.seed * 1_000_003 + step)  # dropout
        loss = denoising_loss(family, latents, tokens, options, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        average.step(parameters)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % options.checkpointing_steps == 0:
            save(checkpoint, parameters, optimiser, average, step + 1)
            rate = round((step + 1 - start) / (time.perf_counter() - began), 3)
            print(json.dumps({"step": step + 1, "loss": running, "steps_per_second": rate}), flush=True)
    average.copy_to(parameters)


def denoising_loss(
    family: Family, latents: Tensor, tokens: dict[str, Tensor], options: argparse.Namespace, generator: torch.Generator
) -> Tensor:
    """One batch with caption dropout: the squared error, weighted where the family predicts noise."""
    batch_size, device = options.batch_size, family.device
    rows = torch.randint(len(latents), (batch_size,), generator=generator)
    clean = to_signal(latents[rows]) if latents.dtype == torch.uint8 else latents[rows]
    dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
    noise = torch.randn(clean.shape, generator=generator)
    t = draw_t(family, batch_size, generator)
    captions = torch.where(dropped, -1, rows)
    clean, noise, t = (values.to(device) for values in (clean, noise, t))
    with torch.autocast(device.type, torch.bfloat16):
        text = family.encode_text({name: ids[captions].to(device) for name, ids in tokens.items()})
        predicted = family.predict(family.noise.add_noise(clean, noise, t), t, text).float()
    error = (predicted - family.noise.target(clean, noise, t)).square().flatten(1).mean(1)
    return error.mean() if options.weighting == "none" else (weights(family, t) * error).mean()


def draw_t(family: Family, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps as the base's own training draws them."""
    total = family.noise.num_train_timesteps
    if family.noise.has_integer_timesteps:
        return torch.randint(total, (count,), generator=generator)
    return draw_timesteps(Interval(0, total), family.noise.density, count, generator, integer=False)


def weights(family: Family, t: Tensor) -> Tensor:
    """Min-SNR (gamma 5) for noise, 1 for flow."""
    if not isinstance(family.noise, DiscreteNoise):
        return torch.ones(len(t))
    snr = compute_snr(family.noise.scheduler, t)
    return snr.clamp(max=SNR_GAMMA) / snr


def save(
    path: Path, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, average: EMAModel, step: int
) -> None:
    """Weights, averages and moments in one file, written whole or not at all."""
    tensors = {"step": torch.tensor(step), "average_step": torch.tensor(average.optimization_step)}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.weight"] = parameter.detach()
        tensors[f"{index}.average"] = average.shadow_params[index]
        for name in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{index}.{name}"] = optimiser.state[parameter][name]
    draft = path.with_suffix(".draft")
    save_file(tensors, draft)
    draft.replace(path)


def restore(path: Path, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, average: EMAModel) -> int:
    """Undo `save`; returns the step."""
    tensors = load_file(path)
    average.optimization_step = int(tensors["average_step"])
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{index}.weight"])
        average.shadow_params[index].copy_(tensors[f"{index}.average"])
        optimiser.state[parameter] = {name: tensors[f"{index}.{name}"] for name in ("exp_avg", "exp_avg_sq", "step")}
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return int(tensors["step"])


if __name__ == "__main__":
    main()
