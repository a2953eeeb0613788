"""What was gained: loss per timestep, fidelity, and whether pictures keep their captions' promises."""

from timestep_experts.evaluation.alignment import judge_pictures
from timestep_experts.evaluation.fidelity import frechet_distance, judge_features
from timestep_experts.evaluation.gates import GateMap, gate_map
from timestep_experts.evaluation.loss import LossCurve, LossSettings, loss_curve
from timestep_experts.evaluation.result import Result

__all__ = [
    "GateMap",
    "LossCurve",
    "LossSettings",
    "Result",
    "frechet_distance",
    "gate_map",
    "judge_features",
    "judge_pictures",
    "loss_curve",
]
