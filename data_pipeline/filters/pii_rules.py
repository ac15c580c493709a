"""What counts as personal data or a secret: one versioned rule for each kind, patterns that RE2 matches in linear time.

Patterns work on bytes, so invalid UTF-8 is text like any other. RE2 has no look-around: what may stand before and after
a match, checksums and exceptions are checked in Python, on the few candidates. Reserved and documentation values are
nobody's and stay: RFC 2606 domains, 555-01xx numbers, private, loopback, documentation and other special addresses,
card numbers that payment firms publish for tests, AWS's ``...EXAMPLE`` keys. Not found: addresses spelled "name at
host", names, postal addresses, numbers written without separators and without a word such as "tel." before them.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import re2

#: Start and end of a match within a document (bytes).
Span = tuple[int, int]

_WORD = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_DIGITS = frozenset(b"0123456789")


@dataclass(frozen=True)
class Rule:
    """``find`` yields the spans of one kind in a document; ``name`` with its version goes into audit rows."""

    kind: str
    name: str
    placeholder: bytes
    find: Callable[[bytes], Iterator[Span]]


def _compiled(pattern: bytes) -> Any:
    """A pattern over bytes; RE2 takes text for UTF-8 unless told, and finds nothing next to bytes that are not."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    return re2.compile(pattern, options)


def _before(data: bytes, at: int) -> int:
    """The byte before ``at``, 0 at the start."""
    return data[at - 1] if at else 0


def _after(data: bytes, at: int) -> int:
    """The byte at ``at``, 0 at the end."""
    return data[at] if at < len(data) else 0


# --- e-mail addresses -----------------------------------------------------------------------------------------------

_EMAIL = _compiled(rb"[A-Za-z0-9._%+\-]+@((?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z][A-Za-z]+)")
_LOCAL_MOST, _DOMAIN_MOST, _LABEL_MOST = 64, 255, 63  # bytes; RFC 5321, RFC 1035
#: RFC 2606 and 6761: never anybody's.
_RESERVED_TLDS = frozenset({"example", "invalid", "localhost", "test", "local", "internal"})
_RESERVED_DOMAINS = frozenset({"example.com", "example.net", "example.org", "example.edu"})
#: Not in the root zone, but common after "@": icon@2x.png, getty@tty1.service.
_FILE_KINDS = (
    "png jpg jpeg gif svg webp bmp ico css js json html htm xml txt yaml yml toml service socket timer target mount"
    " slice device path"
)
_FILE_ENDINGS = frozenset(_FILE_KINDS.split())


def _emails(data: bytes) -> Iterator[Span]:
    for match in _EMAIL.finditer(data):
        start, end = match.span()
        while start < end and data[start] in b".%+-":  # punctuation that came before the address
            start += 1
        labels = data[match.start(1) : end].decode("ascii").lower().split(".")
        if labels[-1] in _RESERVED_TLDS | _FILE_ENDINGS or ".".join(labels[-2:]) in _RESERVED_DOMAINS:
            continue
        local = data[start : match.start(1) - 1]
        if len(local) > _LOCAL_MOST or end - match.start(1) > _DOMAIN_MOST or max(map(len, labels)) > _LABEL_MOST:
            continue
        if not local or (local == b"git" and _after(data, end) in b":/"):  # a repository's address, not a person's
            continue
        yield start, end


# --- IP addresses ---------------------------------------------------------------------------------------------------

_IPV4 = _compiled(rb"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}")
_IPV6 = _compiled(rb"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:.]{2,42}")
_VERSION = _compiled(
    rb"(?i)(?:version|release|revision|firmware|driver|build|ver\.?|rev\.?|section|chapter|\xc2\xa7)[ :=]*$"
)
#: Public resolvers and the like: everybody's.
_EVERYBODYS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220"})
#: Four parts all below this are taken for a version or section number; of real addresses that loses 1 in 27 000.
_SMALL = 20


