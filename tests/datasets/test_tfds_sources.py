"""Data sets that are fetched: what comes is checked, prepared once, kept, and never trusted blindly."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import socket
import subprocess
import sys
import tarfile
import threading
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
from jem_jax.main import main

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
        start = 0
        if wanted and manner != "no ranges":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        if manner == "truncated":
            body = body[:1000]
        if manner == "wrong":
            body = bytes(len(body))
        if manner == "endless":
            body += bytes(10_000)
        else:
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


@pytest.fixture
def archive(server):
    return server.add("some.tar.gz", CONTENT)


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


def test_a_whole_download_is_kept_under_its_name_and_not_fetched_again(server, archive, tmp_path):
    path = tmp_path / "downloads" / archive.name
    assert download.fetch(archive, path) == path
    download.fetch(archive, path)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert len(server.requests) == 1


@pytest.mark.parametrize("manner", ["cut", "stalled"])
def test_a_download_that_is_cut_off_says_where_and_goes_on_there(monkeypatch, server, archive, tmp_path, manner):
    monkeypatch.setattr(download, "_STALLED_SECONDS", 0.2)
    path = tmp_path / archive.name
    server.manner = manner
    assert "after 150,000 of 300,000 bytes" in _refused(archive, path)
    server.manner = "well"
    download.fetch(archive, path)
    assert path.read_bytes() == CONTENT
    assert server.requests[-1] == ("/some.tar.gz", "bytes=150000-")


def test_a_server_that_cannot_go_on_starts_anew(server, archive, tmp_path):
    path = tmp_path / archive.name
    server.manner = "cut"
    _refused(archive, path)
    server.manner = "no ranges"
    download.fetch(archive, path)
    assert path.read_bytes() == CONTENT


def test_a_rest_that_does_not_fit_the_beginning_is_noticed_and_the_next_try_starts_anew(server, archive, tmp_path):
    path = tmp_path / archive.name
    server.manner = "cut"
    _refused(archive, path)
    server.manner = "wrong"
    assert "SHA-256" in _refused(archive, path)
    server.manner = "well"
    download.fetch(archive, path)
    assert path.read_bytes() == CONTENT
    assert server.requests[-1] == ("/some.tar.gz", None)


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("truncated", "1,000 bytes there instead of 300,000"),
        ("wrong", "not the file expected and was deleted, its SHA-256"),
        ("endless", "not the file expected and was deleted, it has 300,001 bytes"),
        ("missing", "answered 404"),
    ],
)
def test_what_is_not_the_archive_is_refused_and_nothing_of_it_is_kept(server, archive, tmp_path, manner, words):
    path = tmp_path / archive.name
    server.manner = manner
    assert words in _refused(archive, path)
    assert list(tmp_path.iterdir()) == []
    server.manner = "well"
    assert download.fetch(archive, path).read_bytes() == CONTENT


def test_a_refused_connection_is_one_line(server, archive, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/some.tar.gz"
    line = _refused(dataclasses.replace(archive, address=address), tmp_path / archive.name)
    assert "cannot reach 127.0.0.1" in line
    assert "refused" in line


def test_a_machine_that_is_offline_is_one_line(monkeypatch, archive, tmp_path):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    line = _refused(dataclasses.replace(archive, address="http://host.test/some.tar.gz"), tmp_path / archive.name)
    assert "offline or cannot reach host.test (Name or service not known)" in line


def test_a_damaged_archive_is_fetched_again(server, archive, tmp_path):
    path = tmp_path / archive.name
    path.write_bytes(CONTENT[:-1] + b"?")
    assert download.fetch(archive, path).read_bytes() == CONTENT


def test_a_place_that_cannot_be_written_is_one_line(archive, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*config.data.data_dir"):
        download.fetch(archive, tmp_path / "file" / archive.name)


@pytest.mark.parametrize("folder", [".", "tiny"])
def test_archives_fetched_by_hand_are_found_by_their_names(tmp_path, folder):
    archive = Archive("http://127.0.0.1:9/some.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "some.tar.gz").write_bytes(CONTENT)
    source = Source("tiny", CIFAR10, (archive,))
    assert download.obtain(source, tmp_path / "unused", tmp_path) == [tmp_path / folder / "some.tar.gz"]
    assert not (tmp_path / "unused").exists()


def test_archives_fetched_by_hand_are_checked_too(tmp_path):
    archive = Archive("http://127.0.0.1:9/some.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    source = Source("tiny", CIFAR10, (archive,))
    with pytest.raises(UserError, match=r"holds no some.tar.gz, which tiny needs; fetch it from http"):
        download.obtain(source, tmp_path / "unused", tmp_path)
    (tmp_path / "some.tar.gz").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match=r"some.tar.gz is not the some.tar.gz of tiny: its SHA-256 is"):
        download.obtain(source, tmp_path / "unused", tmp_path)


# ---- layouts


def _images(count, shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


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


@dataclasses.dataclass
class Made:
    """A tiny data set in the layout of an official one, on the local server."""

    source: Source
    archives: dict[str, bytes]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def _make(server, name, seed=0):
    layout, shape, classes = KINDS[name]
    parts = [
        (_images(count, shape, seed + i), np.random.default_rng(seed + i).integers(0, classes, count))
        for i, count in enumerate((TRAIN, TEST))
    ]
    archives = layout(*parts)
    served = {file: server.add(file, content) for file, content in archives.items()}
    # The shipped source, but for the addresses, sizes and checksums of the tiny archives.
    archived = tuple(served[archive.name] for archive in SOURCES[name].archives)
    source = dataclasses.replace(SOURCES[name], archives=archived, num_validation=VALIDATION)
    return Made(source, archives, *parts)


@pytest.mark.parametrize("name", KINDS)
def test_every_official_layout_is_read_exactly_and_needs_no_tensorflow(server, tmp_path, name):
    made = _make(server, name)
    dataset = prepared.load(made.source, tmp_path)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (TRAIN - VALIDATION, VALIDATION, TEST)
    order = official_order(TRAIN)
    for split, rows in ((dataset.validation, order[:VALIDATION]), (dataset.train, order[VALIDATION:])):
        np.testing.assert_array_equal(split.images, made.train[0][rows])
        np.testing.assert_array_equal(split.labels, made.train[1][rows])
    np.testing.assert_array_equal(dataset.test.images, made.test[0])
    np.testing.assert_array_equal(dataset.test.labels, made.test[1])
    assert dataset.num_classes == KINDS[name][2]
    assert "tensorflow" not in sys.modules
    assert dataset.class_names[9] == {"cifar10": "truck", "cifar100": "fine 9", "fashion_mnist": "Ankle boot"}.get(
        name, "9"
    )


def test_the_official_order_is_numpys_legacy_shuffle_under_seed_1234():
    rows = list(range(50_000))
    np.random.RandomState(1234).shuffle(rows)
    np.testing.assert_array_equal(official_order(50_000), rows)


def test_prepared_once_a_set_needs_neither_network_nor_archives_and_plain_tfds_reads_it(server, tmp_path):
    made = _make(server, "cifar10")
    first = prepared.load(made.source, tmp_path)
    fetched = len(server.requests)
    second = prepared.load(made.source, tmp_path, tmp_path / "there is no such folder")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert second.class_names == first.class_names
    assert len(server.requests) == fetched == 1
    examples = tfds.data_source("jem_jax/cifar10", split="test", data_dir=tmp_path, download=False)
    np.testing.assert_array_equal(examples[3]["image"], made.test[0][3])


def _flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("pattern", ["*.array_record*", "dataset_info.json"])
def test_damaged_files_are_made_again_and_not_trusted(server, tmp_path, pattern):
    made = _make(server, "cifar10")
    before = prepared.load(made.source, tmp_path)
    folder = made.source.folder(tmp_path)
    for path in folder.glob(pattern):
        _flip(path)
    after = prepared.load(made.source, tmp_path)
    np.testing.assert_array_equal(before.train.images, after.train.images)
    np.testing.assert_array_equal(before.train.labels, after.train.labels)
    # Made again, so that the next start needs no archives.
    assert prepared.load(made.source, tmp_path, tmp_path / "there is no such folder").class_names == before.class_names


def test_what_was_prepared_from_other_archives_is_not_taken_for_these(server, tmp_path):
    prepared.load(_make(server, "mnist", seed=0).source, tmp_path)
    made = _make(server, "mnist", seed=10)
    np.testing.assert_array_equal(prepared.load(made.source, tmp_path).test.images, made.test[0])


def test_what_cannot_be_fetched_again_is_not_deleted(server, tmp_path):
    made = _make(server, "mnist")
    prepared.load(made.source, tmp_path)
    folder = made.source.folder(tmp_path)
    shards = sorted(folder.glob("*.array_record*"))
    _flip(shards[0])
    with pytest.raises(UserError, match="manual_dir"):
        prepared.load(made.source, tmp_path, tmp_path / "there is no such folder")
    assert sorted(folder.glob("*.array_record*")) == shards


def test_what_interrupted_preparations_left_is_cleared(server, tmp_path):
    made = _make(server, "mnist")
    left = made.source.folder(tmp_path).parent / f"incomplete.ABC_{made.source.version}"
    left.mkdir(parents=True)
    prepared.load(made.source, tmp_path)
    assert not left.exists()


def test_archives_of_another_layout_are_one_line(server, tmp_path):
    made = _make(server, "mnist")
    source = dataclasses.replace(made.source, archives=made.source.archives[::-1])
    with pytest.raises(UserError, match="not in the layout expected"):
        prepared.load(source, tmp_path)


PREPARE = """
import json, sys
from pathlib import Path
from jem_jax.datasets import prepared
from jem_jax.datasets.archives import MNIST
from jem_jax.datasets.sources import Archive, Source
archives = tuple(Archive(*archive) for archive in json.loads(sys.argv[1]))
source = Source("mnist", MNIST, archives, num_validation=8)
print(prepared.load(source, Path(sys.argv[2])).train.images.sum())
"""


def test_two_processes_at_once_prepare_once_and_read_the_same(server, tmp_path):
    made = _make(server, "mnist")
    archives = json.dumps([dataclasses.astuple(archive) for archive in made.source.archives])
    command = [sys.executable, "-c", PREPARE, archives, tmp_path]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0] for process in pair}
    assert sums == {f"{prepared.load(made.source, tmp_path).train.images.sum()}\n"}
    assert len(server.requests) == len(made.source.archives)


def test_the_shipped_sources_are_those_of_tensorflow_datasets():
    root = Path(tfds.__file__).parent
    files = [*(root / "url_checksums").glob("*mnist.txt"), *(root / "url_checksums").glob("cifar10*.txt")]
    files.append(root / "datasets" / "svhn_cropped" / "checksums.tsv")
    known = {tuple(line.split("\t")[:3]) for file in files for line in file.read_text().splitlines()}
    shipped = {(a.address, str(a.size), a.sha256) for source in SOURCES.values() for a in source.archives}
    assert shipped <= known
    assert set(SOURCES) == set(KINDS)


# ---- other sets of TFDS, by name


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


class TinyWords(tfds.core.GeneratorBasedBuilder):
    """Not pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        return iter(())


