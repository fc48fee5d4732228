"""Calotype: a neural image codec. `import calotype` is light; the networks load on first use."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from calotype.errors import CalotypeError

if TYPE_CHECKING:
    from calotype.api import Codec, Decoded, Encoded, decode, encode
    from calotype.container import ImageInfo, probe
    from calotype.media import Picture, read_picture, write_picture
    from calotype.packet import Packet
    from calotype.rate import Target
    from calotype.video import FrameBatch, VideoDecoder, VideoEncoder
    from calotype.video_info import VideoInfo, probe_video

__version__ = version("calotype")
__all__ = [
    "CalotypeError",
    "Codec",
    "Decoded",
    "Encoded",
    "FrameBatch",
    "ImageInfo",
    "Packet",
    "Picture",
    "Target",
    "VideoDecoder",
    "VideoEncoder",
    "VideoInfo",
    "decode",
    "encode",
    "probe",
    "probe_video",
    "read_picture",
    "write_picture",
]

_HOMES = {
    "Codec": "api", "Decoded": "api", "Encoded": "api", "decode": "api", "encode": "api",
    "ImageInfo": "container", "probe": "container",
    "Picture": "media", "read_picture": "media", "write_picture": "media",
    "Target": "rate",
    "Packet": "packet", "FrameBatch": "video", "VideoDecoder": "video", "VideoEncoder": "video",
    "VideoInfo": "video_info", "probe_video": "video_info",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calotype' has no attribute {name!r}")
    return getattr(import_module(f"calotype.{_HOMES[name]}"), name)
