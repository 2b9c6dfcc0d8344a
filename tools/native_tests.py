"""Builds the tests of the CPU kernels (tests/native) for every variant of csrc/variants.txt, and
runs them where it can: on this CPU, else under qemu, else not at all, which the last lines say.

    python tools/native_tests.py                               # all variants
    python tools/native_tests.py --variant neon --quick        # one, with fewer random cases
    python tools/native_tests.py --sanitize                    # this CPU's best, with sanitizers
    python tools/native_tests.py --syntax                      # are there warnings, for any CPU?

Needs g++; for other architectures g++-aarch64-linux-gnu and qemu-user. All is compiled first, then
programs run, two at a time. A variant whose library stands in kernels/lib, newer than its sources,
is tested by that library, as it ships. Objects are kept in build/native-tests by a hash of what
they are made of. The exit code is 0 if nothing failed.

Needed by `make test-native` and `make quality`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # needs no environment

from smart_decoding.kernels.library import Variant, variants  # noqa: E402

CSRC = ROOT / "src" / "smart_decoding" / "kernels" / "csrc"
TESTS = ROOT / "tests" / "native"
BUILD = ROOT / "build" / "native-tests"
LANGUAGE = ("-std=c++17",)
WARNINGS = ("-Wall", "-Wextra", "-Wshadow")
SANITIZED = ("-O1", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# A program each. Checks of addresses are calls, not inlined, and undefined behaviour that is only
# of addresses is left to them: the compiler needs a minute for the matrix kernels, not six.
SANITIZERS = {
    "memory": (
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,alignment,object-size,pointer-overflow",
        "--param=asan-instrumentation-with-call-threshold=0",
    ),
    "threads": ("-fsanitize=thread",),
}
OPENMP = TESTS / "openmp.cpp"  # only for ThreadSanitizer; see there
CPUS = {  # of --syntax
    "x86_64": (
        "x86-64-v3",
        "alderlake",
        "skylake-avx512",
        "icelake-server",
        "cooperlake",
        "sapphirerapids",
        "znver3",
        "znver4",
    ),
    "aarch64": ("armv8-a", "armv8.2-a+bf16+dotprod", "armv8.2-a+bf16+dotprod+i8mm"),
}
EMULATE = "SMART_EMULATE_TILES"  # AMX's tiles as plain loops, for CPUs without
AT_ONCE = 2  # compilers, and then programs
CANNOT_RUN = 77  # exit code of a test program that this system cannot run
LONGEST = 1800  # seconds of a run


@dataclass(frozen=True)
class Build:
    """A test program; sanitize: with these of SANITIZERS."""

    variant: Variant
    sanitize: str | None

    @property
    def name(self) -> str:
        return self.variant.name + (f", {self.sanitize}" if self.sanitize else "")


@dataclass
class Outcome:
    build: Build
    how: str  # "ran", "ran under emulation", "compiled only", "not compiled", "FAILED"
    why: str = ""
    ran: float = 0.0  # seconds
    said: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--variant", action="append", metavar="NAME", help="only this one; may be repeated")
    add("--quick", action="store_true", help="fewer random cases, as always under qemu")
    add("--sanitize", action="store_true", help="for addresses and undefined behaviour; threads")
    add("--syntax", action="store_true", help="only look for warnings, as if for many CPUs")
    options = parser.parse_args()
    if options.syntax:
        return syntax()
    known = {variant.name: variant for variant in (*variants(), emulated_tiles())}
    unknown = [name for name in options.variant or () if name not in known]
    if unknown:
        parser.error(f"no such variant: {', '.join(unknown)}; there are {', '.join(known)}")
    if options.sanitize:
        best = [variant for variant in variants() if runs_here(variant)]
        if not best and not options.variant:
            parser.error("none of the variants runs on this CPU")
        asked = [known[name] for name in options.variant or ()] or best[:1]
    else:
        asked = [known[name] for name in options.variant or known]
    sanitizers = list(SANITIZERS) if options.sanitize else [None]
    builds = [Build(variant, sanitize) for sanitize in sanitizers for variant in asked]
    compile_all(builds)
    outcomes = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(functools.partial(attempt, quick=options.quick), builds):
            print(f"--- {outcome.build.name}\n{outcome.said}", end="", flush=True)
            outcomes.append(outcome)
    report(outcomes)
    return int(any(outcome.how == "FAILED" for outcome in outcomes))


def emulated_tiles() -> Variant:
    """AMX's variant with its tiles as plain loops: for testing only."""
    named = {variant.name: variant for variant in variants()}
    base = named["avx512-bf16"]
    if not runs_here(base):
        base = named["x86-64-v3"]
    return Variant("emulated-tiles", base.machine, (*base.flags, f"-D{EMULATE}"), base.needs)


