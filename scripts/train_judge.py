"""Train the judge of the embedded world and write it to the package's assets.

Run: python scripts/train_judge.py        (about 10 minutes on one core; prints the held-out accuracy of both domains)
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from timestep_experts.world.judge import ASSETS, Judge, Verdict, judge_loss, judge_targets, score
from timestep_experts.world.render import DOMAINS, render
from timestep_experts.world.scenes import draw_scenes


def main() -> None:
    """Render, train with disturbed pictures, report held-out accuracy, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ASSETS / "judge.safetensors")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--num-pictures", type=int, default=16000, help="per domain")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    scenes = draw_scenes(arguments.num_pictures, seed=arguments.seed, held_out=False)
    pictures = torch.cat([torch.from_numpy(render(scenes, domain, seed=i)) for i, domain in enumerate(DOMAINS)])
    targets = judge_targets(scenes).repeat(len(DOMAINS), 1)
    judge = Judge()
    train(judge, pictures, targets, arguments.steps)
    for domain in DOMAINS:
        print(domain, accuracy(judge.eval(), domain))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, arguments.output)


def train(judge: Judge, pictures: Tensor, targets: Tensor, steps: int) -> None:
    """AdamW under a one-cycle schedule on randomly disturbed pictures."""
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in (bar := tqdm(range(steps), desc="judge")):
        rows = torch.randint(len(pictures), (64,))
        loss = judge_loss(judge(disturb(to_signal(pictures[rows]))), targets[rows])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def to_signal(pictures: Tensor) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def disturb(pictures: Tensor) -> Tensor:
    """Shifts, brightness, noise and, for half of the batch, a blur: what generated pictures suffer from."""
    shift = torch.randint(-3, 4, (2,)).tolist()
    pictures = pictures.roll(shift, (2, 3))
    half = len(pictures) // 2
    blurred = torch.nn.functional.avg_pool2d(pictures[:half], 3, 1, 1, count_include_pad=False)
    strength = torch.rand(half, 1, 1, 1)
    pictures = torch.cat([pictures[:half].lerp(blurred, strength), pictures[half:]])
    gain = 1 + 0.1 * torch.randn(len(pictures), 3, 1, 1)
    noise = 0.15 * torch.rand(len(pictures), 1, 1, 1) * torch.randn_like(pictures)
    return (pictures * gain + 0.05 * torch.randn(len(pictures), 3, 1, 1) + noise).clamp(-1, 1)


def accuracy(judge: Judge, domain: str, num_pictures: int = 2000) -> dict[str, float]:
    """Mean verdict over held-out renders of one domain."""
    scenes = draw_scenes(num_pictures, seed=12345, held_out=True)
    pictures = to_signal(torch.from_numpy(render(scenes, domain, seed=54321)))
    verdicts = [score(reading, scene) for reading, scene in zip(judge.read(pictures), scenes, strict=True)]
    return {f.name: sum(getattr(v, f.name) for v in verdicts) / len(verdicts) for f in fields(Verdict)}


if __name__ == "__main__":
    main()
