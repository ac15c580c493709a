"""Which Debian packages make up the default corpora, by name and version pattern; what apt offers decides the rest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """``pattern``: regular expression of the name; the ``newest`` versions of those that fit are taken.

    ``take``: globs of the files to read.
    """

    pattern: str
    take: tuple[str, ...]
    newest: int = 1


_MAN = ("./usr/share/man/*man*/*.gz",)
_HTML = ("*.html",)
_MAN_LANGUAGES = ("cs", "de", "es", "fr", "it", "ja", "nl", "pl", "pt-br", "ru", "tr", "uk", "zh")
_HELP_LANGUAGES = ("en-us", "de", "es", "fr", "it", "ja", "ko", "pl", "pt-br", "ru", "zh-cn")
_BOOK_LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "pt", "zh-cn")

#: English prose with some code; together about 45 MB of text in 31 MB of packages.
DEBIAN_DOCS = (
    Package("manpages", ("./usr/share/man/man*/*.gz",)),
    Package("manpages-dev", ("./usr/share/man/man*/*.gz",)),
    Package("debian-reference-en", ("*.en.html",)),
    Package("debian-policy", ("*/_sources/*.txt",)),
    Package("git-doc", ("*.txt",)),
    Package(r"python3\.\d+-doc", ("*/_sources/*.txt",)),
    Package(r"postgresql-doc-\d+", ("*/html/*.html",)),
    Package("python-django-doc", ("*/html/*.html",)),
    Package("libreoffice-help-en-us", ("*/text/*.html",)),
    Package("vim-doc", _HTML),
)
#: Manuals, help and books in 42 languages, some of them in two versions; about 410 MB of text in 234 MB of packages.
DEBIAN_MULTILINGUAL = (
    Package(
        r"linux-doc-\d+\.\d+",
        ("*/html/*.html", "*/Documentation/*.rst.gz", "*/Documentation/*.txt.gz", "*/ABI/*.gz"),
        newest=2,
    ),
    Package(r"libboost\d+\.\d+-doc", _HTML, newest=2),
    *(Package(f"libreoffice-help-{language}", ("*/text/*.html",)) for language in _HELP_LANGUAGES),
    Package("manpages", _MAN),
    Package("manpages-dev", _MAN),
    *(Package(f"manpages-{language}(-dev)?", _MAN, newest=2) for language in _MAN_LANGUAGES),
    *(Package(f"debian-reference-{language}", _HTML) for language in _BOOK_LANGUAGES),
    Package("gnome-user-docs", ("./usr/share/help/*.page",)),
    Package("debian-policy", ("*/_sources/*.txt",)),
    Package("git-doc", ("*.txt",)),
    Package(r"python3\.\d+-doc", ("*/_sources/*.txt", "*/html/*.html")),
    Package(r"postgresql-doc-\d+", ("*/html/*.html",)),
    Package("python-django-doc", ("*/html/*.html",)),
    Package("perl-doc", ("*.pod", *_MAN)),
    Package("sqlite3-doc", _HTML),
    Package("vim-doc", _HTML),
    Package("anarchism", ("*.html", "*.md.gz")),
)
CORPORA = {"debian-docs": DEBIAN_DOCS, "debian-multilingual": DEBIAN_MULTILINGUAL}
