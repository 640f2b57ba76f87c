"""A report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

from markdown_it import MarkdownIt

_TYPES = {"svg": "image/svg+xml", "png": "image/png"}

_FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; }}
h2 {{ margin-top: 0; }}
h3 {{ margin: 2.5rem 0 0.5rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.8rem; border-bottom: 1px solid #8884; white-space: nowrap; }}
tbody tr:hover {{ background: #8882; }}
img {{ max-width: 100%; background: white; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, markdown: str, pictures: Mapping[str, bytes]) -> str:
    """A page of Markdown in which links to pictures have become the pictures.

    Args:
        title: of the window.
        markdown: with tables; what looks like HTML in it is shown as it is.
        pictures: file name, as the links have it -> contents.
    """
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = renderer.render(markdown)
    for name, content in pictures.items():
        kind = _TYPES[name.rpartition(".")[2]]
        body = body.replace(f'src="{name}"', f'src="data:{kind};base64,{base64.b64encode(content).decode()}"')
    return _FRAME.format(title=html.escape(title), body=body)
