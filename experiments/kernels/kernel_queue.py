"""Are the convolution kernels right on a Hopper GPU, and faster than cuDNN's?

    python -m experiments.kernels.kernel_queue            all steps, on a Hopper GPU, within 9 minutes
    python -m experiments.kernels.kernel_queue --list     what each step should give

The first steps settle which way of copying is right (copy_check.py). Then each shape is timed with cuDNN, and each
variant of the kernel (convolution.py) is checked against float32 and, where it is right, timed. Steps run in a worker
process with a time limit each. A step that fails, crashes or hangs ends its worker alone, and the next step starts a
new one. Results are written after each step to experiments/results/kernel_check.json and kernels.json; a second call
goes on with the steps that these do not hold. `--out` takes copies to another folder. Without a Hopper GPU the exit
status is 2.

`kernel_us`: convolution, bias and residual, with the input as the kernel reads it. `whole_us`: the same with what makes
that input, each call taking the output of the one before. Both are medians of five rounds of 20 calls. Written down
beforehand, batch 64, in microseconds of `kernel_us` (`estimate` says how; 30.2 GFLOP, the floor at 800 TFLOP/s is 38):

| variant | 32×32×160 | 16×16×320 | 8×8×640 |
| --- | --- | --- | --- |
| filled | 50 | 46 | 64 |
| padded | 50 | 46 | 64 |
| copies | 50 | 46 | 64 |
| one after the other | 52 | 48 | 64 |
| persistent | 47 | 44 | 63 |
| cluster | 50 | 46 | 46 |
| persistent cluster | 47 | 44 | 44 |
| residual at once | 50 | 46 | 64 |
| four stages | 50 | 46 | 64 |
| 64 deep |  | 46 | 64 |
| other tile |  |  | 85 |

cuDNN, measured on an H100: 81 alone and 97 with bias and residual at 32×32, 74 and 71 at 16×16. What would be worth
keeping is 55 (550 TFLOP/s) at all three shapes. What decides: `overlap` and `cluster` should give 5 to 20 %, the border
of `padded` should cost `whole_us` some 10 at 32×32 that `filled` saves.
"""

import argparse
import contextlib
import functools
import json
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
LIMITS = {"copy": 60, "cudnn": 90, "kernel": 90}
"""seconds, by the kind of step"""
_CALLS, _ROUNDS = 20, 5
_PRODUCT, _CACHE, _MEMORY = 800e6, 5.5e6, 3.35e6
"""What an H100 does in a microsecond: FLOP of a large matrix product (measured), bytes of the L2 cache (from elsewhere)
and of memory"""
_PROCESSORS = 132
_ONCE = ("padded", "copies", "one after the other", "cluster", "residual at once")
"""variants that a batch of 64 is enough to judge"""


class Shape(NamedTuple):
    """A convolution of C channels to C channels."""

    batch: int
    side: int
    channels: int

    @property
    def input(self) -> tuple[int, int, int, int]:
        """[B, H, W, C]."""
        return (self.batch, self.side, self.side, self.channels)


SHAPES = (
    *(Shape(batch, side, channels) for batch in (64, 128) for side, channels in ((32, 160), (16, 320), (8, 640))),
    *(Shape(128, side, channels) for side, channels in ((32, 128), (16, 256), (8, 512))),
)
"""WRN-28-10 at batches of 64 and 128, WRN-16-8 at 128"""


class Step(NamedTuple):
    """A piece of the queue."""

    name: str
    kind: str
    subject: Any
    """the way of copying, or (shape, variant or None)"""


