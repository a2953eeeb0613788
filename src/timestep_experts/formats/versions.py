"""The versions that are written into files."""

from __future__ import annotations

from importlib.metadata import version

import torch

from timestep_experts import __version__


def tool_versions() -> dict[str, str]:
    """The versions of this package and of the libraries that decide what a file means."""
    return {
        "timestep_experts": __version__,
        "torch": str(torch.__version__),
        "diffusers": version("diffusers"),  # from its metadata, for it takes seconds to load
    }
