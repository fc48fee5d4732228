"""A synthesis with weights of its own at either end of the quality range."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calotype.models import shaping
from calotype.models.hyperprior import Hyperprior, HyperpriorConfig

SMALL = HyperpriorConfig(
    fine=32, coarse=64, analysis_fine=1, analysis_coarse=1, synthesis_coarse=1, synthesis_fine=2, synthesis_ends=True
)


@pytest.fixture(scope="module")
def network() -> Hyperprior:
    """Three syntheses that have little in common."""
    torch.manual_seed(0)
    network = Hyperprior(SMALL)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("dec_"):
                parameter.add_(0.03 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(3, 320, 4, 6, generator=torch.Generator().manual_seed(1))


def same_everywhere(network: Hyperprior, layers: nn.Module | None) -> Hyperprior:
    """A network without ends that draws by `layers`, or by the middle."""
    plain = Hyperprior(HyperpriorConfig(**{**vars(SMALL), "synthesis_ends": False})).requires_grad_(False).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("dec_ends")})
    if layers is not None:
        plain.load_state_dict(layers.state_dict(), strict=False)
    return plain


def test_ends_and_middle_draw_by_their_own_weights(network: Hyperprior, latents: torch.Tensor) -> None:
    assert network.dec_ends is not None
    low, high = network.dec_ends
    for quality, layers in ((0.0, low), (0.5, None), (1.0, high)):
        t = torch.full((3,), quality)
        expected = same_everywhere(network, layers).synthesise(latents, t)
        assert torch.equal(network.synthesise(latents, t), expected)
        assert torch.equal(network.at(quality).synthesise(latents, t), expected)


def test_weights_lie_between(network: Hyperprior) -> None:
    """On the line, as bfloat16 numbers in blocks; modulations stay."""
    assert network.dec_ends is not None
    drawing = network.at(0.6)
    other = network.dec_ends[1].get_submodule("dec_out")
    assert torch.allclose(drawing.dec_out.weight, 0.8 * network.dec_out.weight + 0.2 * other.weight, atol=1e-6)  # type: ignore[operator]
    deep, middle = (n.get_submodule("dec_fine.1.expand").weight for n in (drawing, network))
    assert isinstance(deep, torch.Tensor)
    assert isinstance(middle, torch.Tensor)
    assert torch.equal(deep, deep.bfloat16().float())
    assert not torch.equal(deep, middle)
    assert drawing.dec_step is network.dec_step
    assert drawing.prior is network.prior


def test_pictures_of_a_batch_have_qualities_of_their_own(network: Hyperprior, latents: torch.Tensor) -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    together = network.synthesise(latents, t, 2)
    for n in range(3):
        alone = network.at(t[n].item()).synthesise(latents[n : n + 1], t[n : n + 1], 2)
        assert torch.allclose(together[n : n + 1], alone, atol=1e-5)


def test_gradients_flow_through_weights_that_were_found_in_inference(
    network: Hyperprior, latents: torch.Tensor
) -> None:
    t = torch.tensor([0.2])
    pixels = torch.zeros(1, 3, 64, 96)
    with torch.inference_mode():
        drawing = network.at(0.2)
        found = shaping.error_gradient(drawing.synthesise, latents[:1], pixels, t, bf16=False)
    expected = shaping.error_gradient(network.synthesise, latents[:1], pixels, t, bf16=False)
    assert found.abs().max() > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_training_moves_ends_by_their_distance(network: Hyperprior, latents: torch.Tensor) -> None:
    """At a quality of 80 the upper end takes 0.6 of the gradient, the middle the rest."""
    network = Hyperprior(SMALL)
    network.synthesise(latents, torch.full((3,), 0.8)).square().sum().backward()
    assert network.dec_ends is not None
    low, high = (end.get_submodule("dec_out").weight.grad for end in network.dec_ends)
    middle = network.dec_out.weight.grad
    assert low is None
    assert isinstance(high, torch.Tensor)
    assert middle is not None
    assert torch.allclose(high * 0.4, middle * 0.6, rtol=1e-3, atol=1e-6)
