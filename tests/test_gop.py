"""Groups of pictures: what the encoder showed is what every decoder shows, however the frames were lost or computed.

This module is also a program: `python tests/test_gop.py JOB.json` decodes a chain in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype.errors import DriftError, FormatError, ModelNotFoundError
from calotype.video.frames import Colour, Frame
from calotype.video.gop import GopDecoder, GopEncoder, video_format
from calotype.video.packet import VideoFormat
from calotype.video.planes import from_rgb, to_frame, to_planes, to_rgb

COLOUR = Colour("bt601")
QUALITY = 350
SIZE = (136, 184)
"""Neither side is a multiple of 16."""


def chain(format: VideoFormat, payloads: list[bytes]) -> tuple[list[Frame], str]:
    """All frames and the SHA-256 of all symbols."""
    digest = hashlib.sha256()
    decoder = GopDecoder(format, "cpu", symbols_seen=digest.update)
    return [decoder.decode(p, key=i == 0) for i, p in enumerate(payloads)], digest.hexdigest()


def farthest(a: Frame, b: Frame) -> int:
    """Largest difference of two samples."""
    pairs = ((a.y, b.y), (a.u, b.u), (a.v, b.v))
    return max(int(np.abs(p.astype(int) - q).max()) for p, q in pairs)


def work(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    payloads = [bytes.fromhex(p) for p in job["payloads"]]
    shown, digest = chain(video_format(SIZE[1], SIZE[0], COLOUR, QUALITY), payloads)
    last = np.concatenate([plane.ravel() for plane in (shown[-1].y, shown[-1].u, shown[-1].v)])
    return {"symbols": digest, "last": last.tolist(), "capability": torch.backends.cpu.get_cpu_capability()}


if __name__ == "__main__":
    print(json.dumps(work(json.loads(Path(sys.argv[1]).read_text()))))
    sys.exit()


import make_golden  # noqa: E402
from video_clips import pan  # noqa: E402 (the program above must run without the tests' folder on its path)


def frame_of(rgb: np.ndarray) -> Frame:
    x = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5
    height, width = rgb.shape[:2]
    bottom, right = -height % 2, -width % 2
    x = torch.nn.functional.pad(x, (0, right, 0, bottom), mode="replicate")
    return to_frame(from_rgb(x, COLOUR), width, height)


@pytest.fixture(scope="module")
def format() -> VideoFormat:
    return video_format(SIZE[1], SIZE[0], COLOUR, QUALITY)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [frame_of(rgb) for rgb in pan(8, (SIZE[1], SIZE[0]))]


@pytest.fixture(scope="module")
def coded(format: VideoFormat, frames: list[Frame]) -> tuple[list[bytes], list[Frame]]:
    """Payloads, and what the encoder says that a decoder will show."""
    encoder = GopEncoder(format, "cpu")
    payloads, shown = [], []
    for i, frame in enumerate(frames):
        payloads.append(encoder.encode(frame, key=i == 0))
        shown.append(encoder.shown)
    return payloads, shown


def psnr(a: Frame, b: Frame) -> float:
    return float(10 * np.log10(255**2 / np.square(a.y.astype(float) - b.y).mean()))


def test_decoder_shows_what_the_encoder_showed(
    format: VideoFormat, coded: tuple[list[bytes], list[Frame]], frames: list[Frame]
) -> None:
    shown, _ = chain(format, coded[0])
    for decoded, promised, source in zip(shown, coded[1], frames, strict=True):
        assert farthest(decoded, promised) == 0
        assert (decoded.width, decoded.height) == SIZE[::-1]
        assert psnr(decoded, source) > 28


def test_predicted_frames_are_small_and_hold_the_quality(
    coded: tuple[list[bytes], list[Frame]], frames: list[Frame]
) -> None:
    payloads, shown = coded
    assert sum(map(len, payloads[1:])) / (len(payloads) - 1) < 0.5 * len(payloads[0])
    assert psnr(shown[-1], frames[-1]) > psnr(shown[0], frames[0]) - 1.5


def test_a_still_scene_costs_next_to_nothing(format: VideoFormat, frames: list[Frame]) -> None:
    encoder = GopEncoder(format, "cpu")
    payloads = [encoder.encode(frames[0], key=i == 0) for i in range(5)]
    assert max(map(len, payloads[2:])) < 0.06 * len(payloads[0])


def test_quality_of_a_frame_can_differ(format: VideoFormat, frames: list[Frame]) -> None:
    sizes = []
    for quality in (200, 700):
        encoder = GopEncoder(format, "cpu")
        encoder.encode(frames[0], key=True)
        sizes.append(len(encoder.encode(frames[1], key=False, quality=quality)))
    assert 2 * sizes[0] < sizes[1]


def test_a_key_frame_begins_anew(
    format: VideoFormat, frames: list[Frame], coded: tuple[list[bytes], list[Frame]]
) -> None:
    encoder = GopEncoder(format, "cpu")
    encoder.encode(frames[5], key=True)
    encoder.encode(frames[6], key=False)
    assert encoder.encode(frames[0], key=True) == coded[0][0]
    assert encoder.encode(frames[1], key=False) == coded[0][1]


def test_lost_frames_are_concealed_until_the_next_key(
    format: VideoFormat, coded: tuple[list[bytes], list[Frame]], frames: list[Frame]
) -> None:
    payloads, shown = coded
    decoder = GopDecoder(format, "cpu")
    for i in range(4):
        decoder.decode(payloads[i], key=i == 0)
    concealed = [decoder.conceal() for _ in range(4)]
    # The camera moves steadily, so going on with its motion beats standing still.
    assert psnr(concealed[0], frames[4]) > psnr(shown[3], frames[4]) + 1
    assert farthest(concealed[3], concealed[2]) == 0
    with pytest.raises(FormatError, match="key frame"):
        decoder.decode(payloads[4], key=False)
    assert farthest(decoder.decode(payloads[0], key=True), shown[0]) == 0
    assert farthest(decoder.decode(payloads[1], key=False), shown[1]) == 0


def test_concealment_before_the_first_frame_is_gray(
    format: VideoFormat, coded: tuple[list[bytes], list[Frame]]
) -> None:
    decoder = GopDecoder(format, "cpu")
    assert (decoder.conceal().y == 128).all()
    with pytest.raises(FormatError, match="key frame"):
        decoder.decode(coded[0][1], key=False)


def test_damaged_symbols_are_found(format: VideoFormat, coded: tuple[list[bytes], list[Frame]]) -> None:
    rng = np.random.default_rng(1)
    payload = coded[0][1]
    # Behind the head, which the packet's checksum covers, and before the last word, of which not all bits are used.
    for place in rng.integers(3, len(payload) - 4, 12):
        decoder = GopDecoder(format, "cpu")
        decoder.decode(coded[0][0], key=True)
        damaged = bytearray(payload)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises((FormatError, DriftError)):
            decoder.decode(bytes(damaged), key=False)
    for length in range(0, len(payload) - 8, 37):
        decoder = GopDecoder(format, "cpu")
        decoder.decode(coded[0][0], key=True)
        with pytest.raises((FormatError, DriftError)):
            decoder.decode(payload[:length], key=False)


def test_other_weights_are_refused(format: VideoFormat, coded: tuple[list[bytes], list[Frame]]) -> None:
    from dataclasses import replace

    with pytest.raises(ModelNotFoundError, match="0707"):
        GopDecoder(replace(format, intra_weights=b"\7" * 8), "cpu")
    decoder = GopDecoder(replace(format, inter_weights=b"\7" * 8), "cpu")
    decoder.decode(coded[0][0], key=True)
    with pytest.raises(ModelNotFoundError, match="0707"):
        decoder.decode(coded[0][1], key=False)


def test_weights_of_the_wrong_kind_are_refused(format: VideoFormat, coded: tuple[list[bytes], list[Frame]]) -> None:
    from dataclasses import replace

    with pytest.raises(ModelNotFoundError, match="still pictures"):
        GopDecoder(replace(format, intra_weights=format.inter_weights), "cpu")
    decoder = GopDecoder(replace(format, inter_weights=format.intra_weights), "cpu")
    decoder.decode(coded[0][0], key=True)
    with pytest.raises(ModelNotFoundError, match="does not predict"):
        decoder.decode(coded[0][1], key=False)


def test_a_key_packet_must_hold_an_intra_frame(format: VideoFormat, coded: tuple[list[bytes], list[Frame]]) -> None:
    decoder = GopDecoder(format, "cpu")
    decoder.decode(coded[0][0], key=True)
    with pytest.raises(FormatError, match="key packet"):
        decoder.decode(coded[0][1], key=True)


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (17, 33), (64, 5)])
def test_any_size(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    height, width = size
    half = (-(-height // 2), -(-width // 2))
    frame = Frame(*(rng.integers(60, 180, s, dtype=np.uint8) for s in ((height, width), half, half)))
    format = video_format(width, height, COLOUR, 600)
    encoder = GopEncoder(format, "cpu")
    payloads = [encoder.encode(frame, key=i == 0) for i in range(2)]
    shown, _ = chain(format, payloads)
    assert farthest(shown[1], encoder.shown) == 0


@pytest.mark.parametrize("colour", [Colour("bt601"), Colour("bt709", full_range=True), Colour("bt2020")])
def test_rgb_and_back_keeps_the_planes(frames: list[Frame], colour: Colour) -> None:
    planes = to_planes(frames[0], torch.device("cpu"))
    again = to_frame(from_rgb(to_rgb(planes, colour), colour), *SIZE[::-1])
    assert farthest(again, frames[0]) == 0


def test_golden_video() -> None:
    index = json.loads((make_golden.VIDEO / make_golden.INDEX).read_text())["pan.clt"]
    shown, symbols = make_golden.decode_video((make_golden.VIDEO / "pan.clt").read_bytes())
    assert len(shown) == index["frames"] == 7
    assert symbols == index["symbols"]
    with np.load(make_golden.VIDEO / "last.npz") as last:
        assert farthest(shown[-1], Frame(last["y"], last["u"], last["v"])) <= 1


VARIANTS = [
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
@pytest.mark.parametrize("variables", VARIANTS, ids=["SSE", "AVX2"])
def test_chain_is_the_same_on_other_instruction_sets(
    format: VideoFormat, coded: tuple[list[bytes], list[Frame]], variables: dict[str, str], tmp_path: Path
) -> None:
    shown, symbols = chain(format, coded[0])
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"threads": 2, "payloads": [p.hex() for p in coded[0]]}))
    run = subprocess.run(
        [sys.executable, __file__, str(job)], env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["symbols"] == symbols
    last = np.concatenate([plane.ravel() for plane in (shown[-1].y, shown[-1].u, shown[-1].v)])
    assert np.abs(np.array(result["last"]) - last).max() <= 1
