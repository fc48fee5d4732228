"""Settings of the service."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, SecretStr


class Settings(BaseModel):
    """What a service may use, fixed when it starts.

    At most `workers + queue` requests are in the house; each holds a body of `max_body` bytes at most, and those being
    worked on a picture of `max_pixels` pixels at most. That bounds the memory.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        workers: requests that are worked on at a time, each on a thread.
        queue: requests that may wait, or be under way in or out; one more is answered with 503.
        max_body: bytes of a request's body.
        max_pixels: pixels of a picture, checked before it is decoded.
        timeout: seconds from the end of a request's body to its answer.
        transfer_timeout: seconds that a client may take to send its body, and again to take its answer.
        token: bearer token that requests must carry; None lets everyone in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    workers: PositiveInt = 1
    queue: NonNegativeInt = 32
    max_body: PositiveInt = 64_000_000
    max_pixels: PositiveInt = 64_000_000
    timeout: float = Field(60, gt=0, allow_inf_nan=False)
    transfer_timeout: float = Field(60, gt=0, allow_inf_nan=False)
    token: SecretStr | None = None
