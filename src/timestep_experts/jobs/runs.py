"""What is done with a recipe, all in one place. Every job goes on where it stopped.

Layout of ``output_dir``: ``recipe.yaml``, ``cache/``, ``evaluation/``, ``report.html``, and for every arm
``arms/<arm>/`` with one folder per stage, the ``bundle/``, and what was merged of it in ``merged/``. For every range
that was decoupled, ``decoupled/range-<i>/`` with its stage and the ``expert/``, in the arm's folder but for main's.
"""

from timestep_experts.jobs.decouple import decouple_folder, decouple_range
from timestep_experts.jobs.distill import distill_arm, is_distilled
from timestep_experts.jobs.evaluate import evaluate, write_run_report
from timestep_experts.jobs.plan import make_decouple_plan, make_plan, planned_device
from timestep_experts.jobs.train import foster_arm, has_second_stage, prepare_output, reported_partition
from timestep_experts.jobs.train_arm import assemble_any_arm, train_arm

__all__ = [
    "assemble_any_arm",
    "decouple_folder",
    "decouple_range",
    "distill_arm",
    "evaluate",
    "foster_arm",
    "has_second_stage",
    "is_distilled",
    "make_decouple_plan",
    "make_plan",
    "planned_device",
    "prepare_output",
    "reported_partition",
    "train_arm",
    "write_run_report",
]
