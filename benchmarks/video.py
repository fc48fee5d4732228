"""Frames per second of video encoding and decoding, beside x264 and x265 in the same run.

    python benchmarks/video.py CLIP [--threads 2] [--frames 32] [--quality 45]

The clip is decoded first, so that neither side reads a file. PyAV's encoders run at preset medium, zerolatency, with as
many threads, at a rate that is near ours (they get our bitrate). The median of the rounds is printed; rounds alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from fractions import Fraction
from pathlib import Path

import av
import torch

from calotype.video.frames import Frame, colour_of, from_av, to_av
from calotype.video.gop import GopDecoder, GopEncoder, video_format


def ours(frames: list[Frame], colour: object, quality: int) -> tuple[float, float, int]:
    """Encode and decode seconds, and bytes."""
    format = video_format(frames[0].width, frames[0].height, colour, quality)  # type: ignore[arg-type]
    encoder, decoder = GopEncoder(format, "cpu"), GopDecoder(format, "cpu")
    start = time.perf_counter()
    payloads = [encoder.encode(frame, key=i == 0) for i, frame in enumerate(frames)]
    middle = time.perf_counter()
    for i, payload in enumerate(payloads):
        decoder.decode(payload, key=i == 0)
    return middle - start, time.perf_counter() - middle, sum(map(len, payloads))


def theirs(frames: list[Frame], colour: object, codec: str, rate: int, threads: int) -> tuple[float, float, int]:
    """The same for an encoder of FFmpeg at `rate` bits a second and 25 frames a second."""
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.bit_rate, encoder.gop_size, encoder.thread_count = rate, len(frames), threads
    encoder.options = {"preset": "medium", "tune": "zerolatency"}
    if codec == "libx265":
        encoder.options["x265-params"] = f"log-level=none:pools={threads}"
    pictures = []
    for i, frame in enumerate(frames):
        picture = to_av(frame, colour)  # type: ignore[arg-type]
        picture.pts, picture.time_base = i, Fraction(1, 25)
        pictures.append(picture)
    start = time.perf_counter()
    packets = [p for picture in [*pictures, None] for p in encoder.encode(picture)]
    middle = time.perf_counter()
    decoder = av.CodecContext.create(codec.replace("libx264", "h264").replace("libx265", "hevc"), "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = threads
    count = sum(len(decoder.decode(p)) for p in [*packets, None])
    assert count == len(frames), f"{codec}: {count} of {len(frames)} frames came back"
    return middle - start, time.perf_counter() - middle, sum(p.size for p in packets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--quality", type=int, default=45, help="0 to 100")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with av.open(str(arguments.clip)) as source:
        pictures = [p for p, _ in zip(source.decode(video=0), range(arguments.frames), strict=False)]
    colour = colour_of(pictures[0])
    frames = [from_av(p) for p in pictures]
    ours(frames[:2], colour, 10 * arguments.quality)  # loads the weights
    rounds: dict[str, list[tuple[float, float, int]]] = {}
    for _ in range(arguments.rounds):
        result = ours(frames, colour, 10 * arguments.quality)
        rounds.setdefault("calotype", []).append(result)
        rate = result[2] * 8 * 25 // len(frames)
        for codec in ("libx264", "libx265"):
            rounds.setdefault(codec, []).append(theirs(frames, colour, codec, rate, arguments.threads))
    width, height = frames[0].width, frames[0].height
    print(f"{arguments.clip.name}, {width}x{height}, {len(frames)} frames, {arguments.threads} threads")
    print(f"{'':10} {'encode fps':>11} {'decode fps':>11} {'kbit/s at 25 fps':>17}")
    for name, results in rounds.items():
        encode, decode = (len(frames) / statistics.median(r[k] for r in results) for k in (0, 1))
        print(f"{name:10} {encode:11.1f} {decode:11.1f} {results[0][2] * 8 * 25 / len(frames) / 1000:17.0f}")
    scale = width * height / (352 * 288)
    encode, decode = (scale * len(frames) / statistics.median(r[k] for r in rounds["calotype"]) for k in (0, 1))
    print(f"calotype at CIF's 352x288 pixels a frame: encode {encode:.1f} fps, decode {decode:.1f} fps")


if __name__ == "__main__":
    main()
