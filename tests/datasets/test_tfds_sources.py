"""Data sets that are fetched: what comes is checked, prepared once, kept, and never trusted blindly."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import socket
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from jem_jax import datasets
from jem_jax.common.errors import UserError
from jem_jax.config import Data
from jem_jax.datasets import download, prepared
from jem_jax.datasets.archives import CIFAR10
from jem_jax.datasets.held_out import official_order
from jem_jax.datasets.sources import SOURCES, Archive, Source

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def _no_tensorflow_and_no_proxy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `manner` says how badly."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.manner, self.requests = {}, "well", []
        self.go_on = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.archive = self.add("some.tar.gz", CONTENT)

    def add(self, name, content):
        self.files[f"/{name}"] = content
        return Archive(f"{self.address}/{name}", len(content), hashlib.sha256(content).hexdigest())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        manner, wanted = self.server.manner, self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None or manner == "missing":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and manner != "no ranges" else 0
        self.send_response(206 if start else 200)
        body = content[start:]
        bodies = {"truncated": body[:1000], "wrong": bytes(len(body)), "endless": body + bytes(10_000)}
        body = bodies.get(manner, body)
        if manner != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if manner in ("cut", "stalled") else body)
        if manner == "stalled":
            self.server.go_on.wait(10)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


def _refused(archive, path):
    """The one line that says why an archive is not there, and what to do."""
    with pytest.raises(UserError) as caught:
        download.fetch(archive, path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert "config.data.manual_dir=DIR" in line
    assert not path.exists()
    return line


@pytest.mark.parametrize(
    ("bad", "words", "good", "asked"),
    [
        ([], "", "well", None),
        (["cut"], "after 150,000 of 300,000 bytes", "well", "bytes=150000-"),
        (["stalled"], "after 150,000 of 300,000 bytes", "well", "bytes=150000-"),
        (["cut"], "after 150,000 of 300,000 bytes", "no ranges", "bytes=150000-"),
        # A rest that does not fit the beginning.
        (["cut", "wrong"], "SHA-256", "well", None),
        (["truncated"], "1,000 bytes there instead of 300,000", "well", None),
        (["wrong"], "not the file expected and was deleted, its SHA-256", "well", None),
        (["endless"], "not the file expected and was deleted, it has 300,001 bytes", "well", None),
        (["missing"], "answered 404", "well", None),
    ],
)
def test_a_download_is_right_or_one_line_and_goes_on_where_it_was_cut(
    server, tmp_path, monkeypatch, bad, words, good, asked
):
    monkeypatch.setattr(download, "_STALLED_SECONDS", 0.1)
    archive, path, line = server.archive, tmp_path / "downloads" / "some.tar.gz", ""
    for server.manner in bad:
        line = _refused(archive, path)
    assert words in line
    # Nothing is kept of what is not the archive.
    assert not path.parent.exists() or (asked is None) == (list(path.parent.iterdir()) == [])
    server.manner = good
    # Damaged since, it is fetched again.
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT[:-1] + b"?")
    for _ in range(2):
        assert download.fetch(archive, path) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.requests[len(bad) :] == [("/some.tar.gz", asked)]


def test_a_server_or_a_place_that_is_out_of_reach_is_one_line(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/some.tar.gz"
    line = _refused(dataclasses.replace(server.archive, address=address), tmp_path / "some.tar.gz")
    assert "this machine is offline or cannot reach 127.0.0.1" in line
    assert "refused" in line
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*config.data.data_dir"):
        download.fetch(server.archive, tmp_path / "file" / "some.tar.gz")


@pytest.mark.parametrize("folder", [".", "tiny"])
def test_archives_fetched_by_hand_are_found_by_their_names_and_checked(tmp_path, folder):
    archive = Archive("http://127.0.0.1:9/some.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    source, path = Source("tiny", CIFAR10, (archive,)), tmp_path / folder / "some.tar.gz"
    with pytest.raises(UserError, match=r"holds no some.tar.gz, which tiny needs; fetch it from http"):
        download.obtain(source, tmp_path / "unused", tmp_path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match=r"some.tar.gz is not the some.tar.gz of tiny: its SHA-256 is"):
        download.obtain(source, tmp_path / "unused", tmp_path)
    path.write_bytes(CONTENT)
    assert download.obtain(source, tmp_path / "unused", tmp_path) == [path]
    assert not (tmp_path / "unused").exists()


def _tar(folder, files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _records(images, *labels):
    columns = [label.astype(np.uint8)[:, None] for label in labels]
    return np.concatenate([*columns, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1).tobytes()


def _cifar10(train, test):
    names = "airplane automobile bird cat deer dog frog horse ship truck\n".replace(" ", "\n") + "\n"
    parts = [np.array_split(array, 5) for array in train]
    files = {f"data_batch_{i + 1}.bin": _records(x, y) for i, (x, y) in enumerate(zip(*parts, strict=True))}
    files |= {"test_batch.bin": _records(*test), "batches.meta.txt": names.encode(), "readme.html": b"<html>"}
    return {"cifar-10-binary.tar.gz": _tar("cifar-10-batches-bin", files)}


def _cifar100(train, test):
    def records(images, labels):
        return _records(images, labels // 5, labels)

    names = "".join(f"fine {i}\n" for i in range(100)).encode()
    files = {"train.bin": records(*train), "test.bin": records(*test), "fine_label_names.txt": names}
    return {"cifar-100-binary.tar.gz": _tar("cifar-100-binary", files)}


def _svhn(train, test):
    def mat(images, labels):
        packed = io.BytesIO()
        numbers = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(packed, {"X": images.transpose(1, 2, 3, 0), "y": numbers}, do_compression=True)
        return packed.getvalue()

    return {"train_32x32.mat": mat(*train), "test_32x32.mat": mat(*test)}


def _mnist(train, test):
    def idx(array):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        return gzip.compress(head + array.astype(np.uint8).tobytes())

    return {
        f"{name}-{what}-idx{dimensions}-ubyte.gz": idx(array)
        for name, split in (("train", train), ("t10k", test))
        for what, dimensions, array in (("images", 3, split[0][..., 0]), ("labels", 1, split[1]))
    }


TRAIN, VALIDATION, TEST = 40, 8, 20
KINDS = {
    "cifar10": (_cifar10, (32, 32, 3), 10),
    "cifar100": (_cifar100, (32, 32, 3), 100),
    "svhn_cropped": (_svhn, (32, 32, 3), 10),
    "mnist": (_mnist, (28, 28, 1), 10),
    "fashion_mnist": (_mnist, (28, 28, 1), 10),
}


def _make(server, name, seed=0):
    """A tiny data set in the layout of an official one, on the local server: its source, and images with labels."""
    layout, shape, classes = KINDS[name]
    random = np.random.default_rng(seed)
    train, test = (
        (random.integers(0, 256, (count, *shape), dtype=np.uint8), random.integers(0, classes, count))
        for count in (TRAIN, TEST)
    )
    served = {file: server.add(file, content) for file, content in layout(train, test).items()}
    # The shipped source, but for the addresses, sizes and checksums of the tiny archives.
    archived = tuple(served[archive.name] for archive in SOURCES[name].archives)
    return dataclasses.replace(SOURCES[name], archives=archived, num_validation=VALIDATION), train, test


@pytest.mark.parametrize("name", KINDS)
def test_every_official_layout_is_read_exactly_and_needs_no_tensorflow(server, tmp_path, name):
    source, train, test = _make(server, name)
    dataset = prepared.load(source, tmp_path)
    held_out, rest = np.split(official_order(TRAIN), [VALIDATION])
    splits = ((dataset.train, train, rest), (dataset.validation, train, held_out))
    for split, (images, labels), rows in (*splits, (dataset.test, test, np.arange(TEST))):
        np.testing.assert_array_equal(split.images, images[rows])
        np.testing.assert_array_equal(split.labels, labels[rows])
    assert dataset.num_classes == KINDS[name][2]
    ninth = {"cifar10": "truck", "cifar100": "fine 9", "fashion_mnist": "Ankle boot"}.get(name, "9")
    assert dataset.class_names[9] == ninth
    assert "tensorflow" not in sys.modules


def test_the_official_order_is_numpys_legacy_shuffle_under_seed_1234():
    rows = list(range(50_000))
    np.random.RandomState(1234).shuffle(rows)
    np.testing.assert_array_equal(official_order(50_000), rows)


def _flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def test_two_at_once_prepare_a_set_once_and_later_it_needs_no_network_and_plain_tfds_reads_it(server, tmp_path):
    source, _, test = _make(server, "cifar10")
    interrupted = source.folder(tmp_path).parent / f"incomplete.ABC_{source.version}"
    interrupted.mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        both = set(pool.map(lambda _: prepared.load(source, tmp_path).fingerprint, range(2)))
    assert not interrupted.exists()
    assert both == {prepared.load(source, tmp_path, tmp_path / "there is no such folder").fingerprint}
    assert len(server.requests) == 1
    examples = tfds.data_source("jem_jax/cifar10", split="test", data_dir=tmp_path, download=False)
    np.testing.assert_array_equal(examples[3]["image"], test[0][3])


def test_damaged_files_are_not_trusted_and_made_again_where_that_can_be(server, tmp_path):
    source, _, _ = _make(server, "mnist")
    before, missing = prepared.load(source, tmp_path).fingerprint, tmp_path / "there is no such folder"
    for pattern in ("*.array_record*", "dataset_info.json"):
        files = sorted(source.folder(tmp_path).glob(pattern))
        for path in files:
            _flip(path)
        with pytest.raises(UserError, match="manual_dir"):
            prepared.load(source, tmp_path, missing)
        assert sorted(source.folder(tmp_path).glob(pattern)) == files
        for manual_dir in (None, missing):
            assert prepared.load(source, tmp_path, manual_dir).fingerprint == before


def test_what_was_prepared_from_other_archives_is_not_taken_for_these(server, tmp_path):
    prepared.load(_make(server, "mnist", seed=0)[0], tmp_path)
    source, _, test = _make(server, "mnist", seed=10)
    np.testing.assert_array_equal(prepared.load(source, tmp_path).test.images, test[0])
    with pytest.raises(UserError, match="not in the layout expected"):
        prepared.load(dataclasses.replace(source, archives=source.archives[::-1]), tmp_path)


def test_the_shipped_sources_are_those_of_tensorflow_datasets():
    root = Path(tfds.__file__).parent
    files = [*(root / "url_checksums").glob("*mnist.txt"), *(root / "url_checksums").glob("cifar10*.txt")]
    files.append(root / "datasets" / "svhn_cropped" / "checksums.tsv")
    known = {tuple(line.split("\t")[:3]) for file in files for line in file.read_text().splitlines()}
    shipped = {(a.address, str(a.size), a.sha256) for source in SOURCES.values() for a in source.archives}
    assert shipped <= known
    assert set(SOURCES) == set(KINDS)


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Colour PNGs of two classes; the configs say what is peculiar."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name) for name in ("plain", "sizes", "splits", "empty_class", "needs_tensorflow")
    ]
    COUNT = 20

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["dark", "light"]),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        names = ("train", "validation", "test") if self.builder_config.name == "splits" else ("train",)
        return {name: self._generate_examples() for name in names}

    def _generate_examples(self):
        kind = self.builder_config.name
        if kind == "needs_tensorflow":
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        for row in range(self.COUNT):
            label = 0 if kind == "empty_class" else row % 2
            side = 8 + 4 * (row % 3) if kind == "sizes" else 8
            picture = Image.new("RGB", (side, side), (200 * label, row, 0))
            yield row, {"image": picture, "label": label, "id": str(row)}


def _named(tmp_path, name, **settings):
    return datasets.load(Data(name=f"tfds:{name}", data_dir=str(tmp_path), **settings))


def test_a_tfds_set_is_read_by_name_with_its_own_splits_or_a_tenth_held_out_for_each(tmp_path):
    dataset = _named(tmp_path, "tiny_pictures/plain")
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split) for split in splits] == [16, 2, 2]
    assert (dataset.class_names, dataset.image_shape) == (("dark", "light"), (8, 8, 3))
    for split in splits:
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] == 200, split.labels == 1)
    assert sorted(np.concatenate([split.images[:, 0, 0, 1] for split in splits])) == list(range(20))
    own = _named(tmp_path, "tiny_pictures/splits")
    assert (len(own.train), len(own.validation), len(own.test)) == (20, 20, 20)
    resized = _named(tmp_path, "tiny_pictures/sizes", image_size=16)
    assert resized.image_shape == (16, 16, 3)
    np.testing.assert_array_equal(resized.train.images[:, 7, 7, 0] == 200, resized.train.labels == 1)


def test_a_tfds_set_is_decoded_once_and_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    before = _named(tmp_path, "tiny_pictures/plain").fingerprint
    (cached,) = (tmp_path / "jem_jax" / "tfds").rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        kept = cached.rename(tmp_path / "kept")
        assert _named(tmp_path, "tiny_pictures/plain").fingerprint == before
        assert not cached.exists()
    kept.rename(cached)
    for shard in (tmp_path / "tiny_pictures").rglob("*.array_record*"):
        _flip(shard)
    assert _named(tmp_path, "tiny_pictures/plain").fingerprint == before
    _flip(cached)
    with pytest.raises(UserError, match=r"is damaged: .*delete that folder"):
        _named(tmp_path, "tiny_pictures/plain")
    (info,) = (tmp_path / "tiny_pictures").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"tfds:tiny_pictures/plain.*format that only TensorFlow reads"):
        _named(tmp_path, "tiny_pictures/plain")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cifar-10"}, "'cifar-10' is not a data set; did you mean cifar10\\? There are digits"),
        ({"name": "KMNIST"}, "did you mean tfds:kmnist"),
        ({"name": "zebras"}, "there are digits, cifar10, cifar100, svhn_cropped, mnist, fashion_mnist, tfds:NAME"),
        ({"name": "mine.npz"}, "config.data.name 'mine.npz': there is no such file or folder"),
        ({"name": __file__}, "must be an .npz file or a folder"),
        ({"name": "digits", "image_size": 10}, "image_size must be a multiple of 4, not 10"),
        ({"name": "tfds:kmnst"}, "no set of that name.*near it: .*tfds:kmnist"),
        ({"name": "tfds:penguins"}, "not for classifying images.*has species"),
        ({"name": "tfds:tiny_pictures/sizes"}, r"image 1 is 12×12 and image 0 8×8; .*image_size"),
        ({"name": "tfds:tiny_pictures/empty_class"}, "no image of class 1 \\(light\\)"),
        ({"name": "tfds:tiny_pictures/needs_tensorflow"}, "pip install tensorflow"),
        ({"name": "tfds:kmnist"}, "not prepared in .*pip install tensorflow"),
        ({"name": "tfds:mnist"}, "pip install tensorflow.*--config.data.name=mnist"),
        ({"name": "tfds:tiny_pictures/there_is_none"}, "tfds:tiny_pictures/there_is_none"),
    ],
)
def test_a_set_that_cannot_be_had_is_one_line_that_says_what_there_is(tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        datasets.load(Data(data_dir=str(tmp_path), **settings))
    assert "\n" not in str(caught.value)
