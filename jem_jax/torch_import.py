"""Checkpoints of the official PyTorch code <-> Flax variables and a replay buffer.

The official code of JEM saves a dict of `model_state_dict` and `replay_buffer`. The arrays of the former are named
after PyTorch modules (`f.layer2.0.conv1.weight`) and laid out for NCHW images. One table, `_official_arrays`, says for
each of them its shape and where it lives in the variables of `WideResNet`; reading, checking and writing go by it.

The successors' files are read too: SADA-JEM's lack the unused `f.linear`, and JEM++'s repeat most weights under
`f.layer_one` and `f.other_layers`, since its network registers its layers twice.

What a run with an unconditional energy head (`--uncond`) learned as its density is in `energy_output`, which
`WideResNet` does not have: of such a checkpoint the classifier alone is imported.

Everything that can be wrong with a checkpoint is a `ValueError` of one line that names the array and what was expected.
"""

import functools
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jem_jax.common import files, paths
from jem_jax.common.errors import UserError
from jem_jax.datasets import checks
from jem_jax.wide_resnet import NORMS, WideResNet

Variables = dict[str, Any]

# The official network hands its own last layer no number of classes, so that it has PyTorch's default rows here.
_UNUSED_LINEAR_ROWS = 10

_MOST_REPEATS = 3
"""how many tensors may share their numbers; JEM++'s first layer has three names"""


# --- The official format ---


class _OfficialArray(NamedTuple):
    """One array of an official state dict."""

    shape: tuple[int, ...]
    path: tuple[str, ...] = ()
    """where it lives in the Flax variables; empty if the official code alone has it"""
    layout: str = "same"
    """how its axes relate to Flax's: a key of `_AXES`, "same", or "channel" ([1, C, 1, 1] to [C])"""
    fill: float = 0
    """what an export writes where `path` is empty"""
    dtype: Any = np.float32


_AXES = {"conv": (2, 3, 1, 0), "linear": (1, 0)}


def _to_flax(array: np.ndarray, layout: str) -> np.ndarray:
    if layout in _AXES:
        return array.transpose(_AXES[layout])
    return array.reshape(-1) if layout == "channel" else array


def _to_official(array: np.ndarray, layout: str) -> np.ndarray:
    if layout in _AXES:
        return array.transpose(np.argsort(_AXES[layout]))
    return array.reshape(1, -1, 1, 1) if layout == "channel" else array


class _Architecture(NamedTuple):
    depth: int
    width: int
    channels: int
    num_classes: int
    norm: str

    @property
    def blocks(self) -> int:
        """Blocks in each of the three stages."""
        return (self.depth - 4) // 6

    def __str__(self) -> str:
        norm = "without norm" if self.norm == "none" else f"with {self.norm} norm"
        return f"WRN-{self.depth}-{self.width} {norm}"

    def model(self) -> WideResNet:
        return WideResNet(num_classes=self.num_classes, depth=self.depth, width=self.width, norm=self.norm)


def _official_arrays(architecture: _Architecture) -> dict[str, _OfficialArray]:
    """Every array of the official network of this architecture, in the official order."""
    norm = functools.partial(_norm_arrays, architecture.norm)
    arrays = _conv_arrays("f.conv1", ("conv1",), architecture.channels, 16, size=3)
    inputs = 16
    for stage in range(3):
        outputs = 16 * 2**stage * architecture.width
        for block in range(architecture.blocks):
            name, path = f"f.layer{stage + 1}.{block}", f"stage{stage + 1}_block{block}"
            arrays |= norm(f"{name}.bn1", (path, "norm1"), inputs)
            arrays |= _conv_arrays(f"{name}.conv1", (path, "conv1"), inputs, outputs, size=3)
            arrays |= norm(f"{name}.bn2", (path, "norm2"), outputs)
            arrays |= _conv_arrays(f"{name}.conv2", (path, "conv2"), outputs, outputs, size=3)
            if inputs != outputs:
                arrays |= _conv_arrays(f"{name}.shortcut.0", (path, "shortcut"), inputs, outputs, size=1)
            inputs = outputs
    arrays |= norm("f.bn1", ("norm",), inputs)
    # Nothing in JEM reads these two layers. Zeros say so to whoever looks, and weight decay leaves them alone.
    arrays |= {
        "f.linear.weight": _OfficialArray((_UNUSED_LINEAR_ROWS, inputs)),
        "f.linear.bias": _OfficialArray((_UNUSED_LINEAR_ROWS,)),
        "energy_output.weight": _OfficialArray((1, inputs)),
        "energy_output.bias": _OfficialArray((1,)),
    }
    classes = architecture.num_classes
    return arrays | {
        "class_output.weight": _OfficialArray((classes, inputs), ("params", "classes", "kernel"), "linear"),
        "class_output.bias": _OfficialArray((classes,), ("params", "classes", "bias")),
    }


