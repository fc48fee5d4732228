"""Any picture goes in and comes back: shapes, tiles, regions, scales, halos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import SAMPLES, unpacked
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from calotype import container
from calotype.api import MODELS, Codec, decode, encode, psnr
from calotype.errors import FormatError, InputError, ModelNotFoundError
from calotype.media import Picture, read_picture
from calotype.models import perceptual
from calotype.models.blocks import Block, bfloat16_is_fast
from calotype.models.exact import integerise
from calotype.models.hyperprior import Hyperprior
from calotype.models.priors import Coding
from calotype.models.transforms import STRIDE
from calotype.picture import DecodeJob, PictureCoder
from calotype.stopwatch import Stopwatch
from calotype.windows import Box, grid

Make = Callable[..., Picture]
Pixels = npt.NDArray[np.uint8]


def difference(a: Pixels, b: Pixels) -> int:
    """Largest difference of two pictures of one shape."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [256, 1024])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 600), (600, 1), (7, 13), (16, 16), (15, 17), (65, 127), (256, 256), (257, 255)],
)
def test_any_shape(codec: Codec, synthetic: Make, height: int, width: int, channels: int, tile: int) -> None:
    picture = synthetic(height, width, channels)
    data = codec.encode(picture, quality=70, tile=tile).data
    decoded = codec.decode(data).picture
    assert decoded.pixels.shape == (height, width, channels)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.alpha is None
    assert psnr(picture.pixels, decoded.pixels) > 27
    info = container.probe(data)
    assert (info.width, info.height, info.channels) == (width, height, channels)


def test_photo_keeps_its_quality(codec: Codec, photo: Picture) -> None:
    """Better quality costs more and shows less error, over the whole range."""
    made = [codec.encode(photo, quality=q, metadata=()) for q in (0, 25, 50, 75, 100)]
    sizes = [len(e.data) for e in made]
    errors = [psnr(photo.pixels, codec.decode(e.data).picture.pixels) for e in made]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors)
    assert sizes[-1] > 8 * sizes[0]
    assert errors[0] > 22
    assert errors[-1] > 36
    raw = photo.pixels.size
    assert sizes[2] < raw / 15


def test_reported_numbers_are_those_of_the_file(codec: Codec, photo: Picture) -> None:
    made = codec.encode(photo, quality=33.3)
    assert made.quality == pytest.approx(33.3)
    assert container.read_header(made.data).quality == 333
    assert made.bpp == len(made.data) * 8 / (photo.width * photo.height)
    assert made.psnr is None
    assert {"transform", "prior", "entropy"} <= set(made.seconds)


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_is_lossless(codec: Codec, synthetic: Make, channels: int) -> None:
    picture = synthetic(37, 50, channels, alpha=True)
    decoded = codec.decode(codec.encode(picture, quality=30).data).picture
    assert picture.alpha is not None
    assert decoded.alpha is not None
    assert (decoded.alpha == picture.alpha).all()
    assert decoded.pixels.shape == picture.pixels.shape


def test_encoding_is_repeatable(codec: Codec, photo: Picture) -> None:
    assert codec.encode(photo, quality=40).data == codec.encode(photo, quality=40).data


def test_plain_functions_take_arrays_and_pillow_images(codec: Codec, synthetic: Make) -> None:
    picture = synthetic(30, 44, alpha=True)
    assert picture.alpha is not None
    rgb, gray = picture.pixels, picture.pixels[:, :, 0]
    rgba = np.dstack([rgb, picture.alpha])
    expected = codec.encode(Picture(rgb), quality=50).data
    assert encode(rgb, quality=50, device="cpu") == expected
    assert encode(Image.fromarray(rgb), quality=50, device="cpu") == expected
    assert decode(expected, device="cpu").shape == (30, 44, 3)
    assert decode(encode(gray, device="cpu"), device="cpu").shape == (30, 44, 1)
    back = decode(encode(rgba, device="cpu"), device="cpu")
    assert (back[:, :, 3] == picture.alpha).all()


