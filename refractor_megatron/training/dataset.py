"""The dataset of a configuration or a run, and ``refractor data``. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.command import add_inspect_parser, add_report_parser, verify_command
from data_pipeline.engine.command import add_task_parser
from data_pipeline.packed_stream import open_stage
from data_pipeline.samples import Stream
from data_pipeline.stream import SampleStream

from ..config import RunConfig, compose
from ..errors import DataError
from ..tokenizer.imported import load_tokenizer
from .data_options import options_of
from .folder import RunFolder

if TYPE_CHECKING:
    from data_pipeline.build import BuiltData
    from data_pipeline.retrieval.index import RetrievalIndex
    from data_pipeline.retrieval.neighbours import Neighbours

S = TypeVar("S", bound="Stream")


def dataset_of(cfg: RunConfig, corpus: Path | None, root: Path, tokenizer: Path | None = None) -> BuiltData:
    """Find or build the dataset that ``cfg`` describes, from ``corpus`` or the default corpus, under ``root``.

    ``tokenizer``: a file, or a folder that has one; without it the build trains a tokenizer on the text.
    """
    from data_pipeline.build import build

    return build(
        corpus,
        root,
        options_of(cfg, _name(cfg, corpus)),
        cache=root / "cache",
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        sources_file=None if cfg.data.sources is None else Path(cfg.data.sources),
    )


def _name(cfg: RunConfig, corpus: Path | None) -> str | None:
    """A user's own text is called after its folder or file, or the file that lists its sources; None: data.name."""
    own = corpus or (None if cfg.data.sources is None else Path(cfg.data.sources))
    return None if own is None else own.resolve().stem


def prepared(cfg: RunConfig, built: BuiltData) -> dict[str, Any]:
    """What a run's ``data.json`` says about its dataset; builds the retrieval index if ``cfg`` asks for one."""
    entry: dict[str, Any] = {"folder": str(built.folder.resolve()), "digest": built.manifest["content_sha256"]}
    retrieval = cfg.relation.retrieval
    if retrieval.enabled:
        from data_pipeline.retrieval.build import build_index

        folder, index = build_index(built.folder, retrieval.chunk, retrieval.dim)
        entry["retrieval"] = {"folder": str(folder.resolve()), "digest": index.digest}
    return entry


def data_of(folder: RunFolder) -> dict[str, Any]:
    """The run's ``data.json``. Raises ``DataError`` where it is missing: an imported model has no dataset."""
    try:
        content: dict[str, Any] = json.loads(folder.data.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder.path} has no dataset (data.json is missing): a model that convert wrote is continued with "
            f"refractor pretrain --weights {folder.path}, and the new run can be evaluated."
        ) from None
    return content


def open_index(folder: RunFolder, cfg: RunConfig) -> RetrievalIndex | None:
    """The run's retrieval index, checked against the digest it was prepared for; None where the tier is off."""
    if not cfg.relation.retrieval.enabled:
        return None
    from data_pipeline.retrieval.index import RetrievalIndex

    data = data_of(folder)["retrieval"]
    index = RetrievalIndex.load(Path(data["folder"]))
    if index.digest != data["digest"]:
        raise DataError(
            f"{data['folder']} has digest {index.digest}, the run was prepared for {data['digest']}: "
            "restore that index or start another run with --out."
        )
    return index


def neighbours_of(cfg: RunConfig, index: RetrievalIndex) -> Neighbours:
    """What chooses records for the batches of a run. Raises ``DataError`` for a source that the index does not know."""
    from data_pipeline.retrieval.guard import Guard
    from data_pipeline.retrieval.neighbours import Neighbours

    keys = cfg.relation.retrieval
    return Neighbours(index, Guard(keys.sigma_min, keys.t_max_s, keys.trust_min, keys.sources), keys.fan_in)


def training_stream(folder: RunFolder, cfg: RunConfig) -> Stream:
    """The run's training samples, checked against the digest it was prepared for.

    Where the dataset has stages, those of the stage of train.seq_len tokens.
    """
    data = data_of(folder)
    return _of_run(open_stage(Path(data["folder"]), cfg.train.seq_len, cfg.train.seed), data)


def heldout_stream(folder: RunFolder, cfg: RunConfig) -> SampleStream:
    """The held-out text of the run's dataset in windows, checked likewise."""
    data = data_of(folder)
    return _of_run(SampleStream(Path(data["folder"]), cfg.train.seq_len, cfg.train.seed, "heldout"), data)


def _of_run(stream: S, data: dict[str, Any]) -> S:
    if stream.digest != data["digest"]:
        raise DataError(
            f"{data['folder']} has digest {stream.digest}, the run was prepared for {data['digest']}: "
            "restore that dataset or start another run with --out."
        )
    return stream


def add_corpus_flags(parser: argparse.ArgumentParser, preset: str) -> None:
    """The flags that choose configuration and text: ``--preset --corpus --data-root`` and Hydra overrides."""
    parser.add_argument("--preset", default=preset, help=f"experiment preset (default: {preset})")
    parser.add_argument("--corpus", type=Path, help="folder or file of .txt .md .rst .html .jsonl[.zst|.gz] .parquet")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of built datasets (default: data)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to encode with (default: train one on the text)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. train.optimizer.lr=1e-3")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data build`` and ``data inspect``."""
    actions = subparsers.add_parser("data", help="build a dataset and look into it").add_subparsers(
        metavar="ACTION", required=True
    )
    build = actions.add_parser("build", help="text to tokens with receipts; prints the dataset's folder")
    add_corpus_flags(build, "pilot")
    build.set_defaults(run=build_dataset)
    add_inspect_parser(actions)
    add_report_parser(actions)
    verify = actions.add_parser("verify", help="compare every byte with the manifest; names each file at fault")
    verify.add_argument("folder", type=Path)
    verify.add_argument("--root", help="Merkle root (hex) that the folder must have")
    verify.set_defaults(run=verify_command)
    add_task_parser(actions)


def build_dataset(args: argparse.Namespace) -> int:
    """Build, or find, the dataset of a preset, and its retrieval index where the preset retrieves."""
    cfg = compose([f"experiment={args.preset}", *args.overrides])
    built = dataset_of(cfg, args.corpus, args.data_root, args.tokenizer)
    prepared(cfg, built)
    print(built.folder)
    return 0