def _public(text: str) -> bool:
    """Whether ``text`` is an address of one host on the public Internet."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _ipv4(data: bytes) -> Iterator[Span]:
    for match in _IPV4.finditer(data):
        start, end = match.span()
        left, right = _before(data, start), _after(data, end)
        if left in _WORD or left in b".-" or right in _WORD or right == 0x2D:
            continue
        if right == 0x2E and _after(data, end + 1) in _WORD:  # a longer dotted number, or a version: 2.20.1.155.g426
            continue
        if left == 0x2F and _before(data, start - 1) in _WORD:  # Product/1.2.3.4
            continue
        if right == 0x2F and _after(data, end + 1) in _DIGITS:  # a network, not a host
            continue
        text = match.group().decode("ascii")
        small = all(int(part) < _SMALL for part in text.split("."))
        if small or text.endswith(".0") or text in _EVERYBODYS or not _public(text):
            continue
        if not _VERSION.search(data[max(0, start - 16) : start]):
            yield start, end


def _ipv6(data: bytes) -> Iterator[Span]:
    for match in _IPV6.finditer(data):
        start, end = match.span()
        while end > start and data[end - 1] in b":." and data[end - 2 : end] != b"::":
            end -= 1
        if _before(data, start) in _WORD or _before(data, start) == 0x3A or _after(data, match.end()) in _WORD:
            continue
        network = _after(data, end) == 0x2F and _after(data, end + 1) in _DIGITS
        if not network and _public(data[start:end].decode("ascii")):
            yield start, end


def _addresses(data: bytes) -> Iterator[Span]:
    yield from _ipv4(data)
    yield from _ipv6(data)


# --- telephone numbers ----------------------------------------------------------------------------------------------

_GAP = rb"[ .\-/()]{0,2}"
_INTERNATIONAL = _compiled(rb"\+[1-9](?:" + _GAP + rb"[0-9]){7,15}")
_NATIONAL = _compiled(
    rb"(?:1[ .\-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.\-])[2-9][0-9]{2}[.\-][0-9]{4}"  # North America
    rb"|0[1-9](?: [0-9]{2}){4}|0[1-9](?:\.[0-9]{2}){4}"  # France
    rb"|\(?0[0-9]{1,4}\)?[\- ][0-9]{1,4}-[0-9]{4}"  # Japan
    rb"|\(?0[1-9][0-9]{1,4}\)? ?/ ?[0-9]{5,8}"  # Germany, Austria
    rb"|8[ \-]?\([3489][0-9]{2}\) ?[0-9]{3}-[0-9]{2}-[0-9]{2}"  # Russia
)
_ANNOUNCED = _compiled(
    rb"(?i)(?:^|[^A-Za-z])(?:tele(?:phone|fon)|phone|tel|mobile|mob|handy|fax|whatsapp|t\xc3\xa9l\xc3\xa9phone|t\xc3\xa9l"
    + "|Телефон|телефон|Тел|тел|Факс|факс|電話|电话|手机|携帯".encode()
    + rb")(?: (?:number|no|nr))?(?:[ .:=#]|\xef\xbc\x9a){1,4}(\(?[0-9](?:"
    + _GAP
    + rb"[0-9]){6,14})"
)
#: ITU E.164: first digits of assigned country codes (of three-digit codes the first two).
_CODES = (
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65"
    " 66 81 82 84 86 90 91 92 93 94 95 98 21 22 23 24 25 26 29 35 37 38 42 50 59 67 68 69 80 85 87 88 96"
    " 97 99"
)
_COUNTRIES = frozenset(_CODES.split())
_DATE = _compiled(rb"^(?:(?:19|20)[0-9]{2}[./\-][0-9]{2}[./\-][0-9]{2}|[0-9]{2}[./\-][0-9]{2}[./\-](?:19|20)[0-9]{2})")
#: Two hexadecimal digits beside a number in pairs: bytes written out, "F0 00 05 80 00 00 27 0A".
_DUMP_BEFORE = _compiled(rb"(?:[0-9][0-9A-Fa-f]|[A-Fa-f][0-9])\s$")
_DUMP_AFTER = _compiled(rb"^\s(?:[0-9][0-9A-Fa-f]|[A-Fa-f][0-9])")


def _digits(text: bytes) -> str:
    return bytes(c for c in text if c in _DIGITS).decode("ascii")


def _in_dump(data: bytes, start: int, end: int) -> bool:
    return bool(_DUMP_BEFORE.search(data[max(0, start - 3) : start]) or _DUMP_AFTER.search(data[end : end + 3]))


def _fiction(digits: str) -> bool:
    """A North American 555-01xx number, kept free for fiction and examples."""
    return len(digits) in (7, 10, 11) and digits[-7:-2] == "55501"


def _assigned(number: str, separated: bool) -> bool:
    """Whether international ``number`` (digits after the plus) can exist."""
    if number[0] == "1":
        return len(number) == 11 and number[1] in "23456789" and number[4] in "23456789" and not _fiction(number)
    known = number[0] == "7" or number[:2] in _COUNTRIES
    return known and (8 if separated else 10) <= len(number) <= 15


def _phones(data: bytes) -> Iterator[Span]:
    done = 0  # end of the number before: it may touch the next one, or a row of numbers would take a pass for each
    for match in _INTERNATIONAL.finditer(data):
        start, end = match.span()
        left, right = _before(data, start), _after(data, end)
        clear = start == done or (left not in _WORD and left != 0x2B)
        number = _digits(match.group())
        if clear and right not in _WORD and _assigned(number, separated=len(number) + 1 < end - start):
            yield start, end
            done = end
    done = 0
    for match in _NATIONAL.finditer(data):
        start, end = match.span()
        left, right = _before(data, start), _after(data, end)
        clear = start == done or (left not in _WORD and left not in b".-/+")
        if not clear or right in _WORD or (right in b".-" and _after(data, end + 1) in _WORD):
            continue
        if data[start + 2] == 0x20 and _in_dump(data, start, end):  # in pairs, as in France
            continue
        number = _digits(match.group())
        if not _fiction(number) and (number[0] != "0" or 9 <= len(number) <= 12):
            yield start, end
            done = end
    for match in _ANNOUNCED.finditer(data):
        start, end = match.span(1)
        if (
            _after(data, end) not in _WORD
            and not _DATE.search(match.group(1))
            and not _fiction(_digits(match.group(1)))
        ):
            yield start, end


# --- payment cards --------------------------------------------------------------------------------------------------

_NUMBERS = _compiled(rb"[0-9](?:[ \-]?[0-9]){12,}")
_SHAPES = ((4, 4, 4, 4, 3), (4, 4, 4, 4), (4, 6, 5), (4, 6, 4))
#: Numbers that payment firms publish for tests.
_PUBLISHED = (
    "4111111111111111 4242424242424242 4012888888881881 4000056655665556 5555555555554444"
    " 5105105105105100 2223003122003222 5200828282828210 378282246310005 371449635398431 378734493671000"
    " 6011111111111117 6011000990139424 30569309025904 38520000023237 3056930009020004 3566002020360505"
    " 3530111333300000 6200000000000005"
)
_TEST_CARDS = frozenset(_PUBLISHED.split())


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) << (place & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _issued(digits: str) -> bool:
    """Whether a known issuer has numbers with these first digits and this length (ISO/IEC 7812)."""
    size, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    if digits[0] == "4":
        return size in (13, 16, 19)  # Visa
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return size == 16  # Mastercard
    if two in (34, 37):
        return size == 15  # American Express
    if 300 <= three <= 305 or two in (36, 38, 39):
        return size in (14, 16, 19)  # Diners Club
    return 16 <= size <= 19 and (four == 6011 or 644 <= three <= 649 or two in (62, 65) or 3528 <= four <= 3589)


def _card(digits: str) -> bool:
    return _issued(digits) and _luhn(digits) and digits not in _TEST_CARDS


def _cards(data: bytes) -> Iterator[Span]:
    for match in _NUMBERS.finditer(data):
        start, end = match.span()
        if _before(data, start) in _WORD or _after(data, end) in _WORD:
            continue
        groups = match.group().decode("ascii").replace("-", " ").split(" ")
        starts = [start]
        for group in groups:
            starts.append(starts[-1] + len(group) + 1)
        first = 0
        while first < len(groups):
            taken = _groups_of_card(groups[first : first + 5])
            if taken:
                yield starts[first], starts[first + taken] - 1
            first += max(1, taken)


def _groups_of_card(groups: list[str]) -> int:
    """How many of ``groups`` of digits, from the first, are a card number; 0 for none."""
    if 13 <= len(groups[0]) <= 19:
        return int(_card(groups[0]))
    sizes = tuple(map(len, groups))
    for shape in _SHAPES:
        if sizes[: len(shape)] == shape and _card("".join(groups[: len(shape)])):
            return len(shape)
    return 0


# --- keys and other secrets -----------------------------------------------------------------------------------------

_TOKEN = _compiled(
    rb"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    rb"|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_\-]{20,}"  # GitHub, GitLab
    rb"|xox[abeoprs]-[A-Za-z0-9\-]{15,}|AIza[A-Za-z0-9_\-]{35}"  # Slack, Google
    rb"|sk-[A-Za-z0-9_\-]{20,}|[rs]k_live_[A-Za-z0-9]{16,}"  # OpenAI and others, Stripe
    rb"|npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_\-]{40,}|hf_[A-Za-z0-9]{30,}"
    rb"|eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}"  # JSON web token
)
_LONG_PART = _compiled(rb"[A-Za-z0-9]{16}")
_ASSIGNED = _compiled(
    rb"(?i)(?:api[_\-]?key|secret[_\-]?key|access[_\-]?key|client[_\-]?secret|(?:access|auth|private)[_\-]?token|passw(?:or)?d"
    rb"|secret)[\"']?[ \t]{0,4}(?:=|:|=>|:=)[ \t]{0,4}[\"']?([A-Za-z0-9_\-+/=.]{16,})"
)
#: A block with its end, or, where the end is cut off, lines of base64 alone: what follows may be prose.
_PEM = _compiled(
    rb"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    rb"((?:[A-Za-z0-9+/=:,. \t\r\n\\]|-[A-Za-z0-9])*-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    rb"|(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{16,})+)"
)
#: What makes a block a key and not a drawing of one.
_PEM_LINE = _compiled(rb"[A-Za-z0-9+/=]{16,}")


def _mixed(text: bytes) -> bool:
    """Whether both letters and digits occur: chance leaves out digits in less than 1 % of long keys, words always
    do."""
    return any(c in _DIGITS for c in text) and any(c in _WORD and c not in _DIGITS and c != 0x5F for c in text)


def _random(text: bytes) -> bool:
    """Whether ``text`` has the entropy of a random value: bits a character, over 3.0 if hexadecimal, else over 3.5.

    Values of 16 characters cannot pass 4.0, hence not the 4.5 that scanners of source code use for long base64 strings.
    """
    total = len(text)
    entropy = -sum(n / total * math.log2(n / total) for n in Counter(text).values())
    return entropy > (3.0 if all(c in b"0123456789abcdefABCDEF-" for c in text) else 3.5)


def _keys(data: bytes) -> Iterator[Span]:
    for match in _PEM.finditer(data):
        if any(_mixed(line) for line in _PEM_LINE.findall(match.group(1))):
            yield match.span()
    done = 0  # as in ``_phones``
    for match in _TOKEN.finditer(data):
        value = match.group()
        if value.startswith(b"sk-") and not _LONG_PART.search(value):  # sk-ssh-ed25519-cert-v01 is a kind of key
            continue
        clear = match.start() == done or _before(data, match.start()) not in _WORD
        if clear and _mixed(value) and not value.endswith(b"EXAMPLE"):
            yield match.span()
            done = match.end()
    for match in _ASSIGNED.finditer(data):
        value = match.group(1)
        if _mixed(value) and _random(value) and not value.upper().rstrip(b"=").endswith((b"EXAMPLE", b"EXAMPLEKEY")):
            yield match.span(1)


#: In order of precedence: where spans overlap, the earlier rule takes the text.
RULES = (
    Rule("key", "pii-key/1", b"<KEY>", _keys),
    Rule("email", "pii-email/1", b"<EMAIL>", _emails),
    Rule("card", "pii-card/1", b"<CARD>", _cards),
    Rule("ip", "pii-ip/1", b"<IP>", _addresses),
    Rule("phone", "pii-phone/1", b"<PHONE>", _phones),
)
