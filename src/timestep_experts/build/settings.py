"""Settings of training, evaluation and sampling, from the sections of a recipe; configuration objects stop here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

from timestep_experts.build.mixture import build_decoupled_partition
from timestep_experts.config import (
    AssembleConfig,
    DecoupleConfig,
    DistillConfig,
    FosterConfig,
    OptimizerConfig,
    Recipe,
    ScaleConfig,
)
from timestep_experts.data import ClipSettings, DecodeSettings
from timestep_experts.errors import UserError
from timestep_experts.evaluation import LossSettings
from timestep_experts.formats import SamplingDefaults
from timestep_experts.inference import SampleSettings
from timestep_experts.intervals import Partition
from timestep_experts.training import (
    Adversary,
    AssembleSettings,
    DecoupleSettings,
    DistillSettings,
    FosterSettings,
    LoopSettings,
    NetworkRates,
    OptimiserSettings,
    PhaseSettings,
    RouterRates,
)
from timestep_experts.training.generator import SAMPLER

TABLE_RATE_RATIO = 50
"""How much faster a table over every t learns than F, if the recipe does not say it."""
JOINT_TABLE_RATE_RATIO = 5
"""How much faster tables learn than the experts beside them, if the recipe does not say it; see ``docs/method.md``."""
Number = TypeVar("Number", int, float)


def build_foster_settings(recipe: Recipe, method: FosterConfig, text_encoders: Collection[str]) -> FosterSettings:
    """Stage 1 of fostering; numbers per expert are spelled out."""
    scales = method.experts.scales
    by_network = _build_text_rates(method, text_encoders)
    return FosterSettings(
        method=method.schedule,
        train_batch_size=method.train_batch_size,
        learning_rates={s.label: numbers_per_expert(s, s.learning_rate, method.learning_rate) for s in scales},
        max_train_steps={s.label: numbers_per_expert(s, s.max_train_steps, method.max_train_steps) for s in scales},
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
        by_network=by_network,
        router=_build_joint_rates(method, by_network),
    )


def _build_joint_rates(method: FosterConfig, by_network: NetworkRates) -> RouterRates | None:
    learning = method.router_learning
    if learning is None:
        return None
    return RouterRates(
        learning.learning_rate or method.learning_rate,
        learning.table_learning_rate or JOINT_TABLE_RATE_RATIO * method.learning_rate,
        by_network,
        learning.weight_decay,
        learning.max_grad_norm,
    )


def _build_text_rates(config: FosterConfig | AssembleConfig, text_encoders: Collection[str]) -> NetworkRates:
    """How text encoders learn otherwise than the denoiser."""
    factor = (config.text_learning_rate or config.learning_rate) / config.learning_rate
    decay = config.text_weight_decay
    decays = {} if decay is None else dict.fromkeys(text_encoders, decay)
    return NetworkRates(dict.fromkeys(text_encoders, factor), decays)


def numbers_per_expert(
    scale: ScaleConfig, own: Number | tuple[Number, ...] | None, default: Number
) -> tuple[Number, ...]:
    """A scale's own value or the default, spelled out for each of its experts.

    Raises:
        UserError: there are not as many values as experts.
    """
    value = default if own is None else own
    if not isinstance(value, tuple):
        return (value,) * scale.num_experts
    if len(value) != scale.num_experts:
        raise UserError(
            f"recipe.method.experts.scales: {scale.label} has {scale.num_experts} experts; got {len(value)} values"
            f" {value}"
        )
    return value


def build_assemble_settings(
    recipe: Recipe, assemble: AssembleConfig, text_encoders: Collection[str] = ()
) -> AssembleSettings:
    """Stage 2."""
    rates = RouterRates(
        assemble.learning_rate,
        assemble.table_learning_rate or TABLE_RATE_RATIO * assemble.learning_rate,
        _build_text_rates(assemble, text_encoders),
    )
    return AssembleSettings(
        rates,
        max_train_steps=assemble.max_train_steps,
        train_batch_size=assemble.train_batch_size,
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
    )


def build_distill_settings(recipe: Recipe, method: DistillConfig, vae_scale_factor: int) -> DistillSettings:
    """Stage 1 of a few-step generator; numbers per expert are spelled out.

    Args:
        recipe: gives seed, resolution and caption dropout.
        method: the distillation.
        vae_scale_factor: pixels per latent.
    """
    scales, gan = method.experts.scales, method.gan
    phases = {
        "": PhaseSettings(
            {s.label: numbers_per_expert(s, s.max_train_steps, method.max_train_steps) for s in scales},
            {s.label: numbers_per_expert(s, s.learning_rate, method.learning_rate) for s in scales},
            method.fake_learning_rate or method.learning_rate,
            method.train_batch_size,
        )
    }
    if gan is not None:
        phases["-gan"] = PhaseSettings(
            {s.label: numbers_per_expert(s, s.gan_train_steps, gan.max_train_steps) for s in scales},
            {s.label: numbers_per_expert(s, None, gan.learning_rate) for s in scales},
            gan.fake_learning_rate or gan.learning_rate,
            gan.train_batch_size,
            Adversary(gan.generator_weight, gan.discriminator_weight),
        )
    height, width = recipe.resolution
    return DistillSettings(
        timesteps=method.timesteps,
        inputs=method.inputs,
        guidance_scale=method.guidance_scale,
        generator_interval=method.generator_interval,
        phases=phases,
        caption_dropout=recipe.data.caption_dropout,
        latent_size=(height // vae_scale_factor, width // vae_scale_factor),
        seed=recipe.seed,
    )


def build_decouple_settings(recipe: Recipe, method: DecoupleConfig, num_train_timesteps: int) -> DecoupleSettings:
    """Full copies, one per range; numbers per range are spelled out.

    Raises:
        UserError: the base has lost precision, or the ranges do not fit it.
    """
    if recipe.training.base_quantization is not None:
        raise UserError("recipe.training.base_quantization: a quantised base cannot be copied and trained; use null")
    options = method.model_dump(exclude={"kind", "intervals", "boundaries", "optimizer", "max_train_steps"})
    steps = method.max_train_steps
    return DecoupleSettings(
        partition=build_decoupled_partition(method, num_train_timesteps),
        max_train_steps=steps if isinstance(steps, tuple) else (steps,) * method.num_ranges,
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
        **options,
    )


def build_optimiser_settings(config: OptimizerConfig) -> OptimiserSettings:
    """Optimiser and schedule."""
    return OptimiserSettings(
        config.name, config.options, config.lr_scheduler, config.lr_warmup_steps, config.max_grad_norm
    )


def build_loop_settings(recipe: Recipe, optimiser: OptimizerConfig) -> LoopSettings:
    """How a stage with this optimiser is run."""
    training = recipe.training
    return LoopSettings(
        optimiser=build_optimiser_settings(optimiser),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        checkpointing_steps=training.checkpointing_steps,
        checkpoints_total_limit=training.checkpoints_total_limit,
        logging_steps=training.logging_steps,
        validation_steps=training.validation_steps,
        not_finite=training.not_finite,
    )


def build_loss_settings(recipe: Recipe, partition: Partition) -> LossSettings:
    """How validation losses are measured, reported by the intervals of ``partition``."""
    evaluation = recipe.evaluation
    return LossSettings(
        partition, evaluation.bins_per_interval, evaluation.num_pictures, 2 * evaluation.batch_size, evaluation.seed
    )


def build_sample_settings(recipe: Recipe, decoding: DecodeSettings) -> SampleSettings:
    """How a base generates pictures or clips, and so do fostered experts and copies."""
    evaluation = recipe.evaluation
    return SampleSettings(
        evaluation.scheduler,
        evaluation.num_inference_steps,
        evaluation.guidance_scale,
        recipe.resolution,
        evaluation.batch_size,
        evaluation.seed,
        decoding.num_frames if isinstance(decoding, ClipSettings) else None,
        recipe.max_sequence_length,
    )


def build_generator_sample_settings(recipe: Recipe, method: DistillConfig, decoding: DecodeSettings) -> SampleSettings:
    """How a distilled generator generates: in its own steps, without guidance."""
    return replace(
        build_sample_settings(recipe, decoding),
        scheduler=SAMPLER,
        num_inference_steps=len(method.timesteps),
        guidance_scale=1.0,
        timesteps=method.timesteps,
    )


def build_sampling_defaults(recipe: Recipe, decoding: DecodeSettings) -> SamplingDefaults:
    """What a bundle or an expert says of how it is meant to be sampled from."""
    clips = decoding if isinstance(decoding, ClipSettings) else None
    return SamplingDefaults(
        base_dtype=recipe.training.base_dtype,
        base_quantization=recipe.training.base_quantization,
        resolution=recipe.resolution,
        num_frames=None if clips is None else clips.num_frames,
        fps=None if clips is None or clips.fps is None else clips.fps / clips.stride,
        max_sequence_length=recipe.max_sequence_length,
    )


def build_generator_defaults(recipe: Recipe, method: DistillConfig, decoding: DecodeSettings) -> SamplingDefaults:
    """The same of a distilled generator, which samples in its own steps."""
    settings = build_generator_sample_settings(recipe, method, decoding)
    own = {name: getattr(settings, name) for name in ("scheduler", "timesteps", "guidance_scale")}
    return build_sampling_defaults(recipe, decoding).model_copy(update=own)
