"""Training of the video model: rollouts over clips with the model's own decoded frames as references."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from calotype.models import tables, zoo
from calotype.models.exact import integerise
from calotype.models.hyperprior import Hyperprior
from calotype.models.motion import Planes, Reference, compensate, fit_tables, search
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.training.clips import (
    RandomSegments,
    Segment,
    count_vectors,
    find_clips,
    load_clips,
    load_frames,
    to_planes,
)
from calotype.models.training.counting import SymbolCounts
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Forward, Losses, Task, Validation, loss_per_sample
from calotype.models.video import (
    STRIDE,
    FrameRates,
    Memory,
    Video,
    frame_psnr,
    quality_offset,
    search_cost,
    shuffle,
    unshuffle,
)

VALIDATION_QUALITIES = (0.2, 0.45, 0.7)
VALIDATION_FRAMES = 7
QUALITY_JITTER = 0.08
FITTED_FRAMES = 9
GOLDEN_RATIO = (5**0.5 - 1) / 2
CHROMA_WEIGHT = (7.6, 1.2)
"""Of each chroma plane against 6 of luma, at the lowest and at the highest quality."""

# Y'CbCr of BT.601 in its limited range to RGB, both in [-0.5, 0.5]: the training clips are tagged so.
_RGB_OF_YUV = torch.tensor([[1.1644, 0.0, 1.5960], [1.1644, -0.3918, -0.8130], [1.1644, 2.0172, 0.0]])
_BLACK = 16 / 255


def to_rgb(frame: Planes) -> Tensor:
    """RGB [B, 3, H, W], unclamped, from Y'CbCr 4:2:0 of BT.601 in its limited range."""
    chroma = frame.chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    ycc = torch.cat([frame.luma + 0.5 - _BLACK, chroma - 0.5 / 255], 1)
    return torch.einsum("rc,bchw->brhw", _RGB_OF_YUV.to(ycc.device), ycc) - 0.5


def from_rgb(rgb: Tensor) -> Planes:
    """The inverse of `to_rgb`; chroma is the mean of 2 x 2 pixels."""
    ycc = torch.einsum("rc,bchw->brhw", torch.linalg.inv(_RGB_OF_YUV).to(rgb.device), rgb + 0.5)
    return Planes(ycc[:, :1] - 0.5 + _BLACK, torch.nn.functional.avg_pool2d(ycc[:, 1:], 2) + 0.5 / 255)


def frame_error(a: Planes, b: Planes, t: Tensor) -> Tensor:
    """Mean squared error [B] of luma, plus those of both chroma planes with the weights that PSNR-YUV gives them.

    PSNR-YUV is (6 Y + U + V) / 8 in decibels: what an error costs is its share of its own plane's error. Chroma errs
    some seven times less than luma at the lowest qualities, and hardly at the highest.
    """
    luma = (a.luma - b.luma).square().mean((1, 2, 3))
    chroma = (a.chroma - b.chroma).square().mean((2, 3)).sum(1)
    lowest, highest = CHROMA_WEIGHT
    return (6 * luma + (lowest + (highest - lowest) * t) * chroma) / 8


@torch.no_grad()
def start_from_image_model(video: Video, image: Hyperprior) -> None:
    """Take over the transforms and the prior of the image model, with the colour conversion folded in.

    A residual in Y'CbCr 4:2:0 is a linear function of one in RGB and back, so the first and last layers of the image
    model, composed with that function, do the same work on the video's samples.
    """
    own, other = video.state_dict(), image.state_dict()
    for key, value in other.items():
        if key not in own:
            continue
        if own[key].shape == value.shape:
            own[key].copy_(value)
        elif key.startswith("prior.hyper_second.enter"):
            own[key].zero_()
            own[key][:, -value.shape[1] :] = value
        elif key == "prior.hyper_first.bias":
            own[key].copy_(value)
    for factor, enter, leave in ((8, "enc_in", "dec_out"), (STRIDE, "enc_linear", "dec_linear")):
        rgb_of_yuv, yuv_of_rgb = _colour_matrices(factor)
        own[f"{enter}.weight"].copy_(
            torch.einsum("or,ry->oy", other[f"{enter}.weight"][..., 0, 0], rgb_of_yuv)[..., None, None]
        )
        own[f"{leave}.weight"].copy_(
            torch.einsum("yr,ri->yi", yuv_of_rgb, other[f"{leave}.weight"][..., 0, 0])[..., None, None]
        )
    own["dec_out.bias"].copy_(_colour_matrices(8)[1] @ other["dec_out.bias"])


