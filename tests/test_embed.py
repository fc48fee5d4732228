"""Pillow, PyTorch, WebDataset, buffers and numcodecs: the codec as others call it."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

import calotype
from calotype import container
from calotype.api import Codec
from calotype.embed import buffers, pillow, webdataset
from calotype.embed.torch import Dataset, Loader
from calotype.errors import DriftError, FormatError, InputError, LimitError
from calotype.header import Header
from calotype.media import Picture, as_picture, to_pillow
from calotype.picture import PictureCoder

Make = Callable[..., Picture]
SIZE = (48, 80)  # height, width


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    pillow.register(device="cpu")


def encode(picture: Picture, quality: float = 40, tile: int = 1024) -> bytes:
    return Codec.load(device="cpu").encode(picture, quality=quality, tile=tile).data


def damage_tile(data: bytes) -> bytes:
    broken = bytearray(data)
    broken[-8] ^= 0xFF
    return bytes(broken)


def drifted(data: bytes) -> bytes:
    """The file with a wrong symbol check, and all else as it should be."""
    still = container.read_still(data)
    tiles = [bytes(tile) for tile in still.tiles if tile is not None]
    return container.write_still(still.header, [bytes([tiles[0][0] ^ 1]) + tiles[0][1:], *tiles[1:]])


# Pillow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "alpha", "mode"), [(1, False, "L"), (1, True, "LA"), (3, False, "RGB"), (3, True, "RGBA")]
)
def test_pillow_round_trip(tmp_path: Path, synthetic: Make, channels: int, alpha: bool, mode: str) -> None:
    picture = synthetic(*SIZE, channels, alpha=alpha)
    path = tmp_path / "a.clt"
    to_pillow(picture).save(path, quality=70)
    assert path.read_bytes() == encode(picture, 70)
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("CALOTYPE", mode, (80, 48))
        assert image.get_format_mimetype() == "image/x-calotype"
        decoded = np.asarray(image)
    assert np.array_equal(decoded, np.squeeze(calotype.decode(path.read_bytes(), device="cpu")))
    with io.BytesIO(path.read_bytes()) as stream:
        assert np.array_equal(np.asarray(Image.open(stream)), decoded)


@pytest.mark.parametrize(("mode", "opened"), [("1", "L"), ("I;16", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("PA", "RGBA")])
def test_pillow_converts_other_modes(synthetic: Make, mode: str, opened: str) -> None:
    image = to_pillow(synthetic(*SIZE, alpha=mode == "PA"))
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert("P").convert(mode)
    if mode == "PA":
        image.putalpha(128)
    out = io.BytesIO()
    image.save(out, "CALOTYPE")
    assert Image.open(out).mode == opened


def test_pillow_keeps_transparency_of_a_palette(synthetic: Make) -> None:
    image = to_pillow(synthetic(*SIZE)).quantize(16)
    image.info["transparency"] = 3
    out = io.BytesIO()
    image.save(out, "CALOTYPE")
    with Image.open(out) as opened:
        alpha = np.asarray(opened.getchannel("A"))
    assert np.array_equal(alpha == 0, np.asarray(image) == 3)


def test_pillow_opens_without_reading_pixels_or_loading_networks(tmp_path: Path, photo: Picture) -> None:
    path = tmp_path / "photo.clt"
    Image.fromarray(photo.pixels).save(path, exif=_exif(1))
    code = f"""
import io, sys
from PIL import Image
from calotype.embed import pillow
pillow.register()
class Counting(io.BytesIO):
    count = 0
    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data
