"""Reports of a run of `gguf-speed`: figures for JSON, and tables on a terminal.

Needed by `gguf-speed`, whose files are the README's first table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from smart_lab.gguf.ik import NAME as IK
from smart_lab.gguf.rates import best, by_task, figures, ratio
from smart_lab.results import mapping

THEIRS = "llama.cpp"
KEYS = ("overall", "decode")
BY_TASK = "of one request, its prompt included, by task:"
# Parts of our contestants' names in words: how weights are held, in old files too, and what drafts.
_HELD = {
    "auto": "",
    "exact": ", exact products",
    "as-stored": ", exact products",
    "int8": ", activations in 8 bits",
    "expanded": ", expanded to bf16",
}
_DRAFTERS = {
    "plain": "plain decoding",
    "smart draft_model": "draft model",
    "smart eagle": "head",
    "smart mtp": "MTP layer",
    "smart ngram": "n-grams",
    "smart union": "{} and n-grams",
}
DECODE = "of one request behind its first token; neighbours' prompts are in it"


def run_of(
    slots: int,
    blocks: Sequence[Mapping[str, Mapping[str, Any]]],
    tasks: Sequence[Sequence[str]],
    held: Sequence[str],
) -> dict[str, Any]:
    """Figures of all contestants at so many slots, and ratios of the best ones, over the same
    blocks. tasks: of each prompt of each block; held: our ways, the baseline first."""
    kinds = [counted(names) for names in tasks]
    found = figures(blocks, f"{held[0]} plain")
    names = [each.name for each in found]
    rates = {name: {key: [block[name][key] for block in blocks] for key in KEYS} for name in names}
    rivals = [name for name in names if not name.startswith(tuple(f"{way} " for way in held))]
    their_plain = [name for name in rivals if name.endswith(" plain")]
    theirs = [rivals, *by_engine(rivals)]  # the best of all comes first
    ratios = []
    for way in held:
        plain = f"{way} plain"
        smart = [name for name in names if name.startswith(f"{way} smart")]
        for key in KEYS:
            ours = best(found, smart or [plain], key)
            pairs = [(ours, best(found, some, key)) for some in theirs]
            pairs += [(ours, plain), (plain, best(found, their_plain, key))]
            for a, b in dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]):
                value = ratio(rates[a][key], rates[b][key], kinds)
                ratios.append({"of": a, "over": b, "key": key, **asdict(value)})
    return {
        "slots": slots,
        "blocks": len(blocks),
        "prompts": len(blocks[0][found[0].name]["answers"]),
        "contestants": [asdict(each) for each in found],
        "ratios": ratios,
        "rates": rates,
        "tasks": kinds,
        "by_task": {name: by_task(blocks, tasks, name) for name in names},
    }


def by_engine(names: Sequence[str]) -> list[list[str]]:
    """Contestants of each engine, which is the first word of their names."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split()[0], []).append(name)
    return list(found.values())


