"""From a recipe to objects: the one place where configuration meets the classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from timestep_experts.config import ClipsConfig, DecoupleConfig, ExpertsConfig, OptimizerConfig, Recipe, ScaleConfig
from timestep_experts.data import (
    ClipSettings,
    EncodedPictures,
    MediaSettings,
    PictureSet,
    PictureSettings,
    encode_dataset,
    open_clips,
    open_dataset,
    split_by_caption,
)
from timestep_experts.data.sources import WORLD_PREFIX
from timestep_experts.evaluation import LossSettings
from timestep_experts.inference import SampleSettings
from timestep_experts.inference.sample import choose_scheduler
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, asymmetric
from timestep_experts.models import Family, load_family
from timestep_experts.training import (
    AssembleSettings,
    FosterSettings,
    LoopSettings,
    OptimiserSettings,
)
from timestep_experts.world.judge import ASSETS
from timestep_experts.world.scenes import parse_caption

BASE_ASSET = "world/base"
BASE_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What ``training.base_dtype`` means."""
ROUTER_RATE_RATIO = 50
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Workshop:
    """What all arms of a recipe share.

    Args:
        family: the loaded base, without experts.
        train: the training pictures.
        validation: pictures whose captions no training picture has.
        references: validation pictures as they are, for Frechet distances.
        media: how pictures or clips are decoded, none mirrored.
        prompts: what pictures are drawn for.
        is_judged: whether the prompts are captions of the embedded world.
    """

    family: Family
    train: EncodedPictures
    validation: EncodedPictures
    references: PictureSet
    media: MediaSettings
    prompts: tuple[str, ...]
    is_judged: bool


def build_device(recipe: Recipe) -> torch.device:
    """The device to train and draw on.

    Raises:
        ValueError: torch knows no such device.
    """
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"recipe.device: {name!r} cannot be used: {error}") from error


def resolve_model(source: str) -> str:
    """The folder of the shipped base for ``world/base``, anything else as it is."""
    return str(ASSETS / "base") if source == BASE_ASSET else str(Path(source).expanduser())


