"""A scripted LLM, and commands that must fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from smart_decoding.cli import main as cli
from smart_decoding.core.tree import ROOT, DraftTrees, accept
from smart_decoding.engine.outputs import CompletionOutput
from smart_decoding.engine.request import RequestMetrics
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.profiling.ways import ChosenWay, Way

if TYPE_CHECKING:
    from smart_decoding.engine.sampling_params import SamplingParams

ANSWER = [10, 11, 12, 13, 14]
CONFIG = ModelConfig("llama", 1, 8, 1, 1, 8, 8, 16, 10_000.0, 1e-5, 64)
WORDS = {10: "Paris", 11: " is", 12: " the", 13: " capital", 14: ".", 15: " a"}


class FakeLLM:
    """Answers ANSWER in two rounds: the prompt's, then one whose tree has the next four tokens
    (three accepted)."""

    made: ClassVar[list[FakeLLM]] = []
    finish_reason: ClassVar[str] = "stop"
    failure: ClassVar[BaseException | None] = None
    pieces: ClassVar[tuple[str, str]] = ("Paris", " is the capital.")
    stop_reason: ClassVar[str | None] = None
    context: ClassVar[int] = 4096
    recommended: ClassVar[dict[str, Any]] = {}
    reason: ClassVar[str] = ""

    def __init__(self, model: str, **options: Any) -> None:
        self.model = model
        self.options = options
        self.calls = []
        self.provenance = {"model": model, "weights": "fake weights", "dtype": "fp32"}
        self.precision = "Q4_K_M, activations in 8 bits"
        self.choice = ChosenWay(Way("amx", "int8"), self.reason)
        self.tokenizer = SimpleNamespace(
            template=None,
            encode_chat=lambda messages: [1, *map(ord, messages[-1]["content"])],
            decode=lambda ids, skip=True: "".join(WORDS.get(i, "?") for i in ids),
        )
        config = SimpleNamespace(max_model_len=self.context)
        self.engine = SimpleNamespace(
            last_round=None, config=config, policy=SimpleNamespace(stats=dict)
        )
        self.started: list[int] = []  # answers before each start of the engine's thread
        self.engine_thread = SimpleNamespace(
            start=lambda: self.started.append(len(self.calls)), stop=lambda: None
        )
        self.default_sampling_params = self.recommended
        self.target = SimpleNamespace(decoder=SimpleNamespace(config=CONFIG))
        self.drafts = options["speculative_config"] is not False
        self.loads: list[int] = []  # tokens of the answer before each
        self.speculation = SimpleNamespace(description="ngram", profile=None)
        self.profiles: list[int] = []  # answers before each
        self.kept: list[int] = []  # likewise
        FakeLLM.made.append(self)

    def take_profile(self) -> None:
        self.profiles.append(len(self.calls))

    def keep_panels(self) -> None:
        self.kept.append(len(self.calls))

    def sharing_weights(self, speculative_config: bool) -> FakeLLM:
        return FakeLLM(self.model, speculative_config=speculative_config)

    def chat_prompt(self, messages: list[dict[str, Any]]) -> Any:
        self.messages = messages
        message = messages[-1]
        is_text = isinstance(message["content"], str)
        return (
            SimpleNamespace(tokens=self.tokenizer.encode_chat(messages))
            if is_text
            else message["content"]
        )

    def generate(
        self,
        prompt: Any,
        params: SamplingParams,
        on_step: Callable[..., None] | None = None,
        use_tqdm: bool = True,
    ) -> list[Any]:
        assert not use_tqdm  # no bar beside what a command prints
        self.calls.append((prompt, params))
        if FakeLLM.failure is not None:
            raise FakeLLM.failure
        metrics = RequestMetrics(
            arrival=0.0, first_token=0.5, finished=0.9, rounds=1, verified=5, accepted=3
        )
        texts = iter(self.pieces)
        stop = SimpleNamespace(new_text=lambda: next(texts))
        request = SimpleNamespace(tokens=[1, 2], output=[], stop=stop, finished=False)
        self.speculation.load = lambda: self.loads.append(len(request.output))
        for tokens, record in (
            (ANSWER[:1], self.round(DraftTrees.empty(1))),
            (ANSWER[1:], self.round(self.tree())),
        ):
            self.engine.last_round = record
            request.tokens += tokens
            request.output += tokens
            request.finished = len(request.output) == len(ANSWER)
            if on_step is not None:
                on_step([request])
        output = CompletionOutput(
            index=0,
            text="".join(self.pieces),
            token_ids=list(ANSWER),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            metrics=metrics,
        )
        return [SimpleNamespace(outputs=[output])]

    def tree(self) -> DraftTrees:
        trees = DraftTrees.empty(1)
        if self.drafts:
            trees.append(
                [0, 0, 0, 0, 0],
                [11, 15, 12, 15, 13],
                [ROOT, ROOT, 0, 0, 2],
                [0.9, 0.1, 0.8, 0.1, 0.5],
            )
            trees.accept_prob = np.array([0.9, 0.1, 0.75, 0.08, 0.4])
        return trees

    @staticmethod
    def round(trees: DraftTrees) -> SimpleNamespace:
        target = {
            ROOT: 11,
            0: 12,
            2: 13,
            4: 14,
        }  # after a node; the root is row 0, node i is row i + 1
        acceptance = accept(trees, lambda rows: np.array([target[int(row) - 1] for row in rows]))
        return SimpleNamespace(
            round=SimpleNamespace(
                trees=trees, kept=np.arange(len(trees)), rule=SimpleNamespace(scores=True)
            ),
            acceptance=acceptance,
            emitted=len(acceptance.emitted[0]),
        )


def vision_checkpoints() -> Any:
    """The module that makes them, imported late for the sake of tests without any."""
    sys.path.append(str(Path(__file__).parents[2] / "parity"))
    return import_module("vision")


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line on stderr of a command that must fail with `code`."""
    try:
        found = cli.main(argv)
    except SystemExit as exit_:
        found = exit_.code
    assert found == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("smart: error: ")
    return err
