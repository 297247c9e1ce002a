"""Checkpoints of the official PyTorch code <-> Flax variables and a replay buffer.

The official code of JEM saves a dict of `model_state_dict` and `replay_buffer`. Its arrays are named after PyTorch
modules (`f.layer2.0.conv1.weight`) and laid out for NCHW images. `_official_paths` pairs these names with the variables
of `WideResNet`.

The files of the successors are read too. SADA-JEM's lack the unused layer `f.linear`. JEM++'s network registers its
layers twice, so its files repeat most weights under `f.layer_one` and `f.other_layers`.

A run with an unconditional energy head (`--uncond`) learns its density in `energy_output`, which `WideResNet` does not
have. Only the classifier of such a checkpoint is imported.

Errors are `UserError`s of one line that name the array and what was expected.
"""

import functools
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jem_jax.common import files, paths
from jem_jax.common.errors import UserError, first_line
from jem_jax.datasets import checks
from jem_jax.wide_resnet import NORMS, WideResNet

Variables = dict[str, Any]

# The official network passes no number of classes to its own last layer, so this layer has PyTorch's default rows.
_UNUSED_LINEAR_ROWS = 10

_MOST_REPEATS = 3
"""how many tensors may share their numbers; JEM++'s first layer has three names"""

_UNREAD = re.compile(
    r"(f\.linear|energy_output|f\.layer_one|f\.other_layers)\..*|.*\.(num_batches_tracked|initialized)"
)
"""arrays that the logits do not depend on"""


# --- The official names and layouts ---


