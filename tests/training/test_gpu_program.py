"""The training step as it is lowered for a GPU, which needs none: bfloat16 where it should be, and nowhere else."""

import re

import jax
import pytest
import tiny

CONVOLUTIONS, SHORTCUTS = 7, 2
"""of a WRN-10-1's forward pass, 3×3 and 1×1"""


@pytest.fixture(scope="module")
def functions():
    """The StableHLO of a bfloat16 step for CUDA: the text of each function by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        start = tiny.start(tiny.config(**{"model.dtype": "bfloat16"}))
        mapped, places = start.step.func, start.step.args
        traced = jax.jit(lambda *args: mapped(*args)).trace(*places, start.state, start.buffer, start.data.at(0))
    parts = traced.lower(lowering_platforms=("cuda",)).as_text().split("  func.func ")[1:]
    return {re.search(r"@(\w+)\(", part)[1]: part for part in parts}


@pytest.fixture(scope="module")
def step(functions):
    """The function that holds the chain's loop."""
    return next(text for text in functions.values() if "stablehlo.while" in text)


@pytest.fixture(scope="module")
def loop(step):
    """The chain's loop itself."""
    lines = step.splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "stablehlo.while" in line)
    indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    end = next(number for number in range(start, len(lines)) if lines[number].rstrip() == indent + "}")
    return "".join(lines[start : end + 1])


@pytest.fixture(scope="module")
def chain_step(functions, loop):
    """All that one step of the chain does: in the loop, or, as some versions of JAX put it, in functions it calls."""
    texts, called = [loop], set()
    for text in texts:
        new = set(re.findall(r"call @(\w+)\(", text)) - called
        called |= new
        texts += [functions[name] for name in sorted(new)]
    return "".join(texts)


def _convolutions(text):
    """(operand, kernel, result) types of every convolution."""
    types = r"stablehlo\.convolution.*: \(tensor<(\w+)>, tensor<(\w+)>\) -> tensor<(\w+)>"
    return re.findall(types, text)


def test_every_convolution_is_in_bfloat16_and_nothing_in_float64(functions):
    found = [kinds for text in functions.values() for kinds in _convolutions(text)]
    assert len(found) == 2 * CONVOLUTIONS + 3 * CONVOLUTIONS - 1  # the first image batch needs no gradient
    assert all(kind.endswith("bf16") for kinds in found for kind in kinds)
    assert not any("f64" in text for text in functions.values())


def test_the_chain_computes_input_gradients_and_no_weight_gradients_and_casts_no_kernel(chain_step, step, loop):
    kernel_shaped = lambda text: [result for *_, result in _convolutions(text) if result.startswith("3x3x")]  # noqa: E731
    assert len(_convolutions(chain_step)) == 2 * CONVOLUTIONS
    assert not kernel_shaped(chain_step)
    assert len(kernel_shaped(step.replace(loop, ""))) == CONVOLUTIONS
    cast = r"stablehlo\.convert .*tensor<(?:3x3|1x1)x\d+x\d+xf32>\) -> tensor<[\dx]+xbf16>"
    assert not re.findall(cast, chain_step)
    assert re.findall(cast, step)


def test_chain_state_noise_and_logsumexp_are_float32(functions, loop):
    carried = loop.splitlines()[0].rpartition(" : ")[2]
    assert "tensor<2x8x8x1xf32>" in carried
    # Nothing in bfloat16 goes from step to step but the convolutions' parameters, which no step changes.
    narrow = re.findall(r"tensor<([\dx]+)xbf16>", carried)
    assert len(narrow) == 2 * (CONVOLUTIONS + SHORTCUTS)
    assert all(re.fullmatch(r"(3x3|1x1)x\d+x\d+|\d+", shape) for shape in narrow)
    lines = "".join(functions.values()).splitlines()
    reduced = [line for line in lines if re.search(r"stablehlo\.(exponential|log|log_plus_one)\b", line)]
    assert reduced
    assert not [line for line in reduced if "bf16" in line]


def test_what_a_step_is_given_is_float32_and_no_array_is_without_elements(functions):
    signature = functions["main"].splitlines()[0]
    assert "tensor<3x3x1x16xf32>" in signature
    assert "bf16" not in signature
    # jaxlib 0.11.2 dies of an empty one that comes from outside a mapped step.
    assert not any("tensor<0x" in text for text in functions.values())


def test_what_devices_exchange_stands_together_after_the_chain(step, chain_step):
    assert "all_reduce" not in chain_step
    # The compiler makes one transfer of it.
    assert step.index("stablehlo.while") < step.index("all_reduce")
