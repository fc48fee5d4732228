"""Rate control, and rates: a file is as large as its symbols say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype import entropy
from calotype.api import Codec, psnr
from calotype.errors import TargetError
from calotype.media import Picture
from calotype.models import tables
from calotype.rate import PSNR_TOLERANCE, QUALITY_STEPS, SIZE_TOLERANCE, Target, bisect, search

Kind = Literal["size", "bpp", "psnr"]
FIXED = 33
"""Bytes of a file beside its range-coded data."""
SIZE_LIKE: tuple[Kind, ...] = ("size", "bpp")


def acceptable(kind: Kind, value: float, wanted: float) -> bool:
    if kind == "psnr":
        return abs(value - wanted) <= 0.1
    return 0.97 * wanted <= value <= wanted


def run(target: Target, values: list[float]) -> tuple[int | None, int]:
    """(quality, number of trials) of a search over measured values; None for a `TargetError`."""
    trials = []

    def trial(quality: int) -> tuple[float, str]:
        assert 0 <= quality <= QUALITY_STEPS
        trials.append(quality)
        return values[quality], f"file {quality}"

    quality: int | None = None
    message = "out of reach"
    try:
        quality, result = search(target, trial)
    except TargetError as error:
        message = str(error)
    assert quality is None or result == f"file {quality}"  # the result returned is that of the quality returned
    assert "out of reach" in message
    assert len(trials) == len(set(trials))  # nothing is encoded twice
    return quality, len(trials)


@dataclass(frozen=True)
class Curve:
    """What describes 1001 values that never fall: steep and flat parts, jumps, plateaus."""

    seed: int
    start: float
    power: int
    step: float
    plateaus: bool
    jumps: bool

    def values(self) -> list[float]:
        rng = np.random.default_rng(self.seed)
        steps = rng.random(QUALITY_STEPS + 1) ** self.power * self.step
        if self.plateaus:
            steps[rng.integers(0, QUALITY_STEPS, 500)] = 0
        if self.jumps:
            steps[rng.integers(0, QUALITY_STEPS, 3)] += 0.4
        values: list[float] = (self.start * np.exp(np.cumsum(steps))).tolist()
        return values


curves = st.builds(
    Curve,
    st.integers(0, 2**32 - 1),
    st.floats(0.01, 1e5),
    st.sampled_from([1, 3, 20]),
    st.floats(1e-4, 0.05),
    st.booleans(),
    st.booleans(),
)
kinds = st.sampled_from(["size", "bpp", "psnr"])
MOST_TRIALS = 55
"""On the nastiest curve; each trial leaves at most 7/8 of the range."""


@settings(max_examples=200)
@given(curve=curves, kind=kinds, where=st.floats(-0.1, 1.1))
def test_search_over_rising_values(curve: Curve, kind: Kind, where: float) -> None:
    """It succeeds exactly when some quality is acceptable, and then with an acceptable one."""
    values = curve.values()
    low, high = math.log(values[0]), math.log(values[-1])
    wanted = math.exp(low + where * (high - low))
    quality, trials = run(Target(kind, wanted), values)
    if quality is None:
        assert not any(acceptable(kind, v, wanted) for v in values)
    else:
        assert acceptable(kind, values[quality], wanted)
    assert trials <= MOST_TRIALS


@settings(max_examples=200)
@given(curve=curves, kind=kinds, where=st.floats(0, 1), noise=st.floats(0, 0.2))
def test_search_over_noisy_values(curve: Curve, kind: Kind, where: float, noise: float) -> None:
    """Where the values do not grow steadily the search may give up, but never returns what was not asked for."""
    values = np.array(curve.values())
    noisy = (values * np.maximum(1 + noise * np.random.default_rng(curve.seed).standard_normal(1001), 0.1)).tolist()
    wanted = float(values[0] + where * (values[-1] - values[0]))
    quality, trials = run(Target(kind, wanted), noisy)
    assert quality is None or acceptable(kind, noisy[quality], wanted)
    assert trials <= MOST_TRIALS


def test_search_looks_around_a_jump() -> None:
    """Between 180 and 200 the value sinks to the target, which a jump below 180 has passed over."""

    def value(quality: int) -> float:
        return 30 + quality / 50 if quality < 180 else max(34.3 - (quality - 180) / 50, 34.0) if quality < 240 else 36.0

    quality, _ = search(Target("psnr", 34), lambda quality: (value(quality), None))
    assert value(quality) == pytest.approx(34, abs=PSNR_TOLERANCE)


def test_search_is_quick_on_a_typical_curve() -> None:
    """Every trial is a whole encoding."""
    sizes = [2000 * math.exp(3.5 * q / 1000) for q in range(1001)]
    counts = []
    for wanted in np.geomspace(2100, 60000, 20):
        quality, trials = run(Target("size", float(wanted)), sizes)
        assert quality is not None
        counts.append(trials)
    assert np.mean(counts) < 8
    assert max(counts) < 14


def test_good_first_guess_needs_one_trial() -> None:
    sizes = [2000 * math.exp(3.5 * q / 1000) for q in range(1001)]
    assert run(Target("size", sizes[500] * 1.005), sizes) == (500, 1)


@pytest.mark.parametrize("kind", ["size", "bpp", "psnr"])
def test_ends_of_the_range(kind: Kind) -> None:
    values = [20 + q / 50 for q in range(1001)]
    assert run(Target(kind, 20.001), values)[0] is not None
    assert run(Target(kind, 40), values)[0] is not None
    assert run(Target(kind, 19.5), values)[0] is None
    assert run(Target(kind, 60), values)[0] is None
    assert run(Target(kind, 1e300), values)[0] is None
    assert run(Target(kind, math.inf), values)[0] is None
    # Even the worst is lossless: only a target of that kind could be met.
    assert run(Target("psnr", 50), [math.inf] * 1001)[0] is None


@settings(max_examples=200)
@given(curve=curves, kind=kinds, where=st.floats(-0.1, 1.1))
def test_bisection_over_rising_values(curve: Curve, kind: Kind, where: float) -> None:
    """The largest file that is not above a size, the smallest that reaches a PSNR, of every fiftieth quality."""
    values = curve.values()
    wanted = values[0] + where * (values[-1] - values[0])
    trials: list[int] = []

    def trial(quality: int) -> tuple[float, str]:
        trials.append(quality)
        return values[quality], f"file {quality}"

    sparse = range(0, QUALITY_STEPS + 1, 50)
    if kind == "psnr":
        fitting = [q for q in sparse if values[q] >= wanted][:1]
    else:
        fitting = [q for q in sparse if values[q] <= wanted][-1:]
    if not wanted > 0:
        return
    if fitting:
        assert bisect(Target(kind, wanted), trial) == (fitting[0], f"file {fitting[0]}")
    else:
        with pytest.raises(TargetError, match="out of reach"):
            bisect(Target(kind, wanted), trial)
    assert len(trials) <= 5


@pytest.mark.parametrize("value", [0, -1, math.nan, -math.inf])
def test_impossible_target_is_refused(value: float) -> None:
    with pytest.raises(TargetError):
        Target("bpp", value)


def test_tolerances_are_those_promised() -> None:
    assert SIZE_TOLERANCE == 0.03
    assert PSNR_TOLERANCE == 0.1


# Real encodings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(photo: Picture) -> Picture:
    """The photograph without metadata, smaller."""
    return Picture(np.ascontiguousarray(photo.pixels[40:240, 60:380]))


@pytest.mark.parametrize("kind", SIZE_LIKE)
@pytest.mark.parametrize("bpp", [0.4, 1.1])
def test_encoding_to_a_size(codec: Codec, bare: Picture, kind: Kind, bpp: float) -> None:
    area = bare.width * bare.height
    seen: list[float] = []
    wanted = bpp if kind == "bpp" else float(int(bpp * area / 8))
    made = codec.encode(bare, target=Target(kind, wanted), progress=seen.append)
    reached = len(made.data) * 8 / area if kind == "bpp" else float(len(made.data))
    assert acceptable(kind, reached, wanted)
    assert made.data == codec.encode(bare, quality=made.quality).data
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize("wanted", [30.0, 34.5])
def test_encoding_to_a_psnr(codec: Codec, bare: Picture, wanted: float) -> None:
    made = codec.encode(bare, target=Target("psnr", wanted))
    reached = psnr(bare.pixels, codec.decode(made.data).picture.pixels)
    assert abs(reached - wanted) <= 0.1
    assert made.psnr == pytest.approx(reached, abs=0.01)


def test_size_target_counts_the_whole_file(codec: Codec, bare: Picture) -> None:
    """Metadata and alpha are part of it."""
    rng = np.random.default_rng(0)
    heavy = Picture(bare.pixels, None, icc=rng.bytes(3000))
    made = codec.encode(heavy, target=Target("size", 9000))
    assert 8730 <= len(made.data) <= 9000


@pytest.mark.parametrize("target", [Target("size", 40), Target("bpp", 40), Target("psnr", 15), Target("psnr", 90)])
def test_unreachable_target_is_its_own_error(codec: Codec, synthetic: Callable[..., Picture], target: Target) -> None:
    with pytest.raises(TargetError, match="out of reach"):
        codec.encode(synthetic(64, 80), target=target)


@pytest.mark.parametrize("quality", [30, 60, 85])
def test_estimated_bits_are_the_bytes_of_the_file(
    codec: Codec, large_photo: Picture, monkeypatch: pytest.MonkeyPatch, quality: int
) -> None:
    """The information of the symbols under their tables against the size of the whole file."""
    assert large_photo.width * large_photo.height >= 300_000
    frequencies = codec.coder.network.prior.frequencies.numpy().astype(np.float64)
    half_widths = codec.coder.network.prior.tables.half_widths
    bounds = np.cumsum([0, *(2 * width + 2 for width in half_widths)])
    bits, escapes = 0.0, 0

    class Recording(entropy.Encoder):
        def push(self, tables_: entropy.Tables, symbols: entropy.Symbols) -> None:
            nonlocal bits, escapes
            for index in np.unique(tables_[tables_ >= tables.SKIP]):
                reach = half_widths[int(index)]
                group = symbols[tables_ == index]
                inside = np.abs(group) <= reach
                row = frequencies[bounds[index] : bounds[index + 1]] / 2**tables.PRECISION
                bits -= np.log2(row[np.where(inside, group + reach, 2 * reach + 1)]).sum()
                for over in np.abs(group[~inside]) - reach:
                    escapes += 1
                    bits += math.log2(18) + math.floor(math.log2(over)) + 1
            super().push(tables_, symbols)

    monkeypatch.setattr("calotype.symbols.Encoder", Recording)
    data = codec.encode(large_photo, quality=quality).data
    assert len(data) > FIXED + 1000
    assert escapes < 500
    assert (len(data) - FIXED) * 8 == pytest.approx(bits, rel=0.0005, abs=128)
    # The fixed 61 bytes weigh more the smaller the file is.
    assert len(data) * 8 == pytest.approx(bits + 8 * FIXED if quality < 50 else bits, rel=0.005)
