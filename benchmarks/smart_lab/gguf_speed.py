"""The same GGUF file in our engine and in others, a llama.cpp built on this machine first, in one
run.

    python -m smart_lab gguf-speed FILE --llama-cpp build/bin [--draft FILE] [--slots 1,4,8] \
        [--ik-llama-cpp DIR] [--openvino PYTHON] [--vllm PYTHON]

llama.cpp's flags are found first, for each number of slots, on prompts of their own: flash
attention, layout of the weights, batches, then the settings of its draft model and n-gram modes.
After that its best modes and ours answer the same chunks of prompts in turn: three for each slot,
as many at once as there are slots, the next when one has ended. All get the same token ids and
answer greedily, up to the same number of tokens. No engine keeps prompts, and a server without
requests is stopped. Printed are tokens per second of all requests, prompts included, and of one
behind its first token: of all blocks, of the slowest and of the fastest; ratios have 95 %
intervals. A forward of a few rows, a prompt and a read of memory are timed before, in turn as well.

Other engines answer too where they are given: ik_llama.cpp, which tunes its speculation itself,
OpenVINO GenAI, which reads the file, and vLLM's CPU build, which gets the file's weights in bf16.

Needed by the README's first table (zen5/2026-12-02-gguf.json).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smart_decoding.cli.arguments import whole_numbers, words
from smart_decoding.errors import ConfigError
from smart_decoding.files import sha256_of, write_json
from smart_decoding.integrations.tuning.processes import ending_with_us
from smart_decoding.integrations.tuning.settings import PLAIN
from smart_decoding.measuring.machine import machine
from smart_decoding.measuring.resume import Progress
from smart_decoding.measuring.tasks import load_task
from smart_lab.gguf import ik, report
from smart_lab.gguf.engines import RIVALS, Processes, Rival
from smart_lab.gguf.ours import HELD, Ours, speculative_configs, without_folders
from smart_lab.gguf.rates import Reply
from smart_lab.gguf.server import LlamaCpp, Program, Server, Sizes
from smart_lab.gguf.tuning import DRAFT, TokenServers, Tuned, searched, tuned
from smart_lab.provenance import check_outputs, commit, provenance
from smart_lab.resume import source_digest

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found

TASKS = ("code", "maths", "general")
KEPT_BACK = 24  # prompts for tuning and warming up, or more if there are more slots
WAVES = 3  # prompts of a chunk for each slot: one ends, and the next takes its place
TUNE_SHARE = 1 / 3  # of a number of slots' time, at most
TURNS, CALLS = 3, 6  # of forwards
PROMPT = 512  # tokens of the prompt that is timed, or what fits
FORWARD_SHARE = 0.1  # of the time, at most, but for one turn
LIMITS = "time limits"  # of the parts that a resumed run was made in
PAUSE = 0.3  # seconds between two engines: threads of the one before may still spin
ServersT = TypeVar("ServersT", bound=TokenServers)
Contestant = Callable[[Sequence[Sequence[int]], int], Reply]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, what is measured, and for how long."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the model, a GGUF file")
    add("--draft", type=Path, metavar="FILE", help="a smaller GGUF file of the same vocabulary")
    binaries = "folder of llama-server, llama-bench and llama-batched-bench"
    add("--llama-cpp", type=Path, required=True, metavar="DIR", help=binaries)
    source = "which llama.cpp it is, as a release or commit, for the result"
    add("--llama-cpp-source", metavar="TEXT", help=source)
    add("--ik-llama-cpp", type=Path, metavar="DIR", help="folder of ik_llama.cpp's llama-server")
    for rival in RIVALS:
        python = f"Python of an environment that has {rival.package}, {rival.reads}"
        add(f"--{rival.option}", type=Path, metavar="PYTHON", help=python)
    add("--slots", type=whole_numbers, default=(1, 4, 8), metavar="1,4,8")
    held = f"how our engine holds the weights, of: {', '.join(HELD)} (auto)"
    add("--ours", type=words, default=("auto",), metavar="A,B", help=held)
    drafters = (
        "a method, or a speculative_config in JSON; may be given several times "
        "(ngram, union, and draft_model with --draft)"
    )
    add("--smart", action="append", metavar="METHOD", help=drafters)
    add("--max-tokens", type=int, default=128, help="of an answer (128)")
    add("--tune-tokens", type=int, default=64, help="of an answer while flags are tried (64)")
    most = "most chunks for each number of slots, one figure for all or one for each (12)"
    add("--blocks", type=whole_numbers, default=(12,), metavar="12,6,6", help=most)
    add("--max-model-len", type=int, default=1024, help="tokens of a prompt and its answer (1024)")
    add("--rows", type=whole_numbers, default=(1, 2, 4, 8, 16, 32), metavar="1,16")
    add("--forward-context", type=int, default=150, help="tokens before those rows (150)")
    only = "time forwards and a prompt, and no answers: of files with random weights"
    add("--forwards-only", action="store_true", help=only)
    limit = "seconds; what is missing then is said (3300)"
    add("--time-limit", type=float, default=3300.0, help=limit)
    add("--resume", type=Path, metavar="FILE", help="keep what is measured, and go on from it")
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Measures, and prints tables. Raises ConfigError for files and options that cannot be."""
    stop = time.monotonic() + args.time_limit
    cpp = LlamaCpp(args.llama_cpp)
    cousin = None if args.ik_llama_cpp is None else ik.IkLlamaCpp(args.ik_llama_cpp)
    configs = checked(args)
    about = {"source": args.llama_cpp_source, **cpp.about()}
    cousins = {ik.NAME: report.origin_of(cousin.about())} if cousin else {}
    progress = Progress(args.resume, key_of(args, {report.THEIRS: about, **cousins}))
    print(report.build_of(about), about["system"], sep="; ", flush=True)
    session = Session(args, cpp, cousin, configs, progress)
    progress.add(LIMITS, args.time_limit)
    with ending_with_us(), session:
        session.forwards(time.monotonic() + FORWARD_SHARE * args.time_limit)
        for number, slots in enumerate(() if args.forwards_only else args.slots):
            now = time.monotonic()
            session.measure(slots, now + (stop - now) / (len(args.slots) - number))
    result = {
        "provenance": provenance(
            command_of(args, progress.units(LIMITS)),
            0,
            session.weights,
            "as each contestant's name says",
        ),
        "decode": report.DECODE,
        "llama_cpp": about,
        "rivals": {**cousins, **session.versions},
        "load_average": session.load_average,
        **session.result(),
    }
    if args.json is not None:
        write_json(args.json, result)
    print(report.text(result))
    return 0


