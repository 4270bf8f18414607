import json
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from examples.paper.audit import attacks, command, run
from examples.paper.audit.budget import Budget
from examples.paper.audit.run import audit
from examples.paper.audit.verdicts import FAIL, NO_GATE, PASS, UNKNOWN
from examples.paper.common import data, records
from examples.paper.evaluation import networks
from sparta_act import Sparta
from tests.helpers import networks_to_audit

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
def shared(tmp_path_factory):
    """A folder that all processes of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def small(shared):
    """A plain network, trained by the first process that needs it."""
    with FileLock(shared / "small.lock"):
        if not (shared / "small.pt").exists():
            torch.save(networks_to_audit.trained().state_dict(), shared / "small.pt")
    model = networks_to_audit.Small()
    model.load_state_dict(torch.load(shared / "small.pt"))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def honest(small, shared):
    """Its audit: the record, and the checks by their numbers; a second process finds the attacks done."""
    with FileLock(shared / "honest.lock"):
        surrogate = networks_to_audit.trained(Sparta, seed=1, epochs=1)
        return audited(small, shared / "honest", budget=ENOUGH, sparta=surrogate)


@pytest.mark.slow
def test_a_plain_adversarially_trained_network_passes(honest):
    record, rows = honest
    assert {n: row["verdict"] for n, row in rows.items()} == dict.fromkeys(range(1, 11), PASS) | {11: NO_GATE}
    worst, plain = record["worst case"]["error"], record["attacks"][attacks.PLAIN]["error"]
    assert 0.7 < plain <= worst < min(1, plain + 0.05)
    assert record["evidence"]["images"] == record["evidence"]["wrong again"] == round(500 * worst)
    assert record["evidence"]["within eps"]


@pytest.mark.slow
def test_a_hard_gate_fails_as_a_hard_mask(tmp_path):
    torch.manual_seed(0)
    soft = networks_to_audit.Small(Sparta)
    _, rows = audited(networks_to_audit.hardened(soft), tmp_path, 100, TINY)
    assert rows[11]["verdict"] == FAIL
    assert rows[11]["meaning"].startswith("hard mask at body.3")
    _, rows = audited(soft, tmp_path / "soft", 100, TINY)
    assert rows[11]["verdict"] == PASS


@pytest.mark.slow
def test_loud_logits_fail_for_cross_entropys_vanished_gradient(small, honest, tmp_path):
    record, rows = audited(networks_to_audit.LoudLogits(small), tmp_path)
    assert {8, 9, 10} <= failing(rows)
    assert failing(rows).isdisjoint({1, 5, 6, 7, 11})
    assert "there is no gradient to follow" in rows[9]["meaning"]
    assert "cross-entropy differ" in rows[8]["meaning"]
    assert "the gradient of float64 is better" in rows[10]["meaning"]
    assert record["attacks"]["PGD, CW"]["error"] > record["attacks"]["PGD"]["error"] + 0.05
    assert record["worst case"]["error"] == pytest.approx(honest[0]["worst case"]["error"], abs=0.01)


@pytest.mark.slow
def test_rounded_images_fail_for_a_gradient_that_is_zero(small, tmp_path):
    record, rows = audited(networks_to_audit.Rounding(small), tmp_path, 150)
    assert {2, 4, 5, 9} <= failing(rows)
    assert rows[2]["meaning"] == "PGD cannot raise the loss"
    assert "without the gradient: it is masked" in rows[5]["meaning"]
    zero = record["numbers"]["zero gradients"]
    assert zero["without"] == zero["images"] > 30
    # no step moves, but the random start alone tips an image or two to another level
    assert abs(record["attacks"]["PGD"]["error"] - record["attacks"]["clean"]["error"]) < 0.01
    assert record["worst case"]["error"] > record["attacks"]["PGD"]["error"] + 0.03


@pytest.mark.slow
def test_random_resizing_fails_as_randomized(small, tmp_path):
    record, rows = audited(networks_to_audit.RandomResize(small), tmp_path, 150)
    assert 9 in failing(rows)
    assert "randomized" in rows[9]["figure"]
    assert "the network changes its answers" in rows[9]["meaning"]
    assert record["evidence"]["wrong again"] < record["evidence"]["images"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masked", "number", "meaning"),
    [
        (partial(networks_to_audit.Backdoor, hidden=True), 9, "autograd's gradient is not the derivative"),
        (
            partial(networks_to_audit.Backdoor, hidden=False),
            8,
            "AutoAttack without Square and plain cross-entropy differ",
        ),
        (networks_to_audit.NoNumber, 9, "there is no gradient to follow"),
        (networks_to_audit.Memory, 9, "the network changes its answers"),
    ],
)
def test_masking_that_passed_an_earlier_audit_fails(small, tmp_path, masked, number, meaning):
    budget = Budget(10, 2, 5, 50, 4, 5, 50)
    _, rows = audited(masked(small).eval(), tmp_path, 150, budget)
    assert rows[number]["verdict"] == FAIL
    assert meaning in rows[number]["meaning"]


class Softmax(networks_to_audit.LoudLogits):
    def forward(self, x):
        return self.model(x).softmax(1)


class Optimising(networks_to_audit.LoudLogits):
    """Purifies its images by gradient descent when asked."""

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.model(z).logsumexp(1).sum(), z)
        return self.model(x - 0 * grad)


@pytest.mark.parametrize(
    ("wrapped", "warning"), [(Softmax, "probability distribution"), (Optimising, "dynamic defense")]
)
def test_autoattacks_other_flags_fail(wrapped, warning, tmp_path):
    torch.manual_seed(3)
    _, rows = audited(wrapped(networks_to_audit.Small()), tmp_path, 10, TINY)
    assert rows[9]["verdict"] == FAIL
    assert warning in rows[9]["figure"]
    _, rows = audited(networks_to_audit.Small(), tmp_path / "plain", 10, TINY)
    assert rows[9]["verdict"] == UNKNOWN
    assert rows[9]["figure"].startswith("no warning")


class Half(networks_to_audit.LoudLogits):
    """Computes in bfloat16 and answers in it."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class OnlyFloat32(networks_to_audit.LoudLogits):
    def forward(self, x):
        return self.model(x.float())


