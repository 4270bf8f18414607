import json
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from examples.paper.audit import attacks, command, run
from examples.paper.audit.budget import Budget
from examples.paper.audit.run import audit
from examples.paper.audit.verdicts import FAIL, NO_GATE, PASS, SUSPECT, UNKNOWN
from examples.paper.common import data, records
from examples.paper.evaluation import networks
from examples.paper.maskers.command import DOCS, RECORD, found, informed, judged, table
from examples.paper.maskers.networks import (
    HONEST,
    MASKERS,
    Around,
    Backdoor,
    LoudLogits,
    Memory,
    NoNumber,
    Probabilities,
    RandomResize,
    Rounding,
)
from examples.paper.maskers.small import Small, small
from sparta_act import Sparta

ENOUGH = Budget(steps=20, restarts=2, draws=20, queries=600, control=10, autoattack=5, curve=100)
FEW = Budget(steps=10, restarts=2, draws=10, queries=150, control=5, autoattack=5, curve=40)
TINY = Budget(2, 1, 1, 2, 1, 1, 4)
EPS = 8 / 255


def audited(model, out, images=500, budget=FEW, eps=EPS, **surrogates):
    x, y = (t[:images] for t in data.load("test"))
    x = data.to_float(x)
    record = audit(model, x, y, out=out, eps=eps, budget=budget, surrogates=surrogates)
    return record, {row["number"]: row for row in record["checks"]}


def failing(rows):
    return {number for number, row in rows.items() if row["verdict"] == FAIL}


@pytest.fixture(scope="module")
def plain():
    return small("plain")


@pytest.mark.slow
def test_a_plain_adversarially_trained_network_passes(plain, tmp_path):
    record, rows = audited(plain, tmp_path, budget=ENOUGH, sparta=small("SPARTA"))
    assert {n: row["verdict"] for n, row in rows.items()} == dict.fromkeys(range(1, 13), PASS) | {11: NO_GATE}
    worst, plain = record["worst case"]["error"], record["attacks"][attacks.PLAIN]["error"]
    assert 0.7 < plain <= worst < min(1, plain + 0.05)
    assert record["evidence"]["images"] == record["evidence"]["wrong again"] == round(500 * worst)
    assert record["evidence"]["within eps"]


@pytest.mark.slow
def test_loud_logits_fail_for_cross_entropys_vanished_gradient(plain, tmp_path):
    record, rows = audited(LoudLogits(plain), tmp_path)
    assert {8, 9, 10} <= failing(rows)
    assert failing(rows).isdisjoint({1, 5, 6, 7, 11})
    assert "there is no gradient to follow" in rows[9]["meaning"]
    assert "cross-entropy differ" in rows[8]["meaning"]
    assert "the gradient of float64 is better" in rows[10]["meaning"]
    assert record["attacks"]["PGD, CW"]["error"] > record["attacks"]["PGD"]["error"] + 0.05
    x, y = (t[:500] for t in data.load("test"))
    known = informed(MASKERS["logits times 1000"], data.to_float(x), y, 20)
    assert record["worst case"]["error"] == pytest.approx(known, abs=0.01)


@pytest.mark.slow
def test_rounded_images_fail_for_a_gradient_that_is_zero(plain, tmp_path):
    record, rows = audited(Rounding(plain), tmp_path, 150)
    assert {2, 4, 5, 9} <= failing(rows)
    assert rows[2]["meaning"] == "PGD cannot raise the loss"
    assert "without the gradient: it is masked" in rows[5]["meaning"]
    zero = record["numbers"]["zero gradients"]
    assert zero["without"] == zero["images"] > 30
    # no step moves, but the random start alone tips an image or two to another level
    assert abs(record["attacks"]["PGD"]["error"] - record["attacks"]["clean"]["error"]) < 0.01
    assert record["worst case"]["error"] > record["attacks"]["PGD"]["error"] + 0.03


