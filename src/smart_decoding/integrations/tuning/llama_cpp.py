"""llama.cpp: its server's own options, plain and with each way of drafting that it knows."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.files import write_text
from smart_decoding.integrations.tuning import busy, huge_pages
from smart_decoding.integrations.tuning.llama_help import asked
from smart_decoding.integrations.tuning.processes import ServerProcess, free_port
from smart_decoding.integrations.tuning.settings import Setting, Trial
from smart_decoding.kernels import children
from smart_decoding.models.checkpoints.gguf_header import has_mtp, own_words

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, LoadResult

SERVER = "llama-server"
GET = (
    f"no {SERVER} is on PATH: name yours by --server PATH, or get one: brew install llama.cpp, "
    "winget install llama.cpp, or https://github.com/ggml-org/llama.cpp/releases"
)
AT_LEAST, WAVES = 3, 2  # prompts of a block: in all, and for each slot
SPARE = 8  # tokens of a slot beyond prompt and answer
GUESSED = 256  # tokens of a chat's template, until a server has counted
ANSWERING = 600.0  # seconds for a prompt
# Options behind our back: what is printed would not be all. A key would refuse our requests.
_VARIABLES = ("LLAMA_ARG_", "LLAMA_API_KEY")
OURS = ("--host", "--port", "--api-key", "--api-key-file")  # options that only we can set
_ON_GPU = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")

# Of plain decoding, each beside the defaults.
CHANGES = (
    ("--flash-attn", "on"),
    ("--flash-attn", "off"),
    ("--no-repack",),
    ("--load-mode", "none"),
    ("--no-mmap",),
)
# Tokens of a draft at most, and the least probability of a token: defaults first.
DRAFTS = ((3, 0.0), (16, 0.75), (8, 0.5), (5, 0.0), (1, 0.0))
# Tokens to look up and tokens to draft. Defaults look up twelve or more, which seldom come again.
LOOKUPS = ((4, 48), (5, 8), (3, 4))
MATCHES = ((4, 32), (4, 8))
# Never the best by more than noise, in 14 tunings on two machines.
NEVER_BEST = ("ngram-cache", "ngram-map-k")


class LlamaCpp:
    """One llama-server with one model; see `Tunable`."""

    name = "llama.cpp"

    def __init__(
        self,
        server: Path,
        model: Path,
        draft: Path | None,
        texts: Sequence[str],
        tokens: int,
        more: Sequence[str] = (),
    ) -> None:
        """texts: all prompts; tokens: of an answer at most; more: further options, of plain
        decoding too. Raises ConfigError for files that cannot be."""
        architecture(model)  # refuses other files
        refused = [word for word in more if word in OURS]
        if refused:
            raise ConfigError(f"--server-args: leave out {refused[0]}, smart tune has its own")
        self.server, self.model = server, model.absolute()
        self.draft = None if draft is None else draft.absolute()
        self.tokens, self.more = tokens, tuple(more)
        self.help = asked(server)
        self._ways = self._drafting(draft)
        self._texts = texts
        self.warnings: list[str] = []
        self.context = max(len(text.encode()) for text in texts) // 2 + GUESSED + tokens
        self._encoded: dict[str, list[int]] = {}
        self._has_gpu = False  # whether any server had layers there

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return each load by itself: its number of slots is an option of the server."""
        return [(load,) for load in loads]

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has."""
        return max(AT_LEAST, WAVES * load)

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield plain decoding with huge pages, without which two processes with the same options
        may differ by a tenth; with single changes; drafts of all kinds."""
        (load,) = loads
        huge = huge_pages.variable()
        if huge:
            yield [Setting(base=huge)]
        base = found.base[load]
        yield [replace(base, base=(*base.base, *each)) for each in self._changes()]
        base = found.base[load]
        ways = [replace(base, mode=mode, drafts=words) for mode, words in self.drafts()]
        yield [*ways, *self._both(ways)]

    def drafts(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the ways of drafting with their options, a default of each way first."""
        ways = [self._of_mode(mode) for mode in self._ways]
        firsts = [(mode, words[0]) for mode, words in ways if words]
        return [*firsts, *((mode, each) for mode, words in ways for each in words[1:])]

    def command(self, port: int, slots: int, words: Sequence[str]) -> list[str]:
        """Return the words that start a server."""
        own = {
            "--host": "127.0.0.1",
            "--port": str(port),
            "--parallel": str(slots),
            "--ctx-size": str(slots * self.context),
            "--cache-ram": "0",
        }
        flags = [flag for flag in ("--offline", "--no-cache-prompt") if flag in self.help]
        if self.help.takes("--verbosity", "trace"):
            flags += ["--verbosity", "4"]  # what it says of GPUs; tokens are logged from 5 on
        found = [str(self.server), "--model", str(self.model), *flags]
        for option, value in own.items():
            found += [option, value] if option in self.help else []
        return [*found, *self.more, *words]

    def environment(self) -> dict[str, str]:
        """Return the user's, without variables that are options of llama.cpp."""
        own = children.environment()
        return {name: text for name, text in own.items() if not name.startswith(_VARIABLES)}

    def launch(self, setting: Setting, loads: Sequence[int]) -> LlamaServer:
        """Start a server. Raises ModelError with its reason if it does not."""
        return LlamaServer(self, setting.words, max(loads))

    def fits(self, server: ServerProcess) -> bool:
        """Return whether the context holds all prompts in the model's tokens; if not, it is set
        so that it does. They are counted by the first server: of digits each may be a token."""
        if not self._encoded:
            longest = max(len(self.encoded(server, text)) for text in self._texts)
            needed = longest + self.tokens + SPARE
            if needed > self.context:
                self.context = needed
                return False
        return True

    def beside_gpu(self, log: str, words: Sequence[str]) -> list[str]:
        """Return a line for each model of a server that is not all on the GPU, as `--fit` leaves
        it where memory is short."""
        layers = dict.fromkeys((int(some), int(of)) for some, of in _ON_GPU.findall(log))
        self._has_gpu |= any(some for some, _ in layers)
        name = " ".join(words) or "the defaults"
        return [
            f"Not on the GPU: {of - some} of {of} layers with {name}."
            for some, of in layers
            if some < of and self._has_gpu
        ]

    def encoded(self, server: ServerProcess, text: str) -> list[int]:
        """Return a prompt as a chat of one message, in the model's tokens. Kept: settings do not
        change it."""
        if text not in self._encoded:
            chat = {"messages": [{"role": "user", "content": text}]}
            prompt = text
            with contextlib.suppress(ModelError):  # without a template, or an old server
                prompt = str(server.ask("/apply-template", chat, 60.0)["prompt"])
            body = {"content": prompt, "add_special": True, "parse_special": True}
            self._encoded[text] = list(map(int, server.ask("/tokenize", body, 60.0)["tokens"]))
        return self._encoded[text]

    def about(self) -> dict[str, Any]:
        """Return the server's version, and the files."""
        command = [str(self.server), "--version"]
        environment = self.environment()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        files = {"model": self.model.name, "draft": self.draft and self.draft.name}
        return {"version": f"{done.stdout}{done.stderr}".strip(), **files, "always": self.more}

    def write(self, found: Found, choices: Sequence[LoadResult], output: Path) -> list[str]:
        """Write a preset for each load; return command lines that are ready to paste."""
        preset = ["; Written by smart tune: llama-server --models-preset FILE"]
        on_path = shutil.which(SERVER) == str(self.server)
        program = SERVER if on_path else str(self.server)
        lines = []
        for choice in choices:
            words = (*self.more, *choice.chosen.words)
            start = ["-m", str(self.model), "--parallel", str(choice.load), *words]
            line = huge_pages.in_front([program, *start])
            lines.append(f"{choice.load} at once: {shlex.join(line)}")
            preset += ["", f"[{self._section(choice.load)}]", f"model = {self.model}"]
            preset += [f"{key} = {value}" for key, value in pairs(("--parallel", str(choice.load)))]
            options = [word for word in words if word != huge_pages.VARIABLE]
            preset += [f"{key} = {value}" for key, value in pairs(options)]
        if "--models-preset" not in self.help:
            return lines
        if any(mark in line for line in preset[1:] for mark in ";#"):
            return [*lines, "No preset was written: a path has ; or #, which begins a comment"]
        write_text(output, "\n".join(preset) + "\n")
        used = [word for choice in choices for word in choice.chosen.base]
        before = f"{huge_pages.VARIABLE} " if huge_pages.VARIABLE in used else ""
        return [*lines, f"Written: {output}, a preset: {before}{program} --models-preset {output}"]

    def _section(self, load: int) -> str:
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', self.model.stem)}-{load}-at-once"

    def _changes(self) -> list[tuple[str, ...]]:
        """Return changes of plain decoding that this server knows."""
        found: list[tuple[str, ...]] = [("--threads", str(count)) for count in threads()]
        for change in CHANGES:
            option, *values = change
            listed = all(v.isdigit() or self.help.takes(option, v) for v in values)
            if option in self.help and listed:
                found.append(change)
        if ("--load-mode", "none") in found and ("--no-mmap",) in found:
            found.remove(("--no-mmap",))
        mine = {word for word in self.more if word.startswith("-")}
        return [change for change in found if change[0] not in mine]

    def _both(self, ways: Sequence[Setting]) -> list[Setting]:
        """Return short n-grams before the defaults of a draft model, if there are both."""
        ngrams = [setting for setting in ways if setting.mode == "ngram-simple"]
        models = [setting for setting in ways if setting.mode.startswith("draft")]
        return [together(ngrams[-1], models[0])] if ngrams and models else []

    def _drafting(self, draft: Path | None) -> list[str]:
        """Return the ways of drafting that can work with these files."""
        known = [mode for mode in self.help.drafting if mode not in NEVER_BEST]
        if not known and draft and self.help.first("--model-draft"):
            known = ["draft-simple"]  # as it is called since it has a name
        kind = "" if draft is None else architecture(draft)
        if f"draft-{kind}" in known:  # a drafter of that kind alone; dspark is a kind of dflash
            ours = {f"draft-{kind}", *(["draft-dspark"] if kind == "dflash" else [])}
        else:
            files = [path for path in (self.model, draft) if path is not None]
            ours = {"draft-simple"} if draft else set()
            ours |= {"draft-mtp"} if any(map(has_mtp, files)) else set()
        return [mode for mode in known if mode in ours or mode.startswith("ngram")]

    def _of_mode(self, mode: str) -> tuple[str, list[tuple[str, ...]]]:
        kind = ("--spec-type", mode)
        if not mode.startswith("ngram"):
            return mode, [self._draft_words(mode, *lengths) for lengths in DRAFTS]
        found: list[tuple[str, ...]] = []
        size, match = f"--spec-{mode}-size", f"--spec-{mode}-n"
        if f"{size}-n" in self.help:
            lengths = LOOKUPS if mode == "ngram-simple" else LOOKUPS[-1:]
            found += [(*kind, f"{size}-n", str(n), f"{size}-m", str(m)) for n, m in lengths]
            return mode, [kind, *found] if mode == "ngram-simple" else found
        if f"{match}-match" in self.help:
            for n, most in MATCHES:
                words = (f"{match}-match", str(n), f"{match}-min", "1", f"{match}-max", str(most))
                found.append((*kind, *words))
            return mode, [*found, kind]
        return mode, [kind]

    def _draft_words(self, mode: str, most: int, least: float) -> tuple[str, ...]:
        words: tuple[str, ...] = ("--spec-type", mode) if "--spec-type" in self.help else ()
        if self.draft is not None:
            words += (self.help.first("--spec-draft-model", "--model-draft") or "-md",)
            words += (str(self.draft),)
        length = self.help.first("--spec-draft-n-max", "--draft-max")
        floor = self.help.first("--spec-draft-p-min", "--draft-p-min")
        words += (length, str(most)) if length else ()
        return (*words, floor, str(least)) if floor else words


class LlamaServer:
    """A running llama-server, which has answered once: the first answer is slow."""

    def __init__(self, engine: LlamaCpp, words: Sequence[str], slots: int) -> None:
        self._engine = engine
        self._server = self._started(words, slots)
        try:
            if not engine.fits(self._server):
                self._server.close()
                self._server = self._started(words, slots)
            self._completed(engine.encoded(self._server, "Hello"), 8)
        except BaseException:
            self._server.close()
            raise
        self.notes = engine.beside_gpu(self._server.log(), words)

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer prompts greedily, as many at once as there are slots. Raises ModelError."""
        encoded = [self._engine.encoded(self._server, prompt) for prompt in prompts]
        return busy.trial(encoded, load, lambda each: self._completed(each, self._engine.tokens))

    def _started(self, words: Sequence[str], slots: int) -> ServerProcess:
        port = free_port()
        command = self._engine.command(port, slots, words)
        return ServerProcess(command, port, self._engine.environment())

    def _completed(self, prompt: Sequence[int], tokens: int) -> busy.Answered:
        return answer_of(self._server.ask("/completion", completion([prompt], tokens), ANSWERING))


def completion(prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Return the request to answer prompts greedily, up to `tokens` tokens each."""
    return {
        "prompt": [list(map(int, prompt)) for prompt in prompts],
        "n_predict": tokens,
        "temperature": 0.0,
        "samplers": ["top_k"],  # nothing else to compute for the most likely token
        "top_k": 1,
        "cache_prompt": False,
    }


def together(ngram: Setting, draft: Setting) -> Setting:
    """Return n-grams first, and the draft model where they find nothing."""
    types = f"{ngram.mode},{draft.mode}"
    words = ("--spec-type", types, *ngram.drafts[2:], *draft.drafts[2:])
    return replace(draft, mode=types, drafts=words)


def answer_of(found: Any) -> busy.Answered:
    """Return the figures of llama-server's answer. Raises ModelError for one without timings."""
    try:
        times = (found[0] if isinstance(found, list) else found)["timings"]
        drafted, accepted = times.get("draft_n", 0), times.get("draft_n_accepted", 0)
        counts = int(times["prompt_n"]), int(times["predicted_n"])
        return busy.Answered(*counts, drafted, accepted, float(times["predicted_ms"]) / 1e3)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{SERVER} answered without {error}: it is too old") from error


def server_at(path: Path | None) -> Path:
    """Return the llama-server at a path, or in a folder, or on PATH. Raises ConfigError."""
    if path is None:
        found = shutil.which(SERVER)
        if found is None:
            raise ConfigError(GET)
        return Path(found)
    file = path / SERVER if path.is_dir() else path
    if not (file.is_file() and os.access(file, os.X_OK)):
        raise ConfigError(f"--server {path}: there is no {SERVER} that can be run")
    return file.absolute()


def architecture(path: Path) -> str:
    """Return the architecture that a GGUF file names; empty if it names none. Raises ConfigError if
    it is no such file."""
    if not path.is_file():
        raise ConfigError(f"{path} is no file: give the model as a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{path} is no GGUF file")
    return own_words(path).get("architecture", "")


def threads() -> list[int]:
    """Return numbers of threads to try beside the default, the machine's cores: those that we may
    use, and their hyperthreads; none where the system does not tell."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    usable = sorted(affinity(0)) if affinity else []
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    counts = {len(usable), len(cores)}
    everything = len(usable) == os.cpu_count()
    return sorted(counts - {0, *([len(cores)] if everything else [])})


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return a command line's words as keys and values of a preset."""
    found: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            found.append((word.lstrip("-"), "true"))
        elif found:
            found[-1] = (found[-1][0], word)
    return found
