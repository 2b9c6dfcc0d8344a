"""`smart chat` with the default model: Ctrl-C at a terminal, and answers that loop."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from smart_decoding.cli.chat_session import LOOP_TOKENS
from smart_decoding.engine.loops import loop_start
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import LOOP
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints.hub import cache_dir
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.text.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "unit" / "cli"))

from terminal import Terminal

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput

pytestmark = pytest.mark.model

MODEL = "smollm2-135m"
LONG = "List ten animals."  # it lists more than a hundred
LOOPS = "Say 'rain' over and over again without end."


def test_ctrl_c_ends_an_answer_and_keeps_it(tmp_path: Path) -> None:
    load_checkpoint(MODEL)  # fetches it if need be
    cache = tmp_path / "cache"  # with a history of its own
    cache.mkdir()
    for entry in cache_dir().iterdir():
        if entry.is_dir():
            (cache / entry.name).symlink_to(entry)
    command = [sys.executable, "-m", "smart_decoding.cli.main", "chat", MODEL, "--temp", "0"]
    terminal = Terminal(command, {"SMART_CACHE": str(cache)})
    file = tmp_path / "talk.json"
    try:
        terminal.until("> ")
        terminal.send(f"{LONG}\r")
        terminal.until("\n12. ")
        terminal.send("\x03")
        terminal.until("the answer is kept as far as it goes")
        terminal.until("> ")
        terminal.send("Which animals did you list?\r")
        terminal.until(" tok/s")
        terminal.send(f"/save {file}\r")
        terminal.until("> ")
        terminal.send("/bye\r")
        assert terminal.end() == 0
    finally:
        terminal.close()
    first, partial, second, whole = json.loads(file.read_text(encoding="utf-8"))
    assert first["content"] == LONG
    assert "\n11. " in partial["content"]
    assert "\n100. " not in partial["content"]
    assert second["content"] == "Which animals did you list?"
    assert whole["role"] == "assistant"


def answer(llm: LLM, text: str, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.chat([{"role": "user", "content": text}], params)
    return output.outputs[0]


def test_loops_and_penalties_are_the_same_under_every_policy() -> None:
    """A loop ends at the same token; a penalty changes the draws and not their independence of
    drafts."""
    greedy = SamplingParams(temperature=0, max_tokens=1024)
    drawn = SamplingParams(temperature=0.8, repetition_penalty=1.2, seed=5, max_tokens=64)
    looping = {}
    penalised = {}
    for policy in ("off", "chain", "eagle2", "smart"):
        llm = LLM(
            MODEL,
            speculative_config={"policy": policy},
            stop_at_loops=LOOP_TOKENS,
            max_num_seqs=1,
            generation_config="vllm",
        )
        found = answer(llm, LOOPS, greedy)
        assert found.stop_reason == LOOP
        looping[policy] = found.token_ids
        penalised[policy] = answer(llm, LOOPS, drawn).token_ids
    assert list(looping.values()) == [looping["off"]] * 4
    assert list(penalised.values()) == [penalised["off"]] * 4
    start = loop_start(looping["off"], LOOP_TOKENS)
    assert start is not None
    assert len(looping["off"]) - start < LOOP_TOKENS


ROW = "| 0 | 0 | 0 | 0 |\n"
REPETITIVE = {
    "a table of zeros": "| a | b | c | d |\n|---|---|---|---|\n" + 20 * ROW,
    "a rule": 100 * "-" + "\n" + 100 * "=" + "\n" + 60 * "* " + "\n",
    "a picture": "\n".join([20 * "#", *(12 * ["#" + 18 * " " + "#"]), 20 * "#"]),
    "a grid": "grid = [\n" + 10 * ("    [" + ", ".join(10 * ["0"]) + "],\n") + "]\n",
    "a grid of words": "grid = [\n" + 8 * ("    [" + ", ".join(8 * ["False"]) + "],\n") + "]\n",
    "boxes": "<div>\n" + 25 * '  <div class="box"></div>\n' + "</div>\n",
    "an empty list of tasks": 30 * "- [ ] \n",
    "a refrain": 4 * "Row, row, row your boat,\nGently down the stream,\n",
    "a chess board": 4 * (4 * "# . " + "\n" + 4 * ". # " + "\n"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(load_checkpoint(MODEL).tokenizer_source)


@pytest.mark.parametrize("kind", REPETITIVE)
def test_a_text_that_repeats_itself_rightly_is_no_loop(kind: str, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(REPETITIVE[kind], add_special_tokens=False)
    assert loop_start(tokens, LOOP_TOKENS) is None
    endless = list(itertools.islice(itertools.cycle(tokens[-20:]), 2 * LOOP_TOKENS))
    assert loop_start(endless, LOOP_TOKENS) is not None
