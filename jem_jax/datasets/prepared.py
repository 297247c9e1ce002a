"""Data sets from official archives, which TFDS prepares once.

Under the data folder:

    downloads/jem_jax/NAME/   the archives
    jem_jax/NAME/VERSION/     TFDS's files (array_record), which plain TFDS reads too

Both are checked when they are read. What is damaged or missing is made again. Reading is quick, so there is no third
copy.
"""

import os
import shutil
from pathlib import Path

from jem_jax.common import paths
from jem_jax.common.errors import first_line
from jem_jax.datasets import archives, download, locking
from jem_jax.datasets.dataset import Dataset
from jem_jax.datasets.held_out import Splits, cut, official_order
from jem_jax.datasets.notices import say
from jem_jax.datasets.sources import Source


def data_folder(data_dir: str) -> Path:
    """The folder of that setting; where it is empty, TFDS's own: $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      UserError: there can be no such folder, or no home for it.
    """
    if data_dir:
        return paths.local("config.data.data_dir", data_dir)
    of_environment = os.environ.get("TFDS_DATA_DIR")
    if of_environment:
        return paths.local("TFDS_DATA_DIR", of_environment)
    return paths.local("the data folder (set --config.data.data_dir=DIR or TFDS_DATA_DIR)", "~/tensorflow_datasets")


def load(source: Source, data_dir: Path, manual_dir: Path | None = None) -> Dataset:
    """The data set of a source, with `source.num_validation` training images held out by the official seed.

    Args:
      data_dir: where archives and prepared data are kept.
      manual_dir: a folder with the archives, fetched by hand; looked into only if the set is still to be prepared.

    Raises:
      UserError: an archive can't be had, or the folder can't be written.
    """
    parts = _read(source, data_dir)
    if parts is None:
        with locking.held(source.folder(data_dir).parent, source.name):
            # Another process may have made it while this one waited.
            parts = _read(source, data_dir) or _prepare(source, data_dir, manual_dir)
    assert parts.test is not None
    validation, train = cut(parts.train, official_order(len(parts.train)), [source.num_validation])
    return Dataset(source.name, parts.class_names, train=train, validation=validation, test=parts.test)


def _prepare(source: Source, data_dir: Path, manual_dir: Path | None) -> Splits:
    from jem_jax.datasets import builder

    official = archives.read(source.layout, download.obtain(source, source.downloads(data_dir), manual_dir))
    folder = source.folder(data_dir)
    say(f"preparing {source.name} in {folder}: once, some seconds to a minute")
    _clear(folder)
    builder.prepare(source, data_dir, official)
    return builder.read(source, data_dir)


def _read(source: Source, data_dir: Path) -> Splits | None:
    # TFDS takes a second to import.
    from jem_jax.datasets import builder

    folder = source.folder(data_dir)
    if not folder.exists():
        return None
    try:
        return builder.read(source, data_dir)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        # Whatever TFDS raises, the files can be made again from archives that are checked.
        say(f"{folder} is damaged and will be prepared again ({first_line(error)})")
        return None


def _clear(folder: Path) -> None:
    """Removes prepared data, and what TFDS left of preparations that were interrupted."""
    for path in (folder, *folder.parent.glob(f"incomplete.*_{folder.name}")):
        if path.exists():
            shutil.rmtree(path)
