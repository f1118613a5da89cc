"""The model of launches' times: what it reads in machine code, how it adds up, and what it says of today's kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fresh import python

pytest.importorskip("triton", reason="compiles with Triton")

import ocr_kernels.core.triton_device
from benchmarks import codegen, predictor
from benchmarks.assembly import Loop, Op, read_code
from benchmarks.codegen import ARCHITECTURES, Call, Launch, Resources
from benchmarks.predictor import DEVICES, LOOPS, Estimate, Warp, count_turns, estimate_of, faults
from ocr_kernels.core.tiles import Problem, Tile, TileRule

# Machine code

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P4 BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/                   DEPBAR.LE SB0, 0x1 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   LDSM.16.MT88.4 R24, [R12+UR4] ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR12], R40, gsb0 ;
        /*0070*/                   MUFU.EX2 R8, R8 ;
        /*0080*/                   STS.128 [R3+UR4], R24 ;
        /*0090*/                   LDS R5, [R3] ;
        /*00a0*/               @P1 LDG.E.U16 R27, desc[UR10][R18.64] ;
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R19+0x800], desc[UR26][R16.64], P5 ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/               @P3 STG.E.64 desc[UR10][R20.64], R4 ;
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR20], R11 ;
.L_x_9:
        /*00f0*/               @P4 BRA `(.L_x_2) ;
.L_x_1:
        /*0100*/                   EXIT ;
.L_x_8:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR20], R11 ;
        /*0120*/              @!P6 BRA `(.L_x_8) ;
        /*0130*/                   BRA `(.L_x_9) ;
"""


def test_reads_sass() -> None:
    kernel = read_code(SASS)
    (loop,) = kernel.loops()
    assert [part for part in kernel.body if isinstance(part, Op)] == [
        Op(registers=frozenset({"R1"})),
        Op(),
        Op(),
    ]
    assert loop.body == [
        Op("wait", 1),
        Op("barrier"),
        Op("from shared", 16, frozenset({"R24", "R12"})),
        Op("product", 64 * 32 * 16 // 4, frozenset({"R40"})),
        Op("special", 0, frozenset({"R8"})),
        Op("to shared", 16, frozenset({"R3", "R24"})),
        Op("from shared", 4, frozenset({"R5", "R3"})),
        Op("load", 2, frozenset({"R27"})),
        Op("copy", 16, frozenset({"R19", "R16"})),
        Op(closes=True),
        Op("store", 8, frozenset({"R20", "R4"})),
        Op(registers=frozenset({"R11"})),
        Op(),
    ]
    assert loop.conversions() == 1
    assert loop.width("load", "copy") == 9


def test_reads_sass_that_ends_in_a_jump() -> None:
    """No instruction ends the kernel for sure; behind it, one waits for a barrier in memory and jumps back."""
    (loop,) = read_code(SASS.replace("     EXIT", "@P0 EXIT")).loops()
    assert len(loop.body) == 13


@pytest.mark.parametrize(
    ("line", "op"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", Op("product", 16 * 8 * 16, frozenset({"R4", "R8", "R12"}))),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", Op("product", 16 * 8 * 8, frozenset({"R4", "R8", "R12"}))),
        ("LDG.E.128 R24, desc[UR6][R6.64+0x8]", Op("load", 16, frozenset({"R24", "R25", "R26", "R27"}))),
        ("LDSM.16.M88 R4, [R5]", Op("from shared", 4, frozenset({"R4", "R5"}))),
        ("STSM.16.M88.2 [R5], R4", Op("to shared", 8, frozenset({"R4", "R5"}))),
        ("DEPBAR.LE SB1, 0x36", Op()),
    ],
)
def test_reads_instructions(line: str, op: Op) -> None:
    assert read_code(f"/*0000*/ {line} ;\n/*0010*/ EXIT ;").body[0] == op


AMD = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	s_waitcnt vmcnt(1) lgkmcnt(0)
	v_mfma_f32_32x32x8_bf16 v[48:63], v[124:125], v[194:195], v[48:63]
.LBB0_2:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
	v_exp_f32_e32 v1, v1
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	global_load_dwordx4 v[2:5], v[2:3], off
	global_load_ushort v6, v[2:3], off
	s_cbranch_scc0 .LBB0_3
; %bb.4:                                ;   in Loop: Header=BB0_2 Depth=1
	ds_write_b128 v1, v[2:5]
	s_barrier
	ds_read2st64_b64 v[32:35], v13 offset1:16
	s_branch .LBB0_1
.LBB0_5:
	global_store_short v[2:3], v6, off
	s_endpgm
