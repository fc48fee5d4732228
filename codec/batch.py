"""Pictures of one size through a model together, into a tensor that stays on the model's device."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from calotype.container import Still
from calotype.entropy import Decoder
from calotype.errors import DriftError, FormatError
from calotype.models.hyperprior import STRIDE
from calotype.models.quantizers import QUALITY_STEPS
from calotype.picture import WINDOW, Box, PictureCoder, grid

_CRC = struct.Struct("<I")


@torch.inference_mode()
def decode(coder: PictureCoder, stills: Mapping[int, Still], scale: int = 1) -> Tensor:
    """Pixels [N, 3, ceil(H/scale), ceil(W/scale)] uint8 on the coder's device, in the order of `stills`.

    Args:
        stills: intact files of one size and tile side and of any quality, written with the coder's weights, by a number
            that messages name.
        scale: 1, 2, 4 or 8.
    Raises:
        FormatError, DriftError.
    """
    numbers = list(stills)
    groups = [numbers[start : start + coder.batch] for start in range(0, len(numbers), coder.batch)]
    return torch.cat([_decode_group(coder, {n: stills[n] for n in group}, scale) for group in groups])


def _decode_group(coder: PictureCoder, stills: Mapping[int, Still], scale: int) -> Tensor:
    header = next(iter(stills.values())).header
    rows, columns = -(-header.height // STRIDE), -(-header.width // STRIDE)
    quality = torch.tensor([still.header.quality for still in stills.values()], device=coder.device)
    channels = coder.network.config.latent
    # Channels innermost, as the networks give and take them.
    latent = torch.empty(len(stills), rows, columns, channels, device=coder.device).permute(0, 3, 1, 2)
    for tile, box in enumerate(grid(Box(0, 0, rows, columns), header.tile // STRIDE)):
        payloads = {number: still.tiles[tile] for number, still in stills.items()}
        latent[(..., *box.slices)] = _decode_tiles(coder, payloads, box.shape, quality)
    whole = Box(0, 0, -(-header.height // scale), -(-header.width // scale))
    out = torch.empty(len(stills), 3, *whole.shape, dtype=torch.uint8, device=coder.device)
    for window in grid(Box(0, 0, rows, columns), WINDOW):
        outer = window.grown(coder.network.halo, rows, columns)
        part = latent[(..., *outer.slices)].contiguous(memory_format=coder.layout)
        x = coder.network.synthesise(coder.network.dequantise(part), quality.float() / QUALITY_STEPS, scale)
        seen = window.scaled(STRIDE // scale).within(whole)
        x = x[(..., *seen.relative_to(outer.scaled(STRIDE // scale)).slices)]
        out[(..., *seen.slices)] = x.add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8)
    return out


def _decode_tiles(
    coder: PictureCoder, payloads: Mapping[int, memoryview | None], shape: tuple[int, int], quality: Tensor
) -> Tensor:
    """Latents [B, M, h, w] of one tile of each file, by the number of the file."""
    decoders: dict[int, Decoder] = {}
    wanted: dict[int, int] = {}
    for number, payload in payloads.items():
        if payload is None or len(payload) < _CRC.size:
            raise FormatError(f"file {number} of the batch: a tile is too short: the file is damaged")
        (wanted[number],) = _CRC.unpack_from(payload)
        decoders[number] = Decoder(coder.tables, payload[_CRC.size :])
    checks = dict.fromkeys(payloads, 0)
    coding = coder.network.code((len(payloads), *shape), quality)
    request = next(coding)
    while True:
        indexes = request.tables.cpu().numpy()
        symbols = np.empty(indexes.shape, np.int32)
        for place, (number, decoder) in enumerate(decoders.items()):
            try:
                symbols[place] = decoder.pull(indexes[place])
            except FormatError as error:
                raise FormatError(f"file {number} of the batch: {error}") from error
            checks[number] = zlib.crc32(symbols[place].astype("<i4").data, checks[number])
        try:
            request = coding.send(torch.from_numpy(symbols).to(coder.device))
        except StopIteration as stop:
            latent: Tensor = stop.value
            break
    for number, check in checks.items():
        if check != wanted[number]:
            raise DriftError(
                f"file {number} of the batch: a tile decoded to other symbols than were encoded although its bytes are "
                "intact: this device or library computes wrongly; try another device and report it"
            )
    return latent
