"""vLLM: draft lengths by batch size, for its own `num_speculative_tokens_per_batch_size`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_decoding.integrations.tuning.report import interval
from smart_decoding.integrations.tuning.settings import Setting, Trial
from smart_decoding.integrations.vllm import schedule
from smart_decoding.integrations.vllm.measure import Measured, resolved
from smart_decoding.integrations.vllm.schedule import SCHEDULE, LengthChoice, Line
from smart_decoding.measuring.machine import version_of

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, LoadResult

AT_LEAST, WAVES = 4, 3  # prompts of a block: in all, and for each request; loading takes longest
# Options that are measured here.
CHOSEN = ("num_speculative_tokens", SCHEDULE)
# Drafters that crash vLLM if another length than the longest is scheduled.
ONE_LENGTH = ("suffix", "medusa", "ngram_gpu")


class Vllm:
    """vLLM's engine with one model, in processes of its own; see `Tunable`. A process serves all
    batch sizes."""

    name = "vLLM"

    def __init__(
        self,
        arguments: Mapping[str, Any],
        speculative: Mapping[str, Any],
        lengths: Sequence[int],
        tokens: int,
        context: int | None = None,
    ) -> None:
        """arguments: of vllm.LLM; speculative: its speculative config without lengths; context: of
        requests, as measured if None. Raises ConfigError for what cannot be measured, before
        anything is loaded."""
        chosen = sorted(set(CHOSEN) & set(speculative))
        if chosen:
            raise ConfigError(
                f"--speculative-config is to be given without {' and '.join(chosen)}: "
                "that is measured here"
            )
        if speculative.get("method") in ONE_LENGTH:
            raise ConfigError(
                f"vLLM's {speculative['method']} drafting takes no schedule of several lengths"
            )
        if find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed here: install smart-decoding in vLLM's environment "
                "(docs/vllm.md)"
            )
        self._arguments, self._speculative = dict(arguments), dict(speculative)
        self._tokens, self._context = tokens, context
        self._configs: list[dict[str, Any]] = [
            {**speculative, "num_speculative_tokens": length} for length in sorted(set(lengths))
        ]
        lines = [Line(1, 1, max(lengths), ""), Line(2, 2, 0, "")]
        config = schedule.speculative_config(speculative, lines)
        self._resolved = resolved({**arguments, "speculative_config": config})
        self.warnings = schedule.warnings(self._resolved)
        self.adaptive = ""
        self._written: dict[str, Any] | None = None

    def with_schedule(self) -> Vllm | None:
        """Return this engine with the speculative config that `write` wrote alone, None if nothing
        paid: a drafter costs vLLM time in every step, even where a schedule drafts nothing."""
        if self._written is None:
            return None
        other = copy.copy(self)
        other._configs = [self._written]
        return other

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return all batch sizes: one engine takes them all."""
        return [tuple(loads)]

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has."""
        return max(AT_LEAST, WAVES * load)

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield each length."""
        yield list(map(drafting, self._configs))

    def launch(self, setting: Setting, loads: Sequence[int]) -> VllmProcess:
        """Start an engine. Raises ModelError if it does not start."""
        config = json.loads(setting.drafts[1]) if setting.drafts else None
        return VllmProcess({**self._arguments, "speculative_config": config}, self._tokens)

    def about(self) -> dict[str, Any]:
        """Return vLLM's version and arguments, and what it says of adaptive verification."""
        return {
            "version": version_of("vllm"),
            "engine_args": self._arguments,
            "warnings": self.warnings,
            "adaptive_verification": self.adaptive,
        }

    def write(self, found: Found, choices: Sequence[LoadResult], output: Path) -> list[str]:
        """Write vLLM's speculative config with its schedule, unless nothing pays."""
        plain = [choice.context for choice in choices]
        context = self._context or round(sum(plain) / len(plain))
        self.adaptive = schedule.adaptive(self._resolved, context)
        lines = schedule.schedule([_length_choice(choice) for choice in choices])
        said = [
            f"batch {line.first} to {line.last}: {line.length or 'no'} tokens  <- {line.reason}"
            for line in lines
        ]
        config = schedule.speculative_config(self._speculative, lines)
        if config is None:
            undecided = any(choice.open for choice in choices)
            end = (
                "Nothing is written: nothing is known to be faster than plain vLLM."
                if undecided
                else "Speculation did not pay at any batch size: start vLLM without "
                "--speculative-config."
            )
            return [*said, self.adaptive, end]
        write_json(output, config)
        self._written = config
        start = f'Start vLLM with --speculative-config "$(cat {output})"'
        return [*said, self.adaptive, f"Written: {output}. {start}"]


class VllmProcess:
    """One engine, which compiles in its first run."""

    notes: Sequence[str] = ()

    def __init__(self, arguments: Mapping[str, Any], tokens: int) -> None:
        self._engine, self._tokens = Measured(arguments), tokens

    def __enter__(self) -> VllmProcess:
        try:
            self._engine.ready()
            self._engine.run(["Hello"], 8, 1)
        except BaseException as error:
            self._engine.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(*error)

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer prompts, `load` at once. Raises ModelError if the process ends."""
        said = self._engine.run(prompts, self._tokens, load)
        context = said["prompt_tokens"] + said["answer_tokens"] / 2
        return Trial(said["tokens"], said["seconds"], said["drafted"], said["accepted"], context)


def drafting(config: Mapping[str, Any]) -> Setting:
    """Return the setting of a speculative config."""
    length = "scheduled" if SCHEDULE in config else config["num_speculative_tokens"]
    mode = f"{config.get('method', 'draft_model')} of {length} tokens"
    return Setting(mode, drafts=("--speculative-config", json.dumps(config)))


def _length_choice(choice: LoadResult) -> LengthChoice:
    reason = f"batch {choice.load}: plain {choice.rates[0]:.1f} tok/s"
    end = ", no verdict" if choice.open else ""
    if choice.best is None or not choice.ratio.pairs:
        return LengthChoice(choice.load, 0, reason + end)
    length = int(json.loads(choice.best.drafts[1])["num_speculative_tokens"])
    share = f"{100 * choice.accepted:.0f} % accepted"
    reason += f", {length} tokens {interval(choice.ratio)} × ({share})"
    return LengthChoice(choice.load, length if choice.pays else 0, reason + end)
