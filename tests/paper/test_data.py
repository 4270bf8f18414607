import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from examples import data as example
from examples.paper.common import data, image_order
from examples.paper.common.records import sha256
from examples.paper.results.state import RESULTS
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


@pytest.mark.parametrize("command", ["cifar10", "svhn"])
def test_images_of_another_data_set_are_known_by_their_number(tmp_path, command):
    x = np.zeros((9001, 2, 2, 3), np.uint8)
    write_parquet(tmp_path / "test-0.parquet", x, [0] * len(x))
    with pytest.raises(ValueError, match=f"the 9,001 test images of mnist-m, and those of {command} are"):
        data.load("test", str(tmp_path), command)
    assert len(data.load("test", str(tmp_path), "mnist-m")[0]) == 9001


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


def test_listed_test_images_come_in_the_order_of_the_list(tmp_path, monkeypatch):
    x, y = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6)
    names = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in x]
    order = [3, 0, 5, 1, 4, 2]
    (tmp_path / "list.txt").write_text("".join(f"{names[i]}\n" for i in order))
    monkeypatch.setattr(data, "LIST", tmp_path / "list.txt")
    for folder, rows in (("one", [0, 1, 2, 3, 4, 5]), ("two", [4, 2, 0, 5, 1, 3]), ("same", order)):
        for split in ("train", "test"):
            write_parquet(tmp_path / folder / f"{split}-0.parquet", x[rows], y[rows])
        images, labels = data.load("test", str(tmp_path / folder))
        assert labels.tolist() == order
        assert torch.equal(images, torch.from_numpy(x[order]).permute(0, 3, 1, 2))
        assert data.load("train", str(tmp_path / folder))[1].tolist() == rows
        assert data.load("test", str(tmp_path / folder), "svhn")[1].tolist() == rows
    for folder, rows in (("few", [0, 1, 2]), ("twice", [0, 1, 2, 3, 4, 4])):  # other data is left alone
        write_parquet(tmp_path / folder / "test-0.parquet", x[rows], y[rows])
        assert data.load("test", str(tmp_path / folder))[1].tolist() == rows
    other = x.copy()
    other[2, 0, 0, 0] ^= 1
    write_parquet(tmp_path / "other/test-0.parquet", other, y)
    assert data.load("test", str(tmp_path / "other"))[1].tolist() == y.tolist()


