"""Saving over a set: whatever ends a save, and however many savers there are, a whole set loads after it."""

import os
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch

from sparta_act import Sparta, SpartaSet
from sparta_act.errors import WeightsError
from sparta_act.pretrained import CARD, CONFIG, WEIGHTS, folder

CHANGES = ("open", "write", "flush", "close", "mkdir", "replace", "unlink", "rmdir", "flock")
FILES = {CARD, CONFIG, WEIGHTS}
unix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill")


def make(number, channels=3):
    activation = Sparta(channels, hidden=2)
    with torch.no_grad():
        for value in activation.parameters():
            value.fill_(number / 8)
    return SpartaSet({"G2.B1": activation}, {"number": number})


def files_of(number):
    return make(number)._files("a set", torch.float16, None)


def number_of(path):
    """The number of the set that loads; its weights and its info belong together."""
    loaded = SpartaSet.from_pretrained(path)
    number = loaded.info["number"]
    assert all((value == number / 8).all() for value in loaded["G2.B1"].parameters())
    return number


def at_call(k, end):
    """Do `end` before the k-th call that changes a file: every place where a save can break off."""
    calls = count(1)

    def watch(frame, event, function):
        if event == "c_call" and function.__name__ in CHANGES and next(calls) == k:
            end()

    return watch


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for time's sake


def save_until(k, path, files, end):
    sys.setprofile(at_call(k, end))
    try:
        folder.write(files, path)
    finally:
        sys.setprofile(None)


def names(path):
    return {p.name for p in path.iterdir()}


@unix
def test_a_killed_save_leaves_the_old_set_or_the_new_one(tmp_path):
    make(1).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    files, after = {n: files_of(n) for n in (1, 2)}, []
    for k in count(1):
        if (child := os.fork()) == 0:
            save_until(k, tmp_path, files[2], lambda: os.kill(os.getpid(), signal.SIGKILL))
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        after.append(number_of(tmp_path))
        if not killed:
            break
        folder.write(files[1], tmp_path)  # nor does a killed save keep the next one out
        assert names(tmp_path) == FILES | {"notes.txt"}
    assert after == sorted(after)  # the old set, from some place on the new one
    assert {after.count(1) > 9, after.count(2) > 3} == {True}
    assert names(tmp_path) == FILES | {"notes.txt"}


@unix
def test_a_first_save_that_is_killed_leaves_nothing_or_the_set(tmp_path):
    files, found = files_of(7), []
    for k in range(1, 60, 7):
        path = tmp_path / str(k)
        if (child := os.fork()) == 0:
            save_until(k, path, files, lambda: os.kill(os.getpid(), signal.SIGKILL))
            os._exit(0)
        os.waitpid(child, 0)
        try:
            found.append(number_of(path))
        except WeightsError:
            found.append(0)
        make(8).save_pretrained(path)
        assert (number_of(path), names(path)) == (8, FILES)
    assert found == sorted(found)
    assert set(found) == {0, 7}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_save_that_breaks_off_says_so_and_leaves_a_set_and_no_rest(tmp_path, error):
    make(1).save_pretrained(tmp_path)
    files, after, fired, told = {n: files_of(n) for n in (1, 2)}, [], [], set()

    def end():
        fired.append(k)
        raise type(error)(*error.args)  # a fresh one, that holds no frame of the last

    for k in count(1):
        try:
            save_until(k, tmp_path, files[2], end)
        except KeyboardInterrupt:
            assert isinstance(error, KeyboardInterrupt)
        except WeightsError as refusal:
            told.add(str(refusal))
        if k not in fired:
            break
        after.append(number_of(tmp_path))
        folder.write(files[1], tmp_path)
        assert names(tmp_path) == FILES
    assert set(after) == {1, 2}
    assert all(f"cannot save into {tmp_path}: OSError: [Errno 28] No space left" in text for text in told)
    assert bool(told) == isinstance(error, OSError)


def test_savers_and_loaders_at_once(tmp_path):
    make(0).save_pretrained(tmp_path)
    files, done, loaded = [files_of(n) for n in range(4)], threading.Event(), []

    def load():
        while not done.is_set():
            loaded.append(number_of(tmp_path))

    with ThreadPoolExecutor(6) as pool:
        loaders = [pool.submit(load) for _ in range(2)]
        try:
            list(pool.map(lambda n: folder.write(files[n % 4], tmp_path), range(24)))
        finally:
            done.set()
        assert [loader.result() for loader in loaders] == [None, None]
    assert loaded
    assert number_of(tmp_path) in range(4)
    assert names(tmp_path) == FILES


