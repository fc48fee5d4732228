"""Integer layers: exact against wide integers, and nothing but integers on the whole entropy path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from calotype.api import Codec
from calotype.media import Picture
from calotype.models import exact as layers
from calotype.models.exact import (
    LEVELS,
    LIMIT,
    MAX_BIAS,
    MAX_FAN_IN,
    IntConv,
    QuantConv,
    _products,
    integerise,
    restore,
)
from calotype.models.hyperprior import Hyperprior
from calotype.models.priors import Prior

Ints = npt.NDArray[np.int64]


def random_layer(seed: int, inputs: int, outputs: int, kernel: int, *, leaky: bool, head: bool, levels: int) -> IntConv:
    rng = np.random.default_rng(seed)
    layer = IntConv(inputs, outputs, kernel, leaky=leaky, head=head, levels=levels)
    layer.weight.copy_(torch.from_numpy(rng.integers(-LIMIT, LIMIT + 1, tuple(layer.weight.shape))))
    layer.bias.copy_(torch.from_numpy(rng.integers(-(2**15), 2**15, tuple(layer.bias.shape))))
    # Spread so that outputs fall inside the clamp, beyond it, and near zero.
    layer.multiplier.copy_(torch.from_numpy(2.0 ** rng.uniform(-14, -6, outputs)))
    return layer


def exact_output(layer: IntConv, x: Ints, levels: Ints) -> Ints:
    """The layer's definition in 64-bit integers and rational numbers, position by position."""
    weight, bias = layer.weight.numpy().astype(np.int64), layer.bias.numpy().astype(np.int64)
    pad = layer.kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (layer.kernel, layer.kernel), axis=(2, 3))
    sums, inputs = ("bchwuv,cuv->bchw", windows) if layer.depthwise else ("bchw,oc->bohw", x)
    acc = np.einsum(sums, inputs, weight)
    acc = acc + (bias[levels] if len(bias) > 1 else bias)[:, :, None, None]
    multipliers = [Fraction(float(m)) for m in layer.multiplier]
    out = np.empty_like(acc)
    for (b, c, i, j), value in np.ndenumerate(acc):
        exact = Fraction(int(value), 8 if layer.leaky and value < 0 else 1) * multipliers[c]
        out[b, c, i, j] = floor(exact + Fraction(1, 2))
    return out if layer.head else np.clip(out, -LIMIT, LIMIT)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("levels", [1, LEVELS])
@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(96, 40, 1), (1, 7, 1), (12, 12, 3), (9, 9, 5)])
def test_layer_equals_wide_integers(
    inputs: int, outputs: int, kernel: int, levels: int, leaky: bool, head: bool
) -> None:
    layer = random_layer(inputs + levels, inputs, outputs, kernel, leaky=leaky, head=head, levels=levels)
    rng = np.random.default_rng(outputs)
    x = rng.integers(-LIMIT, LIMIT + 1, (3, inputs, 5, 4))
    chosen = rng.integers(0, levels, 3)
    got = layer(torch.from_numpy(x).float(), torch.from_numpy(chosen)).numpy()
    expected = exact_output(layer, x, chosen)
    assert (got == expected).all()
    assert len(np.unique(expected)) > 20  # the case is not trivial


@settings(max_examples=300)
@given(
    acc=st.integers(-MAX_BIAS, MAX_BIAS),
    multiplier=st.floats(2.0**-40, 2.0**8, width=32),
    leaky=st.booleans(),
)
def test_rescaling_is_that_of_rational_numbers(acc: int, multiplier: float, leaky: bool) -> None:
    layer = IntConv(1, 1, 1, leaky=leaky, head=True, levels=1)
    layer.bias.fill_(acc)
    layer.multiplier.fill_(multiplier)
    got = layer(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)).item()
    exact = floor(Fraction(acc, 8 if leaky and acc < 0 else 1) * Fraction(multiplier) + Fraction(1, 2))
    # A head's output is carried in float32: exact up to 2^24, which is far beyond the clamps that follow.
    assert got == exact if abs(exact) <= 2**24 else abs(got) >= 2**24


