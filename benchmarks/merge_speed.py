"""Seconds and memory of merging four experts, beside mergekit's raw merge and sd-mecha, on the same files.

Run: python -m venv peers/mergekit && peers/mergekit/bin/pip install mergekit
     python -m venv peers/sd-mecha && peers/sd-mecha/bin/pip install sd-mecha
     python benchmarks/merge_speed.py --mergekit peers/mergekit/bin/python --sd-mecha peers/sd-mecha/bin/python

Makes a UNet of Stable Diffusion 1.5 in fp16 with random weights (1.7 GB) and four experts of it in a temporary folder
(14 GB of disk), by the tensor names of its original release, for sd-mecha merges no others. Then it runs every tool on
them as its users do, as a process of its own, in turn, round after round. Prints a table and writes
results/merge_speed.json: the median over rounds of the seconds from start to end, and the largest peaks of anonymous
memory (what a process cannot give back) and of resident memory (which counts pages of mapped files, too).

The tools do not do the same: ours hashes all inputs, checks them and the result for NaN and writes its record.
``--method ties`` compares TIES instead, at density 0.5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

NUM_EXPERTS = 4
WEIGHT = 0.25
DENSITY = 0.5
MIB = 2**20
POLL_SECONDS = 0.01

SD_MECHA = """
import sys, sd_mecha
from sd_mecha.extensions.builtin.merge_methods import linear  # the package's own wrapper fails
method, base, output, *experts = sys.argv[1:]
base, experts = sd_mecha.model(base), [sd_mecha.model(path) for path in experts]
deltas = [sd_mecha.subtract(expert, base) for expert in experts]
if method == "ties":
    moved = sd_mecha.ties_sum(*deltas, k={density}, vote_sgn=True)
else:
    moved = sd_mecha.n_average(*deltas)
merged = linear.add_difference(base, moved, alpha=4 * {weight})
sd_mecha.merge(merged, output=output)
"""
LAYOUT = """
import json, sys, sd_mecha
keys = sd_mecha.extensions.model_configs.resolve("sd1-ldm").keys()
json.dump(dict((name, list(value.shape)) for name, value in keys.items() if ".diffusion_model." in name), sys.stdout)
"""


def main() -> None:
    """Make the files, run the tools, print and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="the interpreter of an environment with mergekit")
    parser.add_argument("--sd-mecha", type=Path, required=True, help="the interpreter of an environment with sd-mecha")
    parser.add_argument("--method", choices=("linear", "ties"), default="linear")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "merge_speed.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, experts = make_files(folder, options.sd_mecha)
        commands = {"timestep-experts": ours(options.method, base, experts, folder / "ours.safetensors")}
        if options.mergekit:
            commands["mergekit"] = mergekit(options.mergekit, options.method, base, experts, folder)
        commands["sd-mecha"] = sd_mecha(options.sd_mecha, options.method, base, experts, folder)
        runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in commands}
        for _ in range(options.rounds):
            clear(folder)
            for tool, command in commands.items():
                runs[tool].append(measure(command))
        differences = compare(folder, commands)
        size = base.stat().st_size / MIB
    rows = {tool: summarise(own) | {"difference": differences[tool]} for tool, own in runs.items()}
    show(rows, size, options.method)
    write(options.output, options.method, {"megabytes_per_model": size, "rounds": options.rounds, "tools": rows})


def make_files(folder: Path, sd_mecha: Path) -> tuple[Path, list[Path]]:
    """A base and its experts, the latter a little off the base everywhere."""
    torch.manual_seed(0)
    layout = json.loads(subprocess.check_output([sd_mecha, "-c", LAYOUT]))  # noqa: S603
    weights = {name: (0.02 * torch.randn(shape)).half() for name, shape in layout.items()}
    paths = [folder / "base.safetensors", *(folder / f"expert-{i}.safetensors" for i in range(NUM_EXPERTS))]
    save_file(weights, paths[0], {"format": "pt"})
    for path in paths[1:]:
        save_file({k: v + (0.001 * torch.randn(v.shape)).half() for k, v in weights.items()}, path, {"format": "pt"})
    return paths[0], paths[1:]