def _named(tmp_path, name, **settings):
    return datasets.load(Data(name=f"tfds:{name}", data_dir=str(tmp_path), **settings))


def test_a_tfds_set_is_read_by_name_and_a_tenth_held_out_for_each_part_it_lacks(tmp_path):
    dataset = _named(tmp_path, "tiny_pictures/plain")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (16, 2, 2)
    assert dataset.class_names == ("dark", "light")
    assert dataset.image_shape == (8, 8, 3)
    for split in (dataset.train, dataset.validation, dataset.test):
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] == 200, split.labels == 1)
    rows = np.concatenate([split.images[:, 0, 0, 1] for split in (dataset.train, dataset.validation, dataset.test)])
    assert sorted(rows) == list(range(20))


def test_a_tfds_sets_own_splits_are_taken(tmp_path):
    dataset = _named(tmp_path, "tiny_pictures/splits")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (20, 20, 20)


def test_a_tfds_set_is_decoded_once(tmp_path):
    before = _named(tmp_path, "tiny_pictures/plain")
    for shard in (tmp_path / "tiny_pictures").rglob("*.array_record*"):
        _flip(shard)
    np.testing.assert_array_equal(_named(tmp_path, "tiny_pictures/plain").train.images, before.train.images)
    for cached in (tmp_path / "jem_jax" / "tfds").rglob("*.npz"):
        _flip(cached)
    with pytest.raises(UserError, match=r"is damaged: .*delete that folder"):
        _named(tmp_path, "tiny_pictures/plain")


