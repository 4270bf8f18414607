"""The small experiments: what each network is, and that a killed call goes on."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from examples.paper.common import data
from examples.paper.common.lock import lock
from examples.paper.common.models import HalvedReLU, ResNet, build
from examples.paper.common.statistics import entry
from examples.paper.controls import command, experiment, networks, pretraining, transfers
from examples.paper.results.transfers import elsewhere, verdict
from sparta_act import Sparta, SpartaError, SpartaSet

TINY = "transfer", "resnet18", "--limit", 8, "--seeds", 0
RELU = command.NETWORKS / "cifar10-resnet18-w16-relu.safetensors"


def slim_set(seed=0):
    torch.manual_seed(seed)
    return SpartaSet({f"G{i + 1}.B2": Sparta(16 * 2**i) for i in range(4)})


def test_shuffled_numbers_are_the_same_numbers_elsewhere():
    taken = slim_set()
    found = transfers.shuffled(taken, 3)
    for label, activation in taken.items():
        for (name, p), q in zip(activation.named_parameters(), found[label].parameters(), strict=True):
            assert torch.equal(p.flatten().sort().values, q.flatten().sort().values)
            assert torch.equal(p, q) == (name == "gain")
    again, other = transfers.shuffled(taken, 3), transfers.shuffled(taken, 4)
    assert torch.equal(found["G1.B2"].conv1, again["G1.B2"].conv1)
    assert not torch.equal(found["G1.B2"].conv1, other["G1.B2"].conv1)


def test_the_networks_of_a_transfer_differ_in_the_activation_alone():
    taken = slim_set().freeze()
    robust = build("resnet18", "sparta", "G*.B-1", width=16)
    made = {
        name: make()
        for name, (make, _) in transfers.cases(
            lambda: ResNet("resnet18", width=16), {"ours": taken}, {"robust": robust}, 5
        ).items()
    }
    whole, first = made.pop("the whole network robust"), made["ReLU"]
    for model in made.values():
        assert torch.equal(model.layer4[1].conv2.weight, first.layer4[1].conv2.weight)
    assert isinstance(made[transfers.HALF].layer1[1].act2, HalvedReLU)
    frozen, there = made["ours, frozen"].layer2[1].act2, made["SPARTA trained there"].layer2[1].act2
    assert torch.equal(frozen.conv3, taken["G2.B2"].conv3)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in there.parameters())
    assert not torch.equal(made["ours, shuffled, frozen"].layer2[1].act2.conv3, frozen.conv3)
    assert torch.equal(whole.layer2[1].act2.conv3, robust.layer2[1].act2.conv3)
    assert not torch.equal(whole.fc.weight, robust.fc.weight)
    assert all(p.requires_grad for p in whole.parameters())


def test_a_mean_gate_is_the_mean_over_active_elements():
    torch.manual_seed(0)
    model, x = build("resnet18", "sparta", "G1.B2", width=8).eval(), torch.rand(6, 3, 32, 32)
    seen = {}
    site = model.layer1[1].act2
    handle = site.register_forward_pre_hook(
        lambda m, inputs: seen.update(x=inputs[0], gate=m.attention(inputs[0]))
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    made = {name: make() for name, make in networks.mean_gate(model, x).items()}
    itself = made.pop("SPARTA")
    assert isinstance(itself.layer1[1].act2, Sparta)
    assert all(torch.equal(p, q) for p, q in zip(itself.parameters(), model.parameters(), strict=True))
    active = seen["x"] > 0
    for name, pick in (
        ("one number", lambda t: [t]),
        ("one of each channel", lambda t: t.unbind(1)),
        ("one of each place of a channel", lambda t: t.flatten(1).unbind(1)),
    ):
        fixed = made[name].layer1[1].act2
        means = [g[a].mean() for g, a in zip(pick(seen["gate"]), pick(active), strict=True) if a.any()]
        numbers = [g for g, a in zip(fixed.gate.flatten(), pick(active), strict=True) if a.any()]
        torch.testing.assert_close(torch.stack(numbers), torch.stack(means))
        assert torch.equal(fixed(seen["x"]), F.relu(seen["x"]) * fixed.gate)
    assert isinstance(site, Sparta)  # the network it was given is as it was


def test_networks_with_a_mean_gate_have_their_own_statistics_of_batch_norm():
    torch.manual_seed(0)
    model, x = build("resnet18", "sparta", "G1.B2", width=8).eval(), torch.rand(6, 3, 32, 32)
    means = {}
    for name, make in networks.mean_gate(model, x).items():
        made, seen = make(), []
        assert not made.training
        made.layer2[0].bn1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            copy.deepcopy(made).train()(x)
        means[name] = made.layer2[0].bn1.running_mean
        torch.testing.assert_close(means[name], seen[0].mean((0, 2, 3)))
    assert not torch.allclose(means["SPARTA"], means["one number"], rtol=1e-3)
    assert not model.layer2[0].bn1.running_mean.any()  # the network it was given is as it was


@pytest.mark.slow
def test_a_transfer_from_the_command_line(tmp_path, tiny_data, capsys, monkeypatch):
    slim_set().save_pretrained(tmp_path / "run/set")
    monkeypatch.setattr(experiment, "PGD", experiment.PGD | {"steps": 1})
    call = [
        "transfer",
        "resnet18",
        "--data",
        tiny_data,
        "--set",
        str(tmp_path / "run/set"),
        "--seeds",
        "0",
        "--limit",
        "8",
    ]
    call += ["--epochs", "1", "--out", str(tmp_path / "out")]
    command.main(call)
    printed = capsys.readouterr().out
    assert "run, shuffled, frozen" in " ".join(printed.split())
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == 5
    images = len(data.load("test", tiny_data)[0])
    assert "seeds" not in command.parser().parse_args(["mean-gate", "--data", "x"])
    record = json.loads(files[0].read_text())
    assert record["errors"]["clean"]["images"] == images - 8  # none that it was trained on
    assert record["options"]["epochs"] == 1

    before = [f.stat().st_mtime_ns for f in files]
    files[2].unlink()  # a call that was killed
    command.main(call)
    after = [f.stat().st_mtime_ns for f in files]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]


@pytest.fixture
def stub(monkeypatch):
    """Nothing is trained or attacked: every image is right. Its list says how many images each call had."""
    seen = []

    def run(make, x, y, test, options):
        seen.append((len(x), len(test[0])))
        right = torch.zeros(len(test[0]), dtype=torch.bool)
        errors = {"clean": experiment.entry(right)}
        return {"options": options, "errors": errors, "gate": {}, "date": "today", "machine": "", "torch": ""}

    monkeypatch.setattr(experiment, "run", run)
    return seen


def call(tmp_path, *words):
    command.main([*map(str, words), "--out", str(tmp_path / "out")])


def refused_and_kept(tmp_path, stub, match, *words):
    """A call that is refused before anything is trained, and leaves all results as they were."""
    files = sorted((tmp_path / "out").glob("*.json"))
    before, calls = {f: f.read_bytes() for f in files}, len(stub)
    with pytest.raises(ValueError, match=match):
        call(tmp_path, *words)
    assert {f: f.read_bytes() for f in sorted((tmp_path / "out").glob("*.json"))} == before
    assert len(stub) == calls


def test_results_of_other_images_are_never_overwritten(tmp_path, tiny_data, stub):
    (tmp_path / "nets.py").write_text(NETWORKS)
    one = "--network", f"{tmp_path}/nets.py:other"
    call(tmp_path, "mean-gate", *one, "--data", tiny_data)
    call(tmp_path, "mean-gate", *one, "--data", tiny_data)
    assert len(stub) == 4
    other = "is a result of other options, which would be lost \\(images\\)"
    refused_and_kept(tmp_path, stub, other, "mean-gate", *one, "--data", "sample")


@pytest.mark.parametrize("limit", [500, 2000])
def test_images_to_test_on_are_never_those_to_train_on(tmp_path, stub, limit):
    with pytest.raises(ValueError, match=f"--limit {limit}: no test image of 500 would be left to test"):
        call(tmp_path, "transfer", "resnet18", "--data", "sample", "--limit", limit)
    call(tmp_path, "transfer", "resnet18", "--data", "sample", "--limit", 499, "--seeds", 0)
    assert stub == [(499, 1)] * 5


def test_results_of_other_options_are_never_overwritten(tmp_path, tiny_data, stub):
    words = *TINY, "--data", tiny_data, "--epochs"
    call(tmp_path, *words, 1)
    call(tmp_path, *words, 1)
    assert len(stub) == 5
    refused_and_kept(tmp_path, stub, r"relu-seed0\.json is a result of other options.*\(epochs\)", *words, 2)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--seeds", 0, 0], "several results would go into transfer-resnet18-relu-seed0.json"),
        (["--set", "a/mine", "b/mine"], r"needs a name of its own, of letters.*not \['mine', 'mine'\]"),
        (["--set", "a/mine", "a/mi-ne", "a/mi_ne"], "several results would go into .*mi-ne-frozen"),
        (["--set", "a/mine", "mine, shuffled"], "needs a name of its own.*'mine, shuffled'"),
        (["--set", "\u65e5\u672c"], "needs a name of its own"),
        (["--whole", RELU, "x/cifar10-resnet18-w16-relu.safetensors"], "needs a name of its own"),
    ],
)
def test_what_would_be_one_result_is_refused(tmp_path, tiny_data, stub, monkeypatch, more, match):
    monkeypatch.chdir(tmp_path)
    for name in ("a/mine", "b/mine", "a/mi-ne", "a/mi_ne", "mine, shuffled", "\u65e5\u672c"):
        slim_set().save_pretrained(tmp_path / name)
    refused_and_kept(tmp_path, stub, match, *TINY, "--data", tiny_data, *more)


def test_another_process_works_in_the_folder(tmp_path, tiny_data, stub):
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out"):
        refused_and_kept(tmp_path, stub, "another process works in", *TINY, "--data", tiny_data)


def test_a_result_that_lacks_an_attack_is_no_result_of_the_others(tmp_path, tiny_data, stub):
    call(tmp_path, *TINY, "--data", tiny_data)
    path = tmp_path / "out/transfer-resnet18-relu-seed0.json"
    record = json.loads(path.read_text())
    record["errors"]["PGD"] = record["errors"]["clean"]
    path.write_text(json.dumps(record))
    refused_and_kept(tmp_path, stub, "are of different attacks", *TINY, "--data", tiny_data)


def test_what_does_not_fit_is_refused_before_any_training(tmp_path, stub):
    SpartaSet({"G1.B2": Sparta(8)}).save_pretrained(tmp_path / "narrow")
    with pytest.raises(SpartaError, match="8 channels"):
        call(tmp_path, "transfer", "resnet18", "--data", "sample", "--limit", 8, "--set", tmp_path / "narrow")
    (tmp_path / "nets.py").write_text(NETWORKS)
    with pytest.raises(ValueError, match=r"there is no .*one\.safetensors"):
        call(tmp_path, *TINY, "--data", "sample", "--whole", tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="--whole takes networks of `train` or `network`, not a Sequential"):
        call(tmp_path, *TINY, "--data", "sample", "--whole", f"{tmp_path}/nets.py:one")
    with pytest.raises(ValueError, match="our sample is of cifar10, not of mnist-m"):
        call(tmp_path, "transfer", "mnist-m", "--data", "sample")
    with pytest.raises(ValueError, match="has no SPARTA, so no gate to replace"):
        call(
            tmp_path,
            "mean-gate",
            "--data",
            "sample",
            "--network",
            command.NETWORKS / "cifar10-resnet18-w16-relu.safetensors",
        )
    assert stub == []


NETWORKS = """
import torch
from torch import nn
from sparta_act import Sparta