def variants(shape: Shape) -> dict[str, Any]:
    """The kernel's variants for a shape, the likeliest first."""
    from experiments.kernels.convolution import Variant

    channels = 160 if shape.channels % 160 == 0 else 128
    few = shape.side == 8 and shape.batch == 64
    base = {"pixels": 128 if few else 256, "channels": channels, "depth": 32, "stages": 3, "overlap": True}
    found = {
        "filled": {"reading": "filled"},
        "padded": {"reading": "padded"},
        "copies": {"reading": "copies"},
        "one after the other": {"reading": "filled", "overlap": False},
        "persistent": {"reading": "filled", "persistent": True},
        "cluster": {"reading": "filled", "cluster": 2},
        "persistent cluster": {"reading": "filled", "cluster": 2, "persistent": True},
        "residual at once": {"reading": "filled", "stages": 2, "slots": channels // (64 if channels == 128 else 32)},
        "four stages": {"reading": "filled", "stages": 4, "slots": 1},
    }
    if shape.channels % 64 == 0:
        found["64 deep"] = {"reading": "filled", "depth": 64, "stages": 2, "slots": 1}
    if shape.side == 8:
        found["other tile"] = {"reading": "filled", "pixels": 256 if few else 128}
    if shape.channels % 256 == 0:
        found["256 channels"] = {"reading": "filled", "pixels": 128, "channels": 256, "stages": 2}
    if shape.batch > 64:
        found = {name: changes for name, changes in found.items() if name not in _ONCE}
    return {name: Variant(**{**base, **changes}) for name, changes in found.items()}


def steps() -> list[Step]:
    """The whole queue, in its order."""
    from experiments.kernels import copy_check

    found = [Step(f"copy: {way.name}", "copy", way) for way in copy_check.WAYS]
    for shape in SHAPES:
        where = f"{shape.batch} × {shape.side}×{shape.side}×{shape.channels}"
        found.append(Step(f"{where}: cuDNN", "cudnn", (shape, None)))
        for name, variant in variants(shape).items():
            found.append(Step(f"{where}: {name}", "kernel", (shape, variant)))
    return found


def estimate(shape: Shape, variant: Any) -> float:
    """Microseconds of a convolution with bias and residual: a model, written before anything was measured.

    A wave of blocks takes as long as the products or the copies from the L2 cache, whichever is longer. Starting and
    ending it takes 4 µs, or 2.5 where the next tile loads meanwhile. A launch takes 3 µs.
    """
    from experiments.kernels.convolution import plan

    sizes = plan(shape.input, shape.channels, variant)
    tiles = sizes.tiles[0] * sizes.tiles[1]
    running = min(tiles, _PROCESSORS)
    flop = 2 * 9 * shape.channels * variant.pixels * variant.channels
    rows = sizes.images * (sizes.rows + 2) * sizes.width
    copied = sizes.steps * 2 * variant.depth * (rows + 3 * variant.channels / variant.cluster)
    products = flop * _PROCESSORS / _PRODUCT * (1 if variant.overlap else 1.06)
    ends = 2.5 if variant.persistent else 4.0
    waves = -(-tiles // _PROCESSORS)
    memory = 3 * 2 * shape.batch * shape.side**2 * shape.channels / _MEMORY
    return max(waves * (max(products, copied * running / _CACHE) + ends) + 3, memory)


def table() -> str:
    """The estimates for a batch of 64."""
    shapes = SHAPES[:3]
    names = list(dict.fromkeys(name for shape in shapes for name in variants(shape)))
    lines = ["| variant | " + " | ".join(f"{shape.side}×{shape.side}×{shape.channels}" for shape in shapes) + " |"]
    lines.append("| --- " * (len(shapes) + 1) + "|")
    for name in names:
        cells = [f"{estimate(shape, found):.0f}" if (found := variants(shape).get(name)) else "" for shape in shapes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the steps that have no result yet; 2 where there is no Hopper GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what waits, with the estimates")
    parser.add_argument("--seconds", type=float, default=540, help="no step starts later")
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--out", type=Path, help="a folder that gets copies of the results")
    parser.add_argument("--compile", action="store_true", help="compile all kernels for an H200, without a GPU")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.list:
        print(*(step.name for step in steps()), "", table(), sep="\n")
        return 0
    if flags.compile:
        return compile_all([step for step in steps() if flags.only in step.name])
    machine = hopper()
    if machine is None:
        print("kernel_queue: needs an NVIDIA Hopper GPU (compute capability 9.0), and found none", file=sys.stderr)
        return 2
    results = Results(machine, RESULTS, flags.out)
    left = [step for step in steps() if flags.only in step.name and step.name not in results]
    if flags.work:
        return work(left)
    # A worker reads the results too, and so begins at the first step that has none.
    command = [sys.executable, "-m", "experiments.kernels.kernel_queue", "--work", f"--only={flags.only}"]
    drive([(step.name, LIMITS[step.kind]) for step in left], lambda name: command, results.add, flags.seconds)
    return 0


def hopper() -> str | None:
    """The name of the first GPU if it is of compute capability 9.0."""
    command = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    capability, _, name = said.partition("\n")[0].partition(", ")
    return name if capability == "9.0" else None


class Results:
    """The two files of results, written whole after each step."""

    def __init__(self, machine: str, folder: Path, copies: Path | None) -> None:
        self.folder, self.copies = folder, copies
        self.files: dict[str, dict[str, Any]] = {}
        for name in ("kernel_check", "kernels"):
            path = folder / f"{name}.json"
            start = {"command": "python -m experiments.kernels.kernel_queue", "steps": {}}
            self.files[name] = json.loads(path.read_text()) if path.exists() else start
            self.files[name]["machine"] = machine

    def __contains__(self, step: str) -> bool:
        return any(step in found["steps"] for found in self.files.values())

    def add(self, step: str, result: dict[str, Any]) -> None:
        """Writes what was checked to one file, what was timed to the other, and an error to both."""
        times = {key: value for key, value in result.items() if key == "error" or key.endswith(("us", "tflops"))}
        checks = {key: value for key, value in result.items() if key == "error" or key not in times}
        for name, part in (("kernel_check", checks), ("kernels", times)):
            if part:
                self.files[name]["steps"][step] = part
                self._write(name)

    def _write(self, name: str) -> None:
        path = self.folder / f"{name}.json"
        path.with_suffix(".partial").write_text(json.dumps(self.files[name], indent=1) + "\n")
        path.with_suffix(".partial").replace(path)
        if self.copies:
            self.copies.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.copies)


def drive(
    left: Sequence[tuple[str, float]],
    command: Callable[[str], list[str]],
    store: Callable[[str, dict[str, Any]], None],
    seconds: float,
) -> None:
    """Runs steps (name, limit in seconds) in workers until all have a result or `seconds` are over.

    A worker, started by `command(first step)`, prints a line of JSON {"step": name, …} for each step from that on. One
    that says nothing for a step's limit is killed. Its step gets {"error": …}, and a new worker goes on after it. A
    line with "ends" is a worker's last.
    """
    limits, waiting, ends = dict(left), [name for name, _ in left], time.monotonic() + seconds
    while waiting and time.monotonic() < ends:
        with _worker(command(waiting[0])) as lines:
            while waiting and time.monotonic() < ends:
                limit = limits[waiting[0]]
                dead = False
                try:
                    line = lines.get(timeout=min(limit, max(0.1, ends - time.monotonic())))
                except queue.Empty:
                    if time.monotonic() >= ends:
                        return
                    line, dead = {"error": f"nothing within {limit:.0f} s"}, True
                if "said" in line:
                    line, dead = {"error": f"the worker ended: {line['said']}"}, True
                name, dead = line.pop("step", waiting[0]), line.pop("ends", dead)
                if name in waiting:
                    waiting.remove(name)
                    store(name, line)
                    print(f"{name}: {json.dumps(line)[:200]}", flush=True)
                if dead:
                    break


@contextlib.contextmanager
def _worker(command: list[str]) -> Iterator["queue.Queue[dict[str, Any]]"]:
    """A worker's lines as they come, then {"said": the end of its errors}; it is killed on leaving."""
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []

        def listen() -> None:
            for line in process.stdout or ():
                with contextlib.suppress(ValueError):
                    lines.put(json.loads(line))
            errors.join()
            lines.put({"said": "".join(said)[-400:]})

        errors = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        errors.start()
        threading.Thread(target=listen, daemon=True).start()
        try:
            yield lines
        finally:
            process.kill()


def work(left: Sequence[Step]) -> int:
    """Does steps in this process and prints each one's result; ends after an error of the GPU's, which outlasts it."""
    import jax

    from experiments.kernels import copy_check

    for step in left:
        try:
            if step.kind == "copy":
                result = copy_check.check(step.subject)
            elif step.kind == "cudnn":
                result = time_cudnn(step.subject[0])
            else:
                result = check(*step.subject)
                result |= time_kernel(*step.subject) if result["right"] else {}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:600]}
            if isinstance(error, jax.errors.JaxRuntimeError):
                result["ends"] = True
        print(json.dumps({"step": step.name, **result}), flush=True)
        if "ends" in result:
            return 1
    return 0


