"""One answer, printed as rounds yield it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from smart_decoding.cli.terminal import shown
from smart_decoding.cli.word_wrap import WordWrap
from smart_decoding.models.text.harmony import HarmonyText, Part, speaks_harmony

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import Prompt


class StreamedAnswer:
    """An answer on standard output.

    chat: the prompt is a conversation. Then a terminal's words are not broken, and Harmony's
    reasoning goes to standard error. text: printed so far, without reasoning; it stays when Ctrl-C
    ends the answer."""

    def __init__(self, llm: LLM, chat: bool = False) -> None:
        self._llm = llm
        self._chat = chat
        harmony = chat and speaks_harmony(llm.tokenizer.template)
        self._harmony = HarmonyText() if harmony else None
        self._wraps = {
            stream: WordWrap(lambda: shutil.get_terminal_size().columns)
            for stream in (sys.stdout, sys.stderr)
        }
        self._stream: TextIO | None = None  # the last one that was printed to
        self.text = ""

    def run(self, prompt: Prompt, params: SamplingParams) -> CompletionOutput:
        """Answer the prompt."""
        if self._harmony is not None:
            params = replace(params, skip_special_tokens=False)
        try:
            (output,) = self._llm.generate(prompt, params, on_step=self._show, use_tqdm=False)
        finally:
            self._end_line()
        answer = output.outputs[0]
        return answer if self._harmony is None else replace(answer, text=self.text)

    def _show(self, touched: Sequence[Request]) -> None:
        for request in touched:
            text = request.stop.new_text()
            if self._harmony is None:
                self._print_content(text)
            else:
                for part in self._harmony.feed(text, request.finished):
                    self._print_part(part)
        if not all(request.finished for request in touched):
            self._llm.speculation.load()  # the first word needed none

    def _print_part(self, part: Part) -> None:
        if part.kind == "reasoning":
            self._print(part.text, sys.stderr)
        else:
            self._print_content(f"\n{part.text} " if part.kind == "call" else part.text)

    def _print_content(self, text: str) -> None:
        self.text += text
        self._print(text, sys.stdout)

    def _print(self, text: str, stream: TextIO) -> None:
        if not text:
            return
        if stream is not self._stream:
            self._end_line()
        self._stream = stream
        text = shown(text, stream)
        if self._chat and stream.isatty():
            text = self._wraps[stream].feed(text)
        print(text, end="", file=stream, flush=True)

    def _end_line(self) -> None:
        """End the last stream's line, with a word that was held back."""
        if self._stream is not None:
            line_end = self._wraps[self._stream].feed("\n")
            print(line_end, end="", file=self._stream, flush=True)
