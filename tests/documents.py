"""The documents of the repository, and the blocks of code in them."""

import re

from tests.conftest import ROOT

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "notebooks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]

BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(document: str, language: str) -> list[str]:
    """Code of that language in a document."""
    return [code for name, code in BLOCKS.findall((ROOT / document).read_text()) if name == language]
