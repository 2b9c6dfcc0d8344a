"""SGLang: draft lengths, or sizes of trees, by load: its tiers, and costs for SMART inside it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.files import whole, write_json
from smart_decoding.integrations.sglang.costs import COSTS, TierCosts
from smart_decoding.integrations.tuning import busy
from smart_decoding.integrations.tuning.found import LOST
from smart_decoding.integrations.tuning.processes import ServerProcess, free_port
from smart_decoding.integrations.tuning.settings import Setting, Trial
from smart_decoding.measuring.machine import version_of

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, LoadResult

LOADING, ANSWERING = 1800.0, 600.0  # seconds; of a load, CUDA graphs included, and of a prompt
AT_LEAST, WAVES = 4, 3  # prompts of a block: in all, and for each slot; loading takes longest
# What SGLang's adaptive mode runs with (its adaptive_unsupported_reason); it ignores it elsewhere.
ADAPTIVE = ("EAGLE", "EAGLE3")
NOT_ADAPTIVE = (
    "--enable-dp-attention",
    "--enable-multi-layer-eagle",
    "--enable-two-batch-overlap",
    "--enable-pdmux",
)


class Sglang:
    """SGLang's server with one model, started for each number of steps; see `Tunable`."""

    name = "SGLang"

    def __init__(
        self,
        model: str,
        drafter: Sequence[str],
        tiers: Mapping[int, int],
        tokens: int,
        more: Sequence[str] = (),
    ) -> None:
        """drafter: its options of drafting but for sizes; tiers: steps -> nodes without the root;
        more: options that it always gets. Raises ConfigError where SGLang is not installed."""
        if find_spec("sglang") is None:
            raise ConfigError(
                "SGLang is not installed here: install smart-decoding in SGLang's environment, or "
                "give --bench-serving files (docs/sglang.md)"
            )
        self._model, self._drafter, self._more = model, tuple(drafter), tuple(more)
        self._tiers, self._tokens = dict(sorted(tiers.items())), tokens
        self._trees = any(steps != nodes for steps, nodes in tiers.items())
        if self._trees and "--page-size" not in self._more:
            self._drafter += ("--page-size", "1")  # larger pages reserve for one tier only
        self.warnings: list[str] = []

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return all loads: one server takes them all."""
        return [tuple(loads)]

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has."""
        return max(AT_LEAST, WAVES * load)

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield each number of steps."""
        yield [self.tier(steps) for steps in self._tiers]

    def tier(self, steps: int) -> Setting:
        """Return the setting of a number of steps."""
        nodes = self._tiers[steps]
        sizes = ["--speculative-num-steps", str(steps)]
        sizes += ["--speculative-num-draft-tokens", str(nodes + 1)]
        shape = "" if nodes == steps else f", {nodes} nodes"
        plural = "" if steps == 1 else "s"
        return Setting(f"drafts of {steps} step{plural}{shape}", drafts=(*self._drafter, *sizes))

    def launch(self, setting: Setting, loads: Sequence[int]) -> SglangServer:
        """Start a server. Raises ModelError with its reason if it does not."""
        port = free_port()
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", self._model]
        command += ["--host", "127.0.0.1", "--port", str(port), *self._more, *setting.words]
        server = ServerProcess(command, port, loading=LOADING)
        nodes = dict(zip(map(self.tier, self._tiers), self._tiers.values(), strict=True))
        return SglangServer(server, self._tokens, nodes.get(setting, 0))

    def about(self) -> dict[str, Any]:
        """Return SGLang's version, the model and the options."""
        options = {"drafter": self._drafter, "always": self._more, "tiers": self._tiers}
        return {"version": version_of("sglang"), "model": self._model, **options}

    def write(self, found: Found, choices: Sequence[LoadResult], output: Path) -> list[str]:
        """Write costs for SMART inside SGLang, and SGLang's own file of tiers, unless nothing
        pays; where SGLang's adaptive mode cannot run, only say how to start the best tiers."""
        if not any(choice.pays for choice in choices):
            undecided = any(choice.open for choice in choices)
            return [
                "Nothing is written: nothing is known to be faster than plain decoding."
                if undecided
                else "Start SGLang without --speculative-algorithm."
            ]
        if not self._adaptive:
            return [
                "SGLang's adaptive mode does not run with these options: one size for a server.",
                *(f"{each.load} at once: {self._start(each.chosen)}" for each in choices),
            ]
        table = {
            choice.load: {
                steps: seconds_of(found, choice.load, setting)
                for steps, setting in ((0, Setting()), *((k, self.tier(k)) for k in self._tiers))
                if found.all_of(choice.load, setting)
            }
            for choice in choices
        }
        write_costs(output, table, self._tiers if self._trees else {})
        tiers = {
            str(choice.load): {
                "candidate_steps": [
                    0,
                    *(k for k in self._tiers if self._worth(found, choice.load, self.tier(k))),
                ]
            }
            for choice in choices
        }
        steps = output.with_suffix(".steps.json")
        write_json(steps, tiers)
        adaptive = f"--speculative-adaptive --speculative-adaptive-config {steps}"
        start = self._start(self.tier(max(self._tiers)))
        return [f"Written: {output} and {steps}", f"{COSTS}={output} {start} {adaptive}"]

    @property
    def _adaptive(self) -> bool:
        words = (*self._drafter, *self._more)
        named = {algorithm for algorithm in ADAPTIVE if algorithm in words}
        return bool(named) and not set(words) & set(NOT_ADAPTIVE)

    def _start(self, setting: Setting) -> str:
        words = shlex.join((*self._more, *setting.words))
        return f"python -m sglang.launch_server --model-path {self._model} {words}".rstrip()

    def _worth(self, found: Found, load: int, setting: Setting) -> bool:
        raced = found.trials.of(load, setting)  # one alone has no race, only a verdict
        trials = found.trials if raced else found.judged
        return trials.value(load, setting, Setting()) >= LOST


