"""The laboratory's commands: `python -m examples.paper COMMAND --help`."""

import importlib
import sys

COMMANDS = {
    "train": ("training.train", "train one network adversarially"),
    "evaluate": ("evaluation.evaluate", "clean and robust errors of trained networks"),
    "run": ("results.campaign", "train, evaluate and file runs of the queue"),
    "status": ("results.campaign", "list the queue and what each table lacks"),
    "tables": ("results.campaign", "write docs/results.md from the filed results"),
    "export": ("results.export", "make a set of trained activations"),
    "audit": ("audit.command", "look for gradient masking with every attack"),
    "figures": ("results.figures", "draw the paper's figures"),
    "controls": ("results.controls", "small experiments with their controls"),
    "network": ("evaluation.networks", "write a network's weights to pass on"),
}


def main(argv: list[str]) -> None:
    """Run a command with its arguments."""
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
        text = "\n".join(["usage: python -m examples.paper COMMAND [--help]", "", *lines])
        if argv and argv[0] in ("-h", "--help"):
            print(text)
            return
        raise SystemExit(f"{text}\n\nno command {argv[0]!r}" if argv else text)
    module = importlib.import_module(f"examples.paper.{COMMANDS[argv[0]][0]}")
    rest = argv if argv[0] in ("run", "tables") else argv[1:]
    module.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