@pytest.mark.slow
def test_random_resizing_fails_as_randomized(plain, tmp_path):
    record, rows = audited(RandomResize(plain), tmp_path, 150)
    assert 9 in failing(rows)
    assert "randomized" in rows[9]["figure"]
    assert "the network changes its answers" in rows[9]["meaning"]
    assert record["evidence"]["wrong again"] < record["evidence"]["images"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masked", "number", "meaning"),
    [
        (partial(Backdoor, hidden=True), 12, "autograd's gradient is not the derivative"),
        (
            partial(Backdoor, hidden=False),
            8,
            "AutoAttack without Square and plain cross-entropy differ",
        ),
        (NoNumber, 9, "there is no gradient to follow"),
        (Memory, 9, "the network changes its answers"),
    ],
)
def test_masking_that_passed_an_earlier_audit_fails(plain, tmp_path, masked, number, meaning):
    budget = Budget(10, 2, 5, 50, 4, 5, 50)
    _, rows = audited(masked(plain).eval(), tmp_path, 150, budget)
    assert rows[number]["verdict"] == FAIL
    assert meaning in rows[number]["meaning"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(MASKERS)[-7:], *list(HONEST)[1:]])
def test_a_masker_is_found_and_an_honest_network_is_not_accused(name, tmp_path):
    x, y = (t[:150] for t in data.load("test"))
    row = judged(name, (MASKERS | HONEST)[name], data.to_float(x), y, tmp_path, FEW)
    assert found(row), row
    assert row["honest"] == (name in HONEST)
    if "SPARTA" in name:
        assert (11 in row["failed"]) == (name in MASKERS)


def test_what_the_page_says_of_every_masker_is_of_these_networks_and_right():
    record = json.loads(RECORD.read_text())
    assert [row["name"] for row in record["rows"]] == [*MASKERS, *HONEST]
    assert all(found(row) for row in record["rows"])
    assert table(record) in (DOCS / "audit.md").read_text()
    assert not found(record["rows"][0] | {"status": 0, "informed": 0.9, "worst case": 0.88})
    assert found(record["rows"][0] | {"status": 0, "informed": 0.9, "worst case": 0.891})
    assert not found(record["rows"][-1] | {"failed": [3]})


class Optimising(Around):
    """Purifies its images by gradient descent when asked."""

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.model(z).logsumexp(1).sum(), z)
        return self.model(x - 0 * grad)


@pytest.mark.parametrize(
    ("wrapped", "warning"), [(Probabilities, "probability distribution"), (Optimising, "dynamic defense")]
)
def test_autoattacks_other_flags_fail(wrapped, warning, tmp_path):
    torch.manual_seed(3)
    _, rows = audited(wrapped(Small()), tmp_path, 10, TINY)
    assert rows[9]["verdict"] == FAIL
    assert warning in rows[9]["figure"]


class Half(Around):
    """Computes in bfloat16 and answers in it."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class OnlyFloat32(Around):
    def forward(self, x):
        return self.model(x.float())


class FiveClasses(Around):
    def forward(self, x):
        return self.model(x)[:, :5]


class Unused(Around):
    """Has a SPARTA whose result nobody reads, and another one twice."""

    def __init__(self, model):
        super().__init__(model)
        self.idle, self.gate = Sparta(3), Sparta(3)

    def forward(self, x):
        self.idle(x)
        return self.model(self.gate(self.gate(x)))


class Capped(Around):
    """All of its gradient goes through a tanh."""

    def forward(self, x):
        return 5 * torch.tanh(self.model(x) / 5)


@pytest.mark.parametrize("wrapped", [Half, OnlyFloat32, FiveClasses, Unused, Capped, Optimising])
def test_a_strange_but_honest_network_is_audited_to_the_end(wrapped, tmp_path):
    torch.manual_seed(3)
    x = data.load("test")[0][:10]
    model = wrapped(Small()).eval()
    x = data.to_float(x)
    with torch.no_grad():
        y = model(x).argmax(1)
    record = audit(model, x, y, out=tmp_path, budget=TINY)
    rows = {row["number"]: row for row in record["checks"]}
    assert rows[9]["verdict"] == UNKNOWN or wrapped in (Half, Optimising)
    if wrapped is OnlyFloat32:
        assert "float64 not possible" in rows[10]["figure"]
        assert "at a point not possible" in rows[12]["figure"]
    if wrapped is Unused:
        assert list(record["gate"]) == ["gate", "gate #2"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The command line's argument for a third-party network, and a small budget."""
    monkeypatch.setattr(run, "Budget", partial(Budget, 8, 2, 3, 5, 1, 2, 4))
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def network():  # the class is the nearest of ten levels of brightness, 25/255 apart\n"
        "    levels = (25 * torch.arange(10) + 15) / 255\n"
        "    linear = nn.Linear(3072, 10)\n"
        "    linear.weight.data = 100 * 2 * levels[:, None].repeat(1, 3072) / 3072\n"
        "    linear.bias.data = -100 * levels**2\n"
        "    return nn.Sequential(nn.Flatten(), linear)\n\n"
        "def rounded():\n"
        "    class Rounded(nn.Module):\n"
        "        def __init__(self):\n"
        "            super().__init__()\n"
        "            self.net = network()\n"
        "        def forward(self, x):\n"
        "            return self.net((x * 31).round() / 31)\n"
        "    return Rounded()\n"
    )
    return f"{file}:network"