@settings(max_examples=200)
@given(numerator=st.integers(-(2**22), 2**22).filter(lambda n: n % 2), shift=st.integers(1, 20))
def test_halves_round_up(numerator: int, shift: int) -> None:
    layer = IntConv(1, 1, 1, leaky=False, head=True, levels=1)
    layer.bias.fill_(numerator)
    layer.multiplier.fill_(2.0**-shift)
    got = layer(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)).item()
    assert got == (numerator + (1 << (shift - 1))) >> shift


def test_largest_fan_in_is_exact_in_any_order() -> None:
    layer = IntConv(MAX_FAN_IN, 3, 1, leaky=False, head=True, levels=1)
    layer.weight.fill_(LIMIT)
    layer.weight[1, ::2] = -LIMIT
    layer.weight[2] = -LIMIT
    layer.bias.copy_(torch.tensor([[MAX_BIAS, 1, -MAX_BIAS]]))
    layer.multiplier.fill_(1)
    x = torch.full((2, MAX_FAN_IN, 2, 3), float(LIMIT))
    top = MAX_FAN_IN * LIMIT**2 + MAX_BIAS
    assert top < 2**24
    for order in (torch.arange(MAX_FAN_IN), torch.randperm(MAX_FAN_IN, generator=torch.Generator().manual_seed(1))):
        shuffled = copy.deepcopy(layer)
        shuffled.weight.copy_(layer.weight[:, order])
        out = shuffled(x[:, order], torch.zeros(2, dtype=torch.long))
        assert (out == torch.tensor([top, 1.0, -top])[None, :, None, None]).all()


def test_too_large_a_fan_in_is_refused() -> None:
    QuantConv(MAX_FAN_IN, 4)
    with pytest.raises(ValueError, match="fan-in"):
        QuantConv(MAX_FAN_IN + 1, 4)
    with pytest.raises(ValueError, match="fan-in"):
        QuantConv(8, 8, 29)
    with pytest.raises(ValueError, match="width"):
        QuantConv(8, 4, 3)


def test_int8_products_are_used_only_where_they_are_exact() -> None:
    """Against wide integers at the extremes, where 16-bit intermediate sums would saturate, and in odd sizes."""
    rng = np.random.default_rng(3)
    for inputs, outputs, rows in ((160, 160, 700), (256, 96, 1), (80, 64, 33), (1, 40, 5), (3, 7, 2)):
        for values in ([-LIMIT, LIMIT], [LIMIT], np.arange(-LIMIT, LIMIT + 1)):
            x, weight = rng.choice(values, (1, rows, inputs)), rng.choice(values, (outputs, inputs))
            got = _products(torch.from_numpy(x).float(), torch.from_numpy(weight).float()).numpy()
            assert (got == x @ weight.T).all()


