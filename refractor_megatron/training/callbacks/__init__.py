"""Small things that happen after a step; the loop calls each in order."""

from .checkpointing import Checkpointing
from .evaluating import Evaluating
from .reporting import Reporting

__all__ = ["Checkpointing", "Evaluating", "Reporting"]
