"""Specialise a diffusion model by noise level: train experts per timestep interval, then switch or route them."""

__version__ = "0.1.0"
