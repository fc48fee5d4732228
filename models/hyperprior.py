"""`hyperprior`: the everyday image model. Scalar latents at 1/16, one set of weights for every rate.

The transforms (`calotype.models.transforms`) give a latent y, which is quantised, 24 symbols at a time where they carry
much (`calotype.models.lattice`), and coded exactly by a hyper-latent and channel slices (`calotype.models.priors`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calotype.models.priors import Coding, CodingTables, Expected, HyperAnalysis, Prior
from calotype.models.quantizers import quality_level
from calotype.models.transforms import Rates, Transforms, TransformsConfig


@dataclass(frozen=True)
class HyperpriorConfig(TransformsConfig):
    """Widths and depths, by default those of the shipped weights, which also have ends and are packed."""

    hyper: int = 96
    packed: bool = False
    """Whether symbols that carry much are quantised in blocks of 24 (`calotype.models.lattice`)."""


class Hyperprior(Transforms):
    """See the module's text. Pictures are [B, 3, H, W] in [-0.5, 0.5] with H and W multiples of 16."""

    config: HyperpriorConfig

    def __init__(self, config: HyperpriorConfig = HyperpriorConfig()) -> None:
        super().__init__(config)
        self.hyper_analysis = HyperAnalysis(config.latent, config.hyper)
        self.prior = Prior(config.latent, config.hyper, packed=config.packed)

    @property
    def tables(self) -> CodingTables:
        """What the entropy coder needs to know."""
        return self.prior.tables

    def forward(self, x: Tensor, t: Tensor, push: Tensor | None = None) -> Rates:
        """Rates and reconstruction, differentiable.

        Args:
            t: [B], quality in [0, 1].
            push: how far an encoder moves the latents (`calotype.models.shaping.push`), if it does.
        """
        y = self.analyse(x, t)
        z = self.hyper_analysis(y)
        y = y if push is None else y + push
        y_hat, y_bits, z_bits = self.prior(z, y, t)
        return Rates(self.synthesise(y_hat, t), y_bits, z_bits)

    def code(
        self, shape: tuple[int, int, int], quality: Tensor, y: Tensor | None = None, z: Tensor | None = None
    ) -> Coding:
        """Encode the latent `y`, or decode one of `shape` (B, H, W) if it is None. See `Prior.code`.

        `quality` [B] int64 in steps of 1/`QUALITY_STEPS`: an integer, because it chooses among integer tables.
        `z` is the hyper-latent to encode, that of `y` unless it is given.
        """
        if y is not None and z is None:
            z = self.hyper_analysis(y)
        return self.prior.code(shape, quality_level(quality), z, y)

    def expect(self, quality: Tensor, z: Tensor, y: Tensor) -> Expected:
        """What the prior expects of the latent `y` in coding; see `Prior.expect`."""
        return self.prior.expect(quality_level(quality), z, y)
