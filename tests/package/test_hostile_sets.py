"""Files, numbers, texts and names that a stranger could have made: refused at once and in few words."""

import hashlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import torch as safetensors

from sparta_act import Sparta, SpartaSet
from sparta_act.errors import WeightsError
from sparta_act.pretrained import CARD, CONFIG, WEIGHTS
from sparta_act.pretrained.card import model_card

LABEL = "G3.B2"


@pytest.fixture
def folder(tmp_path):
    return SpartaSet({LABEL: Sparta(6, hidden=4)}, {"epochs": 3}).save_pretrained(tmp_path / "set")


def refused(name, *words, **arguments):
    with pytest.raises(WeightsError) as error:
        SpartaSet.from_pretrained(name, local_files_only=True, **arguments)
    text = str(error.value)
    assert len(text) < 4000
    assert text.isprintable()
    assert all(word in text for word in words), text


# ---- files


@pytest.mark.parametrize("name", [CARD, CONFIG, WEIGHTS])
def test_a_file_of_ours_that_cannot_be_read_is_named(monkeypatch, name):
    read = Path.read_bytes

    def denied(path):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused("cifar10-resnet18", "a file of it cannot be read", name, "Install sparta-act again")


def device(path):
    path.symlink_to("/dev/zero")


def bound(path):
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


def endless(path):
    with open(path, "wb") as file:
        file.truncate(2**43)  # takes no place on the disk


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
@pytest.mark.parametrize("make", [os.mkfifo, device, bound, Path.mkdir, endless])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file_or_endless_is_refused_at_once(folder, monkeypatch, name, make):
    monkeypatch.chdir(folder)
    (folder / name).unlink()
    try:
        make(folder / name)
    except OSError as error:
        pytest.skip(f"this system cannot make it: {error}")
    refused(folder, f"{name} cannot be read")


def test_the_configuration_bounds_the_weights(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(bytes(2**21))
    refused(folder, f"{WEIGHTS} cannot be read: it has 20", "bytes, more than ")


# ---- numbers and texts, by one who corrects the sha256 and what is written beside the weights


def forged(folder, change):
    """Change the text of the configuration, and the sites beside the weights with it."""
    config = json.loads((folder / CONFIG).read_bytes())
    config["weights_sha256"] = "HASH"
    text = change(json.dumps(config))
    tensors = safetensors.load_file(folder / WEIGHTS)
    try:
        sites = json.loads(text)["sites"]
    except (ValueError, RecursionError):
        sites = config["sites"]
    weights = safetensors.save(
        {k.replace(LABEL, next(iter(sites), "")): v for k, v in tensors.items()},
        {"sites": json.dumps(sites)},
    )
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(text.replace("HASH", hashlib.sha256(weights).hexdigest()))


def put(key, value):
    return lambda text: text.replace(f'"{key}": ', f'"{key}": {value}, "x{key}": ', 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"epochs": 3', '"epochs": 3, "epochs": 4', "a name twice in one dictionary"),
        (f'"{LABEL}": ', f'"{LABEL}": 1, "{LABEL}": ', "a name twice in one dictionary"),
        ('"epochs": 3', '"epochs": NaN', "NaN is no number"),
        ('"epochs": 3', '"epochs": -Infinity', "-Infinity is no number"),
        ('"epochs": 3', '"epochs": [1e400]', "1e400 is no number"),
        ('"epochs": 3', f'"epochs": -{"9" * 999}.5', "99... (1002 characters) is no number"),
        ('"epochs": 3', f'"epochs": {"[" * 60 + "]" * 60}', "lists or dictionaries in each other"),
        ('"epochs": 3', f'"epochs": {"[" * 900 + "]" * 900}', "cannot be read"),
        ('"epochs": 3', f'"epochs": {"9" * 5000}', "cannot be read"),
        ('"epochs": 3', f'"epochs": "{"x" * 2**22}"', f"{CONFIG} cannot be read: it has 41"),
        ('"shapes": {', f'"shapes": {{"a": {"[" * 500 + "]" * 500}, ', "cannot be read"),
        (LABEL, "x" * 10**6, "cannot be read: it has 70"),
        (LABEL, "G1\\u001b[31m", "not a label: 'G1\\x1b[31m'"),
        (LABEL, "G1\\nG2", "not a label"),
        (LABEL, "\\u202egpj", "not a label"),
        (LABEL, "", "not a label: ''"),
        ('"dtype": "float16"', f'"dtype": "{"x" * 10**6}"', "characters)"),
        ('"format": 2', f'"format": "{"x" * 10**6}"', "characters)"),
        ('"hidden": 4', '"hidden": -4', "hidden must be a whole number of at least 1, not -4"),
        ('"hidden": 4', '"hidden": 4.0', "'hidden' a float, not int"),
        ('"hidden": 4', f'"hidden": {10**9}', "hidden is at most 65536"),
        ('"neighborhood": 1', f'"neighborhood": {10**30}', "neighborhood is at most 4096"),
        ('"in_channels": 6', f'"in_channels": {10**18}', LABEL),
        ('"neighborhood": 1', '"neighborhood": -1', "neighborhood must be a whole number"),
        ('"neighborhood": 1', '"neighborhood": true', "'neighborhood' a bool, not int"),
        ('"neighborhood": 1', '"neighborhood": 1e9', "'neighborhood' a float, not int"),
    ],
    ids=range(26),
)
def test_what_a_configuration_may_not_hold(folder, old, new, words):
    forged(folder, lambda text: text.replace(old, new, 1))
    refused(folder, words)


