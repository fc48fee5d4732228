"""Effort at encode time: smaller files at equal quality, by the measure that the networks were trained with."""

from __future__ import annotations

import sys
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SAMPLES, objective, unpacked
from PIL import Image

from calotype import improving
from calotype.api import Codec, encode, psnr
from calotype.cli import root
from calotype.errors import InputError
from calotype.evaluation.codecs import parse_spec
from calotype.evaluation.metrics import measure
from calotype.media import Picture, read_picture
from calotype.models import perceptual, structure
from calotype.models.distortion import looks as looks_distortion
from calotype.rate import Target


@pytest.fixture(scope="module")
def fur(photo: Picture) -> Picture:
    return Picture(np.ascontiguousarray(photo.pixels[60:156, 120:216]))


@pytest.mark.parametrize("name", ["portrait-q60", "gray-q45", "tiles-q25"])
def test_effort_5_is_the_default(codec: Codec, name: str) -> None:
    picture, quality, tile = make_golden.cases()[name]
    data = codec.encode(picture, quality=quality, tile=tile, effort=5).data
    assert data == codec.encode(picture, quality=quality, tile=tile).data
    # Processors round the floats of an encoder differently: its files are alike everywhere, but not equal.
    golden = (make_golden.GOLDEN / f"{name}.clt").read_bytes()
    assert len(data) == pytest.approx(len(golden), rel=0.01)
    ours, theirs = (psnr(picture.pixels, codec.decode(file).picture.pixels) for file in (data, golden))
    assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize("quality", [25, 75])
def test_more_effort_makes_better_files(codec: Codec, photo: Picture, quality: float) -> None:
    face = Picture(np.ascontiguousarray(photo.pixels[20:212, 80:272]))
    plain, little, some, more, most = (objective(codec, face, quality, effort) for effort in (3, 4, 5, 7, 9))
    assert some < little < plain
    assert some < 0.995 * plain
    assert more < 0.995 * some
    assert most < more
    assert most < 0.99 * plain


