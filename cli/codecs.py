"""The codecs of one command: loaded when first needed, shared by all of its files."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calotype.api import Codec
    from calotype.models.zoo import Tune


class Codecs:
    """Codecs by model name, on one device and of one tune."""

    def __init__(self, device: str, tune: Tune | None = None) -> None:
        self._device, self._tune = device, tune
        self._loaded: dict[str, Codec] = {}
        self._lock = threading.Lock()

    def named(self, model: str) -> Codec:
        """The codec of `model`. Raises ModelNotFoundError."""
        from calotype.api import Codec

        with self._lock:
            if model not in self._loaded:
                self._loaded[model] = Codec.load(model, device=self._device, tune=self._tune)
            return self._loaded[model]

    def of(self, data: bytes) -> Codec:
        """The codec that wrote the stream `data`. Raises ModelNotFoundError, FormatError."""
        from calotype.api import DEFAULT_MODEL
        from calotype.container import probe

        # With a model that is not installed any codec will do: it says so when it decodes.
        return self.named(probe(data).model or DEFAULT_MODEL)
