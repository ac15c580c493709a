"""``data inspect``: what is in a dataset folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refractor_megatron.distinction.roles import ROLES, MaskBit
from refractor_megatron.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from refractor_megatron.tokenizer import Tokenizer

_HEADS = 3
_HEAD_TOKENS = 48


def inspect_command(args: argparse.Namespace) -> int:
    """Verifies every file's sha256, then prints counts, sources, tokens by role and three sample heads."""
    from data_pipeline import manifest as manifests
    from data_pipeline.tables import sources_table
    from refractor_megatron.tokenizer import Tokenizer

    manifest = manifests.load(args.folder)
    manifests.verify(args.folder, manifest)
    tokenizer = Tokenizer.load(args.folder / "tokenizer.json")
    print(f"{args.folder}: intact, content sha256 {manifest['content_sha256'][:16]}, vocabulary {tokenizer.vocab_size}")
    for line in sources_table(json.loads((args.folder / "sources.json").read_bytes())):
        print(line)
    for split, counts in manifest["splits"].items():
        ratio = counts["bytes"] / counts["tokens"]
        print(f"{split}: {counts['documents']} documents, {counts['tokens']} tokens, {ratio:.2f} bytes/token")
        print(f"  tokens by role: {_by_role(args.folder / split)}")
    print("counts: " + ", ".join(f"{key} {value}" for key, value in manifest["counts"].items()))
    _print_heads(args.folder, manifest["splits"]["train"]["tokens"], tokenizer)
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Compares every byte of a folder with its manifest; one line for each file at fault, and exit code 3."""
    from data_pipeline.receipts.verify import verify_folder

    lines = verify_folder(args.folder, args.root, log=lambda line: print(line, file=sys.stderr))
    for line in lines:
        print(line)
    if lines:
        raise DataError(f"{args.folder} is damaged; restore it, or delete it and build it again.")
    root = json.loads((args.folder / "manifest.json").read_bytes()).get("merkle_root", "none: of an older version")
    print(f"{args.folder}: intact, Merkle root {root}")
    return 0


def _by_role(prefix: Path) -> str:
    import numpy as np

    from data_pipeline.pack.records import read_records

    spans = read_records(prefix).spans
    tokens = np.bincount(spans[:, 2], weights=spans[:, 0], minlength=len(ROLES)).astype(np.int64)
    return ", ".join(f"{role} {count}" for role, count in zip(ROLES, tokens, strict=True) if count)


def _print_heads(folder: Path, tokens: int, tokenizer: Tokenizer) -> None:
    from data_pipeline.stream import SampleStream

    stream = SampleStream(folder, min(_HEAD_TOKENS, tokens - 1), seed=0)
    for index in range(min(_HEADS, stream.samples_per_epoch)):
        sample = stream.sample(index)
        text = tokenizer.decode(sample.tokens.tolist(), show_specials=True).decode(errors="replace")
        print(f"sample {index}: {text!r}")
        for line in _runs(sample.records):
            print(f"  {line}")


def _runs(records: npt.NDArray[np.int32]) -> list[str]:
    """One line for each run of equal records."""
    import numpy as np

    starts = np.flatnonzero(np.any(np.diff(records, axis=0, prepend=-1) != 0, axis=1))
    ends = [*starts[1:].tolist(), len(records)]
    lines = []
    for start, end in zip(starts.tolist(), ends, strict=True):
        document, segment, role, bits = records[start].tolist()
        names = "|".join(str(bit.name) for bit in MaskBit if bits & bit) or "-"
        lines.append(f"tokens {start}..{end - 1}: document {document}, segment {segment}, {ROLES[role]}, bits {names}")
    return lines
