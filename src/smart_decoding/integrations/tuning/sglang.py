"""SGLang: draft lengths, or sizes of trees, by load: its tiers, and costs for SMART inside it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.provenance import version_of, write_json
from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.files import whole
from smart_decoding.integrations.sglang.costs import COSTS, TierCosts
from smart_decoding.integrations.tuning.found import LOST
from smart_decoding.integrations.tuning.processes import ServerProcess, free_port
from smart_decoding.integrations.tuning.settings import Patience, Setting, Trial

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, Verdict

LOADING, ANSWERING = 1800.0, 600.0  # seconds; of a load, CUDA graphs included, and of a block


class Sglang:
    """SGLang's server with one model, started for each number of steps; see `Tunable`."""

    name = "SGLang"
    shares: tuple[int, ...] = (1, 0)

    def __init__(
        self,
        model: str,
        drafter: Sequence[str],
        tiers: Mapping[int, int],
        tokens: int,
        blocks: int,
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
        self.patience = Patience(blocks, blocks, 0)  # one server at a time: loading takes longest
        self.warnings: list[str] = []

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return all loads: one server takes them all."""
        return [tuple(loads)]

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has."""
        return load

    def room(self, loads: Sequence[int]) -> int:
        """Return how many servers may run at once."""
        return 1

    def settings(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield plain decoding and each number of steps."""
        yield [Setting(), *(self.tier(steps) for steps in self._tiers)]

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

    def write(self, found: Found, choices: Sequence[Verdict], output: Path) -> list[str]:
        """Write costs for SMART inside SGLang, and SGLang's own file of tiers, unless nothing
        pays."""
        if not any(choice.pays for choice in choices):
            return ["Start SGLang without --speculative-algorithm."]
        table = {
            choice.load: {
                steps: seconds_of(found, choice.load, setting)
                for steps, setting in ((0, Setting()), *((k, self.tier(k)) for k in self._tiers))
                if found.of(choice.load, setting)
            }
            for choice in choices
        }
        trees = any(steps != nodes for steps, nodes in self._tiers.items())
        write_costs(output, table, self._tiers if trees else {})
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
        most = max(self._tiers)
        words = (*self._more, *self.tier(most).words)
        start = f"python -m sglang.launch_server --model-path {self._model} {' '.join(words)}"
        adaptive = f"--speculative-adaptive --speculative-adaptive-config {steps}"
        return [f"Written: {output} and {steps}", f"{COSTS}={output} {start} {adaptive}"]

    def _worth(self, found: Found, load: int, setting: Setting) -> bool:
        return found.value(load, setting, Setting()) >= LOST


class SglangServer:
    """A running server of SGLang's. nodes: of a round's draft."""

    def __init__(self, server: ServerProcess, tokens: int, nodes: int) -> None:
        self._server, self._tokens, self._nodes = server, tokens, nodes

    def __enter__(self) -> SglangServer:
        try:
            self._generated(["Hello"], 8)  # the first answer is slow
        except BaseException:
            self._server.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer a block greedily, all at once. Raises ModelError."""
        started = time.perf_counter()
        found = self._generated(prompts, self._tokens)
        seconds = time.perf_counter() - started
        try:
            metas = [each["meta_info"] for each in found]
            tokens = sum(int(meta["completion_tokens"]) for meta in metas)
            context = sum(meta["prompt_tokens"] for meta in metas) + tokens / 2
            checks = sum(int(meta.get("spec_verify_ct") or 0) for meta in metas)
        except (KeyError, TypeError) as error:
            raise ModelError(f"SGLang answered without {error}") from error
        if not self._nodes or not checks:
            return Trial(tokens, seconds, context=context / len(metas))
        drafted = checks * self._nodes
        return Trial(tokens, seconds, drafted, max(0, tokens - checks), context / len(metas))

    def _generated(self, prompts: Sequence[str], tokens: int) -> Sequence[Mapping[str, Any]]:
        sampling = {"temperature": 0, "max_new_tokens": tokens}
        body = {"text": list(prompts), "sampling_params": sampling}
        found = self._server.ask("/generate", body, ANSWERING)
        return found if isinstance(found, list) else [found]


def seconds_of(found: Found, load: int, setting: Setting) -> float:
    """Return the seconds of a round of the whole batch, prompts included."""
    trials = found.of(load, setting).values()
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
