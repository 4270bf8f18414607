"""Runs a notebook without Jupyter.

`python -m tests.helpers.notebook docs/tutorial.ipynb` writes what its cells print into the file.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import peers  # noqa: F401  (torchvision can be imported after it)


def printed(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints, run one after the other in one scope."""
    scope, texts = {"__name__": "__main__"}, []
    for i, cell in enumerate(code_cells(notebook)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), f"cell {i + 1}", "exec"), scope)
        texts.append(out.getvalue())
    return texts


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(cell: dict[str, Any]) -> str:
    """What the file says that a cell prints."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def main() -> None:
    """Run the notebook and write its outputs into the file."""
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text())
    for i, (cell, text) in enumerate(zip(code_cells(notebook), printed(notebook), strict=True), 1):
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": i, "outputs": [output] if text else []}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
