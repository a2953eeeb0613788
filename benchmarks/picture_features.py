"""A small classifier of 32-pixel pictures, whose pooled features are the space of a Frechet distance: made here.

Trained on labelled pictures (``metadata.jsonl`` with ``file_name`` and ``label``); its accuracy on other pictures is in
the file's metadata. Distances in it are comparable with each other, not with an Inception FID.

Run: python benchmarks/picture_features.py --pictures work/cifar10/pictures/train \
         --held-out work/cifar10/pictures/choose --output work/cifar10/features.safetensors

A few minutes on one core; a file that is there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from timestep_experts.formats.atomic import write_tensors

NUM_FEATURES = 128
_BATCH = 250
_PADDING = 4  # of random crops
_DEFAULT_STEPS = 1500


class PictureClassifier(nn.Module):
    """``(B, 3, H, W)`` in [-1, 1] to ``(B, num_classes)`` logits, H and W multiples of 8."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(3, 32), *_block(32, 64, stride=2), *_block(64, 128, stride=2), *_block(128, NUM_FEATURES, stride=2)
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, pictures: Tensor) -> Tensor:
        """Means over the last map, ``(B, 128)``."""
        pooled: Tensor = self.trunk(pictures).mean((2, 3))
        return pooled

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.features(pictures))
        return logits


def _block(into: int, out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(into, out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.SiLU(),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.SiLU(),
    )


def load_classifier(path: Path) -> tuple[PictureClassifier, dict[str, str]]:
    """The network in evaluation mode, and how it was made, with its ``accuracy``.

    Raises:
        ValueError: there is none, or it is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = load_file(path)
        network = PictureClassifier(len(tensors["head.bias"]))
        network.load_state_dict(tensors)
    except Exception as error:  # safetensors raises kinds of its own
        raise ValueError(f"{path} is no picture classifier; make it with benchmarks/picture_features.py") from error
    return network.eval(), metadata


@torch.no_grad()
def features_of(network: PictureClassifier, pictures: NDArray[np.uint8]) -> Tensor:
    """Features of ``(N, H, W, 3)`` pictures: ``(N, 128)`` fp32."""
    parts = torch.from_numpy(np.ascontiguousarray(pictures)).split(_BATCH)
    return torch.cat([network.features(to_signal(part)) for part in parts])


def to_signal(pictures: Tensor) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def read_labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures ``(N, H, W, 3)`` uint8 and their labels ``(N,)``.

    Raises:
        ValueError: the folder has no labels.
    """
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()] if table.is_file() else []
    if not rows or any("label" not in row for row in rows):
        raise ValueError(f"{table} must give file_name and label of every picture")
    pictures = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    return torch.from_numpy(pictures), torch.tensor([row["label"] for row in rows])


def train(network: PictureClassifier, pictures: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int) -> None:
    """SGD under a one-cycle schedule on mirrored and shifted pictures, labels smoothed."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=max(steps, 10), pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for step in (bar := tqdm(range(steps), desc="classifier")):
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(disturb(to_signal(pictures[rows]), generator))
        loss = nn.functional.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the batch mirrored, and all of it shifted by up to 4 pixels."""
    half = len(pictures) // 2
    mirrored = torch.cat([pictures[:half].flip(-1), pictures[half:]])
    padded = nn.functional.pad(mirrored, [_PADDING] * 4, mode="reflect")
    top, left = torch.randint(2 * _PADDING + 1, (2,), generator=generator).tolist()
    height, width = pictures.shape[-2:]
    return padded[..., top : top + height, left : left + width]


@torch.no_grad()
def accuracy(network: PictureClassifier, pictures: Tensor, labels: Tensor) -> float:
    """Share of pictures whose class is named."""
    network.eval()
    named = torch.cat([network(to_signal(part)).argmax(-1) for part in pictures.split(_BATCH)])
    return float((named == labels).double().mean())


def main() -> None:
    """Train, measure on held-out pictures, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=_DEFAULT_STEPS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.is_file():
        print(f"{options.output} is there already: {load_classifier(options.output)[1]}")
        return
    pictures, labels = read_labelled(options.pictures)
    torch.manual_seed(options.seed)
    network = PictureClassifier(int(labels.max()) + 1)
    train(network, pictures, labels, options.steps, options.batch_size, options.seed)
    share = accuracy(network, *read_labelled(options.held_out))
    made = {"accuracy": f"{share:.4f}", "steps": str(options.steps), "training_pictures": str(len(pictures))}
    write_tensors(options.output, network.state_dict(), made)
    print(f"{options.output}: accuracy {share:.1%} on held-out pictures")


if __name__ == "__main__":
    main()
