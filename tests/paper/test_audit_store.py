"""The file of an audit: what a killed audit keeps, and what it begins anew."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from examples.paper.audit.store import OtherAuditError, Store

N = 4


@pytest.fixture
def data():
    return torch.rand(N, 3, 5, 5), torch.tensor([0, 1, 2, 1])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.safetensors"


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


def filled(data, path, key="key"):
    x, y = data
    store = Store(x, y, path, key)
    store.add_attack("clean", bools(1, 0, 0, 0), x)
    store.add_attack("PGD", bools(1, 1, 0, 0), x + 0.25)
    store.add_attack("PGD, eps 4/255", bools(1, 1, 1, 0))
    store.add_numbers("loss curve", {"mean": [0.1, 1.5], "name": "Größe/ß"})
    return store


def assert_new(store, data):
    assert store.wrong == {}
    assert store.numbers == {}
    assert torch.equal(store.images, data[0])
    assert store.broken_by == [""] * N
    assert store.broken().tolist() == [False] * N
    assert "clean" not in store


def test_a_new_store_is_empty_and_writes_nothing(data, path):
    assert_new(Store(*data, path, "key"), data)
    assert not path.exists()


def test_a_killed_audit_goes_on_with_all_of_it(data, path):
    before = filled(data, path)
    after = Store(*data, path, "key")
    assert list(after.wrong) == sorted(before.wrong)
    for name, wrong in before.wrong.items():
        assert after.wrong[name].dtype == torch.bool
        assert torch.equal(after.wrong[name], wrong)
    assert after.numbers == {"loss curve": {"mean": [0.1, 1.5], "name": "Größe/ß"}}
    assert torch.equal(after.images, before.images)
    assert after.broken_by == before.broken_by == ["clean", "PGD", "", ""]
    assert after.broken().tolist() == [True, True, False, False]
    for name in ("clean", "PGD", "PGD, eps 4/255", "loss curve"):
        assert name in after
    assert "Square" not in after
    after.add_attack("Square", bools(0, 0, 1, 0), data[0] + 0.5)
    again = Store(*data, path, "key")
    assert set(again.wrong) == {"clean", "PGD", "PGD, eps 4/255", "Square"}
    assert again.broken_by == ["clean", "PGD", "Square", ""]
    assert again.numbers == before.numbers


def test_the_first_image_that_fooled_is_the_evidence(data, path):
    x, _ = data
    store = filled(data, path)
    store.add_attack("later", bools(1, 1, 1, 0), x + 0.75)
    for held in (store, Store(*data, path, "key")):
        assert held.broken_by == ["clean", "PGD", "later", ""]
        assert torch.equal(held.images, torch.stack([x[0], x[1] + 0.25, x[2] + 0.75, x[3]]))


def test_without_images_there_is_no_evidence(data, path):
    store = Store(*data, path, "key")
    store.add_attack("PGD at 2 eps", bools(1, 1, 1, 1))
    assert store.wrong["PGD at 2 eps"].all()
    assert not store.broken().any()
    assert torch.equal(store.images, data[0])
    store.add_attack("PGD", bools(0, 1, 0, 0), data[0] + 0.25)
    assert store.broken_by == ["", "PGD", "", ""]


def test_the_images_given_are_not_changed(data, path):
    x, _ = data
    before, attacked = x.clone(), torch.zeros(N, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    store = Store(*data, path, "key")
    store.add_attack("PGD", bools(1, 0, 0, 0), attacked)
    assert torch.equal(x, before)
    assert store.images.dtype == torch.float32
    assert not store.images.requires_grad
    assert store.images[0].abs().max() == 0


def test_numbers_added_again_replace_the_older(data, path):
    store = Store(*data, path, "key")
    store.add_numbers("zero gradients", {"images": 4})
    store.add_numbers("zero gradients", {"images": 5})
    assert Store(*data, path, "key").numbers == {"zero gradients": {"images": 5}}


def test_one_result_may_be_added_twice_and_changed_afterwards(data, path):
    wrong = bools(1, 0, 0, 0)
    store = Store(*data, path, "key")
    store.add_attack("clean", wrong, data[0])
    store.add_attack("restarts", wrong, data[0])
    store.add_attack("every second", bools(1, 0, 0, 1, 0, 1, 0, 1)[::2], data[0])
    wrong[3] = True
    for held in (store, Store(*data, path, "key")):
        assert held.wrong["clean"].tolist() == held.wrong["restarts"].tolist() == [True, False, False, False]
        assert held.wrong["every second"].tolist() == [True, False, False, False]


def test_the_time_of_each_attack_is_kept_and_of_an_attack_done_again_the_newer(data, path):
    store = Store(*data, path, "key")
    store.add_seconds("PGD", 1.26)
    store.add_seconds("Square", 70.0)
    store.add_seconds("PGD", 2.0)
    assert Store(*data, path, "key").numbers == {"seconds": {"PGD": 2.0, "Square": 70.0}}
    assert "PGD" not in store  # how long it took is not what it found


def test_another_key_is_refused_and_the_file_stays(data, path):
    filled(data, path, "eps 8/255")
    before = path.read_bytes()
    with pytest.raises(OtherAuditError, match="holds another audit"):
        Store(*data, path, "eps 4/255")
    assert path.read_bytes() == before
    assert filled(data, path, "eps 8/255").broken_by[1] == "PGD"


@pytest.mark.parametrize("left", [0, 1, 7, 8, 100, -200, -1])
def test_a_truncated_file_begins_anew(data, path, left):
    filled(data, path)
    path.write_bytes(path.read_bytes()[:left])
    store = Store(*data, path, "key")
    assert_new(store, data)
    store.add_attack("clean", bools(1, 0, 0, 0), data[0])
    assert Store(*data, path, "key").broken_by[0] == "clean"


def test_a_flipped_bit_begins_anew_or_changes_nothing(data, path, capsys):
    before, anew = filled(data, path), 0
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 101):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        after = Store(*data, path, "key")
        if not after.wrong:
            assert_new(after, data)
            anew += 1
            continue
        assert {k: v.tolist() for k, v in after.wrong.items()} == {
            k: v.tolist() for k, v in before.wrong.items()
        }
        assert (after.numbers, after.broken_by) == (before.numbers, before.broken_by)
        assert torch.equal(after.images, before.images)
    assert anew > 100
    assert "is damaged" in capsys.readouterr().err


def test_a_damaged_or_foreign_file_begins_anew(data, path):
    filled(data, path)
    header = bytearray(path.read_bytes())
    header[8:20] = b"\xff" * 12
    for content in (b"", b"no tensors at all", b"\0" * 64, bytes(header)):
        path.write_bytes(content)
        assert_new(Store(*data, path, "key"), data)
    unsealed = {"key": "key", "broken by": '["a", "", "", ""]', "numbers": '{"n": 1}'}
    for metadata in (None, unsealed):
        save_file({"images": data[0]}, path, metadata)
        assert_new(Store(*data, path, "key"), data)


def test_a_write_that_fails_leaves_the_old_file(data, path):
    store = filled(data, path)
    with pytest.raises(TypeError):
        store.add_numbers("no JSON", {1, 2})
    assert Store(*data, path, "key").broken_by == ["clean", "PGD", "", ""]
    assert "no JSON" not in Store(*data, path, "key")


def test_the_file_can_be_read_by_anybody(data, path):
    x, y = data
    filled(data, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["key"] == "key"
        assert torch.equal(file.get_tensor("labels"), y)
        assert file.get_tensor("images").shape == x.shape
        assert file.get_tensor("wrong/PGD").tolist() == [True, True, False, False]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing else lies about
