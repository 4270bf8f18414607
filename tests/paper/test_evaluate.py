import json
import shutil
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.paper.attacks import losses
from examples.paper.attacks.pgd import attacking
from examples.paper.common import data, records
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import evaluate, measure, networks, store
from examples.paper.evaluation.command import chosen, main, parser
from examples.paper.evaluation.evaluate import evaluations
from examples.paper.evaluation.measure import Attack, Outcome, carry_out, joined, worst_case
from examples.paper.evaluation.protocols import PROTOCOLS, every_step_attacks
from examples.paper.training.checkpoint import load_trained
from examples.paper.training.command import main as train
from tests.helpers.queues import QUICK


class Brightness(nn.Module):
    """Class 1 for images brighter than a half, class 0 for darker ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        bright = self.scale * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright], 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The protocol `quick` with fewer steps still."""
    monkeypatch.setitem(PROTOCOLS, "quick", QUICK)


def test_errors_are_those_of_a_model_we_know(monkeypatch):
    monkeypatch.setattr(measure, "BATCH", 3)
    levels = torch.tensor([20, 120, 135, 240], dtype=torch.uint8)  # of 255; the middle two are within 16/255
    x, y = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.tensor([0, 0, 1, 0])
    pgd = {"eps": 16 / 255, "step_size": 4 / 255, "steps": 10}
    for attack, wrong in ((Attack("clean", {}, 4), [0, 0, 0, 1]), (Attack("PGD", pgd, 4), [0, 1, 1, 1])):
        found = carry_out([attack], Brightness(), x, y, seed=0, device="cpu", title="")
        assert found[attack.name].wrong.int().tolist() == wrong


def test_the_attacks_of_a_protocol():
    """What is stored already was measured with exactly these names and arguments, in this order."""
    paper = {"targeted": True, "eps": 16 / 255, "step_size": 1 / 255}
    field = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 50}
    expected = {
        "clean": {},
        **{f"targeted PGD-{k}, 16/255": {**paper, "steps": k} for k in (10, 30, 50)},
        "untargeted PGD-50, 8/255": {**field, "loss": "cross-entropy"},
        "targeted DLR PGD-50, 8/255": {**field, "loss": "targeted DLR"},
        "AutoAttack, 8/255": {"eps": 8 / 255},
    }
    for name, autoattack in (("field", None), ("ship", 1000)):
        attacks = PROTOCOLS[name].attacks()
        arguments = {a.name: json.dumps(dict(a.arguments)) for a in attacks}
        known = {k: json.dumps(v) for k, v in expected.items() if autoattack or k != "AutoAttack, 8/255"}
        assert list(arguments.items()) == list(known.items())
        images = {a.name: a.images for a in attacks}
        assert images.pop("clean") >= 26_032
        assert images.pop("AutoAttack, 8/255", None) == autoattack
        assert {*images.values()} == {2000}


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("", {2000}),
        ("--limit 70", {70}),
        ("--autoattack 30", {2000, 30}),
        ("--protocol ship --limit 500", {500}),
        ("--protocol ship --autoattack 0", {2000}),
    ],
)
def test_options_of_a_protocol(options, counts):
    attacks = chosen(parser().parse_args(["checkpoint.pt", *options.split()])).attacks()
    assert {a.images for a in attacks if a.name != "clean"} == counts
    asked = "30" in options.split() or options == "--protocol ship --limit 500"
    assert any(a.name == "AutoAttack, 8/255" for a in attacks) == asked


def test_the_key_of_an_outcome_stays_the_same():
    """Else what earlier evaluations stored would be measured again."""
    x, y = torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2), torch.tensor([4, 5, 6])
    digest = records.sha256(bytes(range(4, 12)), y[1:].numpy().tobytes())
    known = f'["n rounded", "{digest}", 3, "PGD", {{"eps": 0.5, "steps": 2}}]'
    assert store.key(Attack("PGD", {"eps": 0.5, "steps": 2}, 2, 1), "n", x, y, 3) == known