def made(sparta, *body):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

def one():
    return made(None, Sparta(8))

def twice(sparta=Sparta(8)):
    return made(sparta, sparta, nn.Conv2d(8, 8, 3), sparta)

def never():
    model = one()
    model[1].idle = Sparta(8)
    return model

def other():
    torch.manual_seed(1)
    return nn.Sequential(*one()[:-1], nn.Linear(8, 10))

def half():
    return one().half()
"""


def test_networks_of_one_file_are_not_taken_for_each_other(tmp_path, tiny_data, stub):
    (tmp_path / "nets.py").write_text(NETWORKS)
    words = "mean-gate", "--data", tiny_data, "--network"
    call(tmp_path, *words, f"{tmp_path}/nets.py:one")
    refused_and_kept(tmp_path, stub, r"\(sha256\)", *words, f"{tmp_path}/nets.py:other")


@pytest.mark.parametrize(
    ("name", "expected"), [("twice", "1 2 times"), ("never", "1.idle 0 times"), ("half", "was given images")]
)
def test_a_gate_that_its_mean_cannot_replace_is_named(name, expected, tmp_path, tiny_data, stub):
    (tmp_path / "nets.py").write_text(NETWORKS)
    with pytest.raises(ValueError, match=expected):
        call(tmp_path, "mean-gate", "--data", tiny_data, "--network", f"{tmp_path}/nets.py:{name}")
    assert stub == []
    assert [*(tmp_path / "out").glob("*")] == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "{}",
        '{"options": {}, "gate": {}, "errors": {"clean": {}}}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_not_a_result_is_named(tmp_path, stub, text, tiny_data):
    path = tmp_path / "out/mean-gate-one-number-seed0.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"one-number-seed0\.json is not a result of `controls`"):
        call(tmp_path, "mean-gate", "--data", tiny_data)
    assert path.read_text() == text


def test_another_set_trains_what_depends_on_it_alone(tmp_path, tiny_data, stub):
    slim_set().save_pretrained(tmp_path / "mine")
    call(tmp_path, *TINY, "--data", tiny_data)
    call(tmp_path, *TINY, "--data", tiny_data, "--set", transfers.SLIM, tmp_path / "mine")
    assert len(stub) == 5 + 2
    call(tmp_path, *TINY, "--data", tiny_data, "--whole", RELU)
    assert len(stub) == 5 + 2 + 1


def test_a_torchvision_network_is_trained_first_and_keeps_all_but_its_classifier(tmp_path, tiny_data, stub):
    pytest.importorskip("torchvision")
    path = tmp_path / "new/trained.safetensors"
    options = "--data", tiny_data, "--trained", path
    with pytest.raises(ValueError, match=r"make it with: python -m examples\.paper controls pretrain"):
        pretraining.load(path)
    command.main(["pretrain", *map(str, options), "--limit", "8", "--epochs", "1"])
    torch.manual_seed(0)
    before, after = pretraining.fresh(), [pretraining.load(path) for _ in range(2)]
    assert torch.equal(after[0][1].conv1.weight, after[1][1].conv1.weight)
    assert not torch.equal(after[0][1].conv1.weight, before[1].conv1.weight)  # it was trained
    assert not torch.equal(after[0][1].fc.weight, after[1][1].fc.weight)
    content = path.read_bytes()
    for name in ("new/trained.safetensors", "new", "notes.md"):
        with pytest.raises(ValueError, match="must be a new file"):
            command.main(["pretrain", "--data", str(tiny_data), "--trained", str(tmp_path / name)])
    assert path.read_bytes() == content
    tensors = load_file(path)
    for wrong in (tensors["1.fc.bias"] * float("nan"), tensors["1.fc.bias"].half(), torch.zeros(9)):
        save_file(tensors | {"1.fc.bias": wrong}, path)
        with pytest.raises(ValueError, match=r"is not a network of `controls pretrain`: .*1\.fc\.bias"):
            pretraining.load(path)
    path.write_bytes(content[:-4])
    for place in (path, path.parent):
        with pytest.raises(ValueError, match=f"{place} is not a network of `controls pretrain`"):
            pretraining.load(place)
    assert stub == []


def test_a_rate_is_chosen_on_training_images_alone(tmp_path, tiny_data, monkeypatch):
    x, _ = data.load("train", tiny_data)
    monkeypatch.setattr(transfers, "HELD", 4)
    seen = []

    def run(make, x, y, held, options):
        seen.append((make(), x, held[0], options["lr"]))
        errors = {"clean": experiment.entry(torch.zeros(len(held[0]), dtype=torch.bool))}
        return {"options": options, "errors": errors, "gate": {}, "date": "today", "machine": "", "torch": ""}

    monkeypatch.setattr(experiment, "run", run)
    words = (
        "rate",
        "resnet18",
        "--data",
        tiny_data,
        "--activation",
        "relu",
        "relu-half",
        "--lr",
        "0.02",
        "0.5",
    )
    limit = len(x) - 4
    with pytest.raises(ValueError, match=f"--limit {limit + 1}: of {len(x)} training images 4 are needed to"):
        call(tmp_path, *words, "--limit", limit + 1)
    with pytest.raises(ValueError, match="nothing to train: give --activation or --whole"):
        call(tmp_path, *words[:4], "--activation", "--limit", limit)
    assert seen == []
    call(tmp_path, *words, "--limit", limit)
    assert [lr for *_, lr in seen] == [0.02, 0.5, 0.02, 0.5]
    apart = torch.arange(4) * len(x) // 4  # a file may list its classes unevenly: held out is all along it
    for _, train, held, _ in seen:
        assert torch.equal(held, x[apart])
        assert torch.equal(train, x[[i for i in range(len(x)) if i not in apart]])
    first, _, half, _ = (network for network, *_ in seen)
    assert isinstance(half.layer1[1].act2, HalvedReLU)
    assert not isinstance(first.layer1[1].act2, HalvedReLU)
    assert torch.equal(first.fc.weight, half.fc.weight)
    assert (tmp_path / "out/rate-resnet18-relu-half-at-0-5-seed7.json").exists()
    assert list(elsewhere(tmp_path / "out")) == []  # no transfer
    call(tmp_path, *words[:4], "--activation", "--lr", "0.5", "--limit", limit, "--whole", RELU)
    whole = seen[-1][0]
    assert len(seen) == 5
    assert not torch.equal(whole.layer1[0].conv1.weight, first.layer1[0].conv1.weight)
    assert (tmp_path / "out/rate-resnet18-cifar10-resnet18-w16-relu-at-0-5-seed7.json").exists()


def test_the_page_has_a_table_of_each_destination(tmp_path, tiny_data, stub):
    assert list(elsewhere(tmp_path / "out")) == []
    call(tmp_path, *TINY, 1, "--data", tiny_data)
    page = "\n".join(elsewhere(tmp_path / "out"))
    assert "### A fresh ResNet-18 of width 16" in page
    assert "| ReLU | 0.0%, 0.0% |" in page
    row = next(line for line in page.splitlines() if line.startswith("| cifar10-resnet18-w16, frozen | +0.0"))
    assert row.count("+0.0 ± ") == 3  # minus ReLU, the constant, and its numbers shuffled
    path = tmp_path / "out/transfer-resnet18-relu-seed1.json"
    record = json.loads(path.read_text())
    record["options"]["epochs"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the results of transfer resnet18 differ in epochs"):
        list(elsewhere(tmp_path / "out"))
    path.unlink()
    with pytest.raises(ValueError, match="have different seeds"):
        list(elsewhere(tmp_path / "out"))


@pytest.mark.parametrize(
    ("frozen", "relu", "half", "shuffled", "said"),
    [
        (0, 90, 90, 90, "it helps"),
        (0, 90, 90, 3, "no help is shown, and no harm"),  # its numbers shuffled do as well
        (0, 90, 3, 90, "no help is shown, and no harm"),
        (90, 0, 90, 90, "it hurts"),
        (90, 90, 0, 0, "it hurts"),
        (90, 93, 93, 0, "no help is shown, and no harm"),
    ],
)
def test_a_set_helps_or_hurts_by_the_registered_rule(frozen, relu, half, shuffled, said):
    def results(wrong):
        errors = {a: entry(torch.arange(100) < wrong) for a in ("clean", "PGD-10, 8/255")}
        return [{"errors": errors, "options": {"images": "the same"}}] * 3

    labels = "ReLU", "ReLU times one half", "A, frozen", "A, shuffled, frozen"
    made = {label: results(w) for label, w in zip(labels, (relu, half, frozen, shuffled), strict=True)}
    assert {label: verdict(made, label) for label in made if verdict(made, label)} == {"A, frozen": said}
    assert verdict({label: found[:1] for label, found in made.items()}, "A, frozen") == ""
