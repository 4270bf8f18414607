"""A network by what the user has, and every way in which that can be something else."""

import hashlib
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from examples.paper.common import data
from examples.paper.common.models import build
from examples.paper.evaluation import networks
from sparta_act import Sparta

SETTINGS = {
    "arch": "resnet18",
    "activation": "sparta",
    "sites": "G4.B-1",
    "width": 8,
    "dataset": "cifar10",
    "pretrained": None,
    "averaging": 0.9,
    "seed": 0,
}


def trained(settings=SETTINGS):
    """A network with no number as it was initialised."""
    torch.manual_seed(1)
    classes = len(data.DATASETS[settings["dataset"]].classes)
    named = {k: settings[k] for k in ("arch", "activation", "sites", "width", "dataset")}
    model = build(**named, num_classes=classes)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * (torch.rand_like(tensor) - 0.5))
    model(torch.rand(8, 3, 32, 32))  # in training mode: running statistics, and how many batches
    return model.eval()


def written(path, model, settings=SETTINGS):
    torch.save({"settings": settings, "epoch": 1, "model": model.state_dict(), "average": None}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run") / "checkpoint.pt", trained())


@pytest.fixture(scope="module")
def weights(checkpoint):
    path = checkpoint.with_name("weights.safetensors")
    networks.save(checkpoint, path)
    return path


def images(n=3):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def python(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


# ---- what can be loaded


def test_a_checkpoints_sparta_is_rounded_and_nothing_else_is(checkpoint):
    model, dataset, content = networks.load(str(checkpoint))
    assert dataset == "cifar10"
    assert content == checkpoint.read_bytes()
    assert not any(m.training for m in model.modules())
    original = trained().state_dict()
    assert set(model.state_dict()) == set(original)
    for key, value in model.state_dict().items():
        gate = ".act2." in key and value.is_floating_point()
        assert torch.equal(value, original[key].half().float() if gate else original[key]), key
    assert any(isinstance(m, Sparta) for m in model.modules())
    assert not torch.equal(original["layer4.1.act2.conv1"].half().float(), original["layer4.1.act2.conv1"])


def test_a_file_of_weights_answers_as_the_rounded_network(checkpoint, weights):
    model, dataset, content = networks.load(str(weights))
    assert dataset == "cifar10"
    assert content == weights.read_bytes()
    assert not any(m.training for m in model.modules())
    rounded = trained()
    state = rounded.state_dict().items()
    rounded.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state})
    with torch.no_grad():
        assert torch.equal(model(images()), rounded(images()))
        torch.testing.assert_close(model(images()), trained()(images()), rtol=0.05, atol=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert weights.stat().st_size < 0.6 * checkpoint.stat().st_size


def test_the_file_holds_half_precision_and_the_settings_it_needs(weights):
    tensors = load_file(weights)
    whole = {k for k, v in tensors.items() if v.dtype == torch.int64}
    assert whole == {k for k in tensors if k.endswith("num_batches_tracked")}
    assert {tensors[k].item() for k in whole} == {1}
    assert {v.dtype for k, v in tensors.items() if k not in whole} == {torch.float16}
    with safe_open(weights, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    assert settings == {k: SETTINGS[k] for k in ("arch", "activation", "sites", "width", "dataset")}


def test_the_data_set_comes_along(tmp_path):
    settings = SETTINGS | {"dataset": "mnist-m", "activation": "relu"}
    path = written(tmp_path / "checkpoint.pt", trained(settings), settings)
    networks.save(path, tmp_path / "w.safetensors")
    for where in (path, tmp_path / "w.safetensors"):
        model, dataset, _ = networks.load(str(where))
        assert dataset == "mnist-m"
        torch.testing.assert_close(model.normalize.mean.flatten(), torch.tensor([0.4580, 0.4629, 0.4093]))


def test_a_frozen_set_cannot_be_passed_on_as_weights(tmp_path):
    name = "cifar10-resnet18-w16"
    settings = SETTINGS | {"pretrained": name, "activation": "sparta", "width": 16, "sites": "G*.B-1"}
    model = build("resnet18", "sparta", "G*.B-1", width=16, pretrained=name)
    path = written(tmp_path / "checkpoint.pt", model, settings)
    with pytest.raises(ValueError, match=f"has the SPARTA of {name}, which a file of weights lacks"):
        networks.save(path, tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_a_function_of_a_file_makes_any_network(tmp_path):
    path = python(
        tmp_path,
        "from torch import nn\n\n"
        "def network():\n    return nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4))\n\n"
        "class Other(nn.Module):\n    pass\n",
    )
    model, dataset, content = networks.load(f"{path}:network")
    assert [type(m) for m in model] == [nn.Dropout, nn.Flatten, nn.Linear]
    assert not any(m.training for m in model.modules())
    assert dataset is None
    assert content == path.read_bytes()
    assert type(networks.load(f"{path}:Other")[0]).__name__ == "Other"  # a class is called as well


# ---- what cannot


def assert_refused(where, *texts):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is looked at below)
        networks.load(str(where))
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "none.py:make", "folder/none.py:make"])
def test_a_missing_file(tmp_path, name):
    assert_refused(
        tmp_path / name, f"there is no {tmp_path / name.partition(':')[0]}; give", "FILE.py:FUNCTION"
    )


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        networks.load(str(tmp_path))


