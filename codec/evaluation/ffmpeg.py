"""The ffmpeg program of the package imageio-ffmpeg: it carries libvvenc and libvmaf, which most builds lack."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

from calotype.errors import InputError


@functools.cache
def program() -> str | None:
    """Path of the ffmpeg program, or None without the package."""
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        return None


@functools.cache
def version() -> str:
    """For example "n9.0.2"; empty without ffmpeg."""
    path = program()
    if path is None:
        return ""
    text = subprocess.run([path, "-version"], capture_output=True, text=True, check=False).stdout
    match = re.match(r"ffmpeg version (\S+)", text)
    return match.group(1) if match else ""


@functools.cache
def missing(kind: str, name: str) -> str | None:
    """Why an encoder or a filter (`kind` is "encoder" or "filter") cannot be used; None if it can."""
    path = program()
    if path is None:
        return "the package imageio-ffmpeg is not installed (pip install 'calotype[eval]')"
    answer = subprocess.run([path, "-hide_banner", "-h", f"{kind}={name}"], capture_output=True, text=True, check=False)
    if not re.search(rf"^(Encoder|Filter) {re.escape(name)}\b", answer.stdout, re.MULTILINE):
        return f"this ffmpeg was built without {name}"
    return None


def run(arguments: list[str], stdin: bytes | None = None, cwd: Path | None = None) -> bytes:
    """Run ffmpeg; returns its standard output. Raises InputError with its last line if it fails."""
    path = program()
    if path is None:
        raise InputError("ffmpeg is missing: pip install 'calotype[eval]'")
    answer = subprocess.run(
        [path, "-hide_banner", "-nostdin", "-y", "-loglevel", "error", *arguments]
        if stdin is None
        else [path, "-hide_banner", "-y", "-loglevel", "error", *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        check=False,
    )
    if answer.returncode != 0:
        lines = answer.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise InputError(f"ffmpeg failed: {lines[-1]}")
    return answer.stdout
