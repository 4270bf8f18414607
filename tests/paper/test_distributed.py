"""Training on two processes, started by torchrun, against the same training on one."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from examples.paper.training.checkpoint import load_trained
from examples.paper.training.loop import read_log
from tests.paper.test_train import ROOT, TRAIN

pytestmark = pytest.mark.slow


def launcher(processes):
    return (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    )


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(out, tiny_data, *more, processes=2):
    arguments = [sys.executable, *launcher(processes), *TRAIN, "--out", out]
    arguments += ["--data", tiny_data, "--width", "8", "--recipe", "fast", "--device", "cpu", *more]
    return [str(a) for a in arguments]


def run(*arguments, **more):
    return subprocess.run(command(*arguments, **more), env=environment(), capture_output=True, text=True)


def losses(out):
    return [float(row["loss"]) for row in read_log(out / "log.csv")]


def test_two_processes_learn_exactly_what_one_learns(tmp_path):
    """Attack, update, batch norm and average, on batches of 15 and 5, which do not split evenly."""
    alone, together = tmp_path / "1.pt", tmp_path / "2.pt"
    for launch, out in (([], alone), (launcher(2), together)):
        python = [sys.executable, *launch, ROOT / "tests/helpers/one_of_several.py", out]
        result = subprocess.run(python, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    one, two = (torch.load(f, weights_only=True) for f in (alone, together))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10)
    assert len(one[0]) == 3
    *_, (epoch, resumed) = two  # a checkpoint inside the epoch has the sums of both processes
    assert resumed == pytest.approx(epoch)


OPTIONS = ["--limit", 45, "--epochs", 2, "--batch-size", 10, "--lr", 0.01]


def test_a_killed_process_ends_the_job_which_resumes_and_learns_what_one_process_does(tmp_path, tiny_data):
    alone, out = tmp_path / "alone", tmp_path / "killed"
    result = run(alone, tiny_data, *OPTIONS, processes=0)
    assert result.returncode == 0, result.stderr
    job = subprocess.Popen(
        command(out, tiny_data, *OPTIONS), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (out / "checkpoint.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0
    assert re.search(rb"Signal 9 \(SIGKILL\)", error)
    resumed = run(out, tiny_data, *OPTIONS, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("epoch 2:") == 1  # one log, from one process
    assert losses(out) == pytest.approx(losses(alone), rel=0.005)
    one, two = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (alone, out))
    assert one["model"].keys() == two["model"].keys()
    assert torch.equal(one["rng"], two["rng"])  # so a run may go on with another number of processes
    load_trained(out / "checkpoint.pt")


def test_a_batch_too_small_to_share_is_refused(tmp_path, tiny_data):
    result = run(tmp_path / "run", tiny_data, "--limit", 21, "--batch-size", 10)
    assert result.returncode != 0
    assert "the last batch has 1 images for 2 processes; change --batch-size" in result.stderr
    assert not (tmp_path / "run").exists()
