"""Calotype: a neural codec of pictures and video. `import calotype` is light; the networks load on first use."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from calotype.errors import CalotypeError

if TYPE_CHECKING:
    from calotype.api import Codec, Decoded, Encoded, decode, encode
    from calotype.container import ImageInfo, probe
    from calotype.media import Picture, read_picture, write_picture
    from calotype.rate import Target
    from calotype.tokens import Tokens
    from calotype.video.decoder import FrameBatch, VideoDecoder
    from calotype.video.encoder import VideoEncoder
    from calotype.video.info import VideoInfo, probe_video
    from calotype.video.packet import Packet

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
    "Tokens",
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
    "Tokens": "tokens",
    "Packet": "video.packet", "FrameBatch": "video.decoder", "VideoDecoder": "video.decoder",
    "VideoEncoder": "video.encoder", "VideoInfo": "video.info", "probe_video": "video.info",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calotype' has no attribute {name!r}")
    return getattr(import_module(f"calotype.{_HOMES[name]}"), name)
