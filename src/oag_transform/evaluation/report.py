"""The report: everything that was measured as one HTML file, which needs nothing beside it."""

import base64
import json
import mimetypes
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import results
from .results import Cell, Pair, Result, Row

_ORDER = ("table1", "tradeoff", "cost", *(f"table{i}" for i in range(2, 7)), "autoencoder", *(f"fig{i}" for i in (1, 3, 4, 5)))
_SUMMARY = {"target": "Target", "data": "Images", "n": "Number of images", "hardware": "Hardware"}


def write_report(folder: Path, *, title: str = "Online Alternate Generator: what was measured") -> Path:
    """Write ``report.html`` into ``folder``, over every result that :func:`oag_transform.evaluation.results.write` left there.

    Figures and photographs are embedded; one whose file is missing is named in its place. JSON files that hold no result are
    passed over. Text is shown as it is, never as HTML.

    Args:
        folder: holds ``key.json`` files, and the figures that they name.
        title: heading of the report.

    Raises:
        ValueError: no result in the folder, or a JSON file that is broken or has rows and columns but isn't a result.
    """
    found = [results.read(path) for path in sorted(folder.glob("*.json")) if _claims_to_be_a_result(path)]
    if not found:
        raise ValueError(f"expected results of oag-transform evaluate (such as table1.json) in {folder}, found none")
    found.sort(key=lambda result: (_place(result.key), result.key))
    contents = "\n".join(f'<li><a href="#{_anchor(result.key)}">{escape(result.title)}</a></li>' for result in found)
    sections = "\n".join(_section(result, folder) for result in found)
    path = folder / "report.html"
    page = _PAGE.format(
        title=escape(title), style=_STYLE, script=_SCRIPT, summary=_summary(found), contents=contents, sections=sections
    )
    path.write_text(page, encoding="utf-8")
    return path


def _claims_to_be_a_result(path: Path) -> bool:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON") from error
    return isinstance(plain, dict) and {"rows", "columns"} <= plain.keys()


def _place(key: str) -> int:
    return next((i for i, start in enumerate(_ORDER) if re.match(rf"{start}(?!\d)", key)), len(_ORDER))


def _anchor(key: str) -> str:
    return "result-" + re.sub(r"[^A-Za-z0-9_-]", "-", key)


def _summary(found: Sequence[Result]) -> str:
    items = []
    for name, heading in _SUMMARY.items():
        values = dict.fromkeys(_text(result.facts[name]) for result in found if name in result.facts)
        if values:
            items.append(f"<div><dt>{heading}</dt><dd>{escape('; '.join(values))}</dd></div>")
    return f'<dl class="summary">{"".join(items)}</dl>' if items else ""


