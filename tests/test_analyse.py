"""What is said of timesteps and experts: gradients, their projection, task vectors, and cuts that a recipe takes."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import max_error, normal, random_pictures, tiny_pipeline
from test_cli import call, refused
from test_search import Case, case, near  # noqa: F401 - a fixture
from timestep_experts.config import load_recipe
from timestep_experts.evaluation.gradients import GradientSettings, add_to_sketch, measure_gradients
from timestep_experts.evaluation.merges import MergeLosses
from timestep_experts.intervals import Interval, Partition
from timestep_experts.jobs.measuring import measured_base
from timestep_experts.merging import Evaluated
from timestep_experts.models import StableDiffusion
from timestep_experts.objectives import squared_error
from timestep_experts.report.search_figures import loss_landscape, range_losses, similarity_map, task_vector_map
from timestep_experts.training.batches import generator_for
from timestep_experts.weights.analyse import analyse, as_yaml, block_of, propose

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

EXACT = GradientSettings(num_timesteps=3, num_pictures=4, batch_size=3, sketch_size=None)


def test_gradients_are_those_of_the_mean_loss(family: StableDiffusion) -> None:
    pictures = random_pictures(4, family)
    found = measure_gradients(family, pictures, EXACT)
    assert found.t == (166.0, 500.0, 833.0)
    assert found.sketches.shape == (3, found.num_parameters)
    assert not any(p.requires_grad or p.grad is not None for p in family.denoiser.parameters())
    one_batch = measure_gradients(family, pictures, GradientSettings(3, 4, 100, None))
    assert max_error(one_batch.sketches, found.sketches) < 1e-5
    for norm, sketch in zip(found.norms, found.sketches, strict=True):
        assert norm == pytest.approx(float(sketch.norm()), rel=1e-5)
    # once more by hand, at the last t: random numbers are drawn in the order that the function says
    generator = generator_for(0, "gradients")
    rows = torch.randperm(4, generator=generator)
    noise = torch.randn(4, *pictures.latents.shape[1:], generator=generator)
    t = torch.full((4,), 833)
    latents = pictures.latents[rows]
    family.denoiser.requires_grad_(True)
    predicted = family.predict(family.noise.add_noise(latents, noise, t), t, pictures.features_at(family, rows, t))
    loss = squared_error(predicted, noise).mean()
    gradients = torch.autograd.grad(loss, list(family.denoiser.parameters()), allow_unused=True)
    pairs = zip(family.denoiser.parameters(), gradients, strict=True)
    flat = torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in pairs])
    family.denoiser.requires_grad_(False)
    assert max_error(flat, found.sketches[2]) < 1e-5
    assert found.losses[2] == pytest.approx(loss.item(), rel=1e-5)


def test_a_projection_keeps_cosines(family: StableDiffusion) -> None:
    pictures = random_pictures(4, family)
    exact = measure_gradients(family, pictures, EXACT).similarity()
    sketched = measure_gradients(family, pictures, GradientSettings(3, 4, 3, 2**14))
    assert sketched.sketches.shape == (3, 2**14)
    assert max_error(sketched.similarity(), exact) < 0.03  # four times 1 / sqrt(m)
    assert torch.equal(sketched.similarity().diagonal(), torch.ones(3, dtype=torch.double))


def test_a_sketch_is_linear_and_unbiased() -> None:
    a, b = normal(500, seed=1), normal(500, seed=2) + 0.5 * normal(500, seed=1)

    def sketch(values: torch.Tensor, seed: int, size: int = 64) -> torch.Tensor:
        made = torch.zeros(size)
        add_to_sketch(made, values, torch.Generator().manual_seed(seed))
        return made

    assert max_error(sketch(2 * a - b, 0), 2 * sketch(a, 0) - sketch(b, 0)) < 1e-4
    products = torch.stack([sketch(a, seed) @ sketch(b, seed) for seed in range(400)])
    assert abs(products.mean() - a @ b) < 4 * products.std() / 20


def test_chosen_parameters_alone_are_used(family: StableDiffusion) -> None:
    settings = GradientSettings(2, 2, 2, None, r"mid_block\..*")
    found = measure_gradients(family, random_pictures(2, family), settings)
    own = sum(p.numel() for n, p in family.denoiser.named_parameters() if n.startswith("mid_block."))
    assert found.num_parameters == own
    with pytest.raises(ValueError, match=r"parameters: 'nothing' matches none; it must match a whole name, such as"):
        measure_gradients(family, random_pictures(2, family), GradientSettings(parameters="nothing"))
    with pytest.raises(ValueError, match="is no regular expression"):
        GradientSettings(parameters="(")
    with pytest.raises(ValueError, match="the timesteps must be at least 1; got 0"):
        GradientSettings(num_timesteps=0)


def test_gradients_without_a_direction_are_refused(family: StableDiffusion) -> None:
    family.denoiser.conv_out.weight.data.fill_(math.nan)
    found = measure_gradients(family, random_pictures(2, family), GradientSettings(2, 2, 2))
    with pytest.raises(ValueError, match="the gradient at t = 250 is zero or not finite"):
        found.similarity()


def test_proposals_are_accepted_by_a_recipe(tmp_path: Path) -> None:
    similarity = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3), torch.ones(6, 6))
    proposals = propose(similarity, Partition.uniform(10).intervals, 8)
    assert [len(p.boundaries) - 1 for p in proposals] == list(range(2, 9))
    assert proposals[1].boundaries == (0, 100, 400, 1000)
    assert proposals[1].cost == 0 < proposals[1].uniform_cost
    assert all(p.cost <= p.uniform_cost + 1e-9 for p in proposals)
    scale = yaml.safe_load(as_yaml(proposals[1]))
    method = {"kind": "foster", "experts": {"scales": [scale]}}
    document = {"output_dir": "x", "data": {"path": "world/neon"}, "method": method}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.method.experts.scales[0].boundaries == (0, 100, 400, 1000)


def test_an_analysis_is_written_whole(case: Case) -> None:  # noqa: F811
    recipe = load_recipe(case.folder / "recipe.yaml")
    output = case.folder / "analysis"
    found = analyse(measured_base(recipe), case.experts, output, GradientSettings(4, 4, 4, 512), 2)
    assert sorted(p.name for p in output.iterdir()) == ["analysis.json", "similarity.png", "task_vectors.png"]
    document = json.loads((output / "analysis.json").read_text())
    assert list(document["proposals"]) == ["2", "3", "4"]
    vectors = found.task_vectors
    assert vectors is not None
    base = tiny_pipeline().unet.state_dict()
    expert = load_file(case.experts[0] / "diffusion_pytorch_model.safetensors")
    middle = [name for name in base if name.startswith("mid_block.")]
    moved = torch.cat([(expert[name] - base[name]).flatten() for name in middle]).norm()
    own = torch.cat([base[name].flatten() for name in middle]).norm()
    assert vectors.norms[0, vectors.blocks.index("mid_block")] == pytest.approx(float(moved / own), rel=1e-5)
    flats = [
        torch.cat([(near(tiny_pipeline().unet, seed).state_dict()[n] - base[n]).flatten() for n in base]).double()
        for seed in (1, 2)
    ]
    cosine = float(flats[0] @ flats[1] / flats[0].norm() / flats[1].norm())
    assert vectors.cosines[0, 1] == pytest.approx(cosine, abs=1e-5)


def test_blocks_are_named_as_in_the_network() -> None:
    assert block_of("down_blocks.1.resnets.0.conv1.weight") == "down_blocks.1"
    assert block_of("mid_block.resnets.0.conv1.weight") == "mid_block"
    assert block_of("pos_embed") == "pos_embed"


def test_the_command_prints_boundaries_to_paste(case: Case) -> None:  # noqa: F811
    output = case.folder / "analysis"
    arguments = ["--timesteps", 4, "--pictures", 2, "--sketch", 0, "--intervals", 2, "--output", output]
    outcome = call("analyse", case.folder / "recipe.yaml", *arguments)
    assert outcome.code == 0, outcome.err
    assert "boundaries: [0, 250, 500, 750, 1000]" in outcome.out
    assert not (output / "task_vectors.png").exists()
    assert "analysis exists already" in refused("analyse", case.folder / "recipe.yaml", *arguments)
    arguments[-1], arguments[7] = case.folder / "other", 9
    text = refused("analyse", case.folder / "recipe.yaml", *arguments)
    assert "4 timesteps can be shown cut into 2 to 4 intervals; got 9" in text
    assert not (case.folder / "other").exists()


# Figures


def rows(num_ranges: int) -> list[MergeLosses]:
    names = ["base", "expert 0", "uniform", "found"]
    losses = [tuple(1 + 0.1 * i * r for r in range(num_ranges)) for i in range(len(names))]
    return [MergeLosses(n, (0.0,), row, row, sum(row), sum(row)) for n, row in zip(names, losses, strict=True)]


@pytest.mark.parametrize("num_weights", [1, 2, 3])
@pytest.mark.parametrize("num_points", [1, 12])
def test_landscapes_show_every_measured_point(num_weights: int, num_points: int) -> None:
    weights = normal(num_points, num_weights).tolist()
    points = [Evaluated(tuple(w), sum(x * x for x in w), "x") for w in weights]
    points.append(Evaluated((0.5,) * num_weights, math.nan, "x"))
    figure = loss_landscape(points, [f"w{i}" for i in range(num_weights)])
    axes = figure.axes[0]
    shown = sum(len(c.get_offsets()) for c in axes.collections if hasattr(c, "get_sizes") and len(c.get_offsets()))
    assert shown >= num_points + 1  # every point of a finite loss, and the ring around the best
    figure.draw_without_rendering()


def test_bars_are_the_ratios_to_the_base() -> None:
    ranges = [Interval(lo, hi) for lo, hi in pairwise((0, 250, 500, 1000))]
    figure = range_losses(rows(3), ranges)
    heights = [bar.get_height() for bar in figure.axes[0].containers[-1]]
    assert heights == pytest.approx([0, 30, 60, 30])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [
        "[0, 250)", "[250, 500)", "[500, 1000)", "all t",
    ]  # fmt: skip


def test_maps_show_their_matrices() -> None:
    bins = Partition.uniform(4).intervals
    figure = similarity_map(np.eye(4), bins, Partition.uniform(2).intervals)
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.eye(4))
    assert len(figure.axes[0].lines) == 4  # each interval outlined twice, for contrast
    figure = task_vector_map(np.asarray([[0.1, 0.25]]), ["expert 0"], ["a", "b"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["10", "25"]
