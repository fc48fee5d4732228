"""Memory over time of `transcode` and `decode` on a long video: it must not grow with the video's length.

    python benchmarks/memory.py --seconds 600 --plot memory.png

The camera wanders over a sample. Both commands run as processes of their own, whose resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SAMPLE = Path(__file__).parent.parent / "samples" / "astronaut.png"
PAUSE = 0.25
"""Seconds between two readings."""
Readings = list[tuple[float, float]]
"""Seconds since the start, MB."""


def make_clip(path: Path, seconds: float, size: tuple[int, int], rate: int) -> int:
    """Write the video; gives the number of frames."""
    picture = np.asarray(Image.open(SAMPLE).convert("RGB"))
    room = np.subtract(picture.shape[:2], size[::-1])
    count = round(seconds * rate)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=Fraction(rate), options={"preset": "veryfast", "crf": "12"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            t = number / rate
            y, x = (int(r * (0.5 + 0.5 * math.sin(f * t))) for r, f in zip(room, (0.11, 0.07), strict=True))
            pixels = np.ascontiguousarray(picture[y : y + size[1], x : x + size[0]])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(stream.encode(None))
    return count


def watch(*arguments: object) -> Readings:
    """Run a command of ours and read its memory until it ends. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "calotype.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    started = time.perf_counter()
    readings: Readings = []
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                readings.append((time.perf_counter() - started, int(line.split()[1]) / 1024))
        time.sleep(PAUSE)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return readings


def at(readings: Readings, part: float) -> float:
    """The median of a tenth of the readings that begins at a part of the time."""
    first = int(part * len(readings))
    return statistics.median(memory for _, memory in readings[first : first + len(readings) // 10 + 1])


def plot(path: Path, runs: dict[str, Readings], title: str) -> None:
    """Draw memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, readings in runs.items():
        axes.plot(*zip(*readings, strict=True), label=name)
    axes.set(xlabel="seconds", ylabel="resident memory, MB", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="length of the video")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--rate", type=int, default=25)
    parser.add_argument("--keyint", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a PNG file")
    options = parser.parse_args()
    size = (options.width, options.height)
    with tempfile.TemporaryDirectory() as place:
        source, encoded = Path(place, "in.mp4"), Path(place, "out.mkv")
        count = make_clip(source, options.seconds, size, options.rate)
        commands = {
            "encode": ("transcode", source, "-o", encoded, "-g", options.keyint, "-j", options.jobs),
            "decode": ("decode", encoded, "--format", "y4m", "-o", "-"),
        }
        runs = {}
        title = f"{count} frames of {size[0]}x{size[1]}, groups of {options.keyint}"
        print(title)
        for name, command in commands.items():
            runs[name] = readings = watch(*command)
            begin, middle, end = at(readings, 0.1), at(readings, 0.45), at(readings, 0.9)
            print(f"{name}: {begin:.1f} MB at the start, {middle:.1f} in the middle, {end:.1f} at the end "
                  f"({end / begin - 1:+.1%}); most {max(m for _, m in readings):.1f}; "
                  f"{count / readings[-1][0]:.1f} frames/s", flush=True)  # fmt: skip
    if options.plot:
        plot(options.plot, runs, title)


if __name__ == "__main__":
    main()