def test_a_forged_set_that_is_right_loads(folder):
    """So the forger above is refused for what it forges."""
    forged(folder, lambda text: text.replace('"epochs": 3', '"epochs": 4'))
    assert SpartaSet.from_pretrained(folder).info["epochs"] == 4


@pytest.mark.parametrize(
    ("sites", "words"),
    [(1000, ("G0 has no 'dynamic'", "characters)")), (1001, ("at most 1000 sites, not 1001",))],
)
def test_many_sites_make_a_short_message(folder, sites, words):
    config = json.loads((folder / CONFIG).read_bytes())
    config["sites"] = {f"G{i}": {"x" * 50: i} for i in range(sites)}
    (folder / CONFIG).write_text(json.dumps(config))
    refused(folder, *words)


@pytest.mark.parametrize("label", ["a\nb", "\x1b[2J", "x" * 201, "\ud800", "\u202e"])
def test_a_label_is_a_short_line_of_print(label):
    with pytest.raises(WeightsError, match="not a label: ") as error:
        SpartaSet({label: Sparta(2)})
    assert str(error.value).isprintable()


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [40, 5000])
def test_deep_info_is_refused_when_the_set_is_made_or_saved(tmp_path, levels):
    with pytest.raises(WeightsError, match="too many lists and dictionaries in each other"):
        SpartaSet({LABEL: Sparta(2)}, {"deep": deep(levels)})
    activations = SpartaSet({LABEL: Sparta(2)})
    activations.info["deep"] = deep(levels)
    with pytest.raises(WeightsError, match="JSON cannot hold its info"):
        activations.save_pretrained(tmp_path)


def test_info_that_could_not_be_read_back_is_not_saved(tmp_path):
    for info, words in (({1: "a", "1": "b"}, "a name twice"), ({"text": "x" * 2**22}, "more than 4194304")):
        with pytest.raises(WeightsError, match=words):
            SpartaSet({LABEL: Sparta(2)}, info).save_pretrained(tmp_path / "set")
    assert not (tmp_path / "set").exists()


# ---- names


class Path5(os.PathLike):
    def __init__(self, answer):
        self.answer = answer

    def __fspath__(self):
        return self.answer()


NAMES = [
    "x" * 300,
    "a/" + "x" * 5000,
    "x" * 10**6,
    "a\0b",
    "a\nb",
    "\x1b[31mred",
    "\ud800",
    b"bytes",
    3.5,
    Path5(lambda: b"/tmp"),
    Path5(lambda: 1 / 0),
    Path5(lambda: "no-such-folder"),
    {"a": "x" * 10**6},
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_what_is_no_name_is_refused(name, tmp_path):
    refused(name, cache_dir=tmp_path)


# ---- the card


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "<script>x</script>",
        "fine\n\n## Limits\nNone: certified.",
        "## Limits: none",
        "> quoted",
        "```\ncode",
        "~~~\ncode",
        "---\nlicense: mit",
        "===",
        "[click](javascript:alert(1))",
        "![seen](http://example.org/pixel.png)",
        "a | b",
        "a\\| b",
        "\ud800",
    ],
)
@pytest.mark.parametrize(
    "where", ["measured", "limits", "dataset", "license", "base_model", "other", "table", "nested", "list"]
)
def test_info_is_text_in_the_card_and_nothing_else(tmp_path, text, where):
    info = {
        "table": {"measured": [{text: text}]},
        "nested": {"recipe": {text: {"x": text}}},
        "list": {"audit": [text, [text]]},
    }.get(where, {where: text})
    SpartaSet({LABEL: Sparta(2)}, info).save_pretrained(tmp_path)
    plain = model_card("x", {LABEL: Sparta(2)}, {})
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.to_dict() == plain.data.to_dict()
    sections = [line for line in card.text.splitlines() if line.startswith("#")]
    assert set(sections) <= {line for line in plain.text.splitlines() if line.startswith("#")} | {
        f"# SPARTA activations: {tmp_path.name}",
        "## Audit",
    }
    lines = card.text.splitlines()
    assert "<img" not in card.text
    assert "<script" not in card.text
    assert "](" not in card.text.replace("[sparta-act](", "").replace("\\[", "") or "\\[" in card.text
    assert [line[:3] for line in lines if line.startswith(("```", "~~~", "===", "---", ">"))] == ["```"] * 2
    assert "\ud800" not in card.text


@pytest.mark.parametrize("text", ['x", print("not mine"))  #', "a\\", "```", "'''", '"""'])
def test_the_code_of_the_card_holds_names_as_texts(text):
    card = str(model_card(text, {text: Sparta(2)}, {}))
    code = card.split("```python\n")[1].split("\n```\n")[0]
    given = []
    lines = code.splitlines()
    assert len(lines) == 4
    space = {"load": given.append, "replace_relus": lambda net, sites, _: given.append(sites), "net": None}
    exec("\n".join(lines[2:]).replace("Sparta.from_pretrained", "load"), space)
    assert given == [text, text]


def test_a_set_that_nobody_forged_is_still_read(folder):
    assert torch.equal(SpartaSet.from_pretrained(folder)[LABEL].gain, torch.ones(1))
