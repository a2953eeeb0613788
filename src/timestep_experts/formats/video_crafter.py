"""The public VideoCrafter2 checkpoint's names for the tensors of diffusers' UNet3DConditionModel, and back.

Both describe one graph: the default UNet3DConditionModel's 1,480 tensors map one to one, and four more belong to the
fps embedding. Only the two projections of the first temporal transformer differ in shape: they are convolutions of
kernel 1 in the checkpoint, so their weights are ``(o, i, 1)`` there and ``(o, i)`` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from timestep_experts.errors import UserError

PREFIX = "model.diffusion_model."
"""Before every tensor of the denoiser in the checkpoint; others belong to the autoencoder and the text encoder."""

_LEVELS = 4
_RESNETS_PER_LEVEL = 2
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SQUEEZED = ("transformer_in.proj_in.weight", "transformer_in.proj_out.weight")


def to_diffusers_key(key: str) -> str:
    """The diffusers name of a checkpoint's tensor, with or without `PREFIX`.

    Raises:
        UserError: it is no tensor of VideoCrafter2's denoiser.
    """
    return _rename(key.removeprefix(PREFIX), _TO_DIFFUSERS, "a VideoCrafter2 denoiser")


def to_checkpoint_key(key: str) -> str:
    """The checkpoint's name, `PREFIX` included, of a tensor of UNet3DConditionModel.

    Raises:
        UserError: it is no tensor of a UNet3DConditionModel of VideoCrafter2's form.
    """
    return PREFIX + _rename(key, _TO_CHECKPOINT, "a UNet3DConditionModel of VideoCrafter2's form")


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser of a checkpoint as the ``state_dict`` of a UNet3DConditionModel (and of its fps embedding).

    Args:
        state: a whole checkpoint, of which the keys under `PREFIX` are taken; or the denoiser's keys without it.

    Raises:
        UserError: a tensor has no place in VideoCrafter2's denoiser.
    """
    own = {key: value for key, value in state.items() if key.startswith(PREFIX)} or state
    renamed = {to_diffusers_key(key): value for key, value in own.items()}
    return {key: value.squeeze(-1) if key in _SQUEEZED else value for key, value in renamed.items()}


def to_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`, with `PREFIX`.

    Raises:
        UserError: a tensor has no place in VideoCrafter2's denoiser.
    """
    return {to_checkpoint_key(key): value.unsqueeze(-1) if key in _SQUEEZED else value for key, value in state.items()}


def _rename(key: str, stems: Mapping[str, str], owner: str) -> str:
    stem, rest = key, ""
    while stem:
        if stem in stems:
            return stems[stem] + rest
        stem, _, last = stem.rpartition(".")
        rest = f".{last}{rest}"
    raise UserError(f"{key!r} is no tensor of {owner}")


def _stems() -> Iterator[tuple[str, str]]:
    """The modules that keep what is inside them, by their names in the checkpoint and in diffusers."""
    for embedding, name in (("time_embed", "time_embedding"), ("fps_embedding", "fps_embedding")):
        yield from ((f"{embedding}.{i}", f"{name}.linear_{n}") for i, n in ((0, 1), (2, 2)))
    yield from (("input_blocks.0.0", "conv_in"), ("init_attn.0", "transformer_in"))
    for level in range(_LEVELS):
        below, above = 1 + level * (_RESNETS_PER_LEVEL + 1), level * (_RESNETS_PER_LEVEL + 1)
        for i in range(_RESNETS_PER_LEVEL):
            yield from _resnet(f"input_blocks.{below + i}", 0, f"down_blocks.{level}", i)
            if level < _LEVELS - 1:
                yield from _attentions(f"input_blocks.{below + i}", f"down_blocks.{level}", i)
        if level < _LEVELS - 1:
            conv = f"down_blocks.{level}.downsamplers.0.conv"
            yield f"input_blocks.{below + _RESNETS_PER_LEVEL}.0.op", conv
        for i in range(_RESNETS_PER_LEVEL + 1):
            yield from _resnet(f"output_blocks.{above + i}", 0, f"up_blocks.{level}", i)
            if level > 0:
                yield from _attentions(f"output_blocks.{above + i}", f"up_blocks.{level}", i)
        if level < _LEVELS - 1:  # after the attentions, of which the lowest level has none
            place = f"output_blocks.{above + _RESNETS_PER_LEVEL}.{3 if level else 1}"
            yield f"{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield from _resnet("middle_block", 0, "mid_block", 0)
    yield from _attentions("middle_block", "mid_block", 0)
    yield from _resnet("middle_block", 3, "mid_block", 1)
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


def _resnet(block: str, place: int, name: str, number: int) -> Iterator[tuple[str, str]]:
    """A residual block and the temporal convolution in it, whose name is misspelt in the checkpoint."""
    yield from ((f"{block}.{place}.{old}", f"{name}.resnets.{number}.{new}") for old, new in _RESNET.items())
    yield f"{block}.{place}.temopral_conv", f"{name}.temp_convs.{number}"


def _attentions(block: str, name: str, number: int) -> Iterator[tuple[str, str]]:
    yield f"{block}.1", f"{name}.attentions.{number}"
    yield f"{block}.2", f"{name}.temp_attentions.{number}"


_TO_DIFFUSERS = dict(_stems())
_TO_CHECKPOINT = {new: old for old, new in _TO_DIFFUSERS.items()}
