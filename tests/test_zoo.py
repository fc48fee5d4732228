"""The registry of models: shipped weights are whole, others are refused, saving and loading keep every integer."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from calotype import api, container
from calotype.api import Codec
from calotype.errors import ModelNotFoundError
from calotype.media import Picture
from calotype.models import zoo
from calotype.models.exact import IntConv, integerise
from calotype.models.hyperprior import Hyperprior, HyperpriorConfig
from calotype.models.training.export import export_weights
from calotype.models.zoo import WeightsError
from calotype.video.frames import Colour
from calotype.video.gop import video_format


def forget() -> None:
    for cached in (zoo._index, zoo.load, zoo.load_gradient, api._coder):
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the shipped weights in which a test may do damage."""
    copied = tmp_path / "weights"
    shutil.copytree(zoo.WEIGHTS, copied)
    monkeypatch.setattr(zoo, "WEIGHTS", copied)
    forget()
    yield copied
    forget()


def test_shipped_models_are_whole() -> None:
    assert "hyperprior" in zoo.names()
    for name in zoo.names(superseded=True):
        spec = zoo.describe(name)
        zoo.verify_weights(name)
        api.verify_model(name)
        assert spec.weights.stat().st_size <= 16 * 2**20
        assert spec.architecture in zoo.ARCHITECTURES
        assert spec.summary
        assert spec.card.read_text(encoding="utf-8").startswith("#")
        assert zoo.name_of(bytes.fromhex(spec.sha256)[:8]) == name
    assert len({zoo.describe(name).id for name in zoo.names()}) == len(zoo.names())
    assert zoo.name_of(bytes(8)) is None


def test_unknown_names_are_refused() -> None:
    for call in (zoo.describe, zoo.verify_weights, zoo.load, zoo.architecture):
        with pytest.raises(WeightsError, match="unknown"):
            call("nonesuch")
    for public in (api.model, api.verify_model):
        with pytest.raises(ModelNotFoundError, match="hyperprior"):
            public("nonesuch")
    with pytest.raises(ModelNotFoundError):
        Codec.load("nonesuch", device="cpu")


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_tampered_weights_are_refused(folder: Path, place: int) -> None:
    path = folder / "hyperprior.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        zoo.load("hyperprior")
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        api.verify_model("hyperprior")
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        Codec.load(device="cpu")


def test_tampered_estimate_stops_only_encoders(folder: Path) -> None:
    from conftest import synthesise

    data = api.encode(synthesise(16, 16), device="cpu", effort=3)
    path = folder / "hyperprior-gradient.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    forget()
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        api.verify_model("hyperprior")
    codec = Codec.load(device="cpu")
    codec.decode(data)
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        codec.encode(Picture(synthesise(16, 16)))


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "hyperprior.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Codec.load(device="cpu")


def test_files_of_other_weights_are_refused(folder: Path) -> None:
    """New weights do not decode old files to noise."""
    from conftest import synthesise

    data = api.encode(synthesise(16, 16), device="cpu", quality=30)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    torch.manual_seed(1)
    index["hyperprior"]["sha256"] = zoo.save(Hyperprior(), folder / "hyperprior.safetensors")
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    forget()
    with pytest.raises(ModelNotFoundError, match="weights"):
        Codec.load(device="cpu").decode(data)


def test_weights_stay_for_the_files_that_they_wrote(folder: Path) -> None:
    from conftest import synthesise

    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    index["video"]["key_frames"] = "hyperprior"
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    forget()
    data = api.encode(synthesise(16, 16), device="cpu", quality=30)
    plain, visual = (api.decode(data, device="cpu", tune=tune) for tune in (None, "visual"))
    checkpoint = folder / "checkpoint.pt"
    torch.save(random_network(7).state_dict(), checkpoint)
    export_weights(checkpoint, "hyperprior", folder, keep="hyperprior-old")
    forget()
    assert "hyperprior-old" not in zoo.names()
    assert "hyperprior-old" in zoo.names(superseded=True)
    assert zoo.describe("hyperprior-old").superseded_by == "hyperprior"
    assert zoo.describe("hyperprior").visual is None
    assert zoo.describe("hyperprior").gradient is None
    assert zoo.load_gradient("hyperprior-old") is not None
    zoo.verify_weights("hyperprior-old")
    assert np.array_equal(api.decode(data, device="cpu"), plain)
    assert np.array_equal(api.decode(data, device="cpu", tune="visual"), visual)
    assert container.probe(data).model == "hyperprior-old"
    assert container.probe(api.encode(synthesise(16, 16), device="cpu", quality=30)).model == "hyperprior"
    assert zoo.name_of(video_format(64, 64, Colour(), 300).intra_weights) == "hyperprior-old"
    with pytest.raises(ValueError, match="already"):
        export_weights(checkpoint, "hyperprior", folder, keep="hyperprior-old")


