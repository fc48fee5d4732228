"""Where a network computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises InputError for an unknown or absent device."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"unsupported device {device!r}: use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device} is not here: {torch.cuda.device_count()} CUDA devices found; use --device cpu"
        )
    return chosen
