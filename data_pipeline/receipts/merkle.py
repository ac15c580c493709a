"""Merkle tree hashes and inclusion proofs as in RFC 6962, section 2.1, over SHA-256.

A leaf's hash is SHA-256(0x00 || leaf) and a node's SHA-256(0x01 || left || right), so that no node passes for a leaf; a
tree of n leaves splits at the largest power of two below n. What the leaves of a folder are, ``manifest.leaves`` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

#: Bytes of a hash.
SIZE = 32


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of a leaf."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """MTH of the RFC: the hash of the whole tree, 32 bytes; of no leaves, SHA-256 of the empty string."""
    return _root([leaf_hash(leaf) for leaf in leaves])


def proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """PATH of the RFC: the hashes that lead from leaf ``index`` to the root, nearest first."""
    assert 0 <= index < len(leaves)
    path, level = [], [leaf_hash(leaf) for leaf in leaves]
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        index, level = index // 2, _above(level)
    return path


def verify_proof(leaf: bytes, index: int, count: int, path: Sequence[bytes], expected: bytes) -> bool:
    """Whether ``path`` proves that ``leaf`` is number ``index`` of the ``count`` leaves of the tree ``expected``.

    The algorithm of RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < count:
        return False
    node, last, value = index, count - 1, leaf_hash(leaf)
    for sibling in path:
        if last == 0 or len(sibling) != SIZE:
            return False
        if node & 1 or node == last:
            value = node_hash(sibling, value)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            value = node_hash(value, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and value == expected


def _root(level: list[bytes]) -> bytes:
    if not level:
        return hashlib.sha256().digest()
    while len(level) > 1:
        level = _above(level)
    return level[0]


def _above(level: list[bytes]) -> list[bytes]:
    """The next level: pairs joined, an odd last one carried up. This is the split at the largest power of two."""
    pairs = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return pairs + level[-1:] if len(level) % 2 else pairs
