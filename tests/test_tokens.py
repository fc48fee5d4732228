"""Models of tokens through real files: coding, packets and their loss, tokens as data, the command line.

Like `test_determinism` this is also the program of a process: `python tests/test_tokens.py JOB.json`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import make_golden
import numpy as np
import numpy.typing as npt
import pytest
import reference_decoder
import torch
from conftest import Run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference_decoder import RangeDecoder
from reference_tokens import TokenDecoder, packet_of
from test_robustness import corrupted, joined, parts_of

from calotype import Tokens, api, container
from calotype.api import Codec, Decoded, psnr
from calotype.entropy import NO_TABLES, Decoder, Encoder
from calotype.errors import (
    CalotypeError,
    DriftError,
    FormatError,
    InputError,
    LimitError,
    ModelNotFoundError,
    TargetError,
)
from calotype.evaluation.features import distance
from calotype.header import Header
from calotype.media import Picture, read_picture
from calotype.models import perceptual, zoo
from calotype.models.exact import integerise
from calotype.models.vqgan import STRIDE, Vqgan, VqganConfig
from calotype.rate import QUALITY_STEPS, Target
from calotype.stopwatch import Stopwatch
from calotype.tokens import TokenCoder

Make = Callable[..., Picture]
Ints = npt.NDArray[np.int32]
TOTAL = 2**24
X86 = platform.machine() in ("x86_64", "AMD64")


GOLDEN: dict[str, dict[str, str]] = json.loads((make_golden.VQGAN / make_golden.INDEX).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vqgan() -> Codec:
    return Codec.load("vqgan", device="cpu")


@pytest.fixture(scope="module")
def coder(vqgan: Codec) -> TokenCoder:
    assert isinstance(vqgan.coder, TokenCoder)
    return vqgan.coder


@pytest.fixture(scope="module")
def crop(photo: Picture) -> Picture:
    """132x84 pixels, so 9x6 tokens."""
    return Picture(np.ascontiguousarray(photo.pixels[60:144, 120:252]))


def difference(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


# Entropy coding -------------------------------------------------------------------------------------------------------


@st.composite
def categorical(draw: st.DrawFn) -> tuple[Ints, Ints]:
    """Frequencies [n, K] of every shape from flat to all in one symbol, and symbols [n], rare ones too."""
    size = draw(st.sampled_from([2, 3, 8, 64, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, symbols = [], []
    for shape in draw(st.lists(st.sampled_from([0, 1, 8, 60, -1]), max_size=30)):
        row = np.ones(size, np.int64)
        if shape >= 0:
            weights = rng.random(size) ** shape
            row += np.floor(weights / weights.sum() * (TOTAL - size - 1)).astype(np.int64)
        row[-1] += 1
        peak = int(rng.integers(size))
        row[peak] += TOTAL - row.sum()
        rows.append(row)
        symbols.append(rng.choice([0, size - 1, peak, int(rng.integers(size))]))
    return np.array(rows, np.int32).reshape(-1, size), np.array(symbols, np.int32)


@settings(max_examples=120)
@given(asked=st.lists(categorical(), min_size=1, max_size=3))
@example(asked=[(np.array([[TOTAL - 2, 2]] * 9, np.int32), np.array([1] * 9, np.int32))])
@example(asked=[(np.array([[1, TOTAL - 1]] * 9, np.int32), np.array([0] * 9, np.int32))])
def test_frequencies_are_exact(asked: list[tuple[Ints, Ints]]) -> None:
    """The bytes are read by a decoder in Python's integers that is told the same frequencies, and are no longer."""
    encoder, bits = Encoder(NO_TABLES), 0.0
    for frequencies, symbols in asked:
        encoder.push_each(frequencies, symbols)
        bits -= np.log2(frequencies[np.arange(len(symbols)), symbols] / TOTAL).sum()
    data = encoder.finish()
    decoder, reference = Decoder(NO_TABLES, data), RangeDecoder(data)
    for frequencies, symbols in asked:
        assert decoder.pull_each(frequencies).tolist() == symbols.tolist()
        assert [reference.symbol([0, *accumulate(row.tolist())]) for row in frequencies] == symbols.tolist()
    count = sum(len(symbols) for _, symbols in asked)
    assert len(data) * 8 <= bits + 64 + 2**-7 * count