class SglangServer:
    """A running server of SGLang's. nodes: of a round's draft."""

    notes: Sequence[str] = ()

    def __init__(self, server: ServerProcess, tokens: int, nodes: int) -> None:
        self._server, self._tokens, self._nodes = server, tokens, nodes

    def __enter__(self) -> SglangServer:
        try:
            self._generated("Hello", 8)  # the first answer is slow
        except BaseException:
            self._server.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer a block greedily, `load` at once. Raises ModelError."""
        return busy.trial(prompts, load, lambda prompt: self._generated(prompt, self._tokens))

    def _generated(self, prompt: str, tokens: int) -> busy.Answered:
        sampling = {"temperature": 0, "max_new_tokens": tokens}
        body = {"text": prompt, "sampling_params": sampling}
        found = self._server.ask("/generate", body, ANSWERING)
        try:
            meta = found["meta_info"]
            prompt_tokens, count = int(meta["prompt_tokens"]), int(meta["completion_tokens"])
            checks = int(meta.get("spec_verify_ct") or 0)
            seconds = meta.get("e2e_latency")
        except (KeyError, TypeError) as error:
            raise ModelError(f"SGLang answered without {error}") from error
        if not self._nodes or not checks:
            return busy.Answered(prompt_tokens, count, decoding=seconds)
        drafted, accepted = checks * self._nodes, max(0, count - checks)
        return busy.Answered(prompt_tokens, count, drafted, accepted, seconds)


def seconds_of(found: Found, load: int, setting: Setting) -> float:
    """Return the seconds of a round of the whole batch, prompts included."""
    trials = found.all_of(load, setting)
    rounds = sum(trial.rounds for trial in trials) / load
    return sum(trial.seconds for trial in trials) / rounds


def write_costs(
    path: Path, table: Mapping[int, Mapping[int, float]], nodes: Mapping[int, int]
) -> None:
    """Write the file that SMART_SGLANG_COSTS names. table: batch size -> steps -> seconds; nodes:
    of trees. Raises ConfigError for what the policy would refuse; nothing is written then."""
    content: dict[str, Any] = {"seconds": table}
    if nodes:
        lacking = {k for row in table.values() for k in row} - {0, *nodes}
        if lacking:
            raise ConfigError(
                f"--nodes says nothing of {', '.join(map(str, sorted(lacking)))} steps"
            )
        content["nodes"] = nodes
    try:
        with whole(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            TierCosts.load(part)
    except OSError as error:
        raise CapacityError(f"{path} could not be written: {error.strerror}") from error
