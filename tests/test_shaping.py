"""Noise shaping: what an encoder does to latents, and training to those of an encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import objective, unpacked
from torch import Tensor

from calotype.api import Codec
from calotype.improving import Improver
from calotype.media import Picture
from calotype.models import lattice, shaping, tables, zoo
from calotype.models.hyperprior import Hyperprior
from calotype.models.priors import Request, drive, gaussian_bits, gaussian_slope, own_symbols, rate_slope
from calotype.models.shaping import Schedule
from calotype.models.training.photos import encoder_of
from calotype.picture import PictureCoder
from calotype.windows import Box

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(codec: Codec) -> Hyperprior:
    assert isinstance(codec.coder.network, Hyperprior)
    return codec.coder.network


@pytest.fixture(scope="module")
def face(photo: Picture) -> Picture:
    return Picture(np.ascontiguousarray(photo.pixels[20:212, 80:272]))


def _tensor(picture: Picture) -> Tensor:
    return torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5


def test_slope_is_the_derivative_of_the_bits() -> None:
    symbols = torch.tensor([[-30, -3, -1, 0, 0, 1, 2, 7, 60]])
    index = torch.tensor([[60, 30, 20, 5, 63, 22, 40, 33, 50]])
    step = 1e-2
    ahead, behind = (gaussian_bits(symbols + side * step, index.float()).double() for side in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert gaussian_slope(symbols, index).numpy() == pytest.approx(expected.numpy(), rel=0.02, abs=0.02)
    assert gaussian_slope(symbols, index)[0, 3:5].tolist() == [0, 0]


def test_bits_grow_with_the_error_of_a_zero() -> None:
    symbols = torch.tensor([[-3, 0, 0, 0, 1]])
    error = torch.tensor([[0.1, 0.2, -0.4, 0.3, -0.5]])
    index = torch.tensor([[30, 30, tables.SKIP, tables.SKIP - 1, 22]])
    slope = rate_slope(symbols, error, index)
    expected = gaussian_slope(symbols, index)
    expected[0, 1:3] = error[0, 1:3] / tables.scale_of(index[0, 1:3]).square()
    assert slope.numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    assert slope[0, 3] == 0  # never coded, so free


def test_rounding_as_expected_gives_what_is_decoded(network: Hyperprior, face: Picture) -> None:
    quality = torch.tensor([550])
    with torch.inference_mode():
        y = network.analyse(_tensor(face), quality / 1000)
        z = network.hyper_analysis(y)
        expected = network.expect(quality, z, y)
        y_hat = expected.rounded(y)
        slope = expected.slope(y, y_hat)
        asked: list[Request] = []

        def answer(request: Request) -> Tensor:
            asked.append(request)
            return own_symbols(request)

        decoded = drive(network.code((1, *y.shape[2:]), quality, y, z), answer)
    assert torch.equal(y_hat, network.dequantise(decoded))
    assert torch.equal(y_hat, expected.coded)
    for layout in (torch.contiguous_format, torch.channels_last):
        again = y.clone(memory_format=layout)
        assert torch.equal(expected.rounded(again), y_hat)
        assert torch.equal(expected.slope(again, y_hat), slope)
    start = network.prior.passes[-1].start
    *_, first, second = asked
    number = torch.arange(y_hat.numel()).view(y.shape[2] * y.shape[3], -1)  # as `Expected` counts latents
    there = torch.zeros(number.shape, dtype=torch.bool)
    there.view(-1)[expected.blocks.flatten()] = True
    inside = there.t().view(y.shape)[:, start:]
    assert inside.any()
    assert 2 * (second.tables > 0).sum() == inside.sum()
    symbols, index = (part.view_as(inside) for part in (own_symbols(first), first.tables))
    assert torch.equal(expected.table[:, start:][~inside], index[~inside].float())
    coded = index >= tables.SKIP
    alone, zero = coded & ~inside, symbols == 0
    assert (alone & ~zero).any()
    assert (alone & zero).any()
    error = (y - y_hat)[:, start:]
    assert torch.equal(slope[:, start:][alone], rate_slope(symbols, error, index)[alone])
    assert not slope[:, start:][~coded & ~inside].any()
    # In a block a step is shorter and the table wider.
    free, step = inside & coded, lattice.RELATIVE_STEP
    assert (free & ~zero).any()
    assert torch.allclose(slope[:, start:][free], rate_slope(symbols, error / step, index)[free] / step, rtol=1e-4)


def test_training_pushes_latents_as_an_encoder_does(codec: Codec, network: Hyperprior, face: Picture) -> None:
    """The float network of training and the exported one, by the shipped weights of both forms; symbols one by one.

    In blocks, where a mean that differs a little may move 24 symbols, only as far.
    """
    trained = encoder_of(codec.spec.weights, CPU)
    far = _push_and_move(trained, network, face)
    assert far[0].norm().item() == pytest.approx(far[1].norm().item(), rel=0.05)
    trained.prior.packed = False
    push, moved = _push_and_move(trained, unpacked(codec).coder.network, face)
    assert moved.abs().mean() > 0.01
    # Means that differ by a few 64ths move all symbols a little, and some to the next integer.
    assert torch.cosine_similarity(push.flatten(), moved.flatten(), 0) > 0.85
    assert push.norm().item() == pytest.approx(moved.norm().item(), rel=0.05)
    assert not push.requires_grad


def _push_and_move(trained: Hyperprior, network: Hyperprior, face: Picture) -> tuple[Tensor, Tensor]:
    """How far training and an encoder at effort 5 move a latent."""
    x, t = _tensor(face), torch.tensor([0.6])
    with torch.no_grad():
        y = trained.analyse(x, t)
        pushed = y + shaping.push(trained.eval(), x, t, bf16=False)
    whole = Box(0, 0, *y.shape[2:])
    with torch.inference_mode():
        better = Improver(network, CPU, "psnr").improve(face.pixels, (y.clone(),), [[whole]], 600, 5, None)
    assert better is not None
    return pushed - y, better.latent - y


def test_estimate_tells_most_of_the_gradient(network: Hyperprior, photo: Picture) -> None:
    estimate = zoo.load_gradient("hyperprior")
    assert estimate is not None
    x = _tensor(Picture(np.ascontiguousarray(photo.pixels[:192, :256])))
    for quality in (150, 500, 850):
        t = torch.tensor([quality / 1000])
        with torch.inference_mode():
            analysed = network.analyse_with_features(x, t)
            y = analysed.latent
            expected = network.expect(torch.tensor([quality]), network.hyper_analysis(y), y)
            y_hat = expected.coded
            guess = estimate(y_hat - y, analysed, t)
        gradient = shaping.error_gradient(network.synthesise, y_hat, x, t, bf16=False)
        coded = expected.table >= tables.SKIP
        left, whole = ((v * coded).square().sum().item() for v in (guess - gradient, gradient))
        assert left < 0.5 * whole


def test_gradients_that_go_straight_draw_the_same_picture(network: Hyperprior, face: Picture) -> None:
    t = torch.tensor([0.5])
    with torch.no_grad():
        y_hat = torch.round(network.analyse(_tensor(face), t))
        drawn, straight = (network.synthesise(y_hat, t, straight=way) for way in (False, True))
    assert torch.allclose(drawn, straight, atol=1e-5)
    gradients = [
        shaping.error_gradient(network.synthesise, y_hat, _tensor(face), t, bf16=False, straight=way)
        for way in (False, True)
    ]
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), 0) > 0.9


def test_an_estimate_saves_bytes(
    codec: Codec, photo: Picture, large_photo: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first look, and without one."""
    assert isinstance(codec.coder, PictureCoder)
    plain, estimated, guessed = (
        sum(objective(codec, picture, quality, effort) for quality in (40, 60, 80) for picture in (photo, large_photo))
        for effort in (3, 4, 5)
    )
    assert guessed < 0.99 * estimated < 0.98 * plain
    guessed = sum(objective(codec, photo, quality, 5) for quality in (40, 60, 80))
    best = objective(codec, photo, 60, 7)
    assert codec.coder._improver is not None
    monkeypatch.setattr(codec.coder._improver, "gradient", None)
    assert guessed < sum(objective(codec, photo, quality, 5) for quality in (40, 60, 80))
    assert objective(codec, photo, 60, 4) == objective(codec, photo, 60, 3)
    # Six looks are taken without an estimate, too; with one they find other symbols.
    assert best != objective(codec, photo, 60, 7) < objective(codec, photo, 60, 5)