def compile_all(some: Sequence[Step]) -> int:
    """Compiles the kernels down to machine code for a described H200, on a machine that has no GPU but `jax[cuda13]`.

    Prints what fails, and what NVIDIA's assembler says of registers that are spilled and products that are serialised.
    Returns the number of kernels that fail.
    """
    from experiments.speed import gpu_program  # Sets the environment that XLA needs: before JAX looks for a GPU.

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
        import jax
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="cuda", target_config=gpu_program.H200, topology="1x1x1")
        mesh = topologies.make_mesh(topology, (1,), ("device",))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for step in some:
            if step.kind == "cudnn":
                continue
            run, shapes = _program(step)
            arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
            try:
                jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
                said = "\n".join(path.read_text() for path in Path(folder).glob("*.ptxas"))
                spilled = max(map(int, re.findall(r"(\d+) bytes spill", said)))
                print(
                    f"{step.name}: compiles, {spilled} bytes spilled{', serialised' * ('serialized' in said)}",
                    flush=True,
                )
            except Exception as error:
                failed += 1
                print(f"{step.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            for path in Path(folder).iterdir():
                path.unlink()
    return failed


def _program(step: Step) -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]:
    """A step's kernel with what makes its input, and the shapes and types of its arguments."""
    import jax.numpy as jnp

    from experiments.kernels import convolution, copy_check

    if step.kind == "copy":
        way = step.subject
        shape = (2, copy_check.HEIGHT, copy_check.WIDTH, 2, way.depth)
        return lambda x: copy_check.built(way)(copy_check.source(x, way)), [(shape, jnp.bfloat16)]
    shape, variant = step.subject
    kernel, bias = (3, 3, shape.channels, shape.channels), (shape.channels,)
    run = functools.partial(convolution.conv, variant=variant)
    return run, [
        (shape.input, jnp.bfloat16), (kernel, jnp.bfloat16), (bias, jnp.float32), (shape.input, jnp.bfloat16),
    ]  # fmt: skip


