"""The memory of a training step, foreseen on fake tensors, against the memory of real ones, for every family."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PIPELINES, VARIANTS
from tiny_video import tiny_video_crafter, tiny_wan
from torch.nn import functional

from timestep_experts.config import load_recipe
from timestep_experts.intervals import Partition
from timestep_experts.jobs.methods import method_of
from timestep_experts.jobs.plan import Memory, planned_device
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import load_family, read_meta_model
from timestep_experts.models.video_crafter import fold_fps
from timestep_experts.training import AssembleSettings, FosterSettings, RouterRates, assemble, foster
from timestep_experts.training.batches import Batch
from timestep_experts.training.memory import (
    PeakMeter,
    autocast_of_accelerators,
    fake_networks,
    fake_pictures,
    step_peak,
)
from timestep_experts.training.stage import Stage, Training, gradients_of

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[2] / "recipes" / "papers" / "sd15.yaml"
SPEC = MixtureSpec((Scale("n2", Partition.uniform(2), 2, 2), Scale("n1", Partition.uniform(1), 2, 2, gated=True)))
TARGETS = ("to_q", "to_k", "to_v")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    # autocast on a CPU gives fp32 norms bf16 inputs
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


def video_crafter() -> Any:
    pipeline = tiny_video_crafter()
    pipeline.register_modules(unet=fold_fps(pipeline.unet, 28.0))
    return pipeline


TOLERANCE = 0.1  # some kernels of the CPU make copies inside, which no fake tensor shows
FAMILIES: dict[str, Callable[[], Any]] = {
    **PIPELINES,
    "sd3 without t5": VARIANTS["sd3 without t5"],
    "wan": tiny_wan,
    "wan 2.2": lambda: tiny_wan(0.875),
}
EVERY = [*FAMILIES, pytest.param("video crafter", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Attention on a CPU takes a buffer for each thread, which no fake tensor shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    def save(name: str) -> str:
        folder = tmp_path_factory.getbasetemp() / "bases" / name.replace(" ", "-")
        if not folder.exists():
            (video_crafter if name == "video crafter" else FAMILIES[name])().save_pretrained(folder)
        return str(folder)

    return save


def make_stage(mixture: Mixture, *, is_second: bool = False) -> Stage:
    if is_second:
        return assemble(mixture, AssembleSettings(RouterRates(1e-4, 1e-4), 1, 4, 0.0, 0))
    numbers = {scale.name: [1] * len(scale.partition) for scale in SPEC.scales}
    return foster(mixture, FosterSettings("joint", 2, numbers, numbers, 0.0, 0))[0]


def foreseen(source: str, *, checkpoints: bool, precision: str = "no", parts: int = 1, **options: bool) -> int:
    meta_model = read_meta_model(source)
    mixture = Mixture.attach(meta_model.denoisers, SPEC, TARGETS)
    family = meta_model.make_family(with_second_denoiser=False)
    if checkpoints:
        family.checkpoint_gradients()
    with fake_networks([*meta_model.networks.values(), *mixture.trained_modules()]):
        pictures = fake_pictures(family, (3, *((5,) if family.is_video else ()), 32, 32), as_tokens=False)
        stage = make_stage(mixture, is_second=options.get("is_second", False))
        accelerator = options.get("on_accelerator", False)
        training = Training(stage, mixture, family)
        return step_peak(training, pictures, parts, precision, on_accelerator=accelerator)


def taken(source: str, *, checkpoints: bool, precision: str = "no", parts: int = 1, is_second: bool = False) -> int:
    """The same step with real tensors, as PyTorch's profiler counts it."""
    family = load_family(source, CPU)
    if checkpoints:
        family.checkpoint_gradients()
    mixture = Mixture.attach(family.denoisers, SPEC, TARGETS)
    stage = make_stage(mixture, is_second=is_second)
    pictures = fake_pictures(family, (3, *((5,) if family.is_video else ()), 32, 32), as_tokens=False)
    rows = torch.zeros(4 // parts, dtype=torch.long)
    t = torch.full((4 // parts,), 950) if family.noise.has_integer_timesteps else torch.full((4 // parts,), 950.0)
    chunk = Batch(rows, t, torch.zeros(4 // parts, *pictures.latents.shape[1:]), rows.bool())
    stage.set_mode()
    with gradients_of(Training(stage, mixture, family)):
        for _ in range(2):  # the first one fills caches
            for parameter in stage.parameters():
                parameter.grad = torch.zeros_like(parameter) if parts > 1 else None
            with torch.profiler.profile(profile_memory=True) as profile:
                stage.objective.backward(0, family, pictures, chunk, precision)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held) + (sum(p.nbytes for p in stage.parameters()) if parts > 1 else 0)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", EVERY)
def test_what_is_foreseen_is_what_a_real_step_takes(name: str, checkpoints: bool, saved: Callable[[str], str]) -> None:
    expected = taken(saved(name), checkpoints=checkpoints)
    assert foreseen(saved(name), checkpoints=checkpoints) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16"}, {"precision": "bf16", "checkpoints": True}, {"parts": 2}, {"is_second": True}],
    ids=str,
)
@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_precision_micro_batches_and_stages_are_foreseen(
    name: str, options: dict[str, Any], saved: Callable[[str], str]
) -> None:
    options = {"checkpoints": False} | options
    assert foreseen(saved(name), **options) == pytest.approx(taken(saved(name), **options), rel=TOLERANCE)


def test_norms_in_fp32_take_more(saved: Callable[[str], str]) -> None:
    own = functional.group_norm
    on_cpu, on_gpu = (
        foreseen(saved("sd"), checkpoints=False, precision="bf16", on_accelerator=value) for value in (False, True)
    )
    assert on_cpu < on_gpu < foreseen(saved("sd"), checkpoints=False)
    with autocast_of_accelerators(), torch.autocast("cpu", torch.bfloat16):
        assert functional.group_norm(torch.ones(1, 4, 2, dtype=torch.bfloat16), 2).dtype == torch.float32
    assert functional.group_norm is own


def test_the_meter_counts_what_lives_and_no_views() -> None:
    before = torch.zeros(100)
    with PeakMeter([before]) as meter:
        first = torch.zeros(1000)
        view = first[:500].view(5, 100)
        view += before[None]
        assert meter.current == meter.peak == 4000
        second = first + 1
        assert meter.current == meter.peak == 8000
        gone = weakref.ref(second.untyped_storage())
        del second
        assert gone() is None
        assert (meter.current, meter.peak) == (4000, 8000)
        (before[:50], first.sum())
        assert meter.peak == 8000


def test_attention_keeps_no_matrix_of_all_pairs(saved: Callable[[str], str]) -> None:
    few, many = (plan(saved("sd"), f"resolution={side}")[0].activations for side in (32, 128))
    assert many < 18 * few  # 16 times the positions; pairs would be 256 times


def plan(source: str, *overrides: str) -> list[Memory]:
    """Memory of the one stage of a recipe on a tiny base."""
    fixed = [f"pretrained_model_name_or_path={source}", "resolution=16", "method.experts.target_modules=[to_q]"]
    fixed += ["method.experts.scales=[{intervals: 2, rank: 2}]", "method.assemble=null", "method.train_batch_size=4"]
    quick = ["method.experts.text_target_modules=null", "training.gradient_accumulation_steps=1", "device=cpu"]
    recipe = load_recipe(RECIPE, [*fixed, *quick, *overrides])
    stages = method_of(recipe, recipe.variant("main")).plan(with_memory=True)
    return [stage.memory for stage in stages if stage.memory is not None]


def test_nothing_is_allocated_however_large_the_step(saved: Callable[[str], str]) -> None:
    assert plan(saved("sd"), "resolution=4096", "method.train_batch_size=512")[0].peak > 2**40


def test_every_part_of_a_plan_follows_the_recipe(saved: Callable[[str], str]) -> None:
    source = saved("pixart")
    family = load_family(source, CPU)
    sizes = {
        name: sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
        for name, part in {**family.denoisers, **family.text_encoders, "vae": family.parts.vae}.items()
    }
    plain = plan(source)
    assert [memory.base for memory in plain] == [sum(sizes.values())]
    assert plan(source, "device=cuda")[0].base == sizes["transformer"]  # encoders are away
    assert plan(source, "device=cuda", "training.offload_encoders=false")[0].base == sum(sizes.values())
    needed = plan(source, "device=cuda", "method.experts.text_target_modules=[q]")[0]
    assert needed.base == sizes["transformer"] + sizes["text_encoder"]
    assert plan(source, "training.base_dtype=bf16")[0].base < 0.6 * plain[0].base
    few, fewer = (
        plan(source, f"training.base_quantization={kind}")[0] for kind in ("torchao-int8", "bitsandbytes-4bit")
    )
    assert fewer.base < few.base < plain[0].base
    assert plain[0].peak == plain[0].base + plain[0].experts + plain[0].activations


@pytest.mark.parametrize(("options", "bytes_per_value"), [("{name: SGD, options: {}}", 8), ("{name: AdamW}", 16)])
def test_trained_experts_are_counted_with_gradients_and_optimiser_state(
    options: str, bytes_per_value: int, saved: Callable[[str], str]
) -> None:
    overrides = [
        f"method.optimizer={options}",
        "method.experts.scales=[{intervals: 4, rank: 2}]",
        "method.assemble=null",
    ]
    recipe = load_recipe(RECIPE, [f"pretrained_model_name_or_path={saved('sd')}", "resolution=16", *overrides])
    [stage] = method_of(recipe, recipe.variant("main")).plan(with_memory=True)
    leaves = 4 * 2 * 40  # experts, A and B, at most so many layers: AdamW counts steps in four bytes
    assert stage.memory is not None
    assert 0 <= stage.memory.experts - bytes_per_value * stage.trainable <= 4 * leaves


def test_the_planned_device_need_not_be_there() -> None:
    assert planned_device(load_recipe(RECIPE, ["device=cuda:1"])) == "cuda"
    assert planned_device(load_recipe(RECIPE, [])) == ("cuda" if torch.cuda.is_available() else "cpu")
