"""Show what is installed, and which sets there are: `python -m sparta_act`."""

import argparse
import platform
import sys
from importlib import metadata
from pathlib import Path

import sparta_act
from sparta_act.errors import WeightsError
from sparta_act.pretrained import check_files

NEEDED = ("torch", "numpy", "safetensors", "huggingface-hub")


def main() -> int:
    """Print versions, the sets and where their files are; return 1 where a file is missing or changed."""
    argparse.ArgumentParser(
        prog="python -m sparta_act",
        description="Show what is installed, and which sets there are and where. Checks the sha256 of the "
        "files on this machine, asks no network, and ends with status 1 where one is missing or changed.",
    ).parse_args()
    rows = {
        "sparta-act": f"{sparta_act.__version__} in {Path(sparta_act.__file__).parent}",
        "Python": f"{platform.python_version()} at {sys.executable}",
        **{name: _version(name) for name in NEEDED},
    }
    print("\n".join(f"{name:16} {value}" for name, value in rows.items()))
    sets, status = sparta_act.list_sets(), 0
    print(f"\n{sets!r}\n")
    for known in sets:
        try:
            print(f"{known.name}: {check_files(known.name)}")
        except WeightsError as error:
            print(f"{known.name}: {error}. Install sparta-act again, or fetch it again by loading it")
            status = 1
    return status


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