def _arrays(shape: Shape) -> tuple[Any, Any, Any, Any]:
    """Input, kernel, bias and residual; the convolution of normal values has variance 1."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], shape.input, jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (3, 3, shape.channels, shape.channels)) / (9 * shape.channels) ** 0.5
    bias = jax.random.normal(keys[2], (shape.channels,))
    return x, kernel.astype(jnp.bfloat16), bias, jax.random.normal(keys[3], shape.input, jnp.bfloat16)


def _plain(x: Any, kernel: Any, precision: Any = None) -> Any:
    import jax

    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimensions, precision=precision
    )


def check(shape: Shape, variant: Any, *, interpret: bool = False) -> dict[str, Any]:
    """The largest errors against float32, of pixels at the edge and inside, with a residual and with an activation.

    An error counts where it is more than bfloat16's rounding, 2^-8 of the value.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.kernels.convolution import NEGATIVE_SLOPE, conv

    x, kernel, bias, residual = _arrays(shape)
    edge = np.ones((shape.side, shape.side), bool)
    edge[1:-1, 1:-1] = False
    plain = _plain(x.astype(jnp.float32), kernel.astype(jnp.float32), jax.lax.Precision.HIGHEST) + bias
    result: dict[str, Any] = {"right": True, "seconds": time.monotonic()}
    for name, added, activate in (("residual", residual, False), ("leaky ReLU", None, True)):
        wanted = plain if added is None else plain + added.astype(jnp.float32)
        if activate:
            wanted = jnp.where(wanted > 0, wanted, NEGATIVE_SLOPE * wanted)
        found = jax.jit(
            lambda x, kernel, bias, added, activate=activate: conv(
                x, kernel, bias, added, variant=variant, activate=activate, interpret=interpret
            )
        )(x, kernel, bias, added)
        error = np.asarray(jnp.abs(found.astype(jnp.float32) - wanted))
        # NaN is no small error.
        over = ~(error <= 2**-8 * np.abs(np.asarray(wanted)) + 1e-3)
        result[name] = {
            where: {"largest_error": float(error[:, mask].max()), "wrong_values": int(over[:, mask].sum())}
            for where, mask in (("edge", edge), ("inside", ~edge))
        }
        result["right"] &= not over.any()
    return {**result, "right": bool(result["right"]), "seconds": round(time.monotonic() - result["seconds"], 1)}


