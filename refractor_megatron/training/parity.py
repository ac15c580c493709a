"""``refractor parity``: a grid against one rank, loss by loss and parameter by parameter. Imports no torch."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import compose
from ..config.limits import check
from ..distinction.closure import compile_checked
from ..errors import ConfigError, RefractorError
from .dataset import add_corpus_flags, dataset_of, prepared
from .folder import RunFolder, write_json
from .spawn import spawn

if TYPE_CHECKING:
    from data_pipeline.build import BuiltData

#: Tolerances of the contract: fp32, absolute for the loss, relative L2 for each parameter's gradient.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far a grid is from one rank."""

    loss: float  # largest absolute difference over the steps, nats
    norm: float  # largest relative difference of the global gradient norm
    gradient: float  # largest relative L2 difference of a parameter's gradient, over parameters and steps
    parameter: str  # where
    parameters: int  # compared
    moved: int  # (token, expert) assignments that changed place, at least: a near-tie that rounding decided otherwise

    @property
    def holds(self) -> bool:
        """Whether both tolerances hold."""
        return self.loss <= LOSS_TOLERANCE and max(self.gradient, self.norm) <= GRADIENT_TOLERANCE


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``parity``."""
    parser = subparsers.add_parser("parity", help="compare grids with one rank, parameter by parameter")
    add_corpus_flags(parser, "nano")
    parser.add_argument("--grids", default="dp2,tp2,pp2,ep2", help="comma-separated, e.g. dp2,tp2,pp2,ep2,cp2,tp2cp2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the table as JSON to this file")
    parser.set_defaults(run=parity)


def parity(args: argparse.Namespace) -> int:
    """Train each grid for a few steps from the same weights on the same samples; exit 1 if one is out of tolerance."""
    grids = [parse_grid(text) for text in args.grids.split(",")]
    overrides = [f"experiment={args.preset}", "train.mixed_precision=fp32", *args.overrides]
    cfg = compose(overrides)
    built = dataset_of(cfg, args.corpus, args.data_root, args.tokenizer)
    worst = 0
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        reference = _trace(Path(scratch) / "one", overrides, {}, 1, built, args.steps)
        print(f"{'grid':<8} {'ranks':>5} {'|Δloss|':>9} {'Δ|g|/|g|':>9} {'gradients':>9} {'moved':>6}  worst parameter")
        for name, sizes in zip(args.grids.split(","), grids, strict=True):
            ranks = sizes.pop("ranks")
            traced = _trace(Path(scratch) / name, overrides, sizes, ranks, built, args.steps)
            difference = compare(reference, traced)
            table[name] = {"ranks": ranks, **vars(difference), "holds": difference.holds}
            worst |= not difference.holds
            print(
                f"{name:<8} {ranks:>5} {difference.loss:>9.1e} {difference.norm:>9.1e} {difference.gradient:>9.1e} "
                f"{difference.moved:>6}  {difference.parameter}{'' if difference.holds else '  OUT OF TOLERANCE'}",
                flush=True,
            )
    if args.out is not None:
        write_json(args.out, {"steps": args.steps, "overrides": overrides, "grids": table})
    return worst


def parse_grid(text: str) -> dict[str, int]:
    """``tp2ep2`` -> {"tp": 2, "ep": 2, "ranks": 2}; ``dp2`` -> {"ranks": 2}.

    Raises:
        ConfigError: it is not a sequence of dp/tp/pp/ep/cp with sizes.
    """
    import re

    parts = re.findall(r"(dp|tp|pp|ep|cp)(\d+)", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise ConfigError(f"--grids: '{text}' is not a grid; write for example tp2, pp2ep2 or dp2.")
    sizes = {name: int(size) for name, size in parts}
    data = sizes.pop("dp", 1)
    tp, cp, ep = (sizes.get(name, 1) for name in ("tp", "cp", "ep"))
    return {**sizes, "ranks": tp * cp * sizes.get("pp", 1) * max(data, -(-ep // (tp * cp)))}


def _trace(
    scratch: Path, overrides: list[str], sizes: dict[str, int], ranks: int, built: BuiltData, steps: int
) -> Path:
    scratch.mkdir()
    cfg = compose([*overrides, *(f"parallel.{k}={v}" for k, v in sizes.items())])
    check(cfg, ranks)
    compile_checked(cfg.safety.masks)
    folder = RunFolder(scratch)
    cfg.save(folder.config)
    write_json(folder.data, prepared(cfg, built))
    if code := spawn("refractor_megatron.training.trace", [str(scratch), str(steps)], ranks):
        raise RefractorError(f"the ranks of grid {sizes or 'one rank'} ended with exit code {code}; see above.")
    return scratch / "trace.npz"


def compare(reference: Path, other: Path) -> Difference:
    """Compare two traces (see ``training.trace``); asserts that both hold the same parameters and steps."""
    import numpy as np

    with np.load(reference) as a, np.load(other) as b:
        assert set(a.files) == set(b.files), sorted(set(a.files) ^ set(b.files))[:4]
        loss = float(np.abs(a["loss"] - b["loss"]).max())
        worst, where = 0.0, "-"
        norm = float((np.abs(a["norm"] - b["norm"]) / a["norm"]).max())
        moved = int(np.abs(a["routed"] - b["routed"]).sum()) // 2
        names = [n for n in a.files if n not in ("loss", "norm", "routed")]
        for name in names:
            expected, found = a[name].astype(np.float64), b[name].astype(np.float64)
            axes = tuple(range(1, expected.ndim))
            scale = np.sqrt((expected**2).sum(axes))
            error = float((np.sqrt(((found - expected) ** 2).sum(axes)) / np.maximum(scale, 1e-12)).max())
            if not error <= worst:
                worst, where = error, name
    return Difference(loss, norm, worst, where, len(names), moved)