def build_base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of the frozen base."""
    return BASE_DTYPES[recipe.training.base_dtype]


def build_family(recipe: Recipe) -> Family:
    """Load the base model.

    Raises:
        ValueError: it cannot be loaded, or the recipe asks of it what it does not have.
    """
    training, source = recipe.training, resolve_model(recipe.pretrained_model_name_or_path)
    family = load_family(source, build_device(recipe), build_base_dtype(recipe), training.base_quantization)
    if recipe.max_sequence_length is not None:
        family.set_max_sequence_length(recipe.max_sequence_length)
    if training.gradient_checkpointing:
        family.checkpoint_gradients()
    return family


def build_media_settings(recipe: Recipe, default_num_frames: int | None, *, flip: bool) -> MediaSettings:
    """How pictures, or the clips of a video base, are decoded.

    Args:
        recipe: says how.
        default_num_frames: of the base (`Family.default_num_frames`); ``None`` for one that draws pictures.
        flip: keep mirrored copies.

    Raises:
        ValueError: the recipe says how to read clips, but the base draws pictures.
    """
    height, width = recipe.resolution
    if default_num_frames is not None:
        clips = recipe.data.clips or ClipsConfig()
        return ClipSettings(clips.num_frames or default_num_frames, height, width, clips.fps, clips.stride, flip)
    if recipe.data.clips is not None:
        raise ValueError(f"recipe.data.clips: {recipe.pretrained_model_name_or_path} draws pictures, not clips")
    return PictureSettings(height, width, flip)


def build_picture_sets(recipe: Recipe, *, is_video: bool = False) -> tuple[PictureSet, PictureSet]:
    """Training and validation pictures, or clips."""
    data = recipe.data
    find = open_clips if is_video else partial(open_dataset, seed=recipe.seed)
    found = find(data.path, max_samples=data.max_train_samples)
    if data.validation_path is not None:
        return found, find(data.validation_path, max_samples=data.max_validation_samples)
    if data.path.startswith(WORLD_PREFIX):
        limit = data.max_validation_samples or 512
        return found, open_dataset(data.path, max_samples=limit, seed=recipe.seed + 1, held_out=True)
    train, validation = split_by_caption(found, data.validation_share, recipe.seed)
    return train, PictureSet(validation.examples[: data.max_validation_samples], validation.skipped)


def build_workshop(recipe: Recipe) -> Workshop:
    """Load, read and encode what the arms share.

    Raises:
        ValueError: the base, the data or the prompts are not usable.
    """
    family = build_family(recipe)
    media = build_media_settings(recipe, family.default_num_frames, flip=False)
    train, validation = build_picture_sets(recipe, is_video=family.is_video)
    cache = recipe.output_dir / "cache"
    settings = build_media_settings(recipe, family.default_num_frames, flip=recipe.data.flip)
    prompts = build_prompts(recipe, validation)
    is_judged = _is_judged(recipe, prompts)
    choose_scheduler(recipe.evaluation.scheduler, family.pipeline().scheduler)  # fails before hours of training
    as_tokens = any(recipe.arm(arm).experts.text_target_modules is not None for arm in recipe.arm_names)
    return Workshop(
        family=family,
        train=encode_dataset(train, settings, family, cache, as_tokens=as_tokens),
        validation=encode_dataset(validation, media, family, cache, as_tokens=as_tokens),
        references=validation,
        media=media,
        prompts=prompts,
        is_judged=is_judged,
    )


def build_validation(recipe: Recipe, family: Family, *, as_tokens: bool = False) -> EncodedPictures:
    """The validation pictures alone, encoded, for jobs that neither train nor draw.

    Args:
        recipe: says which.
        family: the loaded base.
        as_tokens: keep captions as token ids, for text encoders that change.

    Raises:
        ValueError: the data is not usable.
    """
    media = build_media_settings(recipe, family.default_num_frames, flip=False)
    _, validation = build_picture_sets(recipe, is_video=family.is_video)
    return encode_dataset(validation, media, family, recipe.output_dir / "cache", as_tokens=as_tokens)


def build_prompts(recipe: Recipe, validation: PictureSet) -> tuple[str, ...]:
    """What pictures are drawn for: the recipe's prompts, or different captions of the validation set.

    Raises:
        ValueError: a prompt file that is not there.
    """
    wanted = recipe.evaluation.prompts
    if isinstance(wanted, Path):
        if not wanted.is_file():
            raise ValueError(f"recipe.evaluation.prompts: no file {wanted}")
        wanted = tuple(line.strip() for line in wanted.read_text(encoding="utf-8").splitlines() if line.strip())
    if wanted is None:
        wanted = tuple(dict.fromkeys(example.caption for example in validation.examples))
    return wanted[: recipe.evaluation.num_prompts]


def _is_judged(recipe: Recipe, prompts: tuple[str, ...]) -> bool:
    if recipe.evaluation.judge == "off":
        return False
    try:
        for prompt in prompts:
            parse_caption(prompt)
    except ValueError:
        if recipe.evaluation.judge == "scenes":
            raise
        return False
    return bool(prompts)


def build_spec(experts: ExpertsConfig, num_train_timesteps: int) -> MixtureSpec:
    """The mixture's form; contexts rest at gate 0."""
    scales = tuple(_scale(scale, num_train_timesteps) for scale in experts.scales)
    if all(scale.role == "auto" for scale in experts.scales):
        scales = asymmetric(scales)
    return MixtureSpec(scales, experts.router_input, experts.gate, experts.router_knots, experts.dropout)


def _scale(config: ScaleConfig, num_train_timesteps: int) -> Scale:
    if config.boundaries is not None:
        partition = Partition(config.boundaries)
        if partition.num_train_timesteps != num_train_timesteps:
            raise ValueError(
                f"recipe.experts.scales: the boundaries of {config.label} end at {partition.num_train_timesteps:g};"
                f" this base model has {num_train_timesteps} timesteps"
            )
    else:
        partition = Partition.uniform(config.num_experts, num_train_timesteps)
    alpha = config.lora_alpha or config.rank
    return Scale(config.label, partition, config.rank, alpha, gated=config.role == "context")


def build_decoupled_partition(config: DecoupleConfig, num_train_timesteps: int) -> Partition:
    """The ranges of full copies.

    Raises:
        ValueError: they do not end at the base's T.
    """
    if config.boundaries is None:
        return Partition.uniform(config.num_ranges, num_train_timesteps)
    partition = Partition(config.boundaries)
    if partition.num_train_timesteps != num_train_timesteps:
        raise ValueError(
            f"recipe.decouple.boundaries end at {partition.num_train_timesteps:g}; this base model has"
            f" {num_train_timesteps} timesteps"
        )
    return partition


def build_targets(
    experts: ExpertsConfig, denoisers: Mapping[str, nn.Module], text_encoders: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, tuple[str, ...] | str]]:
    """The networks that carry experts, and which of their modules do.

    Raises:
        ValueError: text encoders are to carry experts where there are none.
    """
    networks, targets = dict(denoisers), dict.fromkeys(denoisers, experts.target_modules)
    if experts.text_target_modules is None:
        return networks, targets
    if not text_encoders:
        raise ValueError("recipe.experts.text_target_modules: this base model has no text encoder")
    wanted = experts.text_target_modules
    chosen = wanted if isinstance(wanted, Mapping) else dict.fromkeys(text_encoders, wanted)
    for name in chosen:
        if name not in text_encoders:
            known = ", ".join(text_encoders)
            raise ValueError(f"recipe.experts.text_target_modules: no text encoder {name!r}; this base has {known}")
        networks[name] = text_encoders[name]
    return networks, {**targets, **chosen}


