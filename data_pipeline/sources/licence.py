"""Short licence names from a package's copyright file, best effort."""

from __future__ import annotations

import re

_FIELD = re.compile(r"^License:[ \t]*(\S[^\n]*)$", re.MULTILINE)
_SHORT = re.compile(r"[\w.+/-]+(?: (?:or|and|with) [\w.+/-]+){0,2}")
_COMMON = re.compile(r"/usr/share/common-licenses/([A-Za-z]+(?:-[0-9.]*[0-9])?)")
_TITLES = (
    ("PSF", re.compile(r"PSF LICENSE AGREEMENT|PYTHON SOFTWARE FOUNDATION LICENSE", re.IGNORECASE)),
    ("PostgreSQL", re.compile(r"Permission to use, copy, modify, and distribute this software and its documentation")),
    ("MIT", re.compile(r"Permission is hereby granted, free of charge")),
    ("BSD", re.compile(r"Redistribution and use in source and binary forms")),
)
_SHOWN = 3


def short_licence(copyright_text: str) -> str:
    """For example ``GPL-2 and 2 more``: the licence of the package's first file group, and how many others it names.

    Machine-readable files state it in ``License:`` fields; others are searched for well-known references and titles.
    """
    stated = (name.strip() for name in _FIELD.findall(copyright_text))
    names = [name for name in dict.fromkeys(stated) if _SHORT.fullmatch(name)]
    if not names:
        names = [title for title, pattern in _TITLES if pattern.search(copyright_text)]
        names += [name for name in dict.fromkeys(_COMMON.findall(copyright_text)) if name not in names]
    if not names:
        return "see copyright file"
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
