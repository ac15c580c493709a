"""What the bytes of a build depend on besides text and options: this code and the libraries it runs."""

from __future__ import annotations

import functools
import importlib.metadata
import unicodedata

#: Raise when the same input and options would give other bytes: every stage and every dataset is then made anew.
CODE_VERSION = 4
#: Libraries that choose bytes: extraction, schemas, language, patterns, splitting and merging, files.
LIBRARIES = (
    "gigatoken",
    "google-re2",
    "jsonschema-rs",
    "numba",
    "numpy",
    "py3langid",
    "pyarrow",
    "resiliparse",
    "selectolax",
    "tiktoken",
    "tokenizers",
)


@functools.cache
def versions() -> dict[str, str]:
    """Version of this code, of Unicode's tables and of each of ``LIBRARIES``; "-" for one that is not installed."""
    found = {"code": str(CODE_VERSION), "unicode": unicodedata.unidata_version}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found
