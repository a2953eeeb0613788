"""Distillation from a recipe: settings of its stages, and how its arms draw."""

from __future__ import annotations

from dataclasses import replace

from timestep_experts.build import build_sample_settings, numbers_per_expert
from timestep_experts.config import Recipe
from timestep_experts.data import MediaSettings
from timestep_experts.inference import SampleSettings
from timestep_experts.training import Adversary, DistillSettings, PhaseSettings
from timestep_experts.training.generator import SAMPLER


def build_distill_settings(recipe: Recipe, vae_scale_factor: int) -> DistillSettings:
    """Stage 1 of a few-step generator; numbers per expert are spelled out.

    Args:
        recipe: says how.
        vae_scale_factor: pixels per latent.

    Raises:
        ValueError: the recipe distils nothing.
    """
    distill = recipe.distill
    if distill is None:
        raise ValueError("recipe.distill is missing: this recipe distils nothing")
    scales, gan = recipe.experts.scales, distill.gan
    phases = {
        "": PhaseSettings(
            {s.label: numbers_per_expert(s, s.max_train_steps, distill.max_train_steps) for s in scales},
            {s.label: numbers_per_expert(s, s.learning_rate, distill.learning_rate) for s in scales},
            distill.fake_learning_rate or distill.learning_rate,
            distill.train_batch_size,
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
        timesteps=distill.timesteps,
        inputs=distill.inputs,
        guidance_scale=distill.guidance_scale,
        generator_interval=distill.generator_interval,
        phases=phases,
        caption_dropout=recipe.data.caption_dropout,
        latent_size=(height // vae_scale_factor, width // vae_scale_factor),
        seed=recipe.seed,
    )


def build_generator_sample_settings(recipe: Recipe, media: MediaSettings) -> SampleSettings:
    """How an arm draws: a distilled one in its own steps, without guidance; any other as `build_sample_settings`."""
    settings = build_sample_settings(recipe, media)
    if recipe.distill is None:
        return settings
    timesteps = recipe.distill.timesteps
    return replace(
        settings, scheduler=SAMPLER, num_inference_steps=len(timesteps), guidance_scale=1.0, timesteps=timesteps
    )