stream = Counting(open({str(path)!r}, "rb").read())
image = Image.open(stream)
assert image.size == (451, 300) and image.info["exif"], image.info
assert stream.count < 400, stream.count
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pillow_metadata(synthetic: Make) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = to_pillow(synthetic(*SIZE))
    image.info["icc_profile"] = profile
    image.info["exif"] = _exif(1)
    plain, full = io.BytesIO(), io.BytesIO()
    image.save(plain, "CALOTYPE")
    image.save(full, "CALOTYPE", icc_profile=None, exif=image.getexif(), xmp="<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    # As with Pillow's own formats: the profile belongs to the pixels, the rest is kept if it is asked for.
    assert Image.open(plain).info == {"icc_profile": profile}
    opened = Image.open(full)
    assert opened.info["xmp"] == b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    assert "icc_profile" not in opened.info
    assert opened.getexif()[0x010F] == "Maker"


def test_pillow_applies_the_orientation(synthetic: Make) -> None:
    image = to_pillow(synthetic(*SIZE))
    out = io.BytesIO()
    image.save(out, "CALOTYPE", quality=90, exif=_exif(6))
    opened = Image.open(out)
    assert opened.size == (48, 80)
    assert opened.getexif().get(0x0112, 1) == 1
    assert calotype.api.psnr(np.asarray(opened), np.asarray(image.transpose(Image.Transpose.ROTATE_270))) > 30


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    return exif.tobytes()


def test_pillow_reduced_sizes(synthetic: Make, codec: Codec) -> None:
    data = encode(synthetic(90, 130))
    image = Image.open(io.BytesIO(data))
    assert image.draft(None, (40, 25)) == ("RGB", (0, 0, 65, 45))
    assert image.draft(None, (10, 10)) is None  # once only
    assert np.array_equal(np.asarray(image), codec.decode(data, scale=2).picture.pixels)
    for wanted, size in (((16, 11), (17, 12)), ((1, 1), (17, 12)), ((65, 46), (130, 90)), ((400, 400), (130, 90))):
        image = Image.open(io.BytesIO(data))
        image.draft("L", wanted)
        image.load()
        assert (image.size, image.mode) == (size, "RGB")
    image = Image.open(io.BytesIO(data))
    image.thumbnail((20, 20))
    assert image.size == (20, 14)
    assert image.scale == 2


def test_pillow_targets(tmp_path: Path, photo: Picture) -> None:
    image = Image.fromarray(photo.pixels[:160, :160])
    for options, low, high in (
        ({"target_size": 3000}, 2910, 3000),
        ({"target_bpp": 0.5}, 1552, 1600),
    ):
        image.save(tmp_path / "a.clt", **options)
        assert low <= (tmp_path / "a.clt").stat().st_size <= high
    for options in ({"target_size": 1}, {"quality": 101}, {"quality": 50, "target_bpp": 1}, {"tile": 100}):
        with pytest.raises(calotype.CalotypeError):
            image.save(tmp_path / "b.clt", **options)
        assert not (tmp_path / "b.clt").exists()


def test_pillow_refuses_what_is_not_a_picture(synthetic: Make) -> None:
    data = encode(synthetic(*SIZE))
    header = container.read_header(data)
    huge = container.write_still(Header(20000, 20000, 3, False, 1024, 600, header.model, header.weights), [b""] * 400)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(huge))
    (tile,) = container.read_still(data).tiles
    chunked = container.write_still(header, [bytes(tile or b"")])
    for good in (data, chunked):
        for bad in (good[:20], good[:8] + b"x" * 100, good[:9] + b"\xff" + good[10:], good[:4], container.MAGIC):
            with pytest.raises(UnidentifiedImageError):
                Image.open(io.BytesIO(bad))
    box = len(container.MAGIC) + 37  # behind the header: a box that claims two gigabytes
    endless = chunked[:box] + (2**31).to_bytes(4, "little") + b"eXIF" + chunked[box:]
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(endless))
    for bad, why in ((damage_tile(data), "checksum"), (data[:-5], "ends"), (drifted(data), "other symbols")):
        image = Image.open(io.BytesIO(bad))
        with pytest.raises(OSError, match=why) as raised:
            image.load()
        assert isinstance(raised.value, calotype.CalotypeError)


def test_pillow_skips_chunks_it_does_not_know(synthetic: Make) -> None:
    data = encode(Picture(synthetic(*SIZE).pixels, exif=_exif(1)))
    box = len(container.MAGIC) + 37
    note = (1000).to_bytes(4, "little") + (named := b"noTe" + b"?" * 1000) + zlib.crc32(named).to_bytes(4, "little")
    opened = Image.open(io.BytesIO(data[:box] + note + data[box:]))
    assert opened.getexif()[0x010F] == "Maker"
    assert np.array_equal(np.asarray(opened), np.asarray(Image.open(io.BytesIO(data))))


