"""Files that are written whole or not at all, by one process at a time."""

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.paper.common.atomic import atomic_write, write_text
from examples.paper.common.cli import check_device, plain_errors
from examples.paper.common.lock import BusyError, is_locked, lock

ROOT = Path(__file__).parents[2]
HOLDING = """
import sys
from pathlib import Path
from examples.paper.common.atomic import atomic_write
from examples.paper.common.lock import lock
path = Path(sys.argv[1])
with lock(path.parent), atomic_write(path) as scratch:
    scratch.write_text("of another process")
    print(scratch, flush=True)
    sys.stdin.read()
"""
BIG = {"w": torch.ones(50_000)}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "checkpoint.pt").write_text("old")
    return tmp_path / "checkpoint.pt"


@pytest.fixture
def small_disk():
    """No file can become longer than 100,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def save_open(scratch):
    with scratch.open("wb") as file:
        torch.save(BIG, file)


@pytest.mark.parametrize(
    "write",
    [
        lambda scratch: torch.save(BIG, scratch),
        save_open,
        lambda scratch: save_file(BIG, scratch),
        lambda scratch: scratch.write_text("x" * 200_000),
    ],
    ids=["torch", "torch, open file", "safetensors", "text"],
)
def test_a_full_disk_is_one_error_and_leaves_the_old_file(path, small_disk, write):
    told = pytest.raises(SystemExit, match=r"error: .*checkpoint\.pt could not be written \(.*MB are free")
    with told, plain_errors(), atomic_write(path) as scratch:
        write(scratch)
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), OSError(28, "no space", "x")])
def test_another_error_passes_and_leaves_the_old_file(path, error):
    def write():
        with atomic_write(path) as scratch:
            scratch.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        write()
    assert raised.value is error
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_new_file_has_the_mode_of_the_old_one(path, mode):
    path.chmod(mode)
    write_text(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


def test_a_first_file_has_the_usual_mode(tmp_path):
    write_text(tmp_path / "a", "new")
    (tmp_path / "b").write_text("new")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pt.tmp", ".checkpoint.pt.0123abcd.tmp"])
def test_no_link_is_followed(tmp_path, name):
    victim, path = tmp_path / "victim", tmp_path / "checkpoint.pt"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    write_text(path, "new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)


def test_what_a_killed_writer_left_is_deleted_and_a_living_ones_file_is_not(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        scratch = Path(other.stdout.readline().decode().strip())
        assert is_locked(path.parent)
        with pytest.raises(BusyError, match="another process works in"), lock(path.parent):
            pass
        write_text(path, "new")
        assert scratch.read_text() == "of another process"
        other.kill()
    assert not is_locked(path.parent)
    write_text(path, "newer")
    assert not scratch.exists()
    assert path.read_text() == "newer"
    with lock(path.parent):
        assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint.pt", "lock"]


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to("victim")
    with pytest.raises(ValueError, match="is a link"), lock(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_memory_that_is_not_there_is_one_error_and_a_bug_is_none():
    with pytest.raises(SystemExit, match=r"error: out of memory .*a smaller --batch-size"), plain_errors():
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), plain_errors():
        torch.ones(2, 2) @ torch.ones(3, 3)


@pytest.mark.parametrize("device", ["cuda:97", "meta", "banana", ""])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"cannot use --device {device} on this machine: "):
        check_device(device)


@pytest.mark.skipif(os.geteuid() == 0, reason="everybody's folder is root's")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        write_text(tmp_path / "a", "new")
