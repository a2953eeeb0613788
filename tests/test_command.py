"""The command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from timestep_experts.__main__ import main
sys.argv = ["timestep-experts", "--help"]
try:
    main()
finally:
    print("POLICY", os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_told_otherwise(given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert f"POLICY {expected}" in done.stdout


def test_the_policy_is_chosen_before_torch_is_loaded() -> None:
    script = "import sys; import timestep_experts.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
