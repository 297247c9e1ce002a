"""Files from outside, broken in any way: read as what they are or refused in one line, and nothing in them is run."""

import functools
import io
import os
import zipfile

import fuzzing
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jem_jax import datasets, torch_import
from jem_jax.common.errors import UserError
from jem_jax.config import Data
from jem_jax.datasets import checks


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    """What would take more than a megabyte counts as too large."""
    monkeypatch.setattr(checks, "memory", lambda: 2**20)


@st.composite
def _damages(draw):
    """A function that spoils bytes: cuts them, changes some, or puts others in their place."""
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "replace"]))
    place, junk = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=64))

    def damage(data):
        start = int(place * len(data))
        flipped = bytes([data[start] ^ (junk[0] or 1)])
        return {
            "cut": data[:start],
            "flip": data[:start] + flipped + data[start + 1 :],
            "overwrite": data[:start] + junk + data[start + len(junk) :],
            "replace": junk,
        }[kind]

    return damage


def _loaded_or_refused(path, load=lambda path: datasets.load(Data(name=str(path)))):
    """The data set, or None where it was refused in one line that names the file."""
    try:
        return load(path)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert str(path) in said
    return None


# ---- .npz

LABELS = np.arange(30) % 3
GREY = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
dtypes = st.sampled_from(["|u1", "<U0", "|i1", "<f4", "<f8", "<U3", "|O", "|V4", "|b1", "<c8", ">i8", "|S2", "<M8[s]"])
lengths = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**40, 2**63, 10**30]))


