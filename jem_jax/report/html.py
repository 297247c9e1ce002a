"""report.html: one page that needs nothing else, neither network nor files beside it.

Everything that comes from outside the program (names of classes, files and data sets among it) is escaped, and the
page's own policy forbids scripts.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jem_jax.report import summary
from jem_jax.report.inputs import TITLES
from jem_jax.report.sections import Outcome

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 62rem;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
nav a { margin-right: 1rem; white-space: nowrap; display: inline-block; } a { color: #005a8c; }
.wide { overflow-x: auto; margin: 1rem 0 .25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 7rem; }
.better { font-weight: 700; } .better::after { content: " ✓"; }
.caption, details, footer { color: #555; font-size: .88rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; display: block; }
.failed { border-left: 4px solid #d55e00; padding: .5rem 1rem; background: #fff4ec; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { body { padding: .6rem; } .plot { width: 42rem; max-width: none; }
  dl { grid-template-columns: 1fr; } }
"""
_LEAD = """The logits f(x)[y] of any classifier also say how likely an image is: log p~(x) = logsumexp of f(x)[y]
over y, up to a constant. A joint energy-based model (JEM) is a classifier that was trained for both, p(y|x) and p(x).
This page shows what that did to one network on {data}, beside a plain classifier of the same shape that learned p(y|x)
alone. Where the plain classifier is better, the page says so as well."""
_LEAD_ALONE = """The logits f(x)[y] of any classifier also say how likely an image is: log p~(x) = logsumexp of f(x)[y]
over y, up to a constant. This page shows how one network on {data} does as a classifier and as a model of images."""


def render(values: Mapping[str, Any], outcomes: Sequence[Outcome], folder: Path) -> str:
    """The page.

    Args:
      values: what report.json holds.
      outcomes: the sections in order.
      folder: where their figures lie.
    """
    data = str(values["run"]["data"])
    title = f"{TITLES['jem']} on {data}"
    lead = (_LEAD if "baseline" in values else _LEAD_ALONE).format(data=data)
    body = [f"<h1>{html.escape(title)}</h1>", _paragraph(" ".join(lead.split())), _headline(values)]
    if values["run"]["trained_on_other_data"]:
        body.append(
            f'<p class="failed">The model was trained on other data: {html.escape(data)} has changed since.</p>'
        )
    links = (f'<a href="#{measured.section.name}">{html.escape(measured.section.title)}</a>' for measured in outcomes)
    body.append(f"<nav>{''.join(links)}</nav>")
    body += [_section(outcome, folder) for outcome in outcomes]
    body.append(_footer(values["run"]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _headline(values: Mapping[str, Any]) -> str:
    names = [name for name in TITLES if name in values]
    rows = []
    for line in summary.lines(values):
        cells = "".join(
            f'<td class="{"better" if line.better == name else ""}">{html.escape(line.cells[name])}</td>'
            for name in names
        )
        rows.append(f"<tr><td>{html.escape(line.title)}</td>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(TITLES[name])}</th>" for name in names)
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="caption">✓ the better of the two. AUROC: the chance that a test image scores higher than one from '
        "outside; 0.5 is guessing. ECE: how far confidence and accuracy are apart. ε: the attack's size in [0, 1] "
        "pixels. One run with one seed; the sections below say how each number was taken.</p>"
    )


def _section(outcome: Outcome, folder: Path) -> str:
    section = outcome.section
    parts = [f'<h2 id="{section.name}">{html.escape(section.title)}</h2>', _paragraph(section.about)]
    if outcome.failure:
        parts.append(f'<p class="failed">This section failed: {html.escape(outcome.failure)}</p>')
    parts += [_block(block, folder) for block in outcome.result.blocks]
    if outcome.result.how:
        how = outcome.result.how | {"seconds": outcome.seconds}
        parts.append(f"<details><summary>How this was taken</summary>{_definitions(how)}</details>")
    return f"<section>{''.join(parts)}</section>"


def _block(block: Mapping[str, Any], folder: Path) -> str:
    if block["kind"] == "text":
        return _paragraph(block["text"])
    caption = html.escape(block["caption"])
    if block["kind"] == "table":
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block["head"])
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block["rows"]
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        if block.get("folded"):
            return f'<details><summary>{caption}</summary><div class="wide">{table}</div></details>'
        return f'<div class="wide">{table}</div><p class="caption">{caption}</p>'
    data = base64.b64encode((folder / block["file"]).read_bytes()).decode("ascii")
    image = f'<img class="{block["look"]}" alt="{caption}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{image}</div><figcaption class="caption">{caption}</figcaption></figure>'


def _footer(run: Mapping[str, Any]) -> str:
    facts = {name: run[name] for name in ("iterations", "seed", "split_sizes", "devices", "seconds", "versions")}
    return f"<footer><h2>The run</h2>{_definitions(facts)}</footer>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def _definitions(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{html.escape(str(name).replace('_', ' '))}</dt><dd>{_definition(value)}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{items}</dl>"


def _definition(value: Any) -> str:
    if isinstance(value, Mapping):
        return _definitions(value)
    if isinstance(value, list | tuple):
        return html.escape(", ".join(map(str, value)))
    return html.escape(str(value))