def test_pillow_in_many_threads(tmp_path: Path, synthetic: Make) -> None:
    pictures = [synthetic(*SIZE, alpha=n % 2 == 0, seed=n) for n in range(8)]

    def work(number: int) -> npt.NDArray[np.uint8]:
        path = tmp_path / f"{number}.clt"
        to_pillow(pictures[number % 8]).save(path, quality=30)
        with Image.open(path) as image:
            return np.asarray(image)

    with ThreadPoolExecutor(6) as pool:
        decoded = list(pool.map(work, range(24)))
    for number in range(24):
        data = (tmp_path / f"{number}.clt").read_bytes()
        assert data == encode(pictures[number % 8], 30)
        assert np.array_equal(decoded[number], calotype.decode(data, device="cpu"))


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(synthetic: Make) -> torch.Tensor:
    """[5, 3, 48, 80] uint8."""
    return torch.from_numpy(np.stack([synthetic(*SIZE, seed=n).pixels for n in range(5)])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_batches_are_what_single_calls_give(codec: Codec, synthetic: Make, channels: int) -> None:
    arrays = np.stack([synthetic(*SIZE, channels, seed=n).pixels for n in range(3)]) if channels in (1, 3) else None
    if arrays is None:
        arrays = np.stack([_with_alpha(synthetic(*SIZE, channels - 1, alpha=True, seed=n)) for n in range(3)])
    x = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    files = codec.encode_batch(x, quality=[10, 50, 90])
    assert files == [encode(as_picture(a), q) for a, q in zip(arrays, (10, 50, 90), strict=True)]
    assert files == codec.encode_batch(x.double() / 255, quality=(10, 50, 90))
    for scale in (1, 4):
        decoded = codec.decode_batch(files, scale=scale)
        assert (decoded.dtype, decoded.device) == (torch.uint8, codec.coder.device)
        for picture, data in zip(decoded, files, strict=True):
            alone = codec.decode(data, scale=scale).picture
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), _with_alpha(alone))


def _with_alpha(picture: Picture) -> npt.NDArray[np.uint8]:
    return picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])


