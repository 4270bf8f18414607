"""The laboratory's commands: `python -m examples.paper COMMAND --help`."""

import importlib
import sys

from examples.paper.common.cli import plain_errors

COMMANDS = {
    "train": ("training.command:main", "train one network adversarially"),
    "evaluate": ("evaluation.command:main", "clean and robust errors of trained networks"),
    "run": ("results.command:run", "train, evaluate and file runs of the queue"),
    "status": ("results.command:status", "list the queue and what each table lacks"),
    "tables": ("results.command:tables", "write docs/results.md from the filed results"),
    "export": ("results.export:main", "make a set of trained activations"),
    "renew": ("results.renew:main", "write the card of a set of the package anew"),
    "audit": ("audit.command:main", "look for gradient masking with every attack"),
    "maskers": ("maskers.command:main", "audit networks that mask, and honest ones"),
    "pictures": ("pictures.command:main", "draw the pictures of the documentation"),
    "figures": ("pictures.figures:main", "draw the paper's Figures 1 and 3"),
    "controls": ("controls.command:main", "small experiments with their controls"),
    "network": ("evaluation.networks:main", "write a network's weights to pass on"),
}


def main(argv: list[str]) -> None:
    """Run a command with its arguments."""
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    usage = "\n".join(["usage: python -m examples.paper COMMAND [--help]", "", *lines])
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if not argv or argv[0] not in COMMANDS:
        raise SystemExit(f"{usage}\n\nerror: no command {argv[0]!r}" if argv else usage)
    module, function = COMMANDS[argv[0]][0].split(":")
    try:
        command = getattr(importlib.import_module(f"examples.paper.{module}"), function)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}; in a clone: pip install -e '.[paper]'") from None
    with plain_errors():
        command(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