def exit_status(*arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(a) for a in (*arguments, "--device", "cpu")])
    return stopped.value.code


def test_the_command_line_audits_any_network_and_writes_all_of_it(made, tmp_path, tiny_data, capsys):
    out = tmp_path / "out"
    arguments = ["--data", tiny_data, "--limit", "12", "--eps", "16/255", "--device", "cpu"]
    command.main([made, *arguments, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "not enough data" in printed
    assert "Not enough data (1, 2, " in printed
    record = json.loads((out / "audit.json").read_text())
    assert [row["number"] for row in record["checks"]] == list(range(1, 13))
    stored = load_file(out / "audit.safetensors")
    x, y = data.load("test", tiny_data)
    x = data.to_float(x[:12])
    broken = records.unpacked(record["worst case"]["wrong"], 12)
    model, _, _ = networks.load(made)
    assert torch.equal(model(stored["images"]).argmax(1) != y[:12], broken)
    assert (stored["images"] - x).abs().max() <= 16 / 255 + 1e-6
    assert broken.any()
    for name, entry in record["attacks"].items():
        if name not in (*attacks.LARGER_EPS, attacks.AT_LARGEST):
            assert not (records.unpacked(entry["wrong"], 12) & ~broken).any(), name
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "audit.md").read_text()
    for row in record["checks"]:
        assert f"| {row['number']} | {row['name']} | {row['figure']} | **{row['verdict']}** |" in page


def test_a_fail_is_an_exit_with_1(made, tmp_path, tiny_data):
    masked = made.replace(":network", ":rounded")
    assert exit_status(masked, "--data", tiny_data, "--out", tmp_path / "out") == 1
    rows = json.loads((tmp_path / "out" / "audit.json").read_text())["checks"]
    assert 9 in {row["number"] for row in rows if row["verdict"] == FAIL}


def test_a_figure_beyond_its_tolerance_on_few_images_is_an_exit_with_3(made, tmp_path, tiny_data, capsys):
    file = tmp_path / "open.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Open(nn.Module):  # a gate that is saturated, but hides nothing\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        levels = (25 * torch.arange(10) + 15) / 255\n"
        "        linear = nn.Linear(3072, 10)\n"
        "        linear.weight.data = 200 * levels[:, None].repeat(1, 3072) / 3072\n"
        "        linear.bias.data = -100 * levels**2\n"
        "        self.net = nn.Sequential(nn.Flatten(), linear)\n"
        "    def forward(self, x):\n"
        "        return self.net(x) * torch.sigmoid(40 + x.mean((1, 2, 3)))[:, None]\n\n"
        "def network():\n    return Open()\n"
    )
    options = ["--data", tiny_data, "--limit", "20", "--eps", "16/255", "--out", tmp_path / "out"]
    assert exit_status(f"{file}:network", *options) == 3
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert SUSPECT in {row["verdict"] for row in record["checks"]}
    printed = capsys.readouterr().out
    assert "Suspect (11)" in printed
    assert "Exit status: 3" in printed


