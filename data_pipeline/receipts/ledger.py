"""What became of every document in every step of a build: in = kept + dropped + quarantined, or the build fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


class BuildError(AssertionError):
    """A build contradicts itself: documents were lost or made. Our mistake, or someone else's hand in its files."""


@dataclass(frozen=True)
class Ledger:
    """Documents that entered a step ``name``, those kept, and the rest by reason. None exists that does not balance.

    Reasons without documents are left out. Raises ``BuildError`` for a sum that is off or a count below 0.
    """

    name: str
    entered: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("dropped", "quarantined"):
            counts: dict[str, int] = getattr(self, part)
            if any(count < 0 for count in counts.values()):
                raise BuildError(f"Step {self.name}: {part} {counts} has a count below 0.")
            object.__setattr__(self, part, {reason: n for reason, n in sorted(counts.items()) if n})
        dropped, quarantined = sum(self.dropped.values()), sum(self.quarantined.values())
        if self.kept < 0 or self.entered != self.kept + dropped + quarantined:
            raise BuildError(
                f"Step {self.name}: {self.entered} documents came in, but {self.kept} kept + {dropped} dropped + "
                f"{quarantined} quarantined are {self.kept + dropped + quarantined}; "
                f"dropped: {self.dropped}, quarantined: {self.quarantined}."
            )

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Ledger:
        """From the JSON object of a ledger, which may have other keys too. Raises ``BuildError`` if one is missing."""
        try:
            return cls(name, int(entry["in"]), int(entry["kept"]), dict(entry["dropped"]), dict(entry["quarantined"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BuildError(f"Step {name}: {dict(entry)} is no ledger ({error!r}).") from error

    @classmethod
    def sum(cls, name: str, entries: Iterable[Mapping[str, Any]]) -> Ledger:
        """One ledger of the ledgers of a step's tasks, each of which must balance."""
        entered = kept = 0
        dropped, quarantined = Counter[str](), Counter[str]()
        for number, entry in enumerate(entries):
            one = cls.of(f"{name}, task {number}", entry)
            entered, kept = entered + one.entered, kept + one.kept
            dropped.update(one.dropped)
            quarantined.update(one.quarantined)
        return cls(name, entered, kept, dict(dropped), dict(quarantined))

    def follow(self, previous: Ledger) -> Ledger:
        """This ledger, whose documents are those that ``previous`` kept. Raises ``BuildError`` otherwise."""
        if self.entered != previous.kept:
            raise BuildError(
                f"Step {self.name}: {self.entered} documents came in, but step {previous.name} kept {previous.kept}."
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """The JSON object, with the step's name."""
        return {
            "name": self.name,
            "in": self.entered,
            "kept": self.kept,
            "dropped": self.dropped,
            "quarantined": self.quarantined,
        }


def check_chain(entries: Iterable[Mapping[str, Any]]) -> list[Ledger]:
    """Ledgers of a build's JSON, in order of its steps. Raises ``BuildError`` where one does not balance or follow."""
    chain: list[Ledger] = []
    for entry in entries:
        one = Ledger.of(str(entry.get("name", len(chain))), entry)
        chain.append(one.follow(chain[-1]) if chain else one)
    return chain