def test_files_go_through_the_networks_together(codec: Codec, synthetic: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, sizes of tiles and qualities; the float transforms may round differently in a batch."""
    network = codec.coder.network
    together = Codec(PictureCoder(network, codec.coder.device, batch=3), codec.spec)
    files = [encode(synthetic(300, 280, seed=n), 20 * n, 256 if n < 4 else 512) for n in range(5)]
    shapes: list[int] = []
    code = network.code
    monkeypatch.setattr(network, "code", lambda shape, *rest: shapes.append(shape[0]) or code(shape, *rest))
    decoded = together.decode_batch(files)
    assert sorted(shapes) == sorted([3, 1] * 4 + [1])  # four tiles of four files, one of another
    for picture, data in zip(decoded, files, strict=True):
        alone = codec.decode(data).picture.pixels
        assert np.abs(picture.permute(1, 2, 0).numpy().astype(int) - alone).max() <= 1


def test_pictures_of_several_windows(codec: Codec, synthetic: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(synthetic(200, 330), 60, 256)
    monkeypatch.setattr("calotype.windows.WINDOW", 8)
    decoded = codec.decode_batch([data])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(decoded - codec.decode(data).picture.pixels).max() <= 1


def test_bad_batches(codec: Codec, batch: torch.Tensor, synthetic: Make) -> None:
    for x in (batch[0], batch.int(), batch.float(), batch[:, :, :0], batch.float() / 255 - 0.5, batch[:, :0]):
        with pytest.raises(InputError):
            codec.encode_batch(x)
    with pytest.raises(InputError, match="2 qualities for 5 pictures"):
        codec.encode_batch(batch, quality=[1, 2])
    files = codec.encode_batch(batch[:2])
    with pytest.raises(InputError, match="empty"):
        codec.decode_batch([])
    with pytest.raises(InputError, match="scale"):
        codec.decode_batch(files, scale=3)
    with pytest.raises(InputError, match=r"file 2 .* 80x48 gray, file 0 is 80x48 RGB"):
        codec.decode_batch([*files, encode(synthetic(*SIZE, 1))])
    with pytest.raises(LimitError, match="file 0"):
        codec.decode_batch(files, max_pixels=80 * 48 - 1)
    with pytest.raises(FormatError, match="file 1"):
        codec.decode_batch([files[0], damage_tile(files[1])])
    with pytest.raises(DriftError, match="file 1"):
        codec.decode_batch([files[0], drifted(files[1])])


# PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, synthetic: Make) -> list[Path]:
    """Six files: RGB, gray and RGBA of one size, then three sizes."""
    home = tmp_path_factory.mktemp("files")
    pictures = [synthetic(*SIZE), synthetic(*SIZE, 1), synthetic(*SIZE, alpha=True)]
    pictures += [synthetic(40 + 8 * n, 60, seed=n) for n in range(3)]
    for number, picture in enumerate(pictures):
        (home / f"{number}.clt").write_bytes(encode(picture))
    return sorted(home.glob("*.clt"))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(folder: list[Path], workers: int) -> None:
    assert Dataset(folder)[1] == folder[1].read_bytes()
    loader = Loader(Dataset(folder[:3]), device="cpu", batch_size=2, num_workers=workers)
    batches = list(loader)
    assert len(loader) == 2
    assert [tuple(b.shape) for b in batches] == [(2, 3, 48, 80), (1, 3, 48, 80)]
    for picture, path in zip(torch.cat(batches), folder, strict=False):
        expected = calotype.decode(path.read_bytes(), device="cpu")
        expected = np.repeat(expected, 3, 2) if expected.shape[2] == 1 else expected[:, :, :3]
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), expected)


def test_loader_with_targets_and_transform(folder: list[Path], codec: Codec) -> None:
    data = Dataset([str(path) for path in folder], targets=[10, 11, 12, 13, 14, 15])
    loader = Loader(data, device="cpu", scale=2, transform=lambda x: x[:, :16, :24].float() / 255, batch_size=6)
    ((pictures, targets),) = loader
    assert targets.tolist() == [10, 11, 12, 13, 14, 15]
    assert pictures.shape == (6, 3, 16, 24)
    expected = codec.decode(folder[5].read_bytes(), scale=2).picture.pixels[:16, :24]
    assert np.array_equal(pictures[5].mul(255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_loader_errors(folder: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 targets for 6 files"):
        Dataset(folder, targets=[1, 2])
    with pytest.raises(InputError, match=r"several sizes \(3x40x60, 3x48x60, 3x56x60\).*transform"):
        list(Loader(Dataset(folder[3:]), device="cpu", batch_size=3))
    with pytest.raises(InputError, match=r"none\.clt: No such file"):
        list(Loader(Dataset([tmp_path / "none.clt"]), device="cpu"))
    (tmp_path / "bad.clt").write_bytes(damage_tile(folder[0].read_bytes()))
    with pytest.raises(FormatError, match="checksum"):
        list(Loader(Dataset([folder[0], tmp_path / "bad.clt"]), device="cpu", batch_size=2))


@pytest.mark.parametrize("kind", ["torch", "numpy", "pil"])
def test_webdataset(folder: list[Path], tmp_path: Path, kind: Literal["torch", "numpy", "pil"]) -> None:
    wds = pytest.importorskip("webdataset")
    shard = tmp_path / "shard.tar"
    with wds.TarWriter(str(shard)) as writer:
        for number, path in enumerate(folder):
            writer.write({"__key__": path.stem, "clt": path.read_bytes(), "cls": number})
    samples = list(wds.WebDataset(str(shard), shardshuffle=False).decode(webdataset.handler(kind, device="cpu")))
    assert [sample["cls"] for sample in samples] == list(range(6))
    for sample, path in zip(samples, folder, strict=True):
        expected = calotype.decode(path.read_bytes(), device="cpu")
        expected = np.repeat(expected, 3, 2) if expected.shape[2] == 1 else expected[:, :, :3]
        value = sample["clt"]
        if kind == "torch":
            assert value.dtype == torch.uint8
            value = value.permute(1, 2, 0)
        elif kind == "pil":
            assert value.mode == "RGB"
        assert np.array_equal(np.asarray(value), expected)
    raw = wds.WebDataset(str(shard), shardshuffle=False).to_tuple("clt", "cls")
    ((pictures, _),) = Loader(raw, device="cpu", batch_size=6, transform=lambda x: x[:, :40, :60])
    assert pictures.shape == (6, 3, 40, 60)


def test_webdataset_handler_leaves_other_members_alone() -> None:
    handler = webdataset.handler("numpy")
    assert handler(".jpg", b"whatever") is None
    with pytest.raises(FormatError):
        handler(".left.clt", b"whatever")
    with pytest.raises(InputError, match="use one of torch, numpy, pil"):
        webdataset.handler("jax")  # type: ignore[arg-type]


# Buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_buffers(synthetic: Make, channels: int) -> None:
    picture = synthetic(*SIZE, 1 if channels < 3 else 3, alpha=channels in (2, 4))
    array = _with_alpha(picture)[:, :, 0] if channels == 0 else _with_alpha(picture)
    data = buffers.encode(array, 80, device="cpu")
    assert data == encode(picture, 80)
    decoded = buffers.decode(bytearray(data), device="cpu")
    assert decoded.shape == (SIZE if channels < 2 else (*SIZE, channels))
    assert calotype.api.psnr(decoded.reshape(array.shape), array) > 28

    buffer = bytearray(len(data) + 10)
    filled = buffers.encode(array, 80, out=buffer, device="cpu")
    assert (bytes(filled), buffer[len(data) :]) == (data, bytes(10))
    out = np.zeros(array.shape, np.uint8)
    assert buffers.decode(memoryview(data), out=out, device="cpu") is out
    assert np.array_equal(out.reshape(decoded.shape), decoded)


def test_bad_buffers(synthetic: Make) -> None:
    array = synthetic(*SIZE).pixels
    data = buffers.encode(array, device="cpu")
    for out in (bytearray(10), memoryview(bytes(100_000))):
        with pytest.raises(InputError, match="buffer"):
            buffers.encode(array, out=out, device="cpu")
    for wrong in (
        np.zeros((48, 80), np.uint8),
        np.zeros((48, 80, 3), np.int8),
        np.zeros((48, 160, 3), np.uint8)[:, ::2],
    ):
        with pytest.raises(InputError, match="out must be"):
            buffers.decode(data, out=wrong, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        buffers.encode(array.astype(np.uint16), device="cpu")
    with pytest.raises(FormatError):
        buffers.decode(b"no picture", device="cpu")


def test_numcodecs(synthetic: Make) -> None:
    numcodecs = pytest.importorskip("numcodecs")
    codec = numcodecs.get_codec({"id": "calotype", "quality": 75})
    assert codec.get_config() == {"id": "calotype", "quality": 75}
    assert numcodecs.get_codec(codec.get_config()) == codec
    array = synthetic(*SIZE).pixels
    data = codec.encode(array[None, None])
    assert data == encode(synthetic(*SIZE), 75)
    out = np.empty((1, 1, *array.shape), np.uint8)
    codec.decode(data, out=out)
    assert np.array_equal(out[0, 0], codec.decode(np.frombuffer(data, np.uint8)))
    with pytest.raises(InputError, match="quality"):
        numcodecs.get_codec({"id": "calotype", "quality": 200})
    with pytest.raises(InputError):
        codec.encode(np.zeros((2, 48, 80, 3), np.uint8))


def test_zarr(tmp_path: Path, photo: Picture) -> None:
    zarr: Any = pytest.importorskip("zarr")
    numcodecs = pytest.importorskip("numcodecs")
    frames = np.stack([photo.pixels[:128, :160], photo.pixels[100:228, 200:360]])
    options = {"shape": frames.shape, "chunks": (1, 64, 160, 3), "dtype": "u1", "zarr_format": 2}
    array = zarr.create_array(tmp_path / "a.zarr", compressors=numcodecs.get_codec({"id": "calotype"}), **options)
    array[:] = frames
    read = zarr.open_array(tmp_path / "a.zarr", mode="r")[:]
    chunk = encode(Picture(np.ascontiguousarray(frames[1, 64:])), 60)
    assert np.array_equal(read[1, 64:], calotype.decode(chunk, device="cpu"))


# Weight -----------------------------------------------------------------------------------------------------------


def test_imports_are_light() -> None:
    code = """
import sys
import calotype.embed.buffers, calotype.embed.pillow, calotype.embed.webdataset
import calotype.cluster.workers, calotype.cluster.manifest, calotype.cluster.pictures
heavy = {"torch", "ray", "numcodecs", "webdataset"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