def _colour_matrices(factor: int) -> tuple[Tensor, Tensor]:
    """The linear parts of `to_rgb` (with chroma repeated) and `from_rgb` on blocks: [3 f², 1.5 f²] and back."""
    count = factor**2 * 3 // 2
    frame = shuffle(torch.eye(count)[..., None, None], factor)
    chroma = frame.chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    rgb = torch.einsum("rc,bchw->brhw", _RGB_OF_YUV, torch.cat([frame.luma, chroma], 1))
    forward = torch.nn.functional.pixel_unshuffle(rgb, factor)[..., 0, 0].t()
    unit = torch.nn.functional.pixel_shuffle(torch.eye(3 * factor**2)[..., None, None], factor)
    ycc = torch.einsum("rc,bchw->brhw", torch.linalg.inv(_RGB_OF_YUV), unit)
    back = unshuffle(Planes(ycc[:, :1], torch.nn.functional.avg_pool2d(ycc[:, 1:], 2)), factor)[..., 0, 0].t()
    return forward, back


def key_frame_model(video: zoo.ModelSpec) -> Hyperprior:
    """The shipped model, in floats, that codes the key frames of a video model."""
    assert video.key_frames is not None
    image = Hyperprior()
    zoo.load_parameters(image, zoo.describe(video.key_frames).weights)
    return image.eval().requires_grad_(False)


@torch.no_grad()
def code_key_frame(image: Hyperprior, frame: Planes, t: Tensor) -> tuple[Planes, Tensor, Tensor]:
    """Decoded frame, latent in steps, and estimated bits [B] of a key frame."""
    y = image.analyse(to_rgb(frame), t)
    y_hat, y_bits, z_bits = image.prior(image.hyper_analysis(y), y, t)
    decoded = from_rgb(image.synthesise(y_hat, t))
    return Planes(decoded.luma.clamp(-0.5, 0.5), decoded.chroma.clamp(-0.5, 0.5)), y_hat, y_bits + z_bits


@torch.inference_mode()
def fit_prior(video: Video, image: Hyperprior, folder: Path) -> None:
    """Put what is coded of the clips below `folder` in place of the Gaussians of `video.prior`.

    Of each clip the first frames, at a quality of its own; the qualities fill their range evenly.
    """
    network = integerise(video)
    counts = SymbolCounts(video.prior.tables.half_widths, 0)
    for number, path in enumerate(find_clips(folder)):
        luma, chroma = load_frames(path, FITTED_FRAMES)
        base = round(number * GOLDEN_RATIO % 1 * QUALITY_STEPS)
        _, t = _quality(base + quality_offset(0))
        reference, latent, _ = code_key_frame(image, to_planes(luma[:1], chroma[:1]), t)
        key = torch.round(latent * tables.MEAN_UNIT)
        shape = (1, *key.shape[2:])
        field = torch.zeros(1, 2, 2 * shape[1], 2 * shape[2], dtype=torch.int64)
        memory = Memory(torch.zeros_like(key), key, torch.ones(1))
        for place in range(1, len(luma)):
            quality, t = _quality(base + quality_offset(place))
            x = to_planes(luma[place : place + 1], chroma[place : place + 1])
            source, last_field = Reference(reference), field
            field = search(x, source, search_cost(t), last_field)
            prediction = compensate(source, field)
            context = video.context(prediction)
            y = video.analyse(x, prediction, context, t)
            field, latent = counts.of(network.code(shape, quality, memory, last_field, field, y))
            reference = video.synthesise(video.dequantise(latent).contiguous(), prediction, context, t)
            memory = Memory(latent, key, torch.zeros(1))
    video.prior.frequencies.copy_(tables.fitted_frequencies(counts.rows))


def _quality(step: int) -> tuple[Tensor, Tensor]:
    """A quality in range, as the integer [1] of coding and in [0, 1]."""
    integer = torch.tensor([min(max(step, 0), QUALITY_STEPS)])
    return integer, integer.float() / QUALITY_STEPS