def test_the_list_is_made_by_a_command(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    write_parquet(tmp_path / "test-0.parquet", x, [0, 1, 2, 3])
    image_order.main([str(tmp_path), "--out", str(tmp_path / "list.txt")])
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert lines == [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in x]
    assert "4 images, 4 different" in capsys.readouterr().out


def test_the_list_in_use_has_ten_thousand_different_images():
    names = image_order.LIST.read_text().split()
    assert len(names) == len(set(names)) == 10_000
    assert set(image_order.digests(data.load("test")[0])) < set(names)


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
    filed = json.loads((RESULTS / "w16-relu.json").read_text())["test images"]
    assert sha256(x.numpy().tobytes(), y.numpy().tobytes()) == filed


RAMP = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
GRAY = Image.fromarray((RAMP >> 8).astype(np.uint8))
COLOR = Image.merge("RGB", [GRAY, GRAY, GRAY])
SIXTEEN = Image.fromarray(RAMP)
OPAQUE, HALF = (Image.new("L", (16, 16), value) for value in (255, 128))
TURNED = Image.Exif()
TURNED[0x112] = 3  # upside down, as a camera was held
BACKGROUND = "it has transparent pixels; save it on a background"
RANGE = "have no known range; save it in 8 or 16 bits"
SEVERAL = "it holds several pictures; save one"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen_bit_png(color_type, channels):
    """A PNG of 16 bits a channel, which Pillow reads and does not write; all channels are the ramp."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    pixels = np.repeat(RAMP[:, :, None], channels, 2).astype(">u2")
    if color_type in (4, 6):
        pixels[:, :, -1] = 65535
    head = struct.pack(">IIBBBBB", 16, 16, 16, color_type, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def negative(image):
    """A TIFF of the image in which 0 is white."""
    white = Image.fromarray(np.iinfo(np.asarray(image).dtype).max - np.asarray(image))
    told = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert told in encoded(white, "TIFF")
    return encoded(white, "TIFF").replace(told, struct.pack("<HHIHH", 262, 3, 1, 0, 0))


PICTURES = {
    "gray": (encoded(GRAY), None),
    "one bit": (encoded(GRAY.convert("1")), None),
    "palette": (encoded(COLOR.quantize(256)), None),
    "palette GIF": (encoded(COLOR.quantize(256), "GIF"), None),
    "palette, opaque": (encoded(COLOR.quantize(9), transparency=200), None),
    "palette, transparent": (encoded(COLOR.quantize(9), transparency=1), BACKGROUND),
    "gray of 16 bits": (encoded(SIXTEEN), None),
    "gray of 16 bits, TIFF": (encoded(SIXTEEN, "TIFF"), None),
    "negative": (negative(GRAY), None),
    "negative of 16 bits": (negative(SIXTEEN), None),
    "gray of 16 bits, PGM": (b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(), None),
    "color of 16 bits": (sixteen_bit_png(2, 3), None),
    "color of 16 bits, opaque": (sixteen_bit_png(6, 4), None),
    "gray of 16 bits, opaque": (sixteen_bit_png(4, 2), None),
    "whole numbers": (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), RANGE),
    "floats": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), RANGE),
    "gray, opaque": (encoded(Image.merge("LA", [GRAY, OPAQUE])), None),
    "gray, half opaque": (encoded(Image.merge("LA", [GRAY, HALF])), BACKGROUND),
    "color, opaque": (encoded(Image.merge("RGBA", [GRAY, GRAY, GRAY, OPAQUE])), None),
    "color, half opaque": (encoded(Image.merge("RGBA", [GRAY, GRAY, GRAY, HALF])), BACKGROUND),
    "color, one transparent": (encoded(COLOR, transparency=(0, 0, 0)), BACKGROUND),
    "print": (encoded(COLOR.convert("CMYK"), "TIFF"), None),
    "JPEG": (encoded(COLOR, "JPEG", quality=95), None),
    "JPEG of print": (encoded(COLOR.convert("CMYK"), "JPEG", quality=95), None),
    "animated": (encoded(GRAY, "GIF", save_all=True, append_images=[HALF]), SEVERAL),
    "animated PNG": (encoded(GRAY, save_all=True, append_images=[HALF]), SEVERAL),
    "pages": (encoded(GRAY, "TIFF", save_all=True, append_images=[HALF]), SEVERAL),
    "cut": (encoded(COLOR)[:-30], "truncated"),
    "cut JPEG": (encoded(COLOR, "JPEG")[:-100], "[Tt]runcated"),
    "text": (b"no picture", "cannot identify"),
    "empty": (b"", "cannot identify"),
    "missing": (None, "cannot identify"),
}


def table(path, contents, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": [{"bytes": c, "path": ""} for c in contents], "label": labels}), path)


READERS = {"laboratory": data.load, "example": example.read_cifar}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_of_any_kind_is_read_right_or_refused_by_its_row(tmp_path, kind, reader):
    content, wrong = PICTURES[kind]
    table(tmp_path / "train-0.parquet", [encoded(GRAY), content], [0, 1])
    if wrong:
        with pytest.raises(ValueError, match=f"the image of row 1 cannot be read: .*{wrong}"):
            READERS[reader]("train", str(tmp_path))
        return
    x, y = READERS[reader]("train", str(tmp_path))
    assert (x.dtype, x.shape, y.tolist()) == (torch.uint8, (2, 3, 16, 16), [0, 1])
    distance = (x[0].int() - x[1].int()).abs().float()
    assert distance.mean() < {"one bit": 128, "palette, opaque": 10}.get(kind, 2)
    assert x[1].float().mean() == pytest.approx(127.5, abs=2.5)


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_of_ones_own_is_read_right_or_refused_by_its_name(tmp_path, kind):
    content, wrong = PICTURES[kind]
    (tmp_path / "mine.png").write_bytes(content or b"")
    if wrong:
        with pytest.raises(ValueError, match=rf"mine\.png cannot be read: .*{wrong}"):
            example.picture(tmp_path / "mine.png")
    else:
        pixels = np.asarray(example.picture(tmp_path / "mine.png"))
        assert pixels.mean() == pytest.approx(127.5, abs=2.5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_picture_is_turned_upright(kind):
    upright = example.picture(io.BytesIO(encoded(COLOR, kind, exif=TURNED)))
    distance = np.asarray(upright).astype(int) - np.asarray(COLOR.rotate(180))
    assert abs(distance).mean() < 2


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ([0, None], "labels must be 0 to 9; found"),
        ([0, 10], r"labels must be 0 to 9; found \[0.0, 10.0\]"),
        ([-1, 0], "labels must be 0 to 9; found"),
        ([0.0, 1.0], "'label' integers; found"),
        (["cat", "dog"], "'label' integers; found"),
        ([True, False], "'label' integers; found"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, wrong, reader):
    table(tmp_path / "test-0.parquet", [encoded(GRAY)] * 2, labels)
    with pytest.raises(ValueError, match=wrong):
        READERS[reader]("test", str(tmp_path))


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_data_set_is_one_error(tmp_path, reader):
    read = READERS[reader]
    table(tmp_path / "sizes/test-0.parquet", [encoded(GRAY), encoded(GRAY.resize((8, 9)))], [0, 1])
    with pytest.raises(ValueError, match=r"images must have one size; found \[\(9, 8, 3\), \(16, 16, 3\)\]"):
        read("test", str(tmp_path / "sizes"))
    table(tmp_path / "none/test-0.parquet", [], pa.array([], pa.int64()))
    with pytest.raises(ValueError, match=r"must hold the 'bytes' of PNGs|labels must be"):
        read("test", str(tmp_path / "none"))
    whole = tmp_path / "whole/label=7/test-0.parquet"
    table(whole, [encoded(GRAY)] * 2, [3, 4])
    assert read("test", str(tmp_path / "whole"))[1].tolist() == [3, 4]  # the folder's name says nothing
    for length in (0, 100, -1):
        whole.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"label=7/test-0\.parquet cannot be read as parquet"):
            read("test", str(tmp_path / "whole"))
    with pytest.raises((ValueError, OSError), match="name"):  # several data sets in one folder
        read("test", str(tmp_path))
