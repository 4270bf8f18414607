"""The model card of a set: only what the set knows about itself."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparta_act.activations import Sparta
from sparta_act.pretrained.metadata import metadata

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEXT = """\
# SPARTA activations: {name}

Trained activations, max(X, 0) * sigmoid(s * c) with a score s for each place and c for each channel, doubled
at sites with `identity`. They replace ReLUs in a convolutional network with
[sparta-act](https://pypi.org/project/sparta-act/). These weights are {stored} on disk, and load as float32,
frozen.

## How to use
```python
from sparta_act import Sparta, replace_relus

activations = Sparta.from_pretrained({quoted})
replace_relus(net, {sites}, activations)  # net: your network, with as many channels at each site
```

## Sites
{table}

## Measured
{measured}

{audit}## How trained
{trained}

## Limits
{limits}
"""
SECTIONS = ("measured", "audit", "limits")
LIMITS = """\
- The weights were trained inside one network, on one data set; elsewhere their effect has to be measured.
- An activation does not make a network robust by itself. Measure with an attack that knows the activation.
- The figures hold for the attacks named with them, and certify nothing."""


def model_card(
    name: str, activations: Mapping[str, Sparta], info: Mapping[str, Any], stored: str = "float16"
) -> "ModelCard":
    """README of a set, with the Hub's metadata, from what `info` holds; the dtype on disk is `stored`.

    `info["measured"]` (a list of rows, or names and numbers), `info["audit"]` (a list of texts and tables)
    and `info["limits"]` have sections of their own; the rest says how the set was trained.
    """
    from huggingface_hub import ModelCard

    sites = [
        {
            "site": label,
            "channels": activation.in_channels,
            "hidden": activation.hidden,
            "identity": activation.identity,
            "dynamic": activation.dynamic,
            "neighborhood": activation.neighborhood,
        }
        for label, activation in activations.items()
    ]
    text = TEXT.format(
        name=_cell(name),
        stored=stored,
        quoted=_quoted(name),
        sites=_quoted(",".join(activations)),
        table=_table(sites),
        measured=_show(info.get("measured", "Nothing was recorded.")),
        audit=f"## Audit\n{_show(info['audit'])}\n\n" if "audit" in info else "",
        trained=_show({key: value for key, value in info.items() if key not in SECTIONS}),
        limits="\n\n".join([LIMITS, *([_show(info["limits"])] if "limits" in info else [])]),
    )
    return ModelCard(f"---\n{metadata(name, info).to_yaml()}\n---\n\n{text}")


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return _table([{"what": key, "value": entry} for key, entry in _flat(value).items()])
    if isinstance(value, list) and value:
        if all(isinstance(row, Mapping) for row in value):
            return _table(value)
        return "\n\n".join(map(_show, value))
    return _paragraph(str(value))


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        inner = _flat(entry) if isinstance(entry, Mapping) else {"": entry}
        flat |= {f"{key}, {name}" if name else str(key): leaf for name, leaf in inner.items()}
    return flat


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    """Text that Markdown shows as it is: no HTML, link, picture, column or section of its own."""
    text = " ".join(str(value).split())
    for character in ("\\", "|", "["):
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;")


def _paragraph(text: str) -> str:
    """The same as a paragraph, whose first characters could make it a title, a quotation or code."""
    text = _cell(text)
    return f"\\{text}" if re.match(r"[#>+=~-]|```", text) else text


def _quoted(text: str) -> str:
    """The text in Python, on one line."""
    return json.dumps(text, ensure_ascii=False)
