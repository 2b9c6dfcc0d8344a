"""The look of the report: colours of policies in light and dark, and the page's style sheet."""

from __future__ import annotations

LIGHT = ("#2a78d6", "#d9541e", "#128a5e", "#b07800", "#c2478a", "#5a48c8", "#6b7d1e", "#a03a3a")
DARK = ("#5598e7", "#f0805a", "#2fbf88", "#d9a52b", "#e77fb3", "#9d90f0", "#a9b94a", "#e08080")
MUTED = "#777775"


def _variables(colours: tuple[str, ...], **others: str) -> str:
    named = {f"c{i}": colour for i, colour in enumerate(colours)} | others
    return "".join(f"--{name.replace('_', '-')}:{value};" for name, value in named.items())


_LIGHT = _variables(LIGHT, page="#f6f6f3", card="#ffffff", ink="#1b1b19", soft="#5c5c58", muted=MUTED, grid="#e4e4df",
                    win="#dbe9fb", loss="#fbe0dc", below="#c0392b")  # fmt: skip
_DARK = _variables(DARK, page="#121211", card="#1c1c1a", ink="#f2f2ee", soft="#b5b5ae", muted="#8f8f8a", grid="#343431",
                   win="#1d3a5c", loss="#5a2520", below="#ff6b57")  # fmt: skip

CSS = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}}
main{{max-width:980px;margin:0 auto;padding:16px}}
h1{{font-size:1.6rem;line-height:1.2;margin:.6em 0 .2em}}
h2{{font-size:1.15rem;margin:0 0 .5em}}
h3{{font-size:.9rem;margin:0 0 .2em;font-weight:600}}
section{{background:var(--card);border-radius:10px;padding:16px;margin:14px 0}}
.sub,.caption,.missing{{color:var(--soft)}}
.caption{{font-size:.85rem;margin:.6em 0 0;max-width:75ch}}
.missing{{margin:0;font-style:italic}}
.warn{{background:var(--loss);padding:8px 12px;border-radius:8px}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;background:none;padding:0}}
.tile{{background:var(--card);border-radius:10px;padding:12px 16px;border-left:4px solid var(--grid)}}
.tile b{{display:block;font-size:1.25rem;white-space:nowrap}}
.tile span{{font-size:.85rem;color:var(--soft)}}
.tile.faster{{border-color:var(--c0)}}
.tile.slower{{border-color:var(--below)}}
svg{{display:block;width:100%;height:auto}}
svg text{{font-size:12px;fill:var(--soft)}}
svg .mid{{text-anchor:middle}}
svg .end{{text-anchor:end}}
svg .tag{{font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:5px}}
.grid{{stroke:var(--grid)}}
.level{{stroke:var(--ink);stroke-dasharray:4 4}}
.below{{fill:var(--below);opacity:.07}}
.line{{fill:none;stroke-width:2.5;stroke-linejoin:round}}
.whisker{{stroke-width:2;opacity:.6}}
.band{{opacity:.16}}
.mark{{stroke:var(--card);stroke-width:1}}
.narrow{{display:none}}
.panels{{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:18px}}
.panel{{max-width:460px}}
.legend{{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:0 0 .5em;padding:0;font-size:.85rem}}
.legend li{{display:flex;align-items:center;gap:6px}}
.legend svg{{width:16px;height:16px;flex:none}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}}
th,td{{padding:5px 8px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}}
th:first-child{{text-align:left;position:sticky;left:0;background:var(--card)}}
td.faster{{background:var(--win)}}
td.slower,#losses li.slower{{background:var(--loss)}}
#losses ul{{list-style:none;padding:0;margin:0}}
#losses li{{padding:4px 10px;border-radius:6px;margin:3px 0}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--page);padding:12px;border-radius:8px;font-size:.85rem}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:.85rem;margin:0}}
dt{{color:var(--soft)}}
dd{{margin:0;overflow-wrap:anywhere}}
@media (max-width:640px){{
.wide{{display:none}}.narrow{{display:block}}dl{{grid-template-columns:1fr}}main{{padding:8px}}
}}
"""
