"""Registry of models: name -> architecture, shipped weights, their SHA-256, and a model card.

`weights/index.json` lists what is shipped; a stream names its weights by the first 8 bytes of their SHA-256. Weights
stay when better ones take over their model's name, so that their files can be read. This
module imports torch only where a network is built.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch
    from torch import nn

    from calotype.models.gradient import LearnedGradient
    from calotype.models.hyperprior import Hyperprior
    from calotype.models.mixture import Mixture
    from calotype.models.video import Video
    from calotype.models.vqgan import Vqgan

Tune = Literal["psnr", "visual"]
"""What models are trained for, and pictures drawn for: least error, or how they look."""
TUNES: tuple[Tune, ...] = get_args(Tune)
WEIGHTS = Path(__file__).parent / "weights"
CARDS = Path(__file__).parent / "cards"
INDEX = "index.json"
SYNTHESIS = "dec_"
"""Names of what draws pictures from latents begin so."""
ENDS = "dec_ends."
"""Names of what draws them otherwise at the ends of the quality range (`calotype.models.transforms`)."""


class WeightsError(LookupError):
    """A model is unknown, or its weights are missing or not the registered ones."""


@dataclass(frozen=True)
class Companion:
    """Weights that go with those of a model."""

    weights: Path
    sha256: str


@dataclass(frozen=True)
class ModelSpec:
    """A shipped model.

    Attributes:
        id: number in file headers.
        architecture: the network that the weights fill.
        tune: what it was trained for.
        visual: a second synthesis for the same latents, for how pictures look, if there is one; its weights replace
            those of the model.
        gradient: an estimate of the gradient of the error (`calotype.models.gradient`), if there is one.
        key_frames: the model that codes the key frames of a video model.
        superseded_by: the model that new files are written with in its place; this one is there for older files.
    """

    name: str
    id: int
    architecture: str
    summary: str
    weights: Path
    sha256: str
    card: Path
    tune: Tune
    visual: Companion | None
    gradient: Companion | None
    key_frames: str | None
    superseded_by: str | None


def _hyperprior(config: Mapping[str, Any]) -> Hyperprior:
    from calotype.models.hyperprior import Hyperprior, HyperpriorConfig

    return Hyperprior(HyperpriorConfig(**config))


def _mixture(config: Mapping[str, Any]) -> Mixture:
    from calotype.models.mixture import Mixture, MixtureConfig

    return Mixture(MixtureConfig.from_json(config))


def _video(config: Mapping[str, Any]) -> Video:
    from calotype.models.video import Video, VideoConfig

    return Video(VideoConfig(**config))


def _vqgan(config: Mapping[str, Any]) -> Vqgan:
    from calotype.models.vqgan import Vqgan, VqganConfig

    # JSON has no tuples.
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return Vqgan(VqganConfig(**config))


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "hyperprior": _hyperprior,
    "mixture": _mixture,
    "video": _video,
    "vqgan": _vqgan,
}


def architecture(name: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """A new network of a registered architecture, with fresh weights. Raises WeightsError for an unknown name."""
    if name not in ARCHITECTURES:
        raise WeightsError(f"unknown architecture {name!r}: use one of {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name](config or {})


def names(*, superseded: bool = False) -> list[str]:
    """Names of the models that new files are written with, and, if asked, then of those that older files need."""
    old = {name: spec.superseded_by is not None for name, spec in _index().items()}
    return sorted((name for name in old if superseded or not old[name]), key=lambda name: (old[name], name))


def describe(name: str) -> ModelSpec:
    """The registry's entry. Raises WeightsError for an unknown name."""
    if name not in _index():
        raise WeightsError(f"unknown model {name!r}: use one of {', '.join(names())}")
    return _index()[name]


def name_of(weights: bytes) -> str | None:
    """The model whose weights' SHA-256 begins with these 8 bytes, or None if it is not shipped here."""
    for spec in _index().values():
        if bytes.fromhex(spec.sha256[:16]) == weights:
            return spec.name
    return None


