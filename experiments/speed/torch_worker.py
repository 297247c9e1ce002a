"""A worker of experiments/speed/benchmark.py: PyTorch's training loops, one at a time."""

import os
import time

import numpy as np
import torch

from experiments.speed.torch_loops import Network, OfficialLoop, Shape, TunedLoop
from experiments.speed.workers import peak_bytes, resident_bytes, serve, timed

SLOTS = 10_000
_state: dict = {}


def prepare(shape: dict, batch: int, steps: int, weights: str, style: str, tf32: bool = False) -> dict:
    """Builds a loop on our weights and runs it once; style is "official", "tuned" or "tuned, compiled"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # By default PyTorch uses TF32 in convolutions and not in matrix products.
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32, False
    torch.backends.cudnn.benchmark = style != "official"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = resident_bytes()
    sizes = Shape(**shape)
    network = Network(sizes)
    with np.load(weights) as arrays:
        network.load_state_dict({name: torch.tensor(arrays[name]) for name in network.state_dict()})
    network.to(device)
    images = [torch.rand(batch, sizes.channels, sizes.side, sizes.side, device=device) * 2 - 1 for _ in range(2)]
    batches = (*images, torch.randint(0, sizes.classes, (batch,), device=device))
    if style == "official":
        loop = OfficialLoop(network, batches, steps, SLOTS)
    else:
        loop = TunedLoop(network, batches, steps, SLOTS, compiled=style == "tuned, compiled")
    started = time.perf_counter()
    _state.update(loop=loop, start=images[0].clone(), before=before, device=device)
    first_logits = network(torch.tensor(np.load(weights)["x"], device=device)) if "x" in np.load(weights) else None
    loop.iteration()
    _wait()
    seconds = time.perf_counter() - started
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "first_seconds": seconds}
    return found | ({} if first_logits is None else {"logits": first_logits.detach().cpu().tolist()})


def iterations(count: int) -> float:
    """Seconds of an iteration, the mean of `count`."""
    return timed(_state["loop"].iteration, count, _wait)


def chains(count: int) -> float:
    """Seconds of a chain of K steps, the mean of `count`."""
    return timed(lambda: _state["loop"].chain(_state["start"].detach()), count, _wait)


def memory() -> dict:
    """Peak memory in use: of the device's allocator, or how far the resident set grew."""
    if _state["device"].type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(), "what": "peak of PyTorch's allocator"}
    return {"bytes": peak_bytes() - _state["before"], "what": "growth of the peak resident set"}


def products(side: int, precision: str, count: int) -> float:
    """FLOP/s of a product of two square matrices, the best of `count`; precision is "float32", "tf32" or "bfloat16"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a = torch.rand(side, side, device=device).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    seconds = min(timed(lambda: a @ a, 3, _wait) for _ in range(count))
    return 2 * side**3 / seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    serve({f.__name__: f for f in (prepare, iterations, chains, memory, products)})
