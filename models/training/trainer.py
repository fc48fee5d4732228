"""The training loop: rate-distortion loss over all qualities at once, EMA, checkpoints, resume, one or several devices.

Several GPUs: `torchrun --nproc-per-node N -m calotype.cli train RECIPE`; gradients are averaged over the processes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calotype.models.training.optim import build_optimizers
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Validation, make_task

CHECKPOINT = "checkpoint.pt"
PREVIOUS_CHECKPOINT = "checkpoint.previous.pt"
DIVERGENCE = 1.3
"""A mean loss this many times above the best one ends the run, before it replaces a good checkpoint."""


class TrainingDivergedError(RuntimeError):
    """The loss has risen so far that going on would waste time and overwrite good checkpoints."""


class Trainer:
    """One run of a recipe. `run` returns when all steps are done; a killed run goes on from its last checkpoint."""

    def __init__(self, recipe: Recipe, device: torch.device, *, resume: bool) -> None:
        self.recipe, self.device = recipe, device
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1 and recipe.hours is not None:
            raise ValueError("processes would not end at the same step: leave out hours, or train with one")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.manual_seed(recipe.seed + self.rank)
        recipe.output.mkdir(parents=True, exist_ok=True)
        checkpoint = recipe.output / CHECKPOINT
        state = torch.load(checkpoint, map_location=device, weights_only=True) if resume and checkpoint.exists() else {}
        # A resumed run goes on with other batches than it began with.
        self.step, self.seconds = state.get("step", 0), 0.0
        self.task = make_task(recipe, device, recipe.seed + 1000003 * self.rank + 7919 * self.step, self.step)
        self.model = self.task.model
        self.optimizers = build_optimizers(self.model, muon_lr=recipe.muon_lr, adam_lr=recipe.adam_lr)
        self.ema = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        if state:
            self._restore(state)

    # State ------------------------------------------------------------------------------------------------------------

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seconds = state["seconds"]
        for name, part in self.task.stateful.items():
            part.load_state_dict(state["task"][name])
        torch.set_rng_state(state["rng"].cpu())

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the old one."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "task": {name: part.state_dict() for name, part in self.task.stateful.items()},
            "step": self.step,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
        }
        path = self.recipe.output / CHECKPOINT
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        if path.exists():
            os.replace(path, self.recipe.output / PREVIOUS_CHECKPOINT)
        os.replace(temporary, path)

    def _log(self, **record: Any) -> None:
        if self.rank:
            return
        line = json.dumps({"step": self.step, "hours": round(self.seconds / 3600, 4), **record})
        with (self.recipe.output / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        print(line, flush=True)

    # Loop -------------------------------------------------------------------------------------------------------------

    def _learning_rate(self) -> float:
        r = self.recipe
        warm = min(1.0, (self.step + 1) / max(1, r.warmup_steps))
        left = (1 - self._progress()) * r.steps / max(1, r.decay_steps)
        return warm * min(1.0, left)

    def _progress(self) -> float:
        """Share of the run that is over; 1 ends it."""
        r = self.recipe
        return max(self.step / r.steps, 0.0 if r.hours is None else self.seconds / (3600 * r.hours))

    def run(self) -> Validation:
        """Train to the end; returns the validation of the averaged weights. Raises TrainingDivergedError."""
        torch.set_flush_denormal(True)  # tiny gradients would slow a CPU down several times
        try:
            return self._run()
        finally:
            torch.set_flush_denormal(False)

    def _run(self) -> Validation:
        r = self.recipe
        forward: Callable[..., Any] = self.model
        if self.world > 1:
            forward = nn.parallel.DistributedDataParallel(self.model)
        if r.compile:
            forward = torch.compile(forward)
        bases = (r.muon_lr, r.adam_lr)
        started, base_seconds = time.monotonic(), self.seconds
        saved = started
        sums, counted, best, phase = torch.zeros(3, device=self.device), 0, math.inf, self.task.phase
        while self._progress() < 1:
            factor = self._learning_rate()
            for optimizer, base in zip(self.optimizers, bases, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * factor
            sums += self._train_step(forward)
            counted += 1
            self.step += 1
            self.seconds = base_seconds + time.monotonic() - started
            if self.step % r.log_every == 0:
                loss, bpp, mse = (sums / counted).tolist()
                drawn = {} if math.isnan(mse) else {"psnr": round(-10 * math.log10(mse), 3)}
                self._log(loss=round(loss, 5), bpp=round(bpp, 4), **drawn, lr=round(factor, 4))
                sums.zero_()
                counted = 0
                if self.task.phase != phase:
                    best, phase = math.inf, self.task.phase
                if not loss < DIVERGENCE * best:
                    raise TrainingDivergedError(
                        f"the loss rose to {loss:.3g} at step {self.step}: lower the learning rates and go on from "
                        f"{PREVIOUS_CHECKPOINT}"
                    )
                best = min(best, loss)
            if time.monotonic() - saved > 60 * r.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
            if self.step % r.validate_every == 0 and self._progress() < 1:
                self._validate_ema()
        self.save()
        return self._validate_ema()

    def _train_step(self, forward: Callable[..., Any]) -> Tensor:
        """Loss, bpp and squared error, on the device: whoever reads them waits for it.

        A gradient that is not finite counts as zero.
        """
        loss, bpp, mse = self.task.losses(forward)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for p in self.model.parameters():
            if p.grad is not None:  # clipping makes nothing but zeros and NaN of a gradient that is not finite
                p.grad.nan_to_num_(0.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.recipe.ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            torch._foreach_lerp_([self.ema[name] for name in own], list(own.values()), 1 - decay)
        return torch.stack([loss, bpp, torch.full_like(loss, math.nan) if mse is None else mse]).detach().float()

    def _validate_ema(self) -> Validation:
        current = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.model.load_state_dict(self.ema, strict=False)
        self.model.eval()
        result = self.task.validate()
        self.model.train()
        self.model.load_state_dict(current, strict=False)
        self._log(validation=round(result.loss, 5), points=[[round(b, 4), round(p, 3)] for b, p in result.points])
        return result
