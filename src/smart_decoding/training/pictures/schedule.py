"""What the stages of the training share: a rate by step, and checkpoints that it goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smart_decoding.files import whole
from smart_decoding.training.interrupt import DeferredInterrupt

COOL_DOWN = 0.3  # share of the steps in which the rate falls to nothing


@dataclass(slots=True)
class Stage:
    """A training loop of `steps` steps: `loss` gets the step, which is its seed.

    `modules` are what is trained and saved. The rate is constant, but for the first `warm_up` steps and the last ones
    (COOL_DOWN), so that a training can be given more steps, or fewer, when it goes on."""

    name: str
    steps: int
    modules: dict[str, nn.Module]
    rate: float
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]]
    warm_up: int = 50
    weight_decay: float = 0.01
    save_every: float = 60.0  # seconds

    def run(self, folder: Path) -> None:
        """Trains from the checkpoint in `folder` on, if there is one; raises KeyboardInterrupt after saving."""
        folder.mkdir(parents=True, exist_ok=True)
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        step, seconds = self._resume(folder, optimiser)
        last_saved = last_said = time.monotonic()
        with DeferredInterrupt() as interrupt:
            while step < self.steps and not interrupt.asked:
                started = time.process_time()
                figures = self._step(step, optimiser)
                step += 1
                seconds += time.process_time() - started
                if step == self.steps or time.monotonic() - last_said > 10:
                    said = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
                    print(f"{self.name} step {step} of {self.steps}, {seconds:.0f} CPU s: {said}", flush=True)
                    last_said = time.monotonic()
                if interrupt.asked or step == self.steps or time.monotonic() - last_saved > self.save_every:
                    self._save(folder, optimiser, step, seconds)
                    last_saved = time.monotonic()
        if step < self.steps:
            raise KeyboardInterrupt

    def _step(self, step: int, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        (group,) = optimiser.param_groups
        group["lr"] = self.rate * min(1.0, (step + 1) / self.warm_up, (self.steps - step) / (COOL_DOWN * self.steps))
        loss, figures = self.loss(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimiser.step()
        return {"loss": float(loss.detach()), **figures}

    def _save(self, folder: Path, optimiser: torch.optim.Optimizer, step: int, seconds: float) -> None:
        state = {name: trained(module) for name, module in self.modules.items()}
        with whole(_path(folder, self.name)) as path:
            torch.save({"step": step, "seconds": seconds, "modules": state, "optimiser": optimiser.state_dict()}, path)

    def _resume(self, folder: Path, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
        if not _path(folder, self.name).is_file():
            return 0, 0.0
        state = load_trained(folder, self.name, self.modules)
        if state["step"] < self.steps:
            optimiser.load_state_dict(state["optimiser"])
        return int(state["step"]), float(state["seconds"])


def _path(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.pt"


def load_trained(folder: Path, stage: str, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Gives modules what a stage saved of them; returns its whole checkpoint."""
    state: dict[str, Any] = torch.load(_path(folder, stage), weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name], strict=False)
    return state


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module that are trained, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
