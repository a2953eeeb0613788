"""The command ``timestep-experts``, and ``python -m timestep_experts``."""

import os


def main() -> None:
    """Choose how threads wait, which must be said before torch is loaded, and run the command.

    Threads of OpenMP spin while they wait for each other. With a busy neighbour they wait for cores that the neighbour
    has, and training nearly stands still. Threads that sleep cost an idle machine a fifth of its speed and keep most
    of it beside a neighbour (``benchmarks/neighbour.py``). An ``OMP_WAIT_POLICY`` that is set already stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from timestep_experts.cli import main as run

    run()


if __name__ == "__main__":
    main()
