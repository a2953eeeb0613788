"""Files that outlive a run: atomic writing, and the bundle."""

from timestep_experts.formats.bundle import Bundle, load_bundle, save_bundle

__all__ = ["Bundle", "load_bundle", "save_bundle"]
