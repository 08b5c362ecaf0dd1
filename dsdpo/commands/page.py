"""One self-contained HTML page: no request leaves it, and it follows the reader's choice of light or dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from dsdpo.atomic import write_text
from dsdpo.errors import ConfigError

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #667085; --paper: #ffffff; --card: #f6f7f9; --line: #dfe3e8;
  --c0: #2563eb; --c1: #d9480f; --c2: #0f9960; --c3: #9333ea; --c4: #b8860b; --c5: #0e7490; --good: #15803d;
  --bad: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --paper: #14171c; --card: #1c2027;
  --line: #333a45; --c0: #6ea0ff; --c1: #ff9466; --c2: #4cc38a; --c3: #c58af9; --c4: #e0b341; --c5: #4cc3d9;
  --good: #4ade80; --bad: #fb923c; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--paper); margin: 0 auto; max-width: 1240px; padding: 1.2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
small, .dim { color: var(--dim); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { color: var(--dim); font-weight: 500; } th, td { text-align: right; padding: .2rem .9rem .2rem 0; }
th:first-child, td:first-child { text-align: left; } tbody tr { border-top: 1px solid var(--line); }
.wide { overflow-x: auto; } code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .88em; }
"""


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole page."""
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n{body}\n{code}</body></html>\n"
    )


def write_page(path: Path, text: str, *, key: str = "--html") -> None:
    """Write a page. Raises `ConfigError` where it cannot be."""
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be written: {error}") from error
