"""Whether pictures of the embedded world show what their captions say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from timestep_experts.evaluation.fidelity import to_judge_input
from timestep_experts.world.judge import Verdict, load_judge, score
from timestep_experts.world.scenes import parse_caption


def judge_pictures(pictures: NDArray[np.uint8], captions: Sequence[str]) -> Verdict:
    """Mean verdict over pictures and their captions, each entry in [0, 1].

    Args:
        pictures: ``(N, H, W, 3)`` uint8.
        captions: N captions of the embedded world.

    Raises:
        UserError: a caption is not of the embedded world.
    """
    scenes = [parse_caption(caption) for caption in captions]
    verdicts = [score(r, s) for r, s in zip(load_judge().read(to_judge_input(pictures)), scenes, strict=True)]
    return Verdict(*(float(np.mean([getattr(v, field.name) for v in verdicts])) for field in fields(Verdict)))
