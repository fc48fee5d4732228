"""What is done with each file of a batch, wherever it is done: by this process or by a worker on another machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calotype.errors import CalotypeError, VerifyError
from calotype.limits import DEFAULT_MAX_PIXELS
from calotype.media import read_picture
from calotype.rate import Target

if TYPE_CHECKING:
    from calotype.api import Codec, Encoded, Progress
    from calotype.tokens import Tokens


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded file and the size of its picture in pixels."""

    width: int
    height: int
    encoded: Encoded


@dataclass(frozen=True)
class EncodeJob:
    """How files are encoded; the fields are those of `Codec.load`, `Codec.encode` and `read_picture`.

    With `verify` a file is decoded again and checked.
    """

    model: str
    quality: float
    target: Target | None
    tile: int
    metadata: tuple[str, ...]
    verify: bool
    max_pixels: int = DEFAULT_MAX_PIXELS
    effort: int = 5
    packets: int = 1

    def run(self, codec: Codec, source: Path | bytes, progress: Progress | None = None) -> EncodedPicture:
        """Encode the picture in `source` with the codec of `model`.

        Raises:
            InputError, LimitError, TargetError; VerifyError if the result does not decode, whatever goes wrong.
        """
        picture = read_picture(source, max_pixels=self.max_pixels)
        encoded = codec.encode(
            picture,
            quality=self.quality,
            target=self.target,
            tile=self.tile,
            effort=self.effort,
            metadata=self.metadata,
            packets=self.packets,
            progress=progress,
        )
        return self._checked(codec, EncodedPicture(picture.width, picture.height, encoded))

    def run_tokens(self, codec: Codec, tokens: Tokens) -> EncodedPicture:
        """Encode tokens, which have their own quality and no metadata. Raises as `Codec.encode_tokens`, VerifyError."""
        from calotype.api import Encoded

        data = codec.encode_tokens(tokens, tile=self.tile, packets=self.packets)
        encoded = Encoded(data, tokens.quality, len(data) * 8 / (tokens.width * tokens.height), None, {})
        return self._checked(codec, EncodedPicture(tokens.width, tokens.height, encoded))

    def _checked(self, codec: Codec, made: EncodedPicture) -> EncodedPicture:
        if self.verify:
            _verify(codec, made.encoded.data)
        return made


def _verify(codec: Codec, data: bytes) -> None:
    try:
        codec.verify(data, deep=True)
    except VerifyError:
        raise
    except CalotypeError as error:
        raise VerifyError(f"the encoded file does not decode, nothing was written: {error}") from error
