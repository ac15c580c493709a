"""Configuration: one schema, presets as differences, strict values, one hash.

``compose`` makes a ``RunConfig`` from a preset, a user's YAML file and command-line overrides; ``check`` applies the
section-16 limits and looks for contradictions. Importing this package loads neither Hydra nor torch.
"""

from .limits import check
from .resolve import compose, presets
from .schema import RunConfig

__all__ = ["RunConfig", "check", "compose", "presets"]
