"""The ledger: what was read, what was written, and proof that nothing was lost, doubled or made up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ...errors import CheckpointError

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Line:
    """One entry: these source tensors became these target tensors."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    shape: tuple[int, ...]  # of the Megatron side


@dataclass
class Ledger:
    """Every source tensor is consumed exactly once and every target tensor produced exactly once.

    ``sources`` and ``targets`` are what the table demands, by name, with shapes. Whatever differs is a
    ``CheckpointError`` that names the tensor, raised before anything is published.
    """

    source: str  # for messages: the folder that is read
    sources: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, tuple[int, ...]]
    optional: frozenset[str] = frozenset()  # sources that may be missing: padding rows
    lines: list[Line] = field(default_factory=list)
    #: Tensors of the source that are no weights of this model, by name, with the reason they stay behind.
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # what was given up by request, in words
    _consumed: set[str] = field(default_factory=set)
    _produced: set[str] = field(default_factory=set)

    def check_found(self, found: Mapping[str, tuple[int, ...]], demanded: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the tensors of the source, by name and shape, with those demanded, before anything is read.

        Raises:
            CheckpointError: names the tensor that is missing, superfluous, or of another shape.
        """
        for name, shape in demanded.items():
            if name not in found:
                if name in self.optional:
                    continue
                raise CheckpointError(
                    f"tensor {name} is missing in {self.source}, and its configuration asks for it: "
                    "give the whole checkpoint, or the configuration that belongs to it."
                )
            if tuple(found[name]) != shape:
                raise CheckpointError(
                    f"tensor {name} of {self.source} has shape {list(found[name])} and its configuration asks for "
                    f"{list(shape)}: configuration and weights disagree."
                )
        extra = sorted(set(found) - set(demanded))
        if extra:
            more = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
            raise CheckpointError(
                f"tensor {extra[0]}{more} of {self.source} has no place in the model of its configuration: "
                "configuration and weights disagree."
            )

    def record(self, sources: Iterable[str], targets: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
        """Enter one conversion: ``targets`` by name with the shapes that were really written."""
        sources = tuple(sources)
        for name in sources:
            self._once(name, self.sources, self._consumed, "read")
        for name, found in targets.items():
            self._once(name, self.targets, self._produced, "written")
            if tuple(found) != self.targets[name]:
                raise CheckpointError(
                    f"tensor {name} would be written with shape {list(found)}, its place is {list(self.targets[name])}."
                )
        self.lines.append(Line(sources, tuple(targets), shape))

    def close(self) -> None:
        """Everything that the table demands was read and written."""
        for demanded, done, verb in (
            (set(self.sources) - self.optional, self._consumed, "read"),
            (set(self.targets), self._produced, "written"),
        ):
            missing = sorted(demanded - done)
            if missing:
                raise CheckpointError(f"tensor {missing[0]} was never {verb} ({len(missing)} in all): nothing is kept.")

    def text(self) -> str:
        """The ledger as a table, one line for each entry."""
        rows = [(" + ".join(x.sources), " + ".join(x.targets), "×".join(map(str, x.shape))) for x in self.lines]
        width = max((len(row[0]) for row in rows), default=0)
        out = [f"{source:<{width}}  ->  {target}  [{shape}]" for source, target, shape in rows]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        out += [f"left behind, {reason}: {len(names)} ({names[0]} ...)" for reason, names in reasons.items()]
        out += self.notes + self.dropped
        out.append(f"{len(self._consumed)} tensors read once, {len(self._produced)} written once")
        return "\n".join(out)

    @staticmethod
    def _once(name: str, demanded: Mapping[str, tuple[int, ...]], done: set[str], verb: str) -> None:
        if name not in demanded:
            raise CheckpointError(f"tensor {name} was {verb} and has no place in the table.")
        if name in done:
            raise CheckpointError(f"tensor {name} was {verb} twice.")
        done.add(name)
