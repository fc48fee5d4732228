"""The exact entropy model of token maps: which codeword comes next, given those already known around it.

A map [H, W] of indexes is cut into packets that can be lost one by one: neighbours lie in different packets, so that a
loss thins a region out and never blanks it. A packet is coded in passes, from a coarse grid to the places between;
each pass knows the tokens of the passes before, of its own packet only. Indexes have no order, so each place gets
frequencies of its own: integer logits through a shipped table of exponentials, normalised in integers.

Published codecs of this kind code indexes uniformly, at log2 K bits (arXiv 2307.08265).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calotype.models import tables
from calotype.models.codebook import half_distances
from calotype.models.exact import QuantConv, QuantEmbedding, exact_matmul
from calotype.models.quantizers import KNOTS

PASSES = 5
LOGIT_UNIT = 32
"""Logits are integers in units of 1/32 of a natural logarithm."""
RUN = 256
"""Positions in a request at most: each has a table of its own, which takes memory."""
_KNOWN = 64.0
"""What marks a known token among the integer features."""
_EXPONENT_BITS = 20
_EXPONENTS = 512


class Categorical(NamedTuple):
    """What the entropy coder has to code next: symbols with a table each.

    frequencies: [B, n, K] int32, each at least 1, the last at least 2, with sum 2^24.
    symbols: [B, n] int32 in [0, K) when encoding, None when decoding.
    places: [n] int64, which positions of the map they are, row after row.
    """

    frequencies: Tensor
    symbols: Tensor | None
    places: Tensor


class Choice(NamedTuple):
    """Codewords that an encoder may take, the cheapest first: their numbers [H, W, n] int64 and bits [H, W, n]."""

    tokens: Tensor
    bits: Tensor


TokenCoding = Generator[Categorical, Tensor, Tensor]


def interleave(height: int, width: int, packets: int) -> Tensor:
    """The packet [H, W] of each token: lines of slope near the golden section, so that neighbours lie apart."""
    slope = (382 * packets + 500) // 1000
    return (slope * torch.arange(height)[:, None] + torch.arange(width)) % packets


def ranks(height: int, width: int) -> Tensor:
    """The pass [H, W] of each token: grids of 4, 4 between, 2, 2 between, the rest."""
    y, x = torch.arange(height)[:, None].expand(-1, width), torch.arange(width).expand(height, -1)
    coarse = torch.where(y % 4 == x % 4, (y % 4) // 2, 2)
    return torch.where((y % 2 == 0) & (x % 2 == 0), coarse, torch.where((y % 2 == 1) & (x % 2 == 1), 3, 4))


class TokenPrior(nn.Module):
    """Entropy model of token maps over codebooks of several sizes.

    After `exact.integerise` the same module codes; before, it trains.
    """

    exponentials: Tensor

    def __init__(self, sizes: Sequence[int], *, embedding: int = 48, hidden: int = 192) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.embeddings = nn.ModuleList(QuantEmbedding(size, embedding) for size in sizes)
        self.enter = QuantConv(embedding + 1, hidden, leaky=True, knots=KNOTS)
        self.spatial = nn.ModuleList(QuantConv(hidden, hidden, 5) for _ in range(2))
        self.mix = nn.ModuleList(QuantConv(hidden, hidden, leaky=True) for _ in range(2))
        self.heads = nn.ModuleList(
            QuantConv(hidden, size, gain=torch.full((size,), float(LOGIT_UNIT))) for size in sizes
        )
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
        exponents = torch.exp(-torch.arange(_EXPONENTS, dtype=torch.float64) / LOGIT_UNIT)
        self.register_buffer("exponentials", torch.round(exponents * 2**_EXPONENT_BITS).to(torch.int32))

    @torch.no_grad()
    def begin(self, codebooks: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        """Start training from what codewords [K, D] and their counts [K] tell.

        Like tokens begin with like embeddings and like logits, and logits with the logarithms of the frequencies: with
        thousands of tokens there is too little to learn each of them from.
        """
        for codewords, count, embedding, head in zip(codebooks, counts, self.embeddings, self.heads, strict=True):
            assert isinstance(embedding, QuantEmbedding)
            assert isinstance(head, QuantConv)
            like = codewords - codewords.mean(0)
            like = like / like.std(0).clamp(min=1e-6).sqrt()  # between all alike and in proportion to energy
            like = like / like.std()
            embedding.weight.copy_(like[:, : embedding.weight.shape[1]])
            spread = torch.linalg.qr(torch.randn(head.weight.shape[1], like.shape[1], device=like.device))[0]
            head.weight.copy_(0.3 * (like @ spread.t())[:, :, None, None])
            head.bias.copy_(torch.log((count + 0.5) / (count + 0.5).sum()))

    def _features(self, tokens: Tensor, known: Tensor, ladder_step: int, t: Tensor) -> Tensor:
        """Integers [B, hidden, H, W], of which a head makes integer logits."""
        mask = known[:, None].float()
        x = torch.cat([self.embeddings[ladder_step](tokens) * mask, _KNOWN * mask], 1)
        x = self.enter(x, t)
        for spatial, mix in zip(self.spatial, self.mix, strict=True):
            x = mix(spatial(x, t), t)
        return x

    def forward(self, tokens: Tensor, known: Tensor, ladder_step: int) -> Tensor:
        """Logits [B, K, H, W] in nats of tokens [B, H, W], where those that are `known` [B, H, W] are given."""
        t = torch.full((len(tokens),), ladder_step / (len(self.sizes) - 1), device=tokens.device)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.heads[ladder_step](self._features(tokens, known, ladder_step, t), t) / LOGIT_UNIT

    def code(
        self,
        shape: tuple[int, int, int],
        ladder_step: int,
        packet: int,
        packets: int,
        tokens: Tensor | None = None,
        *,
        device: torch.device,
    ) -> TokenCoding:
        """Encode one packet of `tokens` [B, H, W], or decode it if they are None, by the same steps over integers.

        Args:
            shape: (B, H, W) of the map.
            ladder_step: number of the codebook.
            packet: below `packets`.
        Yields:
            `Categorical`s; each must be answered with the symbols [B, n] int32.
        Returns:
            The map [B, H, W] int64, zero outside of the packet.
        """
        batch, height, width = shape
        # Conditional layers have a level for each step of the ladder: those of QuantConv are 64 apart over all.
        level = torch.full((batch,), ladder_step * 64 // (len(self.sizes) - 1), device=device)
        found = torch.zeros(batch, height, width, dtype=torch.int64, device=device)
        known = torch.zeros(height, width, dtype=torch.bool, device=device)
        own, rank = interleave(height, width, packets) == packet, ranks(height, width)
        for number in range(PASSES):
            where = (own & (rank == number)).flatten().nonzero()[:, 0].to(device)
            if not len(where):
                continue
            with exact_matmul(device):
                features = self._features(found, known.expand_as(found), ladder_step, level).flatten(2)
            for places in where.split(RUN):
                with exact_matmul(device):
                    logits = self.heads[ladder_step](features[:, :, None, places], level)[:, :, 0]
                    frequencies = self.frequencies(logits.transpose(1, 2))
                given = None if tokens is None else tokens.flatten(1)[:, places].to(torch.int32)
                answer = yield Categorical(frequencies, given, places)
                found.view(batch, -1)[:, places] = answer.to(device, torch.int64)
            known.view(-1)[where] = True
        return found

    @torch.no_grad()
    def choose(self, y: Tensor, codewords: Tensor, ladder_step: int, worth: float, count: int) -> Choice:
        """The `count` cheapest codewords [K, D] for vectors [D, H, W], those before them known as in coding.

        Args:
            worth: of a bit, in squared distance.
        """
        height, width = y.shape[1:]
        vectors, count = y.flatten(1).t(), min(count, len(codewords))
        tokens = torch.empty(height * width, count, dtype=torch.int64, device=y.device)
        bits = torch.empty(height * width, count, device=y.device)
        coding = self.code((1, height, width), ladder_step, 0, 1, device=y.device)
        request = next(coding)
        while True:
            costs = tables.PRECISION - request.frequencies[0].float().log2()
            distances = 2 * half_distances(vectors[request.places], codewords)
            cheapest = (distances + worth * costs).topk(count, 1, largest=False).indices
            tokens[request.places], bits[request.places] = cheapest, costs.gather(1, cheapest)
            try:
                request = coding.send(cheapest[None, :, 0].to(torch.int32))
            except StopIteration:
                return Choice(tokens.view(height, width, count), bits.view(height, width, count))

    def frequencies(self, logits: Tensor) -> Tensor:
        """Integer frequencies [..., K] of integer logits [..., K]; what rounding leaves over goes to the last."""
        total, size = 2**tables.PRECISION, logits.shape[-1]
        below = (logits.amax(-1, keepdim=True) - logits).clamp_(max=_EXPONENTS - 1).long()
        weight = self.exponentials.long()[below]
        shares = weight * (total - size - 1)
        result = torch.div(shares, weight.sum(-1, keepdim=True), rounding_mode="floor") + 1
        result[..., -1] += total - result.sum(-1)
        return result.to(torch.int32)


def bits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Bits [B, H, W] of tokens [B, H, W] under logits [B, K, H, W] in nats."""
    return nn.functional.cross_entropy(logits.float(), tokens, reduction="none") / math.log(2)
