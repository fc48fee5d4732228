"""A picture's way through a model of tokens, and tokens as data of their own.

The grids are those of `calotype.picture`: tiles of tokens are coded alone, windows of pixels transformed with a halo.
Each tile consists of packets that are decoded one by one; what is lost with one is restored from the others.
"""

from __future__ import annotations

import functools
import io
import math
import zipfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calotype import symbols, windows
from calotype.entropy import NO_TABLES
from calotype.errors import DriftError, FormatError, InputError, LimitError
from calotype.header import payload_name
from calotype.limits import DEFAULT_MAX_PIXELS, MAX_SIDE
from calotype.models import token_choice
from calotype.models.blocks import bfloat16_is_fast
from calotype.models.tokens import interleave
from calotype.models.vqgan import STRIDE, Vqgan
from calotype.models.zoo import layout
from calotype.picture import DecodeJob
from calotype.stopwatch import Stopwatch
from calotype.windows import Box, Progress, grid

SEARCH_STEPS = {7: 10, 9: 48}
"""Steps of the search for tokens, by effort; at other efforts they are those near to the latent."""
SEARCH_WINDOW = 48
"""Tokens of the side of a window that is searched at once: gradients take some 1.5 kB of memory per pixel."""
CHOICE_WINDOW = 64
"""Tokens of the side of a window that is chosen at once otherwise: those of a tile of the usual size."""
MAX_CODEBOOK = 2**24
"""Numbers in a codebook that is read from a file."""