def test_windows_of_shaping_are_felt_by_nothing(codec: Codec, photo: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, each drawn with a margin, a picture is improved as well as in one."""
    whole = objective(codec, photo, 50, 5)
    monkeypatch.setattr(improving, "WINDOW", 8)
    parts = objective(codec, photo, 50, 5)
    assert parts == pytest.approx(whole, rel=0.002)
    assert max(whole, parts) < 0.995 * objective(codec, photo, 50, 3)


def test_tiles_and_ragged_edges_are_refined_in_place(codec: Codec, photo: Picture) -> None:
    picture = Picture(np.ascontiguousarray(photo.pixels[60:157, 20:305]))
    assert objective(codec, picture, 60, 7, tile=256) < 0.99 * objective(codec, picture, 60, 3, tile=256)


def test_gray_is_refined(codec: Codec, fur: Picture) -> None:
    picture = Picture(np.ascontiguousarray(fur.pixels[:, :, 1:2]))
    assert objective(codec, picture, 50, 7) < objective(codec, picture, 50, 5) < objective(codec, picture, 50, 3)


def test_progress_tells_the_steps(codec: Codec, fur: Picture) -> None:
    told: list[float] = []
    codec.encode(fur, effort=7, progress=told.append)
    assert len(told) > 6
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_target_holds_with_effort(codec: Codec, fur: Picture) -> None:
    small = Picture(np.ascontiguousarray(fur.pixels[:48, :48]))
    made = codec.encode(small, target=Target("bpp", 2.0), effort=7)
    assert 1.94 <= made.bpp <= 2.0


@pytest.mark.parametrize("effort", [0, 6, 10])
def test_bad_effort(codec: Codec, fur: Picture, effort: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="effort must be one of 3, 4, 5, 7, 9"):
        codec.encode(fur, effort=effort)
    with pytest.raises(InputError, match="effort must be one of 3, 4, 5, 7, 9"):
        parse_spec(f"calotype:hyperprior@{effort}:q50+60").open()
    result = CliRunner().invoke(root, ["encode", "-e", str(effort), str(tmp_path / "none.png")])
    assert result.exit_code == 2
    assert "'3', '4', '5', '7', '9'" in result.output


def test_effort_can_be_measured(fur: Picture, tmp_path: Path) -> None:
    assert parse_spec("calotype:hyperprior+visual@7:q50+60").open().describe(50).count("tune=visual") == 1
    spec = parse_spec("calotype:hyperprior@7:q50+60")
    assert spec.name == "calotype:hyperprior@7"
    measured = spec.open()
    measured.encode(fur.pixels, 50, tmp_path / "refined.clt")
    parse_spec("calotype:q50+60").open().encode(fur.pixels, 50, tmp_path / "plain.clt")
    assert (tmp_path / "refined.clt").read_bytes() != (tmp_path / "plain.clt").read_bytes()
    assert measured.decode(tmp_path / "refined.clt", (96, 96))[0].shape == (96, 96, 3)


def test_the_visual_model_makes_files_that_look_better() -> None:
    """At no more bytes than files of least error, whoever decodes them; neither has blocks."""
    least, looks = unpacked(Codec.load(device="cpu")), Codec.load("visual")
    gains = []
    for name in ("chelsea.png", "astronaut.png", "coffee.png"):
        photo = read_picture(SAMPLES / name)
        plain = least.encode(photo, quality=45).data
        made = looks.encode(photo, target=Target("size", len(plain))).data
        assert len(made) <= len(plain)
        original, drawn = _tensor(photo), [_tensor(least.decode(data).picture) for data in (plain, made)]
        features = perceptual.features(original)
        unlike, unlike_made = (perceptual.distance(features, perceptual.features(x)).item() for x in drawn)
        assert unlike_made < 0.95 * unlike
        score, score_made = (structure_score(original, x) for x in drawn)
        gains.append(score_made - score)
    assert np.mean(gains) > 10


def test_effort_makes_files_that_look_better_still(fur: Picture) -> None:
    looks = Codec.load("visual")
    bits = []
    for effort in (5, 7):
        data = looks.encode(fur, quality=35, effort=effort).data
        wrong = looks_distortion(_tensor(fur), torch.tensor([0.35]))(_tensor(looks.decode(data).picture))
        bits.append(8 * len(data) + wrong.item())
    assert bits[1] < 0.98 * bits[0]


def test_tiles_too_small_to_look_at_are_refined_for_squared_error(photo: Picture) -> None:
    sliver = Picture(np.ascontiguousarray(photo.pixels[60:100, 120:216]))
    made = Codec.load("visual").encode(sliver, quality=35, effort=7).data
    assert Codec.load().decode(made).picture.pixels.shape == (40, 96, 3)


def test_files_do_not_depend_on_how_they_are_drawn(codec: Codec, fur: Picture) -> None:
    assert Codec.load(device="cpu", tune="visual").encode(fur).data == Codec.load(device="cpu").encode(fur).data


def test_a_tune_stands_for_a_model(tmp_path: Path, fur: Picture) -> None:
    assert encode(fur, tune="visual", quality=35) == encode(fur, model="visual", quality=35)
    assert encode(fur, tune="psnr", quality=35) == encode(fur, quality=35)
    with pytest.raises(InputError, match="tune visual means the model visual, not mixture"):
        encode(fur, tune="visual", model="mixture")
    source = tmp_path / "fur.png"
    Image.fromarray(fur.pixels).save(source)
    result = CliRunner().invoke(root, ["encode", "--tune", "visual", "-m", "mixture", str(source)])
    assert result.exit_code == 2
    assert "give one of the two" in result.output
    assert not (tmp_path / "fur.clt").exists()


def _tensor(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5


def structure_score(a: torch.Tensor, b: torch.Tensor) -> float:
    return 100 * (1 - structure.distance(structure.scales(a), structure.scales(b)).item())


def test_structure_is_what_the_evaluation_measures(photo: Picture, tmp_path: Path) -> None:
    """The distance that is descended is that of another implementation of SSIMULACRA 2."""
    for quality in (10, 40, 90):
        image = Image.fromarray(photo.pixels)
        image.save(tmp_path / "lossy.jpg", quality=quality)
        with Image.open(tmp_path / "lossy.jpg") as lossy:
            decoded = np.asarray(lossy.convert("RGB"))
        expected = measure(["ssimulacra2"], photo.pixels, decoded)["ssimulacra2"]
        assert expected is not None
        assert structure_score(_tensor(photo), _tensor(Picture(decoded))) == pytest.approx(expected, abs=0.3)


def test_structure_can_be_descended(fur: Picture) -> None:
    original = _tensor(fur)
    x = (original + 0.1 * torch.rand(original.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    scales = structure.scales(original)
    before = structure.distance(scales, structure.scales(x)).sum()
    (gradient,) = torch.autograd.grad(before, x)
    with torch.no_grad():
        after = structure.distance(scales, structure.scales(x - 0.02 * gradient / gradient.abs().max())).sum()
    assert after < before
    assert structure.distance(scales, scales).item() < 0.005


def test_looks_without_the_judging_network_say_what_to_install(fur: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    perceptual._network.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"efficientnet_lite_pytorch: pip install 'calotype\[eval\]'"):
        Codec.load("visual").encode(fur, effort=7)


def test_the_command_refines_for_looks_too(tmp_path: Path, fur: Picture) -> None:
    source, target = tmp_path / "fur.png", tmp_path / "fur.clt"
    Image.fromarray(fur.pixels).save(source)
    made = CliRunner().invoke(root, ["encode", "-q", "35", "-e", "7", "--tune", "visual", str(source)])
    assert made.exit_code == 0, made.output
    expected = Codec.load("visual", device="cpu").encode(fur, quality=35, effort=7)
    assert len(target.read_bytes()) == len(expected.data)
    assert len(target.read_bytes()) != len(Codec.load(device="cpu").encode(fur, quality=35, effort=7).data)