def _section(result: Result, folder: Path) -> str:
    parts = [f"<h2>{escape(result.title)}</h2>"]
    if result.caption:
        parts.append(f'<p class="caption">{escape(result.caption)}</p>')
    if result.columns:
        parts.append(_table(result))
    for figure in result.figures:
        image = _image(folder, figure.file, figure.caption, "line" if figure.file.endswith(".svg") else "photographs")
        parts.append(f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>")
    if result.pairs:
        parts.append(f'<div class="gallery">{"".join(_card(pair, folder) for pair in result.pairs)}</div>')
    if result.facts:
        parts.append(_facts(result.facts))
    return f'<section id="{_anchor(result.key)}">\n' + "\n".join(parts) + "\n</section>"


def _table(result: Result) -> str:
    timed = any(row.seconds is not None for row in result.rows)
    columns = list(zip(*(row.cells for row in result.rows if not row.error), strict=True)) or [()] * len(result.columns)
    full = [max((cell.n for cell in column if cell is not None), default=0) for column in columns]
    best = [
        max((cell.accuracy for cell in column if cell is not None and cell.n == n), default=0)
        if sum(cell is not None and cell.n == n for cell in column) > 1
        else None
        for column, n in zip(columns, full, strict=True)
    ]
    headings = [result.first, *result.columns, *(["s an image"] if timed else [])]
    head = "".join(f'<th scope="col"><button type="button">{escape(heading)}</button></th>' for heading in headings)
    body = "\n".join(_row(row, full, best, timed) for row in result.rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(result.title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(row: Row, full: Sequence[int], best: Sequence[float | None], timed: bool) -> str:
    name = f'<th scope="row">{escape(row.name)}</th>'
    if row.error:
        error = f"<span>failed: {escape(row.error)}</span>"
        return f'<tr class="failed">{name}<td colspan="{len(row.cells) + timed}">{error}</td></tr>'
    cells = [_cell(cell, n, top) for cell, n, top in zip(row.cells, full, best, strict=True)]
    if timed:
        seconds = row.seconds
        cells.append(
            '<td class="none">&ndash;</td>' if seconds is None else f'<td data-value="{seconds}">{_seconds(seconds)}</td>'
        )
    return f"<tr>{name}{''.join(cells)}</tr>"


def _cell(cell: Cell | None, full: int, best: float | None) -> str:
    if cell is None:
        return '<td class="none">&ndash;</td>'
    percent = f"{100 * cell.accuracy:.1f}"
    if cell.n == full and cell.accuracy == best:
        percent = f"<strong>{percent}</strong>"
    low, high = (f"{100 * bound:.0f}" for bound in cell.interval)
    fewer = "" if cell.n == full else f"<small>n = {cell.n}</small>"
    bar = f'style="--bar:{100 * cell.accuracy:.1f}%"'
    return f'<td data-value="{cell.accuracy}" {bar}>{percent}<small>{low}&ndash;{high}</small>{fewer}</td>'


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"


def _image(folder: Path, file: str, description: str, kind: str) -> str:
    path = (folder / file).resolve()
    media = mimetypes.guess_type(path.name)[0] or ""
    if not (path.is_relative_to(folder.resolve()) and path.is_file() and media.startswith("image/")):
        return f'<p class="missing">missing: {escape(file)}</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="{kind}" alt="{escape(description)}" src="data:{media};base64,{data}">'


def _card(pair: Pair, folder: Path) -> str:
    name = escape(pair.name)
    kinds = ("original", "attacked", "purified")
    files = (pair.original, pair.attacked, pair.purified)
    images = [_image(folder, file, f"{pair.name}, {kind}", kind) for kind, file in zip(kinds, files, strict=True)]
    lines = "".join(
        f'<tr><th scope="row">{kind}</th><td class="{"right" if seen == pair.name else "wrong"}">{escape(seen)}</td>'
        f"<td>{probability:.2f}</td></tr>"
        for kind, seen, probability in zip(kinds, pair.classes, pair.probabilities, strict=True)
    )
    missing = [image for image in images if image.startswith("<p")]
    stage = "".join(missing) or (
        f'<div class="stage">{"".join(images)}<span class="divider"></span><span class="tag left">attacked</span>'
        '<span class="tag rest">purified</span><span class="tag whole">original</span>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{name}: attacked on the left, purified on the right">'
        '</div>\n<label><input type="checkbox"> show the original</label>'
    )
    head = '<thead><tr><td></td><th scope="col">seen as</th><th scope="col">P(right)</th></tr></thead>'
    return f'<article class="card"><h3>{name}</h3>\n{stage}\n<table>{head}<tbody>{lines}</tbody></table></article>'


def _facts(facts: Mapping[str, Any]) -> str:
    items = []
    for name, value in facts.items():
        text = escape(_text(value))
        items.append(f"<dt>{escape(name)}</dt><dd>{f'<code>{text}</code>' if name == 'command' else text}</dd>")
    return f"<details><summary>Details, and the command</summary><dl>{''.join(items)}</dl></details>"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value)
    return str(value)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>How often an image classifier is still right behind a defense that rewrites its input. The attacks are <em>gray-box</em>:
the attacker knows the classifier, not the defense. Unless a result says otherwise, every image is one that the bare classifier
gets right, so that it stands at 100% on clean images without a defense.</p>
<p><strong>An attacker who knows the defense and attacks through it breaks it.</strong> These numbers say nothing about such an
attacker.</p>
<p>Numbers are top-1 accuracies in percent. The small print below each is its 95% Wilson interval, which covers the choice of
images and nothing else; where it overlaps another, the two may be equal. The best of each column is bold, among those measured
on all images.</p>
{summary}
</header>
<nav aria-label="Contents"><h2>Contents</h2>
<ol>
{contents}
</ol></nav>
<main>
{sections}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1e23; --soft: #5a626e; --rule: #d9dde3; --panel: #f5f6f8;
  --bar-color: #8db8e6; --link: #0b57a8; --wrong: #a63a00; --right: #00684a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e8eb; --soft: #a2aab5; --rule: #343a43;
  --panel: #1d2127; --bar-color: #3f74ad; --link: #8fc1ff; --wrong: #ff9c6b; --right: #5fd3ab; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem; text-wrap: balance; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 44rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
small { font-size: .75rem; color: var(--soft); font-weight: normal; }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); gap: .75rem 1.5rem;
  margin: 1.25rem 0; padding: 1rem; background: var(--panel); border-radius: .5rem; }