def test_a_surrogate_may_be_made_of_the_audited_network(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(run, "Budget", partial(Budget, 8, 2, 3, 5, 1, 2, 4))
    file = tmp_path / "theirs.py"
    file.write_text(
        "import copy\n\n"
        "from examples.paper.maskers.networks import ClassGate, plain\n\n"
        "def network():\n    return ClassGate(plain())\n\n"
        "def smooth(network, seen=[]):\n"
        "    assert isinstance(network, ClassGate)\n"
        "    network.mixed = True  # a copy: the audited one stays\n"
        "    return network\n"
    )
    out = tmp_path / "out"
    status = exit_status(
        f"{file}:network", "--surrogate", f"{file}:smooth", "--data", "sample", "--limit", "60", "--out", out
    )
    assert status in (1, 3)
    record = json.loads((out / "audit.json").read_text())
    for name in ("PGD through smooth", "PGD through smooth, CW", "transfer from smooth"):
        assert name in record["attacks"]
    rows = {row["number"]: row for row in record["checks"]}
    assert "PGD through smooth, CW" in rows[10]["figure"]
    assert "the network jumps where attacks go" in rows[12]["meaning"]


def test_a_killed_audit_goes_on_to_the_same_result(made, tmp_path, tiny_data, monkeypatch):
    arguments = [made, "--surrogate", made.replace(":network", ":rounded"), "--data", tiny_data]
    arguments += ["--limit", "10", "--device", "cpu"]
    command.main([*arguments, "--out", str(tmp_path / "whole")])
    done = []
    noise = attacks._noise

    def killed(*arguments):
        done.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "_noise", killed)
    with pytest.raises(SystemExit, match="130"):
        command.main([*arguments, "--out", str(tmp_path / "killed")])
    assert not (tmp_path / "killed" / "audit.json").exists()
    monkeypatch.setattr(attacks, "_noise", noise)
    monkeypatch.setattr(attacks, "_plain", killed)  # is not asked for again
    command.main([*arguments, "--out", str(tmp_path / "killed")])
    assert len(done) == 1
    whole, again = (json.loads((tmp_path / n / "audit.json").read_text()) for n in ("whole", "killed"))
    for key in ("attacks", "worst case", "checks", "evidence"):
        assert whole[key] == again[key], key


def test_the_evidence_of_another_audit_is_not_overwritten(made, tmp_path, tiny_data, capsys):
    arguments = ["--data", tiny_data, "--limit", "10", "--device", "cpu"]
    out = tmp_path / "out"
    command.main([made, *arguments, "--out", str(out)])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    found = {}
    for name, more in (("eps", ["--eps", "16/255"]), ("seed", ["--seed", "1"])):
        assert exit_status(made, *more, *arguments[:4], "--out", out) == 2
        assert "holds another audit" in capsys.readouterr().err
        command.main([made, *more, *arguments, "--out", str(tmp_path / name)])
        found[name] = json.loads((tmp_path / name / "audit.json").read_text())
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    first = json.loads(before["audit.json"])
    assert first["attacks"]["PGD"] != found["eps"]["attacks"]["PGD"]
    assert first["numbers"]["loss curve"] != found["seed"]["numbers"]["loss curve"]


def test_new_weights_behind_the_same_file_are_another_audit(tmp_path, tiny_data):
    file = tmp_path / "theirs.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def network():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
        f"    net.load_state_dict(torch.load({str(tmp_path / 'w.pt')!r}))\n"
        "    return net\n"
    )

    def curve(seed):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).state_dict(), tmp_path / "w.pt")
        x, y = (t[:8] for t in data.load("test", tiny_data))
        model, _, _ = networks.load(f"{file}:network")
        return audit(model, data.to_float(x), y, out=tmp_path / "out", budget=TINY)["numbers"]["loss curve"]

    assert curve(0) == curve(0)
    with pytest.raises(ValueError, match="holds another audit"):
        curve(1)


