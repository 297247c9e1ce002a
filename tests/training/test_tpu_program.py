"""The training step as TPU's compiler makes it for four described chips: what lies where, moves, and is exchanged."""

import importlib.util
import re

import jax
import pytest
import scripts

from jem_jax.commands import config_files

hlo_text, tpu_program = scripts.load("hlo"), scripts.load("tpu_program")

TEXT = """\
HloModule tiny, is_scheduled=true

%fused (p.0: bf16[16,8,8,10], p.1: bf16[3,3,10,20]) -> bf16[16,8,8,20] {
  %p.0 = IMAGE parameter(0)
  %p.1 = KERNEL parameter(1)
  ROOT %convolution.1 = RESULT convolution(%p.0, %p.1), dim_labels=b01f_01io->b01f
}

%chain (turn: (s32[], bf16[16,8,8,10], /*index=2*/bf16[3,3,10,20])) -> (s32[], bf16[16,8,8,10], bf16[3,3,10,20]) {
  %turn = (s32[]{:T(128)}, IMAGE, /*index=2*/KERNEL) parameter(0)
  %x = IMAGE get-tuple-element(%turn), index=1
  %kernel = KERNEL get-tuple-element(%turn), index=2
  %fusion.1 = RESULT fusion(%x, %kernel), kind=kOutput, calls=%fused
  %copy.1 = bf16[16,8,8,20]{0,3,2,1:T(8,128)(2,1)} copy(%fusion.1), metadata={op_name="a(b)"}
  ROOT %next = (s32[]{:T(128)}, IMAGE, KERNEL) tuple(%turn)
}

%go (turn.1: (s32[])) -> pred[] {
  %turn.1 = (s32[]{:T(128)}) parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %turn.1), direction=LT
}

ENTRY %main (rows: f32[1,64,8,128], images: u8[50,8,128]) -> f32[1,64,8,128] {
  %rows = f32[1,64,8,128]{3,2,1,0:T(8,128)} parameter(0)
  %images = u8[50,8,128]{2,1,0:T(8,128)(4,1)} parameter(1)
  %copy.2 = f32[1,64,8,128]{2,3,1,0:T(8,128)} copy(%rows)
  %while.1 = (s32[]{:T(128)}, IMAGE, KERNEL) while(%start), condition=%go, body=%chain
  %all-reduce.1 = (f32[10]{0:T(128)}, f32[3,3]{1,0:T(4,128)}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  ROOT %scatter.1 = f32[1,64,8,128]{3,2,1,0:T(8,128)} fusion(%copy.2), kind=kCustom, calls=%fused
}
"""
LAYOUTS = {
    "IMAGE": "bf16[16,8,8,10]{3,0,2,1:T(8,128)(2,1)S(1)}",
    "KERNEL": "bf16[3,3,10,20]{3,2,1,0:T(8,128)(2,1)}",
    "RESULT": "bf16[16,8,8,20]{3,0,2,1:T(8,128)(2,1)}",
}


@pytest.fixture(scope="module")
def hlo():
    return hlo_text.Hlo(re.sub("|".join(LAYOUTS), lambda name: LAYOUTS[name[0]], TEXT), turns=3)


def test_what_a_program_does_is_read_from_its_text(hlo):
    assert hlo.loop == "chain"
    assert hlo.collectives() == [{"kind": "all-reduce", "bytes": 4 * (10 + 9), "arrays": 2, "place": "outside"}]
    assert hlo.transposes("chain") == 1
    assert hlo.host_transfers() == 0
    assert hlo.rewrites("f32", 64 * 1024) == 2
    assert hlo.rewrites("u8", 50 * 1024) == 0
    assert hlo.convolution_types() == {"bf16": 1.0}


def test_copies_padding_and_traffic(hlo):
    # 20 channels fill up to 24 rows of 8, and 16 images to 128 lanes.
    image, moved, kernel = 2 * 8 * 8 * 16 * 128, 2 * 8 * 8 * 24 * 128, 2 * 9 * 16 * 128
    assert hlo.copies("chain", moved) == ["copy bf16[16, 8, 8, 20] in main memory"]
    assert hlo.copies("chain", moved + 1) == []
    written = 2 * 2 * 8 * 8 * 16 * 20
    assert hlo.padding("chain") == pytest.approx(1 - written / (image + moved), abs=1e-3)
    # The chain's state stays on the chip; its kernel and what the fusion and the copy write do not.
    assert hlo.traffic("chain") == (kernel + image) + (image + moved)


@pytest.mark.parametrize(("width", "lanes", "filled"), [(8, 128, 0.93), (10, 128, 0.58), (16, 256, 0.93)])
def test_lanes_are_filled_by_widths_of_8_and_16(width, lanes, filled):
    config = config_files.read("cifar10", [("model.depth", "28"), ("model.width", str(width))])
    assert tpu_program.lanes_filled(config, lanes) == pytest.approx(filled, abs=0.01)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler of jax[tpu]")
def test_the_step_for_four_chips():
    found = tpu_program.tiny()
    assert found["chips"] == 4
    assert [(one["kind"], one["place"]) for one in found["collectives"]] == [("all-reduce", "outside")]
    assert not [copy for copy in found["chain_copies"] if "main memory" in copy]
    assert (found["buffer_copies"], found["image_copies"], found["host_transfers"]) == (0, 0, 0)
    # The buffer alone is donated, and it is written where it lies.
    assert found["donated_bytes"] == found["slots_a_chip"] * 32 * 32 * 3 * 4
    assert found["temporary_bytes"] < found["argument_bytes"] / 4
    assert found["convolutions"]["bf16"] > 0.999
    assert jax.default_backend() == "cpu"