@functools.cache
def ladder_step(quality: int, steps: int) -> int:
    """The step of a ladder of codebooks at an integer quality in [0, 1000]: equal parts of the range."""
    return min(quality * steps // 1000, steps - 1)


def codebook_size(name: str, quality: int) -> int | None:
    """Codewords to choose from at a quality in [0, 1000] in a model of tokens; None in others, or if it is not here."""
    spec = describe(name)
    if spec.architecture != "vqgan":
        return None
    try:
        with spec.weights.open("rb") as file:
            head = file.read(int.from_bytes(file.read(8), "little"))
        ladder: list[int] = json.loads(json.loads(head)["__metadata__"]["config"])["ladder"]
    except (OSError, ValueError, LookupError):
        return None
    return ladder[ladder_step(quality, len(ladder))]


@functools.cache
def _index() -> dict[str, ModelSpec]:
    entries = json.loads((WEIGHTS / INDEX).read_text(encoding="utf-8"))
    return {
        name: ModelSpec(
            name, e["id"], e["architecture"], e["summary"], WEIGHTS / e["file"], e["sha256"], CARDS / f"{name}.md",
            e.get("tune", "psnr"),
            _companion(e, "visual"), _companion(e, "gradient"), e.get("key_frames"), e.get("superseded_by"),
        )
        for name, e in entries.items()
    }  # fmt: skip


def _companion(entry: Mapping[str, Any], part: str) -> Companion | None:
    return Companion(WEIGHTS / entry[part]["file"], entry[part]["sha256"]) if part in entry else None


def _read_verified(name: str, path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"the weights of {name} cannot be read: {error}; reinstall calotype") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"the weights of {name} have SHA-256 {found[:16]}…, expected {sha256[:16]}…: reinstall calotype"
        )
    return data


def verify_weights(name: str) -> None:
    """Check the SHA-256 of all weights of a model. Raises WeightsError if they are missing or differ."""
    spec = describe(name)
    _read_verified(name, spec.weights, spec.sha256)
    for part in (spec.visual, spec.gradient):
        if part is not None:
            _read_verified(name, part.weights, part.sha256)


@functools.cache
def load(name: str, device: str = "cpu", tune: Tune | None = None) -> nn.Module:
    """The network of a shipped model, of the class that its architecture names, ready to code on `device`.

    It draws what it was trained for, or with its second synthesis for another `tune`. Raises WeightsError, also if it
    has none.
    """
    import torch

    spec = describe(name)
    data = _read_verified(name, spec.weights, spec.sha256)
    with torch.inference_mode(False):  # whoever asks first, others may want gradients
        return _build(spec, data, device, tune)


def _build(spec: ModelSpec, data: bytes, device: str, tune: Tune | None) -> nn.Module:
    import torch
    from safetensors.torch import load as load_tensors

    from calotype.models.exact import integerise
    from calotype.models.transforms import Transforms

    network = integerise(architecture(spec.architecture, _config(data)))
    tensors = load_tensors(data)
    if tune not in (None, spec.tune):
        if spec.visual is None:
            raise WeightsError(f"the model {spec.name} draws pictures in one way only: leave out the tune")
        assert isinstance(network, Transforms)
        network.drop_ends()
        tensors = {k: v for k, v in tensors.items() if not k.startswith(ENDS)}
        tensors |= load_tensors(_read_verified(spec.name, spec.visual.weights, spec.visual.sha256))
    own = network.state_dict()
    network.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()})
    network = network.to(memory_format=layout(torch.device(device)))  # type: ignore[call-overload]
    return network.to(device).requires_grad_(False)


@functools.cache
def load_gradient(name: str, device: str = "cpu") -> LearnedGradient | None:
    """What estimates gradients for a shipped model's encoder, on `device`, if there is such. Raises WeightsError."""
    import torch

    part = describe(name).gradient
    if part is None:
        return None
    data = _read_verified(name, part.weights, part.sha256)
    with torch.inference_mode(False):
        from safetensors.torch import load as load_tensors

        from calotype.models.gradient import GradientConfig, LearnedGradient

        network = LearnedGradient(GradientConfig(**_config(data)))
        network.load_state_dict(load_tensors(data))  # float16 there, float32 here
        network = network.to(memory_format=layout(torch.device(device)))  # type: ignore[call-overload]
        return network.to(device).requires_grad_(False)


