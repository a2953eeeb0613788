"""What is minimised. Needs torch only."""

from timestep_experts.objectives.denoising import squared_error
from timestep_experts.objectives.distribution_matching import (
    clean_from_noise,
    discriminator_loss,
    generator_adversarial_loss,
    guided,
    matching_gradient,
    matching_loss,
)

__all__ = [
    "clean_from_noise",
    "discriminator_loss",
    "generator_adversarial_loss",
    "guided",
    "matching_gradient",
    "matching_loss",
    "squared_error",
]