@settings(max_examples=60)
@given(data=st.binary(max_size=80), asked=categorical())
def test_garbage_gives_symbols_or_our_error(data: bytes, asked: tuple[Ints, Ints]) -> None:
    frequencies, _ = asked
    reference = RangeDecoder(data)
    try:
        expected = [reference.symbol([0, *accumulate(row.tolist())]) for row in frequencies]
    except reference_decoder.DamageError:
        with pytest.raises(FormatError):
            Decoder(NO_TABLES, data).pull_each(frequencies)
        return
    assert Decoder(NO_TABLES, data).pull_each(frequencies).tolist() == expected


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packets", [1, 4, 5])
@pytest.mark.parametrize(
    ("height", "width", "channels"), [(1, 1, 3), (1, 300, 3), (17, 16, 1), (83, 131, 3), (270, 530, 3)]
)
def test_round_trip(vqgan: Codec, synthetic: Make, height: int, width: int, channels: int, packets: int) -> None:
    """Picture -> tokens -> file -> tokens -> picture."""
    picture = synthetic(height, width, channels)
    made = vqgan.encode(picture, quality=30, tile=256, packets=packets)
    header = container.read_header(made.data)
    assert (header.packets, header.quality, header.model) == (packets, 300, vqgan.spec.id)
    assert len(container.read_still(made.data).tiles) == -(-height // 256) * -(-width // 256) * packets
    tokens = vqgan.tokens_of(made.data)
    assert tokens.indexes.shape == (-(-height // STRIDE), -(-width // STRIDE))
    assert (tokens.indexes == vqgan.tokenise(picture, quality=30).indexes).all()
    assert vqgan.encode_tokens(tokens, tile=256, packets=packets) == made.data
    decoded = vqgan.decode(made.data)
    assert decoded.picture.pixels.shape == (height, width, channels)
    assert (decoded.damaged, decoded.lost, decoded.packets) == ((), (), packets)
    assert difference(vqgan.draw(tokens).pixels, decoded.picture.pixels) == 0
    vqgan.verify(made.data, deep=True)


def test_packets_and_tiles_change_no_token(vqgan: Codec, photo: Picture) -> None:
    made = [vqgan.encode(photo, quality=70, tile=t, packets=p).data for t in (256, 1024) for p in (1, 32)]
    tokens = [vqgan.tokens_of(data).indexes for data in made]
    assert all((t == tokens[0]).all() for t in tokens)
    assert len({len(data) for data in made}) == len(made)


def lowest_qualities(coder: TokenCoder) -> list[int]:
    """The first integer quality of each step of the ladder."""
    steps = len(coder.network.config.ladder)
    return [-(-step * QUALITY_STEPS // steps) for step in range(steps)]


def test_each_step_of_the_ladder_is_reached(vqgan: Codec, coder: TokenCoder, crop: Picture) -> None:
    """Equal parts of the quality scale; each next codebook is larger, and its tokens take more bytes."""
    ladder = coder.network.config.ladder
    sizes = []
    for quality, size in zip(lowest_qualities(coder), ladder, strict=True):
        data = vqgan.encode(crop, quality=quality / 10).data
        info = container.probe(data)
        assert (info.model, info.packets, info.codebook) == ("vqgan", 1, size)
        tokens = vqgan.tokens_of(data)
        assert tokens.codebook.shape == (size, coder.network.config.codeword)
        assert tokens.embed().shape == (6, 9, coder.network.config.codeword)
        assert (tokens.embed()[2, 3] == tokens.codebook[tokens.indexes[2, 3]]).all()
        sizes.append(len(data))
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0] + 10
    for quality in range(1001):
        assert zoo.codebook_size("vqgan", quality) == ladder[coder.network.ladder_step(quality)]
    assert {coder.network.ladder_step(q - 1) for q in lowest_qualities(coder)[1:]} == set(range(len(ladder) - 1))
    assert zoo.codebook_size("hyperprior", 500) is None


def test_entropy_coding_pays(vqgan: Codec, coder: TokenCoder, photo: Picture) -> None:
    """A file is no larger than its tokens at log2 K bits each, and what is fixed."""
    for quality, size in zip(lowest_qualities(coder), coder.network.config.ladder, strict=True):
        tokens = -(-photo.width // STRIDE) * -(-photo.height // STRIDE)
        data = vqgan.encode(photo, quality=quality / 10, metadata=()).data
        assert len(data) <= 61 + 4 + tokens * np.log2(size) / 8 * 1.01


def test_bits_are_dearer_at_the_beginning_of_a_step(vqgan: Codec, photo: Picture) -> None:
    """Along a step of the ladder files grow and pictures get better, from the same codebook."""
    made = [vqgan.encode(photo, quality=quality, metadata=()).data for quality in (80, 90, 100)]
    assert len({vqgan.tokens_of(data).codebook.tobytes() for data in made}) == 1
    sizes = [len(data) for data in made]
    reached = [psnr(photo.pixels, vqgan.decode(data).picture.pixels) for data in made]
    assert sizes[0] < 0.98 * sizes[1]
    assert sizes[1] < 0.98 * sizes[2]
    assert reached == sorted(reached)


@torch.inference_mode()
def test_choice_of_codewords(vqgan: Codec, coder: TokenCoder, photo: Picture) -> None:
    """Without a price of bits the nearest are chosen; with one, those whose sum of distance and bits is the least."""
    network, step, worth = coder.network, 3, 0.05
    x = torch.tensor(photo.pixels[:160, :240]).permute(2, 0, 1)[None] / 255 - 0.5
    y = network.latent(x, torch.tensor([step]))
    book = network.codebook(step)
    free, priced = (network.prior.choose(y[0], book.codewords, step, w, 4) for w in (0, worth))
    distance_to = (y[0].movedim(0, -1)[:, :, None] - book.codewords).square().sum(-1)
    assert (free.tokens == distance_to.topk(4, largest=False).indices).float().mean() > 0.999
    assert (free.tokens[..., 0] == book.nearest(y)[0]).float().mean() > 0.999
    total = [(distance_to.gather(-1, c.tokens)[..., 0] + worth * c.bits[..., 0]).mean().item() for c in (free, priced)]
    assert total[1] < total[0]
    ordered = distance_to.gather(-1, priced.tokens) + worth * priced.bits
    assert (ordered.diff(dim=-1) > -1e-4).all()
    # The bits are those that the file takes.
    (payload,) = coder.write(priced.tokens[..., 0], 700, 1024, 1, Stopwatch(coder.device))
    assert abs(8 * len(payload) - 32 - priced.bits[..., 0].sum()) < 33


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file(vqgan: Codec, name: str) -> None:
    data, expected = (make_golden.VQGAN / name).read_bytes(), GOLDEN[name]
    assert vqgan.symbol_hash(data) == expected["symbols"]
    assert TokenDecoder(vqgan.spec.weights).tokens(reference_decoder.parse(data))[1] == expected["symbols"]
    stored = read_picture(make_golden.VQGAN / expected["pixels_png"])
    assert difference(vqgan.decode(data).picture.pixels, stored.pixels) <= 1


@pytest.mark.parametrize(("quality", "packets"), [(0, 1), (25, 5), (45, 4), (100, 3)])
def test_reference_decoder_agrees(vqgan: Codec, crop: Picture, quality: float, packets: int) -> None:
    """Tokens and symbol hash of a decoder that was written from docs/FORMAT.md."""
    data = vqgan.encode(crop, quality=quality, packets=packets).data
    tokens, symbols = TokenDecoder(vqgan.spec.weights).tokens(reference_decoder.parse(data))
    assert (tokens == vqgan.tokens_of(data).indexes).all()
    assert symbols == vqgan.symbol_hash(data)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 530), (270, 300)])
def test_reference_decoder_agrees_on_tiles(vqgan: Codec, synthetic: Make, height: int, width: int) -> None:
    data = vqgan.encode(synthetic(height, width), quality=10, tile=256, packets=4).data
    tokens, symbols = TokenDecoder(vqgan.spec.weights).tokens(reference_decoder.parse(data))
    assert (tokens == vqgan.tokens_of(data).indexes).all()
    assert symbols == vqgan.symbol_hash(data)


def test_alpha_and_metadata_are_kept(vqgan: Codec, synthetic: Make) -> None:
    made = synthetic(40, 50, alpha=True)
    picture = Picture(made.pixels, made.alpha, icc=b"profile", exif=b"Exif\0\0II", xmp=b"<x/>")
    decoded = vqgan.decode(vqgan.encode(picture, packets=2).data).picture
    assert (decoded.icc, decoded.exif, decoded.xmp) == (picture.icc, picture.exif, picture.xmp)
    assert decoded.alpha is not None
    assert made.alpha is not None
    assert (decoded.alpha == made.alpha).all()


@pytest.mark.parametrize("region", [(0, 0, 530, 270), (0, 0, 1, 1), (250, 250, 13, 11), (511, 100, 19, 170)])
@pytest.mark.parametrize("scale", [1, 4])
def test_region_equals_the_crop(vqgan: Codec, synthetic: Make, region: tuple[int, int, int, int], scale: int) -> None:
    data = vqgan.encode(synthetic(270, 530), quality=45, tile=256, packets=2).data
    full = vqgan.decode(data, scale=scale).picture.pixels
    x, y, width, height = region
    expected = full[y // scale : -(-(y + height) // scale), x // scale : -(-(x + width) // scale)]
    part = vqgan.decode(data, region=region, scale=scale).picture.pixels
    assert difference(part, expected) <= 1
    drawn = vqgan.draw(vqgan.tokens_of(data), region=region, scale=scale).pixels
    assert difference(drawn, expected) <= 1


def test_region_reads_only_the_packets_it_needs(vqgan: Codec, coder: TokenCoder, synthetic: Make) -> None:
    data = vqgan.encode(synthetic(40, 900), quality=45, tile=256, packets=3).data
    still = container.read_still(data)
    full = vqgan.decode(data).picture.pixels
    payloads = [bytes(t or b"") if n >= 6 else b"" for n, t in enumerate(still.tiles)]
    broken = container.write_still(still.header, payloads)
    left = 512 + coder.network.halo * STRIDE
    assert difference(vqgan.decode(broken, region=(left, 0, 50, 40)).picture.pixels, full[:, left : left + 50]) <= 1
    with pytest.raises(FormatError, match="packet 0 of tile 1"):
        vqgan.decode(broken, region=(left - 17, 0, 50, 40))


def test_windows_give_what_the_whole_gives(vqgan: Codec, photo: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    data = vqgan.encode(photo, quality=45).data
    tokens, whole = vqgan.tokens_of(data).indexes, vqgan.decode(data).picture.pixels
    monkeypatch.setattr("calotype.windows.WINDOW", 7)
    assert difference(vqgan.decode(data).picture.pixels, whole) <= 1
    # A latent half way between two codewords may fall to either side.
    assert (vqgan.tokenise(photo, quality=45).indexes == tokens).mean() > 0.99


def test_batches(vqgan: Codec, synthetic: Make) -> None:
    batch = np.stack([synthetic(40, 70, seed=s).pixels.transpose(2, 0, 1) for s in range(3)])
    files = vqgan.encode_batch(batch, quality=[0, 45, 100])
    assert files == [
        vqgan.encode(Picture(np.ascontiguousarray(x.transpose(1, 2, 0))), quality=q).data
        for x, q in zip(batch, (0, 45, 100), strict=True)
    ]
    decoded = vqgan.decode_batch(files, scale=2)
    for x, data in zip(decoded, files, strict=True):
        assert (x.permute(1, 2, 0).numpy() == vqgan.decode(data, scale=2).picture.pixels).all()
    # A batch may mix models.
    mixed = [files[0], Codec.load(device="cpu").encode(synthetic(40, 70)).data]
    assert vqgan.decode_batch(mixed).shape == (2, 3, 40, 70)
    with pytest.raises((FormatError, DriftError), match="file 1"):
        vqgan.decode_batch([files[0], container.write_still(container.read_header(files[1]), [b"\1" * 90])])


def test_progress_grows_to_one(vqgan: Codec, synthetic: Make) -> None:
    picture = synthetic(300, 520)
    data = vqgan.encode(picture, quality=20, tile=256, packets=2).data
    for run in (functools.partial(vqgan.encode, picture, quality=20, tile=256), functools.partial(vqgan.decode, data)):
        seen: list[float] = []
        run(progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == 1
        assert len(seen) > 2


def test_service_decodes_waiting_files(vqgan: Codec, synthetic: Make) -> None:
    from calotype.service.operations import DecodeQuery, Engine, Reply
    from calotype.service.settings import Settings as ServiceSettings

    files = [vqgan.encode(synthetic(40, 56, seed=s), quality=5 + 50 * s, packets=2).data for s in range(2)]
    engine, query = Engine(ServiceSettings(device="cpu")), DecodeQuery.model_validate({"format": "png"})
    together = engine.batch(query, files[0])
    assert together is not None
    for reply, data in zip(together.together([(query, f) for f in files]), files, strict=True):
        assert isinstance(reply, Reply)
        assert (np.asarray(Image.open(io.BytesIO(reply.body))) == vqgan.decode(data).picture.pixels).all()


# Targets --------------------------------------------------------------------------------------------------------------


def test_targets_choose_a_quality(vqgan: Codec, photo: Picture) -> None:
    made = {q: vqgan.encode(photo, quality=q / 10, metadata=()) for q in (0, 600, 650, 950, 1000)}
    size = {q: len(m.data) for q, m in made.items()}
    for quality in (0, 600, 950):
        assert vqgan.encode(photo, target=Target("size", size[quality]), metadata=()).data == made[quality].data
    area = photo.width * photo.height
    below = vqgan.encode(photo, target=Target("bpp", (size[650] - 1) * 8 / area), metadata=())
    assert below.data == made[600].data
    assert vqgan.encode(photo, target=Target("size", 10**6), metadata=()).data == made[1000].data
    with pytest.raises(TargetError, match=f"{size[0]} bytes at least"):
        vqgan.encode(photo, target=Target("size", size[0] - 1), metadata=())
    reached = psnr(photo.pixels, vqgan.decode(made[1000].data).picture.pixels)
    found = vqgan.encode(photo, target=Target("psnr", reached - 0.01), metadata=())
    assert found.psnr is not None
    assert found.psnr >= reached - 0.01
    assert found.data in (made[950].data, made[1000].data)
    with pytest.raises(TargetError, match="dB at most"):
        vqgan.encode(photo, target=Target("psnr", reached + 0.5), metadata=())


def test_search_finds_tokens_that_look_better(vqgan: Codec, crop: Picture) -> None:
    fractions: list[float] = []
    plain, searched = (
        vqgan.encode(crop, quality=90, effort=effort, progress=fractions.append if effort == 9 else None).data
        for effort in (5, 9)
    )
    seen = [distance(crop.pixels, vqgan.decode(data).picture.pixels) for data in (plain, searched)]
    assert seen[1] < 0.95 * seen[0]
    assert fractions == sorted(fractions)
    assert len(fractions) > 30
    assert fractions[-1] == 1


def test_search_without_the_judging_network_says_what_to_install(
    vqgan: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    perceptual._network.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"efficientnet_lite_pytorch: pip install 'calotype\[eval\]'"):
        vqgan.encode(crop, quality=90, effort=7)
    assert vqgan.encode(crop, quality=90).data


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"packets": 0}, {"packets": 33}, {"effort": 6}, {"quality": 101}, {"tile": 300}])
def test_bad_options_are_refused(vqgan: Codec, synthetic: Make, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        vqgan.encode(synthetic(8, 8), **options)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_bad_shares_are_refused(vqgan: Codec, crop: Picture, share: float) -> None:
    data = vqgan.encode(crop).data
    with pytest.raises(InputError, match="share"):
        vqgan.decode(data, simulate_loss=share)


def test_other_models_have_no_packets_and_no_tokens(codec: Codec, vqgan: Codec, crop: Picture) -> None:
    data = codec.encode(crop).data
    for ask in (
        lambda: codec.encode(crop, packets=2),
        lambda: codec.tokenise(crop),
        lambda: codec.tokens_of(data),
        lambda: vqgan.tokens_of(data),
    ):
        with pytest.raises(InputError, match="tokens"):
            ask()
    still = container.read_still(data)
    crafted = container.write_still(replace(still.header, packets=2), [bytes(still.tiles[0] or b"")] * 2)
    for reader in (codec, vqgan):
        with pytest.raises(FormatError, match="packets"):
            reader.decode(crafted)
        with pytest.raises(FormatError, match="packets"):
            reader.decode_batch([crafted])


def test_packets_are_a_matter_of_the_header(vqgan: Codec, crop: Picture) -> None:
    """Files of one packet say so as they did in version 1.0; there are as many chunks as packets."""
    brief, five = (vqgan.encode(crop, packets=p).data for p in (1, 5))
    (tile,) = container.read_still(brief).tiles
    one = container.write_still(container.read_header(brief), [bytes(tile or b"")])
    assert one[16:18] == b"\1\0"
    assert one[26] == 3
    assert five[16:18] == b"\1\1"
    assert five[26] == 3 | 4 << 3
    assert [c.name for c in container.chunks(five)] == ["HEAD", "TIDX"] + ["TILE"] * 5
    # 65536 payloads are just allowed.
    header = replace(container.read_header(five), width=256 * 128, height=256 * 16, tile=256, packets=32)
    assert Header.unpack(header.pack()) == header
    with pytest.raises(LimitError, match="packets"):
        Header.unpack(replace(header, height=256 * 16 + 1).pack())
    with pytest.raises(LimitError, match="packets"):
        api._check_layout(header.width, header.height + 1, 256, 32)


def test_video_with_tokens_for_key_frames_is_refused(vqgan: Codec) -> None:
    from calotype.video.frames import Colour
    from calotype.video.gop import GopDecoder, video_format

    weights = bytes.fromhex(vqgan.spec.sha256[:16])
    crafted = replace(video_format(64, 48, Colour(), 500), intra_weights=weights, intra_model=4)
    with pytest.raises(ModelNotFoundError, match="key frames"):
        GopDecoder(crafted, "cpu")


# Loss -----------------------------------------------------------------------------------------------------------------


class Restored(NamedTuple):
    """A decoding, the tokens that went into it, which were known, and the codewords that came out."""

    decoded: Decoded
    tokens: torch.Tensor
    known: torch.Tensor
    codewords: torch.Tensor


def watched(vqgan: Codec, coder: TokenCoder, data: bytes, **options: Any) -> Restored:
    seen: list[torch.Tensor] = []
    original = coder.network.embed

    def embed(tokens: torch.Tensor, step: int, known: torch.Tensor) -> torch.Tensor:
        out = original(tokens, step, known)
        seen.extend((tokens[0].clone(), known[0].clone(), out[0].clone()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder.network, "embed", embed)
        return Restored(vqgan.decode(data, **options), *seen)


def test_known_tokens_survive_the_loss_of_others(vqgan: Codec, coder: TokenCoder, photo: Picture) -> None:
    data = vqgan.encode(photo, quality=45, tile=256, packets=5).data
    tokens = vqgan.tokens_of(data)
    packets = np.zeros_like(tokens.indexes)
    for number, (y, x) in enumerate((y, x) for y in (0, 16) for x in (0, 16)):
        part = packets[y : y + 16, x : x + 16]
        part[:] = packet_of(*part.shape, 5) + 5 * number
    for seed in (0, 7):
        found = watched(vqgan, coder, data, simulate_loss=0.2, seed=seed)
        assert len(found.decoded.lost) == 4  # of 4 tiles in 5 packets
        assert found.decoded.damaged == ()
        lost = np.isin(packets, found.decoded.lost)
        assert 0.1 < lost.mean() < 0.3
        assert (found.known.numpy() == ~lost).all()
        assert (found.tokens.numpy()[~lost] == tokens.indexes[~lost]).all()
        codewords = found.codewords.movedim(0, -1).numpy()
        assert (codewords[~lost] == tokens.embed()[~lost]).all()
        assert (codewords[lost] != tokens.embed()[lost]).any()
        assert found.decoded.picture.pixels.shape == photo.pixels.shape
        again = vqgan.decode(data, simulate_loss=0.2, seed=seed)
        assert again.lost == found.decoded.lost
        assert (again.picture.pixels == found.decoded.picture.pixels).all()
    assert vqgan.decode(data, simulate_loss=0.2, seed=1).lost != vqgan.decode(data, simulate_loss=0.2, seed=2).lost


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.01, 0), (0.2, 4), (0.5, 10), (0.99, 20), (1, 20)])
def test_exactly_the_share_is_lost(vqgan: Codec, synthetic: Make, share: float, count: int) -> None:
    data = vqgan.encode(synthetic(20, 1000), quality=5, tile=256, packets=5).data
    decoded = vqgan.decode(data, simulate_loss=share, seed=3)
    assert len(set(decoded.lost)) == len(decoded.lost) == count
    assert set(decoded.lost) <= set(range(20))
    assert decoded.picture.pixels.shape == (20, 1000, 3)


def test_loss_of_tiles_can_be_simulated_for_every_model(codec: Codec, synthetic: Make) -> None:
    data = codec.encode(synthetic(20, 1000), quality=5, tile=256).data
    decoded = codec.decode(data, simulate_loss=0.5, seed=3)
    assert (len(decoded.lost), decoded.packets, decoded.damaged) == (2, 1, ())
    assert (decoded.picture.pixels != codec.decode(data).picture.pixels).any()


@pytest.mark.parametrize("place", [0, 4, 12, -1])
def test_damaged_packet(vqgan: Codec, coder: TokenCoder, crop: Picture, place: int) -> None:
    """Damage of a chunk's length, name, payload or CRC: an error, or a restored packet if that is asked for."""
    data = vqgan.encode(crop, quality=45, packets=5).data
    chunk = [c for c in container.chunks(data) if c.name == "TILE"][3]
    broken = bytearray(data)
    broken[chunk.offset + place % chunk.length] ^= 0x10
    with pytest.raises(FormatError, match="packet 3 of tile 0"):
        vqgan.decode(bytes(broken))
    found = watched(vqgan, coder, bytes(broken), allow_partial=True)
    assert (found.decoded.damaged, found.decoded.lost) == ((3,), ())
    assert (found.known.numpy() == (packet_of(6, 9, 5) != 3)).all()
    assert (vqgan.decode(bytes(broken), allow_partial=True, simulate_loss=1).lost) == (0, 1, 2, 3, 4)


def test_packet_damaged_under_its_crc(vqgan: Codec, crop: Picture) -> None:
    still = container.read_still(vqgan.encode(crop, quality=45, packets=5).data)
    payloads = [bytes(t or b"") for t in still.tiles]
    for wrong in (b"", payloads[2][:3], payloads[2][:4], bytes([payloads[2][0] ^ 1]) + payloads[2][1:], payloads[1]):
        broken = container.write_still(still.header, [*payloads[:2], wrong, *payloads[3:]])
        with pytest.raises((FormatError, DriftError), match="packet 2 of tile 0"):
            vqgan.decode(broken)
        assert vqgan.decode(broken, allow_partial=True).damaged == (2,)


@pytest.mark.parametrize("packets", [1, 4])
def test_truncation_at_every_byte(vqgan: Codec, synthetic: Make, packets: int) -> None:
    data = vqgan.encode(synthetic(20, 40), quality=5, packets=packets).data
    vqgan.decode(data)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            vqgan.decode(data[:length])
        with pytest.raises(FormatError):
            vqgan.tokens_of(data[:length])
    for length in range(46, len(data)):
        decoded = vqgan.decode(data[:length], allow_partial=True)
        assert packets - 1 in decoded.damaged  # the last


def test_corruptions(vqgan: Codec, synthetic: Make) -> None:
    """Our errors only, whether the CRCs were made right again or not."""
    files = [
        vqgan.encode(synthetic(20, 40 + 250 * t), quality=5, tile=256, packets=p).data for t in (0, 1) for p in (1, 5)
    ]
    rng = np.random.default_rng(21)
    outcomes: dict[str, int] = {}
    for trial in range(400):
        data = files[trial % len(files)]
        if trial % 3:
            data = corrupted(data, rng)
        else:
            parts = parts_of(data)
            chosen = int(rng.integers(len(parts)))
            parts[chosen] = (parts[chosen][0], corrupted(parts[chosen][1], rng))
            data = joined(parts)
        partial = trial % 2 == 0
        try:
            decoded = vqgan.decode(data, allow_partial=partial, max_pixels=2**16)
            header = container.read_header(data)
            assert decoded.picture.pixels.shape == (header.height, header.width, header.channels)
            assert set(decoded.damaged) <= set(range(header.payloads) if partial else ())
            outcome = "success"
        except CalotypeError as error:
            outcome = type(error).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert {"success", "ChecksumError", "TruncatedError", "DriftError"} <= set(outcomes)


@given(height=st.integers(3, 40), width=st.integers(3, 40), packets=st.sampled_from([3, 4, 5, 6, 8, 32]))
def test_a_packet_thins_a_region(height: int, width: int, packets: int) -> None:
    """In no 3x3 tokens more than a third are of one packet, and all packets are of about one size."""
    from calotype.models.tokens import interleave

    owner = interleave(height, width, packets).numpy()
    assert (owner == packet_of(height, width, packets)).all()
    squares = np.lib.stride_tricks.sliding_window_view(owner, (3, 3)).reshape(-1, 9)
    for packet in range(packets):
        assert (squares == packet).sum(1).max() <= 3
    if packets == 5:  # a token's neighbours, and most of the others around it, lie in other packets
        assert max((squares == p).sum(1).max() for p in range(5)) == 2
    assert np.ptp(np.bincount(owner.ravel(), minlength=packets)) <= height


# Tokens as data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(vqgan: Codec, crop: Picture) -> Tokens:
    return vqgan.tokenise(crop, quality=45)


def test_archive_round_trip(vqgan: Codec, tokens: Tokens) -> None:
    archive = tokens.to_npz()
    assert archive == tokens.to_npz()
    back = Tokens.from_npz(archive)
    for name in ("indexes", "codebook"):
        assert (getattr(back, name) == getattr(tokens, name)).all()
        assert getattr(back, name).dtype == getattr(tokens, name).dtype
    for name in ("quality", "width", "height", "channels", "weights"):
        assert getattr(back, name) == getattr(tokens, name)
    assert vqgan.encode_tokens(back) == vqgan.encode_tokens(tokens)
    with np.load(io.BytesIO(archive), allow_pickle=False) as opened:
        assert (opened["codebook"][opened["indexes"]] == tokens.embed()).all()


def test_archives_of_other_hands_are_read(tokens: Tokens) -> None:
    """Numbers of other widths, and none compressed, as somebody's own program may write."""
    out = io.BytesIO()
    np.savez(out, **{**fields(tokens), "indexes": tokens.indexes.astype(np.int64), "width": np.int32(tokens.width)})
    assert (Tokens.from_npz(out.getvalue()).indexes == tokens.indexes).all()


def fields(tokens: Tokens) -> dict[str, Any]:
    with np.load(io.BytesIO(tokens.to_npz()), allow_pickle=False) as opened:
        return dict(opened)


TAMPERED: dict[str, Any] = {
    "indexes": [
        np.zeros((5, 9), np.int32),
        np.zeros((6, 9, 1), np.int32),
        np.full((6, 9), -1, np.int32),
        np.full((6, 9), 2**20, np.int32),
        np.full((6, 9), 2**32, np.int64),
        np.zeros((6, 9), np.float32),
        np.zeros((6, 9), object),
        np.zeros((9, 6), np.int32).T,
    ],
    "codebook": [np.zeros(64, np.float32), np.zeros((3, 64), np.float32), np.zeros((256, 64), np.int32)],
    "width": [np.int64(0), np.int64(-132), np.int64(2**40), np.float64(132), np.int64(500), np.zeros(2, np.int64)],
    "height": [np.int64(2**20), np.int64(-(2**62))],
    "channels": [np.int64(2), np.int64(0)],
    "quality": [np.float64("nan"), np.float64(-1), np.float64(101)],
    "weights": [np.zeros(7, np.uint8), np.zeros(8, np.float64)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in TAMPERED.items() for value in values], ids=str
)
def test_tampered_archives_are_refused(tokens: Tokens, name: str, value: Any) -> None:
    out = io.BytesIO()
    np.savez(out, allow_pickle=True, **{**fields(tokens), name: value})
    with pytest.raises((InputError, LimitError)):
        Tokens.from_npz(out.getvalue())


@pytest.mark.parametrize("name", list(TAMPERED))
def test_incomplete_archives_are_refused(tokens: Tokens, name: str) -> None:
    out = io.BytesIO()
    np.savez(out, **{key: value for key, value in fields(tokens).items() if key != name})
    with pytest.raises(InputError, match=name):
        Tokens.from_npz(out.getvalue())


def test_announced_sizes_are_not_believed(tokens: Tokens) -> None:
    """An array that says it is large, in a file that is not, allocates nothing."""
    for shape in ((2**40, 2**20), (2**20, 2**20), (-1, 5), (2**24 + 1, 1), (4096, 64)):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, value in fields(tokens).items():
                with archive.open(f"{name}.npy", "w") as file:
                    if name == "codebook":
                        head = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, head)
                    else:
                        np.lib.format.write_array(file, np.asarray(value))
        with pytest.raises(InputError, match="codebook"):
            Tokens.from_npz(out.getvalue())