@pytest.mark.parametrize(
    "options",
    [
        {"quality": -0.1},
        {"quality": 100.1},
        {"quality": float("nan")},
        {"tile": 255},
        {"tile": 8192},
        {"metadata": ["x"]},
    ],
)
def test_bad_options_are_refused(codec: Codec, synthetic: Make, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        codec.encode(synthetic(8, 8), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_bad_pixels_are_refused(pixels: Pixels) -> None:
    with pytest.raises(InputError):
        Picture(pixels)


# Tiles, regions, scales -----------------------------------------------------------------------------------------------


def test_tiles_cost_little_and_show_no_seams(codec: Codec, large_photo: Picture) -> None:
    whole, tiled = (codec.encode(large_photo, quality=50, tile=tile) for tile in (1024, 256))
    assert container.probe(tiled.data).tiles == 6
    assert len(tiled.data) < 1.08 * len(whole.data)
    a, b = (codec.decode(e.data).picture.pixels for e in (whole, tiled))
    original = large_photo.pixels
    assert abs(psnr(original, a) - psnr(original, b)) < 0.15
    errors = np.square(b.astype(float) - original).mean(2)
    seams = errors[[255, 256]].mean() + errors[:, [255, 256, 511, 512]].mean()
    # The same rows and columns of the untiled picture are the measure: contents differ from place to place.
    plain = np.square(a.astype(float) - original).mean(2)
    assert seams < 1.35 * (plain[[255, 256]].mean() + plain[:, [255, 256, 511, 512]].mean())


def test_batch_of_tiles_gives_the_same_file(codec: Codec, synthetic: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = synthetic(520, 520)
    one = codec.encode(picture, quality=40, tile=256).data
    monkeypatch.setattr(codec.coder, "batch", 3)
    assert codec.encode(picture, quality=40, tile=256).data == one


@pytest.fixture(scope="module")
def tiled(codec: Codec, synthetic: Make) -> tuple[bytes, Pixels]:
    """A file of 3 x 3 tiles, and its pixels."""
    data = codec.encode(synthetic(600, 700), quality=55, tile=256).data
    return data, codec.decode(data).picture.pixels


@pytest.mark.parametrize(
    "region",
    [(0, 0, 700, 600), (0, 0, 1, 1), (699, 599, 1, 1), (250, 250, 13, 11), (17, 301, 400, 5), (512, 0, 188, 600)],
)
def test_region_equals_the_crop(codec: Codec, tiled: tuple[bytes, Pixels], region: tuple[int, int, int, int]) -> None:
    data, full = tiled
    x, y, width, height = region
    part = codec.decode(data, region=region).picture.pixels
    assert difference(part, full[y : y + height, x : x + width]) <= 1


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("region", [None, (100, 40, 300, 250), (511, 255, 3, 3)])
def test_scaled_region_equals_the_crop_of_the_scaled_picture(
    codec: Codec, tiled: tuple[bytes, Pixels], region: tuple[int, int, int, int] | None, scale: int
) -> None:
    data, _ = tiled
    full = codec.decode(data, scale=scale).picture.pixels
    x, y, width, height = region or (0, 0, 700, 600)
    part = codec.decode(data, region=region, scale=scale).picture.pixels
    rows = slice(y // scale, -(-(y + height) // scale))
    columns = slice(x // scale, -(-(x + width) // scale))
    assert difference(part, full[rows, columns]) <= 1


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(96, 128), (77, 131)])
def test_scaled_picture_is_the_mean(codec: Codec, synthetic: Make, height: int, width: int, scale: int) -> None:
    data = codec.encode(synthetic(height, width), quality=50).data
    full = codec.decode(data).picture.pixels
    small = codec.decode(data, scale=scale).picture.pixels
    assert small.shape == (-(-height // scale), -(-width // scale), 3)
    rows, columns = height // scale, width // scale  # the rest reaches beyond the picture
    blocks = full[: rows * scale, : columns * scale].reshape(rows, scale, columns, scale, 3)
    assert np.abs(small[:rows, :columns] - blocks.mean((1, 3))).max() <= 1.01


def test_scaled_region_of_alpha(codec: Codec, synthetic: Make) -> None:
    picture = synthetic(61, 83, alpha=True)
    assert picture.alpha is not None
    data = codec.encode(picture, quality=20).data
    part = codec.decode(data, region=(7, 9, 40, 30)).picture.alpha
    assert part is not None
    assert (part == picture.alpha[9:39, 7:47]).all()
    for scale in (2, 4, 8):
        decoded = codec.decode(data, scale=scale, region=(8, 16, 48, 32)).picture
        assert decoded.alpha is not None
        assert decoded.alpha.shape == decoded.pixels.shape[:2]
        expected = picture.alpha[16:48, 8:56].reshape(32 // scale, scale, 48 // scale, scale).mean((1, 3))
        assert np.abs(decoded.alpha - expected).max() <= 0.51
        odd = codec.decode(data, scale=scale).picture
        assert odd.alpha is not None
        assert odd.alpha.shape == odd.pixels.shape[:2]


@pytest.mark.parametrize(
    "region", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 701, 5), (0, 596, 5, 5), (2**40, 0, 1, 1), (5, 5, -1, 2)]
)
def test_region_outside_is_refused(
    codec: Codec, tiled: tuple[bytes, Pixels], region: tuple[int, int, int, int]
) -> None:
    with pytest.raises(InputError, match="region"):
        codec.decode(tiled[0], region=region)


@pytest.mark.parametrize("scale", [0, 3, 16, -1])
def test_unknown_scale_is_refused(codec: Codec, tiled: tuple[bytes, Pixels], scale: int) -> None:
    with pytest.raises(InputError, match="scale"):
        codec.decode(tiled[0], scale=scale)


def test_region_reads_only_the_tiles_it_needs(codec: Codec, tiled: tuple[bytes, Pixels]) -> None:
    """With every other tile destroyed, a region deep inside one tile still decodes; its neighbour's border does not."""
    data, full = tiled
    still = container.read_still(data)
    payloads = [bytes(t) if t is not None and n == 4 else b"" for n, t in enumerate(still.tiles)]
    broken = container.write_still(still.header, payloads)
    margin = codec.coder.network.halo * STRIDE
    inside = (256 + margin, 256 + margin, 256 - 2 * margin, 256 - 2 * margin)
    part = codec.decode(broken, region=inside, allow_partial=True)
    assert part.damaged == ()
    x, y, width, height = inside
    assert difference(part.picture.pixels, full[y : y + height, x : x + width]) <= 1
    assert difference(codec.decode(broken, region=inside).picture.pixels, part.picture.pixels) == 0
    wider = codec.decode(broken, region=(x - 1, y, width, height), allow_partial=True)
    assert wider.damaged == (3,)
    with pytest.raises(FormatError):
        codec.decode(broken, region=(x - 1, y, width, height))


def test_region_of_a_file_with_bad_bytes_elsewhere(codec: Codec, tiled: tuple[bytes, Pixels]) -> None:
    """The table leads past what is not needed: neither its bytes nor its CRC are looked at."""
    data, full = tiled
    last = [c for c in container.chunks(data) if c.name == "TILE"][-1]
    region = (0, 0, 100, 90)
    for broken in (data[: last.offset + 20], data[: last.offset] + bytes(last.length)):
        part = codec.decode(broken, region=region).picture.pixels
        assert difference(part, full[:90, :100]) <= 1
        with pytest.raises(FormatError):
            codec.decode(broken)
    assert difference(codec.decode(memoryview(data), region=region).picture.pixels, full[:90, :100]) <= 1


# Windows and halos ----------------------------------------------------------------------------------------------------


class Spreading:
    """A coder whose untrained network spreads every influence as far as it can, and what it does to one picture."""

    size = (200, 330)

    def __init__(self, pixels: Pixels) -> None:
        torch.manual_seed(0)
        network = Hyperprior()
        for module in network.modules():
            if isinstance(module, Block):
                nn.init.constant_(module.depthwise.weight, 1 / 3)
                nn.init.normal_(module.project.weight, std=0.05)
        for layer in (network.enc_out, network.dec_out):
            nn.init.normal_(layer.weight, std=0.02)
        self.network = integerise(network)
        self.coder = PictureCoder(self.network, torch.device("cpu"))
        self.coder.transforms = self.network  # whose sums differ in the last bits only
        self.watch = Stopwatch(torch.device("cpu"))
        self.picture = pixels
        self.payloads = self.coder.encode(pixels, 600, 256, self.watch)

    def pixels(self, scale: int = 1) -> Pixels:
        job = DecodeJob(self.payloads.__getitem__, self.size, 600, 256, self.watch)
        return self.coder.decode(job, Box(0, 0, *self.size), scale)

    def latents(self) -> torch.Tensor:
        """What the tiles are coded from."""
        seen = []
        original = self.network.code

        def code(
            shape: tuple[int, int, int],
            quality: torch.Tensor,
            y: torch.Tensor | None = None,
            z: torch.Tensor | None = None,
        ) -> Coding:
            assert y is not None
            seen.append(y.clone())
            return original(shape, quality, y)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.network, "code", code)
            self.coder.encode(self.picture, 600, 256, self.watch)
        return torch.cat(seen, 3)


@pytest.mark.parametrize("window", [5, 8])
def test_windows_give_what_the_whole_gives(synthetic: Make, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    spreading = Spreading(synthetic(*Spreading.size).pixels)
    scales = (1, 2, 8)
    whole = {scale: spreading.pixels(scale) for scale in scales}
    latents = spreading.latents()
    monkeypatch.setattr("calotype.windows.WINDOW", window)
    for scale in scales:
        part = spreading.pixels(scale)
        assert difference(part, whole[scale]) <= 1
        assert (part != whole[scale]).mean() < 1e-4
    assert (spreading.latents() - latents).abs().max() < 1e-4
    # With a halo of one position less it is not so.
    monkeypatch.setattr(Hyperprior, "halo", spreading.network.halo - 1)
    assert (spreading.pixels() != whole[1]).mean() > 1e-4
    assert (spreading.latents() - latents).abs().max() > 1e-4


def test_one_file_is_drawn_in_two_ways(codec: Codec, photo: Picture) -> None:
    """The visual one is farther from the original in numbers, and nearer in what networks see."""
    visual = Codec.load(device="cpu", tune="visual")
    data = codec.encode(photo, quality=40).data
    assert visual.encode(photo, quality=40).data == data
    assert visual.symbol_hash(data) == codec.symbol_hash(data)
    plain, drawn = (c.decode(data).picture.pixels for c in (codec, visual))
    lost = psnr(photo.pixels, plain) - psnr(photo.pixels, drawn)
    assert 0 < lost < 2.5
    original, plain, drawn = (
        torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255 - 0.5 for p in (photo.pixels, plain, drawn)
    )
    seen = [perceptual.distance(perceptual.features(original), perceptual.features(x)).item() for x in (plain, drawn)]
    assert seen[1] < seen[0]
    assert (decode(data, device="cpu", tune="visual") == visual.decode(data).picture.pixels).all()


@pytest.mark.parametrize(("model", "tune"), [("mixture", "visual"), ("hyperprior", "pretty")])
def test_unknown_tunes_are_refused(model: str, tune: Any) -> None:
    with pytest.raises((ModelNotFoundError, InputError), match="tune"):
        Codec.load(model, device="cpu", tune=tune)


@pytest.mark.skipif(not bfloat16_is_fast(torch.device("cpu")), reason="this processor has no bfloat16 products")
@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize("quality", [0, 10, 50, 100])
def test_bfloat16_moves_no_pixel_by_more_than_one(model: str, photo: Picture, quality: float) -> None:
    """And an encoder that multiplies so is as good, symbol by symbol."""
    codec = Codec.load(model, device="cpu")
    assert isinstance(codec.coder, PictureCoder)

    def in_float32(codec: Codec) -> Codec:
        coder = codec.coder
        assert isinstance(coder, PictureCoder)
        other = PictureCoder(coder.network, coder.device, tune=codec.spec.tune, gradient=coder._gradient)
        other.transforms = other.network
        return Codec(other, codec.spec)

    data, plain = codec.encode(photo, quality=quality).data, in_float32(codec)
    shown, expected = (c.decode(data).picture.pixels for c in (codec, plain))
    assert 0 < (shown != expected).mean() < 0.15
    assert difference(shown, expected) == 1
    if getattr(codec.coder.network.config, "packed", False):
        # A block moves as a whole, whatever little moves it: a noise that says nothing of the encoder.
        codec = unpacked(codec)
        plain = in_float32(codec)

    def made(original: Picture, effort: int) -> list[tuple[int, float]]:
        """Bytes and PSNR by both encoders."""
        files = [(c, c.encode(original, quality=quality, effort=effort).data) for c in (codec, plain)]
        return [(len(data), psnr(original.pixels, c.decode(data).picture.pixels)) for c, data in files]

    # Of few bytes one symbol more or less is felt: only several pictures tell.
    wholes = [read_picture(path).pixels for path in sorted(SAMPLES.iterdir()) if path.suffix in (".png", ".jpg")]
    originals = [Picture(np.ascontiguousarray(pixels[:384, :512])) for pixels in wholes]
    for effort in (3, 5):
        (size, shown_psnr), (exact_size, exact_psnr) = np.mean([made(p, effort) for p in originals], 0)
        assert size == pytest.approx(exact_size, rel=0.003)
        assert shown_psnr == pytest.approx(exact_psnr, abs=0.03)


def test_windows_of_the_shipped_network(codec: Codec, photo: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(photo, quality=60).data
    whole = {scale: codec.decode(data, scale=scale).picture.pixels for scale in (1, 4)}
    monkeypatch.setattr("calotype.windows.WINDOW", 7)
    for scale, pixels in whole.items():
        assert difference(codec.decode(data, scale=scale).picture.pixels, pixels) <= 1
    assert len(codec.encode(photo, quality=60).data) == pytest.approx(len(data), rel=0.002)


def test_halo_covers_the_receptive_field(codec: Codec) -> None:
    """A change at one latent position or pixel reaches no farther than the halo, and does reach its neighbours."""
    network, side = codec.coder.network, 21
    t, middle = torch.tensor([0.5]), side // 2
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        y = torch.randn(1, 320, side, side, generator=generator)
        x = torch.rand(1, 3, side * STRIDE, side * STRIDE, generator=generator) - 0.5
        changed_y, changed_x = y.clone(), x.clone()
        changed_y[:, :, middle, middle] += 50
        changed_x[:, :, middle * STRIDE : (middle + 1) * STRIDE, middle * STRIDE : (middle + 1) * STRIDE] += 50
        pixels = (network.synthesise(changed_y, t) - network.synthesise(y, t)).abs().amax((0, 1))
        latent = (network.analyse(changed_x, t) - network.analyse(x, t)).abs().amax((0, 1))
    reached = pixels.unfold(0, STRIDE, STRIDE).unfold(1, STRIDE, STRIDE).amax((2, 3))
    for influence in (reached, latent):
        places = torch.nonzero(influence)
        far = int((places - middle).abs().max())
        assert 1 < far <= network.halo


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50), st.integers(1, 50), st.integers(1, 20))
def test_grid_covers_an_area_once(top: int, left: int, height: int, width: int, side: int) -> None:
    area = Box(top, left, top + height, left + width)
    count = np.zeros((100, 100), int)
    for box in grid(area, side):
        assert box.within(area) == box
        assert box.top // side == (box.bottom - 1) // side
        assert box.left // side == (box.right - 1) // side
        count[box.slices] += 1
    assert (count[area.slices] == 1).all()
    assert count.sum() == height * width


def test_progress_grows_to_one(codec: Codec, synthetic: Make) -> None:
    seen: list[float] = []
    data = codec.encode(synthetic(300, 520), quality=30, tile=256, progress=seen.append).data
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) > 1
    seen.clear()
    codec.decode(data, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
