"""Ordinary picture files in and out: formats, modes, orientation, metadata, whole files or none."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from calotype.api import Codec
from calotype.errors import CalotypeError, InputError, LimitError, OutputExistsError
from calotype.media import (
    INPUT_SUFFIXES,
    OUTPUT_SUFFIXES,
    Picture,
    decode_alpha,
    encode_alpha,
    from_pillow,
    read_picture,
    to_pillow,
    write_file,
    write_picture,
)

Make = Callable[..., Picture]
Pixels = npt.NDArray[np.uint8]

LOSSLESS_INPUT = ("PNG", "WEBP", "TIFF", "BMP", "PPM")
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf/></x:xmpmeta>'
ARTIST, ORIENTATION = 0x013B, 0x0112


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    if format == "WEBP":
        options = {"lossless": True, "exact": True} | options
    image.save(out, format, **options)
    return out.getvalue()


def exif(**tags: Any) -> Image.Exif:
    made = Image.Exif()
    made[ARTIST] = "Nobody"
    if "orientation" in tags:
        made[ORIENTATION] = tags["orientation"]
    return made


@pytest.fixture(scope="module")
def rgb(synthetic: Make) -> Pixels:
    return synthetic(23, 31).pixels


@pytest.fixture(scope="module")
def plane(synthetic: Make) -> Pixels:
    return synthetic(23, 31, 1, seed=5).pixels[:, :, 0]


# Input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", LOSSLESS_INPUT)
def test_rgb_is_read_exactly(rgb: Pixels, format: str) -> None:
    picture = read_picture(saved(Image.fromarray(rgb), format))
    assert (picture.pixels == rgb).all()
    assert picture.alpha is None
    assert (picture.width, picture.height) == (31, 23)


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_lossy_formats_are_read(rgb: Pixels, format: str) -> None:
    picture = read_picture(saved(Image.fromarray(rgb), format, quality=95))
    assert np.abs(picture.pixels.astype(int) - rgb).mean() < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_gray_is_read_as_one_channel(plane: Pixels, format: str) -> None:
    picture = read_picture(saved(Image.fromarray(plane), format))
    assert picture.pixels.shape == (23, 31, 1)
    assert (picture.pixels[:, :, 0] == plane).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_read(rgb: Pixels, plane: Pixels, format: str) -> None:
    picture = read_picture(saved(Image.fromarray(np.dstack([rgb, plane])), format))
    assert (picture.pixels == rgb).all()
    assert picture.alpha is not None
    assert (picture.alpha == plane).all()


def test_gray_with_alpha_is_read(plane: Pixels) -> None:
    image = Image.merge("LA", [Image.fromarray(plane), Image.fromarray(255 - plane)])
    picture = read_picture(saved(image, "PNG"))
    assert picture.pixels.shape == (23, 31, 1)
    assert picture.alpha is not None
    assert (picture.alpha == 255 - plane).all()


def test_opaque_alpha_is_dropped(rgb: Pixels) -> None:
    opaque = np.dstack([rgb, np.full((23, 31), 255, np.uint8)])
    assert read_picture(saved(Image.fromarray(opaque), "PNG")).alpha is None


def test_palette_is_read_as_rgb() -> None:
    indexes = (np.arange(16 * 20).reshape(16, 20) % 7).astype(np.uint8)
    colours = np.random.default_rng(0).integers(0, 256, (7, 3)).astype(np.uint8)
    image = Image.fromarray(indexes, "P")
    image.putpalette(colours.tobytes())
    assert (read_picture(saved(image, "PNG")).pixels == colours[indexes]).all()
    for transparency in (3, bytes([255, 0, 128])):
        picture = read_picture(saved(image, "PNG", transparency=transparency))
        expected = np.full(7, 255)
        if isinstance(transparency, int):
            expected[transparency] = 0
        else:
            expected[: len(transparency)] = list(transparency)
        assert picture.alpha is not None
        assert (picture.alpha == expected[indexes]).all()
        assert (picture.pixels == colours[indexes]).all()


def test_transparent_colour_of_rgb_is_alpha(rgb: Pixels) -> None:
    picture = read_picture(saved(Image.fromarray(rgb), "PNG", transparency=tuple(rgb[2, 3].tolist())))
    assert picture.alpha is not None
    assert (picture.alpha == np.where((rgb == rgb[2, 3]).all(2), 0, 255)).all()


def test_bilevel_is_read_as_gray(plane: Pixels) -> None:
    picture = read_picture(saved(Image.fromarray(plane > 110), "PNG"))
    assert picture.pixels.shape[2] == 1
    assert (picture.pixels[:, :, 0] == np.where(plane > 110, 255, 0)).all()


def test_cmyk_is_read_as_rgb(rgb: Pixels) -> None:
    """White, black and the inks come out right, and the ink profile does not stay."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:, 3] = 255
    inks[8:, :8, 0] = 255
    for format in ("TIFF", "JPEG"):
        options = {"quality": 100} if format == "JPEG" else {}
        picture = read_picture(saved(Image.fromarray(inks, "CMYK"), format, icc_profile=ICC, **options))
        assert picture.pixels.shape == (16, 16, 3)
        assert picture.pixels[2, 2].min() > 245
        assert picture.pixels[2, 13].max() < 10
        assert picture.pixels[13, 2, 0] < 10 < 245 < picture.pixels[13, 2, 1]
        assert picture.icc is None


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_reduced(format: str) -> None:
    wide = np.array([[0, 128, 129, 257, 32896, 65278, 65407, 65535]], np.uint16)
    data = b"P5 8 1 65535\n" + wide.astype(">u2").tobytes() if format == "PPM" else saved(Image.fromarray(wide), format)
    picture = read_picture(data)
    assert picture.pixels.shape == (1, 8, 1)
    assert picture.pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_float_tiff_is_read() -> None:
    data = saved(Image.fromarray(np.array([[0.0, 0.5, 1.0, 7.0, -1.0]], np.float32)), "TIFF")
    assert read_picture(data).pixels[0, :, 0].tolist() == [0, 128, 255, 255, 0]


