"""Distillation into a few-step generator whose steps are timestep experts (TSM, section 4; DMD2, arXiv 2405.14867).

Every expert is trained alone at its own steps, in turn from high noise to low, in one or two phases: by distribution
matching, and then with a discriminator too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.mixture import Mixture, Scale
from timestep_experts.models import Family
from timestep_experts.training.assemble import AssembleSettings, router_param_groups
from timestep_experts.training.discriminator import DiscriminatorHead, middle_shape
from timestep_experts.training.distill_batches import DistillPlan
from timestep_experts.training.generator import Generator, copy_base, trainable_copy
from timestep_experts.training.matching import Adversary, Distilling, Inputs
from timestep_experts.training.param_group import ParamGroup
from timestep_experts.training.stage import Stage, Training

ROUTER = "router"


@dataclass(frozen=True)
class PhaseSettings:
    """One phase of each expert's training.

    Args:
        max_train_steps: per scale, one number per expert; steps are updates of the fake score.
        learning_rates: per scale, one number per expert.
        fake_learning_rate: of the fake score and the discriminator's head.
        train_batch_size: samples per generator step that an expert owns.
        adversary: weights of the adversarial losses; ``None`` trains without a discriminator.
    """

    max_train_steps: Mapping[str, Sequence[int]]
    learning_rates: Mapping[str, Sequence[float]]
    fake_learning_rate: float
    train_batch_size: int
    adversary: Adversary | None = None


@dataclass(frozen=True)
class DistillSettings:
    """How a base is distilled.

    Args:
        timesteps: t of each step of the generator, descending; every expert owns at least one.
        inputs: ``backsim``: experts see what those of earlier steps generate. ``real``: training pictures made noisy.
            The first step sees pure noise either way.
        guidance_scale: of the real score.
        generator_interval: the generator learns at every so many-th update of the fake score.
        phases: by the ending of their stages' names, in their order.
        caption_dropout: probability of the empty caption.
        latent_size: height and width of the latents.
        seed: of samples and of the discriminator's head.
    """

    timesteps: tuple[int, ...]
    inputs: Inputs
    guidance_scale: float
    generator_interval: int
    phases: Mapping[str, PhaseSettings]
    caption_dropout: float
    latent_size: tuple[int, int]
    seed: int


@dataclass
class Distilled:
    """What a stage of distillation changes: one expert or the routers, the fake score, the discriminator's head.

    Args:
        own: of the generator, by name: tensors that share memory with what learns.
        mixture: whose they are.
        fake: the fake score.
        head: ``None`` in a phase without a discriminator.
    """

    own: Mapping[str, Tensor]
    mixture: Mixture
    fake: nn.Module
    head: nn.Module | None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts = {"generator": self.own, "fake": self.fake.state_dict()}
        if self.head is not None:
            parts["head"] = self.head.state_dict()
        for part, tensors in parts.items():
            yield from ((f"{part}.{name}", tensor) for name, tensor in tensors.items())

    def state_dict(self) -> dict[str, Tensor]:
        """Names begin with ``generator.``, ``fake.`` and ``head.``; other experts are not among them."""
        return dict(self._tensors())

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> None:
        """Load what `state_dict` returned.

        Raises:
            UserError: names or shapes differ; nothing is loaded then.
        """
        own = self.state_dict()
        wrong = sorted(
            n for n in {*own, *tensors} if n not in own or n not in tensors or own[n].shape != tensors[n].shape
        )
        if wrong:
            raise UserError("these tensors of a distillation do not fit the model:\n  " + "\n  ".join(wrong))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def trained_modules(self) -> list[nn.Module]:
        """The layers with experts, the fake score and the head."""
        return [*self.mixture.trained_modules(), self.fake, *([] if self.head is None else [self.head])]


@dataclass(frozen=True)
class DistillStage(Training):
    """One phase of one expert, or of the routers.

    Args:
        expert: ``<scale>.<index>``, or `ROUTER`.
    """

    trainee: Distilled
    expert: str


def expert_order(mixture: Mixture) -> list[tuple[Scale, int]]:
    """Cores before contexts, and the experts of each from high noise to low."""
    scales = sorted(mixture.spec.scales, key=lambda scale: scale.gated)
    return [(scale, index) for scale in scales for index in reversed(range(len(scale.partition)))]


def distill(mixture: Mixture, family: Family, settings: DistillSettings) -> list[DistillStage]:
    """The stages that distil a base into the experts of a mixture, to be run in this order.

    Raises:
        UserError: the base cannot be distilled (`Generator`), or an expert would have no step of the generator.
    """
    maker = _StageMaker(mixture, family, settings)
    return [
        maker.expert_stage(scale, index, ending, phase)
        for scale, index in expert_order(mixture)
        for ending, phase in settings.phases.items()
    ]


def distill_router(
    mixture: Mixture, family: Family, settings: DistillSettings, assembling: AssembleSettings
) -> DistillStage:
    """The stage that trains the routers over distilled experts, by the losses of the last phase, at all steps.

    The fake score begins as the base again, for it now follows a generator of all steps.

    Raises:
        UserError: no scale is gated, or the base cannot be distilled.
    """
    return _StageMaker(mixture, family, settings).router_stage(assembling)


@dataclass
class _StageMaker:
    """What all stages of a distillation share."""

    mixture: Mixture
    family: Family
    settings: DistillSettings
    fake: Family = field(init=False)
    head: DiscriminatorHead | None = field(init=False)
    generator: Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = Generator(self.family, self.settings.timesteps)
        if len(self.mixture.networks) > 1:
            others = [name for name in self.mixture.networks if name != self.family.denoiser_name]
            raise UserError(
                f"distillation trains experts of the denoiser alone, and {', '.join(others)} carry some too"
            )
        self.fake = trainable_copy(self.family, self.mixture)
        is_adversarial = any(phase.adversary for phase in self.settings.phases.values())
        self.head = self._make_head().to(self.family.device) if is_adversarial else None

    def _make_head(self) -> DiscriminatorHead:
        seed = int.from_bytes(hashlib.sha256(f"head {self.settings.seed}".encode()).digest()[:7], "big")
        return DiscriminatorHead(*middle_shape(self.family.denoiser, *self.settings.latent_size), seed)

    def expert_stage(self, scale: Scale, index: int, ending: str, phase: PhaseSettings) -> DistillStage:
        """One phase of one expert."""
        expert = f"{scale.name}.{index}"
        owned = tuple(k for k, t in enumerate(self.settings.timesteps) if scale.partition.index_of(t) == index)
        if not owned:
            raise UserError(
                f"expert {expert} of {scale.partition[index]} would never be used: none of the generator's timesteps"
                f" {list(self.settings.timesteps)} lies there; every interval needs one"
            )
        steps = phase.max_train_steps[scale.name][index]
        slices = {
            f"{path}.experts.{scale.name}.{name}": (getattr(stack, name), index - stack.first)
            for path, stack in zip(self.mixture.layers, self.mixture.stacks(scale.name), strict=True)
            for name in ("A", "B")
        }
        param_group = ParamGroup(expert, list(slices.values()), phase.learning_rates[scale.name][index], steps)
        own = dict(zip(slices, param_group.leaves, strict=True))
        batch_size = phase.train_batch_size * len(owned)
        is_first = ending == next(iter(self.settings.phases))
        return self._stage(
            expert,
            f"distill-{expert}{ending}",
            [param_group],
            own,
            phase,
            owned,
            batch_size,
            set_mode=lambda: self.mixture.foster(scale.name),
            prepare=self._start_anew if is_first else self._start_head,
        )

    def router_stage(self, assembling: AssembleSettings) -> DistillStage:
        """All routers, over frozen experts."""
        *_, phase = self.settings.phases.values()

        def set_mode() -> None:
            self.mixture.mode = "route"

        return self._stage(
            ROUTER,
            "assemble",
            router_param_groups(self.mixture, assembling.rates, assembling.max_train_steps),
            {name: value for name, value in self.mixture.state_dict().items() if ".router." in name},
            phase,
            tuple(range(len(self.settings.timesteps))),
            assembling.train_batch_size,
            set_mode=set_mode,
            prepare=self._start_anew,
        )

    def _stage(
        self,
        expert: str,
        name: str,
        param_groups: Sequence[ParamGroup],
        own: Mapping[str, Tensor],
        phase: PhaseSettings,
        owned: tuple[int, ...],
        batch_size: int,
        *,
        set_mode: Callable[[], None],
        prepare: Callable[[], None],
    ) -> DistillStage:
        head = self.head if phase.adversary is not None else None
        critics: Any = [self.fake.denoiser, *([] if head is None else [head])]
        critic = ParamGroup(
            "fake",
            [(parameter, None) for module in critics for parameter in module.parameters()],
            phase.fake_learning_rate,
            max(param_group.max_train_steps for param_group in param_groups),
        )
        settings = self.settings
        objective = Distilling(
            self.generator,
            self.mixture,
            self.fake,
            head,
            phase.adversary,
            settings.inputs,
            settings.guidance_scale,
            settings.generator_interval,
            batch_size,
        )
        plan = DistillPlan(
            settings.seed,
            name,
            settings.timesteps,
            owned,
            self.family.noise.num_train_timesteps,
            batch_size,
            settings.caption_dropout,
            head is not None,
        )
        stage = Stage(name, [*param_groups, critic], plan, objective, set_mode, prepare, report=objective.take_values)
        trainee = Distilled(own, self.mixture, self.fake.denoiser, head)
        return DistillStage(stage, trainee, self.family, expert)

    def _start_anew(self) -> None:
        """The fake score is the base again, and the discriminator knows nothing."""
        copy_base(self.family.denoiser, self.fake.denoiser)
        self._start_head()

    def _start_head(self) -> None:
        if self.head is not None:
            self.head.load_state_dict(self._make_head().state_dict())