def test_a_tfds_set_that_is_prepared_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    before = _named(tmp_path, "tiny_pictures/plain")
    (cached,) = (tmp_path / "jem_jax" / "tfds").rglob("*.npz")
    cached.unlink()
    monkeypatch.setattr("os.access", lambda *_: False)
    np.testing.assert_array_equal(_named(tmp_path, "tiny_pictures/plain").train.images, before.train.images)
    assert not cached.exists()


def test_pictures_of_several_sizes_need_to_be_resized(tmp_path):
    with pytest.raises(UserError, match=r"image 1 is 12×12 and image 0 8×8; .*image_size"):
        _named(tmp_path, "tiny_pictures/sizes")
    dataset = _named(tmp_path, "tiny_pictures/sizes", image_size=16)
    assert dataset.image_shape == (16, 16, 3)
    np.testing.assert_array_equal(dataset.train.images[:, 7, 7, 0] == 200, dataset.train.labels == 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kmnst", "no set of that name.*near it: .*tfds:kmnist"),
        ("tiny_words", "not for classifying images.*has text"),
        ("tiny_pictures/empty_class", "no image of class 1 \\(light\\)"),
        ("tiny_pictures/needs_tensorflow", "pip install tensorflow"),
        ("kmnist", "not prepared in .*pip install tensorflow"),
        ("mnist", "pip install tensorflow.*--config.data.name=mnist"),
        ("tiny_pictures/there_is_none", "tfds:tiny_pictures/there_is_none"),
    ],
)
def test_a_tfds_set_that_cannot_be_had_is_one_line(tmp_path, name, words):
    with pytest.raises(UserError, match=words) as caught:
        _named(tmp_path, name)
    assert "\n" not in str(caught.value)


