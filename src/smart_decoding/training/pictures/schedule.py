"""What the stages of the training share: a rate by step, checkpoints that it goes on from, and several processes that
each take a part of every step (`torchrun`): on a busy machine they lose less time than threads that wait for one
another.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from smart_decoding.files import whole
from smart_decoding.training.interrupt import DeferredInterrupt


class Workers:
    """The processes of this training: this one alone, or those that `torchrun` started."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(days=1))

    def average(self, parameters: list[nn.Parameter], asked: bool) -> bool:
        """Averages the gradients; returns whether any process was asked to stop."""
        if self.count == 1:
            return asked
        found = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in found] + [torch.tensor([float(asked)])])
        distributed.all_reduce(flat)
        for grad, part in zip(found, flat[:-1].div_(self.count).split([g.numel() for g in found]), strict=True):
            grad.copy_(part.view_as(grad))
        return bool(flat[-1] > 0)


@dataclass(slots=True)
class Stage:
    """A training loop of `steps` steps: `loss` gets an index, new at each step and in each process, as its seed.

    `modules` are what is trained and saved; `rates` gives one learning rate to each."""

    name: str
    steps: int
    modules: dict[str, nn.Module]
    rates: dict[str, float]
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]]
    warm_up: int = 100
    weight_decay: float = 0.01
    save_every: float = 60.0  # seconds

    def run(self, folder: Path) -> None:
        """Trains from the checkpoint in `folder` on, if there is one; raises KeyboardInterrupt after saving."""
        folder.mkdir(parents=True, exist_ok=True)
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "peak": self.rates[name]}
            for name, module in self.modules.items()
        ]
        optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        workers, (step, seconds) = Workers(), self._resume(folder, optimiser)
        last_saved = last_said = time.monotonic()
        stop = False
        with DeferredInterrupt() as interrupt:
            while step < self.steps and not stop:
                started = time.monotonic()
                figures, stop = self._step(step, optimiser, workers, interrupt)
                step += 1
                seconds += time.monotonic() - started
                if workers.rank:
                    continue
                if step == self.steps or time.monotonic() - last_said > 10:
                    said = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
                    print(f"{self.name} step {step} of {self.steps}, {seconds:.0f} s: {said}", flush=True)
                    last_said = time.monotonic()
                if stop or step == self.steps or time.monotonic() - last_saved > self.save_every:
                    self._save(folder, optimiser, step, seconds)
                    last_saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt

    def _step(
        self, step: int, optimiser: torch.optim.Optimizer, workers: Workers, interrupt: DeferredInterrupt
    ) -> tuple[dict[str, float], bool]:
        warm, progress = min(1.0, (step + 1) / self.warm_up), step / self.steps
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        loss, figures = self.loss(step * workers.count + workers.rank)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        stop = workers.average(parameters, interrupt.asked)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return {"loss": float(loss.detach()), **figures}, stop

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.name}.pt"

    def _save(self, folder: Path, optimiser: torch.optim.Optimizer, step: int, seconds: float) -> None:
        state = {name: trained(module) for name, module in self.modules.items()}
        with whole(self._path(folder)) as path:
            torch.save({"step": step, "seconds": seconds, "modules": state, "optimiser": optimiser.state_dict()}, path)

    def _resume(self, folder: Path, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
        if not self._path(folder).is_file():
            return 0, 0.0
        state: dict[str, Any] = torch.load(self._path(folder), weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name], strict=False)
        if state["step"] < self.steps:
            optimiser.load_state_dict(state["optimiser"])
        return int(state["step"]), float(state["seconds"])


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module that are trained, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
