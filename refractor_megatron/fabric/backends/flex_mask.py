"""A plan as flex attention takes it: lists of key blocks for the kernel's loops, and a mask for its partial tiles.

The kernel walks tiles of ``block`` queries by ``block`` keys over a padded joint key space

    [ far keys | pad | tokens | tail ]      padded to whole tiles; nobody reads the padding

so that tokens start at a tile: local tiles then lie on the diagonal, and every shape is a multiple of 128, which is the
kernel's fast path. Tiles are classified by interval arithmetic (``block_map``); nothing here is quadratic in tokens.

Inside a partial tile each (row, key) asks ``mask_mod``, whose tables are tensors. Dynamo guards the code of the closure
and its captured numbers, and lifts captured tensors to inputs of the graph: another mask with equal table shapes runs
the compiled kernel. So tables come in few shapes (``INTERVALS``, and powers of two for bit tiles), and block lists are
always as wide as the key space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from refractor_megatron.distinction.intervals import IntArray, Rows, merged
from refractor_megatron.distinction.lowerings import BlockKind, block_map
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.fabric.joint import SampleKeys
from refractor_megatron.fabric.plan import MaskPlan

#: (sample, head, query, key) -> bool, over integer tensors.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: Table sizes, in intervals per row. Each interval costs two comparisons for every pair of a partial tile; above the
#: last size a bit per pair, looked up in tables, is cheaper and takes any number of intervals.
INTERVALS = (1, 2, 3, 4, 6, 8)
#: Lengths that are no multiple of this take the kernel's slow path, whatever the tile size.
_DIVISIBLE = 128
#: Fewest bit tiles of a table, so that small masks share one shape.
_FEWEST_TILES = 64


@dataclass(frozen=True)
class Geometry:
    """Sizes of the padded space: ``rows`` queries, ``n_far`` far keys, ``n_tokens`` token keys, tiles of ``block``."""

    rows: int
    n_far: int
    n_tokens: int
    block: int

    @property
    def padded_rows(self) -> int:
        """Queries with padding."""
        return self._up(self.rows)

    @property
    def first_token(self) -> int:
        """Position of token 0 in the padded key space."""
        return -(-self.n_far // self.block) * self.block

    @property
    def padded_keys(self) -> int:
        """Keys with padding."""
        return self._up(self.first_token + self.n_tokens)

    def _up(self, size: int) -> int:
        step = max(_DIVISIBLE, self.block)
        return -(-size // step) * step

    def pad_rows(self, q: Tensor) -> Tensor:
        """[b, h, rows, d] -> [b, h, padded_rows, d]."""
        return _joined([q, _zeros(q, self.padded_rows - self.rows)])

    def join_keys(self, far: Tensor | None, tokens: Tensor) -> Tensor:
        """[b, h, n_far, d] and [b, h, n_tokens, d] -> [b, h, padded_keys, d]; no copy where nothing is to be joined."""
        parts = [] if far is None else [far, _zeros(tokens, self.first_token - self.n_far)]
        tail = self.padded_keys - self.first_token - self.n_tokens
        return _joined([*parts, tokens, _zeros(tokens, tail)])

    def place(self, rows: Rows) -> Rows:
        """Joint-space intervals of a sample in the padded key space, adjacent ones joined."""
        assert not ((rows.lo < self.n_far) & (rows.hi > self.n_far)).any(), "an interval crosses into the tokens"
        shift = np.where(rows.lo >= self.n_far, self.first_token - self.n_far, 0)
        placed = Rows(rows.row, rows.lo + shift, rows.hi + shift)
        adjacent = (placed.row[1:] == placed.row[:-1]) & (placed.lo[1:] == placed.hi[:-1])
        return merged(placed.row, placed.lo, placed.hi) if adjacent.any() else placed


@dataclass(frozen=True, eq=False, repr=False)
class FlexMask:
    """The mask of one plan on one device.

    shape_class: all numbers that the compiled kernel depends on beside the shapes of q, k and v. partial_tiles,
    full_tiles: visited per head, over the batch. samples: the distinct samples, kept alive because a cache knows them
    by identity.
    """

    geometry: Geometry
    block_mask: BlockMask
    shape_class: tuple[str | int, ...]
    partial_tiles: int
    full_tiles: int
    samples: tuple[SampleKeys, ...]

    @property
    def visited_pairs(self) -> int:
        """(query, key) pairs that the kernel computes per head, masked ones included."""
        return (self.partial_tiles + self.full_tiles) * self.geometry.block**2

    def edges(self, sample: int, rows: IntArray) -> BoolTable:
        """bool [len(rows), n_far + n_tokens + padding]: the joint keys, then the padding, that the kernel lets rows of
        a sample read: everything in the full tiles that it visits, and what ``mask_mod`` allows in the partial ones.
        """
        joint, lists = self.geometry, self.block_mask
        table = sample if len(self.samples) > 1 else 0
        q, k = (torch.from_numpy(x).to(lists.kv_indices.device) for x in (rows, np.arange(joint.padded_keys)))
        legal = lists.mask_mod(q.new_tensor(table), q.new_tensor(0), q[:, None], k[None]).cpu().numpy()
        assert lists.full_kv_num_blocks is not None and lists.full_kv_indices is not None
        partial, full = (
            _listed(count[table, 0], index[table, 0])[rows // joint.block].repeat(joint.block, axis=1)
            for count, index in (
                (lists.kv_num_blocks, lists.kv_indices),
                (lists.full_kv_num_blocks, lists.full_kv_indices),
            )
        )
        seen = partial & legal | full
        tokens = slice(joint.first_token, joint.first_token + joint.n_tokens)
        gap, tail = seen[:, joint.n_far : tokens.start], seen[:, tokens.stop :]
        return np.concatenate([seen[:, : joint.n_far], seen[:, tokens], gap, tail], axis=1)


_of_plan: WeakKeyDictionary[MaskPlan, dict[tuple[torch.device, int], FlexMask]] = WeakKeyDictionary()
_of_samples: WeakValueDictionary[tuple[object, ...], FlexMask] = WeakValueDictionary()


def flex_mask(plan: MaskPlan, device: torch.device, block: int) -> FlexMask:
    """The plan's mask in tiles of ``block`` (a power of two, at least 32) on ``device``.

    Made once for a plan and shared by all layers and passes; plans whose samples are the same objects, as those of
    plain batches are, share it too. It lives as long as a plan that uses it.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    masks = _of_plan.setdefault(plan, {})
    found = masks.get((device, block))
    if found is None:
        shared = all(sample is plan.samples[0] for sample in plan.samples)
        samples = plan.samples[:1] if shared else plan.samples
        geometry = Geometry(plan.length, plan.n_far, plan.n_tokens, block)
        identity = (geometry, device, len(plan.samples), *map(id, samples))
        found = _of_samples.get(identity)
        if found is None:
            with torch.inference_mode(False):  # an evaluation's mask may serve training, which saves it for backward
                found = _of_samples[identity] = lower(samples, len(plan.samples), geometry, device)
        masks[device, block] = found
    return found


