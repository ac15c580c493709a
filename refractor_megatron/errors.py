"""The one error family for mistakes a user can mend.

Every message is one sentence that names the file, key or line and the way out. The command line prints it without a
traceback and exits with ``exit_code``. Our own mistakes are assertions and keep their traceback.
"""

from __future__ import annotations


class RefractorError(Exception):
    """Base class: something the user can mend."""

    exit_code = 1


class ConfigError(RefractorError):
    """Unknown, mistyped, contradictory, out-of-range or never-read configuration key, or a bad mask rule."""

    exit_code = 2


class DataError(RefractorError):
    """Missing, empty, unreadable or mismatching corpus, dataset or tokenizer."""

    exit_code = 3


class CheckpointError(RefractorError):
    """Checkpoint missing, damaged, of another configuration, or impossible to write."""

    exit_code = 4


class CapabilityError(RefractorError):
    """A library, version or device that the request needs is not there."""

    exit_code = 5


class OutputError(RefractorError):
    """An output folder is in use, belongs to another run, or the disk is full."""

    exit_code = 6
