"""The sources of data sets: address, size and SHA-256 of every archive.

Addresses, sizes and checksums are those of the tensorflow-datasets package (4.9.10: its files
url_checksums/{cifar10,cifar100,mnist,fashion_mnist}.txt and datasets/svhn_cropped/checksums.tsv). What is fetched is
always checked against them; no setting turns that off.
"""

from dataclasses import dataclass
from pathlib import Path

from jem_jax.datasets import archives
from jem_jax.datasets.archives import Layout

BUILDER_NAME = "jem_jax"


@dataclass(frozen=True)
class Archive:
    """One file to fetch."""

    address: str
    size: int
    """bytes"""
    sha256: str
    """lower-case hexadecimal"""

    @property
    def name(self) -> str:
        """The file's plain name, by which a copy fetched by hand is found."""
        return self.address.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A data set that is fetched and prepared once."""

    name: str
    layout: Layout
    archives: tuple[Archive, ...]
    """in the order in which the layout wants them"""
    num_validation: int = 5_000
    """training images held out, as the papers do"""
    version: str = "1.0.0"
    """of the prepared data: another one wherever they would differ"""

    @property
    def fingerprint(self) -> dict[str, list[str]]:
        """Hashes of the archives, which prepared data carries."""
        return {"sha256": [archive.sha256 for archive in self.archives]}

    def downloads(self, data_dir: Path) -> Path:
        """The folder of its archives."""
        return data_dir / "downloads" / BUILDER_NAME / self.name

    def folder(self, data_dir: Path) -> Path:
        """The folder of its prepared data, where TFDS looks for a builder, a config and a version of these names."""
        return data_dir / BUILDER_NAME / self.name / self.version


def _archives(folder: str, *files: tuple[str, int, str]) -> tuple[Archive, ...]:
    return tuple(Archive(f"{folder}/{name}", size, sha256) for name, size, sha256 in files)


_CIFAR10 = Source(
    "cifar10",
    archives.CIFAR10,
    _archives(
        "https://www.cs.toronto.edu/~kriz",
        ("cifar-10-binary.tar.gz", 170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    ),
)
_CIFAR100 = Source(
    "cifar100",
    archives.CIFAR100,
    _archives(
        "https://www.cs.toronto.edu/~kriz",
        ("cifar-100-binary.tar.gz", 168_513_733, "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
    ),
)
_SVHN = Source(
    "svhn_cropped",
    archives.SVHN,
    _archives(
        "http://ufldl.stanford.edu/housenumbers",
        ("train_32x32.mat", 182_040_794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
        ("test_32x32.mat", 64_275_384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
    ),
)
_MNIST = Source(
    "mnist",
    archives.MNIST,
    _archives(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        ("train-images-idx3-ubyte.gz", 9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1-ubyte.gz", 28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3-ubyte.gz", 1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1-ubyte.gz", 4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
)
_FASHION_MNIST = Source(
    "fashion_mnist",
    archives.FASHION_MNIST,
    _archives(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        ("train-images-idx3-ubyte.gz", 26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("train-labels-idx1-ubyte.gz", 29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        ("t10k-images-idx3-ubyte.gz", 4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        ("t10k-labels-idx1-ubyte.gz", 5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
)

SOURCES = {source.name: source for source in (_CIFAR10, _CIFAR100, _SVHN, _MNIST, _FASHION_MNIST)}
"""The data sets that need no TensorFlow, by TFDS's names."""