def test_damaged_archives_are_refused(tokens: Tokens) -> None:
    archive = replace(tokens, codebook=tokens.codebook[:, :2].copy()).to_npz()
    rng = np.random.default_rng(22)
    for length in range(0, len(archive), 7):
        with pytest.raises(InputError):
            Tokens.from_npz(archive[:length])
    read = 0
    for _ in range(400):
        try:
            Tokens.from_npz(corrupted(archive, rng))
            read += 1
        except (InputError, LimitError):
            pass
    assert read < 200
    with pytest.raises(LimitError, match="limit"):
        Tokens.from_npz(archive, max_pixels=132 * 84 - 1)


def test_tokens_that_do_not_fit_are_refused(codec: Codec, vqgan: Codec, tokens: Tokens) -> None:
    for other, error in (
        (replace(tokens, weights=bytes(8)), ModelNotFoundError),
        (replace(tokens, weights=bytes.fromhex(codec.spec.sha256[:16])), InputError),
        (replace(tokens, quality=5.0, indexes=np.zeros_like(tokens.indexes)), InputError),
    ):
        for use in (vqgan.draw, vqgan.encode_tokens, codec.draw, codec.encode_tokens):
            with pytest.raises(error):
                use(other)
    with pytest.raises(InputError, match="packets"):
        vqgan.encode_tokens(tokens, packets=33)
    # Any codec finds the model that tokens are of.
    assert codec.encode_tokens(tokens) == vqgan.encode_tokens(tokens)


