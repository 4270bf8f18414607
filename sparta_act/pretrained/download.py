"""Downloads the files of a set by the Hub's client; also run as a program, so that it can be ended."""

import json
import sys
from pathlib import Path
from typing import Any


def download(files: list[str], revision: str | None, **ask: Any) -> None:
    """Fetch `files`, all of one commit, into the client's cache. Raises what the client raises."""
    from huggingface_hub import hf_hub_download

    for name in files:  # `snapshot_download` would ask for more
        path = hf_hub_download(filename=name, revision=revision, **ask)
        revision = Path(path).parent.name


if __name__ == "__main__":
    given = json.load(sys.stdin)
    sys.path[:] = given.pop("path")
    try:
        download(**given)
    except Exception as error:
        sys.stdout.buffer.write(f"{type(error).__name__}: {error}".encode(errors="replace"))
        sys.exit(1)
