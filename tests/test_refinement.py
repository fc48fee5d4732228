"""Refinement at encode time: smaller files at equal quality, by the measure that the networks were trained with."""

from __future__ import annotations

from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from calotype.api import Codec, psnr
from calotype.cli import root
from calotype.errors import InputError
from calotype.evaluation.codecs import parse_spec
from calotype.media import Picture
from calotype.models.quantizers import lagrangian
from calotype.rate import Target


def objective(codec: Codec, picture: Picture, quality: float, effort: int, tile: int = 1024) -> float:
    """bpp + λ · 255² · MSE of a real file, decoded again."""
    made = codec.encode(picture, quality=quality, effort=effort, tile=tile)
    shown = codec.decode(made.data).picture.pixels.astype(float) - picture.pixels
    return made.bpp + float(lagrangian(torch.tensor(quality / 100))) * float(np.square(shown).mean())


@pytest.fixture(scope="module")
def fur(photo: Picture) -> Picture:
    return Picture(np.ascontiguousarray(photo.pixels[60:156, 120:216]))


@pytest.mark.parametrize("name", ["portrait-q60", "gray-q45", "tiles-q25"])
def test_effort_5_is_the_plain_encoder(codec: Codec, name: str) -> None:
    picture, quality, tile = make_golden.cases()[name]
    data = codec.encode(picture, quality=quality, tile=tile, effort=5).data
    assert data == codec.encode(picture, quality=quality, tile=tile).data
    # Processors round the floats of an encoder differently: its files are alike everywhere, but not equal.
    golden = (make_golden.GOLDEN / f"{name}.clt").read_bytes()
    assert len(data) == pytest.approx(len(golden), rel=0.01)
    ours, theirs = (psnr(picture.pixels, codec.decode(file).picture.pixels) for file in (data, golden))
    assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize("quality", [25, 75])
def test_more_effort_makes_better_files(codec: Codec, fur: Picture, quality: float) -> None:
    plain, some, most = (objective(codec, fur, quality, effort) for effort in (5, 7, 9))
    assert some < plain
    assert most < 0.99 * plain


def test_tiles_and_ragged_edges_are_refined_in_place(codec: Codec, photo: Picture) -> None:
    picture = Picture(np.ascontiguousarray(photo.pixels[60:157, 20:305]))
    assert objective(codec, picture, 60, 7, tile=256) < 0.99 * objective(codec, picture, 60, 5, tile=256)


def test_gray_is_refined(codec: Codec, fur: Picture) -> None:
    picture = Picture(np.ascontiguousarray(fur.pixels[:, :, 1:2]))
    assert objective(codec, picture, 50, 7) < objective(codec, picture, 50, 5)


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
    with pytest.raises(InputError, match="effort must be one of 5, 7, 9"):
        codec.encode(fur, effort=effort)
    with pytest.raises(InputError, match="effort must be one of 5, 7, 9"):
        parse_spec(f"calotype:hyperprior@{effort}:q50+60").open()
    result = CliRunner().invoke(root, ["encode", "-e", str(effort), str(tmp_path / "none.png")])
    assert result.exit_code == 2
    assert "'5', '7', '9'" in result.output


def test_effort_can_be_measured(fur: Picture, tmp_path: Path) -> None:
    assert parse_spec("calotype:hyperprior+visual@7:q50+60").open().describe(50).count("tune=visual") == 1
    spec = parse_spec("calotype:hyperprior@7:q50+60")
    assert spec.name == "calotype:hyperprior@7"
    measured = spec.open()
    measured.encode(fur.pixels, 50, tmp_path / "refined.clt")
    parse_spec("calotype:q50+60").open().encode(fur.pixels, 50, tmp_path / "plain.clt")
    assert (tmp_path / "refined.clt").read_bytes() != (tmp_path / "plain.clt").read_bytes()
    assert measured.decode(tmp_path / "refined.clt", (96, 96))[0].shape == (96, 96, 3)