.summary dt, details dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
nav { margin: 1.5rem 0; }
nav h2 { font-size: 1rem; }
nav ol { margin: 0; padding-left: 1.6rem; }
nav li { padding: .2rem 0; }
section { margin: 0 0 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
.caption { color: var(--soft); }
/* a shadow at the right edge while there is more to scroll to */
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--rule); border-radius: .5rem;
  background: linear-gradient(to left, var(--page) 50%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--rule), transparent) right / 1.5rem 100% no-repeat; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
.scroll table { width: 100%; line-height: 1.3; }
.scroll th, .scroll td { padding: .4rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
.scroll tbody tr:last-child > * { border-bottom: 0; }
.scroll td { white-space: nowrap;
  background: linear-gradient(90deg, var(--bar-color) var(--bar, 0%), transparent 0) bottom / 100% .25rem no-repeat; }
.scroll td small { display: block; }
.scroll td.none { color: var(--soft); }
.scroll th:first-child { position: sticky; left: 0; z-index: 1; min-width: 7.5rem; max-width: 20rem; text-align: left;
  background: var(--page); border-right: 1px solid var(--rule); }
.scroll tbody th { font-weight: normal; }
.scroll thead th { padding: 0; vertical-align: bottom; }
.scroll thead th:first-child { background: var(--panel); }
.scroll thead button { width: 100%; min-height: 2.75rem; padding: .4rem .6rem; border: 0; background: none; color: inherit;
  font: inherit; font-size: .85rem; font-weight: 600; line-height: 1.25; text-align: inherit; cursor: pointer; }
.scroll thead button:focus-visible { outline-offset: -3px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.failed td { white-space: normal; text-align: left; color: var(--wrong); }
.failed span { position: sticky; left: 9rem; display: block; width: fit-content; max-width: calc(100vw - 12.5rem); }
@media (max-width: 40rem) {
  .scroll th, .scroll td { padding: .35rem .45rem; }
  .scroll thead button { padding: .35rem .45rem; }
  .scroll th:first-child { min-width: 7rem; max-width: 8rem; }
  .scroll tbody th { font-size: .9rem; }
}
figure { margin: 1.25rem 0; }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; border-radius: .25rem; }
figure img.photographs { max-width: 50rem; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .9rem; max-width: 44rem; }
.missing { margin: 0; padding: 1rem; border: 1px dashed var(--rule); color: var(--wrong); overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { figure img.line { filter: invert(.92) hue-rotate(180deg) brightness(1.15); } }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.25rem;
  margin: 1rem 0; }
.card { padding: .9rem; border: 1px solid var(--rule); border-radius: .5rem; min-width: 0; }
.stage { --cut: 50%; position: relative; overflow: hidden; border-radius: .25rem; background: var(--panel); min-height: 3rem; }
.stage img { display: block; width: 100%; height: auto; }
.stage .attacked, .stage .purified { position: absolute; inset: 0; height: 100%; }
.stage .purified { clip-path: inset(0 0 0 var(--cut)); }
.stage .original { opacity: 0; }
.stage .divider { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 0 1px rgb(0 0 0 / .55); pointer-events: none; }
.stage .divider::after { content: "\\2194"; position: absolute; top: 50%; left: 50%; width: 2.25rem; height: 2.25rem;
  margin: -1.125rem 0 0 -1.125rem; border-radius: 50%; background: #fff; color: #1b1e23; text-align: center;
  line-height: 2.2rem; box-shadow: 0 0 0 1px rgb(0 0 0 / .55); }
.stage .tag { position: absolute; bottom: .4rem; padding: 0 .4rem; border-radius: .2rem; background: rgb(0 0 0 / .65);
  color: #fff; font-size: .75rem; pointer-events: none; }
.stage .left { left: .4rem; } .stage .rest { right: .4rem; } .stage .whole { left: .4rem; display: none; }
/* the thumb reaches over both edges, so that its middle is at the divider */
.stage input { position: absolute; top: 0; left: -22px; width: calc(100% + 44px); height: 100%; margin: 0; opacity: 0;
  appearance: none; -webkit-appearance: none; background: none; cursor: ew-resize; touch-action: pan-y; }
.stage input::-webkit-slider-thumb { -webkit-appearance: none; width: 44px; height: 200rem; }
.stage input::-moz-range-thumb { width: 44px; height: 200rem; border: 0; }
.stage:has(:focus-visible) { outline: 3px solid var(--link); outline-offset: 2px; }
.card:has(:checked) .original { opacity: 1; position: relative; z-index: 1; }
.card:has(:checked) .stage input { display: none; }
.card:has(:checked) .divider, .card:has(:checked) .left, .card:has(:checked) .rest { display: none; }
.card:has(:checked) .whole { display: block; z-index: 2; }
.card label { display: flex; align-items: center; gap: .5rem; min-height: 2.75rem; font-size: .9rem; cursor: pointer; }
.card label input { width: 1.15rem; height: 1.15rem; margin: 0; }
.card table { width: 100%; table-layout: fixed; font-size: .85rem; line-height: 1.35; }
.card th, .card td { padding: .15rem .5rem .15rem 0; text-align: left; vertical-align: top; font-weight: normal; }
.card th { color: var(--soft); }
.card tr > :first-child { width: 4.75rem; }
.card tr > :last-child { width: 4.5rem; text-align: right; padding-right: 0; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.right::before { content: "\\2713\\00A0"; } .wrong::before { content: "\\2717\\00A0"; }
summary { cursor: pointer; padding: .6rem 0; color: var(--link); }
details dl { margin: 0; } details dt { margin-top: .5rem; }
code { display: block; padding: .6rem; background: var(--panel); border-radius: .25rem; white-space: pre-wrap;
  font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (min-width: 75rem) {
  body { display: grid; grid-template-columns: 16rem minmax(0, 1fr); gap: 0 3rem; max-width: 82rem; padding: 1.5rem 2rem; }
  header, main { grid-column: 2; }
  nav { grid-column: 1; grid-row: 1 / span 2; position: sticky; top: 1.5rem; align-self: start; margin: .5rem 0;
    max-height: calc(100vh - 3rem); overflow-y: auto; font-size: .9rem; }
}
@media print { .scroll { overflow: visible; } nav { display: none; } }
"""

_SCRIPT = """
for (const input of document.querySelectorAll(".stage input")) {
  const move = () => input.parentElement.style.setProperty("--cut", input.value + "%");
  input.addEventListener("input", move);
  move();
}
for (const heading of document.querySelectorAll(".scroll thead th")) {
  heading.firstElementChild.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") ? heading.getAttribute("aria-sort") === "ascending" : column > 0;
    const value = row => column ? parseFloat((row.cells[column] || row.cells[0]).dataset.value) : row.cells[0].textContent;
    const compare = (a, b) => column ? a - b : a.localeCompare(b, "en", {numeric: true});
    const absent = a => column > 0 && isNaN(a);
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((one, other) => {
      const a = value(one), b = value(other);
      return absent(a) || absent(b) ? absent(a) - absent(b) : (down ? -1 : 1) * compare(a, b);
    }));
  });
}
"""