def test_first_frame_of_an_animation_is_read(rgb: Pixels) -> None:
    first, second = Image.fromarray(rgb), Image.fromarray(255 - rgb)
    for format in ("WEBP", "PNG"):
        data = saved(first, format, save_all=True, append_images=[second])
        assert (read_picture(data).pixels == rgb).all()


def test_file_and_bytes_are_the_same(rgb: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(Image.fromarray(rgb), "PNG"))
    assert (read_picture(path).pixels == read_picture(path.read_bytes()).pixels).all()


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What to do to the stored pixels, by the EXIF specification's orientation."""


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied_and_forgotten(rgb: Pixels, orientation: int, format: str) -> None:
    picture = read_picture(saved(Image.fromarray(rgb), format, exif=exif(orientation=orientation)))
    assert (picture.pixels == UPRIGHT[orientation](rgb)).all()
    if format == "TIFF":
        return  # a TIFF's own tags are no EXIF block
    assert picture.exif is not None
    kept = Image.Exif()
    kept.load(picture.exif)
    assert kept.get(ARTIST) == "Nobody"
    assert kept.get(ORIENTATION, 1) == 1
    # So a picture that is written and read again is not turned twice.
    again = read_picture(write_picture(picture, "png"))
    assert (again.pixels == picture.pixels).all()


def tags(block: bytes | None) -> set[int]:
    """The tags of an EXIF block's first directory."""
    loaded = Image.Exif()
    loaded.load(block or b"")
    return set(loaded)