def by_hand(model, x, y, loss, targets, steps):
    """Every image right when clean through all steps towards each target, all of them judged at each."""
    eps, step, wrong = 8 / 255, 2 / 255, model(x).argmax(1) != y
    for target in targets:
        (left,) = torch.where(~wrong)
        images, goals = x[left], (y[left],) if target is None else (y[left], target[left])
        x_adv = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(images - eps, images + eps)
        for taken in range(steps + 1):
            x_adv = x_adv.clamp(0, 1).detach().requires_grad_()
            logits = model(x_adv)
            wrong[left] |= logits.argmax(1) != y[left]
            if taken < steps:
                (grad,) = torch.autograd.grad(loss(logits, *goals).sum(), x_adv)
                x_adv = (x_adv + step * grad.sign()).clamp(images - eps, images + eps)
    return wrong


@pytest.mark.parametrize("steps", [1, 4])
def test_the_field_protocol_is_the_plain_loop(steps, monkeypatch):
    monkeypatch.setattr(measure, "BATCH", 7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 6)).eval()
    x = torch.randint(256, (90, 3, 6, 6), dtype=torch.uint8)
    images = data.to_float(x, "cpu")
    y = model(images).argmax(1)
    y[:9] = (y[:9] + 1) % 6  # some wrong from the start
    logits = model(images).detach()
    logits[torch.arange(90), y] = -torch.inf
    likeliest = logits.sort(1, descending=True).indices[:, :3].unbind(1)
    loops = ((losses.cross_entropy, [None]), (losses.dlr_to, likeliest))
    for (name, arguments), (loss, targets) in zip(every_step_attacks(steps).items(), loops, strict=True):
        attack = Attack(name, arguments, 90)
        found = carry_out([attack], model, x, y, seed=3, device="cpu", title="")[name].wrong
        torch.manual_seed(zlib.crc32(f"3 {attack.family}".encode()))
        with attacking(model):
            expected = by_hand(model, images, y, loss, targets, steps)
        assert torch.equal(found, expected)
        assert expected[:9].all()
        assert 9 < expected.sum() < 90


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nowhere\.pt"):
        main([str(tmp_path / "nowhere.pt")])


def test_the_worst_case_is_any_attack_on_the_images_that_all_had():
    wrong = [1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 0, 1, 0]
    found = worst_case([Outcome(torch.tensor(w).bool(), 3.0, []) for w in wrong])
    assert found.wrong.int().tolist() == [1, 1, 1, 0]
    cases = PROTOCOLS["ship"].worst_cases()
    eights = ["clean", "untargeted PGD-50, 8/255", "targeted DLR PGD-50, 8/255"]
    assert cases == {
        "worst case, 8/255": eights,
        "worst case with AutoAttack, 8/255": [*eights, "AutoAttack, 8/255"],
    }
    assert PROTOCOLS["field"].worst_cases() == {"worst case, 8/255": eights}


def test_an_attack_draws_its_own_numbers():
    torch.manual_seed(1)
    x, y = torch.randint(110, 146, (40, 3, 4, 4), dtype=torch.uint8), torch.arange(40) % 2
    model, attack = Brightness(), Attack("one step", {"eps": 0.05, "step_size": 0.01, "steps": 1}, 30)
    outcomes = []
    for other in (3, 4):
        torch.manual_seed(other)
        outcomes.append(carry_out([attack], model, x, y, seed=0, device="cpu", title="")["one step"])
    assert len(outcomes[0].wrong) == 30
    assert torch.equal(outcomes[0].wrong, outcomes[1].wrong)


class Counting(Brightness):
    """Counts the images whose gradient is asked for."""

    attacked = 0

    def forward(self, x):
        self.attacked += len(x) if x.requires_grad else 0
        return super().forward(x)


