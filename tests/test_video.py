"""Frames, packets, encoder and decoder of videos: exact times, random access, loss, bitrates, processes."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from video_clips import pan, psnr

from calotype import VideoDecoder, VideoEncoder
from calotype.errors import (
    CalotypeError,
    ChecksumError,
    FormatError,
    InputError,
    LimitError,
    ModelNotFoundError,
    TargetError,
    TruncatedError,
)
from calotype.video import bitrate, frames
from calotype.video.bitrate import DELAY, BitrateControl, Budget
from calotype.video.decoder import Shown
from calotype.video.frames import Colour, Frame
from calotype.video.gop import GopDecoder
from calotype.video.packet import FramePacket, Packet, StreamConfig, VideoFormat
from calotype.video.planes import frame_rgb, from_rgb, to_frame, to_planes, to_rgb
from calotype.video.scenes import SceneCuts
from calotype.video.stream import StreamReader, StreamWriter
from calotype.video.timeline import timeline

BASE = Fraction(1, 12800)
KEYINT = 5


def av_frames(pixels: list[np.ndarray], step: int = 512, times: list[int] | None = None) -> Iterator[av.VideoFrame]:
    for i, picture in enumerate(pixels):
        frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p", dst_colorspace=5, threads=1)
        frame.pts, frame.time_base = times[i] if times else i * step, BASE
        yield frame


def run(encoder: VideoEncoder, pictures: Iterator[av.VideoFrame]) -> list[Packet]:
    return [packet for frame in (*pictures, None) for packet in encoder.encode(frame)]


@pytest.fixture(scope="module")
def pictures() -> list[av.VideoFrame]:
    return list(av_frames(pan(14)))


@pytest.fixture(scope="module")
def packets(pictures: list[av.VideoFrame]) -> list[Packet]:
    """14 frames in groups of 5."""
    encoder = VideoEncoder(160, 96, time_base=BASE, quality=50, keyint=KEYINT, device="cpu")
    return run(encoder, iter(pictures))


@pytest.fixture(scope="module")
def clean(packets: list[Packet]) -> list[Shown]:
    """The same, decoded."""
    return list(VideoDecoder(packets, device="cpu").frames())


@pytest.fixture(scope="module")
def raw(packets: list[Packet]) -> bytes:
    """The same as a raw stream."""
    out = io.BytesIO()
    writer = StreamWriter(out)
    for packet in packets:
        writer.write(packet.data)
    writer.close()
    return out.getvalue()


def config_of(packets: list[Packet]) -> StreamConfig:
    config = FramePacket.unpack(packets[0].data).config
    assert config is not None
    return config


# Frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", frames.MATRICES)
@pytest.mark.parametrize("full", [False, True])
def test_rgb_and_back_is_exact_at_odd_sizes(matrix: frames.Matrix, full: bool) -> None:
    rng = np.random.default_rng(1)
    planes = [rng.integers(0, 256, shape, np.uint8) for shape in ((97, 161), (49, 81), (49, 81))]
    colour = Colour(matrix, full)
    # The last row and column of an odd size have chroma of their own, which their one pixel gives back.
    padded = to_planes(Frame(*planes), torch.device("cpu"))
    again = to_frame(from_rgb(to_rgb(padded, colour), colour), 161, 97)
    for plane, other in zip(planes, (again.y, again.u, again.v), strict=True):
        assert np.array_equal(plane, other)


@pytest.mark.parametrize(
    ("colour", "code", "rgb"),
    [
        (Colour("bt601"), (81, 90, 240), (255, 0, 0)),
        (Colour("bt709"), (63, 102, 240), (255, 0, 0)),
        (Colour("bt601", True), (76, 85, 255), (255, 0, 0)),
        (Colour("bt709"), (16, 128, 128), (0, 0, 0)),
        (Colour("bt2020"), (235, 128, 128), (255, 255, 255)),
    ],
)
def test_known_colours(colour: Colour, code: tuple[int, int, int], rgb: tuple[int, int, int]) -> None:
    frame = Frame(np.full((2, 2), code[0], np.uint8), *(np.full((1, 1), c, np.uint8) for c in code[1:]))
    found = (frame_rgb(frame, colour, torch.device("cpu"))[0, :, 0, 0] + 0.5) * 255
    assert found.numpy() == pytest.approx(rgb, abs=1.6)


@pytest.mark.parametrize("format", ["yuv420p10le", "yuv422p", "yuv444p", "yuv422p10le", "gray"])
def test_other_pixel_formats_become_8_bit_420(format: str) -> None:
    (eight,) = av_frames(pan(1, (161, 97)))
    eight.colorspace = 5
    frame = frames.from_av(eight.reformat(format=format, threads=1))
    assert frame.y.shape == (97, 161)
    assert frame.u.shape == (49, 81)
    assert psnr(frame.y, frames.from_av(eight).y) > 45
    if format != "gray":
        assert psnr(frame.u, frames.from_av(eight).u) > 40


def test_rgb_input_is_taken_as_bt709() -> None:
    picture = pan(1)[0]
    source = av.VideoFrame.from_ndarray(picture, "rgb24")
    colour = frames.colour_of(source)
    assert colour == Colour("bt709", False, 2, 2, 1)
    rgb = (
        frame_rgb(frames.from_av(source), colour, torch.device("cpu"))[0]
        .permute(1, 2, 0)
        .add(0.5)
        .mul(255)
        .clamp(0, 255)
    )
    assert psnr(rgb.round().byte().numpy(), picture) > 30  # chroma has a quarter of its samples


def test_planes_and_tags_survive_pyav() -> None:
    (source,) = av_frames(pan(1, (161, 97)))
    frame = frames.from_av(source)
    colour = Colour("bt2020", True, 9, 16, 9)
    made = frames.to_av(frame, colour)
    assert frames.colour_of(made) == colour
    again = frames.from_av(made)
    assert all(np.array_equal(getattr(frame, p), getattr(again, p)) for p in "yuv")


def test_untagged_frames_are_judged_by_their_height() -> None:
    assert frames.colour_of(av.VideoFrame(720, 576, "yuv420p")).matrix == "bt601"
    assert frames.colour_of(av.VideoFrame(1280, 720, "yuv420p")).matrix == "bt709"


def test_planes_of_wrong_shape_are_refused() -> None:
    with pytest.raises(InputError, match="chroma"):
        Frame(np.zeros((5, 5), np.uint8), np.zeros((2, 2), np.uint8), np.zeros((3, 3), np.uint8))


# Packets ----------------------------------------------------------------------------------------------------------


@given(
    number=st.integers(0, 2**40),
    pts=st.integers(-(2**62), 2**62),
    duration=st.integers(0, 2**40),
    last=st.booleans(),
    matrix=st.none() | st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 9),
    payload=st.binary(max_size=50),
    key=st.booleans(),
)
def test_packets_come_back(
    number: int, pts: int, duration: int, last: bool, matrix: tuple[int, ...] | None, payload: bytes, key: bool
) -> None:
    format = VideoFormat(161, 97, Colour("bt2020", True, 9, 16, 9), 371, 1, b"12345678", 7, b"abcdefgh")
    config = StreamConfig(format, Fraction(1001, 30000), Fraction(16, 15), matrix)
    packet = FramePacket(number, pts, duration, last, config if key else None, payload)
    assert FramePacket.unpack(packet.pack()) == packet


def test_a_frame_carries_14_bytes_beside_its_payload_at_most(packets: list[Packet]) -> None:
    for packet in packets:
        fields = FramePacket.unpack(packet.data)
        if not fields.key:
            assert len(packet.data) - len(fields.payload) <= 14


def test_every_flipped_byte_and_every_cut_is_noticed(packets: list[Packet]) -> None:
    data = packets[0].data
    for place in (*range(120), *range(120, len(data), 37)):
        with pytest.raises(ChecksumError):
            FramePacket.unpack(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises((ChecksumError, TruncatedError)):
            FramePacket.unpack(data[:place])


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def test_impossible_fields_are_refused(packets: list[Packet]) -> None:
    config = config_of(packets)
    format = config.format

    def unpack(config: StreamConfig) -> None:
        FramePacket.unpack(FramePacket(0, 0, 1, False, config, b"").pack())

    with pytest.raises(FormatError, match="impossible"):
        unpack(replace(config, format=replace(format, width=0)))
    with pytest.raises(LimitError, match="max_pixels"):
        unpack(replace(config, format=replace(format, width=1 << 19, height=1 << 19)))
    with pytest.raises(FormatError, match="range"):
        unpack(replace(config, format=replace(format, quality=1001)))
    with pytest.raises(FormatError, match="newer"):
        FramePacket.unpack(with_crc(b"\x20\0\0\0\0"))
    with pytest.raises(FormatError, match="number"):
        FramePacket.unpack(with_crc(b"\x10" + b"\xff" * 12))


def test_other_weights_are_named(packets: list[Packet]) -> None:
    fields = FramePacket.unpack(packets[0].data)
    assert fields.config is not None
    config = replace(fields.config, format=replace(fields.config.format, intra_weights=b"\1" * 8))
    with pytest.raises(ModelNotFoundError, match="0101010101010101"):
        VideoDecoder([replace(fields, config=config, last=True).pack()], device="cpu")[0]


# Encoding and decoding --------------------------------------------------------------------------------------------


def test_frames_come_back_in_time(pictures: list[av.VideoFrame], packets: list[Packet]) -> None:
    assert [p.is_keyframe for p in packets] == [i % KEYINT == 0 for i in range(14)]
    decoded = list(VideoDecoder(packets, device="cpu"))
    assert [(f.pts, f.time_base, f.duration) for f in decoded] == [(i * 512, BASE, 512) for i in range(14)]
    for source, frame in zip(pictures, decoded, strict=True):
        assert psnr(source.to_ndarray()[:96], frame.to_ndarray()[:96]) > 30
        assert frame.colorspace == source.colorspace


def test_times_may_vary_and_be_negative() -> None:
    times = [-300, 0, 17, 4000, 4001, 90000]
    encoder = VideoEncoder(48, 32, time_base=BASE, quality=20, keyint=4, device="cpu")
    packets = run(encoder, av_frames(pan(6, (48, 32)), times=times))
    shown = list(VideoDecoder(packets, device="cpu").frames())
    assert [s.pts for s in shown] == times
    # A frame lasts until the next; the last one as long as the one before it.
    assert [s.duration for s in shown] == [300, 17, 3983, 1, 85999, 85999]


@pytest.mark.parametrize("size", [(161, 97), (17, 1), (1, 18), (16, 16)])
def test_odd_and_tiny_sizes(size: tuple[int, int]) -> None:
    source = list(av_frames(pan(3, size)))
    encoder = VideoEncoder(*size, time_base=BASE, quality=70, device="cpu")
    decoder = VideoDecoder(run(encoder, iter(source)), device="cpu")
    assert decoder[:].shape == (3, 3, size[1], size[0])
    for before, after in zip(source, decoder.frames(), strict=True):
        assert psnr(frames.from_av(before).y, after.frame.y) > 25


def test_planes_without_times_count_up() -> None:
    encoder = VideoEncoder(32, 32, time_base=Fraction(1, 30), device="cpu", colour=Colour("bt601", True, 1, 1, 6))
    gray = frames.gray(32, 32)
    packets = [p for f in (gray, gray, gray, None) for p in encoder.encode(f)]
    assert [(p.pts, p.duration) for p in packets] == [(0, 1), (1, 1), (2, 1)]
    assert config_of(packets).format.colour == Colour("bt601", True, 1, 1, 6)


def test_the_quality_sets_the_rate(pictures: list[av.VideoFrame]) -> None:
    sizes = []
    for quality in (10, 40, 80):
        encoder = VideoEncoder(160, 96, time_base=BASE, quality=quality, device="cpu")
        sizes.append(sum(len(p.data) for p in run(encoder, iter(pictures[:3]))))
    assert sizes[0] < 0.6 * sizes[1] < 0.36 * sizes[2]


def test_processes_give_the_same_bytes(pictures: list[av.VideoFrame], packets: list[Packet]) -> None:
    with VideoEncoder(160, 96, time_base=BASE, quality=50, keyint=KEYINT, device="cpu", jobs=2) as encoder:
        assert run(encoder, iter(pictures)) == packets


def test_bad_arguments_and_frames_are_refused(pictures: list[av.VideoFrame]) -> None:
    for wrong in ({"quality": 101}, {"keyint": 0}, {"keyint": 513}, {"jobs": 0}, {"time_base": 0 * BASE}):
        with pytest.raises(InputError):
            VideoEncoder(160, 96, **{"time_base": BASE, **wrong})
    with pytest.raises(TargetError):
        VideoEncoder(160, 96, time_base=BASE, target_bitrate=-1)
    encoder = VideoEncoder(80, 96, time_base=BASE, device="cpu")
    with pytest.raises(InputError, match="one size"):
        encoder.encode(pictures[0])
    encoder = VideoEncoder(160, 96, time_base=BASE, device="cpu")
    encoder.encode(pictures[1])
    with pytest.raises(InputError, match="grow"):
        encoder.encode(pictures[0])
    with pytest.raises(InputError, match="ended"):
        encoder.encode(None)


# Scene cuts -------------------------------------------------------------------------------------------------------


def test_a_scene_cut_starts_a_group() -> None:
    scenes = [*pan(7), *pan(6, sample="coffee.png")]
    encoder = VideoEncoder(160, 96, time_base=BASE, quality=10, device="cpu")
    keys = [i for i, p in enumerate(run(encoder, av_frames(scenes))) if p.is_keyframe]
    assert keys == [0, 7]
    encoder = VideoEncoder(160, 96, time_base=BASE, quality=10, device="cpu", scene_cuts=False)
    assert sum(p.is_keyframe for p in run(encoder, av_frames(scenes))) == 1


def test_motion_flicker_and_noise_are_no_cuts() -> None:
    detector = SceneCuts()
    rng = np.random.default_rng(0)
    for i, picture in enumerate(pan(30)):
        noisy = np.clip(picture * (1 + 0.08 * (i % 2)) + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        (frame,) = av_frames([np.roll(noisy, 3 * i, 1)])
        assert not detector.is_cut(frames.from_av(frame))


# Random access ----------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by an entry for each frame that is decoded: whether it was a key frame."""
    seen: list[bool] = []
    original = GopDecoder.decode

    def decode(self: GopDecoder, payload: bytes, *, key: bool) -> Frame:
        seen.append(key)
        return original(self, payload, key=key)

    monkeypatch.setattr(GopDecoder, "decode", decode)
    return seen


