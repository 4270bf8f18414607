"""Tables on the terminal, and the machine that a number was measured on."""

import datetime
import os
import platform
import sys
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Mapping[str, Mapping[str, str]]) -> None:
    """Print a table of columns: each maps row names to cells."""
    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in next(iter(columns.values())):
        table.add_row(row, *(c[row] for c in columns.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def stamp() -> dict[str, str]:
    """Machine, torch version and date, to store with a measured number."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        machine += ", " + torch.cuda.get_device_name()
    return {"machine": machine, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