def test_attacks_that_differ_in_their_steps_are_one_run_and_what_each_would_be_alone():
    torch.manual_seed(1)
    x, y = torch.randint(100, 156, (40, 3, 4, 4), dtype=torch.uint8), torch.arange(40) % 2
    weak = {"eps": 0.05, "step_size": 0.002, "targeted": True}
    attacks = [Attack(f"targeted PGD-{k}, ours", {**weak, "steps": k}, 40) for k in (3, 9)]
    together, model = {}, Counting()
    together = carry_out(attacks, model, x, y, seed=0, device="cpu", title="")
    assert model.attacked == 9 * 40
    for attack in attacks:
        alone = carry_out([attack], Brightness(), x, y, seed=0, device="cpu", title="")
        assert torch.equal(alone[attack.name].wrong, together[attack.name].wrong)
    few, many = (together[a.name].wrong.sum() for a in attacks)
    assert 0 < few < many


@pytest.mark.parametrize("count", [0, 1, 8, 13])
def test_which_images_are_wrong_comes_back_from_text(count):
    wrong = torch.rand(count) < 0.5
    assert torch.equal(records.unpacked(records.packed(wrong), count), wrong)
    with pytest.raises(ValueError, match="bytes for"):
        records.unpacked(records.packed(wrong), count + 8)


def test_exact_float32_restores_the_settings():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    try:
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[0], tuned
        torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def few(monkeypatch):
    """AutoAttack in few steps."""
    short = partial(measure.autoattack_by_copy, steps=5, queries=50)
    monkeypatch.setattr(measure, "autoattack_by_copy", short)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_data):
    """A network that knows a little: brightness is the class, and easy."""
    out = tmp_path_factory.mktemp("run")
    run = ["--out", out, "--activation", "relu", "--recipe", "fast", "--epochs", 4, "--data", tiny_data]
    train([str(a) for a in (*run, "--batch-size", 20, "--width", 8, "--device", "cpu")])
    return out / "checkpoint.pt"


def words(path, tiny_data, *more):
    return [str(a) for a in (path, "--protocol", "quick", "--data", tiny_data, "--device", "cpu", *more)]


def started(words):
    args = parser().parse_args(words)
    options = {"data_dir": args.data_dir, "seed": args.seed, "device": args.device}
    return evaluations(args.network, chosen(args), **options)


def evaluated(path, tiny_data, *more):
    main(words(path, tiny_data, *more))
    return json.loads((path.parent / "evaluation.json").read_text())


def test_limits_are_kept_and_the_record_says_what_it_is_of(checkpoint, tiny_data, monkeypatch):
    monkeypatch.chdir(checkpoint.parents[1])
    record = evaluated(checkpoint, tiny_data, "--limit", 12, "--seed", 3)
    assert {name: e["images"] for name, e in record["errors"].items()} == {
        "clean": 20,
        "targeted PGD-2, 16/255": 12,
        "untargeted PGD-2, 8/255": 12,
        "targeted DLR PGD-2, 8/255": 12,
        "worst case, 8/255": 12,
    }
    for entry in record["errors"].values():
        assert entry["low"] <= entry["error"] <= entry["high"]
        assert entry["seconds"] >= 0
        wrong = records.unpacked(entry["wrong"], entry["images"])
        assert wrong.sum().item() / len(wrong) == entry["error"]
    assert record["sha256"] == records.sha256(checkpoint.read_bytes())
    assert record["network"] == checkpoint.parent.name
    assert record["command"] == (
        f"python -m examples.paper evaluate {checkpoint.parent.name}/checkpoint.pt --protocol quick "
        f"--data DATA/{Path(tiny_data).name} --seed 3 --device cpu --limit 12"
    )
    records.check_seal(record)


def test_all_clean_images_are_asked_and_the_first_are_attacked(checkpoint, tiny_data, capsys, monkeypatch):
    monkeypatch.setattr(measure, "PART", 5)
    errors = evaluated(checkpoint, tiny_data, "--limit", 7)["errors"]
    clean, _, pgd, dlr, worst = (records.unpacked(e["wrong"], e["images"])[:7] for e in errors.values())
    assert torch.equal(worst, clean | pgd | dlr)
    assert not (clean & ~pgd).any()
    assert not (clean & ~dlr).any()
    capsys.readouterr()
    again = evaluated(checkpoint, tiny_data, "--limit", 7)
    assert again["errors"] == errors
    assert capsys.readouterr().out.count("was measured before") == 4
    more = evaluated(checkpoint, tiny_data, "--limit", 12)["errors"]  # the first five are there
    assert capsys.readouterr().out.count("5 images were measured before") == 2
    assert more["clean"] == errors["clean"]


