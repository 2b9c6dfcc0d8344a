"""Which variant of the kernels is loaded, and what is said where none can be."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.kernels import library

# What Linux calls them in /proc/cpuinfo (arch/x86/include/asm/cpufeatures.h,
# arch/arm64/kernel/cpuinfo.c).
X86 = frozenset(
    [
        "abm",
        "amx_bf16",
        "amx_int8",
        "amx_tile",
        "avx",
        "avx2",
        "avx512_bf16",
        "avx512_vnni",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512f",
        "avx512vl",
        "avx_vnni",
        "bmi1",
        "bmi2",
        "f16c",
        "fma",
        "movbe",
        "sse4_1",
        "sse4_2",
        "ssse3",
    ]
)
CACHED = (
    library.cpu_flags,
    library.variants,
    library.load,
    library.best,
    library.unavailable,
    library.identity,
)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer of an earlier test, and none for a later one."""
    monkeypatch.delenv("SMART_ISA", raising=False)
    monkeypatch.setattr(library, "_running", library._Running())
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    for function in CACHED:
        function.cache_clear()


def names() -> list[str]:
    """Of this machine's variants, the best one first."""
    return [variant.name for variant in library.variants() if variant.machine == platform.machine()]


def test_a_better_variant_needs_all_that_a_lesser_one_does() -> None:
    """So the first one that runs is the best one; 'abm', 'avx' and 'movbe' come with AVX-512, and
    its VNNI is no less than AVX-VNNI, which CPUs may lack beside it."""
    implied = {"abm", "avx", "movbe"}
    for machine in ("x86_64", "aarch64"):
        needs = [
            variant.needs - implied | ({"avx_vnni"} if "avx512_vnni" in variant.needs else set())
            for variant in library.variants()
            if variant.machine == machine
        ]
        assert len(needs) > 1
        assert all(better > lesser for better, lesser in itertools.pairwise(needs))


def test_the_best_one_that_runs_is_chosen() -> None:
    runs = library.runnable()
    assert runs
    assert runs == [name for name in names() if name in runs]
    assert library.chosen() == next(name for name in runs if _loads(name))
    assert library.unavailable() is None


def _loads(name: str) -> bool:
    try:
        library.load(name)
    except library.DeniedError:
        return False
    return True


def test_smart_isa_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    last = library.runnable()[-1]
    monkeypatch.setenv("SMART_ISA", last)
    assert library.chosen() == last
    assert library.identity(last).startswith(f"{last} ")


def with_tiles(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The best variant here, as if it had tiles, and the next one; they run here."""
    first, second = library.runnable()[:2]
    tiles = {variant.name for variant in library.variants() if variant.has_tiles} | {first}
    fake = property(lambda variant: variant.name in tiles)
    monkeypatch.setattr(library.Variant, "has_tiles", fake)
    return first, second


def test_beside_tiles_the_best_of_vectors_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    amx = next(variant for variant in library.variants() if variant.name == "amx")
    assert [variant for variant in library.variants() if variant.has_tiles] == [amx]
    assert library.candidates() == [library.best()]  # this CPU may have tiles; the next test fakes
    first, second = with_tiles(monkeypatch)
    assert library.candidates() == [first, second]
    monkeypatch.setenv("SMART_ISA", first)
    assert library.candidates() == [first]


def test_a_candidate_that_is_settled_on_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, second = with_tiles(monkeypatch)
    library.settle(second)
    assert library.chosen() == second
    assert library.library() is library.load(second)
    assert library.candidates() == [second]


def test_what_is_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie in its panels, which no other variant reads."""
    first, second = with_tiles(monkeypatch)
    assert library.library() is library.load(first)
    library.settle(second)
    assert library.candidates() == [first]
    assert library.library() is library.load(first)


def test_a_trial_is_of_one_thread_and_uses_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = with_tiles(monkeypatch)
    elsewhere: list[str] = []
    with library.trying(second):
        assert library.library() is library.load(second)
        thread = threading.Thread(target=lambda: elsewhere.append(library.chosen()))
        thread.start()
        thread.join()
    assert elsewhere == [first]
    assert library.candidates() == [first, second]


def test_an_unknown_name_lists_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMART_ISA", "nonsense")
    for ask in (library.chosen, library.unavailable):
        with pytest.raises(ConfigError, match="'nonsense' is no variant; here run: ") as caught:
            ask()
        assert str(caught.value).endswith(", ".join(library.runnable()))


def test_a_variant_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(variant for variant in library.variants() if variant.machine != platform.machine())
    monkeypatch.setenv("SMART_ISA", other.name)
    with pytest.raises(ConfigError, match=f"is for {other.machine}, this is {platform.machine()}"):
        library.chosen()


def test_a_variant_beyond_this_cpu_names_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    best = next(variant for variant in library.variants() if variant.machine == platform.machine())
    lacking = sorted(best.needs)[0]
    monkeypatch.setattr(library, "cpu_flags", lambda: best.needs - {lacking})
    monkeypatch.setenv("SMART_ISA", best.name)
    with pytest.raises(ConfigError, match=f"needs {lacking}, which this CPU lacks"):
        library.chosen()
    assert best.name not in library.runnable()


def test_a_cpu_that_is_too_old_is_told_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library, "cpu_flags", lambda: X86 - {"avx2"})
    assert library.runnable() == []
    assert library.unavailable() == "this CPU lacks avx2, which the CPU kernels need"