def _microseconds(step: Callable[..., Any], state: Any, *constant: Any) -> float:
    """Median time of one call of state -> state, from rounds of calls in a row under one jit."""
    import jax

    def calls(state: Any, *constant: Any) -> Any:
        for _ in range(_CALLS):
            state = step(state, *constant)
        return state

    # A jit of its own, so that it is lowered once and not in every call.
    step, run, times = jax.jit(step), jax.jit(calls), []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        jax.block_until_ready(run(state, *constant))
        times.append(time.perf_counter() - started)
    return round(statistics.median(times[1:]) / _CALLS * 1e6, 1)


def time_cudnn(shape: Shape) -> dict[str, Any]:
    """cuDNN's convolution alone, and with bias and residual."""
    import jax.numpy as jnp

    x, kernel, bias, _ = _arrays(shape)
    small = bias.astype(jnp.bfloat16)
    alone = _microseconds(_plain, x, kernel)
    whole = _microseconds(lambda x, kernel, bias: _plain(x, kernel) + bias + x, x, kernel, small)
    return {"alone_us": alone, "whole_us": whole, **_rates(shape, alone, whole)}


def time_kernel(shape: Shape, variant: Any) -> dict[str, Any]:
    """The kernel with bias and residual, from an input as it reads it and from a plain one."""
    from experiments.kernels import convolution

    x, kernel, bias, residual = _arrays(shape)
    run = convolution.built(shape.input, shape.channels, variant, processors=_PROCESSORS)
    source, weights = convolution.source(x, variant), convolution.weights(kernel, variant)
    flat = residual.reshape(-1, shape.channels)
    alone = _microseconds(lambda state, *constant: run(*constant, state), flat, source, weights, bias)

    def whole_step(state: Any, weights: Any, bias: Any) -> Any:
        return run(convolution.source(state.reshape(shape.input), variant), weights, bias, state)

    whole = _microseconds(whole_step, x.reshape(-1, shape.channels), weights, bias)
    predicted = {"estimate_us": round(estimate(shape, variant), 1)}
    return {"kernel_us": alone, "whole_us": whole, **predicted, **_rates(shape, alone, whole)}


def _rates(shape: Shape, alone: float, whole: float) -> dict[str, float]:
    flop = 2 * 9 * shape.batch * shape.side**2 * shape.channels**2
    return {"tflops": round(flop / alone / 1e6), "whole_tflops": round(flop / whole / 1e6)}


if __name__ == "__main__":
    sys.exit(main())
