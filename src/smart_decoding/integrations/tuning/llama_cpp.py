"""llama.cpp: its server's own options, plain and with each way of drafting that it knows."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.provenance import write_text
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.integrations.tuning import huge_pages
from smart_decoding.integrations.tuning.found import MARGIN
from smart_decoding.integrations.tuning.llama_help import asked
from smart_decoding.integrations.tuning.processes import ServerProcess, free_memory, free_port
from smart_decoding.integrations.tuning.settings import Patience, Setting, Trial
from smart_decoding.models.checkpoints.gguf_words import has_mtp, own_words

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, Verdict

SERVER = "llama-server"
GET = (
    f"no {SERVER} is on PATH: name yours by --server PATH, or get one: brew install llama.cpp, "
    "winget install llama.cpp, or https://github.com/ggml-org/llama.cpp/releases"
)
MOST_AT_ONCE = 8  # servers
OVERHEAD = 1 << 30  # bytes of a server beside its weights
AT_LEAST = 3  # prompts of a block
TEMPLATE = 256  # tokens that a chat's template and its system prompt may take
ANSWERING = 600.0  # seconds for a prompt of each slot
# Options behind our back: what is printed would not be all.
_VARIABLES = "LLAMA_ARG_"

# Of plain decoding, each beside the defaults.
CHANGES = (
    ("--flash-attn", "on"),
    ("--flash-attn", "off"),
    ("--no-repack",),
    ("--backend-sampling",),
    ("--kv-unified",),
    ("--ubatch-size", "128"),
    ("--load-mode", "none"),
    ("--no-mmap",),
)
# Tokens of a draft at most, and the least probability of a token: defaults first.
DRAFTS = ((3, 0.0), (16, 0.75), (8, 0.5), (5, 0.0), (2, 0.0), (1, 0.0), (4, 0.4))
# Tokens to look up and tokens to draft. Defaults look up twelve or more, which seldom come again.
LOOKUPS = ((4, 48), (5, 8), (3, 4))
MATCHES = ((4, 32), (4, 8))
# Never the best by more than noise, in 14 tunings on two machines.
NEVER_BEST = ("ngram-cache", "ngram-map-k")


class LlamaCpp:
    """One llama-server with one model; see `Tunable`."""

    name = "llama.cpp"
    shares: tuple[int, ...] = (1, 3, 1, 4, 2, 2)

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
        self.patience = Patience()
        self.server, self.model, self.draft = server, model, draft
        self.tokens, self.more = tokens, tuple(more)
        self.help = asked(server)
        self._ways = self._drafting(draft)
        self._count = len(texts)
        self.warnings: list[str] = []
        longest = max(len(text.encode()) for text in texts)
        self.context = longest // 2 + TEMPLATE + tokens
        self._encoded: dict[str, list[int]] = {}

    def groups(self, loads: Sequence[int]) -> list[tuple[int, ...]]:
        """Return each load by itself: its number of slots is an option of the server."""
        return [(load,) for load in loads]

    def prompts(self, load: int) -> int:
        """Return how many prompts a block has."""
        return min(self._count, AT_LEAST * -(-load // AT_LEAST))

    def room(self, loads: Sequence[int]) -> int:
        """Return how many servers memory holds, if each repacks its weights."""
        files = [path for path in (self.model, self.draft) if path]
        size = OVERHEAD + sum(path.stat().st_size for path in files)
        return min(MOST_AT_ONCE, max(1, int(0.8 * free_memory()) // size))

    def settings(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        """Yield plain decoding with huge pages, without which two processes with the same options
        may differ by a tenth; with single changes; those that gained together; drafts of all kinds;
        what is like the best of them."""
        (load,) = loads
        default = Setting()
        huge = Setting(base=huge_pages.variable())
        yield list(dict.fromkeys((default, huge)))
        first = found.best(load, [huge], default)
        changed = [replace(first, base=(*first.base, *each)) for each in self._changes(load)]
        yield [first, *changed]
        ratios = {setting: found.ratio(load, setting, first) for setting in changed}
        better = [s for s, ratio in ratios.items() if ratio.pairs > 1 and ratio.value > MARGIN]
        better.sort(key=lambda setting: ratios[setting].value, reverse=True)
        changes = [setting.base[len(first.base) :] for setting in better]
        together = Setting(base=(*first.base, *_joined(changes)))
        more = [*better[:1], together] if len(better) > 1 else better
        yield [default, *more]
        base = found.best(load, [first, *more], default)
        drafts = [replace(base, mode=mode, drafts=words) for mode, words in self.drafts()]
        yield [base, *drafts]
        if found.left[load]:
            best = found.left[load][0]
            working = [setting for setting in drafts if found.differs(load, setting)]
            yield [base, best, *self._like(load, best, base, working, found)]

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
        found = [str(self.server), "--model", str(self.model), *flags]
        for option, value in own.items():
            found += [option, value] if option in self.help else []
        return [*found, *self.more, *words]

    def environment(self) -> dict[str, str]:
        """Return ours without variables that are options of llama.cpp."""
        return {name: text for name, text in os.environ.items() if not name.startswith(_VARIABLES)}

    def launch(self, setting: Setting, loads: Sequence[int]) -> LlamaServer:
        """Start a server. Raises ModelError with its reason if it does not."""
        return LlamaServer(self, setting.words, max(loads))

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
        done = subprocess.run([str(self.server), "--version"], capture_output=True, text=True)
        files = {"model": self.model.name, "draft": self.draft and self.draft.name}
        return {"version": f"{done.stdout}{done.stderr}".strip(), **files, "always": self.more}

    def write(self, found: Found, choices: Sequence[Verdict], output: Path) -> list[str]:
        """Write a preset for each load; return command lines that are ready to paste."""
        preset = ["; Written by smart tune: llama-server --models-preset FILE", "version = 1"]
        on_path = shutil.which(SERVER) == str(self.server)
        program = SERVER if on_path else str(self.server)
        lines = []
        for choice in choices:
            words = (*self.more, *choice.chosen.words)
            start = ["-m", str(self.model), "--parallel", str(choice.load), *words]
            line = huge_pages.in_front([program, *start])
            lines.append(f"{choice.load} at once: {shlex.join(line)}")
            preset += ["", f"[{self._section(choice.load)}]", f"model = {self.model.absolute()}"]
            preset += [f"{key} = {value}" for key, value in pairs(("--parallel", str(choice.load)))]
            options = [word for word in words if word != huge_pages.VARIABLE]
            preset += [f"{key} = {value}" for key, value in pairs(options)]
        if "--models-preset" not in self.help:
            return lines
        if any(mark in line for line in preset[2:] for mark in ";#"):
            return [*lines, "No preset was written: a path has ; or #, which begins a comment"]
        write_text(output, "\n".join(preset) + "\n")
        used = [word for choice in choices for word in choice.chosen.base]
        before = f"{huge_pages.VARIABLE} " if huge_pages.VARIABLE in used else ""
        return [*lines, f"Written: {output}, a preset: {before}{program} --models-preset {output}"]

    def _section(self, load: int) -> str:
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', self.model.stem)}-{load}-at-once"

    def _changes(self, load: int) -> list[tuple[str, ...]]:
        """Return changes of plain decoding that this server knows."""
        found: list[tuple[str, ...]] = [("--threads", str(count)) for count in threads()]
        for change in CHANGES:
            option, *values = change
            listed = all(v.isdigit() or self.help.takes(option, v) for v in values)
            known = option in self.help and listed
            if known and not (option == "--kv-unified" and load == 1):
                found.append(change)
        if ("--load-mode", "none") in found and ("--no-mmap",) in found:
            found.remove(("--no-mmap",))
        mine = {word for word in self.more if word.startswith("-")}
        return [change for change in found if change[0] not in mine]

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

    def _like(
        self, load: int, best: Setting, base: Setting, working: Sequence[Setting], found: Found
    ) -> list[Setting]:
        """Return the best drafts with other layouts of weights and KV memory, as rounds have more
        rows; and n-grams before the draft model, if both work."""
        toggled = []
        for flag in ("--no-repack", "--kv-unified"):
            if flag in self.help and flag not in self.more:
                without = tuple(word for word in best.base if word != flag)
                other = without if flag in best.base else (*best.base, flag)
                toggled.append(replace(best, base=other))
        both = [
            max(some, key=lambda setting: found.value(load, setting, base))
            for some in (
                [s for s in working if s.mode.startswith("ngram")],
                [s for s in working if s.mode.startswith("draft")],
            )
            if some
        ]
        if len(both) == 2 and "--spec-type" in self.help:
            toggled.append(together(*both))
        return toggled


class LlamaServer:
    """A running llama-server, stopped by a signal while it has no requests. It hears each prompt
    once, and is started again for a second time: some of its drafters remember answers."""

    def __init__(self, engine: LlamaCpp, words: Sequence[str], slots: int) -> None:
        self._engine, self._words, self._slots = engine, words, slots
        self._heard: set[str] = set()
        self._server = self._started()

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def answer(self, prompts: Sequence[str], load: int) -> Trial:
        """Answer prompts greedily, as many at once as there are slots. Raises ModelError."""
        if self._heard & set(prompts):
            self._server.close()
            self._heard.clear()
            self._server = self._started()
        self._heard |= set(prompts)
        self._server.resume()
        encoded = [self._engine.encoded(self._server, prompt) for prompt in prompts]
        started = time.perf_counter()
        found = self._completed(self._server, encoded, self._engine.tokens)
        seconds = time.perf_counter() - started
        self._server.pause()
        return trial_of(found, seconds)

    def _started(self) -> ServerProcess:
        port = free_port()
        command = self._engine.command(port, self._slots, self._words)
        server = ServerProcess(command, port, self._engine.environment())
        try:  # the first answer is slow
            self._completed(server, [self._engine.encoded(server, "Hello")], 8)
            server.pause()
        except BaseException:
            server.close()
            raise
        return server

    def _completed(
        self, server: ServerProcess, prompts: Sequence[Sequence[int]], tokens: int
    ) -> list[Any]:
        body = completion(prompts, tokens)
        found = server.ask("/completion", body, ANSWERING * -(-len(prompts) // self._slots))
        return found if isinstance(found, list) else [found]


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


def trial_of(answers: Sequence[Mapping[str, Any]], seconds: float) -> Trial:
    """Return the figures of llama-server's answers. Raises ModelError for one without timings."""
    try:
        times = [answer["timings"] for answer in answers]
        counts = [(int(each["prompt_n"]), int(each["predicted_n"])) for each in times]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{SERVER} answered without {error}: it is too old") from error
    return Trial(
        sum(predicted for _, predicted in counts),
        seconds,
        sum(each.get("draft_n", 0) for each in times),
        sum(each.get("draft_n_accepted", 0) for each in times),
        sum(prompt + predicted / 2 for prompt, predicted in counts) / len(counts),
    )


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


def _joined(changes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return changes together, the first one of each option."""
    found: dict[str, tuple[str, ...]] = {}
    for change in changes:
        found.setdefault(change[0], change)
    return tuple(word for change in found.values() for word in change)