def runs_here(variant: Variant) -> bool:
    return variant.machine == platform.machine() and not variant.lacking


def triplet(arch: str) -> str:
    return f"{arch.replace('_', '-')}-linux-gnu"


def compiler(arch: str) -> str | None:
    if arch == platform.machine():
        return shutil.which(os.environ.get("CXX", "g++"))
    return shutil.which(f"{triplet(arch)}-g++")


def emulator(variant: Variant) -> list[str] | None:
    """The command that runs a program of another CPU; qemu knows neither VNNI, AVX-512 nor AMX."""
    qemu = shutil.which(f"qemu-{variant.machine}")
    if qemu is None or any(
        flag.startswith(("avx_vnni", "avx512", "amx")) for flag in variant.needs
    ):
        return None
    if variant.machine == platform.machine():
        return [qemu, "-cpu", "max"]
    return [qemu, "-cpu", "max", "-L", f"/usr/{triplet(variant.machine)}"]


# --------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class Unit:
    """A source and the command that compiles it."""

    source: Path
    command: tuple[str, ...]

    @property
    def target(self) -> Path:
        headers = (
            *sorted(CSRC.glob("*.h")),
            *sorted(CSRC.glob("*.inc")),
            *sorted(TESTS.glob("*.h")),
        )
        digest = hashlib.sha256("\n".join((*self.command, version(self.command[0]))).encode())
        for path in (self.source, *headers):
            digest.update(path.read_bytes())
        return BUILD / f"{self.source.stem}-{digest.hexdigest()[:16]}.o"


@functools.cache
def version(cxx: str) -> str:
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def library(variant: Variant) -> Path | None:
    """The variant's library in kernels/lib, if it is newer than all sources."""
    if variant.machine != platform.machine() or not variant.path.exists():
        return None
    newest = max(source.stat().st_mtime for source in CSRC.iterdir())
    return variant.path if variant.path.stat().st_mtime > newest else None


def units(cxx: str, variant: Variant, sanitize: str | None) -> list[Unit]:
    """The kernels as the variant has them, unless its library has them; and the tests, the same
    for all of an architecture's."""
    extra: tuple[str, ...] = ("-O2",)
    if sanitize:
        extra = (*SANITIZED, *SANITIZERS[sanitize])
    common = (cxx, *LANGUAGE, *extra, *WARNINGS, "-fopenmp")
    kernels = (*common, *variant.flags)
    tests = (*common, f"-I{CSRC.relative_to(ROOT)}")
    found = []
    if sanitize or library(variant) is None:
        found = [Unit(source, kernels) for source in sorted(CSRC.glob("*.cpp"))]
    found += [Unit(source, tests) for source in sorted(TESTS.glob("*.cpp")) if source != OPENMP]
    if sanitize == "threads":
        found.append(Unit(OPENMP, tests))
    return found


def warnings(text: str) -> list[str]:
    """What a compiler says, without its explanations; each thing once."""
    lines = [line for line in text.splitlines() if ": warning: " in line or ": error: " in line]
    return list(dict.fromkeys(lines))


