"""The work folder of a video encoding: its finished groups of pictures, so that an interrupted one can go on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calotype.errors import FormatError, InputError, OutputExistsError
from calotype.media import write_file
from calotype.video.groups import Gop
from calotype.video.packet import FramePacket, Packet
from calotype.video.stream import StreamReader, StreamWriter

SUFFIX = ".parts"
_MANIFEST = "manifest.json"
_SAMPLE = 1 << 20


def fingerprint(source: Path) -> dict[str, Any]:
    """What tells a source file from another or a changed one: its size, and a hash of its beginning and end."""
    digest = hashlib.sha256()
    with source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return {"bytes": size, "sha256": digest.hexdigest()}


class PartStore:
    """Keeps one raw stream a group in a folder beside the output.

    Args:
        target: the output; the folder has its name and `SUFFIX`.
        job: what decides about the bytes of the parts: the source and the settings.
        resume: use the parts that are there; else they are removed.
    Raises:
        InputError if the parts belong to another job or the folder is not writable, OutputExistsError if a folder of
        that name is not ours.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = target.with_name(target.name + SUFFIX)
        self._count = 0
        text = json.dumps(job, indent=2, sort_keys=True)
        manifest = self.folder / _MANIFEST
        if self.folder.exists():
            if not manifest.is_file() and any(self.folder.iterdir()):
                raise OutputExistsError(f"{self.folder} is in the way: it is no work folder of Calotype; move it")
            if resume and manifest.is_file():
                if manifest.read_text(encoding="utf-8") != text:
                    raise InputError(
                        f"{self.folder} was made from another source or with other settings: "
                        "give the same ones, or leave --resume out to start again"
                    )
                return
            shutil.rmtree(self.folder)
        write_file(manifest, text.encode(), overwrite=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.clt"

    def get(self, gop: Gop) -> list[Packet] | None:
        """The packets of a group, if it is here, intact, and has the frames that it should have."""
        try:
            packets = list(self._read(gop.number))
            fields = [FramePacket.unpack(p.data) for p in packets]
        except (FormatError, InputError):
            return None
        wanted = [(gop.first + i, f.pts, f.duration) for i, f in enumerate(gop.frames)]
        if [(f.number, f.pts, f.duration) for f in fields] != wanted or fields[-1].last != gop.last:
            return None
        self._count = max(self._count, gop.number + 1)
        return packets

    def put(self, gop: Gop, packets: list[Packet]) -> None:
        """Keep a finished group."""
        out = io.BytesIO()
        writer = StreamWriter(out)
        for packet in packets:
            writer.write(packet.data)
        writer.close()
        write_file(self._path(gop.number), out.getvalue(), overwrite=True)
        self._count = max(self._count, gop.number + 1)

    def _read(self, number: int) -> Iterator[Packet]:
        time_base = None
        for _, data in StreamReader(self._path(number)).packets():
            fields = FramePacket.unpack(data)
            time_base = fields.config.time_base if fields.config else time_base
            if time_base is None:
                raise FormatError("a part does not begin with a key packet")
            yield Packet(data, fields.pts, fields.duration, fields.key, time_base)

    def packets(self) -> Iterator[Packet]:
        """The packets of all groups in order."""
        for number in range(self._count):
            yield from self._read(number)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
