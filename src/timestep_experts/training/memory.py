"""What a training step takes of memory, found out by running one on fake tensors: nothing is computed or allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from timestep_experts.data import EncodedDataset
from timestep_experts.models import Family
from timestep_experts.training.batches import Batch
from timestep_experts.training.stage import Precision, Training, gradients_of

_FP32_ON_ACCELERATORS = ("group_norm", "layer_norm", "softmax")


class PeakMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes held at one time by tensors that were made while it is open.

    PyTorch's own MemTracker would do, but it refuses frozen parameters.

    Args:
        held: tensors from before, which do not count, nor do views of them.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known = {id(tensor.untyped_storage()) for tensor in held}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count the storages that it made; views and in-place results are no new ones."""
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:  # the same Python object for as long as the storage lives
            return
        self._known.add(id(storage))
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


@contextmanager
def autocast_of_accelerators() -> Iterator[None]:
    """While open, autocast on a CPU treats norms and softmaxes as on a GPU: they compute and answer in fp32.

    They are replaced in ``torch.nn.functional``: a TorchFunctionMode would not be there when a checkpoint recomputes.
    """
    own = {name: getattr(functional, name) for name in _FP32_ON_ACCELERATORS}
    try:
        for name, function in own.items():
            setattr(functional, name, _in_fp32(function))
        yield
    finally:
        for name, function in own.items():
            setattr(functional, name, function)


def _in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_to_fp32(value) for value in args)
            kwargs = {name: _to_fp32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return call


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@contextmanager
def fake_networks(networks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, networks of the meta device pretend to be on the CPU, and whatever is computed is fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            network.to_empty(device="cpu")
        yield


def fake_pictures(family: Family, pixel_shape: Sequence[int], *, as_tokens: bool) -> EncodedDataset:
    """A data set of one picture without a caption, of the shapes that the family's own encoders give.

    Args:
        family: of fake networks.
        pixel_shape: of a picture ``(3, H, W)`` or clip ``(3, F, H, W)``.
        as_tokens: keep captions as token ids.
    """
    with torch.no_grad():
        latents = family.encode_pixels(torch.zeros(1, *pixel_shape))
        features = (family.tokenize if as_tokens else family.encode_captions)(["", ""])
    return EncodedDataset(
        latents=latents,
        caption_rows=torch.zeros(1, dtype=torch.long),
        features=features,
        captions=("",),
        skipped=(),
        is_tokenised=as_tokens,
    )


def step_peak(
    training: Training,
    dataset: EncodedDataset,
    accumulation_steps: int,
    precision: Precision,
    *,
    on_accelerator: bool,
) -> int:
    """The most bytes that gradients, activations and temporary tensors of one optimiser step take together.

    The step is the real one, gradient checkpointing and all. Attention counts in its fused form, which keeps no
    matrix of all pairs of tokens.

    Args:
        training: of fake networks.
        dataset: see `fake_pictures`.
        accumulation_steps: into how many micro-batches a batch is cut; from the second one on, all gradients are there.
        precision: see `LoopSettings`.
        on_accelerator: autocast as on a GPU.
    """
    stage, family = training.stage, training.family
    parameters = stage.parameters()
    gradients = 4 * sum(parameter.numel() for parameter in parameters)
    chunk = _fake_batch(-(-stage.plan.batch_size // accumulation_steps), dataset, family)
    held = [*_tensors_of(training), *parameters, dataset.latents, *dataset.features.values()]
    meter = PeakMeter(held)
    stage.set_mode()
    with gradients_of(training), autocast_of_accelerators() if on_accelerator else nullcontext():
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulation_steps > 1 else None
        with meter:
            stage.objective.backward(0, family, dataset, chunk, precision)
        for parameter in parameters:
            parameter.grad = None
    return max(gradients, meter.peak + (gradients if accumulation_steps > 1 else 0))


def _tensors_of(training: Training) -> list[Tensor]:
    """Parameters and buffers of all networks of the family, and of what stands beside them: the layers of experts."""
    networks = [part for part in training.family.parts.components.values() if isinstance(part, nn.Module)]
    modules = [*networks, *training.trainee.trained_modules()]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _fake_batch(size: int, dataset: EncodedDataset, family: Family) -> Batch:
    rows = torch.zeros(size, dtype=torch.long)
    t = rows if family.noise.has_integer_timesteps else rows.float()
    return Batch(rows, t, torch.zeros(size, *dataset.latents.shape[1:]), rows.bool())