class Rollouts:
    """A batch of clips under way: each slot decodes its segment frame by frame, then starts another.

    The slots are out of phase, so that each batch holds frames of every distance from their key frame, and references
    carry the errors that the model itself has made.
    """

    def __init__(self, segments: RandomSegments, image: Hyperprior, *, batch: int, device: torch.device) -> None:
        self.segments, self.image, self.device = segments, image.eval(), device
        self.batch = batch
        self.segment: list[Segment] = [next(segments) for _ in range(batch)]
        self.position = [0] * batch
        self.quality = torch.rand(batch)
        side = segments.crop
        self.reference = Planes(torch.zeros(batch, 1, side, side), torch.zeros(batch, 2, side // 2, side // 2))
        latent = image.config.latent
        shape = (batch, latent, side // STRIDE, side // STRIDE)
        self.memory = Memory(torch.zeros(shape), torch.zeros(shape), torch.ones(batch))
        for slot in range(batch):
            self._restart(slot)
            # Out of phase from the beginning.
            self.position[slot] = 1 + slot * (segments.frames - 1) // batch

    def _restart(self, slot: int) -> None:
        segment = self.segment[slot] = next(self.segments)
        self.position[slot] = 1
        t = torch.rand(1)
        self.quality[slot] = t
        better = (t + quality_offset(0) / QUALITY_STEPS).clamp(max=1)
        decoded, latent, _ = code_key_frame(self.image, to_planes(segment.luma[:1], segment.chroma[:1]), better)
        self.reference.luma[slot] = decoded.luma[0]
        self.reference.chroma[slot] = decoded.chroma[0]
        self.memory.previous[slot] = 0
        self.memory.key[slot] = latent[0]
        self.memory.first[slot] = 1

    def __next__(self) -> tuple[Planes, Planes, Tensor, Memory, Tensor]:
        """Frame, prediction, field, memory, quality [B]: the arguments of `Video.forward`."""
        for slot in range(self.batch):
            if self.position[slot] == self.segments.frames:
                self._restart(slot)
        frames = [
            to_planes(s.luma[p : p + 1], s.chroma[p : p + 1]) for s, p in zip(self.segment, self.position, strict=True)
        ]
        x = Planes(torch.cat([f.luma for f in frames]), torch.cat([f.chroma for f in frames]))
        field = torch.stack([s.fields[p] for s, p in zip(self.segment, self.position, strict=True)]).long()
        with torch.no_grad():
            prediction = compensate(Reference(self.reference), field)
        # Frames of a video differ in quality: some are worth more than others, and rate control moves it.
        pattern = torch.tensor([quality_offset(place) / QUALITY_STEPS for place in self.position])
        moved = QUALITY_JITTER * (2 * torch.rand(self.batch) - 1) * (torch.rand(self.batch) < 0.25)
        return x, prediction, field, self.memory, (self.quality + pattern + moved).clamp(0, 1)

    def advance(self, out: FrameRates) -> None:
        """Make the decoded frames the next references."""
        self.reference = Planes(out.frame.luma.detach().float(), out.frame.chroma.detach().float())
        self.memory = Memory(out.latent.detach(), self.memory.key, torch.zeros_like(self.memory.first))
        self.position = [p + 1 for p in self.position]


class ClipTask(Task):
    """Clips for `video`. See `tasks.Task`."""

    def __init__(self, recipe: Recipe, device: torch.device, seed: int) -> None:
        self.recipe, self.device = recipe, device
        self.image = key_frame_model(zoo.describe(recipe.model)).to(device)
        video = Video()
        if recipe.start_from is None:
            start_from_image_model(video, self.image)
        else:
            zoo.load_parameters(video, recipe.start_from)
        self.model: nn.Module = video.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        clips = load_clips(recipe.train, recipe.output / "fields.pt")
        video.motion_frequencies.copy_(fit_tables(count_vectors(c.fields for c in clips)))
        segments = RandomSegments(clips, frames=recipe.frames, crop=recipe.crop, seed=seed)
        self.rollouts = Rollouts(segments, self.image, batch=recipe.batch, device=device)
        paths = find_clips(recipe.validation)[: recipe.validation_items]
        self.clips = [load_frames(p, VALIDATION_FRAMES) for p in paths]

    def losses(self, forward: Forward) -> Losses:
        r = self.recipe
        x, prediction, field, memory, t = next(self.rollouts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
            out = forward(x, prediction, field, memory, t)
        self.rollouts.advance(out)
        bpp = (out.latent_bits + out.hyper_bits) / r.crop**2
        mse = frame_error(out.frame, x, t)
        return Losses(loss_per_sample(bpp, mse, t, r.rate_weighting).mean(), bpp.mean(), mse.mean())

    @torch.no_grad()
    def validate(self) -> Validation:
        """Predicted frames only: rate without motion, PSNR-YUV, with motion found on decoded references."""
        points, losses = [], []
        for quality in VALIDATION_QUALITIES:
            t = torch.tensor([quality], device=self.device)
            results = [self._validate_clip(luma, chroma, t) for luma, chroma in self.clips]
            points.append((sum(r[0] for r in results) / len(results), sum(r[1] for r in results) / len(results)))
            losses += [r[2] for r in results]
        return Validation(tuple(points), sum(losses) / len(losses))

    def _validate_clip(self, luma: Tensor, chroma: Tensor, t: Tensor) -> tuple[float, float, float]:
        """Mean bpp, PSNR and loss of the predicted frames of a clip."""
        frames = [to_planes(luma[i : i + 1], chroma[i : i + 1]) for i in range(len(luma))]
        reference, latent, _ = code_key_frame(self.image, frames[0], t)
        memory = Memory(torch.zeros_like(latent), latent, torch.ones(1))
        field: Tensor | None = None
        rates, psnrs, losses = [], [], []
        for x in frames[1:]:
            source = Reference(reference)
            field = search(x, source, search_cost(t), field)
            out = self.model(x, compensate(source, field), field, memory, t)
            reference, memory = out.frame, Memory(out.latent, latent, torch.zeros(1))
            bpp, mse = (out.latent_bits + out.hyper_bits) / x.luma.numel(), frame_error(reference, x, t)
            rates.append(bpp.item())
            psnrs.append(frame_psnr(reference, x))
            losses.append(loss_per_sample(bpp, mse, t, self.recipe.rate_weighting).item())
        count = len(rates)
        return sum(rates) / count, sum(psnrs) / count, sum(losses) / count