def checked(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the drafters of `smart`. Raises ConfigError for what cannot be, before anything is
    loaded."""
    for path in (args.file, args.draft):
        if path is not None and not (path.is_file() and path.suffix == ".gguf"):
            raise ConfigError(f"{path} is not a GGUF file")
    for rival in RIVALS:
        python = getattr(args, rival.option)
        if python is not None and not python.is_file():
            raise ConfigError(f"--{rival.option} {python} is no Python")
    unknown = [held for held in args.ours if held not in HELD]
    if unknown or not args.ours:
        raise ConfigError(f"--ours takes {', '.join(HELD)}, not {', '.join(unknown) or 'nothing'}")
    for name, value in {"max": args.max_tokens, "tune": args.tune_tokens}.items():
        if value < 2:
            raise ConfigError(f"--{name}-tokens {value} is too small to measure anything")
    if len(args.blocks) not in (1, len(args.slots)):
        raise ConfigError("--blocks takes one number, or one for each of --slots")
    check_outputs((args.json, args.resume))
    usual = ["draft_model", "ngram", "union"] if args.draft else ["ngram", "union"]
    return speculative_configs(args.smart or usual, args.draft)


class Session:
    """One run: our engines, llama.cpp's servers, and what is measured so far."""

    def __init__(
        self,
        args: argparse.Namespace,
        cpp: LlamaCpp,
        cousin: ik.IkLlamaCpp | None,
        configs: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._args, self._cpp, self._progress = args, cpp, progress
        self._cores = len(os.sched_getaffinity(0))
        self._processes: dict[str, Processes] = {}
        self._open = ExitStack()
        self.load_average = os.getloadavg()[0]  # before we add to it
        most, context = max(args.slots), args.max_model_len
        self._ours = [Ours(args.file, held, configs, most, context) for held in args.ours]
        llm = self._ours[0].llm
        self._stops = [*map(int, llm.target.eos_token_ids)]
        encode = partial(llm.tokenizer.encode, add_special_tokens=False)
        self._cousins = [cousin.program(encode, self._stops[0])] if cousin else []
        files = [path for path in (args.file, args.draft) if path]
        self.weights = {
            **llm.provenance,
            "model": args.file.name,
            **{f"sha256 of {path.name}": sha256_of(path) for path in files},
        }
        prompts = self._prompts()
        kept = max(KEPT_BACK, alike(most))
        self._kept, self._measured = prompts[:kept], prompts[kept:]
        self._prompt = [*chain.from_iterable(self._kept)][: min(PROMPT, context - 1)]
        if len(self._measured) < WAVES * most:
            raise ConfigError(
                "too few prompts fit: raise --max-model-len, or lower --max-tokens or --slots"
            )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def forwards(self, stop: float) -> None:
        """Add turns of forwards: each engine's own benchmark, one after the other."""
        args, name = self._args, "forwards"
        while len(self._progress.units(name)) < TURNS and (
            time.monotonic() < stop or not self._progress.units(name)
        ):
            grid = (args.rows, args.forward_context, CALLS)
            length = len(self._prompt)
            forwards = {
                report.THEIRS: self._cpp.one_sequence(args.file, self._cores, *grid),
                "llama.cpp, sequences": self._cpp.many_sequences(args.file, self._cores, *grid),
            }
            prompt = self._cpp.one_sequence(args.file, self._cores, (length,), 0, TURNS)
            rates = {report.THEIRS: length / prompt[length]}
            for ours in self._ours:
                time.sleep(PAUSE)
                forwards[ours.held] = ours.forwards(*grid)
                rates[ours.held] = length / ours.first_token(self._prompt)
            unit = {"forwards": forwards, "prompt": rates, "memory": self._ours[0].read_rate(CALLS)}
            self._progress.add(name, unit)

    def measure(self, slots: int, stop: float) -> None:
        """Tune the servers, then add blocks at so many slots, one at least, until the time is
        over."""
        name = f"blocks at {slots}"
        most = dict(zip(self._args.slots, cycle(self._args.blocks), strict=False))[slots]
        chunks = in_chunks(self._measured, WAVES * slots)[:most]
        done = len(self._progress.units(name))
        if done >= len(chunks) or (done and time.monotonic() > stop):
            return
        rivals = self._rivals(slots)
        now = time.monotonic()
        until = now + TUNE_SHARE * (stop - now)
        with ExitStack() as stack:
            contestants: dict[str, Contestant] = {}
            for contestant, server in self._servers(slots, until):
                contestants[contestant] = stack.enter_context(server).answer
            contestants |= rivals
            for ours in self._ours:
                contestants |= ours.contestants(slots)
            for answer in contestants.values():  # policies learn on a batch of that size
                answer(self._kept[:slots], self._args.max_tokens)
            for number, chunk in enumerate(chunks[done:], done):
                started = time.monotonic()
                unit = block(contestants, chunk, self._args.max_tokens, number)
                self._progress.add(name, unit)
                print(f"{slots} slots, block {number + 1} of {len(chunks)}", flush=True)
                now = time.monotonic()
                if now + (now - started) > stop:
                    break

    @property
    def versions(self) -> dict[str, str]:
        """The versions of engines in environments of their own."""
        units = {rival.name: self._progress.units(rival.name) for rival in RIVALS}
        return {name: versions[0] for name, versions in units.items() if versions}

    def result(self) -> dict[str, Any]:
        """Return all measurements, for JSON."""
        runs = []
        for slots in self._args.slots:
            blocks = self._progress.units(f"blocks at {slots}")
            if blocks:
                tasks = [self._tasks_of(number, slots) for number in range(len(blocks))]
                run = report.run_of(slots, blocks, tasks, self._args.ours)
                runs.append(run | self._flags(slots))
        units = self._progress.units("forwards")
        return {
            "forwards": forward_medians([unit["forwards"] for unit in units]),
            "forward_context": self._args.forward_context,
            "prompt_tokens": len(self._prompt),
            "prompt": {
                name: spread([unit["prompt"][name] for unit in units])
                for name in units[0]["prompt"]
            },
            "memory": spread([unit["memory"] for unit in units]),
            "bytes_read": {ours.held: ours.bytes_read for ours in self._ours},
            "max_tokens": self._args.max_tokens,
            "runs": runs,
        }

    def _tasks_of(self, number: int, slots: int) -> list[str]:
        """Return the task of each prompt of a block."""
        size = WAVES * slots
        first = len(self._kept) + number * size
        return [TASKS[at % len(TASKS)] for at in range(first, first + size)]

    def _flags(self, slots: int) -> dict[str, Any]:
        """Return the servers' tuned flags, with only the names of files."""
        draft = self._args.draft
        found = self._tuned(slots).plain()
        for program in self._cousins:
            found[program.name] = self._ik_tuned(program, slots).plain()
        for each in (found, *(found[program.name] for program in self._cousins)):
            each["flags"] = {mode: " ".join(words) for mode, words in each["flags"].items()}
        found["drafts_tried"] = {
            rival.name: tried
            for rival in RIVALS
            for tried in self._progress.units(drafts_at(rival, slots))
        }
        if draft is None:
            return found
        inside = json.dumps(str(draft))[1:-1]
        bare: dict[str, Any] = json.loads(json.dumps(found).replace(inside, draft.name))
        return bare

    def _servers(self, slots: int, until: float) -> Iterator[tuple[str, Server]]:
        """Return all modes of llama.cpp and of its cousin, tuned."""
        # The cousin first: llama.cpp takes all the time that is left.
        few = [(program, self._ik_tuned(program, slots, until)) for program in self._cousins]
        ours = (self._cpp.program, self._tuned(slots, until))
        for program, each in (ours, *few):
            for mode, flags in each.flags.items():
                server = Server(program, self._args.file, flags, slots, self._sizes)
                yield f"{program.name} {mode}", server

    def _tuned(self, slots: int, until: float = 0.0) -> Tuned:
        """Once, until then: the best of each mode, and the draft model with its defaults."""
        name = f"tuned at {slots}"
        if not self._progress.units(name):
            engine = self._tunable(TokenServers, self._cpp.program, self._args.draft)
            result = tuned(self._searched(engine, slots, until), slots, self._always)
            if DRAFT in result.flags:
                usual = next(words for mode, words in engine.drafts() if mode.startswith("draft"))
                flags = [*result.flags[PLAIN], *usual]
                if flags != result.flags[DRAFT]:
                    result.flags[f"{DRAFT}, its defaults"] = flags
            self._progress.add(name, result.plain())
        return Tuned(**self._progress.units(name)[0])

    def _ik_tuned(self, program: Program, slots: int, until: float = 0.0) -> Tuned:
        """Once, until then."""
        name = f"{program.name} tuned at {slots}"
        if not self._progress.units(name):
            engine = self._tunable(ik.IkServers, program, None)
            found = self._searched(engine, slots, until)
            self._progress.add(name, ik.tuned(found, slots, self._always).plain())
        return Tuned(**self._progress.units(name)[0])

    def _tunable(self, kind: type[ServersT], program: Program, draft: Path | None) -> ServersT:
        files, tokens = (self._args.file, draft), self._args.tune_tokens
        return kind(program, files, self._always, tokens, self._sizes, len(self._kept))

    def _searched(self, engine: TokenServers, slots: int, until: float) -> Found:
        return searched(engine, self._kept, slots, until - time.monotonic())

    @property
    def _always(self) -> list[str]:
        return ["--threads", str(self._cores)]

    @property
    def _sizes(self) -> Sizes:
        longest = max(map(len, chain(self._kept, self._measured)))
        return Sizes(self._args.max_model_len, longest)

    def _rivals(self, slots: int) -> dict[str, Contestant]:
        """Return plain decoding of the engines in environments of their own, and their best
        drafts."""
        found: dict[str, Contestant] = {}
        for rival in RIVALS:
            python = getattr(self._args, rival.option)
            if python is not None:
                processes = self._loaded(rival, python)
                for mode in self._modes(rival, processes, slots):
                    found[f"{rival.name} {mode}"] = partial(processes.answer, mode, slots)
        return found

    def _modes(self, rival: Rival, processes: Processes, slots: int) -> list[str]:
        """Return plain decoding, and the best of several drafts, which are tried once."""
        drafts = [mode for mode in rival.modes if mode != PLAIN]
        if len(drafts) == 1:
            return [PLAIN, *drafts]
        name = drafts_at(rival, slots)
        if not self._progress.units(name):
            chunk = self._kept[: alike(slots)]
            print(f"{slots} slots, {rival.name} with {', '.join(drafts)}", flush=True)
            processes.answer(drafts[0], slots, chunk[:slots], self._args.tune_tokens)  # warms up
            tried = {
                mode: processes.answer(mode, slots, chunk, self._args.tune_tokens).overall
                for mode in drafts
            }
            self._progress.add(name, tried)
        tried = self._progress.units(name)[0]
        return [PLAIN, max(tried, key=tried.__getitem__)]

    def _loaded(self, rival: Rival, python: Path) -> Processes:
        """Once for all numbers of slots."""
        args = self._args
        if rival.name not in self._processes:
            print(f"{rival.name} is loaded (minutes, where it compiles)", flush=True)
            slots, context = max(args.slots), args.max_model_len
            processes = Processes(rival, python, args.file, slots, context, self._stops)
            self._processes[rival.name] = self._open.enter_context(processes)
            if not self._progress.units(rival.name):
                self._progress.add(rival.name, f"{processes.version}, {rival.reads}")
        return self._processes[rival.name]

    def _prompts(self) -> list[list[int]]:
        """Return prompts with room for an answer, as chats of one message, tasks in turn."""
        llm = self._ours[0].llm
        room = self._args.max_model_len - self._args.max_tokens - 1

        def fitting(task: str) -> Iterator[list[int]]:
            for text in load_task(task):
                tokens = llm.chat_prompt([{"role": "user", "content": text}]).tokens
                if len(tokens) <= room:
                    yield list(map(int, tokens))

        return list(chain.from_iterable(zip(*map(fitting, TASKS), strict=False)))


def block(
    contestants: Mapping[str, Contestant],
    chunk: Sequence[Sequence[int]],
    tokens: int,
    number: int,
) -> dict[str, Any]:
    """Return the chunk answered by all, one after the other; who begins depends on the block's
    number."""
    names = list(contestants)
    turn = number % len(names)
    replies = {}
    for name in names[turn:] + names[:turn]:
        time.sleep(PAUSE)
        replies[name] = asdict(contestants[name](chunk, tokens))
    return {name: replies[name] for name in names}


def drafts_at(rival: Rival, slots: int) -> str:
    """Return the name of its rates by drafts in tuning."""
    return f"{rival.name}'s drafts at {slots}"


def alike(slots: int) -> int:
    """Return the least number of prompts that are as many of each task, and one for each slot."""
    return len(TASKS) * -(-slots // len(TASKS))


def in_chunks(prompts: Sequence[list[int]], size: int) -> list[Sequence[list[int]]]:
    """Whole chunks only."""
    return [prompts[at : at + size] for at in range(0, len(prompts) - size + 1, size)]


def forward_medians(units: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Engine -> rows -> milliseconds: median, lowest and highest of the turns."""
    found: dict[str, Any] = {}
    for engine in units[0] if units else ():
        found[engine] = {}
        for rows in units[0][engine]:
            found[engine][rows] = spread([1e3 * unit[engine][rows] for unit in units])
    return found


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest and highest."""
    return [statistics.median(values), min(values), max(values)]


def key_of(args: argparse.Namespace, servers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must be the same for a run to go on. servers: their builds."""
    free = ("command", "time_limit", "json", "resume", "blocks", "slots", "debug")
    folders = ("llama_cpp", "ik_llama_cpp")
    files = {path.name: path.stat().st_size for path in (args.file, args.draft) if path}
    options = {name: value for name, value in vars(args).items() if name not in free + folders}
    return {
        "option": {
            **options,
            "file": args.file.name,
            "draft": args.draft and args.draft.name,
            **{rival.option: getattr(args, rival.option) is not None for rival in RIVALS},
        },
        "bytes": files,
        "servers": servers,
        "machine": machine(),
        "commit": commit(),
        "source": source_digest(),
    }


def command_of(args: argparse.Namespace, limits: Sequence[float]) -> str:
    """Return the command line of this run, with only the names of files.

    limits: seconds of each of its parts."""
    variant = os.environ.get("SMART_ISA")
    command = [f"SMART_ISA={variant}"] if variant else []
    command += ["python", "-m", "smart_lab", "gguf-speed", args.file.name, "--llama-cpp", "DIR"]
    command += ["--llama-cpp-source", args.llama_cpp_source] if args.llama_cpp_source else []
    command += ["--draft", args.draft.name] if args.draft else []
    command += ["--ik-llama-cpp", "DIR"] if args.ik_llama_cpp else []
    for rival in RIVALS:
        command += [f"--{rival.option}", "PYTHON"] if getattr(args, rival.option) else []
    command += ["--slots", ",".join(map(str, args.slots)), "--ours", ",".join(args.ours)]
    for text in args.smart or ():
        command += ["--smart", without_folders(text)]
    command += ["--max-tokens", str(args.max_tokens), "--tune-tokens", str(args.tune_tokens)]
    command += ["--blocks", ",".join(map(str, args.blocks))]
    command += ["--max-model-len", str(args.max_model_len)]
    command += ["--rows", ",".join(map(str, args.rows))]
    command += ["--forward-context", str(args.forward_context)]
    command += ["--time-limit", f"{sum(limits):.0f}"]
    parts = f"  # in {len(limits)} parts, by --resume" if len(limits) > 1 else ""
    return shlex.join(command) + parts
