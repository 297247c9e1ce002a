"""A worker of experiments/speed/benchmark.py: our training step, as the command runs it."""

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.workers import peak_bytes, resident_bytes, serve, timed
from jem_jax import config as configuration
from jem_jax import convolution, energy, objective, prng, replay_buffer, sgld, torch_import
from jem_jax.config import Config
from jem_jax.datasets import Dataset, Split
from jem_jax.distributed import devices, processes
from jem_jax.training import forecast, network, quantities
from jem_jax.training.setup import prepare as prepare_run

_state: dict[str, Any] = {}


def start(batch: int, slots: int, without: str = "") -> str:
    """Starts JAX as the command does, but for one of the levers of levers.py; its devices in words."""
    if without == "input gradient as a convolution":
        convolution._conv3x3_forward_gradient = convolution._conv3x3
    elif without == "matrix products":
        convolution._FEW_PIXELS = 0
    elif without == "parts of a batch":
        network._CPU_PIXELS = 2**62
    elif without == "cast once":
        network.Network.cast = lambda self, variables: variables
    elif without == "one pass":
        network.Network.train_logits = _train_logits_apart
    cpu_devices = 1 if without == "a device for each core" else devices.choose_cpu_devices((batch, slots))
    processes.start(processes.Cluster(), cpu_devices, 1)
    return f"jax {jax.__version__}, {devices.describe()}"


def _train_logits_apart(
    self: network.Network, variables: network.Variables, batches: Sequence[jax.Array], key: jax.Array
) -> tuple[list[jax.Array], network.Variables]:
    """`train_logits` of a network without statistics, a pass for each batch."""
    return [self.train_pass(variables, batch, key)[0] for batch in batches], {}


def prepare(shape: dict, settings: dict) -> dict:
    """Builds and compiles the training step for a shape."""
    return {**build(shape, settings), **compiled()}


def build(shape: dict, settings: dict, weights: str = "") -> dict:
    """Everything that a training step needs; stores weights and logits of a batch where asked for."""
    config = configuration.validate(settings)
    _state.clear()
    before = resident_bytes()
    dataset = _dataset(shape, config.training.batch_size)
    run = prepare_run(config, dataset)
    net, image_shape = run.network, dataset.image_shape
    state = devices.replicate(run.begin()[0])
    buffer = replay_buffer.init(jax.random.key(1), config.sampler.buffer_size, image_shape)
    buffer = devices.shard_buffer(buffer)
    found = {
        "devices": devices.describe(),
        "flops": forecast.flops_per_iteration(
            config, net, state.evaluation_variables, image_shape, run.phases[-1].program
        ),
    }
    if weights:
        x = np.random.default_rng(0).uniform(-1, 1, (4, *image_shape)).astype(np.float32)
        arrays = torch_import.state_dict_from_variables(net.module, jax.device_get({"params": state.params}))
        np.savez(weights, **arrays, x=x.transpose(0, 3, 1, 2))
        found["logits"] = np.asarray(jax.jit(net.logits)({"params": state.params}, x), np.float64).tolist()
    _state.update(
        config=config,
        image_shape=image_shape,
        net=net,
        state=state,
        buffer=buffer,
        data=run.data,
        step=run.step(),
        chain=_chain(config, net),
        number=0,
        before=before,
    )
    return found


def compiled() -> dict[str, float]:
    """Compiles the step and runs it once: the seconds of both."""
    return {"compile_seconds": iterations(1)}


def iterations(count: int) -> float:
    """Seconds of an iteration, the mean of `count`."""

    def run() -> None:
        _state["state"], _state["buffer"] = _state["step"](
            _state["state"], _state["buffer"], _state["data"].at(_state["number"])
        )
        _state["number"] += 1

    return timed(run, count, lambda: jax.block_until_ready((_state["state"], _state["buffer"])))


def _dataset(shape: dict, batch: int) -> Dataset:
    random = np.random.default_rng(0)
    count = 4 * batch
    images = random.integers(0, 256, (count, shape["side"], shape["side"], shape["channels"]), np.uint8)
    split = Split(images, (np.arange(count) % shape["classes"]).astype(np.int32))
    return Dataset("benchmark", tuple(map(str, range(shape["classes"]))), split, split, split)


