"""From a training checkpoint to shipped weights and their entry in the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from calotype.models import zoo
from calotype.models.gradient import LearnedGradient
from calotype.models.hyperprior import Hyperprior
from calotype.models.mixture import Mixture
from calotype.models.training import codebooks
from calotype.models.training.photos import fit_image_prior
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
    keep: str | None = None,
    gradient: bool = False,
) -> Path:
    """Write the averaged weights of `checkpoint` as NAME.safetensors into `folder` and update its index.

    The model must be listed in the folder's index already (its id never changes).

    Args:
        photos: a folder of photographs on which a model with codebooks fits them, and others the tables of their
            latents; those are of Gaussians without.
        clips: a folder of clips on which a video model fits the tables of its latents; Gaussians without.
        tune: `visual` for the synthesis alone, NAME-visual.safetensors, of a model that is in the folder; what a model
            is trained for means all of it.
        keep: a name under which the present weights stay, with their second synthesis, for the files and the key
            frames that they code; otherwise nothing reads those any more.
        gradient: only NAME-gradient.safetensors, which estimates gradients for the weights that are in the folder
            (`calotype.models.gradient`); new weights of the model leave it behind.
    Returns:
        The weights' path.
    Raises:
        ValueError: if photographs are needed, if the synthesis was trained for other weights, if the model can have no
            second one, or if the name to keep weights under is taken.
    """
    index_path = folder / zoo.INDEX
    index = json.loads(index_path.read_text(encoding="utf-8"))
    if keep in index:
        raise ValueError(f"there is a model {keep} already: keep the present weights of {name} under another name")
    if gradient:
        if keep is not None or tune is not None:
            raise ValueError("gradients are estimated for weights as they are: leave out the tune and the name to keep")
        estimate = LearnedGradient()
        if not zoo.load_parameters(estimate, checkpoint):
            raise ValueError(f"{checkpoint} does not hold an estimate of gradients")
        path = folder / f"{name}-gradient.safetensors"
        index[name]["gradient"] = {"file": path.name, "sha256": zoo.save_gradient(estimate, path)}
        index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return path
    kind, trained_for = index[name]["architecture"], index[name].get("tune", "psnr")
    settings = {}
    if kind == "hyperprior":
        settings = {"synthesis_ends": zoo.has_ends(checkpoint), "packed": trained_for == "psnr"}
    network = zoo.architecture(kind, settings)
    assert isinstance(network, Hyperprior | Mixture | Video | Vqgan)
    zoo.load_parameters(network, checkpoint)
    if tune not in (None, trained_for):
        if keep is not None:
            raise ValueError("a second synthesis takes nothing's place: leave out the name to keep weights under")
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
        fit_image_prior(network.eval(), photos, shaped=trained_for == "psnr")
    if isinstance(network, Video) and clips is not None:
        fit_prior(network.eval(), key_frame_model(zoo.describe(name)), clips)
    if keep is not None:
        _supersede(index, name, keep, folder)
    index[name].pop("gradient", None)
    path = folder / index[name]["file"]
    index[name]["sha256"] = zoo.save(network, path)
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path


def _supersede(index: dict[str, dict[str, Any]], name: str, kept: str, folder: Path) -> None:
    """Move the present weights of a model to the name `kept`."""
    old = index[kept] = index[name] | {"superseded_by": name}
    parts = {"": old} | {f"-{part}": index[name].pop(part) for part in ("visual", "gradient") if part in old}
    for suffix, part in parts.items():
        file = f"{kept}{suffix}.safetensors"
        (folder / part["file"]).rename(folder / file)
        part["file"] = file
    for entry in index.values():
        if entry.get("key_frames") == name:
            entry["key_frames"] = kept
