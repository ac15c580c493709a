"""``refractor data task``: one task of a stage, for a batch system to start."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_pipeline.engine.tasks import run_task
from refractor_megatron.errors import DataError


def add_task_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``task FOLDER INDEX`` to the actions of ``refractor data``."""
    parser = subparsers.add_parser("task", help="do one task of a build's stage (what a SLURM array runs)")
    parser.add_argument("folder", type=Path, help="folder of the stage, with stage.json")
    parser.add_argument("index", type=int, help="number of the task, from 0")
    parser.set_defaults(run=task_command)


def task_command(args: argparse.Namespace) -> int:
    """Does task ``args.index`` of the stage in ``args.folder``, unless it is done; says nothing if all is well.

    Raises ``DataError`` if the folder is no stage or has no such task, and what the task raises.
    """
    path = args.folder / "stage.json"
    try:
        count = int(json.loads(path.read_bytes())["count"])
    except FileNotFoundError as error:
        raise DataError(f"{args.folder} is no folder of a stage (no stage.json); name one of a build's.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {args.folder} and build again.") from error
    if not 0 <= args.index < count:
        raise DataError(f"{args.folder} has tasks 0 to {count - 1}, no task {args.index}; name one of those.")
    run_task(args.folder, args.index)
    return 0
