"""The examples of the documentation, run as they stand in a folder with the samples."""

from __future__ import annotations

import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from conftest import SAMPLES, synthesise

ROOT = SAMPLES.parent
DOCUMENTS = ("README.md", "docs/EMBEDDING.md", "docs/CLUSTER.md", "docs/VIDEO.md")
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[str, int, str]]:
    """(document, line, code) of every block."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        found += [(document, text.count("\n", 0, m.start()) + 2, m[1]) for m in _BLOCK.finditer(text)]
    return found


def test_every_document_has_examples() -> None:
    assert {document for document, _, _ in examples()} == set(DOCUMENTS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with samples/, clip.mp4 and a real ffmpeg."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    shutil.copytree(SAMPLES, tmp_path / "samples")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    with av.open(str(tmp_path / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("libx264", rate=Fraction(25), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(3):
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(synthesise(64, 96, seed=number), format="rgb24")))
        clip.mux(stream.encode(None))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    ("document", "line", "code"), examples(), ids=lambda v: str(v) if not str(v).count("\n") else ""
)
def test_example(place: Path, document: str, line: int, code: str) -> None:
    torch.manual_seed(1)
    if "calotype.cluster" in code:
        pytest.importorskip("ray")  # large, so not in the extra `dev`
    padded = "\n" * (line - 1) + code  # so that a traceback names the line in the document
    exec(compile(padded, str(ROOT / document), "exec"), {"__name__": "__main__"})