@pytest.mark.usefixtures("few")
def test_a_second_call_does_only_what_is_missing(checkpoint, tiny_data, capsys):
    once = evaluated(checkpoint, tiny_data, "--limit", 10)
    capsys.readouterr()
    again = evaluated(checkpoint, tiny_data, "--limit", 10, "--autoattack", 2)
    assert capsys.readouterr().out.count("was measured before") == 4
    assert again["errors"] | once["errors"] == again["errors"]
    assert again["errors"].keys() - once["errors"].keys() == {
        "AutoAttack, 8/255",
        "worst case with AutoAttack, 8/255",
    }
    evaluated(checkpoint, tiny_data, "--limit", 10, "--seed", 1)
    assert "was measured before" not in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_more_images_for_the_others_do_not_repeat_autoattack(checkpoint, tiny_data, capsys):
    few = evaluated(checkpoint, tiny_data, "--limit", 7, "--autoattack", 3)["errors"]
    capsys.readouterr()
    more = evaluated(checkpoint, tiny_data, "--limit", 9, "--autoattack", 3)["errors"]
    assert capsys.readouterr().out.count("was measured before") == 2  # and the clean images
    assert more["AutoAttack, 8/255"] == few["AutoAttack, 8/255"]
    assert {n: e["images"] for n, e in more.items() if e["images"] != 9} == {
        "clean": 20,
        "AutoAttack, 8/255": 3,
        "worst case with AutoAttack, 8/255": 3,
    }


def test_what_is_evaluated_is_what_a_set_would_store(tmp_path, tiny_data, monkeypatch):
    run = ["--out", tmp_path, "--activation", "sparta", "--recipe", "fast", "--epochs", 1, "--limit", 20]
    train([str(a) for a in (*run, "--data", tiny_data, "--width", 8, "--device", "cpu")])
    attacked = []

    def watched(attacks, model, *arguments, **more):
        attacked.append({k: v.clone() for k, v in model.state_dict().items()})
        return carry_out(attacks, model, *arguments, **more)

    monkeypatch.setattr(evaluate, "carry_out", watched)
    evaluated(tmp_path / "checkpoint.pt", tiny_data, "--limit", 4)
    trained = load_trained(tmp_path / "checkpoint.pt")[0].state_dict()
    assert attacked
    for state in attacked:
        for key, value in state.items():
            gate = ".act2." in key
            assert torch.equal(value, trained[key].half().float() if gate else trained[key]), key
    assert any(".act2." in k and not torch.equal(v, v.half().float()) for k, v in trained.items())


NETWORKS = """
import torch
from torch import nn

def made(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

def one():
    return made(1)

def two():
    return made(2)

def none():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
"""


def test_files_of_weights_and_functions_are_evaluated_into_a_folder(checkpoint, tiny_data, tmp_path, capsys):
    weights, file, out = tmp_path / "slim.safetensors", tmp_path / "nets.py", tmp_path / "out"
    networks.save(checkpoint, weights)
    file.write_text(NETWORKS)
    places = (str(weights), f"{file}:one", f"{file}:two")
    more = ["--limit", "5", "--out", str(out), "--data", tiny_data, "--device", "cpu", "--protocol", "quick"]
    main([*places, *more])
    slim, one, two = (json.loads((out / n / "evaluation.json").read_text()) for n in ("slim", "one", "two"))
    assert slim["sha256"] == records.sha256(weights.read_bytes())  # what is measured already is stored so
    assert "evaluate slim.safetensors --protocol quick " in slim["command"]
    assert "evaluate nets.py:two --protocol quick " in two["command"]
    assert one["sha256"] != two["sha256"]
    assert one["errors"]["clean"]["wrong"] != two["errors"]["clean"]["wrong"]
    assert not list(tmp_path.glob("*.npz"))
    assert "±" in capsys.readouterr().out
    main([*places, *more])
    assert capsys.readouterr().out.count("was measured before") == 3 * 4
    with pytest.raises(ValueError, match="tells 3 classes apart"):
        main([places[0], f"{file}:none", *more])