def test_another_kind_of_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert library.unavailable() == "there are no CPU kernels for riscv64"


def test_kernels_that_were_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "LIBRARIES", tmp_path)
    reason = library.unavailable()
    assert reason is not None
    assert re.match("the CPU kernels are not built: build them with .*pip install", reason)


def test_what_is_no_library_is_an_error_and_no_lesser_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = library.chosen()
    shutil.copytree(library.LIBRARIES, tmp_path / "lib")
    monkeypatch.setattr(library, "LIBRARIES", tmp_path / "lib")
    (tmp_path / "lib" / f"libsmart_{best}.so").write_text("nothing")
    _forget()
    with pytest.raises(
        ConfigError, match=f"the kernels' variant '{best}' cannot be loaded: .*build them with"
    ):
        library.chosen()
    assert best in str(library.unavailable())


def test_what_the_system_denies_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX: the CPU has it, and a container's filter may forbid it."""
    runs = library.runnable()
    load = library.load

    def denying(name: str) -> object:
        if name == "best":
            raise library.DeniedError(f"the system denies {name}")
        return load(name)

    monkeypatch.setattr(library, "runnable", lambda: ["best", *runs])
    monkeypatch.setattr(library, "load", denying)
    assert library.chosen() == runs[0]
    library.best.cache_clear()
    monkeypatch.setenv("SMART_ISA", "best")
    with pytest.raises(
        ConfigError, match="the system denies"
    ):  # who asks for it by name gets it or an error
        library.chosen()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone's kernels folder, with libraries newer than their sources."""
    kernels = tmp_path / "src" / "smart_decoding" / "kernels"
    shutil.copytree(library.SOURCES, kernels / "csrc")
    shutil.copytree(library.LIBRARIES, kernels / "lib")
    (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(library, "SOURCES", kernels / "csrc")
    monkeypatch.setattr(library, "LIBRARIES", kernels / "lib")
    for path in (kernels / "csrc").iterdir():
        os.utime(path, (1000, 1000))
    for path in (kernels / "lib").iterdir():
        os.utime(path, (2000, 2000))
    return kernels


def test_a_clones_libraries_may_not_be_older_than_a_source(clone: Path) -> None:
    assert library.unavailable() is None
    _forget()
    os.utime(clone / "csrc" / "abi.h", (3000, 3000))
    reason = library.unavailable()
    assert reason is not None
    assert reason.startswith("the CPU kernels are older than their sources: build them")
    assert reason.count("older") == 1


def test_one_stale_library_is_not_passed_over(clone: Path) -> None:
    best = library.chosen()
    _forget()
    os.utime(clone / "lib" / f"libsmart_{best}.so", (500, 500))
    with pytest.raises(ConfigError, match="older than their sources"):
        library.chosen()


def test_an_installed_package_does_not_compare_times(clone: Path) -> None:
    os.utime(clone / "csrc" / "abi.h", (3000, 3000))
    (clone.parents[2] / "CMakeLists.txt").unlink()
    assert library.unavailable() is None
