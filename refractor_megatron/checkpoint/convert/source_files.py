"""``source_files/`` of an imported folder: configuration and files about text of its source, for the way back.

They are the source's only while the weights are: a run that was continued from an imported one has a folder of its own,
without them, and goes out with the tokenizer that it was trained with.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..manifest import file_record
from .foreign_config import CONFIG, Foreign

FOLDER, RECORD = "source_files", "source_files.json"
#: Ids in a ``config.json`` that say where texts begin and end.
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: Files about text that travel as they are.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Origin:
    """What an imported folder came from. ``rows``: vocabulary rows that the import added behind ``vocab_size``."""

    folder: Path
    family: str
    vocab_size: int
    rows: int
    ids: dict[str, Any]  # those of ID_KEYS that its config.json has

    def copy_texts(self, out: Path) -> None:
        """The source's own files about text, into a folder of its family."""
        for path in companions(self.folder):
            shutil.copyfile(path, out / path.name)


def companions(folder: Path) -> list[Path]:
    """Files about text in a model folder."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def keep(source: Path, model: Foreign, out: Path) -> None:
    """Copy the files of the foreign folder ``source`` into ``out/source_files``, and write down what they are."""
    (out / FOLDER).mkdir()
    for path in [source / CONFIG, *companions(source)]:
        shutil.copyfile(path, out / FOLDER / path.name)
    record = {
        "family": model.family,
        "vocab_size": model.cfg.model.vocab_size - model.rows,
        "rows": model.rows,
        "files": {path.name: file_record(path) for path in sorted((out / FOLDER).iterdir())},
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def carry(source: Path, out: Path, step: int) -> None:
    """Hand what one of our folders keeps of its source on to ``out``; nothing where it keeps none, or was trained."""
    if (origin := read(source, step)) is not None:
        shutil.copytree(origin.folder, out / FOLDER)
        shutil.copyfile(source / RECORD, out / RECORD)


def listed(folder: Path) -> list[str]:
    """Names of the files that ``folder`` keeps of its source.

    Raises:
        CheckpointError: the record of them is missing or damaged.
    """
    try:
        return list(json.loads((folder / RECORD).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECORD} is damaged ({str(error)[:80]}): import the model again.") from None


def read(folder: Path, step: int) -> Origin | None:
    """What ``folder`` keeps of its source; None where it was not imported, or where ``step`` says that it was trained.

    Raises:
        CheckpointError: a file of it is missing, damaged or altered.
    """
    kept = folder / FOLDER
    if step or not (kept.is_dir() or (folder / RECORD).exists()):
        return None
    try:
        record = json.loads((folder / RECORD).read_bytes())
        for name, expected in record["files"].items():
            if Path(name).name != name or file_record(kept / name) != expected:
                raise CheckpointError(f"{kept / name} is not what was imported: import the model again.")
        for path in kept.iterdir():
            if path.name not in record["files"]:
                raise CheckpointError(f"{path} was added after the import: move it elsewhere.")
        body = json.loads((kept / CONFIG).read_bytes())
        ids = {key: body[key] for key in ID_KEYS if key in body}
        return Origin(kept, str(record["family"]), int(record["vocab_size"]), int(record["rows"]), ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{kept} is damaged ({str(error)[:80]}): import the model again.") from None
