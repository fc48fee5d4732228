"""Codebooks of `mixture`, fitted to photographs once the networks are trained.

The maps of the codebooks are least squares from the points of the basis to the vectors that they stand for, as in
Lloyd's algorithm; the weights of the mixtures are counted. Both change what an encoder chooses, so there are several
rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.models import tables
from calotype.models.exact import integerise
from calotype.models.mixture import Level, Mixture
from calotype.models.multicodebook import ROWS, basis, gaussian_weights
from calotype.models.priors import Request, drive, own_symbols
from calotype.models.quantizers import QUALITY_STEPS, quality_level
from calotype.models.training.data import RandomCrops

CERTAINTY = 200.0
"""The Gaussian that a table starts as weighs as much as this many groups that were seen."""


@dataclass
class Statistics:
    """What was coded with one codebook.

    points: its basis [size, d].
    counts: [ROWS, size].
    squares, products: sums [d, d] of points by points and of vectors by points.
    error: sum of squared distances of vectors and codewords.
    """

    points: Tensor
    counts: Tensor
    squares: Tensor
    products: Tensor
    error: float = 0.0

    @staticmethod
    def empty(level: Level, number: int) -> Statistics:
        book = level.books[number]
        points = basis(book).double()
        square = torch.zeros(book.dimension, book.dimension, dtype=torch.float64)
        return Statistics(points, torch.zeros(ROWS, book.size, dtype=torch.float64), square, square.clone())

    def add(self, vectors: Tensor, row: Tensor, index: Tensor, words: Tensor, factor: Tensor) -> None:
        """Note vectors [n, d], in quantisation steps, that codewords `index` [n] of `words` [size, d] stand for.

        `row` [n] is that of their tables, `factor` [n, 1] what the codewords are multiplied by.
        """
        size = self.counts.shape[1]
        self.counts += torch.bincount(row * size + index, minlength=self.counts.numel()).view(-1, size)
        chosen = self.points[index]
        self.squares += chosen.t() @ chosen
        self.products += (vectors / factor).double().t() @ chosen
        self.error += float((vectors - words[index] * factor).square().sum())

    def weights(self) -> Tensor:
        """[ROWS, size]: those of the mixture, equal for opposite codewords."""
        counts = self.counts + self.counts.flip(1)
        return counts + CERTAINTY * gaussian_weights(self.points)

    def words(self) -> Tensor:
        """[size, d] in quantisation steps: the basis under the best linear map."""
        few = 1e-3 * self.squares.diagonal().mean() + 1e-6
        eye = torch.eye(len(self.squares), dtype=torch.float64)
        return self.points @ torch.linalg.solve(self.squares + few * eye, self.products.t() + few * eye)


class Scene(NamedTuple):
    """Pictures on their way to be coded: the latents in quantisation steps, and quality [B] in [0, `QUALITY_STEPS`]."""

    coarse: Tensor
    middle: Tensor
    y: Tensor
    quality: Tensor


def levels(network: Mixture) -> list[Level]:
    """Of the prior, in the order of coding."""
    return [network.prior.coarse, network.prior.middle, network.prior.fine]


@torch.inference_mode()
def encode(network: Mixture, scene: Scene) -> float:
    """Run a network that is ready to code over a scene as an encoder does; returns the bits by its tables."""
    frequencies, half_widths, _, _ = network.tables
    widths = torch.tensor(half_widths)
    starts = torch.cumsum(2 * widths + 2, 0) - (2 * widths + 2)
    coarse, middle, y, quality = scene
    coding = network.prior.code((len(y), *y.shape[2:]), quality_level(quality), coarse, middle, y)
    bits = 0.0

    def answer(asked: Request) -> Tensor:
        nonlocal bits
        table, symbols = asked.tables.long(), own_symbols(asked)
        chosen = frequencies[starts[table] + widths[table] + symbols]
        bits += float(((tables.PRECISION - chosen.double().log2()) * (table > 0)).sum())
        return symbols

    drive(coding, answer)
    return bits


def observe(network: Mixture, scenes: Iterable[Scene]) -> tuple[list[list[Statistics]], float]:
    """Statistics of every codebook of every level over scenes, and all bits, of a network that is ready to code."""
    found: list[list[Statistics]] = []
    for level in levels(network):
        own = [Statistics.empty(level, number) for number in range(len(level.books))]
        words = [level.words_of(number) / level.unit for number in range(len(level.books))]

        def seen(
            number: int, vectors: Tensor, row: Tensor, index: Tensor, own: list[Statistics] = own,
            words: list[Tensor] = words, stretch: Tensor = level.stretch,
        ) -> None:  # fmt: skip
            own[number].add(vectors, row, index, words[number], stretch[number, row][:, None])

        level.searched = seen
        found.append(own)
    bits = sum(encode(network, scene) for scene in scenes)
    for level in levels(network):
        level.searched = None
    return found, bits


@torch.inference_mode()
def draw(network: Mixture, photos: Path, batches: int, seed: int) -> list[Scene]:
    """Random crops of photographs below a folder at random qualities, of a network that is ready to code."""
    generator = torch.Generator().manual_seed(seed)
    crops = RandomCrops(photos, batch=8, crop=256, seed=seed)
    scenes = []
    for _ in range(batches):
        quality = torch.randint(QUALITY_STEPS + 1, (8,), generator=generator)
        x = next(crops).float() / 255 - 0.5
        y = network.analyse(x, quality / QUALITY_STEPS)
        middle, coarse = network.hyper_analysis(y)
        scenes.append(Scene(coarse, middle, y, quality))
    return scenes


def improve(network: Mixture, scenes: list[Scene]) -> None:
    """One round: fit all codebooks of a network that is ready to code to what it chooses for scenes; in place."""
    found, _ = observe(network, scenes)
    for level, own in zip(levels(network), found, strict=True):
        for number, statistics in enumerate(own):
            level.replace(number, statistics.words(), statistics.weights())


def fit(network: Mixture, photos: Path, *, batches: int = 64, rounds: int = 3, seed: int = 0) -> None:
    """Fit all codebooks of a trained network to photographs below a folder, at all qualities; in place.

    Raises FileNotFoundError, ValueError for a folder without usable photographs.
    """
    coding = integerise(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scenes = draw(coding, photos, batches, seed)
    for _ in range(rounds):
        improve(coding, scenes)
    for level, fitted in zip(levels(network), levels(coding), strict=True):
        level.words.copy_(fitted.words)
        level.frequencies.copy_(fitted.frequencies)
