"""PyAV, which reads and writes videos and is installed on request."""

from __future__ import annotations

from typing import Any

from timestep_experts.errors import UserError


def require_av() -> Any:
    """The module ``av``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av  # an optional dependency
    except ImportError as error:
        raise UserError("videos need PyAV; install it by: pip install 'timestep-experts[video]'") from error
    return av
