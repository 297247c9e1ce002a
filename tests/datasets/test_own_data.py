"""One's own images: read exactly, and whatever is wrong with them named by file and key."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib

import fuzzing
import numpy as np
import pytest
from PIL import Image

from jem_jax import datasets
from jem_jax.common.errors import UserError
from jem_jax.config import Data
from jem_jax.datasets import checks
from jem_jax.datasets.held_out import even_order

SIDE, COUNT, CLASSES = 8, 60, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % CLASSES
NO_TEXT = os.fsdecode(b"caf\xe9")


def _load(path, **settings):
    return datasets.load(Data(name=str(path), **settings))


def _npz(folder, **arrays):
    path = folder / "mine.npz"
    np.savez_compressed(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return path


def _pairs(*splits):
    """Images with their labels, as a set that no order changes."""
    return {
        (image.tobytes(), int(label)) for images, labels in splits for image, label in zip(images, labels, strict=True)
    }


def _all(dataset):
    return _pairs(*((split.images, split.labels) for split in (dataset.train, dataset.validation, dataset.test)))


def _sizes(dataset):
    return len(dataset.train), len(dataset.validation), len(dataset.test)


def _refused(path, words, **settings):
    with pytest.raises(UserError, match=words) as caught:
        _load(path, **settings)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_npz_is_read_exactly_and_a_tenth_held_out_twice(tmp_path):
    path = _npz(tmp_path)
    dataset = _load(path)
    assert (_sizes(dataset), dataset.class_names) == ((48, 6, 6), ("0", "1", "2"))
    assert _all(dataset) == _pairs((IMAGES, LABELS))
    resized = _load(path, image_size=16)
    assert resized.image_shape == (16, 16, 3)
    back = resized.test.images.reshape(-1, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.corrcoef(back.ravel(), dataset.test.images.ravel())[0, 1] > 0.95


def test_grey_images_need_no_channel_and_names_and_parts_are_taken_and_other_keys_named(tmp_path, capsys):
    arrays = {"class_names": np.array(["cat", "dog", "eel"]), "val_images": IMAGES[:7, ..., 0], "weights": LABELS}
    arrays |= {"val_labels": LABELS[:7], "test_images": IMAGES[:5, ..., 1], "test_labels": LABELS[:5].astype(np.uint8)}
    dataset = _load(_npz(tmp_path, images=IMAGES[..., 0], **arrays).rename(tmp_path / "mine.NPZ"))
    assert _sizes(dataset) == (60, 7, 5)
    assert (dataset.image_shape, dataset.class_names) == ((SIDE, SIDE, 1), ("cat", "dog", "eel"))
    np.testing.assert_array_equal(dataset.test.images[..., 0], IMAGES[:5, ..., 1])
    np.testing.assert_array_equal(dataset.test.labels, LABELS[:5])
    assert "mine.NPZ: not read: weights" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [(50, 30, 20), (90, 9, 1), (97, 2, 1)])
def test_what_is_held_out_is_always_the_same_has_the_classes_proportions_and_leaves_each_some(counts):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(3), counts))
    order = even_order(labels)
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    np.testing.assert_array_equal(order, even_order(labels))
    for stretch in (order[:10], order[10:20]):
        held = np.bincount(labels[stretch], minlength=3)
        assert (np.abs(held - np.array(counts) / 10) <= 1.5).all()
    assert set(labels[order[20:]]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES / 255}, r"images must be uint8, .*save .*\(images \* 255\).round\(\).astype\(np.uint8\)"),
        ({"images": IMAGES.astype(int)}, r"uint8, 0 to 255, not int64; save images.astype\(np.uint8\) if they are"),
        ({"images": IMAGES.reshape(COUNT, -1)}, r"not \[60, 192\]; save images.reshape\(-1, 8, 8, 3\), or images.resh"),
        ({"images": IMAGES[..., 0].reshape(COUNT, -1)}, r"; save images.reshape\(-1, 8, 8\)$"),
        ({"images": IMAGES.transpose(1, 2, 3, 0)}, r"images comes first: save images.transpose\(3, 0, 1, 2\)"),
        ({"images": IMAGES[..., [0, 1, 2, 0]]}, r"4 channels; .*; save images\[..., :3\]"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"has 8 channels.* come last: save images.transpose\(0, 2, 3, 1\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"images has the shape \[0, 8, 8, 3\]: there is nothing in it"),
        ({"labels": LABELS.astype(np.float32)}, r"integers, .*; save labels.astype\(int\) if they are whole numbers"),
        ({"labels": LABELS == 1}, r"; save labels.astype\(int\)$"),
        ({"labels": LABELS.astype(str)}, r"integers, not <U21; save np.unique\(labels, return_inverse=True\)\[1\]"),
        ({"labels": np.eye(3, dtype=int)[LABELS]}, r"labels must be \[N\], not .*; save labels.argmax\(axis=1\)"),
        ({"labels": LABELS[:, None]}, r"labels must be \[N\], not \[60, 1\]; save labels.reshape\(-1\)"),
        ({"labels": LABELS[:-1]}, "images holds 60 images and labels 59 labels"),
        ({"labels": LABELS - 1}, "labels must be from 0 to .*; row 0 is -1, and 19 more"),
        ({"labels": np.uint64(2**63) + LABELS.astype(np.uint64)}, "labels must be .*; row 0 is 9223372036854775808"),
        ({"labels": LABELS * 2}, r"go up to 4 but none is 1.*: save np.unique\(labels, return_inverse=True\)\[1\]"),
        ({"labels": LABELS * 0}, "has 1 class; at least 2 are needed"),
        ({"class_names": np.array(["a", "b"])}, "labels must be from 0 to 1; row 2 is 2"),
        ({"class_names": np.array(list("abcd"))}, r"no image of class 3 \(d\)"),
        ({"class_names": np.array(list("aab"))}, "class_names holds 'a' more than once"),
        ({"class_names": np.array(["a", "b", NO_TEXT])}, r"'caf\\udce9' is no Unicode text"),
        ({"class_names": np.arange(3)}, "class_names must be .* strings, not int64"),
        ({"class_names": np.array([b"a", b"b", b"c"])}, r"; save class_names.astype\(str\).reshape\(-1\)"),
        ({"class_names": np.array(["a", "b", None])}, "class_names holds pickled objects"),
        ({"class_names": np.array([f"{number:06}" for number in range(40_000)])}, "holds 40000 names for 60 images"),
        ({"class_names": np.array(["a" * 201, "b", "c"])}, "at most 200 characters long, not 201"),
        ({"test_images": IMAGES}, "only one of test_images and test_labels"),
        ({"test_images": IMAGES, "test_labels": LABELS + 1}, "test_labels must be from 0 to 2; row 2 is 3"),
        ({"test_images": IMAGES[..., 0], "test_labels": LABELS}, r"train on are \[8, 8, 3\], others \[8, 8, 1\]"),
        ({"images": IMAGES[:, :6, :6]}, "6×6, and their sides must be multiples of 4; .*image_size=8"),
        ({"images": IMAGES[:4], "labels": LABELS[:4]}, "its 4 images are too few"),
    ],
)  # fmt: skip
def test_a_wrong_array_is_named_with_its_key_and_what_would_be_right(tmp_path, arrays, words):
    _refused(_npz(tmp_path, **arrays), words)


def _zip(folder, images, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(folder / "mine.npz", "w", compression) as archive:
        archive.writestr("labels.npy", fuzzing.npy_header("|u1", (1000,)) + bytes(1000))
        archive.writestr("images.npy", images)
    return folder / "mine.npz"


def test_what_is_longer_than_its_header_or_archive_says_costs_no_memory(tmp_path):
    """BZIP2 and LZMA are unpacked by whole blocks: a hundred kilobytes to hundreds of megabytes."""
    (tmp_path / "mine.npz").write_bytes(b"PK")
    _refused(tmp_path / "mine.npz", "is not an .npz file, or it is truncated")
    bomb = fuzzing.npy_header("|u1", (1000, 8, 8, 3)) + bytes(192_000)
    data = bytearray(_zip(tmp_path, bomb + bytes(3 * 10**7), zipfile.ZIP_LZMA).read_bytes())
    # Both places that say how long the images are.
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.rindex(mark) + place
        data[start : start + 4] = struct.pack("<I", len(bomb))
    (tmp_path / "mine.npz").write_bytes(data)
    tracemalloc.start()
    _refused(tmp_path / "mine.npz", "images is compressed in a way that NumPy never uses")
    promises = [fuzzing.npy_header("|u1", (length, 1000, 1000, 3)) for length in (10**6, -1, 2**70)]
    for content in (*promises, b"some text", b"\x93NUMPY\x07\x00"):
        _refused(_zip(tmp_path, content + bytes(100)), "mine.npz: images is damaged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_what_would_not_fit_the_memory_once_resized_is_refused(tmp_path, monkeypatch):
    path = _npz(tmp_path)
    monkeypatch.setattr(checks, "memory", lambda: 100 * IMAGES.size)
    _refused(path, "mine.npz at 4096×4096 would take .* GiB", image_size=4096)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/mine.npz", "a" * 5000, "mine\0.npz", "\ud800.npz"])
@pytest.mark.parametrize("key", ["name", "data_dir", "manual_dir"])
def test_what_no_file_can_be_called_is_refused(key, name):
    with pytest.raises(UserError, match=f"config.data.{key} .* cannot be a path") as caught:
        datasets.load(Data(**{"name": "cifar10", key: name}))
    assert len(str(caught.value)) < 250


def _write(folder, images, labels, names="abc"):
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{row:03}.png")


@pytest.mark.parametrize("names", [("a", "b", "c"), ("bicycle", "car", "train")])
def test_a_folder_of_class_folders_is_read_exactly(tmp_path, names):
    _write(tmp_path, IMAGES, LABELS, names)
    dataset = _load(tmp_path)
    assert (dataset.class_names, _sizes(dataset)) == (names, (48, 6, 6))
    assert _all(dataset) == _pairs((IMAGES, LABELS))


def test_grey_pictures_stay_grey_and_among_colours_become_them_and_transparent_is_black(tmp_path):
    _write(tmp_path, IMAGES[..., 0], LABELS)
    assert _load(tmp_path).image_shape == (SIDE, SIDE, 1)
    Image.fromarray(IMAGES[0]).save(tmp_path / "a" / "colour.bmp")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "a" / "clear.png")
    dataset = _load(tmp_path)
    assert dataset.image_shape == (SIDE, SIDE, 3)
    assert {(IMAGES[0].tobytes(), 0), (bytes(8 * 8 * 3), 0)} <= _all(dataset)


def test_pictures_of_several_sizes_are_cut_to_the_square_and_resized(tmp_path):
    _write(tmp_path, IMAGES, LABELS)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    _refused(tmp_path, r"wide.png is 24×8 and .*000.png 8×8; .* need --config.data.image_size=N")
    dataset = _load(tmp_path, image_size=4)
    assert dataset.image_shape == (4, 4, 3)
    brightest = max(split.images.mean((1, 2, 3)).max() for split in (dataset.train, dataset.validation, dataset.test))
    assert brightest > 240


def _flatten(folder):
    for picture in list(folder.rglob("*.png")):
        picture.rename(folder / f"{picture.parent.name}{picture.name}")
    for name in "abc":
        (folder / name).rmdir()


def _nest(folder):
    (folder / "a").rename(folder / "images")
    (folder / "a").mkdir()
    (folder / "images").rename(folder / "a" / "images")


def _add_part(folder):
    _write(folder / "train", IMAGES, LABELS)
    _write(folder / "test", IMAGES, LABELS, names="abd")
    for name in "abc":
        (folder / name).rename(folder.parent / name)


def _png_header(width, height):
    packed = io.BytesIO()
    Image.new("L", (1, 1)).save(packed, "png")
    plain = packed.getvalue()
    header = plain[12:16] + struct.pack(">II", width, height) + plain[24:29]
    return plain[:12] + header + struct.pack(">I", zlib.crc32(header)) + plain[33:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: os.truncate(f / "a/000.png", 100), r"a/000.png cannot be read as an image"),
        (lambda f: Image.fromarray(np.zeros((8, 8), np.uint16)).save(f / "a/000.png"),
         r"a/000.png has pixels of kind 'I;16'; images must have 8 bits"),
        (lambda f: (f / "a/000.png").write_bytes(_png_header(10_000, 10_000)),
         r"a/000.png cannot be read as an image: Image size \(100000000 pixels\) exceeds limit"),
        (lambda f: (f / "b").rename(f / NO_TEXT), r"'caf\\udce9' is no Unicode text"),
        (lambda f: (f / "d").mkdir(), r"class folder .*/d holds no images"),
        (lambda f: [(f / name).rename(f.parent / name) for name in "bc"], r"has 1 class; at least 2 are needed"),
        (_flatten, r"holds no class folders"),
        (_add_part, r"test/d is a class that train does not have; there are: a, b, c"),
        (_nest, r"class folder .*/a holds the folder 'images' and no images itself; .*mine must hold"),
    ],
)  # fmt: skip
def test_a_wrong_folder_or_file_is_named(tmp_path, spoil, words):
    folder = tmp_path / "mine"
    _write(folder, IMAGES, LABELS)
    spoil(folder)
    _refused(folder, words)


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        (("Training", "VALID", "Testing"), (60, 6, 9)),
        (("TRAIN", "validation"), (54, 6, 6)),
        (("imagesTrain", "dev-data", "seg_testing"), (60, 6, 9)),
        (("training_set", "Evaluation"), (54, 6, 6)),
    ],
)
def test_parts_by_their_usual_names(tmp_path, folders, sizes):
    for folder, count in zip(folders, (60, 6, 9), strict=False):
        _write(tmp_path / folder, IMAGES[:count], LABELS[:count])
    (tmp_path / "lost+found").mkdir()
    dataset = _load(tmp_path)
    assert _sizes(dataset) == sizes
    if folders[-1] != "validation":
        assert _pairs((dataset.test.images, dataset.test.labels)) == _pairs((IMAGES[: sizes[2]], LABELS[: sizes[2]]))
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "valid").mkdir(exist_ok=True)
    _refused(tmp_path, "which are one part; keep one of them")


def test_folders_beside_parts_are_named(tmp_path, capsys):
    _write(tmp_path / "train", IMAGES, LABELS)
    (tmp_path / "annotations" / "xml").mkdir(parents=True)
    (tmp_path / "annotations" / "all.json").write_text("{}")
    assert len(_load(tmp_path).train) == 48
    assert "not read: annotations" in capsys.readouterr().err
    _write(tmp_path / "extra", IMAGES, LABELS)
    _refused(tmp_path, "holds 'extra' beside train")


@pytest.mark.parametrize("kind", ["avif", "bmp", "gif", "jpe", "jp2", "pcx", "pnm", "qoi", "sgi", "tga", "tif", ""])
def test_every_suffix_of_plain_pictures_is_read(tmp_path, kind):
    formats = {"": "PNG", **{suffix[1:]: name for suffix, name in Image.registered_extensions().items()}}
    if formats[kind] not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {formats[kind]}")
    _write(tmp_path, IMAGES[:59], LABELS[:59])
    Image.fromarray(IMAGES[59]).save(tmp_path / "c" / (f"last.{kind}" if kind else "last"), format=formats[kind])
    dataset = _load(tmp_path)
    assert sum(_sizes(dataset)) == 60


def test_what_is_left_out_is_counted(tmp_path, capsys):
    _write(tmp_path, IMAGES, LABELS)
    (tmp_path / "a" / "x.heic").write_bytes(b"ftypheic")
    (tmp_path / "b" / "deep").mkdir()
    for name in ("b/deep/y.png", "labels.csv", "b/.DS_Store", "c/Thumbs.db", "c/z.heic", "c/plain"):
        (tmp_path / name).write_text("no image")
    _load(tmp_path)
    said = capsys.readouterr().err
    assert "5 files are left out: 2 .heic, 1 .csv, 1 in deeper folders, 1 without suffix" in said


@pytest.mark.parametrize(("kind", "turn"), [("png", 3), ("tif", 6), ("webp", 8), ("tif", 3)])
def test_a_turned_picture_is_read_upright_in_every_format(tmp_path, kind, turn):
    _write(tmp_path, IMAGES[:, :4], LABELS)
    exif = Image.Exif()
    exif[0x0112] = turn
    tall = IMAGES[0] if turn == 3 else IMAGES[0, :, :4]
    stored = tall[:4] if turn == 3 else tall
    how = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(stored).save(tmp_path / "a" / f"turned.{kind}", exif=exif, **how)
    # How often np.rot90 turns what is stored, counterclockwise.
    upright = np.rot90(stored, {3: 2, 6: -1, 8: 1}[turn])
    assert (upright.tobytes(), 0) in _all(_load(tmp_path))


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ("x_train y_train x_test y_test", "Rename x_test to test_images, x_train to images, y_test to test_labels"),
        ("x_train labels", r"no key 'images'; there are: labels, x_train. It must hold images \[N, H, W\]"),
        ("arr_0 arr_1", "Rename arr_0 to images, arr_1 to labels"),
        ("tr_img tr_lbl images_te labels_te", "Rename images_te to test_images, labels_te to test_labels, tr_img"),
    ],
)
def test_keys_of_others_are_recognised(tmp_path, keys, hint):
    arrays = (IMAGES, LABELS) * 2
    np.savez(tmp_path / "mine.npz", **dict(zip(keys.split(), arrays, strict=False)))
    _refused(tmp_path / "mine.npz", hint)
