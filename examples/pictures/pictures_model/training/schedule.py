"""What the stages of the training share: a rate by step, and checkpoints that it goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smart_decoding.files import whole
from smart_decoding.training.interrupt import deferred_interrupt

COOL_DOWN = 0.3  # share of the steps in which the rate falls to nothing


@dataclass(slots=True)
class Stage:
    """A training loop of `steps` steps: `loss` gets the step, which is its seed.

    `modules` are what is trained and saved. The rate is constant, but for the first `warm_up` steps
    and the last ones (COOL_DOWN), so that a training can be given more steps, or fewer, when it
    goes on. `matrices`, some of the modules' parameters, are moved by Muon at twice the rate, all
    others by AdamW."""

    name: str
    steps: int
    modules: dict[str, nn.Module]
    rate: float
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]]
    matrices: Sequence[nn.Parameter] = ()
    warm_up: int = 50
    weight_decay: float = 0.01
    save_every: float = 60.0  # seconds

    def run(self, folder: Path) -> None:
        """Trains from the checkpoint in `folder` on, if there is one; raises KeyboardInterrupt
        after saving."""
        folder.mkdir(parents=True, exist_ok=True)
        optimisers = self._optimisers()
        step, seconds = self._resume(folder, optimisers)
        last_saved = last_said = time.monotonic()
        with deferred_interrupt() as interrupt:
            while step < self.steps and not interrupt.is_set():
                started = time.process_time()
                figures = self._step(step, optimisers)
                step += 1
                seconds += time.process_time() - started
                if step == self.steps or time.monotonic() - last_said > 10:
                    said = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
                    print(
                        f"{self.name} step {step} of {self.steps}, {seconds:.0f} CPU s: {said}",
                        flush=True,
                    )
                    last_said = time.monotonic()
                if (
                    interrupt.is_set()
                    or step == self.steps
                    or time.monotonic() - last_saved > self.save_every
                ):
                    self._save(folder, optimisers, step, seconds)
                    last_saved = time.monotonic()
        if step < self.steps:
            raise KeyboardInterrupt

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        matrices = {id(p) for p in self.matrices}
        parameters = [
            p for module in self.modules.values() for p in module.parameters() if p.requires_grad
        ]
        rest = [p for p in parameters if id(p) not in matrices]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, self.rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        ]
        if matrices:
            moved = [p for p in parameters if id(p) in matrices]
            found.append(
                torch.optim.Muon(
                    moved, 2 * self.rate, self.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        for optimiser in found:
            for group in optimiser.param_groups:
                group["peak"] = group["lr"]
        return found

    def _step(self, step: int, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
        share = min(1.0, (step + 1) / self.warm_up, (self.steps - step) / (COOL_DOWN * self.steps))
        groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        for group in groups:
            group["lr"] = share * group["peak"]
        loss, figures = self.loss(step)
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        for optimiser in optimisers:
            optimiser.step()
        return {"loss": float(loss.detach()), **figures}

    def _save(
        self, folder: Path, optimisers: Sequence[torch.optim.Optimizer], step: int, seconds: float
    ) -> None:
        state = {name: trained(module) for name, module in self.modules.items()}
        with whole(_path(folder, self.name)) as path:
            saved = {"step": step, "seconds": seconds, "modules": state}
            torch.save(
                saved | {"optimisers": [optimiser.state_dict() for optimiser in optimisers]}, path
            )

    def _resume(
        self, folder: Path, optimisers: Sequence[torch.optim.Optimizer]
    ) -> tuple[int, float]:
        if not _path(folder, self.name).is_file():
            return 0, 0.0
        state = load_trained(folder, self.name, self.modules)
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
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