def _conv_arrays(
    name: str, path: tuple[str, ...], inputs: int, outputs: int, *, size: int
) -> dict[str, _OfficialArray]:
    return {
        f"{name}.weight": _OfficialArray((outputs, inputs, size, size), ("params", *path, "kernel"), "conv"),
        f"{name}.bias": _OfficialArray((outputs,), ("params", *path, "bias")),
    }


def _norm_arrays(kind: str, name: str, path: tuple[str, ...], channels: int) -> dict[str, _OfficialArray]:
    if kind == "none":
        return {}
    params, statistics = ("params", *path, "norm"), ("batch_stats", *path, "norm")
    if kind == "act":
        shape = (1, channels, 1, 1)
        return {
            f"{name}.loc": _OfficialArray(shape, (*params, "loc"), "channel"),
            f"{name}.scale": _OfficialArray(shape, (*params, "scale"), "channel"),
            # With 0 the official code would overwrite both at its next forward pass.
            f"{name}.initialized": _OfficialArray((), fill=1, dtype=np.uint8),
        }
    arrays = {
        f"{name}.weight": _OfficialArray((channels,), (*params, "scale")),
        f"{name}.bias": _OfficialArray((channels,), (*params, "bias")),
    }
    if kind == "batch":
        arrays |= {
            f"{name}.running_mean": _OfficialArray((channels,), (*statistics, "mean")),
            f"{name}.running_var": _OfficialArray((channels,), (*statistics, "var")),
            # PyTorch reads the count only where momentum is None; officially it is 0.9.
            f"{name}.num_batches_tracked": _OfficialArray((), dtype=np.int64),
        }
    return arrays


# --- State dict to variables ---


def variables_from_state_dict(state_dict: Mapping[str, np.ndarray], norm: str | None = None) -> Variables:
    """The Flax variables of an official network, for the model that `model_from_state_dict` gives.

    Args:
      state_dict: name -> array, as the official code names and shapes them. All names may start with `module.`
        (saved from `nn.DataParallel`) or another of `_PREFIXES`.
      norm: one of `wide_resnet.NORMS`. Needed for "layer" and "instance", whose arrays have the same names and
        shapes; else it is read off the names, and must agree with them if given.

    Returns:
      {"params": …}, and with batch norm {"params": …, "batch_stats": …}, as float32 `jax.Array`s, such that
      `model.apply(variables, x)` with x [B, H, W, channels] are the official logits in evaluation mode.

    Raises:
      ValueError: a missing, unknown, misshapen or non-finite array, another architecture, or a norm that is missing
        or does not fit.
    """
    architecture, arrays = _checked(state_dict, norm)
    leaves = {
        official.path: jnp.asarray(_to_flax(arrays[name], official.layout))
        for name, official in _official_arrays(architecture).items()
        if official.path
    }
    return traverse_util.unflatten_dict(leaves)


def model_from_state_dict(state_dict: Mapping[str, np.ndarray], norm: str | None = None) -> WideResNet:
    """The network of an official state dict: its depth, width, classes and norm, with no dropout.

    Arguments and errors are those of `variables_from_state_dict`.
    """
    return _checked(state_dict, norm)[0].model()


def _checked(state_dict: Mapping[str, np.ndarray], norm: str | None) -> tuple[_Architecture, dict[str, np.ndarray]]:
    """The architecture, and the arrays under their plain names, every one of which has been checked."""
    arrays = _without_repeats(_without_prefix(_as_arrays(state_dict)))
    architecture = _architecture(arrays, norm)
    expected = _official_arrays(architecture)
    if not any(name.startswith("f.linear.") for name in arrays):  # SADA-JEM and JEM++
        expected = {name: official for name, official in expected.items() if not name.startswith("f.linear.")}
    for name, official in expected.items():
        if name not in arrays:
            raise ValueError(f"missing {name}: expected an array {_shape(official.shape)} in a {architecture}")
    for name in arrays:
        if name not in expected:
            raise ValueError(f"unexpected {name}: a {architecture} of the official code has no such array")
    return architecture, {name: _checked_array(name, arrays[name], official) for name, official in expected.items()}


