"""From a training checkpoint to shipped weights and their entry in the registry."""

from __future__ import annotations

import json
from pathlib import Path

from calotype.models import zoo
from calotype.models.hyperprior import Hyperprior
from calotype.models.video import Video


def export_weights(checkpoint: Path, name: str, folder: Path = zoo.WEIGHTS) -> Path:
    """Write the averaged weights of `checkpoint` as NAME.safetensors into `folder` and update its index.

    The model must be listed in the folder's index already (its id never changes). Returns the weights' path.
    """
    index_path = folder / zoo.INDEX
    index = json.loads(index_path.read_text(encoding="utf-8"))
    network = zoo.architecture(index[name]["architecture"])
    assert isinstance(network, Hyperprior | Video)
    zoo.load_parameters(network, checkpoint)
    path = folder / index[name]["file"]
    index[name]["sha256"] = zoo.save(network, path)
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path