@pytest.mark.parametrize("kernel", [3, 5])
def test_convolutions_are_used_only_where_they_are_exact(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that transforms its inputs, and so rounds, is found out; by taps the sums are the same as ever."""
    layer = random_layer(5, 21, 21, kernel, leaky=True, head=True, levels=1)
    x = torch.from_numpy(np.random.default_rng(4).integers(-LIMIT, LIMIT + 1, (2, 21, 13, 9))).float()
    level = torch.zeros(2, dtype=torch.long)
    expected = exact_output(layer, x.numpy().astype(np.int64), level.numpy())
    assert (layer(x, level).numpy() == expected).all()

    def transformed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        (sums,) = layers._by_taps(x, weight, x.shape[1])
        return sums * (1 + 2**-20)

    monkeypatch.setattr(layers, "_convolution", transformed)
    layers._convolution_is_exact.cache_clear()
    try:
        assert not layers._convolution_is_exact(21, kernel)
        assert (layer(x, level).numpy() == expected).all()
    finally:
        layers._convolution_is_exact.cache_clear()


def trained_like(seed: int, inputs: int, outputs: int, kernel: int, **options: Any) -> QuantConv:
    torch.manual_seed(seed)
    layer = QuantConv(inputs, outputs, kernel, **options)
    with torch.no_grad():
        layer.bias.copy_(torch.randn_like(layer.bias))
    return layer.eval()


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "options"),
    [
        (64, 48, 1, {}),
        (64, 48, 1, {"leaky": True, "knots": 5}),
        (32, 32, 5, {}),
        (32, 32, 3, {"leaky": True}),
        (64, 40, 1, {"gain": torch.cat([torch.full((20,), 64.0), torch.full((20,), 9.4)])}),
        (1, 40, 1, {"gain": torch.full((40,), 8.0), "knots": 5}),
    ],
)
def test_training_form_agrees_with_its_export(inputs: int, outputs: int, kernel: int, options: dict[str, Any]) -> None:
    layer = trained_like(3, inputs, outputs, kernel, **options)
    exported = layer.export()
    x = torch.randint(-LIMIT, LIMIT + 1, (4, inputs, 9, 7)).float()
    level = torch.tensor([0, 13, 40, 64])
    with torch.no_grad():
        a, b = layer(x, level / 64), exported(x, level)
    assert a.abs().max() > 20
    assert (a - b).abs().max() <= 1
    assert (a == b).float().mean() > 0.98


def test_export_and_restore_round_trip() -> None:
    layer = trained_like(5, 40, 24, 1, leaky=True, knots=5)
    exported = layer.export()
    other = QuantConv(40, 24, 1, leaky=True, knots=5)
    other.restore(exported)
    again = other.export()
    assert torch.equal(again.weight, exported.weight)
    assert (again.bias - exported.bias).abs().max() <= 1
    torch.testing.assert_close(again.multiplier, exported.multiplier, rtol=1e-6, atol=0)


def test_integerise_replaces_every_layer_and_leaves_the_original() -> None:
    torch.manual_seed(0)
    prior = Prior(320, 96)
    exact = integerise(prior)
    kinds = [type(m) for m in exact.modules()]
    assert QuantConv not in kinds
    assert kinds.count(IntConv) == sum(isinstance(m, QuantConv) for m in prior.modules()) == 40
    restored = integerise(restore(copy.deepcopy(prior), exact))
    for name, value in exact.named_buffers():
        if name.endswith("weight"):
            assert torch.equal(value, restored.get_buffer(name)), name


# The whole path ---------------------------------------------------------------------------------------------------

ARITHMETIC = (
    "_int_mm abs add add_ addcmul addcmul_ amax bincount bitwise_and clamp clamp_ conv2d cumsum eq floor_ "
    "floor_divide ge le leaky_relu_ matmul mm mul mul_ remainder sign sub"
)
MOVES = (
    "_to_copy _unsafe_view alias arange cat chunk clone constant_pad_nd contiguous copy_ expand flatten index "
    "index_copy_ index_put_ index_select new_full new_zeros nonzero pad permute reshape select slice split t to "
    "transpose unbind unflatten unsqueeze view zeros zeros_like"
)
ALLOWED = frozenset(f"{ARITHMETIC} {MOVES}".split())
"""Operations that keep integers integers; on float64 they are the rescaling, which `floor_` ends."""


class NotExactError(AssertionError):
    """Something on the entropy path is not integer arithmetic."""


class ExactnessWatch(TorchDispatchMode):
    """Fails at the first operation that is not allowed, and at any float32 result that is not a small integer."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations += 1
        if name not in ALLOWED:
            raise NotExactError(f"{name} is not an operation of the entropy path")
        if (
            name in ("to", "_to_copy")
            and not out.is_floating_point()
            and not torch.equal(out.double(), args[0].double())
        ):
            raise NotExactError("a conversion to integers cuts something off")
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise NotExactError(f"{name} gives {tensor.dtype}")
            if tensor.dtype == torch.float32 and tensor.numel():
                if not torch.equal(tensor, tensor.floor()):
                    raise NotExactError(f"{name} gives fractions")
                if tensor.abs().max() > 2**24:
                    raise NotExactError(f"{name} gives integers above 2^24")
        return out


def decode_under_watch(network: Hyperprior, quality: int = 600) -> int:
    """Run the decoding side of the entropy model on fixed symbols; returns the number of operations."""
    watch = ExactnessWatch()
    for context in (nullcontext(), watch):  # what is found out about the processor at the first time is not the path
        generator = torch.Generator().manual_seed(7)
        coding = network.code((2, 6, 7), torch.tensor([quality, quality]))
        request = next(coding)
        with suppress(StopIteration):
            while True:
                symbols = torch.randint(-9, 10, request.tables.shape, generator=generator, dtype=torch.int32)
                with context:
                    request = coding.send(symbols)
    return watch.operations


class Planted(nn.Module):
    """A layer with a float operation behind it."""

    def __init__(self, layer: nn.Module, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.operation = layer, operation

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.operation(self.layer(x, t))


@contextmanager
def planted(network: Hyperprior, name: str, operation: Callable[[Tensor], Tensor]) -> Iterator[Hyperprior]:
    """`network` with `operation` behind the layer `name` of its prior."""
    parent, _, leaf = name.rpartition(".")
    module = network.prior.get_submodule(parent)
    layer = getattr(module, leaf)
    setattr(module, leaf, Planted(layer, operation))
    try:
        yield network
    finally:
        setattr(module, leaf, layer)


def test_entropy_path_holds_only_integer_arithmetic(codec: Codec) -> None:
    assert decode_under_watch(codec.coder.network) > 500


PLANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp, rounded again": lambda x: torch.floor(torch.exp(x / 64) + 0.5),
    "normalisation": lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1),
    "fractional weights": lambda x: x * 0.9,
    "float convolution": lambda x: torch.floor(nn.functional.conv2d(x, 0.1 * torch.ones(len(x[0]), len(x[0]), 1, 1))),
    "half precision": lambda x: x.bfloat16().float(),
    "division": lambda x: torch.floor(x / 3),
}


