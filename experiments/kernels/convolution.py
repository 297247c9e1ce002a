"""A 3×3 convolution for Hopper in Pallas Mosaic GPU: an implicit matrix product of bfloat16, added up in float32.

A block computes `pixels` output pixels (whole rows of one image, or whole images) times `channels` output channels.
One warpgroup loads by TMA, two multiply. A stage holds what one column of the 3×3 kernel needs for `depth` input
channels: the rows of the tile and one more on both sides, shifted along W by the copy, and the weights of the column's
three taps. The three taps read the same rows at offsets of whole rows. The input is so copied 3·(rows + 2)/rows times
instead of nine. Wgmma takes 160 channels as they are.

How the shift along W is read (`reading`):
  copies: the caller makes the three shifted inputs. Nothing in it is in doubt; it costs three writes of the input.
  padded: the caller adds a border of zeros. The copy's shared memory has a swizzle and no tiles, since the index
    arithmetic of tiles is wrong at a column that is no multiple of 8. Wgmma reads the same bytes as tiles of 8 pixels:
    a `RefUnion` of both views. JAX warns that a union need not lay them out alike; copy_check.py decides.
  filled: the same without a border: TMA gives zeros outside of the input. This saves a pass over memory.

Leaky ReLU stands in the epilogue of the convolution before, not in a prologue: as a prologue every one of the three
reads would pass through registers. `activate` says that the output is activated. The input gradient is the same
convolution with the kernel flipped and transposed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
NEGATIVE_SLOPE = 0.2
READINGS = ("copies", "padded", "filled")
_COMPUTE = 2
"""warpgroups that multiply; one more loads"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the kernel cuts its work."""

    pixels: int = 256
    channels: int = 160
    depth: int = 32
    """input channels of a stage, 32 or 64: one row of the swizzle"""
    stages: int = 3
    slots: int = 2
    """buffers of a warpgroup's epilogue"""
    reading: str = "padded"
    persistent: bool = False
    """one block a processor, which loads the next tile during the epilogue of the last"""
    cluster: int = 1
    """blocks that load their weights together"""
    overlap: bool = False
    """a stage's products are issued before the products of the stage before have ended"""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a tile for one shape."""

    width: int
    rows: int
    """of an image in a tile"""
    images: int
    segment: int
    """pixels of one image that a warpgroup multiplies"""
    parts: int
    """images of a warpgroup"""
    steps: int
    tiles: tuple[int, int]
    """along pixels and along channels"""
    chunk: int
    """channels that the epilogue writes at once"""


def plan(shape: tuple[int, ...], channels_out: int, variant: Variant) -> _Plan:
    """How `variant` cuts an input [B, H, W, C] and `channels_out`.

    Raises:
      ValueError: the variant does not fit the shape.
    """
    batch, height, width, channels = shape
    half = variant.pixels // _COMPUTE
    rows = min(height, variant.pixels // width)
    images = variant.pixels // (rows * width)
    parts = max(1, images // _COMPUTE)
    segment = half // parts
    pixel_tiles = batch * height * width // variant.pixels
    fits = {
        "W is a multiple of 8": width % 8 == 0,
        "a tile is whole rows, the same number in every tile": height % rows == 0,
        "the pixels are whole tiles": images * rows * width == variant.pixels and batch % images == 0,
        "a warpgroup has whole images or half of one": images == 1 or images % _COMPUTE == 0,
        "a warpgroup multiplies 64 pixels at a time": segment % 64 == 0,
        "the input channels are whole stages": variant.depth in (32, 64) and channels % variant.depth == 0,
        "the output channels are whole tiles of at most 256": channels_out % variant.channels == 0
        and variant.channels <= 256
        and variant.channels % 32 == 0,
        "products overlap in two stages or more": variant.stages > 1 or not variant.overlap,
        "a cluster has whole tiles": pixel_tiles % variant.cluster == 0,
    }
    for condition, holds in fits.items():
        if not holds:
            raise ValueError(f"{variant} does not fit {shape} and {channels_out} channels: {condition}")
    chunk = 64 if variant.channels % 64 == 0 else 32
    steps = 3 * channels // variant.depth
    return _Plan(width, rows, images, segment, parts, steps, (pixel_tiles, channels_out // variant.channels), chunk)


def shared_bytes(shape: tuple[int, ...], channels_out: int, variant: Variant) -> int:
    """Shared memory of a block; Hopper has 232,448 bytes."""
    sizes = plan(shape, channels_out, variant)
    stage = (sizes.images * (sizes.rows + 2) * sizes.width + 3 * variant.channels) * variant.depth
    return 2 * (variant.stages * stage + variant.slots * variant.pixels * sizes.chunk)


def source(x: Array, variant: Variant) -> Array:
    """The input [B, H, W, C] as the kernel reads it, with C split into rows of the swizzle."""
    x = x.reshape(*x.shape[:3], -1, variant.depth)
    if variant.reading == "filled":
        return x
    width = x.shape[2]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    if variant.reading == "padded":
        return x
    shifted = jnp.stack([x[:, :, shift : shift + width] for shift in range(3)])
    return shifted.reshape(3, len(x), -1, *x.shape[3:])


def weights(kernel: Array, variant: Variant) -> Array:
    """The kernel [3, 3, C, D] as the kernel reads it: [column and block of input channels, row, D, depth]."""
    split = kernel.reshape(3, 3, -1, variant.depth, kernel.shape[-1])
    return split.transpose(1, 2, 0, 4, 3).reshape(-1, 3, kernel.shape[-1], variant.depth)


def conv(
    x: Array,
    kernel: Array,
    bias: Array,
    residual: Array | None = None,
    *,
    variant: Variant,
    activate: bool = False,
    **options: Any,
) -> Array:
    """x [B, H, W, C] * kernel [3, 3, C, D] with one pixel of padding, + bias [D] + residual; all but bias bfloat16."""
    run = built(x.shape, kernel.shape[-1], variant, with_residual=residual is not None, activate=activate, **options)
    flat = () if residual is None else (residual.reshape(-1, residual.shape[-1]),)
    out = run(source(x, variant), weights(kernel, variant), bias, *flat)
    return out.reshape(*x.shape[:3], -1)


def built(
    shape: tuple[int, ...],
    channels_out: int,
    variant: Variant,
    *,
    with_residual: bool = True,
    activate: bool = False,
    processors: int = 132,
    interpret: bool = False,
) -> Any:
    """The kernel (source, weights, bias [D] float32, residual [B·H·W, D]) -> [B·H·W, D] for an input [B, H, W, C].

    `interpret` has JAX's interpreter run it on a CPU. The views of a union do not share memory there, so that it
    takes `copies` alone.
    """
    if interpret and variant.reading != "copies":
        raise ValueError(f"the interpreter runs reading='copies' alone, not {variant.reading!r}")
    sizes = plan(shape, channels_out, variant)
    blocks = sizes.tiles[0] * sizes.tiles[1] // variant.cluster
    if variant.persistent:
        blocks = min(blocks, processors // variant.cluster)
    return plgpu.kernel(
        functools.partial(_body, sizes, variant, shape[1] // sizes.rows, with_residual, activate),
        out_type=jax.ShapeDtypeStruct((shape[0] * shape[1] * shape[2], channels_out), jnp.bfloat16),
        scratch_types=_scratch(sizes, variant),
        grid=(blocks,),
        grid_names=("blocks",),
        cluster=(variant.cluster,),
        cluster_names=("cluster",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _scratch(sizes: _Plan, variant: Variant) -> dict[str, Any]:
    depth, kind = variant.depth, jnp.bfloat16
    swizzle = plgpu.SwizzleTransform(2 * depth)
    tiled = (plgpu.TilingTransform((8, depth)), swizzle)
    images, rows = (variant.stages, sizes.images), sizes.rows + 2
    by_row = plgpu.SMEM((*images, rows, sizes.width, depth), kind, transforms=(swizzle,))
    flat = plgpu.SMEM((*images, rows * sizes.width, depth), kind, transforms=tiled)
    pixels: Any = flat if variant.reading == "copies" else plgpu.RefUnion(by_row, flat)
    out_shape = (_COMPUTE, variant.slots, variant.pixels // _COMPUTE, sizes.chunk)
    out_tiled = (plgpu.TilingTransform((8, sizes.chunk)), plgpu.SwizzleTransform(2 * sizes.chunk))
    released = {"num_arrivals": _COMPUTE, "num_barriers": variant.stages}
    return {
        "pixels": pixels,
        "taps": plgpu.SMEM((variant.stages, 3, variant.channels, depth), kind, transforms=tiled),
        "buffers": plgpu.SMEM(out_shape, kind, transforms=out_tiled),
        # One arrival a copy: an image each, and the weights' three taps at once or one by one.
        "filled": plgpu.Barrier(
            num_arrivals=sizes.images + (1 if variant.cluster == 1 else 3), num_barriers=variant.stages
        ),
        "released": plgpu.Barrier(**released)
        if variant.cluster == 1
        else plgpu.ClusterBarrier(collective_axes=("cluster",), **released),
        "arrived": plgpu.Barrier(num_barriers=_COMPUTE * variant.slots),
    }


def _body(
    sizes: _Plan, variant: Variant, tiles_an_image: int, with_residual: bool, activate: bool, *refs: Any, **scratch: Any
) -> None:
    names = ("source", "weights", "bias", *(["residual"] if with_residual else []), "out")
    block = _Block(sizes, variant, tiles_an_image, activate, {**dict(zip(names, refs, strict=True)), **scratch})
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        block.every_tile(block.load)
        block.wait_for_the_last()

    @pl.when(warpgroup < _COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        block.every_tile(functools.partial(block.compute, warpgroup))
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block does, tile after tile; `refs` are the arguments and the shared memory by name."""

    sizes: _Plan
    variant: Variant
    tiles_an_image: int
    activate: bool
    refs: dict[str, Any]

    @property
    def pairs(self) -> tuple[int, int]:
        """Tiles of pixels, of a whole cluster, and tiles of channels."""
        return self.sizes.tiles[0] // self.variant.cluster, self.sizes.tiles[1]

    def every_tile(self, do: Any) -> None:
        """do(number of the tile among this block's, number of the tile of pixels, first channel) for each tile."""

        @plgpu.nd_loop(self.pairs, collective_axes="blocks")
        def _(info: plgpu.NDLoopInfo) -> None:
            pixel_tile = info.index[0] * self.variant.cluster + lax.axis_index("cluster")
            do(info.local_index, pixel_tile, info.index[1] * self.variant.channels)

    def stage(self, number: Array, step: Array) -> Array:
        """The stage's slot in shared memory."""
        return lax.rem(number * self.sizes.steps + step, self.variant.stages)

    def load(self, number: Array, pixel_tile: Array, channel: Array) -> None:
        """Fills the stages of a tile, each as soon as it is released."""

        @pl.loop(0, self.sizes.steps)
        def _(step: Array) -> None:
            slot = self.stage(number, step)

            @pl.when(number * self.sizes.steps + step >= self.variant.stages)
            def _() -> None:
                plgpu.barrier_wait(self.refs["released"].at[slot])

            self.load_pixels(slot, step, pixel_tile)
            self.load_weights(slot, step, pl.ds(channel, self.variant.channels))

    def load_pixels(self, slot: Array, step: Array, pixel_tile: Array) -> None:
        sizes, reading, source, pixels = self.sizes, self.variant.reading, self.refs["source"], self.refs["pixels"]
        image = pixel_tile // self.tiles_an_image * sizes.images
        top = lax.rem(pixel_tile, self.tiles_an_image) * sizes.rows
        column, block = step // (sizes.steps // 3), lax.rem(step, sizes.steps // 3)
        # A border that the caller adds moves the origin by one.
        shift = 1 if reading == "filled" else 0
        for one in range(sizes.images):
            if reading == "copies":
                rows = pl.ds(top * sizes.width, (sizes.rows + 2) * sizes.width)
                part, target = source.at[column, image + one, rows, block], pixels
            else:
                rows = pl.ds(top - shift, sizes.rows + 2)
                part = source.at[image + one, rows, pl.ds(column - shift, sizes.width), block]
                target = pixels[0]
            plgpu.copy_gmem_to_smem(part, target.at[slot, one], self.refs["filled"].at[slot])

    def load_weights(self, slot: Array, step: Array, channels: Any) -> None:
        source, taps, filled = self.refs["weights"], self.refs["taps"], self.refs["filled"].at[slot]
        if self.variant.cluster == 1:
            plgpu.copy_gmem_to_smem(source.at[step, :, channels], taps.at[slot], filled)
            return
        # Each block of the cluster copies its share to both; three taps would not part evenly.
        for row in range(3):
            part = source.at[step, row, channels]
            plgpu.copy_gmem_to_smem(part, taps.at[slot, row], filled, collective_axes="cluster")

    def wait_for_the_last(self) -> None:
        """Waits for the last stages: no block of a cluster may arrive at the barriers of one that has ended."""
        index, blocks = lax.axis_index("blocks"), lax.axis_size("blocks")
        count = (self.pairs[0] * self.pairs[1] - index + blocks - 1) // blocks * self.sizes.steps

        @pl.loop(lax.max(0, count - self.variant.stages), count)
        def _(step: Array) -> None:
            plgpu.barrier_wait(self.refs["released"].at[lax.rem(step, self.variant.stages)])

    def compute(self, warpgroup: Array, number: Array, pixel_tile: Array, channel: Array) -> None:
        """A warpgroup's half of a tile, from the products to the output."""
        sizes, variant, refs = self.sizes, self.variant, self.refs
        half, chunks = variant.pixels // _COMPUTE, variant.channels // sizes.chunk
        rows, buffers = pl.ds(pixel_tile * variant.pixels + warpgroup * half, half), refs["buffers"].at[warpgroup]
        columns = [pl.ds(channel + chunk * sizes.chunk, sizes.chunk) for chunk in range(chunks)]
        slots = [chunk % variant.slots for chunk in range(chunks)]
        arrived = [refs["arrived"].at[warpgroup * variant.slots + slot] for slot in slots]

        def fetch(chunk: int) -> None:
            if "residual" in refs and chunk < chunks:
                part = refs["residual"].at[rows, columns[chunk]]
                plgpu.copy_gmem_to_smem(part, buffers.at[slots[chunk]], arrived[chunk])

        # The copies out of the buffers must have ended before these are filled anew, here and below.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for chunk in range(variant.slots):
            fetch(chunk)
        multiply = functools.partial(self.multiply, warpgroup, number)
        total = pl.run_scoped(multiply, plgpu.ACC((half, variant.channels), jnp.float32))
        for chunk, slot in enumerate(slots):
            value = total[:, chunk * sizes.chunk : (chunk + 1) * sizes.chunk]
            by_column = plgpu.Layout.WGMMA.reduce(0)
            bias = plgpu.load(refs["bias"].at[columns[chunk]], layout=by_column, optimized=False)
            value += lax.broadcast_in_dim(bias, value.shape, [1])
            if "residual" in refs:
                plgpu.barrier_wait(arrived[chunk])
                value += buffers[slot].astype(jnp.float32)
            elif chunk >= variant.slots:
                plgpu.wait_smem_to_gmem(variant.slots - 1, wait_read_only=True)
            if self.activate:
                value = jnp.maximum(value, NEGATIVE_SLOPE * value)
            buffers[slot] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers.at[slot], refs["out"].at[rows, columns[chunk]])
            if "residual" in refs and chunk + variant.slots < chunks:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch(chunk + variant.slots)

    def multiply(self, warpgroup: Array, number: Array, total: Any) -> Array:
        """The products of all stages, [pixels of the warpgroup, channels] in float32."""
        sizes, variant, refs = self.sizes, self.variant, self.refs
        first_image = warpgroup * sizes.parts if sizes.images > 1 else 0
        first_row = 0 if sizes.images > 1 else warpgroup * (sizes.segment // sizes.width)
        flat = refs["pixels"] if variant.reading == "copies" else refs["pixels"][1]

        @pl.loop(0, sizes.steps)
        def _(step: Array) -> None:
            slot = self.stage(number, step)
            plgpu.barrier_wait(refs["filled"].at[slot])
            for row in range(3):
                taps = refs["taps"].at[slot, row].transpose((1, 0))
                for part in range(sizes.parts):
                    # A row further down is a whole number of tiles of 8 pixels further on.
                    read = pl.ds((first_row + row) * sizes.width, sizes.segment)
                    target = total.at[part * sizes.segment : (part + 1) * sizes.segment] if sizes.parts > 1 else total
                    plgpu.wgmma(target, flat.at[slot, first_image + part, read], taps)
            if variant.overlap:
                plgpu.wgmma_wait(3 * sizes.parts)
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(refs["released"].at[self.stage(number, step - 1)]))
            else:
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(refs["released"].at[slot])

        if variant.overlap:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs["released"].at[self.stage(number, sizes.steps - 1)])
        return total[...]