def test_shipped_network_codes_with_integers_and_needs_no_gradients(codec: Codec) -> None:
    network = codec.coder.network
    assert sum(isinstance(m, IntConv) for m in network.modules()) == 40
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def random_network(seed: int, config: HyperpriorConfig = HyperpriorConfig()) -> Hyperprior:
    torch.manual_seed(seed)
    network = Hyperprior(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("prior") and name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
    return network


def test_saved_integers_are_loaded_unchanged(folder: Path) -> None:
    network = random_network(2, HyperpriorConfig(fine=64, synthesis_fine=2))
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    path = folder / "other.safetensors"
    index["other"] = index["hyperprior"] | {"id": 77, "file": path.name, "sha256": zoo.save(network, path)}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    forget()
    assert zoo.describe("other").id == 77
    loaded = zoo.load("other")
    assert asdict(loaded.config) == asdict(network.config)
    expected = integerise(network).prior.state_dict()
    own, stored = loaded.prior.state_dict(), zoo.shipped(network)
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(own[name], value), name
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, stored[name].float()), name
        torch.testing.assert_close(parameter, network.get_parameter(name), rtol=2**-8, atol=1e-6)


def test_weights_are_a_start_for_training(tmp_path: Path) -> None:
    """Shipped form -> training form -> shipped form: the same integer weights, biases within one step."""
    network = random_network(3)
    path = tmp_path / "a.safetensors"
    zoo.save(network, path)
    restored = random_network(4)
    count = zoo.load_parameters(restored, path)
    stored = zoo.shipped(network)
    assert count == len(list(network.parameters()))
    first, second = integerise(network).prior, integerise(restored).prior
    for name, layer in first.named_modules():
        if isinstance(layer, IntConv):
            other = second.get_submodule(name)
            assert isinstance(other, IntConv)
            assert torch.equal(layer.weight, other.weight), name
            # Biases between the knots were rounded twice.
            assert (layer.bias - other.bias).abs().max() <= 2, name
            torch.testing.assert_close(layer.multiplier, other.multiplier, rtol=1e-6, atol=0)
    for name, _ in network.named_parameters():
        if not name.startswith("prior"):
            assert torch.equal(restored.get_parameter(name), stored[name].float()), name


def test_checkpoint_parameters_of_other_shapes_are_left(tmp_path: Path) -> None:
    network = random_network(5)
    state = {name: p.detach().clone() for name, p in network.named_parameters()}
    state["dec_in.weight"] = torch.zeros(3, 3)
    torch.save({"ema": state, "step": 3}, tmp_path / "checkpoint.pt")
    other = random_network(6)
    before = copy.deepcopy(other.dec_in.weight)
    assert zoo.load_parameters(other, tmp_path / "checkpoint.pt") == len(state) - 1
    assert torch.equal(other.dec_in.weight, before)
    assert torch.equal(other.enc_in.weight, network.enc_in.weight)


def test_import_is_light() -> None:
    """Neither `import calotype` nor the registry needs torch."""
    program = (
        "import sys, calotype, calotype.container, calotype.media, calotype.rate; from calotype.models import zoo; "
        "zoo.verify_weights('hyperprior'); assert 'torch' not in sys.modules, 'torch is loaded'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_there() -> None:
    import calotype

    for name in calotype.__all__:
        assert getattr(calotype, name) is not None
    with pytest.raises(AttributeError):
        calotype.nonesuch  # noqa: B018
