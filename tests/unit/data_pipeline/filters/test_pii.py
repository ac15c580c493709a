"""What is personal and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.filters.pii import KINDS, RULE_NAMES, count, scrub
from data_pipeline.filters.pii_rules import RULES

_PEM = (
    b"-----BEGIN RSA PRIVATE KEY-----\n"
    + b"MIIEpAIBAAKCAQEA1b2c3d4e5f6g7h8i9j0kLmNoPqRsTuVwXyZ+/ABCDEF0123\n" * 3
    + b"-----END RSA"
    b" PRIVATE KEY-----"
)
PERSONAL = [
    ("email", b"jane.doe+lists@mail.host.de", b"write to %s."),
    ("email", b"jane@host.museum", "電子メール".encode() + b"%s\xe3\x80\x82"),
    ("email", b"x_y-z@sub-domain.co.uk", b"\xff<%s>"),
    ("ip", b"93.184.216.34", b"from %s, port 80"),
    ("ip", b"93.184.216.34", b"http://%s:8080/path"),
    ("ip", b"2a00:1450:4001:81b::200e", b"host [%s]:443"),
    ("phone", b"+49 30 1234567", b"call %s now"),
    ("phone", b"+12127365000", b"call %s now"),
    ("phone", b"(212) 736-5000", b"call %s now"),
    ("phone", b"212-736-5000", b"call %s 10 times"),
    ("phone", b"01 42 68 53 00", "joindre le %s à".encode()),
    ("phone", b"03-1234-5678", b"%s"),
    ("phone", b"0171/1234567", b"unter %s"),
    ("phone", b"8 (495) 123-45-67", b"%s"),
    ("phone", b"0301234567", b"Tel.: %s"),
    ("phone", b"0301234567", b"\xffFAX %s\xff"),
    ("phone", b"13812345678", "手机：".encode() + b"%s"),
    ("card", b"4539 1488 0343 6467", b"card %s"),
    ("phone", b"7654321", b"tel. %s"),  # the fewest digits, as the card after it and the key below
    ("card", b"4539148803433", b"card %s"),
    ("card", b"5425233430109903", b"card %s, valid"),
    ("card", b"3742-454554-00126", b"amex %s"),
    ("key", b"AKIAIOSFODNN7ABCDEFG", b"id %s"),
    ("key", b"ghp_" + b"a1B2" * 9, b"url https://%s@github.com"),
    ("key", b"xoxb-123456789012-abcdefABCDEF", b"%s"),
    ("key", b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N", b"Bearer %s"),
    ("key", b"f81d4fae7dec11d0a76500a0c91e6bf6", b'"api_key": "%s"'),
    ("key", b"a1B2c3D4e5F6g7H8", b"secret: '%s'"),
    ("key", b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzz", b"aws_secret_access_key = %s"),
    ("key", b"sk-proj-Ab3dEf6hIj9lMn2pQr5t_u8w", b"%s"),
    ("key", _PEM, b"-- \n%s\n"),
]
NOT_PERSONAL = [
    b"sk-ssh-ed25519-cert-v01, sk-ecdsa-sha2-nistp256-cert-v01",
    b"70 00 05 00 00 00 00 0A 0B; A1 B1 01\n02 01 02 01 02; git 2.20.1.155.g426; 130.155.0.0; 2001:e20:2000:40f::/64",
    b"jane@example.com, sales@shop.example.org, a@b.test, root@localhost",  # RFC 2606
    b"git@github.com:owner/name.git icon@2x.png getty@tty1.service lodash@4.17.21 @media",
    b"127.0.0.1 10.1.2.3 192.168.1.20 172.16.200.3 169.254.9.77 0.0.0.0 255.255.255.255 224.0.0.251 203.0.113.77",
    b"1.2.3.4, version 93.184.216.34, v93.184.216.34, Chrome/93.184.216.34, 93.184.216.34.5, 93.184.216.34-beta",
    b"93.184.216.0/24 and 01.02.03.04 and 12:34:56 and 2001:db8::1 and fe80::1 and 8.8.8.8 and 300.200.100.999",
    b"212-555-0123, +1 212 555 0199, 2011-02-03 2012-03-04, tel. 2011-02-03, 3.14159265358979, +10000000000",
    b"4111 1111 1111 1111, 4539 1488 0343 6468, 1234567890123456, 4539 14880343 6467",
    b"AKIAIOSFODNN7EXAMPLE, api_key = your-api-key-goes-here-now, password: aaaaaaaaaaaaaaaa1, secretary: none",
    b"-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    b"sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709 uuid 123e4567-e89b-12d3-a456-426614174000",
]


def _counted(data: bytes) -> dict[str, int]:
    flat = np.frombuffer(b"ab1" + data + b"@9", np.uint8)  # neighbours are no part of a document
    offsets = np.array([0, 3, 3 + len(data), len(flat)], np.int64)
    found = count(flat, offsets)
    assert all(column.dtype == np.int32 and column[0] == column[2] == 0 for column in found.values())
    return {kind: int(column[1]) for kind, column in found.items()}


@pytest.mark.parametrize(("kind", "value", "around"), PERSONAL)
def test_personal_data_are_counted_and_replaced(kind: str, value: bytes, around: bytes) -> None:
    data = around.replace(b"%s", value)
    assert _counted(data) == {**dict.fromkeys(KINDS, 0), kind: 1}
    assert scrub(data) == (
        around.replace(b"%s", next(rule.placeholder for rule in RULES if rule.kind == kind)),
        {**dict.fromkeys(KINDS, 0), kind: 1},
    )


@pytest.mark.parametrize("data", NOT_PERSONAL)
def test_what_only_looks_personal_stays(data: bytes) -> None:
    assert not any(_counted(data).values())
    assert scrub(data) == (data, dict.fromkeys(KINDS, 0))


def test_all_other_bytes_stay() -> None:
    data = b"\x80\xff jane@host.de\x00\xc3 93.184.216.34 \xe2\x82"
    assert scrub(data)[0] == b"\x80\xff <EMAIL>\x00\xc3 <IP> \xe2\x82"


def test_where_rules_overlap_the_secret_goes_whole() -> None:
    data = b"password=4539148803436467a+jane@host.de"
    assert scrub(data) == (b"password=<KEY>@host.de", {**dict.fromkeys(KINDS, 0), "key": 1})


def test_a_key_cut_short_goes_without_the_prose_after_it() -> None:
    start, line = b"-----BEGIN PRIVATE KEY-----", b"MIIEpAIBAAKCAQEA1b2c3d4e5f6g7h8i9j0kLmNoPqRsTuVwXyZ"
    data = b"%s\n%s\n%s\n[...] and so on, at length" % (start, line, line)
    assert scrub(data)[0] == b"<KEY>\n[...] and so on, at length"
    assert scrub(b'"%s\\n%s\\n"' % (start, line))[0] == b'"<KEY>\\n"'
    prose = start + b" begins a block. Its text is the key.\n"
    assert scrub(prose)[0] == prose


@pytest.mark.parametrize("piece", [b"+49 30 1234567", b"(212) 736-5000", b"AKIAIOSFODNN7ABCDEFG", b"jane@host.de "])
def test_rows_of_matches_take_no_pass_for_each(piece: bytes) -> None:
    """Passes over the text that grow with it would take hours for a long document of this kind."""
    kind = {b"+": "phone", b"(": "phone", b"A": "key", b"j": "email"}[piece[:1]]
    assert _counted(piece * 50)[kind] == scrub(piece * 50)[1][kind] == 50


def test_rules_are_named_with_version() -> None:
    assert {kind: f"pii-{kind}/1" for kind in KINDS} == RULE_NAMES


def test_no_documents() -> None:
    found = count(np.empty(0, np.uint8), np.zeros(1, np.int64))
    assert list(found) == list(KINDS) and all(len(column) == 0 for column in found.values())