def test_a_file_without_the_function(tmp_path):
    path = python(tmp_path, "number = 3\n")
    assert_refused(f"{path}:make", f"{path} has no function 'make'")
    assert_refused(f"{path}:number", f"{path} has no function 'number'")


@pytest.mark.parametrize(("value", "kind"), [("None", "NoneType"), ("[1]", "list"), ("dict()", "dict")])
def test_a_function_that_returns_no_network(tmp_path, value, kind):
    path = python(tmp_path, f"def make():\n    return {value}\n")
    assert_refused(f"{path}:make", f"{path}:make must return a network, not {kind}")


def test_a_python_file_without_a_function_named(tmp_path):
    path = python(tmp_path, "def make():\n    pass\n")
    assert_refused(path, f"{path} makes no network by itself: name its function, {path}:FUNCTION")


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\0" * 64])
def test_a_damaged_file(tmp_path, content):
    for name, text in [
        ("w.safetensors", "no file of weights that `network` wrote"),
        ("w.pt", "checkpoint"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        assert_refused(path, str(path), text)


@pytest.mark.parametrize("left", [7, 500, -100, -1])
def test_a_truncated_file(weights, tmp_path, left):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(weights.read_bytes()[:left])
    assert_refused(path, f"{path} is no file of weights that `network` wrote")


class Tripped:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was opened')",))


def test_a_pickle_is_not_opened_whatever_its_name(tmp_path):
    for name in ("w.safetensors", "w.pt"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Tripped(), protocol=2))
        assert_refused(path, str(path))
        torch.save({"settings": SETTINGS, "epoch": 1, "model": Tripped(), "average": None}, path)
        assert_refused(path, str(path))


GOOD = {k: SETTINGS[k] for k in ("arch", "activation", "sites", "width", "dataset")}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (None, "it has no settings"),
        ("{", "Expecting"),
        ([1], "its settings are [1], must be"),
        (3, "not iterable"),
        ({k: v for k, v in GOOD.items() if k != "dataset"}, "must be"),
        ({k: v for k, v in GOOD.items() if k != "width"}, "must be"),
        (GOOD | {"dataset": "imagenet"}, "'imagenet'"),
        (GOOD | {"activation": "magic"}, "'magic'"),
        (GOOD | {"arch": "vgg"}, "'vgg'"),
        (GOOD | {"width": "8"}, ""),
        (GOOD | {"width": -8}, ""),
        (GOOD | {"width": 16}, "size mismatch"),
        (GOOD | {"activation": "relu"}, "Unexpected key"),
        (GOOD | {"arch": "resnet34"}, "Missing key"),
        (GOOD | {"sites": "G9.B1"}, "G9.B1"),
        (GOOD | {"surprise": 1}, "surprise"),
        (GOOD | {"pretrained": "cifar10-resnet18"}, "pretrained"),
    ],
)
def test_wrong_settings(weights, tmp_path, settings, text):
    path = tmp_path / "other.safetensors"
    told = {"settings": settings if isinstance(settings, str) else json.dumps(settings)}
    save_file(load_file(weights), path, None if settings is None else told)
    assert_refused(path, f"{path} is no file of weights that `network` wrote: ", text)


def test_weights_that_are_missing_or_too_many(weights, tmp_path):
    path, tensors = tmp_path / "other.safetensors", load_file(weights)
    told = {"settings": json.dumps(GOOD)}
    for changed, text in [
        ({k: v for k, v in tensors.items() if k != "fc.bias"}, "fc.bias"),
        (tensors | {"fc.more": torch.zeros(1)}, "fc.more"),
        (tensors | {"fc.bias": torch.zeros(9)}, "fc.bias"),
    ]:
        save_file(changed, path, told)
        assert_refused(path, "no file of weights", text)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.bfloat16, torch.float32])
def test_weights_of_another_dtype(weights, tmp_path, dtype):
    path, tensors = tmp_path / "other.safetensors", load_file(weights)
    changed = tensors | {"fc.weight": tensors["fc.weight"].to(dtype)}
    save_file(changed, path, {"settings": json.dumps(GOOD)})
    assert_refused(path, "no file of weights", "wrong dtype: fc.weight is")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(weights, tmp_path, number):
    path, tensors = tmp_path / "other.safetensors", load_file(weights)
    tensors["fc.weight"][0, 0] = number
    save_file(tensors, path, {"settings": json.dumps(GOOD)})
    assert_refused(path, "no file of weights", "fc.weight has numbers that are not finite")


def test_a_listed_file_that_has_changed(weights, tmp_path):
    path = tmp_path / weights.name
    content = bytearray(weights.read_bytes())
    path.write_bytes(content)
    (tmp_path / networks.SUMS).write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    networks.load(str(path))
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(path, f"{path} has changed: its sha256 is not that in {tmp_path / networks.SUMS}")


