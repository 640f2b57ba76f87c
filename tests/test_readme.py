"""The code in the documents runs, and prints what they say."""

import re
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_examples_run_and_print_what_is_written(document, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    blocks = BLOCKS.findall((ROOT / document).read_text())
    assert any(language == "python" for language, _ in blocks)
    namespace: dict[str, Any] = {}
    for (language, code), (next_language, expected) in zip(
        blocks, [*blocks[1:], ("python", "")], strict=True
    ):  # what a block prints stands behind it
        if language == "python":
            exec(code, namespace)
            assert capsys.readouterr().out == ("" if next_language else expected)