def _as_arrays(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(state_dict, Mapping) or not state_dict:
        what = f"a {type(state_dict).__name__}" if not isinstance(state_dict, Mapping) else "an empty one"
        raise ValueError(f"expected a state dict, array names to arrays; got {what}")
    arrays = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"a key of the state dict is {name!r}: expected the name of an array")
        if not hasattr(value, "__array__"):
            raise ValueError(f"{name} is a {type(value).__name__}: expected a NumPy array")
        try:
            arrays[name] = np.asarray(value)
        except Exception as error:
            # What __array__ of a foreign class raises is up to that class (torch's: TypeError, RuntimeError).
            raise ValueError(f"{name} cannot be read: expected a NumPy array ({_first_line(error)})") from None
    return arrays


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _without_prefix({name.removeprefix(prefix): array for name, array in arrays.items()})
    return arrays


_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""what `nn.DataParallel`, `torch.compile`, and modules that hold the network put before all its names"""
_PLACES = ("model_state_dict", "state_dict", "model_state", "model", "net", "params")
"""keys under which people save a state dict; "model_state_dict" is the official one"""

# JEM++'s network registers its layers once more, as YOPO's first layer and the list of those that follow.
_REPEATS = (
    ("f.layer_one.conv1.", "f.conv1."),
    ("f.layer_one.", "f.conv1."),
    ("f.other_layers.0.", "f.layer1."),
    ("f.other_layers.1.", "f.layer2."),
    ("f.other_layers.2.", "f.layer3."),
    ("f.other_layers.3.", "f.bn1."),
    ("f.other_layers.4.", "f.linear."),
)


def _without_repeats(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {}
    for name, array in arrays.items():
        if not name.startswith(("f.layer_one.", "f.other_layers.")):
            kept[name] = array
            continue
        original = next((to + name.removeprefix(start) for start, to in _REPEATS if name.startswith(start)), None)
        if original in arrays and not np.array_equal(array, arrays[original], equal_nan=array.dtype.kind == "f"):
            raise ValueError(f"{name} differs from {original}: expected a copy of it, as in JEM++")
    return kept


_BLOCK_CONV = re.compile(r"f\.layer([123])\.(\d+)\.conv[12]\.(?:weight|bias)")


def _architecture(arrays: dict[str, np.ndarray], norm: str | None) -> _Architecture:
    stem = _anchor(arrays, "f.conv1.weight", "[16, channels, 3, 3]")
    head = _anchor(arrays, "class_output.weight", "[classes, 64·width]")
    convs = {name: match for name in arrays if (match := _BLOCK_CONV.fullmatch(name))}
    if not convs:
        _anchor(arrays, "f.layer1.0.conv1.weight", "[16·width, 16, 3, 3]")
    blocks = {stage: len({match[2] for match in convs.values() if match[1] == stage}) for stage in "123"}
    # The majority decides, so that one odd or missing array does not put all the others in the wrong.
    blocks_per_stage = Counter(blocks.values()).most_common(1)[0][0] or max(blocks.values())
    widths = Counter(
        arrays[name].shape[0] / 2 ** (3 + int(match[1])) for name, match in convs.items() if arrays[name].ndim
    )
    width = widths.most_common(1)[0][0] if widths else 0
    if width < 1 or width != int(width):
        name = next(iter(convs))
        raise ValueError(f"{name} is {_shape(arrays[name].shape)}: expected 16, 32, 64 × width channels in the stages")
    return _Architecture(
        depth=6 * blocks_per_stage + 4,
        width=int(width),
        channels=stem.shape[1],
        num_classes=head.shape[0],
        norm=_norm(arrays, norm),
    )


def _anchor(arrays: dict[str, np.ndarray], name: str, shape: str) -> np.ndarray:
    """An array without which nothing can be said about the network."""
    if name not in arrays:
        raise ValueError(f"missing {name}: expected an array {shape}, as in JEM's network; {_names(arrays)}")
    array = arrays[name]
    if array.ndim != shape.count(",") + 1 or 0 in array.shape:
        raise ValueError(f"{name} is {_shape(array.shape)}: expected {shape}")
    return array


def _norm(arrays: dict[str, np.ndarray], norm: str | None) -> str:
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    named = re.compile(r"f\.(?:layer\d+\.\d+\.)?bn[12]\.(\w+)")
    leaves = {match[1]: name for name in arrays if (match := named.fullmatch(name))}
    fitting, telling = _norms_that_fit(set(leaves))
    if norm is None and len(fitting) > 1:
        raise ValueError(
            f"{leaves[telling]} fits layer and instance norm alike: "
            'give norm="layer" or norm="instance", whichever the network was trained with'
        )
    if norm is not None and norm not in fitting:
        seen = f"{leaves[telling]} tells of" if telling else "without f.bn1 it can only be"
        raise ValueError(f"norm={norm!r} does not fit the state dict: {seen} norm {' or '.join(fitting)}")
    return norm or fitting[0]


def _norms_that_fit(leaves: set[str]) -> tuple[tuple[str, ...], str]:
    """The norms whose layers have arrays of these names, and a name that tells so ("" where there is none)."""
    for norms, telling in (
        (("batch",), {"running_mean", "running_var", "num_batches_tracked"}),
        (("act",), {"loc", "scale", "initialized"}),
        (("layer", "instance"), leaves),
    ):
        if leaves & telling:
            return norms, min(leaves & telling)
    return ("none",), ""


def _checked_array(name: str, array: np.ndarray, official: _OfficialArray) -> np.ndarray:
    shape = official.shape
    if name.startswith("f.linear.") and array.ndim:
        shape = (array.shape[0], *shape[1:])  # Its rows are the number of classes in forks that pass that on.
    _require_shape(name, array, shape)
    if official.dtype == np.float32:
        array = _as_float32(name, array)
        if name.endswith(".running_var") and (array < 0).any():
            raise ValueError(f"{name} holds a negative number: expected variances")
        return array
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} is of {array.dtype}: expected {np.dtype(official.dtype)}")
    if name.endswith(".initialized") and array != 1:
        raise ValueError(f"{name} is {array}: expected 1, an act norm that has seen its first batch")
    return array


def _require_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} is {_shape(array.shape)}: expected {_shape(shape)}")


def _as_float32(name: str, array: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is of {array.dtype}: expected float32")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"{name}: {array.size - finite.sum()} of {array.size} numbers are NaN or infinite")
    return array


# --- Variables to state dict ---


def state_dict_from_variables(model: WideResNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of the official JEM network, which its `load_state_dict` takes strictly.

    What the official code has besides is filled: `f.linear` and `energy_output`, which its class-conditional energy
    never reads, with zeros; `num_batches_tracked` with 0, which its momentum makes irrelevant; the act norm's
    `initialized` with 1, without which the official code would start its parameters anew. The official network takes
    3 channels; others load into one built with `input_channels`.

    Args:
      model: the network; its `depth`, `width`, `num_classes` and `norm` count.
      variables: its {"params": …} and, with batch norm, "batch_stats".

    Returns:
      name -> float32 array (counters: integers), in the official order and layout.

    Raises:
      ValueError: a missing, unknown, misshapen or non-finite array, or another kind of model.
    """
    if not isinstance(model, WideResNet):
        raise ValueError(f"the official code has no {type(model).__name__}: expected a WideResNet")
    if not isinstance(variables, Mapping):
        raise ValueError(f'variables are a {type(variables).__name__}: expected a dict with "params"')
    leaves = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    stem = leaves.get("params/conv1/kernel", np.zeros(()))
    channels = stem.shape[2] if stem.ndim == 4 else 3
    architecture = _Architecture(model.depth, model.width, channels, model.num_classes, model.norm)
    expected = _official_arrays(architecture)
    unknown = leaves.keys() - {"/".join(official.path) for official in expected.values()}
    if unknown:
        raise ValueError(f"unexpected {min(unknown)}: a {architecture} has no such array")
    state_dict = {}
    for name, official in expected.items():
        if not official.path:
            state_dict[name] = np.full(official.shape, official.fill, official.dtype)
            continue
        path = "/".join(official.path)
        shape = _to_flax(np.empty(official.shape), official.layout).shape
        if path not in leaves:
            raise ValueError(f"missing {path}: expected an array {_shape(shape)} in a {architecture}")
        _require_shape(path, leaves[path], shape)
        state_dict[name] = np.ascontiguousarray(_to_official(_as_float32(path, leaves[path]), official.layout))
    return state_dict


