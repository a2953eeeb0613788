"""``python -m timestep_experts``."""

from timestep_experts.cli import main

main()
