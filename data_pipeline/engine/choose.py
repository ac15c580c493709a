"""The executor that the options name."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from data_pipeline.engine.tasks import Executor
from data_pipeline.options import Engine


def executor_of(engine: Engine) -> AbstractContextManager[Executor]:
    """Enter it, run stages with what it gives, leave it: that ends every process it started.

    ``workers`` 0 means the cores this process may use; for SLURM, no limit but the cluster's; for Ray, the cluster's
    CPUs. Raises ``DataError`` if Ray is asked for and not installed, or SLURM's commands are not on the PATH.
    """
    if engine.kind == "slurm":
        from data_pipeline.engine.slurm import SlurmExecutor

        return SlurmExecutor(engine.arguments, engine.workers)
    if engine.kind == "ray":
        from data_pipeline.engine.ray_executor import RayExecutor

        return RayExecutor(engine.workers)
    from data_pipeline.engine.local import LocalExecutor

    return LocalExecutor(engine.workers or len(os.sched_getaffinity(0)))
