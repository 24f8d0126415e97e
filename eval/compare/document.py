"""A report as a list of blocks, and its two forms: Markdown, and one HTML file that needs nothing else."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.compare.figures import numbered
from eval.measure import table


@dataclass(frozen=True)
class Heading:
    """A title of level 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` stands between backticks."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of named cells; the first column names the row."""

    rows: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Figure:
    """An SVG element, and what it shows for those who do not see it."""

    svg: str
    alternative: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side, as many as the page has room for."""

    figures: Sequence[Figure]


Block = Heading | Text | Items | Table | Figures


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report without its figures."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {block.text}")
            case Text():
                parts.append(block.text)
            case Items():
                parts.append("\n".join(f"- {line}" for line in block.lines))
            case Table():
                rows = [{name: cell.replace("|", "\\|") for name, cell in row.items()} for row in block.rows]
                parts.append(table(rows))
            case Figures():
                parts.append(f"({len(block.figures)} figures, in report.html)")
    return "\n\n".join(parts) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as an HTML page."""
    style = (Path(__file__).parent / "page.css").read_text()
    contents, body, figures = [], [], 0
    for number, block in enumerate(blocks):
        match block:
            case Heading():
                name = f"s{number}"
                body.append(f'<h{block.level} id="{name}">{_inline(block.text)}</h{block.level}>')
                contents.append(f'<li class="level{block.level}"><a href="#{name}">{_inline(block.text)}</a></li>')
            case Text():
                body.append(f"<p>{_inline(block.text)}</p>")
            case Items():
                body.append("<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in block.lines) + "</ul>")
            case Table():
                body.append(_table(block.rows))
            case Figures():
                made = []
                for figure in block.figures:
                    figures += 1
                    label = html.escape(figure.alternative)
                    svg = numbered(figure.svg, figures).replace("<svg ", f'<svg aria-label="{label}" ', 1)
                    made.append(f"<figure>{svg}</figure>")
                body.append(f'<div class="figures">{"".join(made)}</div>')
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{style}</style></head>",
            f"<body><main>\n<h1>{_inline(title)}</h1>",
            f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>',
            *body,
            "</main></body></html>\n",
        ]
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{_inline(name)}</th>' for name in names)
    lines = []
    for row in rows:
        first, *others = (_inline(row.get(name, "")) for name in names)
        cells = "".join(f"<td{_kind(cell)}>{cell}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    # Scrollable by keyboard, too.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {html.escape(names[0])}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kind(cell: str) -> str:
    if re.match(r"[-+\d[]", cell) and len(cell) < 25:
        return ' class="number"'
    return ' class="long"' if len(cell) > 40 else ""


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