# Weights --------------------------------------------------------------------------------------------------------------


def test_saved_integers_are_loaded_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = Vqgan(VqganConfig(ladder=(8, 64)))
    path = tmp_path / "small.safetensors"
    zoo.save(network, path)
    restored = Vqgan(VqganConfig(ladder=(8, 64)))
    assert zoo.load_parameters(restored, path) == len(list(network.parameters()))
    first, second = integerise(network).prior.state_dict(), integerise(restored).prior.state_dict()
    for name, value in first.items():
        if not name.endswith("multiplier"):
            assert (value - second[name]).abs().max() <= (2 if name.endswith("bias") else 0), name
    for book, other in zip(network.codebooks, restored.codebooks, strict=True):
        torch.testing.assert_close(other.codewords, book.codewords, rtol=0, atol=2e-3)
    architecture = zoo.architecture("vqgan", json.loads(json.dumps({"ladder": [8, 64]})))
    assert isinstance(architecture, Vqgan)
    assert architecture.config == network.config


# Exactness ------------------------------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, str]:
    """The symbol hash of each file under each number of threads."""
    vqgan = Codec.load("vqgan", device=job["device"])
    found = {"capability": torch.backends.cpu.get_cpu_capability()}
    for threads in job["threads"]:
        torch.set_num_threads(threads)
        for file in job["files"]:
            found[f"{file} {threads}"] = vqgan.symbol_hash(Path(file).read_bytes())
    return found