def test_random_access_decodes_one_group(raw: bytes, clean: list[Shown], decoded: list[bool]) -> None:
    decoder = VideoDecoder(raw, device="cpu")
    assert len(decoder) == 14
    assert not decoded
    assert torch.equal(decoder[7], decoder.as_rgb(clean[7]))
    assert decoded == [True, False, False]
    assert torch.equal(decoder[8], decoder.as_rgb(clean[8]))
    assert len(decoded) == 4
    assert torch.equal(decoder[-14], decoder.as_rgb(clean[0]))
    assert len(decoded) == 5
    assert torch.equal(decoder[8], decoder.as_rgb(clean[8]))
    with pytest.raises(IndexError):
        decoder[14]


def test_slices_and_times(raw: bytes, clean: list[Shown], decoded: list[bool]) -> None:
    decoder = VideoDecoder(raw, device="cpu")
    expected = torch.stack([decoder.as_rgb(s) for s in clean])
    assert torch.equal(decoder[12:3:-4], expected[[12, 8, 4]])
    assert decoder[3:3].shape == (0, 3, 96, 160)
    decoded.clear()
    batch = decoder.get_frames_played_at(seconds=[0.3, 0.0, 0.28, 0.559])
    assert len(decoded) <= 3 + 1 + 4
    assert torch.equal(batch.data, expected[[7, 0, 7, 13]])
    assert batch.pts_seconds.tolist() == pytest.approx([0.28, 0, 0.28, 0.52])
    assert batch.duration_seconds.tolist() == pytest.approx([0.04] * 4)
    for outside in (-0.001, 0.56):
        with pytest.raises(InputError, match="no frame plays"):
            decoder.get_frames_played_at(seconds=[outside])


