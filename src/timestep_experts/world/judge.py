"""The judge of the embedded world: reads colours, textures, shapes and layout back from a picture.

A small convolutional classifier. Its pooled features double as the space of the Frechet distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from timestep_experts.world.scenes import COLOURS, SHAPES, TEXTURES, Scene, SceneObject

ASSETS = Path(__file__).parent / "assets"
NUM_FEATURES = 128
_ATTRIBUTES = {"colour": COLOURS, "texture": TEXTURES, "shape": SHAPES}
_LOGITS_PER_OBJECT = sum(len(words) for words in _ATTRIBUTES.values())


@dataclass(frozen=True)
class Reading:
    """What the judge sees: two objects in reading order, and whether they stand side by side."""

    first: SceneObject
    second: SceneObject
    is_horizontal: bool


@dataclass(frozen=True)
class Verdict:
    """How far a picture keeps its caption's promises, each in [0, 1] (objects are worth one half each)."""

    colour: float
    shape: float
    texture: float
    relation: float


class Judge(nn.Module):
    """Classifier of 64-pixel scenes: ``(B, 3, 64, 64)`` in [-1, 1] to ``(B, 33)`` logits.

    Columns: 16 for the first object in reading order (6 colours, 4 textures, 6 shapes), 16 for the second, and one
    for "side by side".
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, NUM_FEATURES)
        self.trunk = nn.Sequential(
            *(_down_block(into, out) for into, out in pairwise(widths)),
            nn.Conv2d(NUM_FEATURES, NUM_FEATURES, 3, padding=1),
            nn.SiLU(),
        )
        self.squeeze = nn.Linear(NUM_FEATURES * 16, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, 2 * _LOGITS_PER_OBJECT + 1)

    def features(self, pictures: Tensor) -> Tensor:
        """Penultimate activations, ``(B, 128)``."""
        return nn.functional.silu(self.squeeze(self.trunk(pictures).flatten(1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits, ``(B, 33)``."""
        logits: Tensor = self.head(self.features(pictures))
        return logits

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[Reading]:
        """Name what ``(B, 3, 64, 64)`` pictures in [-1, 1] show."""
        logits = self(pictures).float()
        first, second, side = torch.split(logits, [_LOGITS_PER_OBJECT, _LOGITS_PER_OBJECT, 1], -1)
        return [
            Reading(one, two, bool(horizontal > 0))
            for one, two, horizontal in zip(_name(first), _name(second), side[:, 0].tolist(), strict=True)
        ]


def _down_block(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride=2, padding=1),
        nn.GroupNorm(8, out),
        nn.SiLU(),
        nn.Conv2d(out, out, 3, padding=1, groups=out // 8),
        nn.SiLU(),
    )


def _name(logits: Tensor) -> list[SceneObject]:
    parts = torch.split(logits, [len(words) for words in _ATTRIBUTES.values()], -1)
    rows = torch.stack([part.argmax(-1) for part in parts], -1).tolist()
    return [SceneObject(*(words[i] for words, i in zip(_ATTRIBUTES.values(), row, strict=True))) for row in rows]


def judge_targets(scenes: Sequence[Scene]) -> Tensor:
    """Class indices of scenes, ``(B, 7)`` long: colour, texture, shape of both objects, then side by side (0 or 1)."""
    rows = []
    for scene in scenes:
        objects = scene.in_reading_order()
        row = [words.index(getattr(item, name)) for item in objects for name, words in _ATTRIBUTES.items()]
        rows.append([*row, int(scene.is_horizontal)])
    return torch.tensor(rows)


def judge_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the seven questions: ``(B, 33)`` logits against the ``(B, 7)`` of `judge_targets`."""
    sizes = [len(words) for words in _ATTRIBUTES.values()] * 2
    *parts, side = torch.split(logits, [*sizes, 1], -1)
    losses = [nn.functional.cross_entropy(part, targets[:, i]) for i, part in enumerate(parts)]
    losses.append(nn.functional.binary_cross_entropy_with_logits(side[:, 0], targets[:, -1].to(side.dtype)))
    return torch.stack(losses).mean()


def score(reading: Reading, scene: Scene) -> Verdict:
    """Hold a reading against the caption.

    The two objects read are matched to the two captioned ones so that most attributes agree; colour, shape and texture
    count the objects that agree under that matching. The relation holds when the layout's direction is right and the
    captioned order matches strictly better than the swapped one, so an unreadable picture earns nothing.
    """
    wanted = scene.in_reading_order()
    kept = _agreement((reading.first, reading.second), wanted)
    swapped = _agreement((reading.second, reading.first), wanted)
    best = swapped if sum(swapped.values()) > sum(kept.values()) else kept
    in_order = sum(kept.values()) > sum(swapped.values())
    relation = float(in_order and reading.is_horizontal == scene.is_horizontal)
    return Verdict(best["colour"] / 2, best["shape"] / 2, best["texture"] / 2, relation)


def _agreement(read: tuple[SceneObject, SceneObject], wanted: tuple[SceneObject, SceneObject]) -> dict[str, int]:
    return {
        name: sum(getattr(a, name) == getattr(b, name) for a, b in zip(read, wanted, strict=True))
        for name in _ATTRIBUTES
    }


def load_judge() -> Judge:
    """The shipped judge, in evaluation mode, fp32."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(ASSETS / "judge.safetensors").items()})
    return judge.eval().requires_grad_(False)
