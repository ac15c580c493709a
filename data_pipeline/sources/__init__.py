"""Where text comes from: a user's files, or a default corpus (Debian documentation, else Python distributions)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.output import write_atomically
from data_pipeline.progress import Log
from data_pipeline.sources.base import Source
from refractor_megatron.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.sources.fingerprint import Fingerprints

DEFAULT_CORPUS = "debian-docs"


def open_sources(
    corpus: Path | None, cache: Path, log: Log, *, name: str = DEFAULT_CORPUS, sources_file: Path | None = None
) -> list[Source]:
    """Sources of ``corpus``, or those that ``sources_file`` lists, or else of a default corpus.

    ``name`` chooses the default corpus where it names one (``debian-docs``, ``debian-multilingual``), else it is the
    first. The first choice between packages and their replacement is remembered in ``cache`` and kept, so that a
    machine which is offline for a moment does not silently change to other text.
    """
    if corpus is not None and sources_file is not None:
        raise DataError(f"Both --corpus {corpus} and data.sources={sources_file} are given; keep one of them.")
    from data_pipeline.sources.fingerprint import Fingerprints

    fingerprints = Fingerprints(cache)
    if corpus is not None:
        from data_pipeline.sources.files import file_sources

        sources = file_sources(Path(corpus), fingerprints)
    elif sources_file is not None:
        from data_pipeline.sources.sources_file import listed_sources

        sources = listed_sources(Path(sources_file), fingerprints)
    else:
        sources = _default_sources(cache, log, name, fingerprints)
    fingerprints.save()
    return sources


def _default_sources(cache: Path, log: Log, name: str, fingerprints: Fingerprints) -> list[Source]:
    from data_pipeline.sources import debian, python_dists
    from data_pipeline.sources.packages import CORPORA

    if name in CORPORA and name != DEFAULT_CORPUS:
        try:
            return debian.debian_sources(cache / "debian", log, CORPORA[name], f"receipt-{name}.json", fingerprints)
        except debian.Unavailable as reason:
            raise DataError(
                f"The packages of data.name={name} cannot be fetched here ({reason}); restore the network, or give "
                "--corpus or data.sources text of your own."
            ) from reason
    choice = cache / "default-corpus.json"
    remembered = _remembered(choice)
    if remembered != "python":
        try:
            sources = debian.debian_sources(
                cache / "debian", log, CORPORA[DEFAULT_CORPUS], "receipt.json", fingerprints
            )
        except debian.Unavailable as reason:
            if remembered == "debian":
                raise DataError(
                    f"The Debian packages of the first build cannot be fetched again ({reason}); "
                    f"restore the network, or delete {choice} to choose another corpus."
                ) from reason
            log(f"data: no Debian packages here ({reason}); using the text of the installed Python distributions")
        else:
            write_atomically(choice, json.dumps({"kind": "debian"}))
            return sources
    sources = python_dists.python_sources()
    write_atomically(choice, json.dumps({"kind": "python"}))
    return sources


def _remembered(choice: Path) -> str | None:
    """``debian``, ``python``, or ``None`` if nothing legible was written."""
    try:
        kind = json.loads(choice.read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if kind in ("debian", "python") else None
