import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from examples.paper.common import data
from tests.helpers.fixtures import write_parquet

SHARED = data.SAMPLE.parents[3] / "shared" / "data"


def test_the_sample_is_balanced_and_its_splits_apart():
    for split, count in (("train", 200), ("test", 50)):
        x, y = data.load(split)
        assert x.shape == (10 * count, 3, 32, 32)
        assert x.dtype == torch.uint8
        assert y.bincount().tolist() == [count] * 10
    pngs = [p.as_py() for p in pq.read_table(data.SAMPLE)["img"].combine_chunks().field("bytes")]
    assert len(set(pngs)) == 2500
    assert all(p.startswith(b"\x89PNG") for p in pngs)
    assert data.SAMPLE.stat().st_size < 6e6


@pytest.mark.parametrize("column", ["img", "image"])
def test_a_folder_in_the_hubs_layout_is_read_in_order(tmp_path, column):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    write_parquet(tmp_path / "plain_text/train-00000-of-00002.parquet", x[:3], [0, 1, 2], column)
    write_parquet(tmp_path / "plain_text/train-00001-of-00002.parquet", x[3:], [3, 4], column)
    images, labels = data.load("train", str(tmp_path))
    assert torch.equal(images, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_files_are_decoded_once_and_again_when_they_change(tmp_path):
    path = tmp_path / "train-0.parquet"
    write_parquet(path, np.full((2, 4, 4, 3), 7, np.uint8), [0, 1])
    first, again = data.load("train", str(tmp_path)), data.load("train", str(tmp_path))
    assert first[0] is again[0]
    write_parquet(path, np.full((3, 4, 4, 3), 9, np.uint8), [0, 1, 2])
    assert data.load("train", str(tmp_path))[0].unique().tolist() == [9]
    assert first[0].unique().tolist() == [7]


def test_bad_sources_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold one folder with train-\*\.parquet; found: none"):
        data.load("train", str(tmp_path))
    with pytest.raises(ValueError, match="ask for 'train' or 'test'"):
        data.load("valid")
    for name in "ab":
        write_parquet(tmp_path / name / "test-0.parquet", np.zeros((1, 2, 2, 3), np.uint8), [0], "picture")
    with pytest.raises(FileNotFoundError, match="name the folder of one data set"):
        data.load("test", str(tmp_path))
    with pytest.raises(ValueError, match=r"found \['picture', 'label'\]"):
        data.load("test", str(tmp_path / "a"))


def test_augment_crops_and_flips_each_image():
    x = torch.arange(1, 4 * 4 + 1).float().view(1, 1, 4, 4).repeat(500, 1, 1, 1)
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    crops = [padded[:, i : i + 4, j : j + 4] for i in range(5) for j in range(5)]
    allowed = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(2))}
    seen = {tuple(c.flatten().tolist()) for c in data.augment(x, pad=2)}
    assert seen == allowed  # all fifty, and nothing else


def test_augment_leaves_digits_unmirrored():
    x = torch.arange(1, 4 * 4 + 1).float().view(1, 1, 4, 4).repeat(200, 1, 1, 1)
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    allowed = {tuple(padded[:, i : i + 4, j : j + 4].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(c.flatten().tolist()) for c in data.augment(x, flip=False, pad=2)} == allowed


def test_svhn_is_read_in_the_hubs_layout(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    write_parquet(tmp_path / "cropped_digits/test-00000-of-00001.parquet", x, [0, 9, 2], "image")
    write_parquet(tmp_path / "full_numbers/test-00000-of-00001.parquet", x[:1], [5], "image")
    images, labels = data.load("test", str(tmp_path), "svhn")
    assert torch.equal(images, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert labels.tolist() == [0, 9, 2]


def test_a_data_set_we_cannot_get_says_so():
    with pytest.raises(ValueError, match="there are cifar10, svhn, mnist-m"):
        data.load("train", "sample", "cifar100")
    with pytest.raises(ValueError, match="our sample is of cifar10, not of svhn"):
        data.load("train", "sample", "svhn")
    with pytest.raises(ValueError, match="no copy of mnist-m on the Hub; give a folder"):
        data.load("train", "hub", "mnist-m")


def test_to_float_is_a_fraction_of_one():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(data.to_float(x), torch.tensor([0, 0.2, 1.0]))


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="MNIST-M is not beside this checkout")
def test_the_numbers_of_mnist_m_are_its_own():
    x, y = data.load("train", str(SHARED / "mnist_m"), "mnist-m")
    assert y.bincount().tolist() == [2500] * 10
    known = data.DATASETS["mnist-m"]
    pixels = data.to_float(x).transpose(0, 1).flatten(1)
    assert pixels.mean(1).tolist() == pytest.approx(known.mean, abs=1e-4)
    assert pixels.std(1).tolist() == pytest.approx(known.std, abs=1e-4)


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="the whole CIFAR-10 is not beside this checkout")
def test_the_whole_set_and_our_sample_of_it():
    x, y = data.load("test", str(SHARED / "cifar10"))
    assert y.bincount().tolist() == [1000] * 10
    sample = {image.numpy().tobytes() for image in data.load("test")[0]}
    assert sample < {image.numpy().tobytes() for image in x}
