"""Values that were computed another way: by hand, by numpy, by another library. Each catches one wrong line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from tiny import flux
from torch import Tensor, nn

from conftest import OneLayer, normal, random_pictures, randomise, scales, tiny_unet
from timestep_experts.config import Recipe
from timestep_experts.evaluation.loss import LossSettings
from timestep_experts.evaluation.merges import MergeBench, MergeSplit
from timestep_experts.inference import attach_ensemble, reencoding
from timestep_experts.intervals import Partition
from timestep_experts.jobs.stages import fingerprint
from timestep_experts.merging.search import History, QuadraticSettings, search_quadratic
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import StableDiffusion
from timestep_experts.objectives import discriminator_loss, generator_adversarial_loss
from timestep_experts.training import (
    AssembleSettings,
    FosterSettings,
    LoopSettings,
    NetworkRates,
    OptimiserSettings,
    RouterRates,
    assemble,
    foster,
)
from timestep_experts.training.batches import BatchPlan
from timestep_experts.training.distill import DistillSettings, PhaseSettings, distill
from timestep_experts.training.ema import MovingAverage, ema_decay_at
from timestep_experts.training.log import read_log
from timestep_experts.training.loop import run_stage
from timestep_experts.training.matching import Adversary
from timestep_experts.training.stage import Training

BOUNDARIES = (0.0, 125.0, 250.5, 500.0, 1000.0)
ON_AND_AROUND = [0.0, 124.0, 124.99, 125.0, 126.0, 250.0, 250.5, 250.75, 499.0, 500.0, 999.0, 1000.0]


# Ownership


def test_a_boundary_belongs_to_the_interval_above_it_on_the_path_of_devices_and_compilers() -> None:
    partition = Partition(BOUNDARIES)
    expected = np.clip(np.digitize(ON_AND_AROUND, BOUNDARIES) - 1, 0, 3).tolist()
    t = torch.tensor(ON_AND_AROUND)
    compiled = torch.compile(partition.index_of, backend="eager", fullgraph=True)
    assert compiled(t).tolist() == expected
    assert partition.index_of(t).tolist() == expected
    assert [partition.index_of(value) for value in ON_AND_AROUND] == expected


# Dropout, clips and schedules


@pytest.mark.parametrize("dropout", [0.1, 0.8])
def test_dropout_drops_its_share_and_scales_the_rest(dropout: float) -> None:
    layer = nn.Linear(4000, 1, bias=False)
    nn.init.zeros_(layer.weight)
    net = OneLayer(layer)
    spec = MixtureSpec((Scale("one", Partition.uniform(1), 1, 1.0),), dropout=dropout)
    mixture = Mixture.attach(net, spec, ["layer"])
    stack: Any = mixture.layers["layer"].experts["one"]
    with torch.no_grad():
        stack.A.fill_(1.0)
        stack.B.fill_(1.0)
    mixture.mode = "switch"
    net.train()
    torch.manual_seed(0)
    kept = net(torch.ones(1, 4000), torch.tensor([5.0])).item() * (1 - dropout) / 4000
    assert kept == pytest.approx(1 - dropout, abs=4 * math.sqrt(dropout * (1 - dropout) / 4000))
    net.eval()
    assert net(torch.ones(1, 4000), torch.tensor([5.0])).item() == pytest.approx(4000)


def one_step(
    family: StableDiffusion, folder: Path, optimiser: OptimiserSettings, rate: float = 0.5
) -> dict[str, Tensor]:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(2, rank=2)), ["to_q", "conv1"])
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    settings = FosterSettings("independent", 2, {"n2": [rate] * 2}, {"n2": [1] * 2}, caption_dropout=0, seed=5)
    stage = foster(mixture, settings)[0]
    run_stage(Training(stage, mixture, family), random_pictures(6, family), LoopSettings(optimiser), folder, {})
    return {name: value - before[name] for name, value in mixture.state_dict().items()}


def expert_norms(change: dict[str, Tensor]) -> list[float]:
    return [math.sqrt(sum(value[i].double().square().sum().item() for value in change.values())) for i in range(2)]


def test_gradients_are_clipped_to_the_norm_of_each_expert(family: StableDiffusion, tmp_path: Path) -> None:
    free = one_step(family, tmp_path / "free", OptimiserSettings("SGD", {}, max_grad_norm=None))
    Mixture.of(family.denoiser).detach()
    clipped = one_step(family, tmp_path / "clipped", OptimiserSettings("SGD", {}, max_grad_norm=1e-3))
    assert min(expert_norms(free)) > 10 * 0.5 * 1e-3
    assert expert_norms(clipped) == pytest.approx([0.5 * 1e-3] * 2, rel=1e-3)
    for index, (size, whole) in enumerate(zip(expert_norms(clipped), expert_norms(free), strict=True)):
        for name in free:  # only the length changes
            assert torch.allclose(clipped[name][index] / size, free[name][index] / whole, atol=1e-4)


def test_the_first_step_has_the_schedules_first_rate(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(1, rank=2)), ["to_q"])
    settings = FosterSettings("independent", 2, {"n1": [0.5]}, {"n1": [7]}, caption_dropout=0, seed=5)
    stage = foster(mixture, settings)[0]
    optimiser = OptimiserSettings("SGD", {}, "linear", 3)
    loop = LoopSettings(optimiser, logging_steps=1)
    run_stage(Training(stage, mixture, family), random_pictures(6, family), loop, tmp_path, {})
    peer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = get_scheduler("linear", peer, num_warmup_steps=3, num_training_steps=7)
    expected = []
    for _ in range(7):
        expected.append(peer.param_groups[0]["lr"])
        peer.step()
        schedule.step()
    logged = [record["learning_rate"] for record in read_log(tmp_path) if "learning_rate" in record]
    assert logged == pytest.approx(expected)
    assert expected[0] == 0.0
    assert expected[3] == 0.5


def test_maps_and_tables_of_routers_have_their_own_rates(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(4, 1, rank=2)), ["to_q"])
    for layer in mixture.layers.values():
        for stack in layer.experts.values():
            nn.init.normal_(stack.B, std=0.1)
    stage = assemble(mixture, AssembleSettings(RouterRates(1e-3, 0.25), 1, 4, 0.0, 5))
    sign = OptimiserSettings(
        "AdamW", {"weight_decay": 0.0, "eps": 1e-30}, max_grad_norm=None
    )  # steps of the rate itself
    run_stage(Training(stage, mixture, family), random_pictures(6, family), LoopSettings(sign), tmp_path, {})
    for layer in mixture.layers.values():
        assert layer.router is not None
        for parameter, rate in ((layer.router.F, 1e-3), (layer.router.bias, 1e-3), (layer.router.E, 0.25)):
            assert parameter is not None
            assert parameter.detach().abs().max().item() == pytest.approx(rate, rel=1e-3)


def test_routers_of_text_encoders_may_have_their_own_rates(family: StableDiffusion) -> None:
    networks = {"unet": family.denoiser, **family.text_encoders}
    targets = {"unet": ["to_q"], "text_encoder": ["q_proj"]}
    mixture = Mixture.attach(networks, MixtureSpec(scales(4, 1, rank=2)), targets)
    settings = AssembleSettings(
        RouterRates(1e-3, 0.05, NetworkRates({"text_encoder": 0.5}, {"text_encoder": 1e-4})), 9, 4, 0.0, 5
    )
    found = {g.name: (g.learning_rate, g.weight_decay, len(g.leaves)) for g in assemble(mixture, settings).param_groups}
    unet, text = (len(mixture.layers_of(name)) for name in ("unet", "text_encoder"))
    assert found == {
        "router.F.unet": (1e-3, None, 2 * unet),
        "router.E.unet": (0.05, None, unet),
        "router.F.text_encoder": (5e-4, 1e-4, 2 * text),
        "router.E.text_encoder": (0.025, 1e-4, text),
    }


# Samples


def test_strata_have_random_numbers_of_their_own(family: StableDiffusion) -> None:
    plan = BatchPlan(3, "stage", Partition.uniform(4), 64, 0.5)
    batch = plan.draw(random_pictures(50, family), family, 7)
    quarters = [slice(64 * i, 64 * (i + 1)) for i in range(4)]
    for values in (batch.t % 250, batch.noise.flatten(1)[:, 0], batch.dropped.long(), batch.indices):
        drawn = [tuple(values[quarter].tolist()) for quarter in quarters]
        assert len(set(drawn)) == 4


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_captions_are_dropped_as_often_as_asked_and_the_empty_one_is_given(
    share: float, family: StableDiffusion
) -> None:
    pictures = random_pictures(6, family)
    batch = BatchPlan(3, "stage", Partition.uniform(1), 4000, share).draw(pictures, family, 0)
    assert batch.dropped.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    given = batch.samples(pictures, family).conditioning["encoder_hidden_states"]
    features = pictures.features["encoder_hidden_states"]
    rows = torch.where(batch.dropped, len(pictures.captions), pictures.caption_rows[batch.indices])
    assert torch.equal(given, features[rows])


# Averages


@pytest.mark.parametrize(("step", "warm"), [(1, 2 / 11), (2, 3 / 12), (9, 10 / 19), (90, 0.9), (10**6, 0.9)])
def test_early_averages_forget_as_fast_as_the_formula(step: int, warm: float) -> None:
    assert ema_decay_at(step, 0.9, warmup=True) == pytest.approx(warm)
    assert ema_decay_at(step, 0.9, warmup=False) == 0.9


def test_an_average_is_that_of_the_formula() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = MovingAverage({"p": parameter}, 0.9)
    expected = 0.0
    for step in range(1, 6):
        parameter.data.fill_(step)
        average.update(step)
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * step
    assert average.averages["p"].item() == pytest.approx(expected)


# Stages that build on others


def test_finer_experts_begin_as_the_coarser_ones_that_own_their_timesteps(family: StableDiffusion) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(6, 3, rank=2)), ["to_q"])
    for layer in mixture.layers.values():
        for number, stack in enumerate(layer.experts.values()):
            for index in range(len(stack.A)):
                stack.A.data[index], stack.B.data[index] = 10 * number + index, -10 * number - index
    numbers = {"n6": [1] * 6, "n3": [1] * 3}
    stages = foster(mixture, FosterSettings("coarse_to_fine", 2, numbers, numbers, caption_dropout=0, seed=5))
    stages[1].prepare()
    for layer in mixture.layers.values():
        fine: Any = layer.experts["n6"]
        assert fine.A[:, 0, 0].tolist() == [10, 10, 11, 11, 12, 12]
        assert fine.B[:, 0, 0].tolist() == [-10, -10, -11, -11, -12, -12]


# Distillation


def test_the_discriminator_learns_to_tell_real_from_generated() -> None:
    generated, real = torch.tensor([0.3, -2.0]), torch.tensor([1.5, 0.1])
    expected = np.log1p(np.exp(generated.numpy())) + np.log1p(np.exp(-real.numpy()))
    assert discriminator_loss(generated, real).numpy() == pytest.approx(expected, rel=1e-6)
    assert discriminator_loss(torch.tensor([-9.0]), torch.tensor([9.0])).item() < 1e-3  # it is right
    assert discriminator_loss(torch.tensor([9.0]), torch.tensor([-9.0])).item() > 17
    assert generator_adversarial_loss(torch.tensor([9.0])).item() < 1e-3  # x passes for real


def test_the_second_phase_goes_on_with_the_fake_score_of_the_first(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(2, rank=2)), ["to_q"])
    numbers = {"n2": [2, 2]}
    first = PhaseSettings(numbers, {"n2": [1e-2, 1e-2]}, 1e-2, 2)
    second = PhaseSettings(numbers, {"n2": [1e-2, 1e-2]}, 1e-2, 2, Adversary())
    settings = DistillSettings((749, 249), "real", 1.0, 1, {"": first, "-gan": second}, 0.0, (8, 8), 5)
    stages = {item.stage.name: item for item in distill(mixture, family, settings)}
    begun, after = stages["distill-n2.1"], stages["distill-n2.1-gan"]
    run_stage(begun, random_pictures(4, family), LoopSettings(OptimiserSettings("SGD", {})), tmp_path, {})
    fake = after.trainee.fake
    assert fake is begun.trainee.fake
    learned = [parameter.detach().clone() for parameter in fake.parameters()]
    base = dict(family.denoiser.named_parameters())
    assert any(not torch.equal(value, base[name]) for name, value in fake.named_parameters())
    after.stage.prepare()
    assert all(map(torch.equal, learned, fake.parameters()))
    stages["distill-n2.0"].stage.prepare()  # another expert's begins anew
    assert all(torch.equal(value, base[name]) for name, value in fake.named_parameters())


# Text encoders


@pytest.mark.parametrize("order", [(1, 4), (4, 1), (2, 4, 3)])
def test_prompts_are_encoded_anew_where_any_scale_changes_hands(
    order: tuple[int, ...], pipeline: StableDiffusionPipeline
) -> None:
    core, *contexts = (Scale(f"n{n}", Partition.uniform(n), 2, 2.0) for n in order)
    spec = MixtureSpec((core, *(replace(scale, gated=True, base_gate=1.0) for scale in contexts)))
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    mixture = randomise(Mixture.attach(networks, spec, {"unet": ["to_q"], "text_encoder": ["q_proj"]}))
    mixture.mode = "switch"
    pipeline.set_progress_bar_config(disable=True)
    with reencoding(pipeline, mixture, "interval") as reencoder:
        assert reencoder is not None
        pipeline("a star", height=16, width=16, num_inference_steps=20, output_type="latent", guidance_scale=1.0)
        timesteps = pipeline.scheduler.timesteps.tolist()
        owners = {tuple(int(t * n // 1000) for n in order) for t in timesteps}
        assert reencoder.num_text_passes == 1 + len(owners)  # once without experts


# Searching


def test_the_trust_region_shrinks_after_steps_that_disappoint() -> None:
    def loss(weights: tuple[float, ...]) -> float:  # a narrow bent valley: its quadratic promises too much
        x, y = weights
        return (1 - x) ** 2 + 100 * (y - x * x) ** 2

    history = History(loss)
    search_quadratic(history, 2, QuadraticSettings(refinements=12, tolerance=0.0))
    refined = [point for point in history.evaluated if point.why == "minimiser"]
    best, steps, shrunk = min(point.loss for point in history.evaluated[:6]), [], 0
    centre = min(history.evaluated[:6], key=lambda point: point.loss).weights
    for point in refined:
        steps.append(max(abs(a - b) for a, b in zip(point.weights, centre, strict=True)))
        if point.loss >= best and len(steps) < len(refined):
            following = refined[len(steps)].weights
            after = max(abs(a - b) for a, b in zip(following, centre, strict=True))
            assert after <= steps[-1] / 2 + 1e-9
            shrunk += 1
        if point.loss < best:
            best, centre = point.loss, point.weights
    assert shrunk >= 1


def test_the_search_confirms_on_pictures_that_chose_nothing(family: StableDiffusion, monkeypatch: Any) -> None:
    chosen, unseen = random_pictures(4, family, seed=1), random_pictures(4, family, seed=2)
    met = []
    own = "timestep_experts.evaluation.merges.loss_curve"
    from timestep_experts.evaluation import merges

    curve = merges.loss_curve
    monkeypatch.setattr(own, lambda f, data, settings: (met.append((data, settings.seed)), curve(f, data, settings))[1])
    settings = LossSettings(Partition.uniform(2), 1, 2, 2, seed=11)
    bench = MergeBench(MergeSplit(family, chosen, unseen, settings), lambda _: None)
    row = bench.confirm("found", (1.0,))
    assert [(data is chosen, data is unseen, seed) for data, seed in met] == [(True, False, 11), (False, True, 12)]
    assert row.selection_mean != row.confirmation_mean


# Files


def test_the_oldest_checkpoints_go(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(1, rank=2)), ["to_q"])
    settings = FosterSettings("independent", 2, {"n1": [0.01]}, {"n1": [12]}, caption_dropout=0, seed=5)
    stage = foster(mixture, settings)[0]
    loop = LoopSettings(OptimiserSettings("SGD", {}), checkpointing_steps=1, checkpoints_total_limit=3)
    run_stage(Training(stage, mixture, family), random_pictures(6, family), loop, tmp_path, {})
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    newest = load_file(tmp_path / "checkpoint-11" / "experts.safetensors")
    result = load_file(tmp_path / "result.safetensors")
    assert max((newest[name] - result[name]).abs().max().item() for name in result) > 0


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("training", {"mixed_precision": "bf16"}),
        ("training", {"base_dtype": "bf16"}),
        ("training", {"base_quantization": "torchao-int8"}),
        ("training", {"gradient_accumulation_steps": 2}),
        ("training", {"not_finite": "skip"}),
        ("data", {"caption_dropout": 0.5}),
        ("", {"seed": 9}),
    ],
)
def test_whatever_decides_the_bytes_is_in_the_fingerprint(section: str, change: dict[str, Any]) -> None:
    document: dict[str, Any] = {
        "output_dir": "out",
        "data": {"path": "pictures"},
        "method": {"kind": "foster", "experts": {"scales": [{"intervals": 2}]}},
        "training": {},
    }
    context: Any = type("Context", (), {"base_sha256": "x", "train": type("Pictures", (), {"key": "y"})})
    before = fingerprint(Recipe.model_validate(document), context, {})
    changed = {**document, section: {**document[section], **change}} if section else {**document, **change}
    assert fingerprint(Recipe.model_validate(changed), context, {}) != before
    for other in ("base_sha256",):
        setattr(context, other, "z")
        assert fingerprint(Recipe.model_validate(document), context, {}) != before


# Denoisers that are called with t / 1000


def test_an_ensemble_on_flux_meets_all_of_its_experts(tmp_path: Path) -> None:
    pipeline = flux()
    folders = []
    for index in range(2):
        pipeline.transformer.save_pretrained(tmp_path / str(index))
        folders.append(tmp_path / str(index))
    ensemble = attach_ensemble(pipeline, folders, Partition.uniform(2), "all")
    met: list[int | None] = []
    pipeline.transformer.register_forward_hook(lambda *_: met.append(ensemble.active))
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a star", height=16, width=16, num_inference_steps=4, output_type="latent")
    expected = [int(t >= 500) for t in pipeline.scheduler.timesteps.tolist()]
    assert met == expected
    assert set(expected) == {0, 1}


def test_tiny_networks_differ_by_seed() -> None:
    """The tests above compare networks, which would be worth nothing were they all the same."""
    first, second = (tiny_unet(seed).state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert normal(3, seed=0).tolist() != normal(3, seed=1).tolist()
