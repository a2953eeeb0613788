"""What records in files say of where they come from."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from timestep_experts import __version__


def tool_versions() -> dict[str, str]:
    """The versions of this package and of the libraries that decide what a file means."""
    return {
        "timestep_experts": __version__,
        "torch": str(torch.__version__),
        "diffusers": version("diffusers"),  # from its metadata, for it takes seconds to load
    }


def portable(path: Path | str) -> str:
    """A path as records that others read may have it: a relative one as it is, of an absolute one the last name."""
    place = Path(path)
    return place.name if place.is_absolute() else str(path)
