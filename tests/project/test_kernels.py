"""The GPU kernels of experiments/kernels and their queue, as far as a machine without a GPU can try them."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.kernels import kernel_queue

try:
    from jax.experimental.pallas import mosaic_gpu

    LACKING = not hasattr(mosaic_gpu, "InterpretGPUParams")
except ImportError:
    LACKING = True
if not LACKING:
    from experiments.kernels import convolution, copy_check
needs_mosaic = pytest.mark.skipif(LACKING, reason="needs the interpreter of Pallas Mosaic GPU: JAX 0.11 or newer")
SHAPE = kernel_queue.Shape(1, 16, 64)


@pytest.fixture
def variant():
    # Two tiles an image, two tiles of channels, and more stages of work than there is room for.
    return convolution.Variant(pixels=128, channels=32, stages=2, reading="copies")


@needs_mosaic
def test_every_padded_way_of_copying_is_right_in_the_interpreter():
    # The views of a union do not share memory there.
    ways = [way for way in copy_check.WAYS if way.border == "padded" and way.memory != "union" and way.depth == 32]
    assert [copy_check.check(way, interpret=True)["right"] for way in ways] == [True] * 4


@needs_mosaic
@pytest.mark.parametrize("changes", [{}, {"overlap": True, "persistent": True, "cluster": 2, "slots": 1}])
def test_the_convolution_is_right_in_the_interpreter(variant, changes):
    found = kernel_queue.check(SHAPE, dataclasses.replace(variant, **changes), interpret=True)
    assert found["right"], found


@needs_mosaic
def test_tiles_of_several_images_are_right_and_a_wrong_kernel_is_seen(variant, monkeypatch):
    shape, images = kernel_queue.Shape(4, 8, 32), dataclasses.replace(variant, pixels=256)
    assert kernel_queue.check(shape, images, interpret=True)["right"]
    right = convolution.weights
    monkeypatch.setattr(convolution, "weights", lambda kernel, variant: right(kernel.swapaxes(0, 1), variant))
    assert not kernel_queue.check(shape, images, interpret=True)["right"]


@needs_mosaic
@pytest.mark.parametrize("reading", ["filled", "padded", "copies"])
def test_the_kernel_is_lowered_for_a_gpu(reading):
    shape = kernel_queue.SHAPES[0]
    variant = dataclasses.replace(kernel_queue.variants(shape)["filled"], reading=reading)
    step = kernel_queue.Step("", "kernel", (shape, variant))
    run, arguments = kernel_queue._program(step)
    traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(*argument) for argument in arguments))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1
    pixels = {"filled": 64 * 32 * 32, "padded": 64 * 34 * 34, "copies": 3 * 64 * 34 * 32}
    assert convolution.source(jnp.zeros(shape.input), variant).size == pixels[reading] * 160


@needs_mosaic
def test_every_variant_of_the_queue_fits_its_shape():
    for step in kernel_queue.steps():
        if step.kind == "kernel":
            shape, variant = step.subject
            assert convolution.shared_bytes(shape.input, shape.channels, variant) < 230_000, step.name
    assert kernel_queue.table() in kernel_queue.__doc__


@needs_mosaic
def test_a_variant_that_does_not_fit_is_refused(variant):
    for changes, reason in (
        ({"channels": 48}, "output channels"), ({"depth": 16}, "input channels"), ({"pixels": 64}, "64 pixels"),
        ({"stages": 1, "overlap": True}, "two stages"), ({"cluster": 3}, "cluster"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            convolution.plan(SHAPE.input, SHAPE.channels, dataclasses.replace(variant, **changes))


def test_steps_that_crash_hang_or_fail_cost_nothing_else():
    worker = """
import json, os, sys, time
for name in "abcdefg"["abcdefg".index(sys.argv[1]):]:
    if name == "b":
        os.write(2, b"out of memory"), os._exit(7)
    if name == "d":
        time.sleep(60)
    result = {"e": {"error": "too large"}, "f": {"error": "illegal address", "ends": True}}.get(name, {"us": 1})
    print(json.dumps({"step": name, **result}), flush=True)
    if "ends" in result:
        break
"""
    found = {}
    kernel_queue.drive(
        [(name, 1) for name in "abcdefg"], lambda name: [sys.executable, "-c", worker, name], found.__setitem__, 30
    )
    measured = {"us": 1}
    assert found == {
        "a": measured, "b": {"error": "the worker ended: out of memory"}, "c": measured,
        "d": {"error": "nothing within 1 s"}, "e": {"error": "too large"}, "f": {"error": "illegal address"},
        "g": measured,
    }  # fmt: skip


def test_results_go_to_the_file_they_belong_to_and_are_not_taken_again(tmp_path):
    results = kernel_queue.Results("a GPU", tmp_path, tmp_path / "copies")
    results.add("one", {"right": True, "residual": {}, "kernel_us": 50.0, "tflops": 600})
    results.add("two", {"error": "too large"})
    checks = json.loads((tmp_path / "copies" / "kernel_check.json").read_text())["steps"]
    times = json.loads((tmp_path / "kernels.json").read_text())["steps"]
    assert checks == {"one": {"right": True, "residual": {}}, "two": {"error": "too large"}}
    assert times == {"one": {"kernel_us": 50.0, "tflops": 600}, "two": {"error": "too large"}}
    later = kernel_queue.Results("a GPU", tmp_path, None)
    assert ["one" in later, "two" in later, "three" in later] == [True, True, False]


def test_without_a_hopper_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["kernel_queue"])
    assert kernel_queue.main() == 2
    needs = "kernel_queue: needs an NVIDIA Hopper GPU (compute capability 9.0), and found none\n"
    assert capsys.readouterr().err == needs
