"""What fostering and assembling must hold, whatever they learn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import max_error, random_pictures, scales
from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Interval, Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale
from timestep_experts.models import StableDiffusion
from timestep_experts.objectives import squared_error
from timestep_experts.training import (
    AssembleSettings,
    FosterSettings,
    LoopSettings,
    OptimiserSettings,
    RouterRates,
    assemble,
    foster,
)
from timestep_experts.training.batches import Batch, BatchPlan
from timestep_experts.training.ema import Averaged
from timestep_experts.training.log import read_log
from timestep_experts.training.loop import Observer, run_stage
from timestep_experts.training.param_group import learning_rate_factor
from timestep_experts.training.stage import Stage, Training

TARGETS = ("to_q", "to_v", "conv1")
SGD = OptimiserSettings("SGD", {"momentum": 0.9}, max_grad_norm=0.05)
ADAMW = OptimiserSettings("AdamW", {"weight_decay": 0.01}, lr_scheduler="cosine", max_grad_norm=1.0)


def settings(
    method: str = "independent", steps: int = 3, rate: float = 0.05, **per_scale: list[float]
) -> FosterSettings:
    names = {"n1": 1, "n2": 2, "n4": 4}
    rates = {name: per_scale.get(f"{name}_rates", [rate] * n) for name, n in names.items()}
    budgets = {name: per_scale.get(f"{name}_steps", [steps] * n) for name, n in names.items()}
    return FosterSettings(method, 2, rates, budgets, caption_dropout=0.25, seed=5)


def attach(family: StableDiffusion, *counts: int, **options: float) -> Mixture:
    return Mixture.attach(family.denoiser, MixtureSpec(scales(*counts, rank=2, alpha=2), **options), TARGETS, seed=3)


def run(
    stage: Stage,
    mixture: Mixture,
    family: StableDiffusion,
    folder: Path,
    optimiser: OptimiserSettings = SGD,
    observe: Observer | None = None,
    **loop: object,
) -> None:
    pictures = random_pictures(6, family)
    settings = LoopSettings(optimiser, **loop)
    run_stage(Training(stage, mixture, family), pictures, settings, folder, {"run": "law"}, observe)


def experts(mixture: Mixture) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in mixture.state_dict().items()}


@dataclass(frozen=True)
class OneStratum(BatchPlan):
    """The samples of one stratum alone: a separate run of its expert."""

    alone: Interval | None = None

    def draw(self, pictures: EncodedDataset, family: StableDiffusion, step: int, *, only: None = None) -> Batch:
        return super().draw(pictures, family, step, only=self.alone)


@pytest.mark.parametrize("optimiser", [SGD, replace(ADAMW, options={"eps": 1e-3})])
def test_fostering_all_intervals_in_one_run_equals_separate_runs(
    optimiser: OptimiserSettings, family: StableDiffusion, tmp_path: Path
) -> None:
    plan = settings(n4_rates=[0.05, 0.04, 0.03, 0.02], n4_steps=[3, 2, 3, 1])
    together = attach(family, 4)
    run(foster(together, plan)[0], together, family, tmp_path / "together", optimiser)
    at_once = experts(together)
    together.detach()
    for index, interval in enumerate(Partition.uniform(4).intervals):
        alone = attach(family, 4)
        stage = foster(alone, plan)[0]
        one = OneStratum(**vars(stage.plan), alone=interval)
        run(
            replace(stage, param_groups=[stage.param_groups[index]], plan=one),
            alone,
            family,
            tmp_path / str(index),
            optimiser,
        )
        for key, value in experts(alone).items():
            # fp32 products over batches of another size round differently, 1e-7 per step
            assert max_error(value[index], at_once[key][index]) < 2e-6, key
        alone.detach()


def test_a_joint_context_learns_from_the_mean_over_all_its_samples(family: StableDiffusion, tmp_path: Path) -> None:
    plain = OptimiserSettings("SGD", {}, max_grad_norm=None)
    mixture = attach(family, 4, 1)
    stage = foster(mixture, settings("joint", steps=1, rate=1.0))[0]
    pictures = random_pictures(6, family)
    batch = stage.plan.draw(pictures, family, 0)
    before = experts(mixture)
    stage.set_mode()
    losses = squared_error(
        family.predict(
            family.noise.add_noise(pictures.latents[batch.indices], batch.noise, batch.t),
            batch.t,
            pictures.conditioning(batch.indices, family.device, batch.dropped),
        ),
        batch.noise,
    )
    ups = [stack.B for stack in mixture.stacks("n1")]
    gradients = torch.autograd.grad(losses.mean(), ups)
    run(stage, mixture, family, tmp_path, plain)
    names = [f"{name}.experts.n1.B" for name in mixture.layers]
    for name, gradient in zip(names, gradients, strict=True):
        moved = before[name] - mixture.state_dict()[name]
        assert max_error(moved, gradient) < 1e-6, name  # one fp32 step; sums in another order


def test_an_expert_stops_at_its_own_budget(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = attach(family, 2)
    seen: list[dict[str, torch.Tensor]] = []
    stage = foster(mixture, settings(steps=4, n2_steps=[2, 4]))[0]
    run(stage, mixture, family, tmp_path, ADAMW, lambda step, log: seen.append(experts(mixture)), validation_steps=1)
    after_2, after_4 = seen[1], seen[3]
    assert all(torch.equal(after_2[key][0], after_4[key][0]) for key in after_2)
    assert any(not torch.equal(after_2[key][1], after_4[key][1]) for key in after_2)


def test_gradient_accumulation_changes_nothing(family: StableDiffusion, tmp_path: Path) -> None:
    results = []
    for parts in (1, 3):
        mixture = attach(family, 2, 1)
        stage = foster(mixture, settings("joint"))[0]
        run(stage, mixture, family, tmp_path / str(parts), gradient_accumulation_steps=parts)
        results.append(experts(mixture))
        mixture.detach()
    # sums in another order: 1e-7 per step
    assert max(max_error(results[0][key], results[1][key]) for key in results[0]) < 2e-6


def test_only_the_fostered_scale_changes(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = attach(family, 2, 1)
    before = experts(mixture)
    core, context = foster(mixture, settings())
    assert (core.name, context.name) == ("foster-n2", "foster-n1")
    run(core, mixture, family, tmp_path / "core")
    changed = {key.split(".experts.")[-1][:2] for key in before if not torch.equal(before[key], experts(mixture)[key])}
    assert changed == {"n2"}


def test_coarse_to_fine_starts_from_the_coarser_expert(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = attach(family, 2, 1)
    coarse, fine = foster(mixture, settings("coarse_to_fine", steps=4))
    assert (coarse.name, fine.name, coarse.num_steps, fine.num_steps) == ("foster-n1", "foster-n2", 2, 2)
    run(coarse, mixture, family, tmp_path / "coarse")
    fine.prepare()
    for coarser, finer in zip(mixture.stacks("n1"), mixture.stacks("n2"), strict=True):
        assert torch.equal(finer.A, coarser.A.expand_as(finer.A))
        assert torch.equal(finer.B, coarser.B.expand_as(finer.B))


def test_coarse_to_fine_needs_equal_ranks(family: StableDiffusion) -> None:
    coarse, fine = scales(1, rank=2)[0], scales(2, rank=4)[0]
    mixture = Mixture.attach(family.denoiser, MixtureSpec((coarse, fine)), TARGETS)
    with pytest.raises(ValueError, match="need the same rank and alpha"):
        foster(mixture, settings("coarse_to_fine"))


def assembled(mixture: Mixture, steps: int = 3) -> Stage:
    return assemble(mixture, AssembleSettings(RouterRates(0.01, 0.5), steps, 4, caption_dropout=0.1, seed=1))


def test_assembling_leaves_the_experts_bytes_unchanged(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = attach(family, 2, 1)
    for stage in foster(mixture, settings()):
        run(stage, mixture, family, tmp_path / stage.name)
    before = experts(mixture)
    run(assembled(mixture), mixture, family, tmp_path / "assemble", ADAMW)
    after = experts(mixture)
    assert all(torch.equal(before[key], after[key]) for key in before if ".experts." in key)
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("router.F"))


GATES = RouterForm("rank", "z_and_t", "latent_rms", knots=5, unit_rms=True)


def gated(family: StableDiffusion) -> Mixture:
    spec = MixtureSpec((Scale("n1", Partition.uniform(1), 3, 3, gated=True, base_gate=1.0),), GATES)
    return Mixture.attach(family.denoiser, spec, TARGETS, seed=3)


def joint_settings(steps: int, **options: object) -> FosterSettings:
    rates = RouterRates(1e-3, 0.05, weight_decay=0.0, max_grad_norm=0.5)
    return FosterSettings("joint", 4, {"n1": [1e-2]}, {"n1": [steps]}, 0.25, 5, router=rates, **options)


def test_routers_learn_together_with_experts(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = gated(family)
    before = experts(mixture)
    (stage,) = foster(mixture, joint_settings(3))
    assert [(g.name, g.learning_rate, g.weight_decay, g.max_grad_norm) for g in stage.param_groups] == [
        ("n1.0", 1e-2, None, None),
        ("router.F", 1e-3, 0.0, 0.5),
        ("router.E", 0.05, 0.0, 0.5),
    ]
    run(stage, mixture, family, tmp_path, ADAMW)
    assert mixture.mode == "route"
    after = experts(mixture)
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_routers_learn_with_joint_experts_alone(family: StableDiffusion) -> None:
    with pytest.raises(ValueError, match="fostered jointly, not independent"):
        foster(gated(family), replace(joint_settings(3), method="independent"))


def test_gates_and_averages_resume_to_the_same_bytes(family: StableDiffusion, tmp_path: Path) -> None:
    def train(folder: Path, observe: Observer | None) -> dict[str, torch.Tensor]:
        mixture = gated(family)
        (stage,) = foster(mixture, joint_settings(8))
        averaged = Averaged(mixture, stage.parameters(), 0.9)
        training = Training(replace(stage, after_step=averaged.follow), averaged, family)
        settings = LoopSettings(ADAMW, checkpointing_steps=2, validation_steps=1)
        try:
            run_stage(training, random_pictures(6, family), settings, folder, {"run": "law"}, observe)
            averaged.settle()
            return experts(mixture)
        finally:
            mixture.detach()

    def kill(step: int, log: object) -> None:
        if step == 5:
            raise PowerCutError

    whole = train(tmp_path / "whole", None)
    with pytest.raises(PowerCutError):
        train(tmp_path / "killed", kill)
    resumed = train(tmp_path / "killed", None)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (tmp_path / "whole" / "result.safetensors").read_bytes() == (
        tmp_path / "killed" / "result.safetensors"
    ).read_bytes()


def test_what_is_kept_is_the_average_of_what_was_learnt(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = gated(family)
    (stage,) = foster(mixture, joint_settings(4))
    averaged, seen = Averaged(mixture, stage.parameters(), 0.9), [experts(mixture)]

    def follow(step: int) -> None:
        averaged.follow(step)
        seen.append(experts(mixture))

    training = Training(replace(stage, after_step=follow), averaged, family)
    run_stage(training, random_pictures(6, family), LoopSettings(ADAMW), tmp_path, {"run": "law"})
    with averaged.observed():
        inside = experts(mixture)
    assert all(torch.equal(value, seen[-1][key]) for key, value in experts(mixture).items())
    averaged.settle()
    for key, value in experts(mixture).items():
        mean = seen[0][key].double()
        for step in range(1, 5):
            decay = min(0.9, (1 + step) / (10 + step))
            mean = decay * mean + (1 - decay) * seen[step][key].double()
        assert torch.allclose(value.double(), mean, atol=1e-6)  # fp32 sums of four terms
        assert torch.equal(value, inside[key])
        assert not torch.equal(value, seen[-1][key])


def test_of_a_scale_that_is_fostered_by_itself_its_own_experts_are_averaged(family: StableDiffusion) -> None:
    mixture = attach(family, 2, 1)
    stage = foster(mixture, settings())[0]
    averaged = Averaged(mixture.only("n2"), stage.parameters(), 0.9)
    own = mixture.only("n2").state_dict()
    assert averaged.state_dict().keys() == {*own, *(f"average.{name}" for name in own)}
    with pytest.raises(ValueError, match="averages of other parameters"):
        averaged.load_state_dict(own)


def test_assembling_without_a_context_is_refused(family: StableDiffusion) -> None:
    with pytest.raises(ValueError, match="no routers to train"):
        assembled(attach(family, 2))


def test_the_base_stays_frozen(family: StableDiffusion, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    mixture = attach(family, 2, 1, dropout=0.1)
    for stage in [*foster(mixture, settings("joint")), assembled(mixture)]:
        run(stage, mixture, family, tmp_path / stage.name, ADAMW)
    mixture.detach()
    after = family.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bf16_trains_close_to_fp32(family: StableDiffusion, tmp_path: Path) -> None:
    results = []
    for precision in ("no", "bf16"):
        mixture = attach(family, 2, 1)
        before = experts(mixture)
        stage = foster(mixture, settings("joint"))[0]
        run(stage, mixture, family, tmp_path / precision, mixed_precision=precision)
        results.append({key: value - before[key] for key, value in experts(mixture).items()})
        mixture.detach()
    fp32, bf16 = (torch.cat([change.flatten() for change in changes.values()]) for changes in results)
    assert not torch.equal(fp32, bf16)
    assert (fp32 - bf16).norm() < 0.05 * fp32.norm()  # bf16 keeps 8 bits: half a percent per operation
    assert all(change.dtype == torch.float32 for changes in results for change in changes.values())


class PowerCutError(Exception):
    """What a test raises in place of a power cut."""


@pytest.mark.parametrize("optimiser", [ADAMW, OptimiserSettings("Adafactor", {}, "linear", 2)])
def test_a_killed_run_resumes_to_the_same_bytes(
    optimiser: OptimiserSettings, family: StableDiffusion, tmp_path: Path
) -> None:
    def kill(step: int, log: object) -> None:
        if step == 5:
            raise PowerCutError

    def train(folder: Path, observe: Observer | None) -> None:
        mixture = attach(family, 2, 1, dropout=0.2)
        stage = foster(mixture, settings("joint", steps=8, rate=1e-3))[0]
        try:
            run(
                stage,
                mixture,
                family,
                folder,
                optimiser,
                observe,
                validation_steps=1,
                checkpointing_steps=2,
                logging_steps=1,
            )
        finally:
            mixture.detach()

    train(tmp_path / "whole", None)
    with pytest.raises(PowerCutError):
        train(tmp_path / "killed", kill)
    assert not (tmp_path / "killed" / "result.safetensors").exists()
    assert [path.name for path in sorted((tmp_path / "killed").glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    train(tmp_path / "killed", None)
    whole, resumed = ((tmp_path / name / "result.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
    assert [record["step"] for record in read_log(tmp_path / "killed")] == list(range(1, 9))


def test_a_finished_stage_is_loaded_not_repeated(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = attach(family, 2)
    stage = foster(mixture, settings())[0]
    run(stage, mixture, family, tmp_path)
    done = experts(mixture)
    with torch.no_grad():
        for value in mixture.state_dict().values():
            value.zero_()

    def never(step: int, log: object) -> None:
        raise AssertionError("trained again")

    run(stage, mixture, family, tmp_path, observe=never)
    assert all(torch.equal(done[key], value) for key, value in mixture.state_dict().items())
    assert set(load_file(tmp_path / "result.safetensors")) == set(done)


def test_a_folder_of_another_run_is_refused_by_name(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = attach(family, 2)
    stage = foster(mixture, settings())[0]
    run(stage, mixture, family, tmp_path)
    training, pictures = Training(stage, mixture, family), random_pictures(6, family)
    with pytest.raises(ValueError, match=r"seed: stored None, now 7"):
        run_stage(training, pictures, LoopSettings(SGD), tmp_path, {"run": "law", "seed": 7})


@pytest.mark.parametrize(
    ("optimiser", "message"),
    [
        (OptimiserSettings("Adamm"), "no optimiser 'Adamm'"),
        (OptimiserSettings("SGD", {"beta": 1.0}), "SGD takes no beta"),
    ],
)
def test_unusable_optimisers_are_named(
    optimiser: OptimiserSettings, message: str, family: StableDiffusion, tmp_path: Path
) -> None:
    mixture = attach(family, 2)
    with pytest.raises(ValueError, match=message):
        run(foster(mixture, settings())[0], mixture, family, tmp_path, optimiser)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="lr_scheduler"):
        learning_rate_factor("cosin", 0, 10)


def test_samples_of_a_stratum_do_not_depend_on_the_others(family: StableDiffusion) -> None:
    pictures = random_pictures(5, family)
    plan = BatchPlan(0, "law", Partition.uniform(4), 3, 0.5)
    whole = plan.draw(pictures, family, 7)
    for index, interval in enumerate(plan.strata.intervals):
        part = plan.draw(pictures, family, 7, only=interval)
        rows = slice(3 * index, 3 * index + 3)
        for name in ("indices", "t", "noise", "dropped"):
            assert torch.equal(getattr(whole, name)[rows], getattr(part, name))
        assert all(t in interval for t in part.t.tolist())


def test_every_picture_is_met_once_per_epoch(family: StableDiffusion) -> None:
    pictures = random_pictures(5, family)
    plan = BatchPlan(0, "law", Partition.uniform(2), 3, 0.0)
    rows = torch.cat([plan.draw(pictures, family, step).indices[:3] for step in range(10)])
    assert all(sorted(epoch.tolist()) == list(range(5)) for epoch in rows.split(5))
