"""HTML pages that need no other file and no network."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mlm_jax import storage

INK, FAINT = "#1f2933", "#9fb3c8"


def write_page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Writes a page of these parts, which are HTML, under its title; returns its path."""
    storage.write_text(path, _PAGE.format(title=escape(title), body="\n".join(part for part in parts if part)))
    return path


def image(png: bytes, what: str) -> str:
    """A picture, and in words what it shows."""
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table of labels and values under its heading; "" without rows."""
    body = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in rows)
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{heading}<table>{body}</table>" if body else ""


def numbers(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns have names; in all but the first are numbers. "" without rows."""
    body = "".join(f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(value)}</td>' for value in rest)}</tr>" for first, *rest in rows)
    names = "".join(f"<td>{escape(name)}</td>" for name in head[1:])
    return f'<table class="numbers"><tr><th>{escape(head[0])}</th>{names}</tr>{body}</table>' if body else ""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; }}
h1 {{ margin: 0 0 1rem; font-size: 1.8rem; }}
h2 {{ margin: 2.2rem 0 .6rem; font-size: 1.25rem; border-bottom: 1px solid #d9e2ec; }}
h3 {{ margin: .6rem 0 .2rem; font-size: 1rem; }}
p, small {{ color: #627d98; }}
img {{ display: block; width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .15rem .6rem .15rem 0; text-align: left; vertical-align: top; font-weight: normal; overflow-wrap: anywhere; }}
th {{ min-width: 9rem; padding-left: .4rem; color: #627d98; overflow-wrap: normal; }}
td {{ font-variant-numeric: tabular-nums; }}
pre {{ padding: 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7fa; border-radius: 4px; font-size: 13px; }}
details {{ margin: .3rem 0; }}
summary {{ color: #627d98; }}
.numbers td {{ text-align: right; }}
.sections {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: .5rem 2rem; }}
.sections table {{ width: 100%; }}
.changed {{ background: #fffaeb; }}
.changed th, .changed td {{ color: #1f2933; font-weight: 600; }}
small {{ font-weight: normal; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
