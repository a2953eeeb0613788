"""The embedded world: captions say what pictures show, and the judge reads it back."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from timestep_experts.evaluation.fidelity import to_judge_input
from timestep_experts.models import BASE_ASSET, resolve_model
from timestep_experts.world.judge import Reading, Verdict, judge_loss, judge_targets, load_judge, score
from timestep_experts.world.render import DOMAINS, render, shape_distance
from timestep_experts.world.scenes import (
    COLOURS,
    HELD_OUT_ONE_IN,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    SceneObject,
    draw_scenes,
    parse_caption,
)

OBJECTS = st.builds(SceneObject, st.sampled_from(COLOURS), st.sampled_from(TEXTURES), st.sampled_from(SHAPES))
SCENES = st.builds(Scene, OBJECTS, st.sampled_from(RELATIONS), OBJECTS)
STAR, CIRCLE = SceneObject("red", "plain", "star"), SceneObject("blue", "dotted", "circle")


# Captions


@given(SCENES)
def test_a_caption_is_read_back_into_its_scene(scene: Scene) -> None:
    assert parse_caption(scene.caption) == scene
    assert parse_caption(scene.caption).caption == scene.caption


@pytest.mark.parametrize("words", [*COLOURS, *TEXTURES, *SHAPES, *RELATIONS])
def test_every_word_is_read_back(words: str) -> None:
    colour = words if words in COLOURS else "green"
    texture = words if words in TEXTURES else "striped"
    shape = words if words in SHAPES else "cross"
    relation = words if words in RELATIONS else RELATIONS[0]
    scene = Scene(SceneObject(colour, texture, shape), relation, STAR)
    assert words in scene.caption
    assert parse_caption(scene.caption) == scene
    assert parse_caption(Scene(STAR, relation, scene.first).caption).second == scene.first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red plain star",
        "a red plain star near a blue dotted circle",
        "a red plain star above",
        "a red plain star above a blue circle",
        "a pink plain star above a blue dotted circle",
        "a red plain star above a blue furry circle",
        "a red plain star above a blue dotted hexagon",
        "a plain red star above a blue dotted circle",
        "a red plain star above a blue dotted circle at night",
        "a red plain star above a blue dotted circle above a red plain star",
    ],
)
def test_other_texts_are_no_captions(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the embedded world"):
        parse_caption(text)


def test_held_out_captions_are_never_drawn_for_training() -> None:
    sides = [draw_scenes(400, seed=seed, held_out=held_out) for seed, held_out in ((0, False), (0, True), (1, True))]
    train, held_out, more = ({scene.caption for scene in side} for side in sides)
    assert train.isdisjoint(held_out | more)
    assert len(held_out & more) > 50  # the same small pool
    assert all(parse_caption(caption).is_held_out for caption in held_out)


def test_one_caption_in_forty_is_held_out() -> None:
    pairs = product(permutations(COLOURS, 2), permutations(SHAPES, 2), product(TEXTURES, TEXTURES), RELATIONS)
    flags = [
        Scene(SceneObject(c1, t1, s1), relation, SceneObject(c2, t2, s2)).is_held_out
        for (c1, c2), (s1, s2), (t1, t2), relation in pairs
    ]
    assert len(flags) == 30 * 30 * 16 * len(RELATIONS)
    share = 1 / HELD_OUT_ONE_IN
    assert abs(np.mean(flags) - share) < 4 * (share * (1 - share) / len(flags)) ** 0.5


def test_scenes_are_drawn_uniformly_and_differ_in_colour_and_shape() -> None:
    scenes = draw_scenes(3000, seed=2, held_out=False)
    assert all(s.first.colour != s.second.colour and s.first.shape != s.second.shape for s in scenes)
    draws = [
        (COLOURS, [s.first.colour for s in scenes]),
        (SHAPES, [s.second.shape for s in scenes]),
        (TEXTURES, [s.first.texture for s in scenes]),
        (RELATIONS, [s.relation for s in scenes]),
    ]
    for words, drawn in draws:
        share = 1 / len(words)
        for count in Counter(drawn).values():
            assert abs(count / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
        assert set(drawn) == set(words)


def test_drawing_scenes_depends_on_the_seed_alone() -> None:
    scenes = draw_scenes(20, seed=4, held_out=True)
    assert draw_scenes(20, seed=4, held_out=True) == scenes
    assert draw_scenes(5, seed=4, held_out=True) == scenes[:5]
    assert draw_scenes(20, seed=5, held_out=True) != scenes


# Pictures


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_picture_depends_on_its_scene_its_place_and_the_seed(domain: str) -> None:
    scenes = draw_scenes(6, seed=1, held_out=False)
    pictures = render(scenes, domain, seed=8)
    assert (pictures.shape, pictures.dtype) == ((6, 64, 64, 3), np.uint8)
    assert np.array_equal(render(scenes, domain, seed=8), pictures)
    assert np.array_equal(render(scenes[:3], domain, seed=8), pictures[:3])
    others = [*draw_scenes(5, seed=9, held_out=True), scenes[5]]
    assert np.array_equal(render(others, domain, seed=8)[5], pictures[5])
    assert not np.array_equal(render(scenes, domain, seed=9), pictures)
    twice = render([scenes[0], scenes[0]], domain, seed=8)
    assert not np.array_equal(twice[0], twice[1])  # another place in the list, other sizes and places


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_picture_is_the_same_scene_at_every_resolution(domain: str) -> None:
    scenes = draw_scenes(8, seed=1, held_out=False)
    small, large = (render(scenes, domain, seed=0, resolution=size) for size in (64, 128))
    halved = large.reshape(8, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - small).mean() < 4  # of 255; edges are ramps of one pixel


def test_domains_look_different_and_unknown_ones_are_refused() -> None:
    scenes = draw_scenes(3, seed=0, held_out=False)
    flat, neon = (render(scenes, domain, seed=0) for domain in DOMAINS)
    assert flat.mean() > 150 > 100 > neon.mean()
    with pytest.raises(ValueError, match="unknown domain 'oil': allowed are flat, neon"):
        render(scenes, "oil", seed=0)
    assert render([], "flat", seed=0, resolution=32).shape == (0, 32, 32, 3)


def test_shapes_stay_inside_the_frame_but_for_a_tip() -> None:
    pictures = render(draw_scenes(300, seed=5, held_out=False), "flat", seed=6)
    border = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, 1:-1, 0], pictures[:, 1:-1, -1]], 1)
    paper = pictures[0, 0, 0]
    touched = (border != paper).any(-1).sum(1)
    assert touched.max() <= 3  # of 252 pixels: the tip of a star or a diamond
    assert (touched > 0).mean() < 0.2


def test_a_flat_object_has_its_colour_and_place() -> None:
    scene = Scene(STAR, "left of", SceneObject("green", "plain", "square"))
    picture = render([scene], "flat", seed=0)[0].astype(int)
    left, right = picture[:, :32], picture[:, 32:]
    red = (left[..., 0] > 180) & (left[..., 1] < 80)
    green = (right[..., 1] > 130) & (right[..., 0] < 80)
    assert red.sum() > 100
    assert green.sum() > 300
    assert not ((right[..., 0] > 180) & (right[..., 1] < 80)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_signed_distances_around_a_centred_shape(shape: str) -> None:
    axis = np.linspace(-1.6, 1.6, 161, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = shape_distance(shape, x, y)
    assert distance[80, 80] < -0.2
    assert (distance[np.hypot(x, y) > 1.45] > 0).all()
    inside = distance < 0
    assert 1 < inside.sum() * 0.02**2 < 3  # a unit circle has 3.14
    assert abs(np.diff(distance, axis=0)).max() <= 0.02 * 1.001  # nowhere steeper than a distance
    assert np.abs(distance - distance[:, ::-1]).max() < 1e-5  # left and right alike


# The judge


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_judge_reads_held_out_scenes(domain: str) -> None:
    scenes = draw_scenes(400, seed=77, held_out=True)
    judge = load_judge()
    assert not judge.training
    pictures = to_judge_input(render(scenes, domain, seed=78))
    readings = judge.read(pictures)
    for name in ("colour", "texture", "shape"):
        pairs = [
            (getattr(read, name), getattr(shown, name))
            for reading, scene in zip(readings, scenes, strict=True)
            for read, shown in zip((reading.first, reading.second), scene.in_reading_order(), strict=True)
        ]
        assert np.mean([read == shown for read, shown in pairs]) >= 0.99, name
    right = [r.is_horizontal == s.is_horizontal for r, s in zip(readings, scenes, strict=True)]
    assert np.mean(right) >= 0.99
    verdicts = [score(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    assert np.mean([verdict == Verdict(1, 1, 1, 1) for verdict in verdicts]) >= 0.97
    with torch.no_grad():
        assert judge_loss(judge(pictures[:50]), judge_targets(scenes[:50])) < 0.1


def test_targets_name_both_objects_in_reading_order() -> None:
    scene = Scene(STAR, "left of", CIRCLE)
    assert judge_targets([scene]).tolist() == [[0, 0, 4, 4, 2, 0, 1]]
    assert judge_targets([Scene(STAR, "above", CIRCLE)]).tolist() == [[0, 0, 4, 4, 2, 0, 0]]


def test_a_blank_picture_earns_no_more_than_chance() -> None:
    blank = np.array(Image.new("RGB", (64, 64), "grey"))[None].repeat(2, 0)
    reading = load_judge().read(to_judge_input(blank))[0]
    scenes = draw_scenes(400, seed=3, held_out=False)
    earned = [score(reading, scene) for scene in scenes]
    assert np.mean([verdict.colour for verdict in earned]) < 0.5
    assert np.mean([verdict.relation for verdict in earned]) < 0.5


WANTED = Scene(STAR, "left of", CIRCLE)
STRANGER, OTHER = SceneObject("green", "striped", "cross"), SceneObject("purple", "checkered", "square")


@pytest.mark.parametrize(
    ("reading", "verdict"),
    [
        pytest.param(Reading(STAR, CIRCLE, True), (1, 1, 1, 1), id="all right"),
        pytest.param(Reading(CIRCLE, STAR, True), (1, 1, 1, 0), id="swapped objects"),
        pytest.param(Reading(STAR, CIRCLE, False), (1, 1, 1, 0), id="wrong direction"),
        pytest.param(Reading(CIRCLE, STAR, False), (1, 1, 1, 0), id="swapped and wrong direction"),
        pytest.param(Reading(STRANGER, OTHER, True), (0, 0, 0, 0), id="all wrong"),
        pytest.param(Reading(STAR, STAR, True), (0.5, 0.5, 0.5, 0), id="the same twice is a tie"),
        pytest.param(Reading(STAR, OTHER, True), (0.5, 0.5, 0.5, 1), id="one object"),
        pytest.param(Reading(OTHER, STAR, True), (0.5, 0.5, 0.5, 0), id="one object on the wrong side"),
        pytest.param(Reading(SceneObject("green", "plain", "star"), CIRCLE, True), (0.5, 1, 1, 1), id="a colour"),
        pytest.param(Reading(STAR, SceneObject("blue", "dotted", "square"), True), (1, 0.5, 1, 1), id="a shape"),
        pytest.param(
            # red and blue read in place, star and circle swapped with their textures: four against two
            Reading(SceneObject("red", "dotted", "circle"), SceneObject("blue", "plain", "star"), True),
            (0, 1, 1, 0),
            id="colours leak",
        ),
        pytest.param(
            Reading(SceneObject("red", "striped", "circle"), SceneObject("purple", "checkered", "square"), True),
            (0.5, 0, 0, 0),
            id="one against one is a tie",
        ),
    ],
)
def test_a_reading_is_held_against_the_caption(reading: Reading, verdict: tuple[float, ...]) -> None:
    assert score(reading, WANTED) == Verdict(*verdict)


@given(SCENES, SCENES, st.booleans())
def test_scores_lie_between_0_and_1_and_are_1_for_the_truth(scene: Scene, read: Scene, horizontal: bool) -> None:
    verdict = score(Reading(read.first, read.second, horizontal), scene)
    assert all(0 <= value <= 1 for value in vars(verdict).values())
    truth = score(Reading(*scene.in_reading_order(), scene.is_horizontal), scene)
    told_apart = scene.first != scene.second
    assert truth == Verdict(1, 1, 1, float(told_apart))


def test_the_shipped_base_draws_by_itself_as_the_readme_loads_it() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_model(BASE_ASSET))
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a red star", num_inference_steps=2, output_type="np").images
    assert np.isfinite(pictures).all()
