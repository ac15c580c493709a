"""The Merkle tree against the reference vectors of RFC 6962's logs and a tree written straight from the RFC."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.receipts.merkle import leaf_hash, node_hash, proof, root, verify_proof

#: Leaves and roots of the test vectors of google/certificate-transparency (merkle_tree_test.cc), in hex.
LEAVES = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
#: Paths of the same vectors: (leaf, size of the tree), from 1, and the hashes.
PATHS = {
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (3, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (2, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def tree(leaves: list[bytes]) -> bytes:
    """MTH, word for word from section 2.1 of the RFC."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + tree(leaves[:split]) + tree(leaves[split:])).digest()


def path(index: int, leaves: list[bytes]) -> list[bytes]:
    """PATH, word for word from section 2.1.1 of the RFC."""
    if len(leaves) == 1:
        return []
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    if index < split:
        return [*path(index, leaves[:split]), tree(leaves[split:])]
    return [*path(index - split, leaves[split:]), tree(leaves[:split])]


def test_empty_tree() -> None:
    assert root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("count", range(1, 9))
def test_roots_of_the_reference_vectors(count: int) -> None:
    assert root([bytes.fromhex(leaf) for leaf in LEAVES[:count]]).hex() == ROOTS[count - 1]


@pytest.mark.parametrize(("place", "expected"), PATHS.items())
def test_paths_of_the_reference_vectors(place: tuple[int, int], expected: list[str]) -> None:
    leaf, count = place
    leaves = [bytes.fromhex(one) for one in LEAVES[:count]]
    found = proof(leaves, leaf - 1)
    assert [one.hex() for one in found] == expected
    assert verify_proof(leaves[leaf - 1], leaf - 1, count, found, bytes.fromhex(ROOTS[count - 1]))


@given(st.lists(st.binary(max_size=40), max_size=70))
def test_root_is_that_of_the_definition(leaves: list[bytes]) -> None:
    assert root(leaves) == tree(leaves)


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=70), st.data())
def test_path_is_that_of_the_definition_and_proves_its_leaf_only(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    found, whole = proof(leaves, index), root(leaves)
    assert found == path(index, leaves)
    assert verify_proof(leaves[index], index, len(leaves), found, whole)
    assert not verify_proof(leaves[index] + b"x", index, len(leaves), found, whole)
    assert not verify_proof(leaves[index], index, len(leaves), found, whole[::-1])
    assert not verify_proof(leaves[index], index, len(leaves), [*found, whole], whole)
    other = data.draw(st.integers(-1, len(leaves) + 1))
    if other != index and (other < 0 or other >= len(leaves) or leaves[other] != leaves[index]):
        assert not verify_proof(leaves[index], other, len(leaves), found, whole)
    if found:
        cut = data.draw(st.integers(0, len(found) - 1))
        assert not verify_proof(leaves[index], index, len(leaves), found[:cut] + found[cut + 1 :], whole)
        bit = data.draw(st.integers(0, 255))
        flipped = (int.from_bytes(found[cut], "big") ^ 1 << bit).to_bytes(32, "big")
        assert not verify_proof(leaves[index], index, len(leaves), [*found[:cut], flipped, *found[cut + 1 :]], whole)


def test_a_node_does_not_pass_for_a_leaf() -> None:
    leaves = [b"a", b"b", b"c", b"d"]
    pairs = [leaf_hash(leaves[i]) + leaf_hash(leaves[i + 1]) for i in (0, 2)]
    assert root(pairs) != root(leaves)  # it would be, without the prefixes
    assert node_hash(leaf_hash(b"a"), leaf_hash(b"b")) == root([b"a", b"b"])


def test_last_leaf_is_not_doubled() -> None:
    assert root([b"a", b"b", b"c"]) != root([b"a", b"b", b"c", b"c"])
