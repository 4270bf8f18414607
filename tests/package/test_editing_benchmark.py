import pytest
import torch

from benchmarks import editing

SMALL = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_the_editing_benchmark_times_edited_blocks_against_hand_written_ones(capsys):
    small = "--calls 2 --batch-size 2 --rounds 1 --races 2 --compile none --device cpu"
    editing.main(small.split())
    printed = capsys.readouterr().out
    assert [printed.count(f"{edit}, eager: ") for edit in ("rewrite", "swap")] == [2, 2]
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in printed.splitlines() if line[0] == "│"]
    names = ["by hand", "by hand again", "edited", "run-time mode", "untouched"]
    assert [name for name, *_ in rows] == 4 * names
    assert all(float(forward) > 0 < float(both) for _, forward, _, _, both, _, _ in rows)
    assert all(ratio == "1.00 (1.00-1.00)" for name, _, ratio, *_ in rows if name == "by hand")
    assert all(float(more) == 0 for name, _, _, more, *_ in rows if name == "by hand")
    assert "in float64 to 0e+00" in printed


@pytest.mark.parametrize("edit", editing.BLOCKS)
def test_another_block_is_not_timed_as_hand_written(edit, monkeypatch):
    assert editing.check_same(editing.contenders(edit, SMALL), SMALL, lambda block: block) == 0
    written, _ = editing.BLOCKS[edit]
    monkeypatch.setitem(editing.BLOCKS, edit, (written, written))  # whose last ReLU is still ReLU
    blocks = editing.contenders(edit, SMALL)
    with pytest.raises(ValueError, match="edited and by hand differ"):
        editing.check_same(blocks, SMALL, lambda block: block)


@pytest.mark.parametrize("edit", editing.BLOCKS)
def test_the_run_time_mode_changes_the_last_relu_alone(edit):
    blocks = editing.contenders(edit, SMALL)
    assert not torch.equal(blocks["run-time mode"](SMALL), blocks["untouched"](SMALL))
    assert torch.equal(blocks["run-time mode"](SMALL), blocks["by hand"](SMALL))
