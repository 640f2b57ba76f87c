"""The code in the documents runs, and prints what they say."""

import argparse
import re
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.model.test_released import WEIGHTS

BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_examples_run_and_print_what_is_written(document, capsys, monkeypatch, tmp_path):
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
    if "load_released" in namespace:
        switches = argparse.Namespace(clear_clean=False, clear_cond=True, denoising_mlp=False, diff_depth=2, ar_len=4)
        torch.save({"model": {}, "ema": WEIGHTS, "args": switches}, tmp_path / "released.pt")
        config = namespace["load_released"](tmp_path / "released.pt").config
        assert (config.use_clean_blocks, config.use_condition, config.diffusion_depth) == (True, False, 2)
