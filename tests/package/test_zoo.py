"""The judge of the surgery: it finds what is right, what is refused, and what is wrong."""

import pytest
import torch
from torch import nn

from benchmarks import zoo
from benchmarks.catalogue import Network, build, size_of, smallest
from benchmarks.oracle import judge
from sparta_act import replace_relus
from sparta_act.errors import SiteError
from tests.helpers import nets

EXAMPLE = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),)


def naive(model, sites, activation, **_):
    """A naive surgery: every nn.ReLU of the blocks becomes another module."""
    for block in (*model.layer1, *model.layer2):
        for name, module in [*block.named_children()]:
            if isinstance(module, nn.ReLU):
                setattr(block, name, activation(block.conv2.out_channels))
    return model


def test_the_judge_sees_what_is_wrong():
    assert judge(nets.Net(nets.OneModule), EXAMPLE).result == "right"
    verdict = judge(nets.Net(nets.OneModule), EXAMPLE, replace=naive)
    assert verdict.result == "wrong"
    assert "G*.B*: another output than with calls [2, 4, 6, 8] replaced" in verdict.why


def test_the_judge_sees_what_all_leaves():
    def without_stem(model, sites, activation, **more):
        return replace_relus(model, "G*.B*" if sites == "all" else sites, activation, **more)

    assert judge(nets.Net(nets.OneModule), EXAMPLE).every == "9"
    verdict = judge(nets.Net(nets.OneModule), EXAMPLE, replace=without_stem)
    assert (verdict.result, verdict.why) == ("wrong", "all: 5 calls stay, such as that in stem.2")


def test_the_judge_sees_what_is_not_restored():
    def half(model, *arguments, **more):
        naive(model, *arguments)
        raise SiteError("no")

    verdict = judge(nets.Net(nets.TwoModules), EXAMPLE, replace=half)
    assert verdict.result == "wrong"
    assert "after the refusal of G*.B*: other classes or keys than before" in verdict.why


def test_a_refusal_has_its_reason():
    class Loop(nets.Block):
        def forward(self, x):
            out = self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.shortcut(x)
            for _ in range(1):
                out = torch.relu(out)
            return out

    verdict = judge(nets.Net(Loop), EXAMPLE)
    assert (verdict.result, verdict.groups, verdict.replaced, verdict.others) == ("refused", "2+2", 0, 1)
    assert "calls the ReLU in a loop" in verdict.why


def test_of_each_family_the_smallest():
    sizes = {
        "resnet50": 25,
        "resnet18": 11,
        "vit": 0,
        "resnet26d": 16,
        "resnet18d": 12,
        "x2y4": 3,
        "x2y1": 2,
    }
    assert smallest(sizes) == ["resnet18", "resnet18d", "x2y1"]
    assert size_of("test_resnet") == sum(
        p.numel() for p in build(Network("timm", "test_resnet"))[0].parameters()
    )
    assert size_of("test_vit") == 0


@pytest.mark.slow
def test_the_table(tmp_path):
    zoo.main(f"--library torchvision --only [qr]*net18 --jobs 1 --out {tmp_path}/new/zoo.md".split())
    text = (tmp_path / "new/zoo.md").read_text()
    assert "| resnet18 | relu | 2+2+2+2 | 1 | 17 | rewrite | right |" in text
    refused = next(line for line in text.splitlines() if line.startswith("| quantized_resnet18 |"))
    assert (
        "| 2+2+2+2 | 9 | refused | swap | refused: its ReLU is called in add_relu (torch/ao/nn/quantized/"
        in refused
    )
    assert "**wrong**" not in text


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        zoo.main(["--library", "torchvision", "--only", "no_such_network"])
    assert "no network of torchvision is called no_such_network" in capsys.readouterr().err
