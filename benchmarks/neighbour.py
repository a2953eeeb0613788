"""What a busy neighbour costs training, by the way in which threads wait for each other.

Run: python benchmarks/neighbour.py        (on an idle machine; two minutes)

Every policy trains the mixture of the first run (recipes/quickstart.yaml) in a process of its own, alone and beside a
process that computes with as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

POLICIES = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "as OpenMP chooses": {},
    "asleep (ours)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NEIGHBOUR = "import torch\na = torch.randn(512, 512)\nwhile True: a = (a @ a).tanh()"
TRAINING = """
import sys, time, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from timestep_experts.build import build_spec
from timestep_experts.config import load_recipe
from timestep_experts.mixture import Mixture
from timestep_experts.world.judge import ASSETS

method = load_recipe(Path("recipes/quickstart.yaml")).method
unet = UNet2DConditionModel.from_pretrained(ASSETS / "base" / "unet").requires_grad_(False)
mixture = Mixture.attach(unet, build_spec(method, 1000), method.experts.target_modules)
mixture.mode = "route"
latents, text = torch.randn(16, 8, 8, 8), torch.randn(16, 8, unet.config.cross_attention_dim)

def step():
    unet(latents, torch.randint(1000, (16,)), text).sample.square().mean().backward()

step()
done, start = 0, time.perf_counter()
while time.perf_counter() < start + float(sys.argv[1]):
    step()
    done += 1
print(done / (time.perf_counter() - start))
"""


def main() -> None:
    """Print steps per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="of training for each number")
    seconds = parser.parse_args().seconds
    table = Table("threads wait", "alone", "beside a busy process", title="forward and backward passes a second")
    for name, policy in POLICIES.items():
        alone = train(policy, seconds)
        with busy():
            beside = train(policy, seconds)
        table.add_row(name, f"{alone:.2f}", f"{beside:.2f}")
    Console().print(table)


def train(policy: dict[str, str], seconds: float) -> float:
    """Steps a second."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", TRAINING, str(seconds)]
    done = subprocess.run(  # noqa: S603 - our own text
        command, env={**environment, **policy}, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


@contextmanager
def busy() -> Iterator[None]:
    """A process that computes as it would by default."""
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])  # noqa: S603 - our own text
    try:
        time.sleep(2)
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


if __name__ == "__main__":
    main()
