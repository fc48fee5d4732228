"""Encoding pictures in the workers of a cluster."""

from __future__ import annotations

from calotype.api import Codec
from calotype.errors import ModelNotFoundError
from calotype.job import EncodedPicture, EncodeJob


class PictureEncoder:
    """Encodes files; the model stays on its device between them.

    Args:
        weights: SHA-256 of the weights that must be used, so that all machines write the same.
        device: "cpu", for one thread, or "cuda".
    Raises:
        ModelNotFoundError if the weights here are others.
    """

    def __init__(self, job: EncodeJob, weights: str, device: str) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
        self.job = job
        self.codec = Codec.load(job.model, device=device)
        if self.codec.spec.sha256 != weights:
            raise ModelNotFoundError(f"a worker has other weights of {job.model}: install one Calotype everywhere")

    def __call__(self, data: bytes) -> EncodedPicture:
        """Encode the bytes of a picture file. Raises as `EncodeJob.run`."""
        return self.job.run(self.codec, data)
