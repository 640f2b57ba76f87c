"""Execute the notebooks, and write them with their outputs.

Each is executed in a folder of its own, as in a fresh clone where nothing is trained yet, and then put into its place. A
notebook that fails stays as it was. Needless differences are removed: times of execution, the version of the interpreter, all
but the last line of progress. Pictures get a palette.

    python scripts/execute_notebooks.py [NOTEBOOK.ipynb ...]
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from madformer.runs.files import write_text

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_PROGRESS = re.compile(r"^(\w+) \d+/\d+  .* left\n(?=\1 \d+/)", re.MULTILINE)
"""A line that says how far something is, before another one: how many there are depends on how busy the machine is."""


def execute(path: Path, folder: Path, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """A notebook with its outputs.

    Args:
        path: the notebook's path. It is not changed.
        folder: where to execute it. The folder gets a copy of `experiments/`, and all that the notebook writes.
        parameters: name -> value, set in a cell after the one that is tagged `parameters`.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        _inject(notebook, parameters)
    shutil.copytree(ROOT / "experiments", folder / "experiments", dirs_exist_ok=True)
    variables = {
        "IPYTHONDIR": str(folder / ".ipython"),  # not the home folder's
        "JUPYTER_RUNTIME_DIR": str(folder / ".jupyter"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),  # this repository's package
    }
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=40"],  # or it warns that it listens on this machine's own network
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, **variables})
    return notebook


def clean(notebook: NotebookNode) -> None:
    """Remove whatever differs between machines or executions, and make pictures smaller."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key == "tags"})
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = _PROGRESS.sub("", output.text)
            elif "image/png" in output.get("data", {}):
                output.data["image/png"] = _shrink(output.data["image/png"])


def _shrink(png: str) -> str:
    """A picture, in base64, with a palette of 256 colours. It has less than half of the size and looks the same."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    file = io.BytesIO()
    picture.convert("RGB").quantize(256).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _inject(notebook: NotebookNode, parameters: Mapping[str, Any]) -> None:
    """As papermill does."""
    [place] = [index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))


def main() -> None:
    """Execute the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, metavar="NOTEBOOK.ipynb")
    for path in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory(prefix="madformer-") as folder:
            notebook = execute(path, Path(folder))
        clean(notebook)
        write_text(path, nbformat.writes(notebook) + "\n")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
