"""The report's page: one HTML file with style and scripts in it, that asks the network for nothing.

Plain HTML comes in; what the figures show comes in as JSON and is drawn by Plotly in the browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { --ink: #24292f; --soft: #57606a; --line: #d8dee4; --wash: #f6f8fa; --accent: #0072b2; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: white;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .9rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 0 0 .15rem; }
div + h3, details + h3, dl + h3 { margin-top: 1.4rem; }
p { margin: .35rem 0; }
a { color: var(--accent); }
code, .path { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em;
  overflow-wrap: anywhere; }
.soft, .caption, .notes, .absent, dt { color: var(--soft); }
.lead { font-size: 1.1rem; max-width: 60rem; }

.bar { position: sticky; top: 0; z-index: 10; background: rgba(255, 255, 255, .96);
  border-bottom: 1px solid var(--line); }
.bar > div { max-width: 76rem; margin: 0 auto; padding: .45rem 1.25rem; display: flex;
  flex-wrap: wrap; gap: .3rem 1.25rem; align-items: center; justify-content: space-between; }
nav { display: flex; gap: .1rem 1rem; overflow-x: auto; white-space: nowrap; font-size: .92rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
fieldset { border: 1px solid var(--line); border-radius: 6px; padding: 0; margin: 0;
  display: flex; font-size: .85rem; overflow: hidden; }
fieldset label { padding: .2rem .7rem; cursor: pointer; }
fieldset input { position: absolute; opacity: 0; }
fieldset label:has(:checked) { background: var(--accent); color: white; }
fieldset label:has(:focus-visible) { outline: 2px solid var(--ink); outline-offset: -2px; }
legend { position: absolute; left: -99rem; }

.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr));
  gap: .75rem; margin: 1.25rem 0 0; padding: 0; }
.numbers div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.numbers dt { font-size: .8rem; }
.numbers dd { margin: 0; font-size: 1.25rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.numbers small { display: block; font-size: .78rem; font-weight: 400; color: var(--soft); }

.films { display: flex; flex-wrap: wrap; gap: 1.25rem; margin-top: 1.25rem;
  align-items: flex-start; }
.films figure { margin: 0; width: min(20rem, 100%); }
.films img { max-width: 100%; border: 1px solid var(--line); border-radius: 8px; display: block; }
.films figcaption { font-size: .82rem; color: var(--soft); margin-top: .3rem;
  overflow-wrap: anywhere; }

.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem 1.75rem; }
.panel { margin: 0; min-width: 0; }
.panel.wide { grid-column: 1 / -1; }
.modebar-container { opacity: 0; transition: opacity .15s; }
.panel:hover .modebar-container { opacity: 1; }
.caption { font-size: .88rem; margin: 0 0 .4rem; }
.notes, .absent { font-size: .82rem; margin: .25rem 0 0; }
.notes:empty { display: none; }
.absent { margin: 1rem 0 0; padding: .6rem .9rem; background: var(--wash); border-radius: 6px; }
.absent ul { margin: .2rem 0 0; padding-left: 1.1rem; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { font-size: .8rem; color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }

.findings { list-style: none; margin: 0; padding: 0; }
.findings li { display: grid; grid-template-columns: 7rem 15rem 1fr; gap: .1rem 1rem;
  padding: .5rem 0; border-bottom: 1px solid var(--line); font-size: .93rem; }
.findings strong { font-weight: 600; }
.advice { display: block; margin-top: .15rem; }
.chip { display: inline-block; font-size: .8rem; font-weight: 600; padding: .05rem .55rem;
  border-radius: 1rem; border: 1px solid; white-space: nowrap; height: fit-content;
  width: fit-content; }
.chip.ok { color: #00664c; background: #e6f4ef; }
.chip.warning { color: #7a5200; background: #fdf3dc; }
.chip.problem { color: #a03f00; background: #fcebe0; }
.chip.unknown { color: var(--soft); background: var(--wash); }
details { margin: .6rem 0; }
summary { cursor: pointer; }

.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr));
  gap: 0 1.75rem; margin: 0 0 1.25rem; }
.settings div { display: flex; justify-content: space-between; gap: 1rem; padding: .2rem 0;
  border-bottom: 1px solid var(--line); font-size: .86rem; }
.settings dt { flex: none; }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
footer { padding: 2.5rem 1.25rem 2rem; font-size: .82rem; color: var(--soft); }

@media (max-width: 60rem) { .panels { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  header, main { padding-left: .9rem; padding-right: .9rem; }
  .bar > div { padding: .35rem .9rem; }
  .findings li { grid-template-columns: auto 1fr; }
  .findings li > :last-child { grid-column: 1 / -1; }
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  .numbers dd { font-size: 1.1rem; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10pt; }
  .bar, .modebar-container { display: none; }
  header, main, footer { max-width: none; padding-left: 0; padding-right: 0; }
  h2 { break-after: avoid; margin-top: 1.5rem; }
  .panel, .films figure, .numbers div, .findings li, tr { break-inside: avoid; }
  .panels { display: block; }
  .panel { margin: 0 0 1.2rem; }
}
"""

