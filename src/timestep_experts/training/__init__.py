"""Training the experts: one loop, short stages over it, checkpoints that resume to the byte."""

from timestep_experts.training.assemble import AssembleSettings, RouterRates, assemble
from timestep_experts.training.decouple import Decoupled, DecoupleSettings, decouple
from timestep_experts.training.distill import DistillSettings, PhaseSettings, distill, distill_router
from timestep_experts.training.foster import FosterMethod, FosterSettings, foster
from timestep_experts.training.loop import LoopSettings
from timestep_experts.training.matching import Adversary
from timestep_experts.training.optimiser import OptimiserSettings
from timestep_experts.training.param_group import NetworkRates
from timestep_experts.training.stage import Training

__all__ = [
    "Adversary",
    "AssembleSettings",
    "DecoupleSettings",
    "Decoupled",
    "DistillSettings",
    "FosterMethod",
    "FosterSettings",
    "LoopSettings",
    "NetworkRates",
    "OptimiserSettings",
    "PhaseSettings",
    "RouterRates",
    "Training",
    "assemble",
    "decouple",
    "distill",
    "distill_router",
    "foster",
]