class TokenCoder:
    """What `PictureCoder` is to latents, for tokens. Holds no state between calls; safe to share between threads."""

    def __init__(self, network: Vqgan, device: torch.device) -> None:
        self.network, self.device, self.layout = network, device, layout(device)

    def codebook(self, quality: int) -> npt.NDArray[np.float32]:
        """The codewords [K, D] at an integer quality."""
        book = self.network.codebook(self.network.ladder_step(quality))
        with torch.inference_mode():
            return book.codewords.float().cpu().numpy()

    # Encoding ---------------------------------------------------------------------------------------------------------

    def encode(
        self,
        pixels: npt.NDArray[np.uint8],
        quality: int,
        tile: int,
        watch: Stopwatch,
        progress: Progress | None = None,
        effort: int = 5,
        packets: int = 1,
    ) -> list[bytes]:
        """Payloads, tile after tile and packet after packet, for pixels [H, W, C]; arguments as in `PictureCoder`."""
        tokens = self.analyse(pixels, quality, watch, windows.part(progress, 0, 0.5), effort)
        return self.write(tokens, quality, tile, packets, watch, windows.part(progress, 0.5, 0.5))

    @torch.inference_mode()
    def analyse(
        self,
        pixels: npt.NDArray[np.uint8],
        quality: int,
        watch: Stopwatch,
        progress: Progress | None = None,
        effort: int = 5,
    ) -> Tensor:
        """Tokens [ceil(H/16), ceil(W/16)] int64, on the CPU, of pixels [H, W, C] at an integer quality.

        Raises InputError at the efforts of `SEARCH_STEPS` if the network that judges pictures is not installed.
        """
        step, weight = self.network.ladder_step(quality), self.network.rate_weight(quality)
        analyse = functools.partial(
            windows.analyse, pixels=pixels, halo=self.network.halo, device=self.device, layout=self.layout, watch=watch
        )
        if effort in SEARCH_STEPS:
            search = functools.partial(self._search, step=step, weight=weight, steps=SEARCH_STEPS[effort])
            (found,) = analyse(search, side=SEARCH_WINDOW, stage="refine", progress=progress)
            return found[0, 0].cpu()
        steps = torch.tensor([step], device=self.device)
        (latent,) = analyse(
            lambda x, _: (self.network.latent(x, steps),), side=windows.WINDOW, progress=windows.part(progress, 0, 0.5)
        )
        tokens = torch.empty(latent.shape[2:], dtype=torch.int64)
        boxes = grid(Box(0, 0, *tokens.shape), CHOICE_WINDOW)
        for count, box in enumerate(boxes, 1):
            with watch("prior"):
                y = latent[(..., *box.slices)].to(self.device)
                tokens[box.slices] = token_choice.choose(self.network, y, step, weight)[0].cpu()
            if progress:
                progress(0.5 + 0.5 * count / len(boxes))
        return tokens

    def _search(self, x: Tensor, progress: Progress | None, *, step: int, weight: float, steps: int) -> tuple[Tensor]:
        """Tokens [1, 1, h, w] of a part [1, 3, H, W] from so many steps."""
        bf16 = self.device.type == "cuda" or bfloat16_is_fast(self.device)
        with torch.inference_mode(False):
            # What was computed in inference mode has no place in a graph: copies have.
            try:
                found = token_choice.search(self.network, x.clone(), step, weight, steps, bf16=bf16, progress=progress)
            except ImportError as error:
                raise InputError(
                    f"the search for tokens needs {error.name}: pip install 'calotype[eval]', or use effort 5"
                ) from error
        return (found[:, None],)

    @torch.inference_mode()
    def write(
        self,
        tokens: Tensor,
        quality: int,
        tile: int,
        packets: int,
        watch: Stopwatch,
        progress: Progress | None = None,
    ) -> list[bytes]:
        """Payloads, tile after tile and packet after packet, of tokens [h, w] in tiles of so many pixels a side."""
        step, payloads = self.network.ladder_step(quality), []
        boxes = grid(Box(0, 0, *tokens.shape), tile // STRIDE)
        for count, box in enumerate(boxes, 1):
            part = tokens[box.slices][None].to(self.device)
            for packet in range(packets):
                coding = self.network.code((1, *box.shape), step, packet, packets, part, device=self.device)
                (payload,), _ = symbols.write(coding, NO_TABLES, 1, watch)
                payloads.append(payload)
            if progress:
                progress(count / len(boxes))
        return payloads

    # Decoding ---------------------------------------------------------------------------------------------------------

    def decode(self, job: DecodeJob, area: Box, scale: int, progress: Progress | None = None) -> npt.NDArray[np.uint8]:
        """Pixels [h, w, 3] uint8 of `area` (pixels of the full picture), made smaller by `scale`.

        Only packets of tiles that the area and its halo touch are asked of `job.payload`.
        """
        canvas = self._canvas(job, area)
        tokens, known = self.read(job, canvas, windows.part(progress, 0, 0.5))
        return self.draw(job, canvas, tokens, known, area, scale, windows.part(progress, 0.5, 0.5))

    def _canvas(self, job: DecodeJob, area: Box) -> Box:
        """The tokens under `area` (pixels), with the halo of the synthesis."""
        return windows.under(area).grown(self.network.halo, *job.latent_shape)

    def tiles_for(self, job: DecodeJob, area: Box) -> set[int]:
        """Numbers of the payloads that decoding `area` (pixels) reads."""
        tiles = [number for number, _ in job.tiles_touching(self._canvas(job, area))]
        return {tile * job.packets + packet for tile in tiles for packet in range(job.packets)}

    @torch.inference_mode()
    def read(self, job: DecodeJob, canvas: Box, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """Tokens int64 and which of them are known, both of the shape of `canvas` (tokens of the full picture)."""
        tokens = torch.zeros(canvas.shape, dtype=torch.int64)
        known = torch.zeros(canvas.shape, dtype=torch.bool)
        tiles = job.tiles_touching(canvas)
        for count, (tile, box) in enumerate(tiles, 1):
            whole, seen = torch.zeros(box.shape, dtype=torch.int64), box.within(canvas)
            intact = torch.zeros(job.packets, dtype=torch.bool)
            for packet in range(job.packets):
                found = self._read_packet(job, tile, packet, box.shape)
                if found is None:
                    job.damaged.append(tile * job.packets + packet)
                else:
                    whole += found  # zero outside of its packet
                    intact[packet] = True
            inner, place = seen.relative_to(box).slices, seen.relative_to(canvas).slices
            tokens[place] = whole[inner]
            known[place] = intact[interleave(*box.shape, job.packets)][inner]
            if progress:
                progress(count / len(tiles))
        return tokens, known

    def _read_packet(self, job: DecodeJob, tile: int, packet: int, shape: tuple[int, int]) -> Tensor | None:
        """Tokens [h, w] of a packet, zero outside of it; None if it is lost."""
        number = tile * job.packets + packet
        payload = job.payload(number)
        if payload is None:
            return None
        step = self.network.ladder_step(job.quality)
        coding = self.network.code((1, *shape), step, packet, job.packets, device=self.device)
        note = job.symbols_seen
        seen = None if note is None else lambda _, run: note(number, run)
        name = payload_name(number, job.packets)
        try:
            found = symbols.read(coding, NO_TABLES, [payload], [name], job.watch, device=self.device, seen=seen)
        except (FormatError, DriftError):
            if not job.allow_partial:
                raise
            return None
        return found[0].cpu()

    @torch.inference_mode()
    def draw(
        self,
        job: DecodeJob,
        canvas: Box,
        tokens: Tensor,
        known: Tensor,
        area: Box,
        scale: int,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Pixels of `area` at 1/scale of tokens that cover `canvas`, those that are not `known` restored first."""
        step = self.network.ladder_step(job.quality)
        with job.watch("restore"):
            codewords = self.network.embed(tokens[None].to(self.device), step, known[None].to(self.device))
        steps = torch.tensor([step], device=self.device)

        def synthesise(place: tuple[slice, slice]) -> Tensor:
            part = codewords[(..., *place)].contiguous(memory_format=self.layout)
            return self.network.synthesise(part, steps, scale)

        return windows.draw(
            synthesise, canvas, area, halo=self.network.halo, scale=scale, watch=job.watch, progress=progress
        )


# Tokens as data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tokens:
    """A picture as a map of numbers of codewords. Raises InputError for fields that do not fit together.

    Attributes:
        indexes: [ceil(height / 16), ceil(width / 16)] int32 in [0, K), one for each 16 x 16 pixels.
        codebook: [K, D] float32, what the indexes stand for.
        quality: 0 to 100, as in a file; it chooses the codebook.
        width, height: of the picture, in pixels.
        channels: 1 for gray, 3 for RGB.
        weights: first 8 bytes of the SHA-256 of the model's weights.
    """

    indexes: npt.NDArray[np.int32]
    codebook: npt.NDArray[np.float32]
    quality: float
    width: int
    height: int
    channels: int
    weights: bytes

    def __post_init__(self) -> None:
        if not (0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE) or self.channels not in (1, 3):
            raise InputError(f"tokens of an impossible picture, {self.width}x{self.height} of {self.channels} channels")
        if not 0 <= self.quality <= 100 or len(self.weights) != 8:
            raise InputError("the quality of tokens must be 0 to 100, and their weights are named by 8 bytes")
        shape = -(-self.height // STRIDE), -(-self.width // STRIDE)
        if self.indexes.shape != shape or self.indexes.dtype != np.int32:
            raise InputError(
                f"tokens of {self.width}x{self.height} pixels must be {list(shape)} int32, "
                f"got {list(self.indexes.shape)} {self.indexes.dtype}"
            )
        if self.codebook.ndim != 2 or self.codebook.dtype != np.float32:
            raise InputError(
                f"a codebook must be [K, D] float32, got {list(self.codebook.shape)} {self.codebook.dtype}"
            )
        if self.indexes.min() < 0 or self.indexes.max() >= len(self.codebook):
            raise InputError(f"tokens must be 0 to {len(self.codebook) - 1}, the numbers of the codewords")

    def embed(self) -> npt.NDArray[np.float32]:
        """The codewords [h, w, D] that the indexes stand for."""
        return self.codebook[self.indexes]

    def to_npz(self) -> bytes:
        """A NumPy archive of the fields, under their names; `weights` are uint8."""
        out = io.BytesIO()
        np.savez_compressed(
            out, indexes=self.indexes, codebook=self.codebook, quality=np.float64(self.quality),
            width=np.int64(self.width), height=np.int64(self.height), channels=np.int64(self.channels),
            weights=np.frombuffer(self.weights, np.uint8),
        )  # fmt: skip
        return out.getvalue()

    @classmethod
    def from_npz(cls, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tokens:
        """Read what `to_npz` wrote. Shapes are checked before memory is allocated; nothing is unpickled.

        Raises InputError for any other content, LimitError for pictures of over `max_pixels`.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                width, height, channels = (
                    int(_array(archive, name, "i", ())) for name in ("width", "height", "channels")
                )
                if width * height > max_pixels:
                    raise LimitError(f"tokens of {width}x{height} pixels are over the limit of {max_pixels}")
                shape = -(-height // STRIDE), -(-width // STRIDE)
                found = _array(archive, "indexes", "i", shape)
                indexes = found.astype(np.int32)
                if (indexes != found).any():
                    raise InputError("tokens are out of range")
                return cls(
                    indexes=indexes,
                    codebook=_array(archive, "codebook", "f", None).astype(np.float32),
                    quality=float(_array(archive, "quality", "f", ())),
                    width=width,
                    height=height,
                    channels=channels,
                    weights=_array(archive, "weights", "u", (8,)).astype(np.uint8).tobytes(),
                )
        except (InputError, LimitError):
            raise
        # What zipfile and numpy raise for damaged archives is not documented: anything may come.
        except Exception as error:
            raise InputError(f"the tokens cannot be read: {error}; use a file that --tokens wrote") from error


def _array(archive: zipfile.ZipFile, name: str, kind: str, shape: tuple[int, ...] | None) -> npt.NDArray[np.generic]:
    """An array of a kind of numbers and a shape, the codebook's if it is None. Raises InputError for any other."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        found, fortran, dtype = header(file)
        fits = len(found) == 2 and math.prod(found) <= MAX_CODEBOOK if shape is None else found == shape
        if not fits or fortran or dtype.kind != kind:
            raise InputError(f"{name} must not be {list(found)} {dtype}: use a file that --tokens wrote")
        size = math.prod(found) * dtype.itemsize
        content = file.read(size)
        if len(content) != size or file.read(1):
            raise InputError(f"{name} has not the length that it announces: the file is damaged")
    return np.frombuffer(content, dtype).reshape(found)
