"""The specification is enough: a decoder written from docs/FORMAT.md alone reads what the codec writes.

And the bitstream stays what it is: the files in tests/golden, and those of earlier weights, decode to recorded symbols
and pixels.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_golden
import numpy as np
import pytest
import reference_decoder
import torch

from calotype import container, entropy, header
from calotype.api import Codec
from calotype.media import Picture, decode_alpha, read_picture
from calotype.models import lattice, tables

GOLDEN = make_golden.GOLDEN


def recorded(folder: Path) -> dict[str, dict[str, str]]:
    """What a golden folder says of its files."""
    index: dict[str, dict[str, str]] = json.loads((folder / make_golden.INDEX).read_text(encoding="utf-8"))
    return index


EXPECTED = recorded(GOLDEN)
SPECIFICATION = (Path(__file__).parent.parent / "docs" / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference(codec: Codec) -> reference_decoder.Decoder:
    return reference_decoder.Decoder(codec.spec.weights)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference of two pictures of one shape."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


def check(reference: reference_decoder.Decoder, codec: Codec, data: bytes) -> np.ndarray:
    """Both decoders agree on `data`; returns the latent."""
    file = reference_decoder.parse(data)
    latent, symbols = reference.latent(file)
    assert symbols == codec.symbol_hash(data)
    assert difference(reference.pixels(file, latent), codec.decode(data).picture.pixels) <= 1
    return latent


@pytest.mark.parametrize("quality", [0, 0.8, 37.5, 60, 99.9, 100])
def test_reference_decoder_agrees_at_every_quality(
    reference: reference_decoder.Decoder, codec: Codec, photo: Picture, quality: float
) -> None:
    crop = Picture(np.ascontiguousarray(photo.pixels[60:187, 100:290]))
    latent = check(reference, codec, codec.encode(crop, quality=quality).data)
    assert np.unique(latent).size > 50


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (16, 16), (17, 65), (270, 530), (513, 40)])
def test_reference_decoder_agrees_on_any_shape(
    reference: reference_decoder.Decoder,
    codec: Codec,
    synthetic: Callable[..., Picture],
    height: int,
    width: int,
) -> None:
    check(reference, codec, codec.encode(synthetic(height, width), quality=40, tile=256).data)


def test_reference_decoder_agrees_on_gray_alpha_and_metadata(
    reference: reference_decoder.Decoder, codec: Codec, synthetic: Callable[..., Picture]
) -> None:
    made = synthetic(40, 50, 1, alpha=True)
    picture = Picture(made.pixels, made.alpha, icc=b"profile", exif=b"Exif\0\0II", xmp=b"<x/>")
    data = codec.encode(picture, quality=70).data
    check(reference, codec, data)
    file = reference_decoder.parse(data)
    assert file.boxes == {"iCCP": b"profile", "eXIF": b"Exif\0\0II", "xMPd": b"<x/>"}
    assert file.channels == 1
    assert file.alpha is not None
    assert made.alpha is not None
    assert (decode_alpha(file.alpha, 50, 40) == made.alpha).all()


def test_reference_decoder_agrees_on_escapes(reference: reference_decoder.Decoder, codec: Codec) -> None:
    """Noise and hard edges at the best quality: symbols outside of their tables occur, and are decoded."""
    rng = np.random.default_rng(0)
    pixels = rng.choice(np.array([0, 255], np.uint8), (48, 64, 3))
    pixels[10:30, 20:50] = 255
    met = 0

    class Counting(entropy.Encoder):
        def _push_escaped(self, values: entropy.Symbols) -> None:
            nonlocal met
            met += len(values)
            super()._push_escaped(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calotype.symbols.Encoder", Counting)
        data = codec.encode(Picture(pixels), quality=100).data
    assert met > 0
    check(reference, codec, data)


def test_latents_are_equal(
    reference: reference_decoder.Decoder, codec: Codec, photo: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = codec.encode(photo, quality=55, tile=256).data
    expected, _ = reference.latent(reference_decoder.parse(data))
    seen: list[torch.Tensor] = []
    original = codec.coder.network.dequantise

    def note(latent: torch.Tensor) -> torch.Tensor:
        seen.append(latent.clone())
        return original(latent)

    monkeypatch.setattr(codec.coder.network, "dequantise", note)
    codec.decode(data)
    (latent,) = seen
    assert (latent[0].numpy() == expected).all()


def test_reference_decoder_refuses_damage(reference: reference_decoder.Decoder, codec: Codec, photo: Picture) -> None:
    data = bytearray(codec.encode(Picture(photo.pixels[:32, :32].copy()), quality=30).data)
    data[-8] ^= 1
    with pytest.raises(reference_decoder.DamageError):
        reference_decoder.parse(bytes(data))


def test_reference_decoder_is_independent() -> None:
    """It imports neither the codec nor the libraries that the codec computes with."""
    tree = ast.parse(Path(reference_decoder.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_specification_states_the_constants_of_the_code() -> None:
    widths = re.search(r"w = ([\d\s]+)", SPECIFICATION)
    assert widths is not None
    stated = [int(w) for w in widths[1].split()]
    assert stated == [tables.half_width(i) for i in range(tables.SCALES)] == list(reference_decoder.HALF_WIDTHS)
    bound = re.search(r"v = ([\d\s]+)", SPECIFICATION)
    assert bound is not None
    assert [int(w) for w in bound[1].split() for _ in range(2)] == [law.half_width for law in lattice.LAWS[64:]]
    rows = re.search(r"R = ([01\s]+)", SPECIFICATION)
    assert rows is not None
    assert [[int(bit) for bit in row] for row in rows[1].split()] == lattice.parities(torch.eye(12).int()).tolist()
    assert f"version {header.VERSION[0]}.{header.VERSION[1]}" in SPECIFICATION.splitlines()[0]
    for magic in (container.MAGIC, header.BRIEF_MAGIC):
        assert " ".join(f"{b:02X}" for b in magic) in SPECIFICATION
    for name in (container.HEADER, container.TABLE, container.TILE, container.ALPHA, *container.BOXES.values()):
        assert f"`{name.decode()}`" in SPECIFICATION


# Golden files -----------------------------------------------------------------------------------------------------


def test_golden_folder_is_complete() -> None:
    assert len(EXPECTED) >= 8
    listed = {*EXPECTED, *(e["pixels_png"] for e in EXPECTED.values()), "hashes.json"}
    assert {p.name for p in GOLDEN.iterdir()} == listed


def check_golden(codec: Codec, folder: Path, name: str) -> bytes:
    """A golden file decodes to what was recorded; returns it."""
    data, expected = (folder / name).read_bytes(), recorded(folder)[name]
    assert codec.symbol_hash(data) == expected["symbols"]
    decoded = codec.decode(data).picture
    stored = read_picture(folder / expected["pixels_png"])
    assert difference(decoded.pixels, stored.pixels) <= 1
    assert (decoded.alpha is None) == (stored.alpha is None)
    if decoded.alpha is not None and stored.alpha is not None:
        assert (decoded.alpha == stored.alpha).all()
    return data


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_file(codec: Codec, name: str) -> None:
    check_golden(codec, GOLDEN, name)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_file_under_the_reference_decoder(reference: reference_decoder.Decoder, name: str) -> None:
    file = reference_decoder.parse((GOLDEN / name).read_bytes())
    assert reference.latent(file)[1] == EXPECTED[name]["symbols"]


@pytest.mark.parametrize("name", make_golden.VISUAL_CASES)
def test_golden_file_of_other_weights(codec: Codec, name: str) -> None:
    """The model visual is of the same architecture; its files name their weights, whoever decodes them."""
    data = check_golden(codec, make_golden.VISUAL, f"{name}.clt")
    check(reference_decoder.Decoder(Codec.load("visual").spec.weights), codec, data)


@pytest.mark.parametrize("model", make_golden.EARLIER)
def test_golden_files_of_earlier_weights(codec: Codec, model: str) -> None:
    folder = make_golden.EARLIER[model]
    names = list(recorded(folder))
    assert len(names) >= 8
    for name in names:
        assert container.probe(check_golden(codec, folder, name)).model == model


def test_golden_files_cover_the_format() -> None:
    headers = [container.read_still((GOLDEN / name).read_bytes()) for name in EXPECTED]
    assert {h.header.channels for h in headers} == {1, 3}
    assert {h.header.alpha for h in headers} == {False, True}
    assert max(h.header.tiles for h in headers) > 1
    forms = {container.is_brief((GOLDEN / name).read_bytes()) for name in EXPECTED}
    assert forms == {False, True}
    # Files of one tile in chunks, as they were written before there was another form.
    assert not any(container.is_brief(file.read_bytes()) for file in make_golden.VISUAL.glob("*.clt"))
    qualities = [h.header.quality for h in headers]
    assert min(qualities) == 0
    assert max(qualities) == 1000


def test_symbol_check_is_of_the_symbols(codec: Codec, photo: Picture, reference: reference_decoder.Decoder) -> None:
    """A file whose symbol check is wrong although all CRCs are right is an error of its own in both decoders."""
    from calotype.errors import DriftError

    data = codec.encode(Picture(photo.pixels[:32, :32].copy()), quality=30).data
    still = container.read_still(data)
    (payload,) = still.tiles
    assert payload is not None
    (value,) = struct.unpack_from("<I", payload)
    wrong: Any = container.write_still(still.header, [struct.pack("<I", value ^ 1) + bytes(payload[4:])])
    with pytest.raises(DriftError):
        codec.decode(wrong)
    with pytest.raises(reference_decoder.DamageError, match="symbol"):
        reference.latent(reference_decoder.parse(wrong))
