import pytest
import torch
from torch import nn

from examples.paper.common.gates import activations_of, gate_inputs
from examples.paper.common.models import build
from sparta_act import Sparta


@pytest.mark.parametrize(
    ("sites", "count"), [("G*.B-1", 4), ("layer*.*.act*", 16), ("*act*", 17), ("all", 17)]
)
def test_every_activation_of_a_network_is_in_its_set(sites, count):
    found = activations_of(build("resnet18", "sparta", sites, width=8))
    assert len({id(a) for a in found.values()}) == count
    assert {"G1.B2", "G4.B2"} <= found.keys()
    assert activations_of(build("resnet18", "relu", sites, width=8)) == {}


def test_gate_inputs_are_those_of_each_call_in_evaluation_mode():
    twice, never = Sparta(3), Sparta(3)
    model = nn.Sequential(nn.BatchNorm2d(3), twice, nn.ReLU(inplace=True), twice)
    model.never = never
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    model.train()
    never.eval()
    x = torch.rand(4, 3, 5, 5, requires_grad=True)
    with torch.no_grad():
        first = x / (1 + 1e-5) ** 0.5  # by the running statistics: mean 0, variance 1
        second = twice(first)
    found = gate_inputs(model, x)
    assert list(found) == ["1", "never"]
    torch.testing.assert_close(found["1"], [first, second])
    assert found["never"] == []
    assert not found["1"][0].requires_grad
    assert model[0].training
    assert not never.training
    assert model[0].num_batches_tracked == 0


def test_gate_inputs_leave_no_hook_after_an_error():
    model = nn.Sequential(Sparta(3), nn.Linear(2, 2)).train()
    with pytest.raises(RuntimeError):
        gate_inputs(model, torch.rand(1, 3, 5, 5))
    assert not model[0]._forward_pre_hooks
    assert model.training


def test_an_input_survives_what_the_network_does_to_it():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.sparta = Sparta(3)

        def forward(self, x):
            h = x + 1
            y = self.sparta(h)
            h.zero_()
            return y

    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(gate_inputs(Overwriting(), x)["sparta"], [x + 1])
