"""The vocabulary of the embedded world: captioned scenes of two objects, and how they are drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from timestep_experts.errors import UserError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
RELATIONS = ("left of", "above")
HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class SceneObject:
    """One object: a colour, a texture and a shape, each a word of the vocabulary."""

    colour: str
    texture: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.texture} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two objects that differ in colour and in shape, and the place of the first relative to the second.

    Captions name the objects in reading order. Relations that turn it round ("right of", "below") are left out: a
    causal text encoder as small as the shipped one needs far longer to learn which object they put where.
    """

    first: SceneObject
    relation: str
    second: SceneObject

    @property
    def caption(self) -> str:
        """The sentence that says everything the picture shows, e.g. ``a red plain star above a blue dotted circle``."""
        return f"{self.first} {self.relation} {self.second}"

    @property
    def is_held_out(self) -> bool:
        """Whether the scene belongs to the captions that nothing is ever trained on (one in 40, by hash)."""
        digest = hashlib.sha256(self.caption.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0

    @property
    def is_horizontal(self) -> bool:
        """Whether the objects stand side by side rather than one over the other."""
        return self.relation == "left of"

    def in_reading_order(self) -> tuple[SceneObject, SceneObject]:
        """The objects from left to right, or from top to bottom: the order in which captions name them."""
        return self.first, self.second


def parse_caption(caption: str) -> Scene:
    """Read a caption back into its scene.

    Raises:
        UserError: the text is not a caption of this world.
    """
    for relation in RELATIONS:
        left, found, right = caption.partition(f" {relation} ")
        if found:
            return Scene(_parse_object(left, caption), relation, _parse_object(right, caption))
    raise UserError(f"not a caption of the embedded world: {caption!r} names none of the relations {RELATIONS}")


def _parse_object(text: str, caption: str) -> SceneObject:
    words = text.split()
    known = len(words) == 4 and words[1] in COLOURS and words[2] in TEXTURES and words[3] in SHAPES
    if not known:
        raise UserError(
            f"not a caption of the embedded world: {text!r} in {caption!r} should read"
            f" 'a <colour> <texture> <shape>' with colour in {COLOURS}, texture in {TEXTURES}, shape in {SHAPES}"
        )
    return SceneObject(*words[1:])


def draw_scenes(num_scenes: int, *, seed: int, held_out: bool) -> list[Scene]:
    """Draw scenes uniformly at random, from the held-out captions or from all the others.

    Args:
        num_scenes: how many, repetitions possible.
        seed: the same seed gives the same scenes.
        held_out: draw from the held-out captions (``True``) or from the rest (``False``).
    """
    stream = (scene for scene in _endless_scenes(np.random.default_rng(seed)) if scene.is_held_out == held_out)
    return [next(stream) for _ in range(num_scenes)]


def _endless_scenes(rng: np.random.Generator) -> Iterator[Scene]:
    while True:
        colours = rng.choice(len(COLOURS), 2, replace=False)
        shapes = rng.choice(len(SHAPES), 2, replace=False)
        textures = rng.integers(len(TEXTURES), size=2)
        objects = [
            SceneObject(COLOURS[colour], TEXTURES[texture], SHAPES[shape])
            for colour, texture, shape in zip(colours, textures, shapes, strict=True)
        ]
        yield Scene(objects[0], RELATIONS[rng.integers(len(RELATIONS))], objects[1])
