import pytest

from examples import quickstart
from sparta_act import Sparta


@pytest.mark.slow
def test_the_quickstart_runs_and_prints_its_table_and_figure(tmp_path, tiny_data, capsys):
    figure = tmp_path / "figure.png"
    options = ["--data-dir", tiny_data, "--epochs", "1", "--limit", "8", "--device", "cpu"]
    quickstart.main([*options, "--out", str(figure)])
    printed = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    labels = " ".join(" ".join(rows).split())  # a long one goes over several lines
    for label in ("error, clean", "error, targeted PGD-10, 16/255", "error, untargeted PGD-10, 8/255"):
        assert label in labels
    for attack in ("clean", *quickstart.ATTACKS):
        for other in ("ReLU", "ReLU halved", "SPARTA, shuffled"):
            assert f"{attack}: SPARTA, frozen minus {other} is " in printed
    sparta_set = Sparta.from_pretrained("cifar10-resnet18-w16")
    frozen = sum(p.numel() for p in sparta_set.parameters())
    everything, learned = (
        int(line.split("│")[5].replace(",", ""))
        for line in printed.splitlines()
        if line.startswith(("│ parameters", "│ of them trained"))
    )
    assert everything - learned == frozen
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size > 50_000


@pytest.mark.parametrize(
    "options", [["--out", "no/such/folder.png"], ["--out", "figure.gif"], ["--device", "x"]]
)
def test_what_cannot_be_used_is_refused_before_any_work(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)):
        quickstart.main(options)
    assert "1/4" not in capsys.readouterr().out
