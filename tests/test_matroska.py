"""Calotype videos in Matroska: the codec's id, packets, seeking, what lies beside the video, damage."""

from __future__ import annotations

import re
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from video_clips import make_clip, packets, pan

from calotype import VideoDecoder, VideoEncoder
from calotype.errors import CalotypeError, FormatError, InputError, TruncatedError
from calotype.video import matroska, tracks
from calotype.video.matroska import MatroskaReader, MatroskaWriter
from calotype.video.packet import FramePacket, Packet
from calotype.video.timeline import timeline
from calotype.video.tracks import Attachment, Surroundings
from calotype.video.transcode import Settings, encode_video

SIZE = (96, 64)
BASE = Fraction(1, 12800)


@pytest.fixture(scope="module")
def encoded() -> tuple[VideoEncoder, list[Packet]]:
    """12 frames in groups of 4, the first before time 0."""
    encoder = VideoEncoder(*SIZE, time_base=BASE, quality=40, keyint=4, device="cpu", display_matrix=ROTATED)
    out = []
    for i, picture in enumerate(pan(12, SIZE)):
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        frame.pts, frame.time_base = 512 * i - 512, BASE
        out += encoder.encode(frame)
    return encoder, out + encoder.encode(None)


ROTATED = (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30)


def write(path: Path, encoded: tuple[VideoEncoder, list[Packet]], around: Surroundings = Surroundings()) -> Path:
    encoder, out = encoded
    assert encoder.config is not None
    writer = MatroskaWriter(path, encoder.config, Fraction(25), around)
    for packet in out:
        writer.write(packet)
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, encoded: tuple[VideoEncoder, list[Packet]]) -> Path:
    return write(tmp_path_factory.mktemp("matroska") / "a.mkv", encoded)


def test_the_track_has_our_codec_id_and_our_packets(file: Path, encoded: tuple[VideoEncoder, list[Packet]]) -> None:
    data = file.read_bytes()
    assert data.count(b"V_CLT1") == 1
    assert b"V_SNOW" not in data
    with av.open(str(file)) as container:
        (stream,) = container.streams
        assert stream.type == "video"
        assert stream.codec_context is None
        found = [p for p in container.demux(stream) if p.size]
    assert [bytes(p) for p in found] == [p.data for p in encoded[1]]
    assert [p.is_keyframe for p in found] == [p.is_keyframe for p in encoded[1]]
    assert [p.pts * p.time_base for p in found] == [p.pts * BASE for p in encoded[1]]


def test_a_title_with_the_stand_ins_id_stays(tmp_path: Path, encoded: tuple[VideoEncoder, list[Packet]]) -> None:
    path = write(tmp_path / "a.mkv", encoded, Surroundings(metadata={"title": "V_SNOW and V_CLT1"}))
    with av.open(str(path)) as container:
        assert container.metadata["title"] == "V_SNOW and V_CLT1"
    assert len(VideoDecoder(path, device="cpu")) == 12


def test_the_same_input_gives_the_same_file(
    tmp_path: Path, file: Path, encoded: tuple[VideoEncoder, list[Packet]]
) -> None:
    assert write(tmp_path / "b.mkv", encoded).read_bytes() == file.read_bytes()


def test_other_matroska_files_are_not_taken_for_ours(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "x.mkv", pan(2, SIZE), metadata={"title": "V_CLT1"})
    assert not matroska.is_matroska(path.read_bytes())
    with pytest.raises(FormatError, match="no Calotype video track"):
        list(MatroskaReader(path).packets())
    with pytest.raises(FormatError):
        VideoDecoder(path, device="cpu")[0]
    with pytest.raises(InputError):
        VideoDecoder(tmp_path / "absent.mkv", device="cpu")