def test_an_interrupted_evaluation_keeps_what_it_has(checkpoint, tiny_data, capsys, monkeypatch):
    def killed(attacks, *arguments, **more):
        if attacks[0].name.startswith("untargeted"):
            raise KeyboardInterrupt
        return carry_out(attacks, *arguments, **more)

    evaluated(checkpoint, tiny_data, "--limit", 10)
    (checkpoint.parent / "evaluation.npz").unlink()
    monkeypatch.setattr(evaluate, "carry_out", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(checkpoint, tiny_data, "--limit", 10)
    assert not (checkpoint.parent / "evaluation.json").exists()  # nor the earlier call's
    monkeypatch.undo()
    capsys.readouterr()
    evaluated(checkpoint, tiny_data, "--limit", 10)
    assert capsys.readouterr().out.count("was measured before") == 2


@pytest.mark.usefixtures("few")
def test_autoattack_is_kept_batch_by_batch(checkpoint, tiny_data, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "PART", 2)
    carried = []

    def watched(attacks, *arguments, **more):
        carried.append((attacks[0].name, attacks[0].start, attacks[0].images))
        return carry_out(attacks, *arguments, **more)

    monkeypatch.setattr(evaluate, "carry_out", watched)
    options = ("--autoattack", 5, "--limit", 5)
    shutil.copy(checkpoint, tmp_path)
    begun = started(words(tmp_path / "checkpoint.pt", tiny_data, *options))
    seconds = [next(begun) for _ in range(10)]  # clean, targeted, three parts of two, AutoAttack's first two
    begun.close()
    assert seconds[8] == 0
    assert seconds[9] > 0
    assert carried[8:] == [("AutoAttack, 8/255", 0, 2)]
    assert not (tmp_path / "evaluation.json").exists()
    carried.clear()
    record = evaluated(tmp_path / "checkpoint.pt", tiny_data, *options)
    assert carried == [("AutoAttack, 8/255", 2, 2), ("AutoAttack, 8/255", 4, 1)]
    printed = capsys.readouterr().out
    assert printed.count("was measured before") == 4
    assert "AutoAttack, 8/255, 2 images were measured before" in printed
    entry = record["errors"]["AutoAttack, 8/255"]
    assert entry["images"] == 5
    assert entry["standing"]["square"] == round(5 * (1 - entry["error"]))
    carried.clear()
    evaluated(tmp_path / "checkpoint.pt", tiny_data, *options, "--limit", 4)
    assert not [c for c in carried if c[0].startswith("Auto")]  # the first four are there


def test_the_next_checkpoint_is_expected_to_take_as_long(checkpoint, tiny_data, tmp_path):
    both = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        both.append(shutil.copy(checkpoint, tmp_path / name))
    arguments = words(both[0], tiny_data, "--limit", 3)
    main(arguments)  # what was measured before is known to the second too
    seconds = list(started([str(both[0]), str(both[1]), *arguments[1:]]))
    assert len(seconds) == 4
    assert all(s > 0 for s in seconds)


def test_a_checkpoint_that_is_written_meanwhile_is_not_taken_for_the_old_one(
    checkpoint, tiny_data, tmp_path, monkeypatch
):
    path = tmp_path / "checkpoint.pt"
    shutil.copy(checkpoint, path)

    def slow(path):
        loaded = load_trained(path)
        path.write_bytes(path.read_bytes() + b"0")
        return loaded

    monkeypatch.setattr(networks, "load_trained", slow)
    with pytest.raises(ValueError, match="written anew just now"):
        evaluated(path, tiny_data, "--limit", 3)
    assert not (tmp_path / "evaluation.npz").exists()


def test_a_kept_part_of_another_length_is_measured_again(checkpoint, tiny_data, tmp_path, capsys):
    shutil.copy(checkpoint, tmp_path)
    record = evaluated(tmp_path / "checkpoint.pt", tiny_data, "--limit", 6)
    file = tmp_path / "evaluation.npz"
    whole = store.read(file)
    store.write(file, {k: Outcome(o.wrong[:5], o.seconds, o.warnings) for k, o in whole.items()})
    capsys.readouterr()
    again = evaluated(tmp_path / "checkpoint.pt", tiny_data, "--limit", 6)
    assert "was measured before" not in capsys.readouterr().out
    assert {k: e["wrong"] for k, e in again["errors"].items()} == {
        k: e["wrong"] for k, e in record["errors"].items()
    }


def test_two_calls_at_once_keep_what_both_measured(tmp_path):
    file, one = tmp_path / "evaluation.npz", Outcome(torch.tensor([True]), 1.0, [])
    store.add(file, {"a": one})
    assert list(store.add(file, {"b": one})) == ["a", "b"]  # what another call wrote meanwhile is kept
    assert list(store.read(file)) == ["a", "b"]


def test_parts_joined_are_the_whole():
    one, two = (
        Outcome(torch.tensor(w), s, [f"{n} points of a kind{more}", "flat"], {"a": n, "b": 1})
        for w, s, n, more in (([True, False], 1.0, 3, ""), ([False], 2.5, 4, " (and 2 more of this kind)"))
    )
    whole = joined([one, two])
    assert whole.wrong.tolist() == [True, False, False]
    assert whole.seconds == 3.5
    assert whole.warnings == ["3 points of a kind", "flat"]
    assert whole.standing == {"a": 7, "b": 2}


def test_another_checkpoint_is_measured_anew(checkpoint, tiny_data, capsys, tmp_path):
    evaluated(checkpoint, tiny_data, "--limit", 20)
    for name in ("checkpoint.pt", "evaluation.npz"):
        shutil.copy(checkpoint.parent / name, tmp_path / name)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["model"]["fc.bias"][3] += 100  # always class 3: every tenth image is right
    torch.save(state, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    record = evaluated(tmp_path / "checkpoint.pt", tiny_data, "--limit", 20)
    assert "was measured before" not in capsys.readouterr().out
    assert record["errors"]["clean"]["error"] == pytest.approx(0.9)
    for content in (b"no archive", b""):
        (tmp_path / "evaluation.npz").write_bytes(content)
        record = evaluated(tmp_path / "checkpoint.pt", tiny_data, "--limit", 20)
        assert record["errors"]["clean"]["error"] == pytest.approx(0.9)


@pytest.mark.usefixtures("few")
def test_the_record_has_what_autoattack_told(checkpoint, tiny_data, capsys):
    record = evaluated(checkpoint, tiny_data, "--limit", 4, "--autoattack", 4)
    entry = record["errors"]["AutoAttack, 8/255"]
    left = list(entry["standing"].values())
    assert list(entry["standing"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert left == sorted(left, reverse=True)
    assert left[0] > 0
    assert left[-1] == round(4 * (1 - entry["error"]))
    printed = capsys.readouterr().out
    assert f"right of 4: {left[0]} after apgd-ce" in printed
    for warning in entry.get("warnings", []):
        assert f"warns: {warning}" in printed
    again = evaluated(checkpoint, tiny_data, "--limit", 4, "--autoattack", 4)
    assert again["errors"] == record["errors"]


def test_what_cannot_work_is_said_before_the_first_attack(
    checkpoint, tiny_data, tmp_path, monkeypatch, capsys
):
    with pytest.raises(ValueError, match="two networks would go into one folder: "):
        main([str(checkpoint), str(checkpoint)])
    with pytest.raises(ValueError, match="cannot use --device nowhere on this machine"):
        evaluated(checkpoint, tiny_data, "--device", "nowhere")
    state = torch.load(checkpoint, weights_only=True)
    state["settings"]["dataset"] = "svhn"
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="of cifar10 and svhn; evaluate one data set"):
        main([str(checkpoint), str(tmp_path / "checkpoint.pt")])
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[paper\]'"):
        evaluated(checkpoint, tiny_data, "--autoattack", 1, "--seed", 5)
    assert capsys.readouterr().err == ""  # no progress bar began