SCRIPT = """
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], showSendToCloud: false };
  const drawn = [];
  for (const { key, figure } of page.figures) {
    if (touch) figure.layout.dragmode = false;  // a finger on a figure scrolls the page
    const div = document.getElementById(`figure-${key}`);
    const timed = figure.data.flatMap((trace, i) => trace.meta ? [i] : []);
    const steps = timed.map((i) => figure.data[i].x);
    const clocks = timed.map((i) => page.clocks[figure.data[i].meta.clock]);
    const title = figure.layout.xaxis.title.text;
    Plotly.newPlot(div, figure.data, figure.layout, config);
    drawn.push({ div, timed, steps, clocks, title });
  }

  // Wall time at which a step was reached, linear between the clock's two nearest points.
  function timeOf(clock, step) {
    let low = 0, high = clock.step.length - 1;
    if (high < 0) return null;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (clock.step[middle] <= step) low = middle; else high = middle;
    }
    const span = clock.step[high] - clock.step[low];
    const share = span ? Math.min((step - clock.step[low]) / span, 1) : 1;
    return clock.wall[low] + share * (clock.wall[high] - clock.wall[low]);
  }

  const longest = Math.max(0, ...page.clocks.flatMap((clock) => clock.wall.slice(-1)));
  const [unit, seconds] =
    longest > 7200 ? ["h", 3600] : longest > 300 ? ["min", 60] : ["s", 1];

  function showAgainst(axis) {
    for (const { div, timed, steps, clocks, title } of drawn) {
      if (!timed.length) continue;
      const wall = axis === "wall";
      const x = wall
        ? steps.map((list, i) => list.map((step) => {
            const time = timeOf(clocks[i], step);
            return time === null ? null : time / seconds;
          }))
        : steps;
      Plotly.update(div, { x },
        { "xaxis.title.text": wall ? `wall time (${unit})` : title, "xaxis.autorange": true },
        timed);
    }
  }
  for (const input of document.querySelectorAll("input[name=axis]"))
    input.addEventListener("change", () => showAgainst(input.value));

  // Plotly draws in pixels: paper has its own width.
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    for (const { div } of drawn) Plotly.relayout(div, { width: 660, autosize: false });
  });
  window.addEventListener("afterprint", () => {
    for (const { div } of drawn) Plotly.relayout(div, { width: null, autosize: true });
  });
})();
"""

# Nothing may be loaded, whatever text from a run got into the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def render_page(title: str, head: str, sections: Mapping[str, str], data: str) -> str:
    """Put the page together.

    Args:
        title: plain text.
        head: HTML that stands before the table of contents.
        sections: HTML of each section by its heading, which is plain text.
        data: JSON with `figures` ({key, figure} each) and `clocks`.

    Returns:
        The whole file.
    """
    from plotly.offline import get_plotlyjs  # 5 MB of text, wanted only here

    data = data.replace("<", "\\u003c")  # no text in it can end the script element
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in sections)
    body = "".join(
        f'<section id="{anchor(name)}"><h2>{escape(name)}</h2>{html}</section>'
        for name, html in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>{head}</header>
<div class="bar"><div>
<nav aria-label="Contents">{links}</nav>
<fieldset><legend>Horizontal axis of the curves</legend>
<label><input type="radio" name="axis" value="step" checked>global step</label>
<label><input type="radio" name="axis" value="wall">wall time</label>
</fieldset>
</div></div>
<main>{body}</main>
<noscript><p class="absent">The figures need JavaScript.</p></noscript>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="page-data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table of plain text; the last `numbers` columns are aligned as numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        first = len(row) - numbers
        return "".join(
            f"<{tag}{' class=number' if i >= first else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", heads)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def pairs(style: str, entries: Sequence[tuple[str, str, str]]) -> str:
    """Names, values and small print (may be empty) of plain text, as a list of the given class."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(small)}</small>" if small else "")
        + "</dd></div>"
        for name, value, small in entries
    )
    return f'<dl class="{style}">{items}</dl>'


def anchor(name: str) -> str:
    """Id of the section with this heading."""
    return name.lower().replace(" ", "-")