@pytest.mark.parametrize("layer", ["up_out", "hyper_second.mix", "contexts.1.reduce", "contexts.5.head"])
@pytest.mark.parametrize("plant", PLANTS)
def test_planted_float_operation_is_caught(codec: Codec, plant: str, layer: str) -> None:
    with planted(codec.coder.network, layer, PLANTS[plant]) as network, pytest.raises(NotExactError):
        decode_under_watch(network)
    decode_under_watch(codec.coder.network)  # and nothing stays planted


def test_non_integer_weights_are_caught(codec: Codec) -> None:
    network = copy.deepcopy(codec.coder.network)
    network.prior.get_submodule("contexts.2.enter").weight.add_(0.25)  # type: ignore[operator]
    with pytest.raises(NotExactError):
        decode_under_watch(network)


def test_every_parameter_of_the_path_is_in_range(codec: Codec) -> None:
    layers = {n: m for n, m in codec.coder.network.prior.named_modules() if isinstance(m, IntConv)}
    assert len(layers) == 40
    for name, layer in layers.items():
        fan_in = layer.weight[0].numel()
        for value, limit in ((layer.weight, LIMIT), (layer.bias, MAX_BIAS)):
            assert torch.equal(value, value.round()), name
            assert value.abs().max() <= limit, name
        assert fan_in * LIMIT**2 + layer.bias.abs().max() < 2**24, name
        assert (layer.multiplier > 0).all(), name


def test_batch_does_not_change_integers(codec: Codec, synthetic: Callable[..., Picture]) -> None:
    """A batch of different tiles at different qualities gives what each gives alone."""
    network = codec.coder.network
    qualities = torch.tensor([50, 480, 990])
    y = torch.randn(3, 320, 5, 6, generator=torch.Generator().manual_seed(2)) * 3

    def run(latent: Tensor, quality: Tensor) -> list[tuple[Tensor, Tensor]]:
        coding = network.code((len(latent), 5, 6), quality, latent)
        seen, request = [], next(coding)
        try:
            while True:
                assert request.symbols is not None
                seen.append((request.tables, request.symbols))
                request = coding.send(request.symbols)
        except StopIteration:
            return seen

    with torch.inference_mode():
        together = run(y, qualities)
        for i in range(3):
            alone = run(y[i : i + 1], qualities[i : i + 1])
            for (tables, symbols), (one_tables, one_symbols) in zip(together, alone, strict=True):
                assert torch.equal(tables[i], one_tables[0])
                # The symbols come from the encoder's float side; equal means must give equal ones here.
                assert torch.equal(symbols[i], one_symbols[0])