def _chain(config: Config, net: network.Network) -> Any:
    """The chain alone, mapped over devices as in the step."""

    def run(variables: Any, key: jax.Array, x: jax.Array) -> jax.Array:
        own = prng.for_examples(key, len(x), devices.index() * len(x))
        variables = net.cast(variables)
        density = energy.marginal(lambda x: net.logits(variables, x))
        settings = {"num_steps": config.sampler.num_steps, **quantities.sgld_settings(config.sampler)}
        return network.in_parts(lambda part: sgld.chain(part[0], density, part[1], **settings), (own, x), x.shape)

    mapped = devices.per_device(run, in_axes=(None, None, 0), out_axes=0)
    key = devices.replicate(jax.random.key(2))

    def chain() -> jax.Array:
        start = _chains(config.training.batch_size // devices.count())
        return mapped(_state["state"].evaluation_variables, key, start)

    return chain


def _chains(size: int) -> jax.Array:
    """The first chains of every device's part of the buffer [devices, size, H, W, channels]."""
    return _state["buffer"][:, :size].reshape(-1, size, *_state["image_shape"])


def chains(count: int) -> float:
    """Seconds of a chain of K steps, the mean of `count`."""
    ends: list[jax.Array] = []
    return timed(lambda: ends.append(_state["chain"]()), count, lambda: jax.block_until_ready(ends))


def losses(count: int) -> float:
    """Seconds of the loss's gradient alone, of three batches and without what devices exchange."""
    config, net = _state["config"], _state["net"]
    size = config.training.batch_size // devices.count()
    labels = jnp.zeros(size, jnp.int32)

    def run(variables: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = net.train_logits({**variables, "params": params}, [x, x + 0.1, -x], jax.random.key(0))
            named = objective.Logits(*logits)
            return objective.joint_loss(named, labels, quantities.weights(config))[0]

        return jax.grad(loss)(variables["params"])

    if "loss" not in _state:
        _state["loss"] = devices.per_device(run, in_axes=(None, 0), out_axes=0)
    start = _chains(size)
    results: list[Any] = []
    call = lambda: results.append(_state["loss"](_state["state"].evaluation_variables, start))  # noqa: E731
    jax.block_until_ready(_state["loss"](_state["state"].evaluation_variables, start))
    return timed(call, count, lambda: jax.block_until_ready(results))


def dispatch(count: int) -> float:
    """Seconds until the call of a step returns, which is before the devices are done: the host's part."""
    iterations(1)
    total = 0.0
    for _ in range(count):
        started = time.perf_counter()
        _state["state"], _state["buffer"] = _state["step"](
            _state["state"], _state["buffer"], _state["data"].at(_state["number"])
        )
        total += time.perf_counter() - started
        jax.block_until_ready(_state["state"])
    return total / count


def trace(folder: str, count: int) -> float:
    """As `iterations`, with a profile of them written to a folder."""
    with jax.profiler.trace(folder):
        return iterations(count)


def _program() -> str:
    """The compiled step, as text."""
    step = _state["step"]
    return step.func.lower(*step.args, _state["state"], _state["buffer"], _state["data"].at(0)).compile().as_text()


def layouts() -> dict[str, int]:
    """How many convolutions of the compiled step have their dimensions in which order: input, kernel -> output."""
    return dict(Counter(re.findall(r"dim_labels=([\w>-]+)", _program())))


def communication() -> dict:
    """What devices exchange in a step, from the compiled program: how many all-reduces, and bytes of all."""
    found = re.findall(r"= (.*) all-reduce(?:-start)?\(", _program())
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4}
    count = 0
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", " ".join(found)):
        count += sizes[kind] * math.prod(int(side) for side in shape.split(",") if side)
    return {
        "all_reduces": len(found),
        "bytes": count,
        "parameters": forecast.parameter_count(_state["state"].evaluation_variables),
    }


def memory() -> dict:
    """Peak memory in use: of the device's allocator, or how far the resident set grew."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "what": "peak_bytes_in_use of the device"}
    return {"bytes": peak_bytes() - _state["before"], "what": "growth of the peak resident set"}


def products(side: int, precision: str, count: int) -> float:
    """FLOP/s of a product of two square matrices, the best of `count`; precision is "float32", "tf32" or "bfloat16"."""
    a = jax.random.uniform(jax.random.key(0), (side, side), jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        multiply = jax.jit(jnp.matmul)
        jax.block_until_ready(multiply(a, a))
        results: list[jax.Array] = []
        wait = lambda: jax.block_until_ready(results)  # noqa: E731
        return 2 * side**3 / min(timed(lambda: results.append(multiply(a, a)), 3, wait) for _ in range(count))


if __name__ == "__main__":
    functions = (
        start, prepare, build, compiled, iterations, chains, losses, dispatch, trace, layouts, communication, memory,
        products,
    )  # fmt: skip
    serve({function.__name__: function for function in functions})