"""


def test_reads_amd() -> None:
    kernel = read_code(AMD)
    outer, inner = kernel.loops()
    assert kernel.body == [outer, Op("store", 2, closes=True)]
    assert inner.body == [Op("copy", 16, closes=True), Op("copy", 2, closes=True)]
    assert outer.body == [
        Op("wait", 1),
        Op("product", 32 * 32 * 8),
        Op("special"),
        inner,
        Op("to shared", 16),
        Op("barrier"),
        Op("from shared", 16),
    ]


def test_turns_of_loops() -> None:
    inner, second = Loop([Op("load", 16)]), Loop([Op()])
    kernel = Loop([Op(), Loop([Op(), inner]), second])
    first = kernel.body[1]
    sizes = {"K": 300, "D": 256, "V": 20, "BLOCK_K": 128, "BLOCK_C": 64}
    with pytest.raises(ValueError, match="attention_forward has 3 loops, but LOOPS says of 2"):
        count_turns(kernel, "attention_forward", sizes)
    with pytest.raises(ValueError, match="LOOPS has no row for unheard_of"):
        count_turns(kernel, "unheard_of", sizes)
    kernel.body.pop()
    count_turns(kernel, "attention_forward_many", sizes)
    assert isinstance(first, Loop)
    assert (first.times, inner.times) == (3, 4)
    assert kernel.count("load") == 12
    assert kernel.sizes("load") == 192


def test_every_kernel_has_a_row() -> None:
    modules = *codegen.OPS, ocr_kernels.core.triton_device
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {Launch(f"module:{name}", (), (), (), ()).name for name in kernels} == set(LOOPS)


# The model

DEVICE = DEVICES["H100"]
RESOURCES = Resources(registers=64, spilled=0, shared=0, blocks=2, matrix={}, copies={})
COPIES = [Op("copy", 16)] * 2 + [Op(closes=True)]
STEPS = [Op()] * 3000 + [Op("store", 16)] * 8


def model(*steps: Op, programs: int = 264, turns: int = 64, blocks: int = 2, bytes: int = 1 << 28) -> Estimate:
    """Of a kernel with one loop, 4 warps a block, on an H100."""
    launch = Launch("module:spatial_gather_forward_kernel", (), (), (), (("num_warps", 4),))
    call = Call(launch, programs, {"split_length": 32 * turns, "BLOCK_N": 32}, bytes)
    return estimate_of(call, DEVICE, replace(RESOURCES, blocks=blocks), Loop([Loop(list(steps))]))


def test_copies_that_stay_under_way() -> None:
    """A loop that waits for all its copies pays their latency in each turn; one that leaves some under way does not."""
    waits, overlaps = (model(Op("wait", left), *COPIES, *[Op()] * 100, bytes=1 << 25) for left in (0, 2))
    assert (waits.left, overlaps.left) == (0, 2 * waits.in_flight)
    assert waits.in_flight == 2 * 16 * 128 * 2  # bytes, lanes, blocks
    assert overlaps.in_flight == 3 * waits.in_flight
    assert waits.limit == overlaps.limit == "loads"
    assert waits.time == pytest.approx(64 * DEVICE.latency, rel=0.25)
    assert overlaps.time < 0.5 * waits.time
    assert faults(waits, DEVICE) == ["its loop waits for all that is under way"]
    assert faults(overlaps, DEVICE) == []


def test_registers_are_waited_for_where_they_are_used() -> None:
    load, use = Op("load", 16, frozenset({"R4", "R5", "R6", "R7"})), Op(registers=frozenset({"R7"}))
    for idle, waited in ((0, 1.0), (50, 0.5), (200, 0.0)):
        loop = Loop([load, *[Op()] * idle, use], times=10)
        warp = Warp(pace=0.01, latency=1.0, main=loop)
        warp.run(loop)
        assert warp.waited == pytest.approx(10 * waited)
        assert warp.time == pytest.approx(10 * (waited + 0.01 * (idle + 2)))
        assert (warp.most, warp.left) == (16, 0)


@pytest.mark.parametrize(
    ("steps", "blocks", "bytes", "limit"),
    [
        ([Op("wait", 2), *COPIES * 4], 2, 1 << 30, "memory"),
        ([Op("wait", 2), *COPIES, *[Op()] * 3000], 2, 1 << 20, "issue"),
        ([Op("wait", 0), *COPIES, *[Op()] * 3000], 1, 1 << 20, "issue"),  # one block, whose copies are hidden by nobody
        ([Op("special")] * 500, 2, 1 << 20, "exp"),
        ([Op("to shared", 16)] * 500, 2, 1 << 20, "shared"),
        ([Op("product", 1 << 15)] * 500, 2, 1 << 20, "products"),
        ([Op("load", 16)] * 50, 2, 1 << 20, "cache"),
        ([Op()], 2, 1 << 10, "launch"),
    ],
)
def test_limits(steps: list[Op], blocks: int, bytes: int, limit: str) -> None:
    found = model(*steps, blocks=blocks, bytes=bytes, programs=132 * blocks)
    assert found.limit == limit
    assert found.time > max(found.floor, DEVICE.launch)


@pytest.mark.parametrize(
    ("programs", "waves", "last", "blocks"),
    [(264, 1, 1, 2), (132, 0.5, 0.5, 1), (265, 265 / 264, 1 / 264, 3), (528, 2, 1, 4)],
)
def test_waves(programs: int, waves: float, last: float, blocks: int) -> None:
    """`blocks` run one after the other on the multiprocessor that is done last, where instructions are the limit."""
    found = model(*STEPS, programs=programs)
    assert (found.waves, found.last_wave) == pytest.approx((waves, last))
    full = model(*STEPS, programs=264).time - DEVICE.launch
    assert (found.time - DEVICE.launch) / full == pytest.approx(blocks / 2, rel=0.2)  # one alone takes a little longer
    assert ("its last wave is less than 60 % full" in faults(found, DEVICE)) == (programs == 265)


def test_what_cannot_be_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"UTMALDG\.2D moves a tile whose size is in a descriptor"):
        read_code("        /*0010*/                   UTMALDG.2D [UR8], [UR4] ;")


# Today's kernels

CITYSCAPES = "cityscapes-inference", "cityscapes-training"
ADE20K = "ade20k"
WAVE, LOOP, NARROW = (
    "its last wave is less than 60 % full",
    "its loop waits for all that is under way",
    "its loop loads fewer than 16 bytes at once",
)
KNOWN = {
    # 130 x 130 pixels are a few more than fill whole waves of programs
    *((ADE20K, kernel, WAVE) for kernel in ("gather_merge", "gather_backward")),
    *((ADE20K, kernel, WAVE) for kernel in ("attention_forward", "attention_backward_maps")),
    *((ADE20K, f"block_{kernel}", WAVE) for kernel in ("region_weights", "contexts", "softmax_gradient")),
    *((ADE20K, f"block_{kernel}", WAVE) for kernel in ("weights", "linear", "apply", "gradient_sums", "gradient")),
    # the last of three waves or more, of short programs
    *((case, f"block_{kernel}", WAVE) for case in CITYSCAPES for kernel in ("apply", "gradient")),
    (CITYSCAPES[0], "block_contexts", WAVE),
    # two to four programs of a multiprocessor wait in turn
    *((case, f"block_{kernel}", LOOP) for case in (*CITYSCAPES, ADE20K) for kernel in ("moments", "gradient_sums")),
    *((case, f"block_{kernel}", LOOP) for case in CITYSCAPES for kernel in ("region_weights", "contexts_gradient")),
    (ADE20K, "block_softmax_gradient", LOOP),
    # three stages of its tiles do not fit
    (ADE20K, "block_fuse", LOOP),
    # what regions are in rows of 32 is loaded beside pixels
    *((case, f"block_{kernel}", NARROW) for case in CITYSCAPES for kernel in ("fuse", "region_weights")),
    *((case, "block_contexts_gradient", NARROW) for case in CITYSCAPES),
}


@pytest.mark.slow
@pytest.mark.wide
def test_kernels() -> None:
    """In bfloat16 on an H100: 16 bytes a load, copies always under way, last waves filled, no spills."""
    process = python("-m", "benchmarks.predictor", "H100", "--case", *CITYSCAPES, ADE20K)
    assert process.returncode == 0, process.stdout + process.stderr
    found = set()
    case = kernel = ""
    for line in process.stdout.splitlines():
        assert len(line) <= 120
        if line.startswith("H100: "):
            case = line.split()[1].rstrip(",")
        elif line.startswith("  ^ "):
            found.add((case, kernel, line[4:]))
        elif not line.startswith(" "):
            kernel = line.split()[0]
    assert kernel == "="  # the last line: a sum
    assert sorted(found - KNOWN) == [], "new faults"
    assert sorted(KNOWN - found) == [], "known faults that are no more"


# The search


def test_search_goes_to_what_the_model_likes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of tiles that spill, or that the compiler refuses, none is taken."""
    rule = TileRule("some.rule", lambda problem: Tile(channels=64, pixels=64, warps=8, stages=2), ("pixels",))
    problem = Problem(2, ARCHITECTURES["sm_90"].facts, channels=512)

    def calls(architecture: str, run: Any) -> list[Call]:
        tile = rule.choose(problem)
        assert tile is not None
        return [Call("op", 1, {"pixels": tile.pixels, "warps": tile.warps, "stages": tile.stages}, 0)]

    def estimates(made: list[Call]) -> list[Estimate]:
        (call,) = made
        if call.numbers["stages"] > 2:
            raise RuntimeError("the compiler gave up")
        limit = "memory" if call.numbers["warps"] == 8 else "spills"
        return [Estimate(call, 100.0 + abs(call.numbers["pixels"] - 16), 1.0, limit)]

    monkeypatch.setattr(predictor, "RULES", [rule])
    monkeypatch.setattr(predictor, "faults", lambda found, device: [found.limit] * (found.limit == "spills"))
    monkeypatch.setattr(codegen, "calls", calls)
    predictor.search(DEVICES["H100"], lambda: None, estimates)
    printed = capsys.readouterr().out
    assert "some.rule" in printed
    assert "pixels=64 warps=8 stages=2: 148.0 us -> channels=64 pixels=16 warps=8 stages=2: 100.0 us" in printed