def counted(names: Sequence[str]) -> str:
    """'2 code, 1 maths'."""
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def in_words(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result whose names of our contestants are words: SMART (head and n-grams) for auto
    smart union."""
    command = mapping(result.get("provenance")).get("command") or ""
    drafter = "draft model" if " --draft " in command else "head"

    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {_in_words(name, drafter): told(of) for name, of in value.items()}
        if isinstance(value, list):
            return [told(each) for each in value]
        return _in_words(value, drafter) if isinstance(value, str) else value

    parts = ("forwards", "bytes_read", "prompt", "runs")
    return {**result, **{part: told(result[part]) for part in parts if part in result}}


def _in_words(name: str, drafter: str) -> str:
    """Return a contestant's name, or a way to hold weights, in words; another text as it is.
    drafter: in a union whose name has no model."""
    way, _, rest = name.partition(" ")
    kind, comma, options = rest.partition(", ")
    if way not in _HELD or (kind and kind not in _DRAFTERS):
        return name
    if "model=" in options:
        drafter = "draft model" if options.endswith(".gguf") else "head"
    parts = _DRAFTERS.get(kind, "").format(drafter) + comma + options + _HELD[way]
    return f"SMART ({parts.removeprefix(', ')})" if parts else "SMART"


def text(result: Mapping[str, Any]) -> str:
    """Tables for a terminal."""
    result = in_words(result)
    about = result["llama_cpp"]
    lines = [f"\n{build_of(about)}", about["system"]]
    lines += rivals_of(result)
    lines += _forwards(result)
    for run in result["runs"]:
        lines += _run(run)
    if not result["runs"]:
        lines.append("no speeds: the time limit came first; go on with --resume")
    return "\n".join(lines)


def rivals_of(result: Mapping[str, Any]) -> list[str]:
    """Return the versions of rivals besides llama.cpp. Early files have none."""
    return [f"{name}: {version}" for name, version in result.get("rivals", {}).items()]


def build_of(about: Mapping[str, Any]) -> str:
    """Return the build of llama.cpp: its source if it is known, its version, its options."""
    return f"{THEIRS}: {origin_of(about)}"


def origin_of(about: Mapping[str, Any]) -> str:
    """Return the same of any server."""
    build = ", ".join(f"{name}={value}" for name, value in about.get("build", {}).items())
    parts = (about.get("source"), about["version"], build)
    return "; ".join(part for part in parts if part)


def _forwards(result: Mapping[str, Any]) -> Iterator[str]:
    found = result["forwards"]
    if not found:
        return
    yield f"\nmilliseconds of a forward after {result['forward_context']} tokens"
    yield f"{'rows':>6}" + "".join(f"{engine:>24}" for engine in found)
    for rows in found[THEIRS]:
        cells = (found[engine][rows] for engine in found)
        yield f"{rows:>6}" + "".join(
            f"{m:>8.1f} ({a:.1f} - {b:.1f})".rjust(24) for m, a, b in cells
        )
    yield "llama.cpp: rows of one sequence, logits of the last; the best of its layouts"
    yield "llama.cpp, sequences: a row of each, with logits; ours: rows of one, all with logits"
    yield from memory_and_prompt(result)


def memory_and_prompt(result: Mapping[str, Any]) -> Iterator[str]:
    """Return one row's share of the memory's speed, and the speed of reading a prompt. Early files
    have neither."""
    for way, size in result.get("bytes_read", {}).items():
        if "1" in result["forwards"][way]:
            rate, read = size / result["forwards"][way]["1"][0] / 1e6, result["memory"][0] / 1e9
            yield (
                f"{way}, one row: {size / 1e9:.2f} GB of weights, {rate:.1f} GB/s, "
                f"{rate / read:.2f} of the {read:.1f} at which the kernels read memory"
            )
    if "prompt" in result:
        theirs = result["prompt"][THEIRS][0]
        rates = [
            f"{name} {rate:.0f} ({low:.0f} - {high:.0f}), {rate / theirs:.2f} of {THEIRS}'s"
            for name, (rate, low, high) in result["prompt"].items()
        ]
        yield f"a prompt of {result['prompt_tokens']} tokens, tokens per second: {'; '.join(rates)}"


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n{title(run)}; tokens per second"
    yield f"decode: {DECODE}"
    yield f"{'':38}{'all':>20}{'decode':>20}{'a round':>9}{'same':>6}"
    for each in run["contestants"]:
        overall, decode = (
            f"{each[key][0]:.1f} ({each[key][1]:.1f} - {each[key][2]:.1f})" for key in KEYS
        )
        per_round = f"{each['per_round']:.2f}"
        yield f"{each['name']:38}{overall:>20}{decode:>20}{per_round:>9}{each['same']:>6.0%}"
    yield BY_TASK
    for name, rates in run["by_task"].items():
        yield f"{name:38}" + ", ".join(f"{task} {rate:.1f}" for task, rate in rates.items())
    for each in run["ratios"]:
        of = "" if each["key"] == "overall" else ", decode"
        bounds = f"({each['low']:.2f} - {each['high']:.2f})" if each["pairs"] > 1 else "(one block)"
        line = f"{each['of']} over {each['over']}{of}: {each['value']:.2f} {bounds}"
        yield line + ("" if of else apart(run, each))
    for name, tuned in servers_of(run):
        for mode, flags in tuned["flags"].items():
            yield f"{name} {mode}: {flags}"
        for each in tuned["tried"]:
            if "error" in each:
                yield f"failed: {name} {each['mode']} with {each['flags']}: {each['error']}"
        if tuned["left_out"]:
            yield f"{name}, {not_tried(tuned)}"
    yield from drafts_of(run)


def drafts_of(run: Mapping[str, Any]) -> Iterator[str]:
    """Return the drafts that engines in environments of their own tried. Early files have them in
    blocks."""
    for name, rates in run.get("drafts_tried", {}).items():
        modes = ", ".join(f"{mode} {rate:.1f}" for mode, rate in rates.items())
        yield f"{name} was tried with {modes}"


def apart(run: Mapping[str, Any], ratio: Mapping[str, Any]) -> str:
    """Return the ratio by task, of one request."""
    ours, theirs = (run["by_task"][ratio[side]] for side in ("of", "over"))
    return "; " + ", ".join(f"{task} {ours[task] / theirs[task]:.2f}" for task in ours)


def servers_of(run: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return each server, and how it was tuned."""
    yield THEIRS, run
    if IK in run:
        yield IK, run[IK]


def title(run: Mapping[str, Any]) -> str:
    """Return the title of a run's table. Early files sent no more prompts than there are slots."""
    prompts = run.get("prompts", run["slots"])
    return f"{run['slots']} requests at a time, {run['blocks']} blocks of {prompts} prompts"


def not_tried(tuned: Mapping[str, Any]) -> str:
    """Return how many of a server's settings the time did not allow."""
    missing = len(tuned["left_out"])
    tried = {(each["mode"], each["flags"]) for each in tuned["tried"]}  # finalists twice
    return f"not tried for lack of time: {missing} of {missing + len(tried)} settings"
