"""Config files and `--config.group.key=value`: how settings reach `jem_jax.config`."""

import ast
import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import ml_collections

from jem_jax import config as configuration
from jem_jax import configs
from jem_jax.common import paths
from jem_jax.common.errors import UserError, shown
from jem_jax.config import Config

_SWITCHES: dict[object, bool] = {1: True, "yes": True, "on": True, 0: False, "no": False, "off": False}


def read(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The settings of a config file, with overrides from the command line.

    Args:
      path: of a Python file whose `get_config()` returns a ConfigDict, or the name of one that comes with the package
        ("digits", "configs/digits.py").
      overrides: ("group.key", "text") pairs, the later winning.

    Raises:
      UserError: no such file, a Python error in it (with its line), or settings that are wrong.
    """
    return overridden(_get_config(find(path)), overrides)


def overridden(settings: ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]]) -> Config:
    """Settings with overrides from the command line. Errors are those of `read`."""
    for name, text in overrides:
        _override(settings, name, text)
    return configuration.validate(settings)


def find(path: str) -> Path:
    """The config file of that path, or the one that comes with the package.

    Raises:
      UserError: there is neither.
    """
    file = paths.local("--config", path)
    if file.is_file():
        return file
    own = packaged()
    name = file.name.removesuffix(".py")
    if name in own and str(file.parent) in (".", "configs"):
        return own[name]
    raise UserError(
        f"config file {shown(path)[1:-1]} does not exist; these come with the package: {', '.join(sorted(own))}"
    )


def packaged() -> dict[str, Path]:
    """Names and paths of the config files that come with the package."""
    folders = map(Path, configs.__path__)
    return {file.stem: file for folder in folders for file in folder.glob("*.py") if file.stem != "__init__"}


def _get_config(file: Path) -> ml_collections.ConfigDict:
    if file.suffix != ".py":
        raise UserError(f"config file {file} must be a Python file, *.py")
    try:
        with _beside(file):
            module = _execute(file)
            if not callable(getattr(module, "get_config", None)):
                raise UserError(f"config file {file} must define get_config(), which returns a ConfigDict")
            settings = module.get_config()
    except UserError:
        raise
    # A config file that exits must not end the program as if it were done.
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {file}, line {_line(file, error)}: {type(error).__name__}: {error}") from error
    if not isinstance(settings, ml_collections.ConfigDict):
        raise UserError(f"config file {file}: get_config() must return a ConfigDict, not {type(settings).__name__}")
    return settings


def _execute(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[None]:
    """Lets a config file import its neighbours, which are forgotten afterwards: another file may have its own."""
    folder = file.absolute().parent
    before = set(sys.modules)
    try:
        with paths.importable(folder, file.resolve().parent, Path.cwd()):
            yield
    finally:
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).parent in (folder, file.resolve().parent):
                del sys.modules[name]


def _line(file: Path, error: BaseException) -> int | str:
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).absolute() == file.absolute()]
    return next((line for line in reversed(own) if line), "unknown")


def _override(settings: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets one key to the text's value; whether key and value are right is for `config.validate` to say."""
    *groups, key = name.split(".")
    node = settings
    for group in groups:
        if not isinstance(node.get(group), ml_collections.ConfigDict):
            raise UserError(f"config.{shown(name)[1:-1]} is not a setting; the groups are: {_groups(settings)}")
        node = node[group]
    with settings.unlocked(), node.ignore_type():
        old = node.get(key)
        value = text if isinstance(old, str) else _fitted(_value(text), old)
        if key in node:
            # Over an old value ConfigDict converts the new one: true to 1.0, and an int too large to an OverflowError.
            del node[key]
        node[key] = value


def _fitted(value: object, old: object) -> object:
    """A typed value as the kind of the old one, where that is what was meant: 20 for (20,), 1e2 for 100, 1 for True."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(old, bool) and (isinstance(value, str) or is_number):
        return _SWITCHES.get(value.lower() if isinstance(value, str) else value, value)
    if type(old) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return (value,) if isinstance(old, tuple | list) and is_number else value


def _value(text: str) -> object:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if text.lower() in ("nan", "inf", "-inf"):
        return float(text)
    try:
        value = ast.literal_eval(_Quotients().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, ArithmeticError):
        return text
    # No setting is a dict, which ConfigDict would take apart.
    return text if isinstance(value, dict) else value


class _Quotients(ast.NodeTransformer):
    """Puts numbers in the place of quotients such as 8/255."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Divides literals; what is left is for `literal_eval` to refuse."""
        if not isinstance(node.op, ast.Div):
            return node
        return ast.copy_location(ast.Constant(ast.literal_eval(node.left) / ast.literal_eval(node.right)), node)


def _groups(settings: ml_collections.ConfigDict) -> str:
    return ", ".join(name for name, value in settings.items() if isinstance(value, ml_collections.ConfigDict))
