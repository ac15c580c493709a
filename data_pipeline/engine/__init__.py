"""Runs the build's tasks: idempotent, file in and file out, on a process pool, a SLURM array or Ray."""
