"""Short names of contestants, for tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDTH = 20


def short_names(policies: Iterable[str]) -> dict[str, str]:
    """Policy -> short name: of one with long options, the values of those that differ between its
    settings ('eagle2 7/10/60'); numbered where even that is long, or the same for two."""
    labels = list(dict.fromkeys(policies))
    long = [label for label in labels if len(label) > WIDTH]
    names = {label: _values(label, long) if label in long else label for label in labels}
    for label in long:
        if len(names[label]) > WIDTH or list(names.values()).count(names[label]) > 1:
            names[label] = f"{policy_of(label)}#{long.index(label) + 1}"
    return names


def policy_of(label: str) -> str:
    """The policy's own name in 'eagle2(depth=7)' or 'eagle2 tuned 1'."""
    return label.split("(")[0].split(" ")[0]


def _values(label: str, labels: Sequence[str]) -> str:
    """A policy and the values of its options, of those only that its other settings in `labels`
    have otherwise."""
    policy = policy_of(label)
    options = [_options(other) for other in labels if policy_of(other) == policy]
    mine = _options(label)
    if any(list(other) != list(mine) for other in options):
        return f"{policy} {','.join(f'{name}={value}' for name, value in mine.items())}"
    differing = [
        name for name in mine if len(options) == 1 or len({other[name] for other in options}) > 1
    ]
    return f"{policy} {'/'.join(mine[name] for name in differing)}"


def _options(label: str) -> dict[str, str]:
    """'eagle2(depth=7,top_k=10)' as {'depth': '7', 'top_k': '10'}."""
    inside = label.partition("(")[2].removesuffix(")")
    pairs = (item.partition("=") for item in inside.split(","))
    return {name: value for name, _, value in pairs if name}
