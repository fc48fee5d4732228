"""From a training checkpoint to shipped weights and their entry in the registry."""

from __future__ import annotations

import json
from pathlib import Path

from calotype.models import zoo
from calotype.models.hyperprior import Hyperprior
from calotype.models.mixture import Mixture
from calotype.models.training import codebooks
from calotype.models.video import Video
from calotype.models.vqgan import Vqgan


def export_weights(checkpoint: Path, name: str, folder: Path = zoo.WEIGHTS, photos: Path | None = None) -> Path:
    """Write the averaged weights of `checkpoint` as NAME.safetensors into `folder` and update its index.

    The model must be listed in the folder's index already (its id never changes). `photos` is a folder of photographs
    on which a model with codebooks fits them. Returns the weights' path. Raises ValueError if that needs photographs.
    """
    index_path = folder / zoo.INDEX
    index = json.loads(index_path.read_text(encoding="utf-8"))
    network = zoo.architecture(index[name]["architecture"])
    assert isinstance(network, Hyperprior | Mixture | Video | Vqgan)
    zoo.load_parameters(network, checkpoint)
    if isinstance(network, Mixture):
        if photos is None:
            raise ValueError(f"the codebooks of {name} are fitted at the end: give a folder of photographs")
        codebooks.fit(network, photos)
    path = folder / index[name]["file"]
    index[name]["sha256"] = zoo.save(network, path)
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path
