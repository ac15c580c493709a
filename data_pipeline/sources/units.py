"""Reading one unit of any source."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.sources.base import Item, Reading, Unit


def read_unit(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Documents and quarantined entries of ``unit``, in its order.

    Kinds: ``files`` (of a user's), ``deb`` (every n-th member of a package), ``python`` (files of a distribution).
    Raises ``DataError`` naming a file that has gone, changed or cannot be read.
    """
    from data_pipeline.sources import debs, files, python_dists

    readers = {"files": files.read_files, "deb": debs.read_deb, "python": python_dists.read_python}
    return readers[unit["kind"]](unit, reading)
