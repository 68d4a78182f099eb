"""One self-contained HTML page out of tables and figures: nothing is fetched when it is opened.

Every text is escaped. The pages hold numbers and row ids; callers never pass the texts of prompts or answers.
"""

import base64
import html
import json
from pathlib import Path

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0 }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } thead th { cursor: pointer; background: #f4f4f4 }
figure { display: inline-block; margin: .5rem 1rem .5rem 0 } figure img { max-width: 100% }
figcaption, .note { color: #555; font-size: 13px } .scroll { max-height: 28rem; overflow: auto }
"""
# a click on a column's head sorts its table: numbers as numbers, the rest as text
_SCRIPT = """
document.querySelectorAll("table").forEach(table => table.querySelectorAll("thead th").forEach((head, column) => {
  head.addEventListener("click", () => {
    const down = head.dataset.down = head.dataset.down === "1" ? "0" : "1";
    const cell = row => { const t = row.cells[column].textContent; return t === "" || isNaN(t) ? t : Number(t); };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = cell(a), y = cell(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (down === "1" ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  });
}));
"""


def html_page(title, sections, data=None):
    """A whole page.

    Args:
        title: str.
        sections: list of (heading, list of parts); parts come from `paragraph`, `table` and `figure`.
        data: JSON value or None: kept in the page under the id `data`, for other programs.
    Returns:
        str.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, content in sections:
        parts += [f"<section><h2>{html.escape(heading)}</h2>", *content, "</section>"]
    if data is not None:
        # "</" would end the element, whatever the JSON means by it
        text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
        parts.append(f'<script type="application/json" id="data">{text}</script>')
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def paragraph(text):
    return f'<p class="note">{html.escape(text)}</p>'


def table(header, rows, scroll=False):
    """A table that sorts on a click. Floats are shown with four digits."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    text = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{text}</div>' if scroll else text


def figure(path, caption):
    """An image file, embedded.

    Raises:
        ValueError: neither .png nor .svg.
    """
    path = Path(path)
    kinds = {".png": "image/png", ".svg": "image/svg+xml"}
    if path.suffix not in kinds:
        raise ValueError(f"a report embeds .png and .svg, got {path.name!r}")
    encoded = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:{kinds[path.suffix]};base64,{encoded}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _cell(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape("" if value is None else str(value))
