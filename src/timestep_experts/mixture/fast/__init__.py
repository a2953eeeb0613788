"""The fast arithmetic of a mixture: the same numbers as `PlainKernels`, sooner. Nothing outside needs to know how.

Every trick can be switched off by itself (`Tricks`), which is how ``benchmarks/speed_tricks.py`` measures its worth.
"""

from timestep_experts.mixture.fast.kernels import FastKernels, Tricks

__all__ = ["FastKernels", "Tricks"]