SURROGATES = {  # by function: what is wrong with it
    "same": "answers like the audited network and has its gradients: it changes nothing",
    "two": "needs 2 arguments; such a function takes none, or one: the audited network",
    "classes": "tells 20 classes apart, the audited network 10",
    "nothing": "must return a network, not NoneType",
    "raises": "raised KeyError",
}


def test_a_surrogate_finds_the_classes_of_its_own_file_and_what_cannot_be_one_is_refused(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "Budget", partial(Budget, 2, 1, 1, 2, 1, 1, 4))
    file = tmp_path / "both.py"
    file.write_text(
        "import threading\n\nfrom torch import nn\n\n"
        "class Gate(nn.Module):\n"
        "    temperature = 0.01\n"
        "    def forward(self, x):\n"
        "        return x * (x / self.temperature).sigmoid()\n\n"
        "def network():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), Gate(), nn.Linear(8, 10))\n\n"
        "def locked():\n"
        "    net = network()\n"
        "    net.lock = threading.Lock()\n"
        "    return net\n\n"
        "def soft(network):\n"
        "    for module in network.modules():\n"
        "        if isinstance(module, Gate):\n"
        "            module.temperature = 100.0\n"
        "    return network\n\n"
        "def same(network):\n    return network\n\n"
        "def two(a, b):\n    return a\n\n"
        "def classes(network):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 20))\n\n"
        "def nothing(network):\n    pass\n\n"
        "def raises(network):\n    return {}[0]\n"
    )
    torch.manual_seed(0)
    options = ["--data", "sample", "--limit", "6", "--out", tmp_path / "out"]
    for function, message in SURROGATES.items():
        assert exit_status(f"{file}:network", "--surrogate", f"{file}:{function}", *options) == 2
        assert message in capsys.readouterr().err
    assert exit_status(f"{file}:locked", "--surrogate", f"{file}:soft", *options) == 2
    assert "which cannot be copied" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model, _, _ = networks.load(f"{file}:network")
    surrogate, _, _ = networks.load(f"{file}:soft", audited=model)
    assert (model[2].temperature, surrogate[2].temperature) == (0.01, 100.0)
    assert exit_status(f"{file}", *options) == 2
    assert f"name its function, {file}:FUNCTION" in capsys.readouterr().err


def test_what_cannot_work_is_one_line_and_exits_with_2(made, tmp_path, tiny_data, capsys, monkeypatch):
    file = made.partition(":")[0]
    (tmp_path / "wide.py").write_text("from torch import nn\n\ndef f():\n    return nn.Flatten(2)\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "cut.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Cut(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.detach()).detach()\n\n"
        "def f():\n"
        "    return Cut(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    cases = {
        (str(tmp_path / "no.pt"),): "there is no",
        (f"{file}:nothing",): "no function 'nothing'",
        (f"{tmp_path / 'wide.py'}:f",): r"must return logits",
        (f"{tmp_path / 'ends.py'}:f",): "raised SystemExit",
        (f"{tmp_path / 'cut.py'}:f",): "do not depend on the images by autograd",
        (made, "--device", "nowhere"): "--device nowhere",
        (made, "--data", str(tmp_path / "empty")): "must hold one folder",
        (made, "--dataset", "svhn"): "our sample is of cifar10",
        (made, "--surrogate", made, made): "two surrogates have one name",
        (made, "--out", file): "",
    }
    for arguments, message in cases.items():
        more = [] if "--device" in arguments else ["--device", "cpu"]
        with pytest.raises(SystemExit) as stopped:
            command.main([*arguments, *more])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2, arguments
        assert printed.startswith("error: "), arguments
        assert message in printed, arguments
        assert len(printed.strip().splitlines()) == 1, printed
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert exit_status(made, "--data", tiny_data) == 2
    assert "pip install -e '.[paper]'" in capsys.readouterr().err


def test_a_seed_that_torch_cannot_take_is_refused_before_the_attacks(made, capsys):
    with pytest.raises(SystemExit):
        command.main([made, "--seed", str(2**64)])
    assert "must be a whole number of 64 bits" in capsys.readouterr().err


def test_the_network_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = Small(Sparta).requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    audited(model, tmp_path, 6, TINY)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
