"""The model `mixture`: through real files, exact, with codebooks that are used and a prior that saves bits."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import make_golden
import numpy as np
import pytest
import reference_decoder
import torch
from conftest import Run
from reference_mixture import MixtureDecoder

from calotype import container
from calotype.api import Codec, psnr
from calotype.entropy import Decoder, Encoder, SymbolTables
from calotype.errors import CalotypeError, DriftError, FormatError, InputError
from calotype.media import Picture, read_picture
from calotype.models import multicodebook, tables, zoo
from calotype.models.exact import integerise
from calotype.models.mixture import Mixture, MixtureConfig
from calotype.models.multicodebook import DISTORTION, Book, Codebooks, Search
from calotype.models.training import codebooks, export
from calotype.models.training.codebooks import Scene, observe

Make = Callable[..., Picture]
EXPECTED: dict[str, dict[str, str]] = json.loads((make_golden.MIXTURE / "hashes.json").read_text(encoding="utf-8"))
SPECIFICATION = (Path(__file__).parent.parent / "docs" / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def mixture() -> Codec:
    return Codec.load("mixture", device="cpu")


@pytest.fixture(scope="module")
def network(mixture: Codec) -> Mixture:
    network = mixture.coder.network
    assert isinstance(network, Mixture)
    return network


@pytest.fixture(scope="module")
def reference(mixture: Codec) -> MixtureDecoder:
    return MixtureDecoder(mixture.spec.weights)


def scene(network: Mixture, picture: Picture, quality: int) -> Scene:
    """The latents that the encoder makes of a picture with sides that are multiples of 16."""
    with torch.inference_mode():
        x = torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5
        x = x.contiguous(memory_format=torch.channels_last)
        y = network.analyse(x, torch.tensor([quality / 1000]))
        middle, coarse = network.hyper_analysis(y)
    return Scene(coarse, middle, y, torch.tensor([quality]))


# Files ------------------------------------------------------------------------------------------------------------


def test_round_trip_through_the_command_line(photo: Picture, mixture: Codec, tmp_path: Path, run: Run) -> None:
    """A file names its model by itself; more quality means more bytes and a better picture."""
    found = []
    for quality in (5, 35, 65):
        file, back = tmp_path / f"{quality}.clt", tmp_path / f"{quality}.png"
        source = str(Path(__file__).parent.parent / "samples" / "chelsea.png")
        arguments = ["encode", source, "-o", str(file), "-m", "mixture", "-q", str(quality)]
        assert run(*arguments).code == 0
        assert container.read_header(file.read_bytes()).model == mixture.spec.id == 3
        assert run("decode", file, "-o", back).code == 0
        found.append((file.stat().st_size, psnr(photo.pixels, read_picture(back).pixels)))
    assert found == sorted(found)
    assert found[0][1] > 25
    assert found[2][1] > 34


@pytest.mark.parametrize(
    ("height", "width", "channels", "alpha"), [(1, 1, 3, False), (33, 70, 1, False), (70, 49, 3, True)]
)
def test_odd_sizes_gray_and_alpha(
    mixture: Codec, synthetic: Make, height: int, width: int, channels: int, alpha: bool
) -> None:
    picture = synthetic(height, width, channels, alpha=alpha)
    decoded = mixture.decode(mixture.encode(picture, quality=60).data).picture
    assert decoded.pixels.shape == picture.pixels.shape
    assert psnr(picture.pixels, decoded.pixels) > 28
    assert (decoded.alpha is None) == (picture.alpha is None)


def test_regions_scales_and_batches_agree_with_the_whole(mixture: Codec, large_photo: Picture) -> None:
    data = mixture.encode(large_photo, quality=40, tile=256).data
    whole = mixture.decode(data).picture.pixels.astype(int)
    part = mixture.decode(data, region=(250, 130, 90, 200)).picture.pixels
    assert np.abs(part - whole[130:330, 250:340]).max() <= 1
    small = mixture.decode(data, scale=4).picture.pixels
    means = whole.reshape(128, 4, 160, 4, 3).mean((1, 3))
    assert np.abs(small - means).max() < 12  # clipping comes after the mean
    assert np.abs(small - means).mean() < 0.5
    batch = mixture.decode_batch([data, mixture.encode(large_photo, quality=70, tile=256).data])
    assert np.abs(batch[0].permute(1, 2, 0).numpy() - whole).max() <= 1


def test_files_of_both_models_decode_with_either_codec(mixture: Codec, codec: Codec, photo: Picture) -> None:
    crop = Picture(np.ascontiguousarray(photo.pixels[:64, :96]))
    for writer, reader in ((mixture, codec), (codec, mixture)):
        data = writer.encode(crop, quality=50).data
        assert (reader.decode(data).picture.pixels == writer.decode(data).picture.pixels).all()


def test_refinement_is_refused(mixture: Codec, synthetic: Make) -> None:
    with pytest.raises(InputError, match="effort 5"):
        mixture.encode(synthetic(16, 16), effort=7)


# Format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [0, 12.5, 60, 100])
def test_reference_decoder_agrees(reference: MixtureDecoder, mixture: Codec, photo: Picture, quality: float) -> None:
    data = mixture.encode(Picture(np.ascontiguousarray(photo.pixels[60:187, 100:290])), quality=quality).data
    file = reference_decoder.parse(data)
    latent, symbols = reference.latent(file)
    assert symbols == mixture.symbol_hash(data)
    decoded = mixture.decode(data).picture.pixels
    assert np.abs(reference.pixels(file, latent).astype(int) - decoded).max() <= 1


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_file(mixture: Codec, reference: MixtureDecoder, name: str) -> None:
    data = (make_golden.MIXTURE / name).read_bytes()
    assert mixture.symbol_hash(data) == EXPECTED[name]["symbols"]
    assert reference.latent(reference_decoder.parse(data))[1] == EXPECTED[name]["symbols"]
    stored = read_picture(make_golden.MIXTURE / EXPECTED[name]["pixels_png"])
    assert np.abs(mixture.decode(data).picture.pixels.astype(int) - stored.pixels).max() <= 1


def test_specification_states_the_shapes(network: Mixture) -> None:
    config, text = network.config, SPECIFICATION.partition("## 10. ")[2]
    for level, name in zip(codebooks.levels(network), ("coarse", "middle", "fine"), strict=True):
        assert f"*{name}* ({level.channels} channels, in units of 1/{level.unit})" in " ".join(text.split())
    assert f"`dec_coarse.{config.synthesis_coarse - 1}`" in text
    assert f"`dec_fine.{config.synthesis_fine - 1}`" in text
    assert f"at most {network.halo} positions" in " ".join(text.split())


# Damage -----------------------------------------------------------------------------------------------------------


def test_damage_is_our_error(mixture: Codec, photo: Picture) -> None:
    """Bytes changed under a right CRC: no other exception, and hardly ever unnoticed."""
    still = container.read_still(mixture.encode(Picture(photo.pixels[:64, :80].copy()), quality=50).data)
    (payload,) = still.tiles
    assert payload is not None
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(60):
        wrong = bytearray(payload)
        for place in rng.integers(len(wrong), size=rng.integers(1, 6)):
            wrong[place] ^= 1 << int(rng.integers(8))
        try:
            mixture.decode(container.write_still(still.header, [bytes(wrong)]))
        except (FormatError, DriftError):
            noticed += 1
    assert noticed == 60
    with pytest.raises(CalotypeError):
        mixture.decode(container.write_still(still.header, [bytes(payload[:3])]))


def test_an_escaped_codeword_is_damage(network: Mixture) -> None:
    """An encoder that does not know that there are none could write one."""
    frequencies, half_widths, skip, _ = network.tables
    table = np.array([5], np.int16)
    encoder = Encoder(SymbolTables(frequencies.numpy(), half_widths, skip))
    encoder.push(table, np.array([half_widths[5] + 3], np.int32))
    with pytest.raises(FormatError, match="codeword"):
        Decoder(SymbolTables(frequencies.numpy(), half_widths, skip, escapes=False), encoder.finish()).pull(table)


def test_lost_tile_is_filled(mixture: Codec, large_photo: Picture) -> None:
    data = bytearray(mixture.encode(large_photo, quality=30, tile=256).data)
    whole = mixture.decode(bytes(data)).picture.pixels
    data[-40] ^= 1
    decoded = mixture.decode(bytes(data), allow_partial=True)
    assert decoded.damaged == (5,)
    border = 16 * mixture.coder.network.halo
    assert (decoded.picture.pixels[: 256 - border] == whole[: 256 - border]).all()


# Codebooks --------------------------------------------------------------------------------------------------------


def test_tables_and_codewords_are_sound(network: Mixture) -> None:
    for level in codebooks.levels(network):
        for number, book in enumerate(level.books):
            frequencies = level.frequencies_of(number).long()
            assert (frequencies.sum(1) == 2**tables.PRECISION).all()
            assert frequencies.min() >= 2
            words = level.words_of(number)
            assert len(words.unique(dim=0)) == book.size
            assert (words == -words.flip(0)).all()
    assert len(network.tables.half_widths) == network.prior.fine.stop_table < 2**15


@pytest.mark.parametrize(("dimension", "half", "radius"), [(1, 127, 127**2), (2, 126, 81), (4, 116, 6)])
def test_basis_is_the_integer_points_of_smallest_norm(dimension: int, half: int, radius: int) -> None:
    points = multicodebook.basis(Book(1, dimension, half))
    assert points.shape == (2 * half + 1, dimension)
    assert (points[half] == 0).all()
    assert (points == -points.flip(0)).all()
    assert points.square().sum(1).max() <= radius
    assert len(points.unique(dim=0)) == len(points)


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_search_is_nearly_as_good_as_trying_all_codewords(dimension: int) -> None:
    """By rate and distortion of Gaussian vectors; the nearest codeword costs more."""
    basis = multicodebook.basis(Book(1, dimension, 120))
    points, stretch = basis.float(), multicodebook.stretch(basis)
    frequencies = multicodebook.frequencies(multicodebook.gaussian_weights(basis))[:, :-1]
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(int((stretch == 1).sum()), (4000,), generator=generator)
    sigma = tables.scale_of(row + tables.SKIP)[:, None]
    vectors = torch.randn(4000, dimension, generator=generator) * sigma
    found = Search(points, stretch).best(vectors[None], row[None], torch.ones(1))[0]
    bits = tables.PRECISION - frequencies.double().log2().float()
    distance = (vectors[:, None] - points).square().sum(2)
    cost = DISTORTION * distance + bits[row]
    best, nearest = cost.min(1).values, cost.gather(1, distance.argmin(1)[:, None])[:, 0]
    excess = (cost.gather(1, found[:, None])[:, 0] - best).mean()
    assert excess < 0.1 * (nearest - best).mean()


def test_code_is_answered_by_codewords(network: Mixture) -> None:
    """Decoding puts out mean + codeword, for groups that are skipped the mean itself."""
    level = network.prior.fine
    generator = torch.Generator().manual_seed(0)
    mean = torch.randint(-500, 500, (2, level.channels, 3, 2), generator=generator).float()
    scale = torch.randint(0, 20, (2, level.groups, 3, 2), generator=generator).float()
    coding = level.code(mean, scale, torch.zeros(len(mean)).long(), None)
    asked = next(coding)
    with pytest.raises(StopIteration) as stop:
        coding.send((asked.tables > 0).int())
    value = stop.value.value
    skipped = (scale < tables.SKIP)[:, level.group_of_channel]
    assert skipped.any()
    assert (value == mean)[skipped].all()
    first = level.words_of(0)[level.books[0].half + 1]
    coded = ~skipped[:, 0]
    assert (value[:, 0][coded] == mean[:, 0][coded] + first[0]).all()


def test_estimated_bits_are_those_of_files(network: Mixture, mixture: Codec, large_photo: Picture) -> None:
    for quality in (100, 400, 800):
        estimated = codebooks.encode(network, scene(network, large_photo, quality)) / 8
        still = container.read_still(mixture.encode(large_photo, quality=quality / 10).data)
        (payload,) = still.tiles
        assert payload is not None
        assert len(payload) - 4 == pytest.approx(estimated, rel=0.005, abs=8)


def test_codebooks_are_used_and_their_prior_saves_bits(network: Mixture) -> None:
    """On the samples, which were not trained on; over the Kodak pictures the card has more."""
    scenes = []
    for path in sorted((Path(__file__).parent.parent / "samples").iterdir()):
        if path.suffix in (".png", ".jpg"):
            pixels = read_picture(path).pixels[:256, :256]
            scenes += [scene(network, Picture(np.ascontiguousarray(pixels)), q) for q in (50, 300, 550, 800)]
    found, bits = observe(network, scenes)
    fixed = 0.0
    for level, own in zip(codebooks.levels(network), found, strict=True):
        for book, statistics in zip(level.books, own, strict=True):
            counts = statistics.counts.sum(0)
            fixed += float(counts.sum()) * np.log2(book.size)
            share = counts / counts.sum()
            assert (counts > 0).double().mean() > 0.25, book
            assert 2 ** -(share * share.clamp(min=1e-12).log2()).sum() > 1.2, book
    assert bits < 0.85 * fixed


# Training ---------------------------------------------------------------------------------------------------------

SMALL = MixtureConfig(
    fine=32, coarse=32, latent=24, hidden=32, up=32, analysis_fine=1, analysis_coarse=1, synthesis_coarse=1,
    synthesis_fine=1, coarse_books=(Book(4, 2, 40),), middle_books=(Book(4, 2, 40),),
    fine_books=(Book(4, 1, 60), Book(6, 2, 40), Book(2, 4, 40)),
)  # fmt: skip


@pytest.fixture
def small() -> Mixture:
    torch.manual_seed(0)
    return Mixture(SMALL)


def test_gradients_reach_every_parameter(small: Mixture) -> None:
    for layer in (small.hyper_analysis.coarse, small.hyper_analysis.middle):
        assert layer.bias is not None
        torch.nn.init.uniform_(layer.bias, -3, 3)  # latents of zeros would have no gradient to pass
    x = torch.rand(2, 3, 64, 96) - 0.5
    out = small(x, torch.tensor([0.3, 0.9]))
    loss = (out.x_hat - x).square().mean() + 1e-3 * (out.latent_bits + out.hyper_bits).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # The weights of the coarsest head meet zeros; its biases are what it learns.
        assert parameter.grad.abs().max() > 0 or name == "prior.coarse_head.weight", name


def test_fitting_lowers_the_cost(small: Mixture, large_photo: Picture, tmp_path: Path) -> None:
    """Codewords and tables fitted to other photographs: fewer bits and no more error than plain integer points have."""
    samples = Path(__file__).parent.parent / "samples"
    for name in ("astronaut.png", "coffee.png"):
        shutil.copy(samples / name, tmp_path)
    fitted = copy.deepcopy(small)
    codebooks.fit(fitted, tmp_path, batches=4, rounds=2)
    costs = []
    for network in (small, fitted):
        coding = integerise(network)
        scenes = [scene(coding, large_photo, quality) for quality in (200, 600)]
        found, bits = observe(coding, scenes)
        costs.append(bits + DISTORTION * sum(s.error for own in found for s in own))
    assert costs[1] < 0.97 * costs[0]


def test_exported_weights_hold_the_fitted_codebooks(
    small: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, folder = Path(__file__).parent.parent / "samples", tmp_path / "photos"
    folder.mkdir()
    shutil.copy(samples / "chelsea.png", folder)
    torch.save({"ema": dict(small.named_parameters()), "model": small.state_dict()}, tmp_path / "checkpoint.pt")
    entry = {"id": 3, "architecture": "small", "summary": "", "file": "small.safetensors", "sha256": ""}
    (tmp_path / "index.json").write_text(json.dumps({"small": entry}), encoding="utf-8")
    monkeypatch.setitem(zoo.ARCHITECTURES, "small", lambda config: Mixture(SMALL))
    with pytest.raises(ValueError, match="photographs"):
        export.export_weights(tmp_path / "checkpoint.pt", "small", tmp_path)
    path = export.export_weights(tmp_path / "checkpoint.pt", "small", tmp_path, folder)
    restored = Mixture(SMALL)
    zoo.load_parameters(restored, path)
    plain = Mixture(SMALL)
    assert not torch.equal(restored.prior.fine.frequencies, plain.prior.fine.frequencies)
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert MixtureConfig.from_json(json.loads(metadata["config"])) == SMALL


def test_far_means_and_last_codewords_are_exact() -> None:
    books = Codebooks([Book(2, 1, 50)], 64, 1)
    factor = int(books.stretch[0, -1])
    assert factor == 4  # 50 steps are less than 3 times the largest scale, 64
    mean = torch.full((1, 2, 1, 1), float(tables.MEAN_LIMIT))
    coding = books.code(mean, torch.full((1, 2, 1, 1), 63.0), torch.tensor([32]), None)
    next(coding)
    with pytest.raises(StopIteration) as stop:
        coding.send(torch.tensor([[50, -50]], dtype=torch.int32))
    reach = 50 * 64 * factor
    assert stop.value.value.flatten().tolist() == [tables.MEAN_LIMIT + reach, tables.MEAN_LIMIT - reach]