def run_worker(folder: Path, environment: dict[str, str], hashes: dict[Path, str], **options: Any) -> None:
    job = {"device": "cpu", "threads": [1], "files": [str(f) for f in hashes], **options}
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    output = subprocess.run(
        [sys.executable, __file__, str(job_file)], env=os.environ | environment, check=True, capture_output=True
    ).stdout
    found = json.loads(output)
    wanted = environment.get("ATEN_CPU_CAPABILITY", "")
    if wanted in ("default", "avx2"):
        assert found["capability"].lower() == wanted
    for file, symbols in hashes.items():
        for threads in job["threads"]:
            assert found[f"{file} {threads}"] == symbols, file


@pytest.fixture(scope="module")
def hashes(vqgan: Codec, photos: dict[str, Picture], tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Files of every codebook, in one packet or five, and the hashes of what this process decodes."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    for number, (name, picture) in enumerate(photos.items()):
        part = picture if os.environ.get("CALOTYPE_TEST_PHOTOS") else Picture(picture.pixels[:120, :160].copy())
        data = vqgan.encode(part, quality=25 * (number % 5), tile=256, packets=1 + 4 * (number % 2)).data
        file = folder / f"{name}.clt"
        file.write_bytes(data)
        made[file] = vqgan.symbol_hash(data)
    assert len(set(made.values())) == len(made) > 1
    return made


@pytest.mark.skipif(not X86, reason="instruction sets of x86")
@pytest.mark.parametrize(
    "environment",
    [
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ATEN_CPU_CAPABILITY": "avx512"},
    ],
    ids=lambda e: e["ATEN_CPU_CAPABILITY"],
)
def test_instruction_sets(hashes: dict[Path, str], tmp_path: Path, environment: dict[str, str]) -> None:
    run_worker(tmp_path, environment, hashes)


def test_threads(hashes: dict[Path, str], tmp_path: Path) -> None:
    few = dict(list(hashes.items())[:2])
    run_worker(tmp_path, {}, few, threads=[1, 2, 4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(hashes: dict[Path, str], tmp_path: Path) -> None:
    run_worker(tmp_path, {}, hashes, device="cuda")


def test_tokens_coded_together_are_those_coded_alone(coder: TokenCoder) -> None:
    """Frequencies do not depend on what else is in the batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (3, 9, 11), generator=generator)

    def requests(part: torch.Tensor) -> list[torch.Tensor]:
        coding = coder.network.code(tuple(part.shape), 1, 2, 5, part, device=coder.device)  # type: ignore[arg-type]
        seen, request = [], next(coding)
        try:
            while True:
                seen.append(request.frequencies)
                assert request.symbols is not None
                request = coding.send(request.symbols)
        except StopIteration:
            return seen

    for number, alone in enumerate(zip(*(requests(t[None]) for t in tokens), strict=True)):
        assert torch.equal(torch.cat(alone), requests(tokens)[number])


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def png(crop: Picture, tmp_path: Path) -> Path:
    Image.fromarray(crop.pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_command_line_both_ways(vqgan: Codec, crop: Picture, png: Path, tmp_path: Path, run: Run) -> None:
    """Picture -> file and tokens; file -> picture and tokens; tokens -> file; tokens -> picture."""
    done = run(
        "encode", png, "-m", "vqgan", "-q", 45, "--packets", 5, "--tokens", tmp_path / "a.npz", "--verify", "--json"
    )
    assert done.code == 0, done.err
    (record,) = done.records
    assert (record["model"], record["packets"], record["verified"]) == ("vqgan", 5, True)
    assert record["tokens"] == str(tmp_path / "a.npz")
    data = (tmp_path / "a.clt").read_bytes()
    assert data == vqgan.encode(crop, quality=45, packets=5).data
    archive = (tmp_path / "a.npz").read_bytes()
    assert (Tokens.from_npz(archive).indexes == vqgan.tokenise(crop, quality=45).indexes).all()

    done = run("decode", tmp_path / "a.clt", "-o", tmp_path / "b.png", "--tokens", tmp_path / "b.npz", "--json")
    assert done.code == 0, done.err
    (record,) = done.records
    assert (record["packets"], record["damaged_tiles"], record["lost"]) == (5, [], [])
    assert (tmp_path / "b.npz").read_bytes() == archive
    pixels = vqgan.decode(data).picture.pixels
    assert (np.asarray(Image.open(tmp_path / "b.png")) == pixels).all()

    done = run("encode", tmp_path / "a.npz", "-o", tmp_path / "c.clt", "--packets", 5, "--verify", "--json")
    assert done.code == 0, done.err
    assert (done.records[0]["model"], done.records[0]["quality"]) == ("vqgan", 45)
    assert (tmp_path / "c.clt").read_bytes() == data
    done = run("decode", tmp_path / "a.npz", "-o", tmp_path / "d.png")
    assert done.code == 0, done.err
    assert (np.asarray(Image.open(tmp_path / "d.png")) == pixels).all()

    piped = run("encode", "-", "-o", "-", "--packets", 5, stdin=archive)
    assert (piped.code, piped.out) == (0, data)
    piped = run("decode", "-", "-o", "-", "--format", "ppm", "--region", "16,16,20,10", stdin=archive)
    assert np.abs(np.asarray(Image.open(io.BytesIO(piped.out))).astype(int) - pixels[16:26, 16:36]).max() <= 1


def test_command_line_tells_and_checks(vqgan: Codec, png: Path, tmp_path: Path, run: Run) -> None:
    assert run("encode", png, "-m", "vqgan", "-q", 45, "--packets", 5).code == 0
    file = tmp_path / "a.clt"
    (record,) = run("info", file, "--json").records
    assert (record["model"], record["packets"], record["codebook"]) == ("vqgan", 5, 256)
    assert record["version"] == "1.1"
    text = run("info", file).out.decode()
    assert "5 packets" in text
    assert "256 codewords" in text
    assert run("verify", file, "--deep").code == 0
    assert "vqgan" in run("models", "list").out.decode()
    done = run("decode", file, "-o", tmp_path / "b.png", "--simulate-loss", 0.2, "--seed", 4, "--json")
    assert done.code == 0, done.err
    (record,) = done.records
    assert (record["status"], record["lost"]) == (
        "ok",
        list(vqgan.decode(file.read_bytes(), simulate_loss=0.2, seed=4).lost),
    )
    broken = bytearray(file.read_bytes())
    broken[-6] ^= 1
    file.write_bytes(broken)
    assert run("verify", file).code == 4
    assert run("decode", file, "-f").code == 4
    done = run("decode", file, "-f", "--allow-partial", "--json")
    assert (done.code, done.records[0]["status"], done.records[0]["damaged_tiles"]) == (0, "partial", [4])


def test_command_line_refuses(png: Path, tmp_path: Path, run: Run) -> None:
    assert run("encode", png, "-m", "vqgan", "--tokens", tmp_path / "a.npz").code == 0
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    clt, npz = tmp_path / "a.clt", tmp_path / "a.npz"
    other = tmp_path / "other.npz"
    np.savez(other, a=np.zeros(3))
    before[other] = other.read_bytes()
    for code, args in (
        (6, ("encode", png, "-m", "vqgan", "-o", tmp_path / "new.clt", "--tokens", npz)),
        (6, ("decode", clt, "-o", tmp_path / "new.png", "--tokens", npz)),
        (2, ("encode", png, "-m", "vqgan", "-o", tmp_path / "x.npz", "--tokens", tmp_path / "x.npz")),
        (2, ("encode", png, "-m", "vqgan", "--tokens", "-", "-f")),
        (2, ("encode", png, "-m", "vqgan", "--packets", 33, "-f")),
        (3, ("encode", png, "--packets", 5, "-f")),
        (3, ("encode", png, "-f", "--tokens", tmp_path / "new.npz")),
        (3, ("encode", other, "-o", tmp_path / "new.clt")),
        (3, ("decode", other, "-o", tmp_path / "new.png")),
        (3, ("decode", npz, "-o", tmp_path / "new.png", "--tokens", tmp_path / "new.npz")),
        (3, ("decode", npz, "-o", tmp_path / "new.png", "--simulate-loss", 0.5)),
        (7, ("encode", png, "-m", "vqgan", "--target-size", 10, "-f")),
    ):
        done = run(*args)
        assert done.code == code, (args, done.err)
        assert "unexpected" not in done.err
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before, args


def test_command_line_takes_folders(crop: Picture, tmp_path: Path, run: Run) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(crop.pixels).save(tmp_path / "in" / f"{name}.png")
    out, side = tmp_path / "out", tmp_path / "side"
    done = run("encode", tmp_path / "in", "-m", "vqgan", "-o", out, "--tokens", side, "-j", 2)
    assert done.code == 0, done.err
    assert sorted(p.name for p in out.iterdir()) == ["a.clt", "b.clt"]
    assert sorted(p.name for p in side.iterdir()) == ["a.npz", "b.npz"]
    assert run("decode", out, "-o", tmp_path / "back", "--tokens", side, "-f").code == 0
    assert run("encode", side / "a.npz", side / "b.npz", "-o", out, "-f").code == 0


def test_evaluation(crop: Picture, tmp_path: Path, run: Run) -> None:
    """Five points, one for each codebook, of growing size."""
    (tmp_path / "set").mkdir()
    Image.fromarray(crop.pixels).save(tmp_path / "set" / "a.png")
    options = ("--bpp-range", "all", "--viewer-pictures", 0)
    done = run(
        "eval", tmp_path / "set", "-c", "calotype:vqgan:q0-100:5", "-m", "psnr", "-o", tmp_path / "run", *options
    )
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    sizes = [r["bpp"] for r in lines if r["codec"].startswith("calotype")]
    assert len(sizes) == 5
    assert sizes == sorted(sizes)


def main() -> None:
    print(json.dumps(work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
