"""``refractor doctor``: what is present, what is missing, what that disables, and what would enable it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from .. import __version__
from .versions import Capability, probe_all


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor``."""
    text = "what is installed, what is missing, what that disables"
    parser = subparsers.add_parser("doctor", help=text, description=f"Show {text}, and what would enable it.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(run=lambda args: doctor(args.json))


def doctor(as_json: bool = False) -> int:
    """Print the state of this environment.

    Args:
        as_json: one JSON object ``{"version", "ok", "capabilities": [...]}`` instead of a table.

    Returns:
        0, or 1 when something required is missing.
    """
    capabilities = probe_all()
    missing = [c for c in capabilities if c.required and not c.present]
    if as_json:
        answer = {"version": __version__, "ok": not missing, "capabilities": [asdict(c) for c in capabilities]}
        print(json.dumps(answer, indent=2))
    else:
        print(f"refractor {__version__}")
        print("\n".join(table(capabilities)))
    for capability in missing:
        print(f"error: {sentence(capability)}", file=sys.stderr)
    return 1 if missing else 0


def sentence(capability: Capability) -> str:
    """One sentence on a missing capability, with the way out."""
    found = f" ({capability.found})" if capability.found else ""
    return f"{capability.name} is missing{found}, which disables {capability.disables}: {capability.remedy}."


def table(capabilities: list[Capability]) -> list[str]:
    """Aligned lines: state, name, what was found; under a missing one, what it disables and the remedy."""
    width = max(len(c.name) for c in capabilities)
    margin = " " * (width + 10)
    lines = []
    for c in capabilities:
        state = "ok" if c.present else "MISSING" if c.required else "-"
        lines.append(f"{state:<8}{c.name:<{width}}  {c.found or 'not installed'}")
        if not c.present:
            lines.append(f"{margin}disables: {c.disables}")
            lines.append(f"{margin}enable:   {c.remedy}")
    return lines
