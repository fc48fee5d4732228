"""The token model: codebooks, the exact prior of tokens, restoration of lost ones, and a few real steps of training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import synthesise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from calotype.models import perceptual, zoo
from calotype.models.codebook import Codebook, cluster, nearest
from calotype.models.exact import integerise
from calotype.models.restoration import WINDOW, Restorer
from calotype.models.tokens import PASSES, TokenPrior, bits, interleave, ranks
from calotype.models.training import trainer as training
from calotype.models.training import vqgan as vqgan_training
from calotype.models.training.adversary import Adversary
from calotype.models.training.recipe import Recipe, load_recipe
from calotype.models.training.trainer import CHECKPOINT, Trainer
from calotype.models.vqgan import Vqgan, VqganConfig

CPU = torch.device("cpu")
RECIPES = Path(training.__file__).parent / "recipes"


# Codebooks ------------------------------------------------------------------------------------------------------------


def test_clustering_lowers_the_error() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(2000, 3)
    vectors[:1000] *= 0.1
    errors = [
        torch.cdist(vectors, cluster(vectors, 16, iterations=count)).amin(1).square().mean() for count in (0, 2, 20)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_clustering_uses_weights() -> None:
    vectors = torch.tensor([[0.0], [1.0]])
    assert torch.allclose(cluster(vectors, 1, weights=torch.tensor([3.0, 1.0]))[0], torch.tensor([0.25]))


def test_clustering_of_too_few_vectors_repeats_them() -> None:
    vectors = torch.randn(3, 4)
    found = cluster(vectors, 7)
    assert found.shape == (7, 4)
    assert (torch.cdist(found, vectors).amin(1) < 1e-6).all()


def test_nearest_codeword_is_the_nearest() -> None:
    vectors, codewords = torch.randn(3, 9, 6), torch.randn(50, 6)
    assert torch.equal(nearest(vectors, codewords), torch.cdist(vectors.flatten(0, 1), codewords).argmin(1).view(3, 9))


def test_the_map_moves_all_codewords() -> None:
    book = Codebook(16, 4)
    before = book.codewords.detach().clone()
    book(torch.tensor([[[3]]])).sum().backward()
    assert book.map.grad is not None
    with torch.no_grad():
        book.map -= book.map.grad
    assert (book.codewords - before).abs().amin(1).gt(0).float().mean() > 0.9


# Prior ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior() -> TokenPrior:
    torch.manual_seed(0)
    made = TokenPrior((8, 300), embedding=16, hidden=32)
    for head in made.heads:
        torch.nn.init.normal_(head.weight, std=0.3)  # type: ignore[arg-type]
    return made.eval()


def drive(
    prior: TokenPrior, step: int, packet: int, packets: int, tokens: Tensor, *, encode: bool
) -> tuple[Tensor, float, list[Tensor]]:
    """Result, ideal bits and frequencies of coding a packet; a decoder is answered with the true symbols."""
    shape = (tokens.shape[0], tokens.shape[1], tokens.shape[2])
    truth = integerise(prior).code(shape, step, packet, packets, tokens, device=CPU)
    coding = integerise(prior).code(shape, step, packet, packets, tokens if encode else None, device=CPU)
    total, seen = 0.0, []
    try:
        right, request = next(truth), next(coding)
        while True:
            assert right.symbols is not None
            assert (request.symbols is not None) == encode
            seen.append(request.frequencies)
            chosen = request.frequencies.gather(2, right.symbols.long()[..., None])
            total += (24 - chosen.double().log2()).sum().item()
            answer = right.symbols
            right, request = truth.send(answer), coding.send(answer)
    except StopIteration as stop:
        done: Tensor = stop.value
    return done, total, seen


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("packets", [1, 4, 5])
def test_packets_make_up_the_map(prior: TokenPrior, step: int, packets: int) -> None:
    tokens = torch.randint(prior.sizes[step], (2, 9, 14))
    total = torch.zeros_like(tokens)
    for packet in range(packets):
        _, _, ours = drive(prior, step, packet, packets, tokens, encode=True)
        decoded, _, theirs = drive(prior, step, packet, packets, tokens, encode=False)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        own = interleave(9, 14, packets) == packet
        assert not decoded[:, ~own].any()
        total += decoded
    assert torch.equal(total, tokens)


def test_the_integers_cost_what_training_thinks(prior: TokenPrior) -> None:
    tokens = torch.randint(300, (1, 16, 16))
    _, coded, _ = drive(prior, 1, 0, 1, tokens, encode=True)
    rank, estimate = ranks(16, 16), 0.0
    with torch.inference_mode():
        for number in range(PASSES):
            known = (rank < number)[None]
            estimate += bits(prior(tokens, known, 1), tokens)[0][rank == number].sum().item()
    assert coded == pytest.approx(estimate, rel=0.005)


@given(st.lists(st.integers(-3000, 3000), min_size=2, max_size=40))
def test_frequencies_are_a_table(logits: list[int]) -> None:
    made = TokenPrior((8,), embedding=1, hidden=1).frequencies(torch.tensor(logits).float())
    assert made.sum() == 2**24
    assert made.min() >= 1
    assert made[-1] >= 2
    better = torch.tensor(logits[:-1]).argsort(stable=True)
    assert (made[:-1][better].diff() >= 0).all(), "a larger logit has no smaller frequency"


@pytest.mark.parametrize("packets", [2, 4, 5, 8])
def test_neighbours_lie_in_different_packets(packets: int) -> None:
    own = interleave(20, 20, packets)
    assert own.unique().numel() == packets
    assert (own[1:] != own[:-1]).all()
    assert (own[:, 1:] != own[:, :-1]).all()
    counts = own.flatten().bincount(minlength=packets)
    assert counts.max() - counts.min() <= 20


def test_every_token_has_one_pass() -> None:
    rank = ranks(8, 8)
    assert rank.flatten().bincount(minlength=PASSES).tolist() == [4, 4, 8, 16, 32]


# Restoration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (21, 33)])
def test_restoration_leaves_what_is_known(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    restorer, codebook = Restorer(6, hidden=24, layers=2, heads=2).eval(), torch.randn(20, 6)
    codewords, known = torch.randn(2, 6, *size), torch.rand(2, *size) > 0.3
    with torch.inference_mode():
        out = restorer(codewords, known, codebook)
        other = restorer(torch.where(known[:, None], codewords, torch.randn(2, 6, *size)), known, codebook)
    mask = known[:, None].expand_as(out)
    assert torch.equal(out[mask], codewords[mask])
    assert (out[~mask] != codewords[~mask]).any()
    assert torch.equal(out, other), "what is lost must not be seen"


def test_restoration_looks_around() -> None:
    torch.manual_seed(2)
    restorer, codebook = Restorer(6, hidden=24, layers=2, heads=2).eval(), torch.randn(20, 6)
    known = torch.ones(1, WINDOW, WINDOW, dtype=torch.bool)
    known[0, 8, 8] = False
    a = torch.randn(1, 6, WINDOW, WINDOW)
    b = a.clone()
    b[:, :, 8, 9] += 3
    with torch.inference_mode():
        assert not torch.equal(*(restorer(x, known, codebook)[:, :, 8, 8] for x in (a, b)))


# Network --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Vqgan:
    torch.manual_seed(3)
    return Vqgan(VqganConfig(ladder=(8, 64))).eval()


def test_a_step_of_the_ladder_is_a_part_of_the_range() -> None:
    five = Vqgan()
    assert [five.ladder_step(q) for q in (0, 199, 200, 999, 1000)] == [0, 0, 1, 4, 4]


def test_tokens_draw_a_picture(network: Vqgan) -> None:
    x = torch.rand(1, 3, 64, 96) - 0.5
    with torch.inference_mode():
        tokens = network.analyse(x, 1)
        steps = torch.tensor([1])
        drawn = network.synthesise(network.embed(tokens, 1), steps)
        trained = network(x, steps).x_hat
        half = network.synthesise(network.embed(tokens, 1), steps, scale=2)
    assert tokens.shape == (1, 4, 6)
    assert torch.allclose(drawn, trained, atol=1e-4)
    assert torch.allclose(half, torch.nn.functional.avg_pool2d(drawn, 2), atol=1e-5)


def test_the_halo_covers_what_synthesis_sees(network: Vqgan) -> None:
    side = 2 * network.halo + 1
    codewords = torch.randn(1, 64, side + 2, side + 2)
    changed = codewords.clone()
    changed[:, :, 0] += 1
    with torch.inference_mode():
        a, b = (network.synthesise(c, torch.tensor([0])) for c in (codewords, changed))
    row = 16 * (network.halo + 1)
    assert not torch.equal(a[:, :, :16], b[:, :, :16])
    assert torch.allclose(a[:, :, row:], b[:, :, row:], atol=1e-6)


def test_gradients_pass_through_the_codebook(network: Vqgan) -> None:
    x = (torch.rand(2, 3, 32, 32) - 0.5).requires_grad_()
    out = network(x, torch.tensor([0, 1]))
    out.x_hat.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        Image.fromarray(synthesise(256, 272, seed=number)).save(folder / f"{number}.png")
    return folder


def load(name: str, photos: Path, output: Path, *overrides: str) -> Recipe:
    common = (
        f"train={photos}", f"validation={photos}", f"output={output}", "decay_steps=1", "batch=2", "crop=128",
        "log_every=10", "validation_items=1", "warmup_steps=1",
    )  # fmt: skip
    return load_recipe(RECIPES / f"{name}.yaml", [*common, *overrides])


@pytest.fixture(scope="module")
def pictures(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of four steps, two of them against the discriminator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqgan_training, "SEEDS", 500)
        output = tmp_path_factory.mktemp("run")
        trainer = Trainer(
            load("vqgan", photos, output, "steps=4", "recluster=[1]", "adversarial_from=1"), CPU, resume=False
        )
        assert len(trainer.run().points) == 5
    return trainer


def test_the_discriminator_is_part_of_the_checkpoint(pictures: Trainer, photos: Path) -> None:
    resumed = Trainer(pictures.recipe, CPU, resume=True)
    ours, theirs = (t.task.stateful["discriminator"].state_dict() for t in (pictures, resumed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert resumed.task.stateful["adversary"].state_dict()["state"], "the discriminator has learnt"


def test_the_prior_is_trained_on_finished_tokens(pictures: Trainer, photos: Path, tmp_path: Path) -> None:
    checkpoint = pictures.recipe.output / CHECKPOINT
    tokens = Trainer(load("vqgan-tokens", photos, tmp_path, "steps=3", f"start_from={checkpoint}"), CPU, resume=False)
    before = {name: p.detach().clone() for name, p in tokens.model.named_parameters()}
    result = tokens.run()
    assert result.measure == "share"
    assert all(0 < share < 1.5 and math.isfinite(bpp) for bpp, share in result.points)
    moved = {name.partition(".")[0] for name, p in tokens.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"prior", "restorer"}
    reference = pictures.model.state_dict()["codebooks.4.basis"]
    assert torch.equal(tokens.model.state_dict()["codebooks.4.basis"], reference)


def test_the_synthesis_is_trained_alone(pictures: Trainer, photos: Path, tmp_path: Path) -> None:
    checkpoint = pictures.recipe.output / CHECKPOINT
    changes = ("steps=2", "look=64", f"start_from={checkpoint}")
    synthesis = Trainer(load("vqgan-synthesis", photos, tmp_path, *changes), CPU, resume=False)
    before = {name: p.detach().clone() for name, p in synthesis.model.named_parameters()}
    synthesis.run()
    moved = {name for name, p in synthesis.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("dec_") for name in moved)


@pytest.mark.parametrize("adversarial_from", ["1", "null"])
def test_a_loss_that_means_something_else_is_no_divergence(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adversarial_from: str
) -> None:
    monkeypatch.setattr(vqgan_training, "SEEDS", 500)
    monkeypatch.setattr(training, "DIVERGENCE", 1e-9)  # the second value of one phase is always too large
    changes = ["steps=2", "log_every=1", f"adversarial_from={adversarial_from}"]
    trainer = Trainer(load("vqgan", photos, tmp_path, *changes), CPU, resume=False)
    if adversarial_from == "null":
        with pytest.raises(training.TrainingDivergedError):
            trainer.run()
    else:
        trainer.run()
        assert trainer.task.phase == 1


def test_the_log_says_what_was_trained(pictures: Trainer) -> None:
    lines = (pictures.recipe.output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    assert [round(bpp, 4) for bpp, _ in last["points"]] == [0.0117, 0.0234, 0.0312, 0.0391, 0.0469]


def test_the_discriminator_learns_and_pushes() -> None:
    torch.manual_seed(4)
    adversary = Adversary(CPU, bf16=False)
    real, drawn = torch.rand(4, 3, 64, 64) - 0.5, torch.zeros(4, 3, 64, 64)
    for _ in range(10):
        adversary.learn(real, drawn)
    with torch.inference_mode():
        assert adversary.network(real).mean() > adversary.network(drawn).mean()
    others = torch.randn(4, 3, 64, 64)
    push = adversary.push(drawn.clone().requires_grad_(), others)
    assert push.norm() == pytest.approx(0.3 * others.norm().item(), rel=1e-3)
    with torch.inference_mode():
        moved = drawn - 0.05 * push / push.abs().max()
        assert adversary.network(moved).mean() > adversary.network(drawn).mean()


def test_the_perceptual_distance_can_be_descended() -> None:
    a = torch.from_numpy(synthesise(64, 64)).permute(2, 0, 1)[None].float() / 255 - 0.5
    x = (a + 0.1 * torch.randn_like(a)).requires_grad_()
    reference = perceptual.features(a)
    first = perceptual.distance(reference, perceptual.features(x))
    (gradient,) = torch.autograd.grad(first.sum(), x)
    with torch.no_grad():
        second = perceptual.distance(reference, perceptual.features(x - 0.02 * gradient / gradient.abs().max()))
    assert 0 < second.item() < first.item()
    assert perceptual.distance(reference, reference).item() == 0


def test_shipped_weights_can_be_trained_on(network: Vqgan, tmp_path: Path) -> None:
    zoo.save(network, tmp_path / "vqgan.safetensors")
    again = Vqgan(network.config)
    zoo.load_parameters(again, tmp_path / "vqgan.safetensors")
    tokens = torch.randint(64, (1, 6, 6))
    known = torch.rand(1, 6, 6) > 0.5
    with torch.inference_mode():
        assert torch.allclose(again.eval().prior(tokens, known, 1), network.prior(tokens, known, 1), atol=0.5)
        assert torch.allclose(again.codebook(1).codewords, network.codebook(1).codewords, atol=0.01)
