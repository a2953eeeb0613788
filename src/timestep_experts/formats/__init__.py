"""Files that outlive a run: atomic writing, and the bundle."""

from timestep_experts.formats.bundle import Bundle, load_bundle, save_bundle
from timestep_experts.formats.sampling import SamplingDefaults
from timestep_experts.formats.versions import portable, tool_versions

__all__ = ["Bundle", "SamplingDefaults", "load_bundle", "portable", "save_bundle", "tool_versions"]