def build_mixture(recipe: Recipe, family: Family) -> Mixture:
    """Attach the recipe's experts to the family's denoisers and, where it says so, to its text encoders.

    Contexts fostered jointly rest at gate 1: experts that grew up together only fit each other together.
    """
    spec = build_spec(recipe.experts, family.noise.num_train_timesteps)
    if recipe.distill is None and recipe.foster.method == "joint":
        spec = spec.with_base_gates(1.0)
    networks, targets = build_targets(recipe.experts, family.denoisers, family.text_encoders)
    mixture = Mixture.attach(
        networks,
        spec,
        targets,
        owned=family.owned_intervals,
        timestep_scale=family.timestep_scale,
        seed=recipe.seed,
    )
    if recipe.experts.text_dropout is not None:
        for name in networks.keys() & family.text_encoders.keys():
            mixture.set_dropout(recipe.experts.text_dropout, name)
    return mixture


def build_foster_settings(recipe: Recipe, text_encoders: Collection[str]) -> FosterSettings:
    """Stage 1; numbers per expert are spelled out."""
    foster = recipe.foster
    factor = (foster.text_learning_rate or foster.learning_rate) / foster.learning_rate
    decay = foster.text_weight_decay
    scales = recipe.experts.scales
    return FosterSettings(
        method=foster.method,
        train_batch_size=foster.train_batch_size,
        learning_rates={s.label: numbers_per_expert(s, s.learning_rate, foster.learning_rate) for s in scales},
        max_train_steps={s.label: numbers_per_expert(s, s.max_train_steps, foster.max_train_steps) for s in scales},
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
        rate_factors=dict.fromkeys(text_encoders, factor),
        weight_decays={} if decay is None else dict.fromkeys(text_encoders, decay),
    )


def numbers_per_expert(
    scale: ScaleConfig, own: Number | tuple[Number, ...] | None, default: Number
) -> tuple[Number, ...]:
    """A scale's own value or the default, spelled out for each of its experts.

    Raises:
        ValueError: there are not as many values as experts.
    """
    value = default if own is None else own
    if not isinstance(value, tuple):
        return (value,) * scale.num_experts
    if len(value) != scale.num_experts:
        raise ValueError(
            f"recipe.experts.scales: {scale.label} has {scale.num_experts} experts; got {len(value)} values {value}"
        )
    return value


def build_assemble_settings(recipe: Recipe) -> AssembleSettings:
    """Stage 2.

    Raises:
        ValueError: the recipe assembles nothing.
    """
    if recipe.assemble is None:
        raise ValueError("recipe.assemble is null: this recipe has no second stage")
    rate = recipe.assemble.learning_rate
    return AssembleSettings(
        learning_rate=rate,
        table_learning_rate=recipe.assemble.table_learning_rate or ROUTER_RATE_RATIO * rate,
        max_train_steps=recipe.assemble.max_train_steps,
        train_batch_size=recipe.assemble.train_batch_size,
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
    )


def build_optimiser_settings(config: OptimizerConfig) -> OptimiserSettings:
    """Optimiser and schedule."""
    return OptimiserSettings(
        config.name, config.options, config.lr_scheduler, config.lr_warmup_steps, config.max_grad_norm
    )


def build_loop_settings(recipe: Recipe) -> LoopSettings:
    """What both stages share."""
    training = recipe.training
    return LoopSettings(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        checkpointing_steps=training.checkpointing_steps,
        checkpoints_total_limit=training.checkpoints_total_limit,
        logging_steps=training.logging_steps,
        validation_steps=training.validation_steps,
    )


def build_loss_settings(recipe: Recipe, partition: Partition) -> LossSettings:
    """How validation losses are measured, reported by the intervals of ``partition``."""
    evaluation = recipe.evaluation
    return LossSettings(
        partition, evaluation.bins_per_interval, evaluation.num_pictures, 2 * evaluation.batch_size, evaluation.seed
    )


def build_sample_settings(recipe: Recipe, media: MediaSettings) -> SampleSettings:
    """How pictures or clips are drawn by a base, or by experts that were fostered."""
    evaluation = recipe.evaluation
    return SampleSettings(
        evaluation.scheduler,
        evaluation.num_inference_steps,
        evaluation.guidance_scale,
        recipe.resolution,
        evaluation.batch_size,
        evaluation.seed,
        media.num_frames if isinstance(media, ClipSettings) else None,
        recipe.max_sequence_length,
    )