# Loss and damage --------------------------------------------------------------------------------------------------


def partial(packets: list[Packet] | list[bytes]) -> tuple[list[Shown], VideoDecoder]:
    decoder = VideoDecoder(packets, device="cpu", allow_partial=True)
    return list(decoder.frames()), decoder


def same(a: Frame, b: Frame) -> bool:
    return all(np.array_equal(getattr(a, p), getattr(b, p)) for p in "yuv")


@pytest.mark.parametrize("lost", [6, 9, 13])
@pytest.mark.parametrize("how", ["absent", "flipped"])
def test_a_lost_packet_costs_the_rest_of_its_group(
    packets: list[Packet], clean: list[Shown], lost: int, how: str
) -> None:
    data = [p.data for p in packets]
    if how == "absent":
        del data[lost]
    else:
        data[lost] = data[lost][:40] + bytes([data[lost][40] ^ 1]) + data[lost][41:]
    with pytest.raises(FormatError, match="allow_partial"):
        list(VideoDecoder(data, device="cpu"))
    shown, decoder = partial(data)
    gone = set(range(lost, min(-(-(lost + 1) // KEYINT) * KEYINT, 14)))
    if (how, lost) == ("absent", 13):
        # Nothing behind it tells of its number, only that the stream is not at its end.
        assert len(shown) == 13
        assert isinstance(decoder.damage.errors[-1], TruncatedError)
        return
    assert [s.pts for s in shown] == [s.pts for s in clean]
    assert [s.duration for s in shown] == [s.duration for s in clean]
    assert decoder.damage.frames == sorted(gone)
    for before, after in zip(clean, shown, strict=True):
        assert after.concealed == (after.number in gone)
        if after.concealed:
            assert psnr(after.frame.y, before.frame.y) > 15
        else:
            assert same(after.frame, before.frame)


def test_a_lost_key_packet_is_concealed_from_the_group_before(packets: list[Packet], clean: list[Shown]) -> None:
    shown, decoder = partial([p for i, p in enumerate(packets) if i != 5])
    assert decoder.damage.frames == [5, 6, 7, 8, 9]
    assert all(psnr(a.frame.y, b.frame.y) > 15 for a, b in zip(shown[5:10], clean[5:10], strict=True))
    assert same(shown[10].frame, clean[10].frame)
    assert torch.equal(decoder[8], decoder.as_rgb(shown[8]))


@pytest.mark.parametrize("flip", [False, True])
def test_a_lost_beginning_is_gray(packets: list[Packet], clean: list[Shown], flip: bool) -> None:
    data = [p.data for p in packets]
    data[:1] = [b"\x10" + data[0][1:]] if flip else []
    shown, decoder = partial(data)
    assert decoder.damage.frames == [0, 1, 2, 3, 4]
    assert [s.pts for s in shown] == [s.pts for s in clean]
    assert (shown[0].frame.y == 128).all()
    assert same(shown[5].frame, clean[5].frame)
    assert torch.equal(decoder[2], decoder.as_rgb(shown[0]))


def test_without_any_key_packet_nothing_can_be_read(packets: list[Packet]) -> None:
    for data in ([], [p.data for p in packets if not p.is_keyframe]):
        with pytest.raises(FormatError, match="no frame can be read"):
            partial(data)


def test_an_endless_gap_is_refused(packets: list[Packet]) -> None:
    fields = FramePacket.unpack(packets[5].data)
    for before in packets[:2]:
        with pytest.raises(FormatError, match="in a row"):
            partial([before.data, replace(fields, number=1 << 40).pack()])


def test_symbols_of_another_frame_are_noticed(packets: list[Packet]) -> None:
    """An intact packet whose content is not what the model makes of it."""
    fields = [FramePacket.unpack(p.data) for p in packets]
    payload = bytearray(fields[6].payload)
    payload[20] ^= 255
    data = [p.data for p in packets]
    data[6] = replace(fields[6], payload=bytes(payload)).pack()
    with pytest.raises(CalotypeError):
        list(VideoDecoder(data, device="cpu"))
    assert partial(data)[1].damage.frames == [6, 7, 8, 9]


# Raw streams ------------------------------------------------------------------------------------------------------


def test_a_raw_stream_holds_the_packets(raw: bytes, packets: list[Packet]) -> None:
    assert [data for _, data in StreamReader(raw).packets()] == [p.data for p in packets]
    places = [place for place, _ in StreamReader(raw).packets()]
    assert [next(StreamReader(raw).packets(place))[1] for place in places] == [p.data for p in packets]


class Pipe(io.RawIOBase):
    """A file that cannot seek and gives little at a time."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, count: int = -1) -> bytes:
        return self._file.read(min(count, 1000))


def test_a_pipe_is_read_as_it_comes(raw: bytes, clean: list[Shown]) -> None:
    shown = list(VideoDecoder(Pipe(raw), device="cpu").frames())
    assert len(shown) == len(clean)
    assert same(shown[-1].frame, clean[-1].frame)


def entries_of(data: bytes, errors: list[FormatError]) -> list[int]:
    found = timeline(StreamReader(data), None, errors.append, 1 << 20)
    return [e.number for e in found if e.packet]


def test_a_stream_cut_at_any_byte_gives_its_intact_part(raw: bytes) -> None:
    ends = [place for place, _ in StreamReader(raw).packets()][1:]
    ends.append(len(raw) - 16)
    first = ends[0]
    for cut in (*range(first + 40), *range(first + 40, len(raw), 61), *range(len(raw) - 20, len(raw))):
        errors: list[FormatError] = []
        whole = sum(cut >= end for end in ends)
        if whole == 0:
            with pytest.raises(FormatError):
                entries_of(raw[:cut], errors)
        else:
            assert entries_of(raw[:cut], errors) == list(range(whole))
            assert isinstance(errors[-1], TruncatedError)
    with pytest.raises(TruncatedError):
        list(VideoDecoder(raw[: ends[4] + 10], device="cpu"))


@pytest.mark.parametrize("offset", [0, 3, 5, 9, 30])
def test_a_damaged_chunk_costs_only_itself(raw: bytes, offset: int) -> None:
    place = [place for place, _ in StreamReader(raw).packets()][7]
    damaged = bytearray(raw)
    damaged[place + offset] ^= 0x41
    errors: list[FormatError] = []
    # The name alone (offset 5) is no loss: what the chunk holds is intact.
    assert entries_of(bytes(damaged), errors) == [n for n in range(14) if n != 7 or offset == 5]
    assert bool(errors) == (offset != 5)


def test_unknown_chunks(raw: bytes) -> None:
    from calotype.container import pack_chunk

    place = [place for place, _ in StreamReader(raw).packets()][3]
    assert len(entries_of(raw[:place] + pack_chunk(b"noTe", b"hello") + raw[place:], [])) == 14
    with pytest.raises(FormatError, match="newer"):
        entries_of(raw[:place] + pack_chunk(b"NOTE", b"hello") + raw[place:], [])


def test_other_files_are_no_streams() -> None:
    for data in (b"", b"\x89CLT\r\n\x1a\n", b"RIFF0000WEBP", bytes(100)):
        with pytest.raises(FormatError):
            list(StreamReader(data).packets())


# Bitrate ----------------------------------------------------------------------------------------------------------


def test_a_target_bitrate_is_met() -> None:
    pixels = [*pan(20, (96, 64)), *pan(20, (96, 64), sample="coffee.png")]
    target = 80_000
    encoder = VideoEncoder(96, 64, time_base=BASE, keyint=5, target_bitrate=target, device="cpu")
    packets = run(encoder, av_frames(pixels))
    rate = sum(len(p.data) for p in packets) * 8 / (len(packets) * 0.04)
    assert rate == pytest.approx(target, rel=0.05)


def test_a_bitrate_below_the_lowest_quality_is_refused() -> None:
    encoder = VideoEncoder(96, 64, time_base=BASE, keyint=8, target_bitrate=1000, device="cpu")
    with pytest.raises(TargetError, match="out of reach"):
        run(encoder, av_frames(pan(8, (96, 64))))


@given(
    factors=st.lists(st.floats(0.2, 5), min_size=12, max_size=40),
    slope=st.floats(0.002, 0.006),
    target=st.floats(2e5, 2e6),
)
def test_budgets_end_at_the_rate(factors: list[float], slope: float, target: float) -> None:
    """Groups of very different difficulty, over a whole range of models of the rate."""
    control = BitrateControl(target)
    pending: list[tuple[int, int]] = []
    for factor in factors:
        if len(pending) == DELAY:
            control.settle(*pending.pop(0))
        budget = control.budget(1.0)
        quality, size, _ = bitrate.meet(budget, lambda q, f=factor: (round(3000 * f * np.exp(slope * q)), None))
        pending.append((size, quality))
    for size, quality in pending:
        control.settle(size, quality)
    reachable = all(3000 * f < target / 8 < 3000 * f * np.exp(1000 * slope) for f in factors)
    if reachable:
        assert abs(control.deviation) < 0.05


def test_budgets_do_not_depend_on_how_many_groups_run() -> None:
    def budgets(delay: int) -> list[Budget]:
        control = BitrateControl(1e6)
        made: list[Budget] = []
        pending: list[tuple[int, int]] = []
        for n in range(20):
            while len(pending) >= delay:
                control.settle(*pending.pop(0))
            made.append(control.budget(1.0))
            pending.append((100_000 + 5000 * (n % 7), 300 + n))
        return made

    assert budgets(1) == budgets(2) == budgets(DELAY)
    assert len({b.size for b in budgets(1)}) > 1
    assert all(a.guess <= b.guess for a, b in pairwise(budgets(1)[DELAY:]))


# Imports ----------------------------------------------------------------------------------------------------------


def test_looking_at_a_video_needs_no_torch() -> None:
    code = "import sys, calotype.video.info, calotype.video.timeline, calotype.cli.video; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"False"
