"""Lattice quantisation: symbols that carry much are rounded 24 at a time, to a denser packing than that of integers.

Rounding one latent at a time leaves errors in a cube; a block of 24 whose parities must form a word of the binary Golay
code leaves them nearly in a ball, which is 0.99 dB less error at the same rate (construction A of Conway & Sloane,
"Sphere Packings, Lattices and Groups", 1988; of what trellis-coded quantisation can gain, four states give as much). A
decoder reads half of a block as any symbols, works out the parities of the other half, and reads those under tables of
the even or of the odd symbols. Steps are smaller than elsewhere, because of 4096 points of a block only one exists.

Only tables from `FIRST` on take part: where nearly all symbols are zero there is nothing to pack. Which symbols form a
block follows from the tables alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.models import tables

BLOCK, FREE = 24, 12
"""Symbols of a block; so many come first and are free, the parities of the others follow from theirs."""
FIRST = 16
"""Symbols of tables from this one on form blocks (σ ≥ 0.44)."""
STEP = 47
"""Between two symbols of a block, in the units of `tables.MEAN_UNIT`."""
WIDER = 3
"""The table of a symbol in a block is so many above that of the same latent elsewhere, as its steps are smaller."""
RELATIVE_STEP = STEP / tables.MEAN_UNIT
LAWS = tables.LAWS + tuple(
    tables.Law(law.scale, 2, parity) for law in tables.LAWS[FIRST + WIDER :] for parity in range(2)
)
"""What symbols follow, by table: as elsewhere; then, for each that blocks use, the even and the odd symbols alone."""

# fmt: off
_PARITY = (
    "111001100101", "101100110011", "111110010100", "110101111000", "110011001110", "101011011001",
    "100110101101", "011011110010", "001111000111", "011100101110", "010110011011", "000001111111",
)
# fmt: on
"""Row i: the symbols whose parity the free symbol i changes."""
_OCTADS = (0, 1, 2, 3, 4, 5, 6, 12, 7, 8, 9, 10, 13, 14, 15, 16, 11, 17, 18, 19, 20, 21, 22, 23)
"""The symbols of a block as three octads, in which the code is all (u + w, v + w, u + v + w), and each octad of these
or its complement, with u and v of one code of eight words and w of another one (Turyn's construction)."""
_LINES = ("00011011", "00101110", "01000111"), ("00010111", "00101101", "01001110")
"""What spans these two codes."""
_AT_A_TIME = 1024
"""Blocks that are searched for at a time: their scores stay in a processor's cache."""


def _bits(words: Sequence[str]) -> Tensor:
    return torch.tensor([[int(bit) for bit in word] for word in words])


def _span(words: tuple[str, ...]) -> Tensor:
    """All eight sums [8, n] of three words; that with number i + j (bitwise) is the sum of those numbered i and j."""
    return (torch.arange(8)[:, None] >> torch.arange(3) & 1) @ _bits(words) % 2


@functools.cache
def _of_code(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of parities [FREE, BLOCK - FREE]; the octads' places [BLOCK]; and their words, of bits, without complements.

    These are [64, 8]: the word 8 w + u; and, in signs, [8, 64 + 512]: the same, and w + u + v as 64 w + 8 u + v.
    """
    lines, shifts = map(_span, _LINES)
    words = (shifts[:, None] + lines).flatten(0, 1) % 2
    number = torch.arange(8)
    sums = (8 * number[:, None, None] + (number[:, None] ^ number)).flatten()
    signs = 1.0 - 2 * torch.cat([words, words[sums]]).t()
    return _bits(_PARITY).float().to(device), torch.tensor(_OCTADS, device=device), words.to(device), signs.to(device)


def blocks(chosen: Tensor) -> Tensor:
    """Where blocks lie, [m, BLOCK], as indices into the flattened tables `chosen` [B, n]; none is in two items."""
    taking = chosen >= FIRST
    if len(chosen) > 1:
        rank = taking.cumsum(1, dtype=torch.int32)
        whole = rank.amax(1, keepdim=True) // BLOCK * BLOCK if rank.shape[1] else rank
        return (taking & (rank <= whole)).flatten().nonzero()[:, 0].view(-1, BLOCK)
    found = taking[0].nonzero()[:, 0]
    return found[: len(found) // BLOCK * BLOCK].view(-1, BLOCK)


def places(of: Tensor, items: int, n: int) -> Tensor:
    """Where the other halves of the blocks `of` [m, BLOCK] go when they are sent, [m, BLOCK - FREE].

    As indices into flattened [B, `room(n)`], each item's blocks from its beginning on, for tables [B = `items`, n].
    """
    rest = torch.arange(BLOCK - FREE, device=of.device)
    number = torch.arange(len(of), device=of.device)
    if items == 1:
        return (BLOCK - FREE) * number[:, None] + rest
    item = of[:, 0] // max(n, 1)
    before = F.pad(torch.bincount(item, minlength=items).cumsum(0), (1, 0))
    return (item * room(n) + (BLOCK - FREE) * (number - before[item]))[:, None] + rest


def room(n: int) -> int:
    """Symbols that the other halves of blocks are at most, among `n`."""
    return n // BLOCK * (BLOCK - FREE)


def parities(free: Tensor) -> Tensor:
    """Parities [m, BLOCK - FREE], 0 or 1, of the rest of blocks whose free symbols are integers [m, FREE]."""
    rows, *_ = _of_code(free.device)
    return ((free & 1).float() @ rows).to(free.dtype) & 1


def table_of(table: Tensor) -> Tensor:
    """The table of a free symbol in a block, from what is chosen for it elsewhere."""
    return (table + WIDER).clamp_(max=tables.SCALES - 1)


def tables_of_rest(table: Tensor, parity: Tensor) -> Tensor:
    """The tables of the other half's symbols, from those that they would have if they were free."""
    return 2 * table + (tables.SCALES - 2 * (FIRST + WIDER)) + parity.to(table.dtype)


def nearest(x: Tensor) -> Tensor:
    """The nearest symbols [m, BLOCK] of blocks to what is given in their steps; float32 both."""
    return torch.cat([_nearest(part) for part in x.split(_AT_A_TIME)]) if len(x) else x


def _nearest(x: Tensor) -> Tensor:
    _, octads, words, signs = _of_code(x.device)
    first = torch.floor(x + 0.5)
    left = x - first
    second = first + torch.where(left < 0, -1.0, 1.0)  # of the other parity
    odd = first - 2 * torch.floor(first / 2)
    # What the other parity costs; its sign says which parity that is.
    cost = ((1 - 2 * left.abs()) * (1 - 2 * odd)).index_select(1, octads).view(-1, 3, 8)
    score = cost @ signs[:, :64]  # [m, 3, 64]; of a word's complement it is the negative
    u, v = score[:, :2].abs().view(-1, 2, 8, 8).unbind(1)
    sums = (cost[:, 2] @ signs[:, 64:]).abs_().view(-1, 8, 8, 8)  # third octads by the first two
    best = sums.add_(u[..., None]).add_(v[..., None, :]).flatten(1).max(1)[1]
    shift, i, j = best // 64, best // 8 % 8, best % 8
    chosen = 8 * shift[:, None] + torch.stack([i, j, i ^ j], 1)  # [m, 3]
    complement = score.gather(2, chosen[..., None]) < 0
    word = torch.empty_like(x)
    word[:, octads] = (words[chosen] ^ complement).flatten(1).to(x.dtype)
    return torch.where(word == odd, first, second)
