"""What Spotfirst's HTML pages have in common: look, frame, tables. Every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["card", "document", "table"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a7f4b; --bad: #c4314b;
  --busy: #b26a00; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
p, dl { margin: .25rem 0; } .soft { opacity: .7; overflow-wrap: anywhere; }
dl { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr));
  margin-top: 1rem; }
dl > div { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; }
dt { font-size: .8rem; opacity: .75; } dd { font-size: 1.1rem; font-weight: 600; margin: 0; }
dd small { display: block; font-size: .8rem; font-weight: 400; opacity: .75; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left;
  vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; } .number { text-align: right; }
pre { background: var(--soft); border-radius: .5rem; max-height: 24rem; overflow: auto;
  padding: .75rem; }
"""


def document(title: str, body: str, *, style: str = "", refresh_s: int | None = None) -> str:
    """A whole page around ``body``, which is HTML. It needs nothing beside itself."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:d}">' if refresh_s else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{refresh}<title>{escape(title)} · Spotfirst</title><style>{_STYLE}{style}</style></head>"
        f"<body>{body}</body></html>"
    )


def card(name: str, value: str, note: str = "") -> str:
    """One figure of a ``dl``, with its name."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Scrolls by itself where the page is narrow."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"