class FiveClasses(networks_to_audit.LoudLogits):
    def forward(self, x):
        return self.model(x)[:, :5]


class Unused(networks_to_audit.LoudLogits):
    """Has a SPARTA whose result nobody reads, and another one twice."""

    def __init__(self, model):
        super().__init__(model)
        self.idle, self.gate = Sparta(3), Sparta(3)

    def forward(self, x):
        self.idle(x)
        return self.model(self.gate(self.gate(x)))


@pytest.mark.parametrize("wrapped", [Half, OnlyFloat32, FiveClasses, Unused])
def test_a_strange_but_honest_network_is_audited_to_the_end(wrapped, tmp_path):
    torch.manual_seed(3)
    x = data.load("test")[0][:10]
    model = wrapped(networks_to_audit.Small()).eval()
    x = data.to_float(x)
    with torch.no_grad():
        y = model(x).argmax(1)
    record = audit(model, x, y, out=tmp_path, budget=TINY)
    rows = {row["number"]: row for row in record["checks"]}
    assert rows[9]["verdict"] == UNKNOWN or wrapped is Half
    if wrapped is OnlyFloat32:
        assert "float64 not possible" in rows[10]["figure"]
        assert "derivative not possible" in rows[9]["figure"]
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
    assert "No check fails, but" in printed
    assert "checks do not have enough data" in printed
    record = json.loads((out / "audit.json").read_text())
    assert [row["number"] for row in record["checks"]] == list(range(1, 12))
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


def test_another_network_or_eps_is_audited_anew(made, tmp_path, tiny_data):
    arguments = ["--data", tiny_data, "--limit", "10", "--device", "cpu", "--out", str(tmp_path / "out")]
    records = []
    for more in ([made], [made, "--eps", "16/255"], [made, "--seed", "1"]):
        command.main([*more, *arguments])
        records.append(json.loads((tmp_path / "out" / "audit.json").read_text()))
    assert records[0]["attacks"]["PGD"] != records[1]["attacks"]["PGD"]
    assert records[0]["numbers"]["loss curve"] != records[2]["numbers"]["loss curve"]


def test_new_weights_behind_the_same_file_are_audited_anew(tmp_path, tiny_data):
    file = tmp_path / "theirs.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def network():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
        f"    net.load_state_dict(torch.load({str(tmp_path / 'w.pt')!r}))\n"
        "    return net\n"
    )
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).state_dict(), tmp_path / "w.pt")
        x, y = (t[:8] for t in data.load("test", tiny_data))
        model, _, _ = networks.load(f"{file}:network")
        record = audit(model, data.to_float(x), y, out=tmp_path / "out", budget=TINY)
        found.append(record["numbers"]["loss curve"])
    assert found[0] == found[1] != found[2]


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


def test_the_network_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = networks_to_audit.Small(Sparta).requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    audited(model, tmp_path, 6, TINY)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_random_numbers_do_not_depend_on_what_was_drawn_before(tmp_path):
    torch.manual_seed(0)
    model, found = networks_to_audit.Small(), []
    for k in range(2):
        torch.manual_seed(10 + k)
        np.random.seed(k)  # noqa: NPY002
        record, _ = audited(model, tmp_path / str(k), 8, Budget(2, 2, 2, 5, 1, 1, 4))
        found.append(record["attacks"])
    assert found[0] == found[1]


def test_a_network_without_a_row_of_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must return logits"):
        audited(nn.Flatten(2), tmp_path)