def test_a_schedule_goes_from_its_first_values_to_its_last() -> None:
    schedule = Schedule(3, (0.8, 0.9), (0.01, 0.0025))
    assert schedule.at(0) == (0.8, 0.01)
    assert schedule.at(1) == pytest.approx((0.85, 0.005))
    assert schedule.at(2) == pytest.approx((0.9, 0.0025))
    assert Schedule(1, (0.7, 0.7), (0.01, 0.01)).at(0) == (0.7, 0.01)


def test_no_picture_pulls_a_latent_far(network: Hyperprior) -> None:
    pixels = torch.ones(1, 3, 64, 64) * 0.5
    y_hat = torch.full((1, network.latent_channels, 4, 4), -100.0)
    t = torch.tensor([1.0])
    gradient = shaping.error_gradient(network.synthesise, y_hat, pixels, t, bf16=False)
    assert shaping.far(gradient, t, 1.0).abs().max() == shaping.FARTHEST


@pytest.mark.parametrize("quality", [5, 60, 95])
@pytest.mark.parametrize("kind", ["noise", "checks", "flat", "edge"])
def test_unusual_pictures_are_not_harmed(codec: Codec, kind: str, quality: float) -> None:
    random = np.random.default_rng(1)
    pixels = {
        "noise": random.integers(0, 256, (96, 96, 3), np.uint8),
        "checks": np.tile(np.indices((96, 96)).sum(0)[..., None] % 2 * 255, (1, 1, 3)).astype(np.uint8),
        # A byte is a hundredth of such a file: greys together.
        "flat": np.full((8, 96, 96, 3), np.arange(20, 250, 30)[:, None, None, None], np.uint8),
        "edge": np.repeat(np.arange(96) > 41, 288).reshape(96, 96, 3).astype(np.uint8) * 255,
    }[kind]
    pictures = [Picture(p) for p in pixels.reshape(-1, 96, 96, 3)]
    plain, *shaped = (sum(objective(codec, p, quality, effort) for p in pictures) for effort in (3, 4, 5, 7, 9))
    assert max(shaped) < 1.02 * plain