def test_layout_of_a_tiff_is_not_metadata(rgb: Pixels) -> None:
    """Its strips, sizes and compression describe the file, not the picture; its ICC profile is no EXIF."""
    image = Image.fromarray(rgb)
    assert not tags(read_picture(saved(image, "TIFF", compression="tiff_lzw", icc_profile=ICC)).exif)
    assert tags(read_picture(saved(image, "TIFF", exif=exif())).exif) == {ARTIST}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_block_has_one_form(rgb: Pixels, format: str) -> None:
    """As in a JPEG file, whatever it came from."""
    block = read_picture(saved(Image.fromarray(rgb), format, exif=exif())).exif
    assert block is not None
    assert block.startswith((b"Exif\0\0MM\0*", b"Exif\0\0II*\0"))
    assert tags(block) == {ARTIST}


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_unknown_orientation_is_ignored(rgb: Pixels, orientation: int) -> None:
    assert (read_picture(saved(Image.fromarray(rgb), "PNG", exif=exif(orientation=orientation))).pixels == rgb).all()


@pytest.mark.parametrize("format", ["png", "webp"])
def test_orientation_in_xmp_does_not_turn_a_picture_twice(rgb: Pixels, format: str) -> None:
    """Cameras' software repeats the orientation in XMP, and readers believe it where EXIF is silent."""
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    data = saved(Image.fromarray(rgb), "WEBP", exif=exif(orientation=6), xmp=xmp)
    picture = read_picture(data)
    assert (picture.pixels == np.rot90(rgb, -1)).all()
    again = read_picture(write_picture(picture, format))
    assert (again.pixels == picture.pixels).all()


# Metadata through a `.clt` file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_survives_a_clt_file(codec: Codec, rgb: Pixels, format: str) -> None:
    options: dict[str, Any] = {"icc_profile": ICC, "exif": exif()}
    if format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    else:
        options["xmp"] = XMP
    picture = read_picture(saved(Image.fromarray(rgb), format, **options))
    assert picture.icc == ICC
    assert picture.xmp == XMP
    assert picture.exif
    decoded = codec.decode(codec.encode(picture, quality=20).data).picture
    assert (decoded.icc, decoded.exif, decoded.xmp) == (picture.icc, picture.exif, picture.xmp)
    for output in ("jpeg", "png", "webp"):
        written = read_picture(write_picture(decoded, output))
        assert (written.icc, written.xmp) == (ICC, XMP), output
        kept = Image.Exif()
        assert written.exif is not None
        kept.load(written.exif)
        assert kept.get(ARTIST) == "Nobody", output
    bare = codec.decode(codec.encode(picture, quality=20, metadata=("icc",)).data).picture
    assert (bare.icc, bare.exif, bare.xmp) == (ICC, None, None)


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", sorted(set(OUTPUT_SUFFIXES.values())))
def test_every_output_format(synthetic: Make, format: str, channels: int, alpha: bool) -> None:
    picture = synthetic(19, 26, channels, alpha=alpha)
    data = write_picture(picture, format)
    if format == "npy":
        array = np.load(io.BytesIO(data))
        assert array.shape == (19, 26, channels + alpha)
        assert (array[:, :, :channels] == picture.pixels).all()
        assert not alpha or (array[:, :, -1] == picture.alpha).all()
        return
    again = read_picture(data)
    difference = np.abs(again.pixels.astype(int) - picture.pixels)  # a gray WebP or AVIF comes back as RGB
    if format in ("jpeg", "avif"):
        assert difference.mean() < 4
    else:
        assert difference.max() == 0
    if alpha and format in ("png", "webp", "tiff", "avif"):
        assert again.alpha is not None
        assert np.abs(again.alpha.astype(int) - picture.alpha).max() <= (8 if format == "avif" else 0)


def test_unknown_output_format_is_refused(synthetic: Make) -> None:
    with pytest.raises(InputError, match="format"):
        write_picture(synthetic(4, 4), "gif")


def test_picture_too_large_for_a_format_is_refused() -> None:
    with pytest.raises(InputError, match="webp"):
        write_picture(Picture(np.zeros((1, 20000, 3), np.uint8)), "webp")
    with pytest.raises(InputError, match="jpeg"):
        write_picture(Picture(np.zeros((70000, 1, 1), np.uint8)), "jpeg")


