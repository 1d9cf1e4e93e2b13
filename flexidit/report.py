"""Reports as one html file with its pictures inside: it can be sent, kept and opened anywhere, without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from flexidit.files import write_atomically

_STYLE = (
    "body{font:16px/1.55 system-ui,sans-serif;color:#20242c;max-width:62rem;margin:2.5rem auto;padding:0 1.2rem}"
    "h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6rem}h2{font-size:1.2rem;margin:2.4rem 0 .5rem}"
    ".lead{font-size:1.1rem;color:#4b5260}p,li{max-width:46rem}"
    ".table{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "td,th{text-align:right;padding:.3rem .8rem;border-bottom:1px solid #e3e6ea;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left;padding-left:0}th{color:#707680;font-weight:500}"
    "img{max-width:100%;height:auto}pre{background:#f5f6f8;padding:1rem;overflow-x:auto;font-size:.85rem}"
    "code{background:#f5f6f8;padding:.1rem .3rem}"
)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` "lead" is the summary below the title."""
    return f'<p class="{html.escape(kind)}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(text)}</h2>"


def bullets(items: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def preformatted(text: str) -> str:
    """Commands, configs."""
    return f"<pre>{html.escape(text)}</pre>"


def picture(content: bytes, description: str, kind: str = "png") -> str:
    """A PNG or GIF, inside the page; the description is for those who cannot see it."""
    data = base64.b64encode(content).decode()
    return f'<p><img alt="{html.escape(description, quote=True)}" src="data:image/{kind};base64,{data}"></p>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as text, the first column left-aligned."""
    first = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><tr>{first}</tr>{body}</table></div>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file, as text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def write_page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Write :func:`page`; returns the path."""
    write_atomically(path, page(title, parts).encode())
    return path