def ours(method: str, base: Path, experts: list[Path], output: Path) -> list[str]:
    """The command of this project."""
    given = [part for expert in experts for part in ("--expert", str(expert))]
    weights = ",".join([str(WEIGHT)] * len(experts))
    extra = ["--density", str(DENSITY)] if method == "ties" else []
    command = [sys.executable, "-m", "timestep_experts", "merge", str(base), str(output)]
    return [*command, *given, "--weights", weights, "--method", method, *extra]


def mergekit(python: Path, method: str, base: Path, experts: list[Path], folder: Path) -> list[str]:
    """The raw merge of mergekit; task arithmetic is its name for the linear one."""
    own = {"weight": WEIGHT, **({"density": DENSITY} if method == "ties" else {})}
    config = {
        "merge_method": "ties" if method == "ties" else "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": own} for path in experts],
        "parameters": {"normalize": method == "ties", "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": "float16",
    }
    path = folder / "mergekit.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return [str(python.with_name("mergekit-pytorch")), str(path), str(folder / "mergekit"), "--quiet"]


def sd_mecha(python: Path, method: str, base: Path, experts: list[Path], folder: Path) -> list[str]:
    """A script of sd-mecha's, with its defaults."""
    script = folder / "sd_mecha_merge.py"
    script.write_text(SD_MECHA.format(density=DENSITY, weight=WEIGHT), encoding="utf-8")
    return [str(python), str(script), method, str(base), str(folder / "sd-mecha.safetensors"), *map(str, experts)]


def clear(folder: Path) -> None:
    """Remove what the tools wrote."""
    for path in [folder / "ours.safetensors", folder / "ours.merge.json", folder / "sd-mecha.safetensors"]:
        path.unlink(missing_ok=True)
    for path in (folder / "mergekit").glob("*"):
        path.unlink()


def measure(command: list[str]) -> dict[str, float]:
    """Seconds and peaks in MiB of one process."""
    started = time.perf_counter()
    anonymous = resident = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tempfile.gettempdir())  # noqa: S603
        while process.poll() is None:
            anonymous, resident = (
                max(anonymous, read(process.pid, "RssAnon")),
                max(resident, read(process.pid, "VmHWM")),
            )
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode()}")
    return {"seconds": seconds, "anonymous": anonymous / MIB, "resident": resident / MIB}


def read(process: int, entry: str) -> int:
    """Bytes of an entry of a process's status; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), 0)


def compare(folder: Path, commands: dict[str, list[str]]) -> dict[str, float]:
    """The largest absolute difference of each tool's result from ours."""
    files = {"timestep-experts": folder / "ours.safetensors", "sd-mecha": folder / "sd-mecha.safetensors"}
    files["mergekit"] = folder / "mergekit" / "model.safetensors"
    reference = load_file(files["timestep-experts"])
    return {tool: largest_difference(reference, load_file(files[tool])) for tool in commands}


def largest_difference(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all tensors, which must be the same ones."""
    assert reference.keys() == other.keys()
    return max(float((reference[name].float() - other[name].float()).abs().max()) for name in reference)


def summarise(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of seconds, the largest of peaks."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "anonymous": max(run["anonymous"] for run in runs),
        "resident": max(run["resident"] for run in runs),
    }


def show(rows: dict[str, dict[str, float]], size: float, method: str) -> None:
    """The table."""
    title = f"{method} merge of {NUM_EXPERTS} experts of {size:.0f} MiB"
    table = Table("tool", "seconds", "anonymous MiB", "resident MiB", "largest difference from ours", title=title)
    for tool, row in rows.items():
        numbers = (f"{row['seconds']:.1f}", f"{row['anonymous']:.0f}", f"{row['resident']:.0f}")
        table.add_row(tool, *numbers, f"{row['difference']:.1e}")
    Console().print(table)


def write(path: Path, method: str, result: dict[str, object]) -> None:
    """Add one method's result to the file."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    environment = {"torch": torch.__version__, "cores": os.cpu_count()}
    path.write_text(json.dumps(recorded | {method: result | environment}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
