"""Where text comes from: a user's files, or the default corpus (Debian documentation, else Python distributions)."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.output import write_atomically
from data_pipeline.progress import Log
from data_pipeline.sources.base import Source
from refractor_megatron.errors import DataError


def open_sources(corpus: Path | None, cache: Path, log: Log) -> list[Source]:
    """Sources of ``corpus``, or of the default corpus if it is ``None``.

    The first choice of a default corpus is remembered in ``cache`` and kept, so that a machine which is offline for a
    moment does not silently change to other text.
    """
    if corpus is not None:
        return _user_sources(corpus, cache)
    return _default_sources(cache, log)


def _user_sources(corpus: Path, cache: Path) -> list[Source]:
    from data_pipeline.sources.files import file_sources
    from data_pipeline.sources.fingerprint import Fingerprints

    fingerprints = Fingerprints(cache)
    sources = file_sources(Path(corpus), fingerprints)
    fingerprints.save()
    return sources


def _default_sources(cache: Path, log: Log) -> list[Source]:
    from data_pipeline.sources import debian, python_dists

    choice = cache / "default-corpus.json"
    remembered = _remembered(choice)
    if remembered != "python":
        try:
            sources = debian.debian_sources(cache / "debian", log)
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