@functools.cache
def _official_paths(model: WideResNet, channels: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Official name -> path and shape in the Flax variables, for images of this many channels."""
    images = jax.ShapeDtypeStruct((1, 4, 4, channels), jnp.float32)
    leaves = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images))
    return {_official_name(path, model.norm): (path, leaf.shape) for path, leaf in leaves.items()}


def _official_name(path: tuple[str, ...], norm: str) -> str:
    """("params", "stage2_block0", "norm1", "norm", "scale") -> "f.layer2.0.bn1.weight"."""
    module = "/".join(path[1:-1])
    for pattern, name in (
        (r"^classes$", "class_output"),
        (r"^norm/norm$", "f.bn1"),
        (r"^conv1$", "f.conv1"),
        (r"^stage(\d)_block(\d+)/", r"f.layer\1.\2."),
        (r"norm(\d)/norm$", r"bn\1"),
        (r"shortcut$", "shortcut.0"),
    ):
        module = re.sub(pattern, name, module)
    leaves = {"kernel": "weight", "mean": "running_mean", "var": "running_var"}
    if norm != "act":
        leaves["scale"] = "weight"
    return f"{module}.{leaves.get(path[-1], path[-1])}"


def _to_flax(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith((".loc", ".scale")):  # act norm's, [1, C, 1, 1]
        return array.reshape(-1)
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def _to_official(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith((".loc", ".scale")):
        return array.reshape(1, -1, 1, 1)
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


# --- State dict to variables ---


def variables_from_state_dict(state_dict: Mapping[str, np.ndarray], norm: str | None = None) -> Variables:
    """The Flax variables of an official network, for the model that `model_from_state_dict` gives.

    Args:
      state_dict: name -> array, as the official code names and shapes them. All names may start with `module.`
        (saved from `nn.DataParallel`). Arrays that the logits do not depend on may be missing.
      norm: one of `wide_resnet.NORMS`. "layer" and "instance" must be given, since their arrays have the same names
        and shapes. The others are read off the names.

    Returns:
      {"params": …}, and with batch norm {"params": …, "batch_stats": …}, as float32 `jax.Array`s, such that
      `model.apply(variables, x)` with x [B, H, W, channels] are the official logits in evaluation mode.

    Raises:
      UserError: a missing, unknown, misshapen or non-finite array, another architecture, or a norm that is missing
        or does not fit.
    """
    arrays = _plain(state_dict)
    model, channels = _network(arrays, norm)
    official = _official_paths(model, channels)
    shapes = {name: _to_official(name, np.empty(shape)).shape for name, (_, shape) in official.items()}
    checked = _checked({name: array for name, array in arrays.items() if not _UNREAD.fullmatch(name)}, shapes, model)
    for name, array in checked.items():
        if name.endswith(".running_var") and (array < 0).any():
            raise UserError(f"{name} holds a negative number: expected variances")
    for name, array in arrays.items():
        if name.endswith(".initialized") and not array.all():
            raise UserError(f"{name} is {array}: expected 1, an act norm that has seen its first batch")
    return traverse_util.unflatten_dict(
        {path: jnp.asarray(_to_flax(name, checked[name])) for name, (path, _) in official.items()}
    )


def model_from_state_dict(state_dict: Mapping[str, np.ndarray], norm: str | None = None) -> WideResNet:
    """The network of an official state dict: its depth, width, classes and norm, with no dropout.

    Arguments and errors are those of `variables_from_state_dict`, which checks the arrays in full.
    """
    return _network(_plain(state_dict), norm)[0]


_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""prefixes that `nn.DataParallel`, `torch.compile`, and modules that hold the network give to all its names"""
_PLACES = ("model_state_dict", "state_dict", "model_state", "model", "net", "params")
"""keys under which people save a state dict; "model_state_dict" is the official one"""


def _plain(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays under the official names, without a prefix that all of them have."""
    if not isinstance(state_dict, Mapping):
        raise UserError(f"expected a state dict, array names to arrays; got a {type(state_dict).__name__}")
    arrays = {str(name): np.asarray(array) for name, array in state_dict.items()}
    while prefix := next(
        (start for start in _PREFIXES if arrays and all(name.startswith(start) for name in arrays)), ""
    ):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _network(arrays: dict[str, np.ndarray], norm: str | None) -> tuple[WideResNet, int]:
    """The network that the names and shapes tell of, and its images' channels."""
    stem = _array(arrays, "f.conv1.weight", "[16, channels, 3, 3]")
    first = _array(arrays, "f.layer1.0.conv1.weight", "[16·width, 16, 3, 3]")
    head = _array(arrays, "class_output.weight", "[classes, 64·width]")
    blocks = sum(re.fullmatch(r"f\.layer1\.\d+\.conv1\.weight", name) is not None for name in arrays)
    width, rest = divmod(first.shape[0], 16)
    if rest:
        raise UserError(f"f.layer1.0.conv1.weight is {list(first.shape)}: expected [16·width, 16, 3, 3]")
    return WideResNet(head.shape[0], depth=6 * blocks + 4, width=width, norm=_norm(arrays, norm)), stem.shape[1]


def _array(arrays: dict[str, np.ndarray], name: str, shape: str) -> np.ndarray:
    if name not in arrays:
        names = ", ".join(list(arrays)[:3]) or "nothing"
        raise UserError(f"missing {name}: expected an array {shape}, as in JEM's network; the file has {names}, …")
    array = arrays[name]
    if array.ndim != shape.count(",") + 1 or 0 in array.shape:
        raise UserError(f"{name} is {list(array.shape)}: expected {shape}")
    return array


def _norm(arrays: dict[str, np.ndarray], norm: str | None) -> str:
    if norm is not None and norm not in NORMS:
        raise UserError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    fitting: tuple[str, ...] = ("none",)
    for leaf, norms in (("weight", ("layer", "instance")), ("loc", ("act",)), ("running_mean", ("batch",))):
        if any(re.fullmatch(rf"f\.(layer.*\.)?bn[12]\.{leaf}", name) for name in arrays):
            fitting = norms
    if norm is None and len(fitting) > 1:
        raise UserError(
            "the arrays of layer and instance norm look alike: "
            'give norm="layer" or norm="instance", whichever the network was trained with'
        )
    if norm is not None and norm not in fitting:
        raise UserError(f"norm={norm!r} does not fit the arrays of the state dict: they are of norm {fitting[0]}")
    return norm or fitting[0]


def _checked(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: WideResNet) -> dict[str, Any]:
    """The arrays as float32. Each name must be there, with its shape and finite numbers, and no other may be."""
    network = f"WRN-{model.depth}-{model.width} with norm {model.norm}"
    for name, shape in shapes.items():
        if name not in arrays:
            raise UserError(f"missing {name}: expected an array {list(shape)} in a {network}")
        if arrays[name].shape != shape:
            raise UserError(f"{name} is {list(arrays[name].shape)}: expected {list(shape)} in a {network}")
    if unknown := arrays.keys() - shapes.keys():
        raise UserError(f"unexpected {min(unknown)}: a {network} has no such array")
    return {name: _as_float32(name, array) for name, array in arrays.items()}


def _as_float32(name: str, array: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} is of {array.dtype}: expected float32")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        raise UserError(f"{name}: {array.size - finite.sum()} of {array.size} numbers are NaN or infinite")
    return array


# --- Variables to state dict ---


def state_dict_from_variables(model: WideResNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of the official JEM network, which its `load_state_dict` takes strictly.

    Arrays that only the official code has are filled in. `f.linear` and `energy_output` are zeros: its
    class-conditional energy never reads them. `num_batches_tracked` is 0, which its momentum makes irrelevant. The act
    norm's `initialized` is 1; with 0 the official code would start its parameters anew.

    Args:
      model: the network. Its `depth`, `width`, `num_classes` and `norm` count. The official network takes images of
        3 channels; others load into one built with `input_channels`.
      variables: its {"params": …} and, with batch norm, "batch_stats".

    Returns:
      name -> float32 array (counters: integers), in the official layout.

    Raises:
      UserError: a missing, unknown, misshapen or non-finite array, or another kind of model.
    """
    if not isinstance(model, WideResNet):
        raise UserError(f"the official code has no {type(model).__name__}: expected a WideResNet")
    leaves = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    stem = leaves.get("params/conv1/kernel", np.zeros(()))
    official = _official_paths(model, stem.shape[2] if stem.ndim == 4 else 3)
    arrays = _checked(leaves, {"/".join(path): shape for path, shape in official.values()}, model)
    state_dict = {
        name: np.ascontiguousarray(_to_official(name, arrays["/".join(path)])) for name, (path, _) in official.items()
    }
    for layer, rows in (("f.linear", _UNUSED_LINEAR_ROWS), ("energy_output", 1)):
        state_dict[f"{layer}.weight"] = np.zeros((rows, 64 * model.width), np.float32)
        state_dict[f"{layer}.bias"] = np.zeros(rows, np.float32)
    for name in list(official):
        module, leaf = name.rsplit(".", 1)
        if leaf == "running_mean":
            state_dict[f"{module}.num_batches_tracked"] = np.array(0, np.int64)
        if leaf == "loc":
            state_dict[f"{module}.initialized"] = np.array(1, np.uint8)
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
      UserError: another shape, no images, numbers that are not finite, or classes that do not divide N.
    """
    array = np.asarray(array)
    if array.ndim != 4 or not array.size:
        raise UserError(f"replay_buffer is {list(array.shape)}: expected [images, channels, H, W]")
    array = _as_float32("replay_buffer", array)
    count = array.shape[0]
    if num_classes < 1 or count % num_classes:
        raise UserError(f"replay_buffer holds {count} images: expected a multiple of the {num_classes} classes")
    by_class = array.reshape(num_classes, count // num_classes, *array.shape[1:])
    return np.ascontiguousarray(by_class.transpose(1, 0, 3, 4, 2))


def buffer_to_official(buffer: np.ndarray) -> np.ndarray:
    """The inverse of `buffer_from_official`: [S, classes, H, W, C] -> [classes·S, C, H, W] float32.

    Raises:
      UserError: another number of axes.
    """
    buffer = np.asarray(buffer, np.float32)
    if buffer.ndim != 5:
        raise UserError(f"the buffer is {list(buffer.shape)}: expected [slots, classes, H, W, channels]")
    by_class = buffer.transpose(1, 0, 4, 2, 3)
    return np.ascontiguousarray(by_class.reshape(-1, *by_class.shape[2:]))


# --- Files ---


class Imported(NamedTuple):
    """An official checkpoint as this package's model, variables and buffer."""

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
      UserError: anything wrong with the file, with its path; or torch is not installed.
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
            raise UserError(f"replay_buffer is {list(images.shape)}: expected [N, {channels}, H, W]")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
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
      UserError: no such file, or one that is damaged, of another kind, or holds other things than tensors; torch is
        not installed, or too old to read a foreign file safely. Files of the older format have no checksums, so a
        changed number goes unnoticed there.
    """
    path = paths.local("the checkpoint", os.fspath(path))
    content = _read(path)
    content = content if isinstance(content, dict) else {}
    images = {"replay_buffer": content["replay_buffer"]} if content.get("replay_buffer") is not None else {}
    state = next((content[place] for place in _PLACES if place in content), content)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no state dict, that is array names to arrays, not even in model_state_dict")
    tensors = {str(name): value for name, value in state.items() if name != "replay_buffer"}
    arrays = _as_arrays(path, tensors | images)
    buffer = arrays.pop("replay_buffer", None)
    return arrays, buffer if buffer is not None and buffer.size else None


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
      UserError: torch is not installed.
    """
    torch = _torch()
    content = {
        "model_state_dict": {name: torch.tensor(array) for name, array in state_dict.items()},
        "replay_buffer": torch.tensor(np.zeros(0, np.float32) if buffer is None else buffer),
    }
    with files.whole(paths.local("the checkpoint", os.fspath(path))) as partial:
        torch.save(content, partial)


def _torch() -> Any:
    """The torch module, which only reading and writing files needs."""
    try:
        import torch
    except ImportError:
        raise UserError('PyTorch\'s files need torch, which is not installed: pip install "jem_jax[torch]"') from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 6):
        # Before 2.6 weights_only could be tricked into running code (CVE-2025-32434).
        raise UserError(
            f"torch {torch.__version__} does not read foreign files safely, 2.6 does: "
            'pip install --upgrade "jem_jax[torch]"'
        )
    return torch


def _read(path: Path) -> Any:
    checks.is_file(path)
    torch = _torch()
    if path.stat().st_size > checks.memory():
        raise UserError(f"{path} is larger than this machine's memory: expected a checkpoint of the official code")
    try:
        _check_parts(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch documents none of the many errors that damaged and foreign files raise.
        reason = str(error) if isinstance(error, UserError) else "it is damaged or of another kind"
        refused = re.search(r"Unsupported (?:global|class)[^\n]*?(?:GLOBAL )?([\w.]+\.\w+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            reason = f"it holds {refused[1]}, and nothing but tensors is ever loaded"
        raise UserError(f"{path} is not a checkpoint of tensors as torch.save writes it: {reason}") from None


def _check_parts(path: Path) -> None:
    """Compares the checksums of a zip file's parts, which torch itself does not."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        # An uncompressed file holds no more than its size, so it cannot fill the memory.
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise UserError("it is compressed, and torch.save never compresses")
        if (part := archive.testzip()) is not None:
            raise UserError(f"{part} does not have the checksum that was written with it")


def _as_arrays(path: Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors as arrays, numbers with a fraction as float32 (NumPy has no bfloat16)."""
    torch = _torch()
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}: expected a tensor")
    # Any number of tensors may lie over the same few numbers of a file; copies of all would fill the memory.
    if sum(value.numel() * value.element_size() for value in tensors.values()) > _MOST_REPEATS * path.stat().st_size:
        raise UserError(f"{path} holds the same numbers many times over: expected a checkpoint of the official code")
    arrays = {}
    for name, value in tensors.items():
        try:
            value = value.detach()
            arrays[name] = (value.float() if value.is_floating_point() else value).numpy()
        except Exception as error:
            # torch documents none of the errors that sparse, quantised and other special tensors raise.
            raise UserError(f"{path}: {name} is not an ordinary tensor ({first_line(error)[:200]})") from None
    return arrays
