"""Which way of copying a shifted tile of an image into shared memory by TMA gives the right values on a GPU?

A convolution reads an image at nine shifts by -1, 0 and 1 along H and W, with zeros outside. Each way here copies one
image at all nine shifts into shared memory and back, and counts the wrong values, at the image's edge and inside it.

| way | input | shared memory | expected on a GPU |
| --- | --- | --- | --- |
| plain | padded or filled | rows of pixels | right |
| swizzled | padded or filled | rows of pixels, swizzled | right |
| tiled | padded or filled | tiles of 8 pixels, swizzled | wrong where the shift along W is no multiple of 8 |
| union | padded or filled | written as `swizzled`, read as tiles | right: what the convolution needs |
| copies | three shifted inputs, padded along H | tiles, swizzled | right |

`padded` means that the caller adds a border of zeros, `filled` that TMA fills in zeros outside of the input. Wrong
values have two causes. A start along a tiled dimension is divided by 8 without its sign. A box that begins inside a
tile takes the rest from the wrong one (jax-ml/jax#34102). JAX's interpreter shows neither, and moves a start below 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEIGHT, WIDTH = 8, 16
_IMAGE, _BLOCK = 1, 1
"""the image and the block of channels that are copied, of two each"""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of copying; `depth` channels of bfloat16, 32 or 64, are a row of the swizzle."""

    memory: str
    border: str
    depth: int

    @property
    def name(self) -> str:
        """As the results call it."""
        return f"{self.memory}, {self.border}, {2 * self.depth} bytes"


WAYS = tuple(
    Way(memory, border, depth)
    for depth in (32, 64)
    for memory, border in (
        *((memory, border) for memory in ("plain", "swizzled", "tiled", "union") for border in ("padded", "filled")),
        ("copies", "padded"),
    )
)


def images(depth: int) -> np.ndarray:
    """Two images [2, H, W, 2, depth] of whole numbers that bfloat16 holds exactly, none of them 0."""
    return np.random.default_rng(0).integers(1, 256, (2, HEIGHT, WIDTH, 2, depth)).astype(np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    """The image at nine shifts, [9, H, W, depth]."""
    padded = np.pad(x[_IMAGE, :, :, _BLOCK], ((1, 1), (1, 1), (0, 0)))
    return np.stack([padded[top : top + HEIGHT, left : left + WIDTH] for top in range(3) for left in range(3)])


def check(way: Way, *, interpret: bool = False) -> dict[str, Any]:
    """Copies at all nine shifts: whether all values are right, and how many are wrong at each shift."""
    x = images(way.depth)
    out = built(way, interpret=interpret)(source(jnp.asarray(x, jnp.bfloat16), way))
    wrong = np.asarray(out, np.float32).reshape(9, HEIGHT, WIDTH, way.depth) != expected(x)
    edge = np.ones((HEIGHT, WIDTH), bool)
    edge[1:-1, 1:-1] = False
    counts = {
        f"shift along H {index // 3 - 1}, along W {index % 3 - 1}": {
            "edge": int(wrong[index][edge].sum()),
            "inside": int(wrong[index][~edge].sum()),
            "values": way.depth * HEIGHT * WIDTH,
        }
        for index in range(9)
        if wrong[index].any()
    }
    return {"way": way.name, "right": not counts, "wrong": counts}


def source(x: jax.Array, way: Way) -> jax.Array:
    """The input [B, H, W, blocks, depth] as the kernel reads it."""
    if way.border == "filled":
        return x
    # Tiles take whole tiles of pixels alone: the border on the right is wider there.
    right = 8 - 1 if way.memory == "tiled" else 1
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, right), (0, 0), (0, 0)))
    return jnp.stack([padded[:, :, left : left + WIDTH] for left in range(3)]) if way.memory == "copies" else padded


def built(way: Way, *, interpret: bool = False) -> Any:
    """The kernel: source -> [9, H, W, depth], or [9, H·W, depth] where it is read as tiles of a union."""
    depth, shape = way.depth, (HEIGHT, WIDTH, way.depth)
    swizzle = plgpu.SwizzleTransform(2 * depth)
    tiles = plgpu.TilingTransform((1, 8, depth))
    refs = {
        "plain": plgpu.SMEM(shape, jnp.bfloat16),
        "swizzled": plgpu.SMEM(shape, jnp.bfloat16, transforms=(swizzle,)),
        "tiled": plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiles, swizzle)),
    }
    flat = plgpu.SMEM((HEIGHT * WIDTH, depth), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, depth)), swizzle))
    refs |= {"union": plgpu.RefUnion(refs["swizzled"], flat), "copies": refs["tiled"]}
    out_shape = (9, HEIGHT * WIDTH, depth) if way.memory == "union" else (9, *shape)
    return plgpu.kernel(
        functools.partial(_body, way),
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.bfloat16),
        scratch_types=[refs[way.memory], plgpu.Barrier()],
        grid=(9,),
        grid_names=("shift",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _body(way: Way, source: Any, out: Any, memory: Any, arrived: Any) -> None:
    shift = lax.axis_index("shift")
    # The border that the caller adds moves the origin by one.
    origin = 1 if way.border == "filled" else 0
    rows = pl.ds(shift // 3 - origin, HEIGHT)
    written, read = memory if way.memory == "union" else (memory, memory)
    if way.memory == "copies":
        part = source.at[lax.rem(shift, 3), _IMAGE, rows, :, _BLOCK]
    else:
        part = source.at[_IMAGE, rows, pl.ds(lax.rem(shift, 3) - origin, WIDTH), _BLOCK]
    plgpu.copy_gmem_to_smem(part, written, arrived)
    plgpu.barrier_wait(arrived)
    plgpu.copy_smem_to_gmem(read, out.at[shift])
    plgpu.wait_smem_to_gmem(0)
