"""What a key means: everything the schema and the presets know about it, for ``refractor config explain``."""

from __future__ import annotations

from .convert import sections, unknown_key
from .resolve import PRESET_GROUP, groups, preset_values, presets
from .schema import as_text, brief, schema
from .tree import Leaf

_RESUME = {
    "fixed": "must stay the same: a checkpoint belongs to this value",
    "free": "may differ from the run that wrote the checkpoint",
}


def explain(key: str) -> str:
    """Some lines about a key, or one line for each key of a section. Raises ``ConfigError`` for an unknown key."""
    table = schema()
    if key in table:
        return _leaf_text(table[key])
    if key in sections() or key in groups():
        return _section_text(key)
    raise unknown_key(key, "config explain")


def _leaf_text(leaf: Leaf) -> str:
    bounds = f", {leaf.bounds}" if str(leaf.bounds) else ""
    unit = f", in {leaf.unit}" if leaf.unit else ""
    rows = [
        ("type", leaf.type_text + bounds + unit),
        ("default", brief(leaf.default)),
        ("presets", _preset_text(leaf)),
        ("defined in", f"section {leaf.section}" if leaf.section != "own" else "this implementation"),
        ("on resume", _RESUME[leaf.resume]),
        ("read by", _reader_text(leaf)),
    ]
    if leaf.limit is not None:
        low, high = leaf.limit
        rows.insert(3, ("section 16", f"{as_text(low)} to {as_text(high)}, an error unless limits=warn"))
    return "\n".join([leaf.key, f"  {leaf.meaning}", *(f"  {name:<11} {text}" for name, text in rows)])


def _preset_text(leaf: Leaf) -> str:
    """Presets grouped by value; those with the default value go unnamed."""
    by_value: dict[str, list[str]] = {}
    for preset in presets():
        value = preset_values(((PRESET_GROUP, preset),))[leaf.key]
        if value != leaf.default:
            by_value.setdefault(brief(value), []).append(preset)
    named = "; ".join(f"{value} in {', '.join(names)}" for value, names in by_value.items())
    return named or "the default in all of them"


def _reader_text(leaf: Leaf) -> str:
    if leaf.reserved:
        return "nothing in this version (reserved): it can only have its default value"
    if leaf.only_checked:
        return "the checks of the configuration only"
    return ", ".join(f"refractor_megatron.{module}" for module in leaf.readers)


def _section_text(section: str) -> str:
    below = [leaf for key, leaf in schema().items() if key.startswith(section + ".")]
    lines = [section]
    if section in groups():
        lines.append(f"  choose as a whole with {section}=CHOICE: {', '.join(groups()[section])}")
    width = max((len(leaf.key) for leaf in below), default=0)
    lines += [f"  {leaf.key:<{width}}  {leaf.meaning}" for leaf in below]
    return "\n".join(lines)