def test_seeking_reads_one_group(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = VideoDecoder(file, device="cpu")
    whole = [shown.frame.y.copy() for shown in decoder.frames()]
    assert len(decoder) == 12
    read: list[int] = []
    original = FramePacket.unpack.__func__  # type: ignore[attr-defined]

    def unpack(data: bytes, *args: Any) -> FramePacket:
        fields: FramePacket = original(FramePacket, data, *args)
        read.append(fields.number)
        return fields

    monkeypatch.setattr(FramePacket, "unpack", unpack)
    assert (decoder.frame_at(9).frame.y == whole[9]).all()
    assert read == [8, 9]


def test_what_lies_beside_is_kept(tmp_path: Path) -> None:
    """Sound, subtitles, an attachment, chapters, tags and language, from Matroska to Matroska."""
    subtitles = tmp_path / "s.srt"
    subtitles.write_text("1\n00:00:00,100 --> 00:00:00,300\nA photograph\n\n", encoding="utf-8")
    chapters = [
        {"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}},
        {"id": 2, "start": 200, "end": 480, "time_base": Fraction(1, 1000), "metadata": {"title": "Two"}},
    ]
    source = make_clip(
        tmp_path / "in.mkv", pan(12, SIZE), audio="libopus", subtitles=subtitles, chapters=chapters,
        metadata={"title": "A pan", "artist": "nobody"}, attachment=b"hello" * 1000,
    )  # fmt: skip
    notes: list[str] = []
    out = tmp_path / "out.mkv"
    encode_video(source, out, Settings(quality=20), device="cpu", warn=notes.append)
    assert not notes
    assert packets(out, "audio") == packets(source, "audio")
    assert packets(out, "subtitle") == packets(source, "subtitle")
    with av.open(str(out)) as container:
        assert [s.type for s in container.streams] == ["video", "audio", "subtitle", "attachment"]
        assert container.metadata["title"] == "A pan"
        assert container.metadata["ARTIST"] == "nobody"
        assert container.streams.audio[0].metadata["language"] == "eng"
        attachment: Any = container.streams[3]
        assert bytes(attachment.data) == b"hello" * 1000
        assert attachment.metadata["filename"] == "notes.txt"
        found = [(c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]) for c in container.chapters()]
    assert found == [
        (0, Fraction(1, 5), {"title": "One"}),
        (Fraction(1, 5), Fraction(12, 25), {"title": "Two"}),
    ]


def test_tracks_that_matroska_cannot_hold_are_named(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    subtitles = tmp_path / "s.srt"
    subtitles.write_text("1\n00:00:00,000 --> 00:00:01,000\nText\n\n", encoding="utf-8")
    clip = make_clip(tmp_path / "clip.mp4", pan(3, SIZE), audio="aac")
    source = tmp_path / "in.mp4"
    command = [ffmpeg, "-v", "error", "-i", clip, "-i", subtitles, "-map", "0", "-map", "1", "-c", "copy"]
    subprocess.run([*command, "-c:s", "mov_text", source], check=True)
    notes: list[str] = []
    encode_video(source, tmp_path / "out.mkv", Settings(quality=20), device="cpu", warn=notes.append)
    assert notes == ["subtitle track 2 (mov_text) is left out: Matroska cannot hold it"]
    assert packets(tmp_path / "out.mkv", "audio") == packets(source, "audio")


def test_attachments_survive_by_name(tmp_path: Path, encoded: tuple[VideoEncoder, list[Packet]]) -> None:
    path = write(
        tmp_path / "a.mkv", encoded, Surroundings(attachments=[Attachment("a.ttf", "font/ttf", bytes(range(256)))])
    )
    with MatroskaReader(path).open() as (container, video):
        found = tracks.surroundings(container, video, format="matroska")
    assert list(found.attachments) == [Attachment("a.ttf", "font/ttf", bytes(range(256)))]


def test_ffmpeg_sees_size_rate_turn_and_duration(file: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    text = subprocess.run([ffmpeg, "-hide_banner", "-i", str(file)], capture_output=True, text=True).stderr
    assert re.search(r"Video: none.*96x64.*25 fps", text)
    assert "rotation of" in text
    duration = re.search(r"Duration: 00:00:00.(\d\d), start: -0.040000", text)
    assert duration is not None
    with av.open(str(file)) as container:
        assert container.duration is not None
        assert int(duration[1]) == container.duration // 10_000


# Damage -----------------------------------------------------------------------------------------------------------


def entries(data: bytes, errors: list[FormatError]) -> list[int]:
    return [e.number for e in timeline(MatroskaReader(data), None, errors.append, 1 << 20) if e.packet]


def test_a_file_cut_at_any_byte_gives_its_intact_part(file: Path) -> None:
    data = file.read_bytes()
    best = 0
    for cut in (*range(0, 700, 23), *range(700, len(data), 151), len(data)):
        errors: list[FormatError] = []
        try:
            found = entries(data[:cut], errors)
        except FormatError:
            assert best == 0
            continue
        assert found == list(range(len(found)))
        assert len(found) >= best
        best = len(found)
        if best < 12:
            assert errors
    assert best == 12


def test_the_end_that_is_missing_is_reported(file: Path) -> None:
    data = file.read_bytes()
    with pytest.raises(TruncatedError, match="ends early"):
        list(VideoDecoder(data[: len(data) * 3 // 4], device="cpu").frames())
    decoder = VideoDecoder(data[: len(data) * 3 // 4], device="cpu", allow_partial=True)
    assert 5 <= len(list(decoder.frames())) <= 9
    assert isinstance(decoder.damage.errors[-1], TruncatedError)


def test_a_hole_costs_one_group(file: Path, encoded: tuple[VideoEncoder, list[Packet]]) -> None:
    data = bytearray(file.read_bytes())
    packet = encoded[1][5].data
    place = data.index(packet)
    data[place + 10 : place + len(packet)] = bytes(len(packet) - 10)
    decoder = VideoDecoder(bytes(data), device="cpu", allow_partial=True)
    shown = list(decoder.frames())
    assert [s.number for s in shown] == list(range(12))
    assert decoder.damage.frames == [5, 6, 7]
    with pytest.raises(CalotypeError, match="allow_partial"):
        list(VideoDecoder(bytes(data), device="cpu").frames())


def test_flipped_bytes_never_crash(file: Path) -> None:
    data = file.read_bytes()
    for place in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        errors: list[FormatError] = []
        try:
            found = entries(bytes(damaged), errors)
        except CalotypeError:
            continue
        assert found == sorted(set(found))
        # Nothing that is wrong passes for a frame: what is given is what was written.
        assert errors or found == list(range(12))


def test_matroska_needs_a_folder_that_can_be_written(tmp_path: Path, encoded: Any) -> None:
    with pytest.raises(InputError, match="nowhere"):
        write(tmp_path / "nowhere" / "a.mkv", encoded)


def test_reading_bytes_equals_reading_the_file(file: Path) -> None:
    assert list(MatroskaReader(file).packets()) == list(MatroskaReader(file.read_bytes()).packets())