def test_a_save_waits_its_turn_and_not_for_ever(tmp_path, monkeypatch):
    make(1).save_pretrained(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with folder._alone(tmp_path):
            waiting = pool.submit(make(2).save_pretrained, tmp_path)
            time.sleep(0.1)
            assert not waiting.done()
            with monkeypatch.context() as patch:
                patch.setattr(folder, "PATIENCE", 0)
                with pytest.raises(
                    WeightsError, match="something else has been saving there for 0 s; nothing"
                ):
                    make(3).save_pretrained(tmp_path)
            assert number_of(tmp_path) == 1
        waiting.result(10)
    assert number_of(tmp_path) == 2
    assert names(tmp_path) == FILES


def test_a_rest_is_not_taken_for_another_set(tmp_path):
    """A configuration that a killed save left counts with its own weights alone, and no folder but a rest."""
    make(1).save_pretrained(tmp_path)
    rest, mine = tmp_path / ".saving-x", tmp_path / ".saving-mine"
    for path, files in ((rest, {CONFIG: files_of(2)[CONFIG]}), (mine, {"thesis.tex": b"mine"})):
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    assert number_of(tmp_path) == 1
    (tmp_path / WEIGHTS).write_bytes(files_of(3)[WEIGHTS])
    with pytest.raises(WeightsError, match="cut off, changed or mixed up"):
        SpartaSet.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(files_of(2)[WEIGHTS])
    assert number_of(tmp_path) == 2
    make(4).save_pretrained(tmp_path)
    assert names(tmp_path) == FILES | {".saving-mine"}
    assert names(mine) == {"thesis.tex"}


# where a set may be saved


class Bytes:
    def __fspath__(self):
        return b"set"


@pytest.mark.parametrize("nothing", ["", None, 5, b"set", Bytes(), "~nobody-of-that-name/set"])
def test_no_folder_is_refused(nothing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"a set is saved into a folder, not into .*; nothing was written"):
        make(1).save_pretrained(nothing)
    assert names(tmp_path) == set()


def test_a_folder_may_be_named_in_every_way(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert make(1).save_pretrained("~/at home") == tmp_path / "at home"
    assert number_of("~/at home") == 1
    (tmp_path / "link").symlink_to(tmp_path / "at home", target_is_directory=True)
    make(2).save_pretrained("link")
    assert number_of("at home") == 2
    assert (tmp_path / "link").is_symlink()
    make(3).save_pretrained(".")
    assert number_of(tmp_path) == 3


README = "# My project"
OTHERS = [
    ({CARD: README}, f"the {CARD} of something else"),
    (
        {CONFIG: '{"architectures": ["BertModel"]}', CARD: README},
        f"the {CONFIG} of something else and the {CARD}",
    ),
    ({WEIGHTS: "a model's"}, f"the {WEIGHTS} of something else"),
    ({CONFIG: ""}, f"the {CONFIG} of something else"),
]


@pytest.mark.parametrize(("there", "words"), OTHERS)
def test_files_of_something_else_are_not_overwritten(tmp_path, there, words):
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError) as error:
        make(1).save_pretrained(tmp_path)
    assert words in str(error.value)
    assert str(error.value).endswith("nothing was written. Name another folder, or move that away")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == there


@pytest.mark.parametrize("card", [None, "# Mine"])
def test_a_set_is_saved_over_a_set_whatever_its_card_says(tmp_path, card):
    for number in (1, 2):
        make(number).save_pretrained(tmp_path, card=card)
        (tmp_path / CARD).write_text("# By hand")
    (tmp_path / CONFIG).write_text("{broken")  # its weights are still a set's
    make(3).save_pretrained(tmp_path)
    assert number_of(tmp_path) == 3


@unix
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
def test_a_pipe_in_the_way_is_refused_at_once(tmp_path, name, rest):
    os.mkfifo(tmp_path / name)
    if rest:
        (tmp_path / ".saving-x").mkdir()
        (tmp_path / ".saving-x" / CONFIG).write_bytes(files_of(2)[CONFIG])
    with pytest.raises(
        WeightsError, match=rf"the pipe or device .*{name} is in the way; nothing was written"
    ):
        make(1).save_pretrained(tmp_path)
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in ("file/set", "link", "x" * 300, "zero\0byte"):
        with pytest.raises(WeightsError, match="cannot save into"):
            make(1).save_pretrained(tmp_path / path)
    assert names(tmp_path) == {"file", "link"}


@unix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_keeps_its_set(tmp_path):
    make(1).save_pretrained(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(WeightsError, match=r"PermissionError.*A set that was there still loads"):
        make(2).save_pretrained(tmp_path)
    assert number_of(tmp_path) == 1
    tmp_path.chmod(0o700)


def test_no_link_is_written_through(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / folder.LOCK).symlink_to(tmp_path / "victim")
    (tmp_path / "set" / ".saving-x").symlink_to(tmp_path, target_is_directory=True)
    if hasattr(os, "O_NOFOLLOW"):
        with pytest.raises(WeightsError, match="cannot save into"):
            make(1).save_pretrained(tmp_path / "set")
    assert (tmp_path / "victim").read_text() == "mine"
