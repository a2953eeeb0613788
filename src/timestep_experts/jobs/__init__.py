"""What the command line does. Each job is a module of its own: merging, for one, needs no diffusers."""