def test_the_networks_that_ship_are_those_that_are_listed():
    files = networks.NETWORKS.glob("*.safetensors")
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(files)]
    listed = (networks.NETWORKS / networks.SUMS).read_text().splitlines(keepends=True)
    assert set(sums) <= set(listed)  # the source distribution lacks the wide ones
    assert sums


# ---- the command


def test_a_checkpoint_is_turned_into_a_file_of_weights(checkpoint, weights, tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    networks.main([str(checkpoint), str(out)])
    assert load_file(out).keys() == load_file(weights).keys()
    assert all(torch.equal(v, load_file(weights)[k]) for k, v in load_file(out).items())
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    size = f"{out.stat().st_size:,} bytes"
    assert capsys.readouterr().out == f"written: {out}, {size}; its sha256 is {digest}\n"
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_says_what_cannot_be(checkpoint, tmp_path):
    none, out = tmp_path / "none.pt", tmp_path / "mine.safetensors"
    with pytest.raises(ValueError, match=f"there is no {none}; `train` writes checkpoint.pt into its --out"):
        networks.main([str(none), str(out)])
    with pytest.raises(ValueError, match=r"mine\.pt must be a \.safetensors"):
        networks.main([str(checkpoint), str(tmp_path / "mine.pt")])
    assert list(tmp_path.iterdir()) == []


# ---- what an audit needs besides


def test_a_fingerprint_tells_networks_apart_by_state_and_by_answers():
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor, self.fc = factor, nn.Linear(3072, 4)  # the factor is no part of the state

        def forward(self, x):
            return self.factor * self.fc(x.flatten(1))

    x, model, other = images(), Scaled(1), Scaled(2)
    other.load_state_dict(model.state_dict())
    before = networks.fingerprint(model, x)
    assert networks.fingerprint(model, x) == before
    assert networks.fingerprint(networks.copied(model), x) == before
    assert networks.fingerprint(other, x) != before
    assert networks.fingerprint(model, x[:2]) != before
    silent = nn.Sequential(model)
    silent.register_buffer("unused", torch.tensor([1.0]))
    first = networks.fingerprint(silent, x)
    silent.unused += 1
    assert networks.fingerprint(silent, x) != first


def test_a_copy_is_apart_and_what_cannot_be_copied_is_itself():
    model = nn.Linear(3, 3)
    assert networks.copied(model).weight is not model.weight
    model.file = (i for i in range(3))  # a generator
    assert networks.copied(model) is model


def test_logits_of_another_precision_become_float32():
    x, plain = images(), Answers(logits(10))
    assert networks.in_float32(plain, x) is plain
    for dtype in (torch.float16, torch.float64):
        found = networks.in_float32(Answers(lambda x, dtype=dtype: logits(10)(x).to(dtype)), x)
        assert found(x).dtype == torch.float32
        assert not found.training
        torch.testing.assert_close(found(x), plain(x), rtol=1e-3, atol=0)


# ---- whether it answers


class Answers(nn.Module):
    """Whatever a function of the images returns."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def raising(error):
    def answer(x):
        raise error

    return answer


def logits(classes):
    return lambda x: x.flatten(1)[:, :classes]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_network_that_answers_is_let_through(n):
    networks.check(Answers(logits(10)), images(n), torch.full((n,), 9))


def test_it_is_asked_about_two_images_without_gradient_and_with():
    seen = []

    def answer(x):
        seen.append((len(x), torch.is_grad_enabled()))
        return logits(10)(x)

    networks.check(Answers(answer), images(50), torch.zeros(50, dtype=torch.long))
    assert seen == [(2, False), (2, True)]


@pytest.mark.parametrize(
    ("answer", "labels", "text"),
    [
        (
            nn.Linear(4, 4),
            4,
            "was given images (2, 3, 32, 32) and raised RuntimeError: mat1 and mat2 shapes cannot",
        ),
        (raising(ValueError("no such luck\nand more")), 4, "raised ValueError: no such luck"),
        (raising(TypeError("bytes")), 4, "raised TypeError: bytes"),
        (lambda x: x.mean((1, 2, 3)), 4, "must return logits (2, classes), and returned (2,)"),
        (lambda x: x, 4, "must return logits (2, classes), and returned (2, 3, 32, 32)"),
        (lambda x: x.flatten(1)[:1], 4, "must return logits (2, classes), and returned (1, 3072)"),
        (lambda x: (logits(10)(x), None), 4, "must return logits (2, classes), and returned tuple"),
        (lambda x: {"logits": logits(10)(x)}, 4, "and returned dict"),
        (logits(9), 10, "tells 9 classes apart; these images have 10"),
        (
            logits(3),
            3,
            "tells 3 classes apart; these images have 3, and the targeted DLR loss needs at least 4",
        ),
        (lambda x: logits(10)(x) / 0, 10, "the network's logits are not finite"),
        (lambda x: logits(10)(x) * torch.nan, 10, "the network's logits are not finite"),
    ],
)
def test_a_network_that_does_not_answer(answer, labels, text):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is looked at below)
        networks.check(Answers(answer), images(), torch.tensor([0, 1, labels - 1]))
    assert text in str(error.value)
    assert "\n" not in str(error.value)
