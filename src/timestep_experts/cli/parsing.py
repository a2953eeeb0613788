"""What commands share: arguments, numbers from text, a quiet terminal."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from timestep_experts.errors import UserError

if TYPE_CHECKING:
    from timestep_experts.config import Recipe

MOST_SEED = 2**53
RecipePath = Annotated[Path, typer.Argument(help="A recipe YAML; see the folder recipes/.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, e.g. method.max_train_steps=100", metavar="[KEY=VALUE]...")
]


def make_console() -> Console:
    """A console for tables; wide where the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def escaped(value: object) -> str:
    """Text that rich prints as it is; what a terminal would obey (escape codes) is written out."""
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(value))
    return text.replace("[", r"\[")


def numbers(text: str, option: str, count: int | None = None) -> tuple[float, ...]:
    """Numbers separated by commas.

    Args:
        text: as given.
        option: its name, for the error.
        count: how many there must be; ``None``: any.

    Raises:
        UserError: the text is something else.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas; got {text!r}") from error
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} takes finite numbers; got {text!r}")
    if count is not None and len(found) != count:
        raise UserError(f"{option} takes {count} numbers; got {text!r}")
    return found


def load_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    """The recipe with its overrides.

    Raises:
        UserError: it does not fit the schema.
    """
    from timestep_experts.config import load_recipe as load

    return load(path, overrides or [])


def quiet_libraries() -> None:
    """Leave the terminal to our own messages and bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # diffusers imports them where they are installed
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
