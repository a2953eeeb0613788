"""The names of dtypes, on the command line, in recipes and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from timestep_experts.errors import UserError

DtypeName = Literal["fp32", "fp16", "bf16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name]
