"""What the site needs beyond MkDocs: notebooks as pages, and our docstrings as Markdown."""

import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

LABEL = r"`?\w[\w=]*`?:|`\w[\w=]*` |Raises "  # with which a line of a docstring begins a paragraph


class Notebook(File):
    """An .ipynb as a page, so that pages can link to the file that GitHub shows."""

    def is_documentation_page(self) -> bool:
        """MkDocs asks by the ending, which is that of no Markdown file."""
        return True


def on_files(files: Files, config: Any) -> Files:
    """Make a page of each notebook."""
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(
            Notebook(file.src_uri, config["docs_dir"], config["site_dir"], config["use_directory_urls"])
        )
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The Markdown of a notebook; None leaves other pages to MkDocs."""
    if not isinstance(page.file, Notebook):
        return None
    cells = json.loads(Path(page.file.abs_src_path).read_text())["cells"]
    return "\n\n".join(part for cell in cells for part in cell_as_markdown(cell))


def cell_as_markdown(cell: dict[str, Any]) -> list[str]:
    """A cell as paragraphs: text as it is, code in a fence, and below it what it printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", [])})
        if png := data.get("image/png"):
            parts.append(f"![Drawn by the code above](data:image/png;base64,{''.join(png.split())})")
        else:
            parts.append(f"```{{ .text .output }}\n{''.join(data['text/plain']).rstrip()}\n```")
    return parts


class Docstrings(griffe.Extension):
    """Gives mkdocstrings our docstrings as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that has been read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A paragraph for each argument, for the shapes, errors and source, and a fence around examples."""
    text = re.sub(rf"(?<=[.:])\n(?={LABEL})", "\n\n", docstring)
    text = re.sub(r"(?m)^(Shapes|Raises|Source)\b", r"__\1__", text)
    return re.sub(r"(?ms)^(?P<example>>>> .*?)(?=\n\n|\Z)|`[^`]+`|[*<]", _marked, text)


def _marked(found: re.Match[str]) -> str:
    if found["example"]:
        return "```pycon\n" + re.sub(r" *# doctest: .*", "", found[0]) + "\n```"
    return f"\\{found[0]}" if len(found[0]) == 1 else found[0]
