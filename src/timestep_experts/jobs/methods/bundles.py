"""Low-rank experts as files and as rows of the table, however they were trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from timestep_experts.build import RunContext
from timestep_experts.config import Recipe, Variant
from timestep_experts.data import MediaSettings
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle, SamplingDefaults, load_bundle, save_bundle, tool_versions
from timestep_experts.inference import SampleSettings, attach, detach
from timestep_experts.jobs.methods.base import training_cost
from timestep_experts.jobs.methods.protocol import Candidate, CandidateMode, Costs
from timestep_experts.jobs.paths import VariantPaths
from timestep_experts.mixture import Mixture, Mode, ParameterCount
from timestep_experts.models import Family
from timestep_experts.training.log import read_log


@dataclass(frozen=True)
class BundleCandidate:
    """See `Candidate`: a variant's bundle in one mode.

    Args:
        variant: its name.
        mode: of the experts.
        paths: of the variant.
        sampling_settings: how it generates.
        unused_stages: given the scales that the mode leaves out, whether it leaves a stage's work unused.
    """

    variant: str
    mode: Mode
    paths: VariantPaths
    sampling_settings: Callable[[MediaSettings], SampleSettings]
    is_unused: Callable[[str, list[str]], bool]

    def check(self) -> None:
        """See `Candidate`."""
        load_bundle(self.paths.bundle)

    def files(self) -> list[Path]:
        """The bundle's tensors."""
        return [bundle_file(self.variant, self.paths)]

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:
        """Attach the bundle."""
        with _attached(family, self.paths.bundle, self.mode) as mixture:
            yield mixture

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:  # noqa: ARG002 - the mixture is on it
        """Those of what the mode uses: switching uses neither routers nor contexts of base gate 0."""
        assert mixture is not None
        is_routed = self.mode == "route"
        used = [scale for scale in mixture.spec.scales if is_routed or scale.constant_gate]
        trained = sum(p.numel() for scale in used for stack in mixture.stacks(scale.name) for p in stack.parameters())
        trained += sum(p.numel() for group in mixture.router_parameters() for p in group) if is_routed else 0
        counted = mixture.count_parameters()
        left_out = [scale.name for scale in mixture.spec.scales if scale not in used]
        stages = [
            folder
            for folder in self.paths.finished_stages()
            if (is_routed or folder.name != "assemble") and not self.is_unused(folder.name, left_out)
        ]
        stored = counted.stored if is_routed else trained
        return Costs(ParameterCount(stored, counted.active, trained), *training_cost(stages))

    def sampling(self, media: MediaSettings) -> SampleSettings:
        """See `Candidate`."""
        return self.sampling_settings(media)


@dataclass(frozen=True)
class MergedLoraCandidate:
    """See `Candidate`: the LoRA into which a variant's experts were merged."""

    variant: str
    paths: VariantPaths
    sampling_settings: Callable[[MediaSettings], SampleSettings]
    mode: CandidateMode = "merged"

    def check(self) -> None:
        """See `Candidate`."""
        require_merged(self.variant, self.paths)
        load_bundle(self.paths.merged / "bundle")

    def files(self) -> list[Path]:
        """The merged LoRA as a bundle of one expert."""
        return [self.paths.merged / "bundle" / "mixture.safetensors"]

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:
        """Attach the LoRA."""
        with _attached(family, self.paths.merged / "bundle", "switch") as mixture:
            yield mixture

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:  # noqa: ARG002 - the mixture is on it
        """The training of all experts, and the size of the LoRA."""
        assert mixture is not None
        counted = mixture.count_parameters()
        experts = load_bundle(self.paths.bundle).tensors
        trained = sum(tensor.numel() for name, tensor in experts.items() if ".experts." in name)
        stages = [folder for folder in self.paths.finished_stages() if folder.name != "assemble"]
        return Costs(ParameterCount(counted.stored, counted.active, trained), *training_cost(stages))

    def sampling(self, media: MediaSettings) -> SampleSettings:
        """See `Candidate`."""
        return self.sampling_settings(media)


def bundle_file(variant: str, paths: VariantPaths) -> Path:
    """The tensors of a variant's bundle.

    Raises:
        UserError: there are none.
    """
    file = paths.bundle / "mixture.safetensors"
    if not file.is_file():
        raise UserError(f"variant {variant!r} is not trained yet: there is no {file}")
    return file


def require_merged(variant: str, paths: VariantPaths) -> None:
    """Refuse a variant that is not merged.

    Raises:
        UserError: there is nothing merged.
    """
    if not paths.merged.is_dir():
        raise UserError(f"variant {variant!r} is not merged yet: the command run does that")


@contextmanager
def _attached(family: Family, bundle: Path, mode: Mode) -> Iterator[Mixture]:
    pipeline = family.pipeline()
    mixture = attach(pipeline, bundle, mode)
    try:
        yield mixture
    finally:
        detach(pipeline)


def write_bundle(
    recipe: Recipe,
    variant: Variant,
    paths: VariantPaths,
    mixture: Mixture,
    context: RunContext,
    mode: Mode,
    sampling: SamplingDefaults,
) -> None:
    """Write a variant's experts as its bundle, with how they were made."""
    shared = recipe.model_dump(mode="json", exclude={"variants", "output_dir", "method", "merge"})
    stages = {
        path.name: _last_losses(path) for path in sorted(paths.folder.iterdir()) if (path / "log.jsonl").is_file()
    }
    bundle = Bundle(
        spec=mixture.spec,
        target_modules=tuple(mixture.layers),
        tensors=mixture.state_dict(),
        mode=mode,
        base_model=recipe.pretrained_model_name_or_path,
        denoiser_class=type(context.family.denoiser).__name__,
        sampling=sampling,
        provenance={
            "recipe": {**shared, "method": variant.method.model_dump(mode="json")},
            "versions": tool_versions(),
            "stages": stages,
        },
    )
    save_bundle(bundle, paths.bundle)


def _last_losses(folder: Path) -> Mapping[str, float]:
    last: dict[str, float] = {}
    for record in read_log(folder):
        last |= record
    return {name: value for name, value in last.items() if name != "seconds"}


def expert_candidates(
    variant: Variant,
    paths: VariantPaths,
    modes: tuple[Mode, ...],
    sampling: Callable[[MediaSettings], SampleSettings],
    is_unused: Callable[[str, list[str]], bool],
) -> list[Candidate]:
    """A variant's bundle in each mode, and what it was merged into."""
    rows: list[Candidate] = [BundleCandidate(variant.name, mode, paths, sampling, is_unused) for mode in modes]
    return rows if variant.merge is None else [*rows, MergedLoraCandidate(variant.name, paths, sampling)]
