"""From a training checkpoint to shipped weights and their entry in the registry."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from calotype.models import zoo
from calotype.models.hyperprior import Hyperprior
from calotype.models.mixture import Mixture
from calotype.models.training import codebooks
from calotype.models.training.photos import fit_image_prior
from calotype.models.training.recipe import IMAGE_MODEL
from calotype.models.training.video import fit_prior, key_frame_model
from calotype.models.video import Video
from calotype.models.vqgan import Vqgan


def export_weights(
    checkpoint: Path,
    name: str,
    folder: Path = zoo.WEIGHTS,
    photos: Path | None = None,
    clips: Path | None = None,
    tune: zoo.Tune | None = None,
) -> Path:
    """Write the averaged weights of `checkpoint` as NAME.safetensors into `folder` and update its index.

    The model must be listed in the folder's index already (its id never changes).

    Args:
        photos: a folder of photographs on which a model with codebooks fits them, and others the tables of their
            latents; those are of Gaussians without.
        clips: a folder of clips on which a video model fits the tables of its latents; Gaussians without.
        tune: `visual` for the synthesis alone, NAME-visual.safetensors, of a model that is in the folder; what a model
            is trained for means all of it.
    Returns:
        The weights' path.
    Raises:
        ValueError: if photographs are needed, if the synthesis was trained for other weights, or if the model can have
            no second one.
    """
    index_path = folder / zoo.INDEX
    index = json.loads(index_path.read_text(encoding="utf-8"))
    network = zoo.architecture(index[name]["architecture"])
    assert isinstance(network, Hyperprior | Mixture | Video | Vqgan)
    zoo.load_parameters(network, checkpoint)
    trained_for = index[name].get("tune", "psnr")
    if tune not in (None, trained_for):
        if not isinstance(network, Hyperprior) or trained_for != "psnr":
            raise ValueError(f"the model {name} draws pictures in one way only: leave out the tune")
        own, there = zoo.shipped(network), load_file(folder / index[name]["file"])
        if any(not torch.equal(value, there[key]) for key, value in own.items() if key.startswith("enc_")):
            raise ValueError(f"the synthesis in {checkpoint} was trained for other weights than those of {name}")
        path = folder / f"{name}-visual.safetensors"
        index[name]["visual"] = {"file": path.name, "sha256": zoo.save_synthesis(network, path)}
        index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return path
    if isinstance(network, Mixture):
        if photos is None:
            raise ValueError(f"the codebooks of {name} are fitted at the end: give a folder of photographs (--photos)")
        codebooks.fit(network, photos)
    if isinstance(network, Hyperprior) and photos is not None:
        fit_image_prior(network.eval(), photos)
    if isinstance(network, Video) and clips is not None:
        fit_prior(network.eval(), key_frame_model(IMAGE_MODEL), clips)
    path = folder / index[name]["file"]
    index[name]["sha256"] = zoo.save(network, path)
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path