def _config(data: bytes) -> dict[str, Any]:
    """The settings of an architecture in a file of weights."""
    length = int.from_bytes(data[:8], "little")
    config: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["config"])
    return config


def layout(device: torch.device) -> torch.memory_format:
    """Layout of weights and features: channels innermost doubles the speed of the float transforms on a CPU.

    Without AVX2 torch cannot shuffle pixels in that layout.
    """
    import torch

    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return torch.contiguous_format
    return torch.channels_last


def save(network: Hyperprior | Mixture | Video | Vqgan, path: Path) -> str:
    """Write the shipped form of a trained network: float transforms, integer entropy layers. Returns the SHA-256."""
    from safetensors.torch import save as save_tensors

    return _replace(
        path, save_tensors(shipped(network), {"config": json.dumps(asdict(network.config), sort_keys=True)})
    )


def save_synthesis(network: Hyperprior, path: Path) -> str:
    """Write only what a trained network draws pictures with, as `save` would. Returns the SHA-256.

    Its ends are left out: a second synthesis has the same weights at every quality.
    """
    from safetensors.torch import save as save_tensors

    drawing = {k: v for k, v in shipped(network).items() if k.startswith(SYNTHESIS) and not k.startswith(ENDS)}
    return _replace(path, save_tensors(drawing))


def save_gradient(network: LearnedGradient, path: Path) -> str:
    """Write the shipped form of a network that estimates gradients. Returns the SHA-256."""
    import torch
    from safetensors.torch import save as save_tensors

    tensors = {k: v.to(torch.float16).contiguous() for k, v in network.state_dict().items()}
    return _replace(path, save_tensors(tensors, {"config": json.dumps(asdict(network.config), sort_keys=True)}))


def _replace(path: Path, data: bytes) -> str:
    """Put a file in place of the old one, which others may have mapped into memory. Returns the SHA-256."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return hashlib.sha256(data).hexdigest()


def shipped(network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a trained network in their shipped form.

    Floats are float16, but those of residual blocks bfloat16, in which processors may multiply them.
    """
    import torch

    from calotype.models.blocks import Block
    from calotype.models.exact import integerise

    in_blocks = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Block))
    tensors = {}
    for key, value in integerise(network).state_dict().items():
        if key.startswith("prior."):
            kind = {"weight": torch.int8, "bias": torch.int32}.get(key.rpartition(".")[2], value.dtype)
        elif value.is_floating_point():
            kind = torch.bfloat16 if key.startswith(in_blocks) else torch.float16
        else:
            kind = value.dtype
        tensors[key] = value.to(kind).contiguous()
    return tensors


def has_ends(path: Path) -> bool:
    """Whether a training checkpoint or shipped weights (`.safetensors`) draw otherwise at the ends of the range."""
    import torch
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = list(state.get("ema", state))
    return any(name.startswith(ENDS) for name in names)


def load_parameters(network: nn.Module, path: Path) -> int:
    """Take over parameters and tables from a training checkpoint or from shipped weights (`.safetensors`).

    Returns how many of the network's parameters were found; those of another shape are left as they are.
    """
    import torch

    found: Mapping[str, torch.Tensor]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        from calotype.models.exact import integerise, restore

        integers = integerise(network)
        own = integers.state_dict()
        same = {k: v.to(own[k].dtype) for k, v in load_file(path).items() if k in own and own[k].shape == v.shape}
        integers.load_state_dict(same, strict=False)
        buffers = dict(integers.named_buffers())
        found = {**buffers, **dict(restore(network, integers).named_parameters()), **dict(integers.named_parameters())}
        found = {k: v for k, v in found.items() if k in same}
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {**state.get("model", {}), **state["ema"]} if "ema" in state else state
    parameters = dict(network.named_parameters())
    own = {**parameters, **dict(network.named_buffers())}
    with torch.no_grad():
        for key, value in own.items():
            if key in found and found[key].shape == value.shape:
                value.copy_(found[key])
    return sum(key in found and found[key].shape == value.shape for key, value in parameters.items())
