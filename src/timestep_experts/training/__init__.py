"""Training the experts: one loop, short stages over it, checkpoints that resume to the byte."""

from timestep_experts.training.assemble import AssembleSettings, assemble
from timestep_experts.training.decouple import Decoupled, DecoupleSettings, decouple
from timestep_experts.training.foster import FosterMethod, FosterSettings, foster
from timestep_experts.training.loop import LoopSettings
from timestep_experts.training.optimiser import OptimiserSettings

__all__ = [
    "AssembleSettings",
    "DecoupleSettings",
    "Decoupled",
    "FosterMethod",
    "FosterSettings",
    "LoopSettings",
    "OptimiserSettings",
    "assemble",
    "decouple",
    "foster",
]
