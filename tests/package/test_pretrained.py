"""Sets of activations: what is saved, what is refused, and that frozen means frozen."""

import copy
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from safetensors import torch as safetensors
from torch import nn
from torch.nn.utils import prune

from sparta_act.activations import Sparta
from sparta_act.errors import WeightsError
from sparta_act.pretrained import SpartaSet, hub
from sparta_act.pretrained.card import model_card
from sparta_act.pretrained.hub import SHIPPED

ARGUMENTS = [{}, {"hidden": 3, "identity": True}, {"dynamic": False, "neighborhood": 2}]
FILES = {"config.json", "model.safetensors", "README.md"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def fill(module, seed=0):
    """Give every number of `module` a value of its own; return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) - 0.4)
    return module


def two_sites(**arguments):
    sites = {"G1.B2": fill(Sparta(3), 1), "G4.B2": fill(Sparta(4, **arguments), 2)}
    return SpartaSet(sites, {"backbone": "ResNet-18"})


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def numbers(activations):
    """All tensors of a set, by label and name."""
    return {f"{label}.{key}": value for label, a in activations.items() for key, value in state(a).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0, msg=key)


# a set in memory


def test_labels_are_what_is_seen():
    first, second = Sparta(3), Sparta(4)
    activations = SpartaSet({"G1.B2": first, "features.3": second})
    assert activations["G1.B2"] is first
    assert list(activations) == list(activations.keys()) == ["G1.B2", "features.3"]
    assert dict(activations.items()) == {"G1.B2": first, "features.3": second}
    assert list(activations.values()) == [first, second]
    assert "features.3" in activations
    assert "G9.B1" not in activations
    assert len(activations) == 2
    assert repr(activations) == f"SpartaSet(\n  (G1.B2): {first!r}\n  (features.3): {second!r}\n)"
    assert isinstance(activations, Mapping)
    with pytest.raises(KeyError, match=r"no site 'G9.B1' in this set, which has \['G1.B2', 'features.3'\]"):
        activations["G9.B1"]


def test_what_is_no_set_is_refused_with_every_bad_name():
    with pytest.raises(WeightsError) as error:
        SpartaSet({"G1.B1": nn.ReLU(), "G1.B2": Sparta(3), "": Sparta(3), 3: None})
    assert str(error.value) == (
        'SpartaSet maps site labels to Sparta modules, e.g. {"G1.B2": Sparta(16)}; '
        "not a Sparta: 'G1.B1' (ReLU), 3 (NoneType); not a label: '', 3"
    )
    with pytest.raises(WeightsError, match="it cannot be empty"):
        SpartaSet({})


GRADIENT = torch.ones(1, requires_grad=True) * 2


@pytest.mark.parametrize(
    ("given", "info", "words"),
    [
        (nn.ReLU(), None, r"a set is made of a dictionary, as in SpartaSet\(.*\), not ReLU"),
        ([Sparta(3)], None, "not list"),
        (8, None, "not int"),  # as `replace_relus` gives it, who was given the class
        ({"a": Sparta(3)}, "my-set", "info is a dictionary, as in .* not str"),
        (
            {"a": Sparta(3)},
            {"loss": GRADIENT},
            r"info holds what cannot be copied \(RuntimeError: .*loss.item",
        ),
    ],
)
def test_what_a_set_is_made_of(given, info, words):
    with pytest.raises(WeightsError, match=words):
        SpartaSet(given, info)


def test_any_text_is_a_label(tmp_path):
    activations = {label: fill(Sparta(3)) for label in ("freeze", "a/b", "features.3")}
    SpartaSet(activations).save_pretrained(tmp_path)
    assert list(Sparta.from_pretrained(tmp_path)) == list(activations)


def test_the_version_in_info_may_be_the_users(tmp_path):
    SpartaSet({"G1.B2": Sparta(3)}, {"version": "mine 2"}).save_pretrained(tmp_path)
    assert Sparta.from_pretrained(tmp_path).info == {"version": "mine 2"}


def test_info_is_a_copy():
    info = {"recipe": {"epochs": 3}}
    activations = SpartaSet({"G1.B2": Sparta(3)}, info)
    info["recipe"]["epochs"] = 4
    assert activations.info == {"recipe": {"epochs": 3}}


# there and back


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_saved_set_comes_back_as_it_was(tmp_path, arguments):
    saved = two_sites(**arguments)
    loaded = Sparta.from_pretrained(saved.save_pretrained(tmp_path / "set"))
    assert {path.name for path in (tmp_path / "set").iterdir()} == FILES
    on_disk = safetensors.load_file(tmp_path / "set" / "model.safetensors")
    assert {value.dtype for value in on_disk.values()} == {torch.float16}
    assert {key.split(".conv1")[0] for key in on_disk if key.endswith("conv1")} == {"G1.B2", "G4.B2"}
    assert list(loaded) == ["G1.B2", "G4.B2"]
    for label, activation in loaded.items():
        assert type(activation) is Sparta
        assert repr(activation) == repr(saved[label].freeze())
        assert not any(parameter.requires_grad for parameter in activation.parameters())
    assert all(value.device.type == "cpu" for value in numbers(loaded).values())
    for label, activation in saved.items():
        assert_same(state(loaded[label]), half(activation))
        activation.load_state_dict(half(activation))
    assert loaded.info.pop("version")
    assert loaded.info == saved.info
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(loaded["G1.B2"](x), saved["G1.B2"](x))
    x = torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(loaded["G4.B2"](x), saved["G4.B2"](x))


def test_the_configuration_holds_the_arguments_and_the_shapes(tmp_path):
    two_sites(hidden=2, identity=True, dynamic=False, neighborhood=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["format"] == 2
    small = {"in_channels": 3, "hidden": 8, "identity": False, "dynamic": True, "neighborhood": 1}
    other = {"in_channels": 4, "hidden": 2, "identity": True, "dynamic": False, "neighborhood": 2}
    three = {"conv1": [8, 3, 3, 3], "conv2": [3, 8, 3, 3], "conv3": [8, 3, 3, 3], "conv4": [1, 8, 3, 3]}
    four = {"conv1": [2, 4, 3, 3], "conv2": [4, 2, 3, 3], "conv3": [2, 4, 3, 3], "conv4": [1, 2, 3, 3]}
    assert config["sites"] == {
        "G1.B2": small | {"shapes": three | {"conv6": [1, 3, 3, 3], "gain": [1]}},
        "G4.B2": other | {"shapes": four | {"conv5": [1, 1, 3, 3], "gain": [1]}},
    }


def test_float32_on_disk_is_exact(tmp_path):
    saved = two_sites(hidden=3)
    saved.save_pretrained(tmp_path, dtype=torch.float32)
    assert_same(numbers(Sparta.from_pretrained(str(tmp_path))), numbers(saved))
    assert any((v != v.half().float()).any() for v in numbers(saved).values())


def test_one_function_by_every_name(tmp_path):
    two_sites().save_pretrained(tmp_path)
    for owner in (Sparta, SpartaSet, Sparta(2)):
        assert isinstance(owner.from_pretrained(tmp_path), SpartaSet)


def test_loading_leaves_random_numbers_and_default_dtype_alone(tmp_path):
    two_sites().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        loaded = Sparta.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert {value.dtype for value in numbers(loaded).values()} == {torch.float32}


def test_set_of_another_memory_format_and_shared_modules_is_saved(tmp_path):
    plain, other = fill(Sparta(3)), fill(Sparta(3)).to(memory_format=torch.channels_last).double()
    SpartaSet({"a": plain, "b": plain, "c": other}).save_pretrained(tmp_path, dtype=torch.float32)
    for activation in Sparta.from_pretrained(tmp_path).values():
        assert_same(state(activation), state(plain))


def test_links_are_followed_and_never_written_through(tmp_path):
    old = two_sites().save_pretrained(tmp_path / "blobs")
    (tmp_path / "set").mkdir()
    for name in FILES:
        (tmp_path / "set" / name).symlink_to(old / name)
    assert list(Sparta.from_pretrained(tmp_path / "set")) == ["G1.B2", "G4.B2"]
    before = (old / "model.safetensors").read_bytes()
    SpartaSet({"G2.B2": Sparta(3)}).save_pretrained(tmp_path / "set")
    assert (old / "model.safetensors").read_bytes() == before


# saving


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda s: s["G1.B2"].conv1.data.fill_(7e4),
            ["G1.B2.conv1 is not finite in torch.float16", "float32"],
        ),
        (lambda s: s["G4.B2"].conv6.data.fill_(torch.nan), ["G4.B2.conv6 is not finite"]),
        (lambda s: s["G1.B2"].conv3.data.mul_(1e-7), ["G1.B2.conv3 is too small for torch.float16"]),
        (lambda s: s["G4.B2"].to("meta"), ["G4.B2.gain is on the meta device and has no numbers"]),
        (
            lambda s: prune.identity(s["G1.B2"], "conv1"),
            ["G1.B2: shapes {", "'conv1_orig': [8, 3, 3, 3]"],
        ),
        (lambda s: s["G1.B2"].register_buffer("seen", torch.zeros(1)), ["unknown G1.B2.seen"]),
        (lambda s: setattr(s["G4.B2"], "identity", 1), ["G4.B2 has 'identity' a int, not bool"]),
        (lambda s: setattr(s["G4.B2"], "hidden", 9), ["G4.B2: shapes {"]),
        (lambda s: setattr(s["G4.B2"].gain, "data", torch.ones(())), ["G4.B2: shapes {", "'gain': []"]),
        (lambda s: s.info.update(when=torch.ones(1)), ["Tensor", "JSON"]),
        (lambda s: s.info.update(error=float("nan")), ["JSON"]),
    ],
)
def test_what_cannot_be_saved_leaves_the_folder_alone(tmp_path, spoil, words):
    two_sites().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    spoilt = two_sites()
    spoil(spoilt)
    with pytest.raises(WeightsError) as error:
        spoilt.save_pretrained(tmp_path)
    assert all(word in str(error.value) for word in [*words, "nothing was written"]), error.value
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["Mine", "Sparta"])
def test_subclass_which_could_not_be_built_again_is_refused(tmp_path, name):
    mine = type(name, (Sparta,), {})
    with pytest.raises(WeightsError, match=f"a is a {name}, not a Sparta"):
        SpartaSet({"a": mine(3)}).save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", None])
def test_unknown_dtype_is_refused(tmp_path, dtype):
    with pytest.raises(WeightsError, match=f"must be torch.float16 or torch.float32, not {dtype!r}"):
        two_sites().save_pretrained(tmp_path, dtype=dtype)


def test_a_set_that_is_loaded_where_nothing_trains_may_train(tmp_path):
    two_sites().save_pretrained(tmp_path)
    with torch.inference_mode():
        activations = Sparta.from_pretrained(tmp_path)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    activations.unfreeze()["G1.B2"](x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    for seed in (1, 2):
        SpartaSet({"G1.B2": fill(Sparta(3), seed)}).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt", ".git"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_same(state(Sparta.from_pretrained(tmp_path)["G1.B2"]), half(fill(Sparta(3), 2)))


def half(module):
    return {key: value.half().float() for key, value in module.state_dict().items()}


# loading strictly


@pytest.fixture
def folder(tmp_path):
    return two_sites().save_pretrained(tmp_path / "set")


def refused(folder, *words):
    with pytest.raises(WeightsError) as error:
        Sparta.from_pretrained(folder)
    text = str(error.value)
    assert text.startswith(f"cannot load '{folder}' from {folder}: "), text
    assert text.endswith("save it again with save_pretrained"), text
    assert all(word in text for word in words), text


def edit(folder, change=lambda config: None, tensors=None):
    """Change configuration and tensors as one who also corrects the sha256."""
    config = json.loads((folder / "config.json").read_bytes())
    if tensors is not None:
        weights = safetensors.load_file(folder / "model.safetensors")
        tensors(weights)
        (folder / "model.safetensors").write_bytes(safetensors.save(weights))
    config["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_all_differences_are_listed_at_once(folder):
    def spoil(tensors):
        del tensors["G1.B2.conv1"]
        tensors["G1.B2.conv9"] = torch.zeros(1)
        tensors["G1.B2.conv2"] = torch.zeros(3, 8, 3, 1, dtype=torch.float16)
        tensors["G4.B2.conv3"] = tensors["G4.B2.conv3"].float()
        tensors["G4.B2.conv4"] = tensors["G4.B2.conv4"].int()
        tensors["G4.B2.gain"][0] = torch.inf

    edit(folder, tensors=spoil)
    refused(
        folder,
        "no G1.B2.conv1;",
        "unknown G1.B2.conv9",
        "G1.B2.conv2 is (3, 8, 3, 1) torch.float16, not (3, 8, 3, 3) torch.float16",
        "G4.B2.conv3 is (8, 4, 3, 3) torch.float32, not (8, 4, 3, 3) torch.float16",
        "G4.B2.conv4 is (1, 8, 3, 3) torch.int32, not (1, 8, 3, 3) torch.float16",
        "G4.B2.gain is not finite",
    )


def site(**changes):
    return lambda config: config["sites"]["G4.B2"].update(changes)


def shape(name, numbers):
    return lambda config: config["sites"]["G4.B2"]["shapes"].update({name: numbers})


def consistent(config):
    """Give the changed site the shapes of its arguments, as one who knows the rule."""
    site = config["sites"]["G4.B2"]
    activation = Sparta(**{name: value for name, value in site.items() if name != "shapes"})
    site["shapes"] = {name: list(p.shape) for name, p in activation.named_parameters()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format=1), ["has format 1, this version of sparta-act reads 2"]),
        (lambda c: c.update(format=3), ["has format 3, this version of sparta-act reads 2"]),
        (lambda c: c.update(format=True), ["has format True"]),
        (lambda c: c.update(format=2.0), ["'format' a float, not int"]),
        (
            lambda c: [c.pop("info"), c.update(x=1, dtype=3)],
            ["no 'info', unknown 'x'", "'dtype' a int, not str"],
        ),
        (lambda c: c.update(dtype="float64"), ["dtype 'float64' is not one of ['float16', 'float32']"]),
        (lambda c: c.update(dtype="float32"), ["G1.B2.conv1 is (8, 3, 3, 3) torch.float16", "G4.B2.conv6"]),
        (lambda c: c.update(sites={}), ["unknown G1.B2.conv1"]),
        (lambda c: c.update(sites={"G1.B2": 3}), ["G1.B2 has no 'dynamic', no 'hidden'"]),
        (lambda c: c["sites"].update({"a/b": c["sites"]["G1.B2"]}), ["no a/b.conv1"]),
        (site(reading="Sparta"), ["G4.B2 has unknown 'reading'"]),
        (lambda c: c["sites"]["G4.B2"].pop("hidden"), ["G4.B2 has no 'hidden'"]),
        (lambda c: c["sites"]["G4.B2"].pop("shapes"), ["G4.B2 has no 'shapes'"]),
        (site(hidden=4), ["G4.B2: shapes {", "'conv1': [8, 4, 3, 3]", "'conv1': [4, 4, 3, 3]"]),
        (site(hidden=0), ["G4.B2: Sparta: hidden must be a whole number of at least 1, not 0"]),
        (site(hidden=None), ["G4.B2 has 'hidden' a NoneType, not int"]),
        (site(hidden=True), ["G4.B2 has 'hidden' a bool, not int"]),
        (site(hidden=10**30), ["G4.B2: "]),
        (site(identity=1), ["G4.B2 has 'identity' a int, not bool"]),
        (site(identity="yes"), ["G4.B2 has 'identity' a str, not bool"]),
        (site(identity=True), ["model.safetensors was written with: G4.B2 had identity False, not True"]),
        (site(neighborhood=2), ["model.safetensors was written with: G4.B2 had neighborhood 1, not 2"]),
        (site(shapes={}), ["G4.B2: shapes {} are not those of its arguments"]),
        (site(shapes=[]), ["G4.B2 has 'shapes' a list, not dict"]),
        (shape("conv1", [8, 4, 3]), ["G4.B2: shapes {'conv1': [8, 4, 3],"]),
        (shape("conv9", [1]), ["G4.B2: shapes {", "'conv9': [1]"]),
        (shape("gain", []), ["G4.B2: shapes {", "'gain': []"]),
        (
            lambda c: [site(hidden=4)(c), consistent(c)],
            ["G4.B2.conv1 is (8, 4, 3, 3) torch.float16, not (4, 4, 3, 3)"],
        ),
        (site(in_channels=5), ["G4.B2: shapes {", "'conv1': [8, 5, 3, 3]"]),
        (site(in_channels=0), ["in_channels must be a whole number of at least 1, not 0"]),
        (site(in_channels=True), ["G4.B2 has 'in_channels' a bool, not int"]),
        (site(in_channels=10**30), ["G4.B2: "]),
        (site(in_channels=10**10), ["G4.B2: "]),
        (site(in_channels=10**6), ["in_channels is at most 65536"]),  # and takes no memory
        (site(dynamic=False), ["G4.B2: shapes {", "'conv5': [1, 1, 3, 3]"]),
        (lambda c: [site(dynamic=False)(c), consistent(c)], ["no G4.B2.conv5", "unknown G4.B2.conv6"]),
        (site(dynamic=1), ["'dynamic' a int, not bool"]),
        (site(inplace=True), ["G4.B2 has unknown 'inplace'"]),
        (
            lambda c: [site(hidden=3)(c), c["sites"]["G1.B2"].update(dynamic=0)],
            ["G1.B2 has", "G4.B2: shapes"],
        ),
    ],
)
def test_configuration_which_is_not_ours_is_refused(folder, change, words):
    edit(folder, change)
    refused(folder, *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"format"', "[" * 100_000, "\xff", '{"format": 1}'])
def test_configuration_which_is_no_configuration_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, "cannot be read", name)


def test_changed_or_cut_off_weights_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for data in (whole[:-1], whole[: len(whole) // 2], b"", bytes(flipped), whole + b"\0"):
        path.write_bytes(data)
        refused(folder, "model.safetensors is not the file that config.json was written with")
        edit(folder)  # as one who corrects the sha256
        if data != bytes(flipped):  # any number is a number; the rest is no safetensors file
            refused(folder, "model.safetensors is no safetensors file")
        path.write_bytes(whole)
        edit(folder)


@pytest.mark.parametrize(
    "sites", ["", "{broken", "null", "[1]", '{"G1.B2": 3}', "[" * 100_000, "9" * 5000, None]
)
def test_sites_beside_the_weights_which_are_none_are_refused(folder, sites):
    weights = safetensors.load_file(folder / "model.safetensors")
    metadata = None if sites is None else {"sites": sites}
    (folder / "model.safetensors").write_bytes(safetensors.save(weights, metadata))
    edit(folder)  # as one who corrects the sha256
    refused(folder, "the sites in config.json are not those that model.safetensors was written with")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickle_is_never_loaded(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    torch.save({"G1.B2.conv1": Bomb()}, folder / "model.safetensors")
    refused(folder, "not the file")
    edit(folder)
    refused(folder, "no safetensors file")
    assert not Path("exploded").exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "cannot be read")
    assert not Path("exploded").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert Path("exploded").exists()  # the bomb was real


# names


NO_NAMES = [
    "../x",
    "./x",
    "/x/y",
    "~/x",
    "a/b/c",
    "a/",
    "/a",
    "a b",
    "-x",
    "a--b",
    "a..b",
    "a.safetensors",
    Path("a"),
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_name_which_is_no_name_is_refused_without_asking_anyone(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").touch()
    problem = r"there is no folder .*, and that is no name on the Hub either: name a folder .*, or one of \["
    with pytest.raises(WeightsError, match=rf"{problem}|our sets are \[.* HFValidationError") as error:
        Sparta.from_pretrained(name, cache_dir=tmp_path)
    assert "Connect" not in str(error.value)


def test_unknown_short_name_lists_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setitem(SHIPPED, "ours", {})
    with pytest.raises(
        WeightsError, match=r"'nowhere': there is no such folder, .* \[.*'ours'\].*sparta-act/nowhere"
    ):
        Sparta.from_pretrained("nowhere", cache_dir=tmp_path, local_files_only=True)


def test_a_mistyped_folder_is_answered_with_the_nearest_set(tmp_path, monkeypatch):
    two_sites().save_pretrained(tmp_path / "runs" / "my-set")
    (tmp_path / "runs" / "my-sea").mkdir()  # no set
    for here, name, meant in (
        ("runs", "./my-st", "./my-set"),
        ("runs", "MY-SET2", "my-set"),
        (".", "runs/my-st", "runs/my-set"),
        (".", Path("runs/my_set"), "runs/my-set"),
        (".", tmp_path / "runs/my-se", tmp_path / "runs/my-set"),
        ("runs", "cifar10_resnet18_w16", "cifar10-resnet18-w16"),
        ("runs", "cifar10-resnet", "cifar10-resnet18"),
    ):
        monkeypatch.chdir(tmp_path / here)
        with pytest.raises(WeightsError, match=r"there is no (such )?folder") as error:
            Sparta.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
        assert f"(did you mean {str(meant)!r}" in str(error.value)
        assert error.value.__cause__ is None
    with pytest.raises(WeightsError, match=r"there is no folder './zebra', and") as error:
        Sparta.from_pretrained("./zebra")
    assert "did you mean" not in str(error.value)


def test_folder_has_no_revision(folder):
    with pytest.raises(WeightsError, match="no revisions: omit revision='v1'"):
        Sparta.from_pretrained(folder, revision="v1")


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Ship a set under the name `ours`, from another folder than the real ones."""
    folder = two_sites().save_pretrained(tmp_path / "sets" / "ours")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setitem(SHIPPED, "ours", hashes)
    monkeypatch.setattr(hub, "SETS", tmp_path / "sets")
    monkeypatch.chdir(tmp_path)
    return folder


def test_shipped_set_loads_by_its_short_name(ship):
    assert_same(state(Sparta.from_pretrained("ours")["G1.B2"]), half(two_sites()["G1.B2"]))
    with pytest.raises(WeightsError, match="no revisions"):
        Sparta.from_pretrained("ours", revision="main")


@pytest.mark.parametrize("name", sorted(FILES))
def test_shipped_set_which_changed_is_refused(ship, name):
    SpartaSet({"G1.B2": Sparta(3)}).save_pretrained(ship.parent / "other")
    shutil.copy(ship.parent / "other" / name, ship / name)
    with pytest.raises(WeightsError, match=rf"'ours' as sparta-act made it: {name} missing or changed"):
        Sparta.from_pretrained("ours")
    (ship / name).unlink()
    with pytest.raises(WeightsError, match="Install sparta-act again"):
        Sparta.from_pretrained("ours")


def test_folder_comes_before_a_shipped_set(ship, tmp_path):
    SpartaSet({"G9.B9": Sparta(3)}).save_pretrained(tmp_path / "ours")
    assert list(Sparta.from_pretrained("ours")) == ["G9.B9"]


def test_all_that_ships_is_listed_and_loads():
    there = {path.name for path in hub.SETS.iterdir() if path.is_dir()} if hub.SETS.is_dir() else set()
    assert there == set(SHIPPED)
    for name, hashes in SHIPPED.items():
        assert hashes.keys() == FILES
        assert Sparta.from_pretrained(name).info["backbone"]


# model card


def test_card_holds_what_info_holds(tmp_path):
    info = {
        "backbone": "ResNet-18 | w16",
        "dataset": "uoft-cs/cifar10",
        "license": "Apache-2.0",
        "pipeline_tag": "image-classification",
        "recipe": {"attack": {"steps": 10}, "epochs": 75},
        "measured": [{"net": "ReLU", "clean": 91.25}, {"net": "Sparta", "clean": 92.5, "PGD-50": 50.125}],
        "limits": "Only 32 x 32 images.",
    }
    SpartaSet({"G1.B2": Sparta(3), "G4.B2": Sparta(4, identity=True)}, info).save_pretrained(
        tmp_path / "small"
    )
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.to_dict()["library_name"] == "sparta-act"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert card.data.pipeline_tag == "image-classification"
    for line in (
        'Sparta.from_pretrained("small")',
        'replace_relus(net, "G1.B2,G4.B2", activations)',
        "| site | channels | hidden | identity | dynamic | neighborhood |",
        "| G4.B2 | 4 | 8 | True | True | 1 |",
        "| net | clean | PGD-50 |\n| --- | --- | --- |\n| ReLU | 91.25 |  |\n| Sparta | 92.5 | 50.125 |",
        "| backbone | ResNet-18 \\| w16 |",
        "| recipe, attack, steps | 10 |\n| recipe, epochs | 75 |",
        "Only 32 x 32 images.",
    ):
        assert line in card.text, line
    assert "| measured" not in card.text
    assert "| limits" not in card.text


def test_card_invents_nothing(tmp_path):
    SpartaSet({"G1.B2": Sparta(3)}).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Measured\nNothing was recorded.\n" in card.text
    assert card.data.to_dict().keys() == {"library_name", "tags"}
    assert "apache" not in (tmp_path / "README.md").read_text()


def errors_of(measured, **more):
    """Metadata of a card as the Hub would read it, and the errors in it by their names."""
    info = {"dataset": "uoft-cs/cifar10", "measured": measured, **more}
    card = ModelCard(str(model_card("org/small", {"G1.B2": Sparta(3)}, info)))
    index = yaml.safe_load(str(card).split("---")[1]).get("model-index")
    if index is None:
        return card.data, {}
    assert index == eval_results_to_model_index(*model_index_to_eval_results(index))
    (model,) = index
    (result,) = model["results"]
    assert model["name"] == "org/small"
    assert result["task"] == {"type": more.get("pipeline_tag", "image-classification")}
    assert result["dataset"] == {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10"}
    assert {m["type"] for m in result["metrics"]} == {"error"}
    return card.data, {m["name"]: m["value"] for m in result["metrics"]}


def test_the_metadata_has_the_measured_errors():
    rows = Sparta.from_pretrained("cifar10-resnet18-w16").info["measured"]
    assert errors_of(rows)[1] == {
        "clean (%)": 37.5,
        "targeted PGD-10, 16/255 (%)": 44.8,
        "targeted PGD-30, 16/255 (%)": 60.9,
        "targeted PGD-50, 16/255 (%)": 62.4,
        "untargeted PGD-50, 8/255 (%)": 64.8,
        "targeted DLR PGD-50, 8/255 (%)": 68.5,
        "AutoAttack, 8/255 (%)": 69.8,
        "worst case, 8/255 (%)": 68.7,
        "worst case with AutoAttack, 8/255 (%)": 69.8,
    }
    assert errors_of({"clean": 37, "PGD-10": 64.8})[1] == {"clean": 37, "PGD-10": 64.8}
    assert errors_of({"mean IoU": 0.5}, pipeline_tag="image-segmentation")[1] == {"mean IoU": 0.5}
    for nothing in (
        None,
        "37%",
        [],
        [{"net": "ReLU", "clean": 91.25}],
        [3, {"error": 3, "SPARTA": 1}],
        {"clean": "3 of 10 wrong", "a": True, "b": float("nan"), "c\nd": 1, "\ud800": 1},
    ):
        assert errors_of(nothing)[1] == {}, nothing
    assert errors_of({"clean": 37}, dataset="mine")[1] == {}  # the Hub wants its name


def test_the_metadata_has_the_license_and_the_base_model_of_info():
    data, _ = errors_of(None, license="MIT", base_model="timm/resnet18.a1_in1k")
    assert (data.license, data.base_model) == ("mit", ["timm/resnet18.a1_in1k"])
    refused = r'is \'all rights reserved\', which the Hub would refuse: it takes the form "apache-2\.0"'
    with pytest.warns(UserWarning, match=refused):
        data, _ = errors_of(None, license="all rights reserved", base_model=["a/b", "a/c", "resnet18", 5])
    assert (data.license, data.base_model) == (None, ["a/b", "a/c"])
    with pytest.warns(UserWarning, match=r'info\["base_model"\] is \'resnet26d\', .* "organization/name"'):
        errors_of(None, base_model="resnet26d")
    with pytest.warns(UserWarning, match=r'info\["license"\] is 5, which'):
        data, _ = errors_of(None, license=5, base_model=None, pipeline_tag="Image Classification")
    assert data.to_dict().keys() == {"library_name", "tags", "datasets"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_card_says_how_the_weights_are_stored(tmp_path, dtype):
    two_sites().save_pretrained(tmp_path, dtype=dtype)
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert f"These weights are {str(dtype)[6:]} on disk, and load as float32, frozen." in text


def test_card_of_the_caller_is_kept(tmp_path):
    card = "---\nlicense: mit\n---\n\n# Mine\n"
    two_sites().save_pretrained(tmp_path / "a", card=card)
    two_sites().save_pretrained(tmp_path / "b", card=ModelCard(card))
    assert (tmp_path / "a" / "README.md").read_text() == (tmp_path / "b" / "README.md").read_text() == card


# frozen


def test_frozen_set_survives_copies():
    for other in (copy.deepcopy(two_sites().freeze()), pickle.loads(pickle.dumps(two_sites().freeze()))):
        assert list(other) == ["G1.B2", "G4.B2"]
        assert other.info == {"backbone": "ResNet-18"}
        assert other["G1.B2"].frozen
        assert not any(parameter.requires_grad for parameter in other["G4.B2"].parameters())
        assert all(p.requires_grad for p in other.unfreeze()["G4.B2"].parameters())


@pytest.mark.parametrize("nothing", ["", None, 5])
def test_no_name_is_no_set(nothing, tmp_path, monkeypatch):
    two_sites().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        WeightsError, match=r"name a folder with .*, 'organization/name' on the Hub, or one of"
    ):
        Sparta.from_pretrained(nothing)


def test_something_in_the_way_of_a_save_leaves_the_old_set(tmp_path):
    old = two_sites().save_pretrained(tmp_path / "set")
    weights = (old / "model.safetensors").read_bytes()
    (old / "config.json").unlink()
    (old / "config.json").mkdir()
    with pytest.raises(WeightsError, match=r"the folder .*config\.json is in the way; nothing was written"):
        two_sites(hidden=3).save_pretrained(old)
    assert (old / "model.safetensors").read_bytes() == weights
    with pytest.raises(WeightsError, match="a file of that name is in the way"):
        two_sites().save_pretrained(old / "model.safetensors")
