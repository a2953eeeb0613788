"""What is minimised. Needs torch only."""

from timestep_experts.objectives.denoising import squared_error

__all__ = ["squared_error"]