def test_a_tfds_set_in_a_format_of_tensorflow_says_so(tmp_path):
    _named(tmp_path, "tiny_pictures/plain")
    (info,) = (tmp_path / "tiny_pictures").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"tfds:tiny_pictures/plain.*tfrecord|format that only TensorFlow reads"):
        _named(tmp_path, "tiny_pictures/plain")


# ---- which is meant


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cifar-10"}, "'cifar-10' is not a data set; did you mean cifar10\\? There are digits"),
        ({"name": "SVHN"}, "did you mean svhn_cropped"),
        ({"name": "KMNIST"}, "did you mean tfds:kmnist"),
        ({"name": ""}, "config.data.name is empty; name a path"),
        ({"name": "zebras"}, "there are digits, cifar10, cifar100, svhn_cropped, mnist, fashion_mnist, tfds:NAME"),
        ({"name": "some/folder"}, "config.data.name 'some/folder': there is no such file or folder"),
        ({"name": "mine.npz"}, "config.data.name 'mine.npz': there is no such file or folder"),
        ({"name": __file__}, "must be an .npz file or a folder"),
        ({"name": "digits", "image_size": 10}, "image_size must be a multiple of 4, not 10"),
    ],
)
def test_a_name_that_means_nothing_says_what_there_is(settings, words):
    with pytest.raises(UserError, match=words):
        datasets.load(Data(**settings))


def test_any_set_can_be_resized():
    small, large = datasets.load(Data()), datasets.load(Data(image_size=16))
    assert large.image_shape == (16, 16, 1)
    np.testing.assert_array_equal(large.test.labels, small.test.labels)
    back = large.test.images.reshape(-1, 8, 2, 8, 2, 1).mean((2, 4))
    assert np.corrcoef(back.ravel(), small.test.images.ravel())[0, 1] > 0.95


def test_the_data_folder_is_the_setting_then_tfdss_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "a"))
    assert prepared.data_folder(str(tmp_path / "b")) == tmp_path / "b"
    assert prepared.data_folder("") == tmp_path / "a"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert prepared.data_folder("") == Path.home() / "tensorflow_datasets"


def test_the_command_ends_with_status_2_and_one_line(capsys, tmp_path):
    flags = [f"--config.data.manual_dir={tmp_path}", f"--config.data.data_dir={tmp_path}", f"--workdir={tmp_path}/run"]
    assert main(["--config=digits", "--config.data.name=cifar10", *flags]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "cifar-10-binary.tar.gz" in line
    assert not (tmp_path / "run").exists()