def lower(
    samples: tuple[SampleKeys, ...],
    batch: int,
    geometry: Geometry,
    device: torch.device,
    sizes: tuple[int, ...] = INTERVALS,
) -> FlexMask:
    """Lowers the distinct samples of a batch: one for all, or one for each. sizes: of interval tables, ascending."""
    block = geometry.block
    assert block >= 32 and block & (block - 1) == 0, f"tiles of {block}"
    assert len(samples) in (1, batch), (len(samples), batch)
    rows = [geometry.place(sample.rows) for sample in samples]
    shape = (geometry.padded_rows, geometry.padded_keys)
    kinds = np.stack([block_map(each, *shape, block, block).kind for each in rows])
    most = max((int(np.bincount(each.row).max()) for each in rows if len(each.row)), default=1)
    size = next((size for size in sizes if size >= most), None)
    per_sample = len(samples) > 1
    if size is not None:
        bounds = np.stack([interval_table(each, geometry.padded_rows, size) for each in rows])
        mod = _interval_mod(_on(bounds.reshape(-1), device), geometry.padded_rows, size, per_sample)
        shape_class: tuple[str | int, ...] = ("intervals", size, len(samples))
    else:
        index, words = _bit_tiles(rows, kinds, block)
        mod = _bit_mod(_on(index.reshape(-1), device), _on(words.reshape(-1), device), kinds.shape, block, per_sample)
        shape_class = ("bits", len(words), len(samples))
    partial, full = (_block_lists(kinds == kind, device) for kind in (BlockKind.PARTIAL, BlockKind.FULL))
    # Also makes the transposed lists of the backward pass: two sorts of a [tiles, tiles] table on the device.
    block_mask = BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block, mask_mod=mod, seq_lengths=shape)
    copies = batch // len(samples)
    n_partial, n_full = (int((kinds == kind).sum()) * copies for kind in (BlockKind.PARTIAL, BlockKind.FULL))
    return FlexMask(geometry, block_mask, shape_class, n_partial, n_full, samples)


def interval_table(rows: Rows, n_rows: int, size: int) -> npt.NDArray[np.int32]:
    """int32 [2 * size, n_rows]: lower and upper bounds in turn of up to ``size`` intervals a row, then empty ones."""
    table = np.zeros((2 * size, n_rows), dtype=np.int32)
    nth = np.arange(len(rows.row)) - np.searchsorted(rows.row, rows.row)
    table[2 * nth, rows.row] = rows.lo
    table[2 * nth + 1, rows.row] = rows.hi
    return table