# --- Replay buffer ---


def buffer_from_official(array: np.ndarray, num_classes: int = 1) -> np.ndarray:
    """An official replay buffer in the layout of `jem_jax.replay_buffer`.

    Args:
      array: [N, C, H, W]. Where the run sampled by class, the first N/num_classes images are class 0's, and so on.
      num_classes: the number of classes if the run sampled by class, else 1: the array does not tell.

    Returns:
      [N/num_classes, num_classes, H, W, C] float32.

    Raises:
      ValueError: another shape, no images, numbers that are not finite, or classes that do not divide N.
    """
    array = _checked_buffer(array)
    count = array.shape[0]
    if num_classes < 1 or count % num_classes:
        raise ValueError(f"replay_buffer holds {count} images: expected a multiple of the {num_classes} classes")
    by_class = array.reshape(num_classes, count // num_classes, *array.shape[1:])
    return np.ascontiguousarray(by_class.transpose(1, 0, 3, 4, 2))


def buffer_to_official(buffer: np.ndarray) -> np.ndarray:
    """The inverse of `buffer_from_official`: [S, classes, H, W, C] -> [classes·S, C, H, W] float32.

    Raises:
      ValueError: another number of axes.
    """
    buffer = np.asarray(buffer, np.float32)
    if buffer.ndim != 5:
        raise ValueError(f"the buffer is {_shape(buffer.shape)}: expected [slots, classes, H, W, channels]")
    by_class = buffer.transpose(1, 0, 4, 2, 3)
    return np.ascontiguousarray(by_class.reshape(-1, *by_class.shape[2:]))


def _checked_buffer(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 4 or not array.size:
        raise ValueError(f"replay_buffer is {_shape(array.shape)}: expected [images, channels, H, W]")
    return _as_float32("replay_buffer", array)


# --- Files ---


class Imported(NamedTuple):
    """What an official checkpoint holds, in this package's terms."""

    model: WideResNet
    variables: Variables
    buffer: np.ndarray | None
    """[S, classes or 1, H, W, channels] float32, or None where the file has none"""


def load(path: str | os.PathLike, norm: str | None = None, *, class_conditional: bool = False) -> Imported:
    """Reads and converts a checkpoint file of the official code.

    Args:
      path: the `.pt` file.
      norm: as in `variables_from_state_dict`.
      class_conditional: whether the run sampled by class, which the file does not tell; its buffer is then cut by
        class.

    Raises:
      ValueError: anything wrong with the file, with its path.
      ImportError: torch is not installed.
    """
    state_dict, images = read_checkpoint(path)
    try:
        model = model_from_state_dict(state_dict, norm)
        variables = variables_from_state_dict(state_dict, norm)
        if images is None:
            return Imported(model, variables, None)
        buffer = buffer_from_official(images, model.num_classes if class_conditional else 1)
        channels = variables["params"]["conv1"]["kernel"].shape[2]
        if buffer.shape[-1] != channels:
            raise ValueError(f"replay_buffer is {_shape(images.shape)}: expected [N, {channels}, H, W]")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Imported(model, variables, buffer)


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The arrays of a `.pt` file, in the official names and layout. No code in the file is ever run.

    Args:
      path: what `torch.save` wrote of a dict with `model_state_dict` (or another of `_PLACES`) and `replay_buffer`, or
        of a bare state dict, in today's zip format or that of torch before 1.6.

    Returns:
      The state dict, for `variables_from_state_dict`, and the replay buffer [N, C, H, W], for `buffer_from_official`,
      or None where there is none or it is empty.

    Raises:
      ValueError: no such file, or one that is damaged, of another kind, or holds other things than tensors. Files of
        the older format have no checksums: a changed number goes unnoticed there.
      ImportError: torch is not installed, or too old to read a foreign file safely.
    """
    path = _local(path)
    content = _read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a state dict or one in model_state_dict")
    images = content.get("replay_buffer")
    place = next((name for name in _PLACES if name in content), None)
    if place:
        content = content[place]
        if not isinstance(content, dict):
            raise ValueError(f"{path}: {place} is a {type(content).__name__}: expected a dict of tensors")
    if not content:
        raise ValueError(f"{path} holds an empty state dict: expected the arrays of a network")
    _check_total(path, [*content.values(), images])
    state_dict = {str(name): _as_numpy(path, name, value) for name, value in content.items() if name != "replay_buffer"}
    buffer = None if images is None else _as_numpy(path, "replay_buffer", images)
    return state_dict, buffer if buffer is not None and buffer.size else None


def write_checkpoint(
    path: str | os.PathLike, state_dict: Mapping[str, np.ndarray], buffer: np.ndarray | None = None
) -> None:
    """Writes a file that the official code loads with `--load_path`.

    An existing file is replaced, and only once the new one is whole.

    Args:
      path: the `.pt` file.
      state_dict: as `state_dict_from_variables` gives it.
      buffer: [N, C, H, W], as `buffer_to_official` gives it. Without one an empty buffer is written, with which the
        official sampler starts every chain anew.

    Raises:
      ValueError: no such folder, or something that is not an array.
      ImportError: torch is not installed.
    """
    torch = _torch()
    path = _local(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder: expected one to write {path.name} to")
    images = np.zeros(0, np.float32) if buffer is None else _checked_buffer(buffer)
    arrays = _as_arrays(state_dict)
    if odd := next((name for name, array in arrays.items() if array.dtype.kind not in "fiub"), None):
        raise ValueError(f"{odd} is of {arrays[odd].dtype}: expected float32")
    content = {
        "model_state_dict": {name: torch.tensor(array) for name, array in arrays.items()},
        "replay_buffer": torch.tensor(images),
    }
    with files.whole(path) as partial:
        torch.save(content, partial)


def _local(path: str | os.PathLike) -> Path:
    try:
        return paths.local("the checkpoint", os.fspath(path))
    except UserError as error:
        raise ValueError(str(error)) from error


def _torch() -> Any:
    """The torch module, which only reading and writing files needs."""
    try:
        import torch
    except ImportError:
        raise ImportError('PyTorch\'s files need torch, which is not installed: pip install "jem_jax[torch]"') from None
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < (2, 6):
        # weights_only could be tricked into running code before (CVE-2025-32434).
        raise ImportError(
            f"torch {torch.__version__} does not read foreign files safely, 2.6 does: "
            'pip install --upgrade "jem_jax[torch]"'
        )
    return torch


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: expected a checkpoint of the official code")
    torch = _torch()
    if path.stat().st_size > checks.memory():
        raise ValueError(f"{path} is larger than this machine's memory: expected a checkpoint of the official code")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: expected a checkpoint of the official code")
    # torch itself does not compare the checksums of the parts.
    if _is_zip(path):
        _check_parts(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch documents none of the many errors that damaged and foreign files raise.
        reason = "it is damaged or of another kind"
        found = re.search(r"Unsupported (?:global|class)[^\n]*?(?:GLOBAL )?([\w.]+\.\w+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            reason = f"it holds {found[1]}, and nothing but tensors is ever loaded"
        raise ValueError(f"{path} is not a checkpoint of tensors as torch.save writes it: {reason}") from None


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        # A list of parts that says it goes on in another file.
        return True


def _check_parts(path: Path) -> None:
    """Reads every part of a zip file once, a little at a time, and compares its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing: what a file holds is no more than its size, and cannot fill the memory.
            larger = sum(part.file_size for part in archive.infolist()) > path.stat().st_size
            part = None if larger else archive.testzip()
    except Exception as error:
        raise ValueError(f"{path} is damaged: its list of parts cannot be read ({_first_line(error)})") from None
    if larger:
        raise ValueError(f"{path} is compressed, and torch.save never compresses: expected a file of torch.save")
    if part is not None:
        raise ValueError(f"{path} is damaged: {part} does not have the checksum that was written with it")


def _check_total(path: Path, values: Sequence[Any]) -> None:
    """Whether a file's tensors are no more than it holds: any number of them may lie over the same numbers."""
    torch = _torch()
    total = sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
    if total > _MOST_REPEATS * path.stat().st_size:
        raise ValueError(f"{path} holds the same numbers many times over: expected a checkpoint of the official code")


def _as_numpy(path: str | os.PathLike, name: Any, value: Any) -> np.ndarray:
    torch = _torch()
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ValueError(f"{path}: {name} is a {type(value).__name__}: expected a tensor")
    try:
        value = value.detach()
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("it holds fewer numbers than its shape says")
        # NumPy has no bfloat16.
        return (value.float() if value.is_floating_point() and value.dtype != torch.float64 else value).numpy()
    except Exception as error:
        raise ValueError(f"{path}: {name} is not an ordinary tensor ({_first_line(error)})") from None


# --- Words for errors ---


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _names(arrays: dict[str, np.ndarray]) -> str:
    first = ", ".join(list(arrays)[:3])
    return f"found {first}" + (f" and {len(arrays) - 3} more" if len(arrays) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
