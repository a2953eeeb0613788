"""Turn a checkpoint of original code into a folder that diffusers loads."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path
from timestep_experts.models.video_crafter_checkpoint import convert_checkpoint, read_checkpoint


def convert(checkpoint: Path, output: Path, tokenizer: str, fps: float) -> None:
    """Write VideoCrafter2's checkpoint as a diffusers folder, whole or not at all.

    Raises:
        UserError: the checkpoint or the tokenizer cannot be used, or the folder exists.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a folder to be made")
    state = read_checkpoint(checkpoint)
    try:
        loaded = CLIPTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load CLIP's tokenizer from {tokenizer!r}: {error}") from error
    with atomic_path(output) as draft:
        convert_checkpoint(state, loaded, fps).save_pretrained(draft)