def _interval_mod(bounds: Tensor, n_rows: int, size: int, per_sample: bool) -> MaskMod:
    """Legal iff one of the row's intervals holds the key. bounds: flat [samples, 2 * size, n_rows].

    Only sums of index tensors index the table: flex traces tensor indices, while an integer among them would read the
    tensor one back to the host.
    """

    def mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        at = b * (2 * size * n_rows) + q if per_sample else q
        legal = (bounds[at] <= kv) & (kv < bounds[at + n_rows])
        for i in range(1, size):
            legal = legal | ((bounds[at + 2 * i * n_rows] <= kv) & (kv < bounds[at + (2 * i + 1) * n_rows]))
        return legal

    return mod


def _bit_tiles(
    rows: list[Rows], kinds: npt.NDArray[np.int8], block: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """-> index int32 [samples, nq, nk] into words int32 [tiles, block, block / 32], a bit for each pair of a tile.

    Tile 0 is empty and tile 1 full; the number of tiles is rounded up to a power of two.
    """
    partial = kinds == BlockKind.PARTIAL
    count = 2 + int(partial.sum())
    index = (kinds == BlockKind.FULL).astype(np.int32)
    index[partial] = np.arange(2, count)
    words = np.zeros((max(_FEWEST_TILES, 1 << (count - 1).bit_length()), block, block // 32), dtype=np.uint32)
    words[1] = ~np.uint32(0)
    for sample, each in enumerate(rows):
        for tile_row, is_partial in enumerate(partial[sample]):
            columns = np.flatnonzero(is_partial)
            if len(columns) == 0:
                continue
            part = each.between(tile_row * block, (tile_row + 1) * block)
            # Renumber the keys so that the partial tiles of this row of tiles lie side by side.
            close = Rows(part.row, _renumbered(part.lo, columns, block), _renumbered(part.hi, columns, block))
            legal = close.dense(block, 0, len(columns) * block)
            packed = np.packbits(legal, axis=1, bitorder="little").view("<u4")
            words[index[sample, tile_row, columns]] = packed.reshape(block, len(columns), -1).swapaxes(0, 1)
    return index, words.view(np.int32)


def _renumbered(key: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], block: int) -> npt.NDArray[np.int64]:
    """Number of keys before ``key`` that lie in the given columns of tiles."""
    tile = key // block
    before = np.searchsorted(columns, tile)
    inside = columns[np.minimum(before, len(columns) - 1)] == tile
    return before * block + np.where(inside, key % block, 0)


def _bit_mod(index: Tensor, words: Tensor, shape: tuple[int, ...], block: int, per_sample: bool) -> MaskMod:
    """Legal iff the pair's bit is set in its tile. index, words: those of ``_bit_tiles``, flat; shape: of the index."""
    shift, (_, nq, nk) = block.bit_length() - 1, shape

    def mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        tile_row = (b * nq if per_sample else 0) + (q >> shift)
        tile = index[tile_row * nk + (kv >> shift)]
        word = words[((tile << shift) + (q & (block - 1))) * (block // 32) + ((kv & (block - 1)) >> 5)]
        return ((word >> (kv & 31)) & 1) == 1

    return mod


def _block_lists(wanted: npt.NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [samples, nq, nk] -> numbers [samples, 1, nq], indices [samples, 1, nq, nk] of the tiles wanted in each row.

    Entries past the number are 0: the kernel reads the first one even where there is none. It also finds a sample by
    the stride of the head dimension, of size 1, which torch sets and numpy leaves 0.
    """
    sample, row, column = np.nonzero(wanted)
    count = wanted.sum(axis=2, dtype=np.int32)
    first = (np.cumsum(count) - count.reshape(-1)).reshape(count.shape)
    index = np.zeros(wanted.shape, dtype=np.int32)
    index[sample, row, np.arange(len(column)) - first[sample, row]] = column
    return _on(count, device).unsqueeze(1), _on(index, device).unsqueeze(1)


def _listed(count: Tensor, index: Tensor) -> BoolTable:
    """Inverse of ``_block_lists`` for one sample: numbers [nq], indices [nq, nk] -> bool [nq, nk]."""
    out = np.zeros(index.shape, dtype=np.bool_)
    row, nth = np.nonzero(np.arange(index.shape[1]) < count.cpu().numpy()[:, None])
    out[row, index.cpu().numpy()[row, nth]] = True
    return out


def _on(array: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """On the device, without waiting for the work queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _zeros(like: Tensor, count: int) -> Tensor:
    return like.new_zeros(like.shape[0], like.shape[1], count, like.shape[3])


def _joined(parts: list[Tensor]) -> Tensor:
    filled = [part for part in parts if part.shape[2]]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=2)
