"""Where a run keeps its files.

Below ``output_dir``: ``recipe.yaml``, ``cache/``, ``evaluation/``, ``report.html``, ``results.json``, and for every
variant ``variants/<name>/`` with one folder per stage, the ``bundle/`` of its experts, the ``decoupled/range-<i>/`` of
its full copies, and in ``merged/`` what was merged of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from timestep_experts.training.loop import RESULT, is_finished


@dataclass(frozen=True)
class VariantPaths:
    """The files of one variant."""

    folder: Path

    @property
    def bundle(self) -> Path:
        """The trained experts."""
        return self.folder / "bundle"

    @property
    def copies(self) -> Path:
        """The folder of all full copies."""
        return self.folder / "decoupled"

    @property
    def merged(self) -> Path:
        """The merged denoiser or LoRA, with the search that weighed it."""
        return self.folder / "merged"

    def stage(self, name: str) -> Path:
        """The folder of a stage of low-rank experts."""
        return self.folder / name

    def is_finished(self, stage: str) -> bool:
        """Whether a stage of low-rank experts is finished."""
        return is_finished(self.stage(stage))

    def copy_stage(self, index: int) -> Path:
        """The folder of one copy's stage, with the ``expert/`` in it."""
        return self.copies / f"range-{index}"

    def copy(self, index: int) -> Path:
        """The folder of one trained copy."""
        return self.copy_stage(index) / "expert"

    def finished_stages(self) -> list[Path]:
        """The folders of all finished stages."""
        found = (path.parent for home in (self.folder, self.copies) for path in home.glob(f"*/{RESULT}"))
        return sorted(folder for folder in found if is_finished(folder))


@dataclass(frozen=True)
class RunPaths:
    """The files of a run."""

    output_dir: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.output_dir / "recipe.yaml"

    @property
    def report(self) -> Path:
        """The report."""
        return self.output_dir / "report.html"

    @property
    def results(self) -> Path:
        """The numbers of the report."""
        return self.output_dir / "results.json"

    @property
    def variants(self) -> Path:
        """What was trained, by variant."""
        return self.output_dir / "variants"

    def variant(self, name: str) -> VariantPaths:
        """The files of a variant."""
        return VariantPaths(self.variants / name)

    @property
    def evaluations(self) -> Path:
        """What was measured of all variants."""
        return self.output_dir / "evaluation"

    def evaluation(self, variant: str, mode: str) -> Path:
        """What was measured of a variant in one mode."""
        return self.evaluations / f"{variant}-{mode}"