def compile_one(unit: Unit) -> subprocess.CompletedProcess[str] | None:
    """None if it is there already."""
    target = unit.target
    if target.exists():
        return None
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    command = [*unit.command, "-c", str(unit.source.relative_to(ROOT)), "-o", str(scratch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not done.returncode:
        os.replace(scratch, target)
    return done


def compile_all(builds: Sequence[Build]) -> None:
    """Compiles what all of them are made of, each source once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    wanted = {
        unit.target: unit
        for build in builds
        if (cxx := compiler(build.variant.machine)) is not None
        for unit in units(cxx, build.variant, build.sanitize)
    }
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in pool.map(compile_one, wanted.values()):
            if done is not None and done.stderr:
                shown = done.stderr if done.returncode else "\n".join(warnings(done.stderr))
                print(shown.rstrip(), flush=True)
    print(f"{len(wanted)} objects after {time.perf_counter() - started:.1f} s", flush=True)


def link(cxx: str, build: Build) -> tuple[Path | None, str]:
    """The test program, or None if a source does not compile, and what the linker says."""
    objects = [unit.target for unit in units(cxx, build.variant, build.sanitize)]
    if not all(path.exists() for path in objects):
        return None, ""
    names = "\n".join((build.variant.name, *map(str, objects)))
    shipped = None if build.sanitize else library(build.variant)
    digest = hashlib.sha256(names.encode())
    if shipped is not None:
        digest.update(shipped.read_bytes())
    program = BUILD / f"kernels_test-{build.variant.name}-{digest.hexdigest()[:16]}"
    if not program.exists():
        how = list(SANITIZERS[build.sanitize]) if build.sanitize else []
        how.append("-pthread" if build.sanitize == "threads" else "-fopenmp")
        kernels = [] if shipped is None else [str(shipped), f"-Wl,-rpath,{shipped.parent}"]
        command = [cxx, *how, *map(str, objects), *kernels, "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr
    return program, ""


# ---------------------------------------------------------------------------------------- running


def attempt(build: Build, quick: bool) -> Outcome:
    """Links a program and runs it, if it can be."""
    variant = build.variant
    cxx = compiler(variant.machine)
    if cxx is None:
        return Outcome(build, "not compiled", f"no {triplet(variant.machine)}-g++")
    if f"-D{EMULATE}" in variant.flags and not known_to_csrc(EMULATE):
        return Outcome(build, "not compiled", f"csrc does not know {EMULATE}")
    program, said = link(cxx, build)
    if program is None:
        return Outcome(build, "FAILED", "it does not compile", said=said)
    command, how = [str(program)], "ran"
    if not runs_here(variant):
        emulated = emulator(variant)
        if emulated is None:
            return Outcome(build, "compiled only", lacking(variant))
        command, how, quick = [*emulated, *command], "ran under emulation", True
    command += ["--quick"] if quick else []
    # OpenMP's threads must not spin: there may be more of them than cores.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, timeout=LONGEST, env=environment, stdout=output, stderr=output
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        ran = time.perf_counter() - start
        output.seek(0)
        said = output.read()
    if code is None:
        return Outcome(build, "FAILED", f"not done after {LONGEST} s", ran, said)
    if code == CANNOT_RUN:
        return Outcome(build, "compiled only", "the system refuses what it needs", ran, said)
    if code:
        return Outcome(build, "FAILED", f"exit code {code}", ran, said)
    return Outcome(build, how, "", ran, said)


def known_to_csrc(word: str) -> bool:
    sources = (*CSRC.glob("*.h"), *CSRC.glob("*.cpp"))
    return any(word in path.read_text() for path in sources)


def lacking(variant: Variant) -> str:
    if variant.machine != platform.machine():
        return f"no qemu-{variant.machine}"
    return "this CPU lacks " + " ".join(variant.lacking)


def report(outcomes: Sequence[Outcome]) -> None:
    print(f"\n{'variant':<24}{'architecture':<14}{'ran, s':>9}  result")
    for o in outcomes:
        result = f"{o.how}: {o.why}" if o.why else o.how
        print(f"{o.build.name:<24}{o.build.variant.machine:<14}{o.ran:>9.1f}  {result}")
    print()
    for how in ("ran", "ran under emulation", "compiled only", "not compiled", "FAILED"):
        names = [o.build.name for o in outcomes if o.how == how]
        if names or how != "FAILED":
            print(f"{how}: {'; '.join(names) or 'none'}")


def syntax() -> int:
    """Asks the compilers for warnings in the kernels, as if for each of CPUS."""
    sources = [str(source.relative_to(ROOT)) for source in sorted(CSRC.glob("*.cpp"))]
    jobs: list[tuple[str, str, list[str]]] = []
    skipped: list[str] = []
    for arch, cpus in CPUS.items():
        cxx = compiler(arch)
        if cxx is None:
            skipped += cpus
            continue
        for cpu in cpus:
            command = [cxx, *LANGUAGE, *WARNINGS, "-Werror", "-fopenmp", "-fsyntax-only"]
            jobs += [(source, cpu, [*command, f"-march={cpu}", source]) for source in sources]
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    failed = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(run, [command for *_, command in jobs]))
    for (source, cpu, _), answer in zip(jobs, answers, strict=True):
        if answer.returncode:
            failed.append(f"{Path(source).name} ({cpu})")
            print("\n".join(warnings(answer.stderr)), flush=True)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} checks without a warning")
    if skipped:
        print(f"not checked, as there is no compiler: {', '.join(skipped)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