def _npz(path, **arrays):
    np.savez_compressed(path, **{"images": GREY, "labels": LABELS, **arrays})
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two .npz files, by whether they are compressed, and the data set that both hold."""
    folder = tmp_path_factory.mktemp("whole")
    files = {False: folder / "plain.npz", True: folder / "compressed.npz"}
    for compressed, file in files.items():
        save = np.savez_compressed if compressed else np.savez
        save(file, images=GREY, labels=LABELS, class_names=np.array(list("abc")))
    return {compressed: file.read_bytes() for compressed, file in files.items()}, datasets.load(Data(str(files[True])))


@fuzzing.examples(300)
@given(_damages(), st.booleans())
def test_a_damaged_npz(tmp_path, whole, damage, compressed):
    path = tmp_path / "mine.npz"
    path.write_bytes(damage(whole[0][compressed]))
    found = _loaded_or_refused(path)
    if found is not None:
        np.testing.assert_array_equal(found.train.images, whole[1].train.images)
        np.testing.assert_array_equal(found.train.labels, whole[1].train.labels)


def test_an_npz_with_a_changed_byte_in_a_header(tmp_path, whole):
    # NumPy hands a header to Python's own parser.
    path, content = tmp_path / "mine.npz", whole[0][False]
    start = content.index(b"\x93NUMPY")
    for place in range(start + 6, start + 140):
        for junk in (b"(", b"\n", b"\xff"):
            path.write_bytes(content[:place] + junk + content[place + 1 :])
            _loaded_or_refused(path)


@fuzzing.examples(150)
@given(dtypes, st.lists(lengths, max_size=5), st.sampled_from(["images", "labels", "class_names"]), st.binary())
def test_an_npz_with_any_header(tmp_path, whole, dtype, shape, key, content):
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(io.BytesIO(whole[0][True])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"{key}.npy"] = fuzzing.npy_header(dtype, tuple(shape)) + content
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert _loaded_or_refused(path) is None


@pytest.mark.parametrize("key", ["images", "labels", "class_names", "test_images", "test_labels", "weights"])
def test_an_object_in_an_npz_is_never_unpickled(tmp_path, key):
    trap = tmp_path / "trap"
    arrays = {"test_images": GREY, "test_labels": LABELS, key: np.array([fuzzing.Trap(trap)])}
    path = _npz(tmp_path / "mine.npz", **arrays)
    # Keys of others are not read at all.
    assert (_loaded_or_refused(path) is None) == (key != "weights")
    assert not trap.exists()


@fuzzing.examples(150)
@given(_damages(), st.sampled_from(["png", "gif", "bmp", "jpeg", "tiff", "webp", "pgm"]))
def test_a_damaged_picture(tmp_path, damage, kind):
    folder = tmp_path / "mine"
    if not folder.exists():
        _folder(folder)
    packed = io.BytesIO()
    Image.fromarray(GREY[12]).save(packed, "ppm" if kind == "pgm" else kind)
    (folder / "a" / f"99.{kind}").write_bytes(damage(packed.getvalue()))
    found = _loaded_or_refused(folder)
    (folder / "a" / f"99.{kind}").unlink()
    # Such formats hold no checksums, so that a changed pixel goes unnoticed; the others' pictures stay what they were.
    if found is not None:
        assert len(found.train) + len(found.validation) + len(found.test) == 13


def _folder(path, images=GREY[:12]):
    for number, image in enumerate(images):
        place = path / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:02}.png")
    return path


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: file.write_bytes(PROGRAM), r"x\.png cannot be read as an image: cannot identify"),
        (os.mkfifo, r"x\.png cannot be read: it is not a file"),
        (lambda file: file.symlink_to("nowhere"), r"x\.png cannot be read: No such file"),
        (lambda file: Image.new("L", (300, 300)).save(file), r"x\.png of 300×300, while it is read, would take"),
    ],
    ids=["a program", "a pipe", "a dead link", "many pixels"],
)
def test_what_is_no_picture_is_neither_run_nor_waited_for(tmp_path, monkeypatch, make, words):
    folder = _folder(tmp_path / "mine")
    make(folder / "a" / "x.png")
    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(f"subprocess.{name}", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UserError, match=words):
        datasets.load(Data(name=str(folder), image_size=8))


def test_parts_that_do_not_fit_the_memory_together(tmp_path, monkeypatch):
    folder = _folder(tmp_path / "mine" / "train")
    _folder(tmp_path / "mine" / "test")
    monkeypatch.setattr(checks, "memory", lambda: 2 * 24 * 64 - 1)
    with pytest.raises(UserError, match=r"24 images of 8×8 would take"):
        datasets.load(Data(name=str(folder.parent)))
    # 30 images and labels, twice.
    monkeypatch.setattr(checks, "memory", lambda: 2 * 30 * (64 + 8))
    path = _npz(tmp_path / "mine.npz")
    assert _loaded_or_refused(path) is not None
    assert _loaded_or_refused(_npz(path, test_images=GREY, test_labels=LABELS)) is None


@functools.cache
def _checkpoint(legacy):
    torch = pytest.importorskip("torch")
    content = {
        "model_state_dict": {"f.conv1.weight": torch.zeros(16, 1, 3, 3)},
        "replay_buffer": torch.zeros(2, 1, 4, 4),
    }
    packed = io.BytesIO()
    torch.save(content, packed, _use_new_zipfile_serialization=not legacy)
    return packed.getvalue()


@pytest.mark.torch
@fuzzing.examples(150)
@given(_damages(), st.booleans())
def test_a_damaged_checkpoint(tmp_path, damage, legacy):
    path = tmp_path / "mine.pt"
    path.write_bytes(damage(_checkpoint(legacy)))
    found = _loaded_or_refused(path, torch_import.read_checkpoint)
    if found is not None:
        state, buffer = found
        arrays = [*state.values(), *([] if buffer is None else [buffer])]
        assert all(type(array) is np.ndarray and array.dtype != object for array in arrays)
        # The whole file has 176 numbers.
        assert sum(array.size for array in arrays) <= 176


@pytest.mark.torch
def test_a_checkpoint_that_would_fill_the_memory(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "mine.pt"
    torch.save({"model_state_dict": {"class_output.weight": torch.zeros(1).expand(10**12, 64)}}, path)
    assert _loaded_or_refused(path, torch_import.read_checkpoint) is None
    torch.save({"model_state_dict": {"f.conv1.weight": torch.zeros(10**6)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=r"is compressed, and torch\.save never compresses"):
        torch_import.read_checkpoint(path)


@pytest.mark.torch
def test_many_tensors_over_the_same_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    path, shared = tmp_path / "mine.pt", torch.zeros(100_000, dtype=torch.bfloat16)
    torch.save({"model_state_dict": {f"f.layer{number}": shared for number in range(1000)}}, path)
    with pytest.raises(UserError, match="holds the same numbers many times over"):
        torch_import.read_checkpoint(path)
