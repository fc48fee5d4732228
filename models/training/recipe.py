"""A training recipe: everything that a run depends on, read from YAML and overridable by `key=value`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """Settings of a training run; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Name of a model in the registry, which says its architecture and what it is trained for."""
    train: Path
    """Folder of photographs, or clips, to train on."""
    validation: Path
    """Folder of others, which steer decisions."""
    output: Path
    """Folder for the checkpoint and the log."""
    start_from: Path | None = None
    """A checkpoint or shipped weights whose parameters are taken over where names and shapes match."""
    steps: int = Field(gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int = Field(ge=0)
    """Length of the final linear decay of the learning rate to zero; before it the rate is constant."""
    hours: float | None = Field(None, gt=0)
    """Ends the run after so long, unless its steps are done before; the rate falls in the same share of the time."""
    batch: int = Field(8, gt=0)
    crop: int = Field(256, gt=0, multiple_of=64)
    muon_lr: float = 2e-3
    adam_lr: float = 2e-3
    ema_decay: float = Field(0.998, ge=0, lt=1)
    clip_norm: float = 1.0
    rate_weighting: float = 0.33
    """The loss of a sample is divided by λ to this power, so that all rates count about alike."""
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    """Whether the network is compiled: a minute or two, then several times as fast on a GPU; slower on a CPU."""
    log_every: int = Field(100, gt=0)
    checkpoint_minutes: float = Field(10.0, gt=0)
    validate_every: int = Field(1000, gt=0)
    validation_items: int = Field(8, gt=0)
    """Photographs or clips that are looked at."""
    frames: int = Field(8, gt=1)
    """Length of a rollout of the video model, with its key frame."""
    stage: Literal["pictures", "synthesis", "tokens", "ends", "visual", "gradient"] = "pictures"
    """Of the token model: `synthesis`, what draws pictures, alone; `tokens`, after its transforms and codebooks, its
    prior and the restoration of lost tokens. Of the image model, after all of it: `ends`, its synthesis alone, with
    weights of its own at either end of the quality range; `visual`, a second synthesis, for how pictures look;
    `gradient`, an estimate of gradients for its encoder."""
    shaped_from: int | None = Field(None, ge=0)
    """Step from which the model `hyperprior` is trained on latents as an encoder shapes them; a third more a step."""
    features_from: int = Field(0, ge=0)
    """Step from which the token model is trained for features of pictures, too, and not for absolute error alone."""
    feature_weight: float = Field(0.05, ge=0)
    """Of a feature distance. In the token model, against absolute error; 0.1 from the first step on drew grids. In the
    stage `visual`, against squared error that is weighted by rate: with 0.15 its gradient is 7 times as long at quality
    5, twice at 20, as long at 60."""
    structure_weight: float = Field(0.75, ge=0)
    """In the stage `visual`, of the distance of structure (`calotype.models.structure`) against squared error."""
    look: int = Field(128, gt=0, multiple_of=64)
    """Side of the part of a crop that is judged by how it looks, which takes most of the time."""
    adversarial_from: int | None = None
    """Step from which the token model is trained against a discriminator."""
    recluster: tuple[int, ...] = ()
    """Steps at which the codebooks of the token model are clustered anew."""


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key=value` with YAML values. Raises pydantic.ValidationError or ValueError."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: expected keys and values")
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"expected key=value, got {item!r}")
        values[key.strip()] = yaml.safe_load(value)
    return Recipe.model_validate(values)