def test_suffixes_are_consistent(synthetic: Make, tmp_path: Path) -> None:
    picture = synthetic(9, 9)
    for suffix, format in OUTPUT_SUFFIXES.items():
        path = tmp_path / f"a{suffix}"
        path.write_bytes(write_picture(picture, format))
        assert (suffix in INPUT_SUFFIXES) == (suffix != ".npy")
        if suffix in INPUT_SUFFIXES:
            assert read_picture(path).pixels.shape == (9, 9, 3)


@settings(max_examples=40)
@given(height=st.integers(1, 9), width=st.integers(1, 40), seed=st.integers(0, 9), flat=st.booleans())
def test_alpha_plane_round_trip(height: int, width: int, seed: int, flat: bool) -> None:
    alpha = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    if flat:
        alpha[:] = 255 * (seed % 2)
    assert (decode_alpha(encode_alpha(alpha), width, height) == alpha).all()
    with pytest.raises(InputError):
        decode_alpha(encode_alpha(alpha), width + 1, height)


def test_pillow_round_trip(synthetic: Make) -> None:
    for channels in (1, 3):
        for alpha in (False, True):
            picture = synthetic(8, 9, channels, alpha=alpha)
            image = to_pillow(picture)
            assert (
                image.mode == {(1, False): "L", (1, True): "LA", (3, False): "RGB", (3, True): "RGBA"}[channels, alpha]
            )
            again = from_pillow(image)
            assert (again.pixels == picture.pixels).all()
            assert (again.alpha is None) == (not alpha)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_unreadable_input_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_picture(tmp_path / "absent.png")
    with pytest.raises(InputError):
        read_picture(tmp_path)
    for data in (b"", b"text", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(InputError):
            read_picture(data)


def test_large_input_is_refused_before_it_is_decoded() -> None:
    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p)) + n + p + struct.pack(">I", zlib.crc32(n + p)) for n, p in parts
    )
    with pytest.raises(LimitError, match="40000x40000"):
        read_picture(png)
    with pytest.raises(InputError):
        read_picture(png, max_pixels=2**31)
    small = saved(Image.new("RGB", (10, 10)), "PNG")
    read_picture(small, max_pixels=100)
    with pytest.raises(LimitError):
        read_picture(small, max_pixels=99)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "AVIF"])
def test_damaged_input_is_our_error_or_a_picture(rgb: Pixels, format: str) -> None:
    options: dict[str, Any] = {} if format in ("BMP", "PPM") else {"exif": exif(orientation=6), "icc_profile": ICC}
    if format == "TIFF":
        options["compression"] = "tiff_lzw"
    data = saved(Image.fromarray(rgb), format, **options)
    rng = np.random.default_rng(2)
    failed = 0
    for trial in range(1000):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            # The head holds the structure: wound it more often than the pixels.
            place = int(rng.integers(len(data) if trial % 2 else min(len(data), 400)))
            broken[place] = int(rng.integers(256))
        if trial % 5 == 0:
            del broken[int(rng.integers(len(broken))) :]
        try:
            picture = read_picture(bytes(broken), max_pixels=2**20)
        except CalotypeError:
            failed += 1
        else:
            assert picture.pixels.size > 0
    assert failed > 100


# Writing files --------------------------------------------------------------------------------------------------------


def test_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.clt"
    write_file(path, b"first", overwrite=False)
    assert path.read_bytes() == b"first"
    with pytest.raises(OutputExistsError):
        write_file(path, b"second", overwrite=False)
    assert path.read_bytes() == b"first"
    write_file(path, b"second", overwrite=True)
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["a.clt"]


def test_new_file_has_the_permissions_of_the_mask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a.clt", b"x", overwrite=False)
    finally:
        os.umask(before)
    assert (tmp_path / "a.clt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "expected"), [(OSError(28, "No space left"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_failed_write_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: BaseException,
    expected: type[BaseException],
) -> None:
    path = tmp_path / "a.clt"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    for target in (path, tmp_path / "b.clt"):
        with pytest.raises(expected):
            write_file(target, b"new", overwrite=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.clt"]
    assert path.read_bytes() == b"old"


def test_unwritable_place_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.clt", tmp_path / "folder"):
        with pytest.raises(InputError):
            write_file(path, b"x", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
