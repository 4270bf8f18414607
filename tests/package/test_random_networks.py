"""The surgery on random networks of which the generator knows what is right; and the oracle itself."""

import copy

import pytest
import torch

from sparta_act import replace_relus
from sparta_act.errors import SiteError
from tests.helpers.random_calls import EDIT, MAY, REFUSE
from tests.helpers.random_networks import Block, Written, write
from tests.helpers.random_oracle import judge

HAND = """
import torch.nn.functional as F
from torch import nn

from tests.helpers.network_pieces import Spot


class Block(nn.Module):
    def __init__(self, label):
        super().__init__()
        self.label, self.conv, self.act = label, nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        vars(self)["spot"] = Spot(False)

    def forward(self, x):
        STEPS
        return h


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.Sequential(Block("G1.B1"), Block("G1.B2")), nn.Flatten())
"""
PLAIN = "h = self.conv(F.relu(x)) + x; h = F.relu(h)", "h = self.conv(F.relu(x)) + x; h = self.spot(h)"


def hand(steps, twin, truth=EDIT):
    """A network that nobody drew: the text, the text of its twin, and the truth of both of its blocks."""
    blocks = [Block(label, truth, ()) for label in ("G1.B1", "G1.B2")]
    return Written(0, HAND.replace("STEPS", steps), HAND.replace("STEPS", twin), blocks, 2)


BOTH = "h = F.relu(F.relu(x) - self.conv(x) + x)"
LOOP = "for f in [F.relu]: h = f(self.conv(x) + x)", "h = self.spot(self.conv(x) + x)"


@pytest.mark.parametrize(
    ("steps", "twin", "truth", "result"),
    [
        (*PLAIN, EDIT, "right"),
        ("h = self.act(self.conv(x) + x)", "h = self.spot(self.conv(x) + x)", EDIT, "right"),
        (BOTH, "h = self.spot(F.relu(x) - self.conv(x) + x)", EDIT, "right"),
        (BOTH, "h = F.relu(self.spot(x) - self.conv(x) + x)", EDIT, "wrong"),
        (*PLAIN, REFUSE, "wrong"),
        (*LOOP, MAY, "refused"),
        (*LOOP, EDIT, "refused without need"),
    ],
)
def test_the_oracle_knows_right_from_wrong(tmp_path, steps, twin, truth, result):
    verdicts = judge(hand(steps, twin, truth), tmp_path)
    assert [(v.label, v.result) for v in verdicts] == [("G1.B1", result), ("G1.B2", result)]


def test_the_oracle_knows_the_labels(tmp_path):
    written = hand(*PLAIN)
    written.blocks[1:] = [Block("G2.B1", EDIT, ())]
    (verdict,) = judge(written, tmp_path)
    assert verdict.result == "wrong"
    assert "labels ['G1.B1', 'G1.B2'] instead of ['G1.B1', 'G2.B1']" in verdict.why


def test_a_twin_that_is_another_network_is_no_twin(tmp_path):
    with pytest.raises(AssertionError, match="the twin is another network"):
        judge(hand(PLAIN[0], PLAIN[1].replace("+ x", "- x")), tmp_path)


def nothing(net, labels, activations, **more):
    return net


def fails(net, labels, activations, **more):
    raise IndexError("no")


def every_call(net, labels, activations, **more):
    """As a naive surgery: all calls of a block change, not the last one."""
    replace_relus(net, labels, activations, **more)
    for block in net[1]:
        if "sparta" in block._modules:
            block.register_forward_pre_hook(lambda m, x: (m.sparta(x[0]),))


def other_block(net, labels, activations, **more):
    swapped = dict(zip(activations, [*activations.values()][::-1], strict=True))
    return replace_relus(net, labels, swapped, **more)


def refuses_after_a_change(net, labels, activations, **more):
    net[0].weight.data[0, 0] += 1
    raise SiteError("no")


def refuses_in_another_mode(net, labels, activations, **more):
    net[1][0].eval()
    raise SiteError("no")


def draws(net, labels, activations, **more):
    torch.rand(1)
    return replace_relus(net, labels, activations, **more)


def copies(net, labels, activations, **more):
    return replace_relus(copy.deepcopy(net), labels, activations, **more)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (nothing, "not one new parameter for each"),
        (fails, "fails fails: IndexError: no"),
        (every_call, "with ReLU put for ReLU, something else than before"),
        (other_block, "something else than a person's edit gives"),
        (refuses_after_a_change, "a refused edit changes the network"),
        (refuses_in_another_mode, "a refused edit changes the network"),
        (draws, "draws draws random numbers"),
        (copies, "not one new parameter for each"),
    ],
)
def test_a_broken_surgery_is_caught(tmp_path, broken, why):
    verdicts = judge(hand(*PLAIN), tmp_path, broken)
    assert {v.result for v in verdicts} == {"wrong"}
    assert any(why in v.why for v in verdicts)


def test_a_seed_gives_one_network():
    assert write(5) == write(5)
    assert write(5).text != write(6).text


@pytest.mark.slow
def test_random_networks_are_edited_rightly_or_refused(tmp_path):
    verdicts = [(seed, v) for seed in range(20) for v in judge(write(seed), tmp_path)]
    assert not [(seed, v) for seed, v in verdicts if v.result == "wrong"]
    edited = sum(v.result == "right" for _, v in verdicts)
    assert edited > 15, "too few of them are edited: the comparison shows little"
