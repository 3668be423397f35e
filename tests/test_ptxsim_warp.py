# ruff: noqa: E501  (PTX and CUDA in strings)
"""ptxsim: exchange between lanes, matrices, memory, control flow and counters."""

import numpy as np
import pytest
import torch
from ptxsim import Module, SimulationError
from ptxsim.testing import aligned, elementwise, kernel, run

rng = np.random.default_rng(2)
LANES = np.arange(32, dtype=np.uint32)
STORE = "ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r1, 4, %d1; st.global.u32 [%d1], %r40;"


def per_lane(code, value=LANES, **options):
    """%r20: the lane's value; the result goes to %r40."""
    out, value = np.zeros(32, np.uint32), value.astype(np.uint32)
    load = "ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r1, 4, %d1; ld.global.u32 %r20, [%d1];"
    run(load + code + STORE, "u64 out, u64 x", [out, value], **options)
    return out


# ---- exchange


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, width):
    x = rng.integers(0, 2**32, 32, dtype=np.uint32)
    clamp = (0 if mode == "up" else 31) | (32 - width) << 8
    for by in (0, 1, 3, 5, 7):
        got = per_lane(f"shfl.sync.{mode}.b32 %r40|%p1, %r20, {by}, {clamp}, -1; @!%p1 or.b32 %r40, %r40, 0;", x)
        ok = per_lane(f"shfl.sync.{mode}.b32 %r40|%p1, %r20, {by}, {clamp}, -1; selp.u32 %r40, 1, 0, %p1;", x)
        base = LANES // width * width
        source = {"up": LANES.astype(int) - by, "down": LANES + by, "bfly": LANES ^ by, "idx": base + by % width}[mode]
        inside = (source >= base) & (source < base + width)
        np.testing.assert_array_equal(ok, inside)
        np.testing.assert_array_equal(got, x[np.where(inside, source, LANES)])


def test_vote_match_redux():
    x = rng.integers(0, 4, 32).astype(np.uint32)
    ballot = sum(1 << i for i in range(32) if x[i] > 1)
    assert (per_lane("setp.gt.u32 %p1, %r20, 1; vote.sync.ballot.b32 %r40, %p1, -1;", x) == ballot).all()
    for mode, want in {"any": True, "all": False, "uni": False}.items():
        got = per_lane(f"setp.gt.u32 %p1, %r20, 1; vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r40, 1, 0, %p2;", x)
        assert (got == want).all()
    same = [sum(1 << j for j in range(32) if x[j] == x[i]) for i in range(32)]
    np.testing.assert_array_equal(per_lane("match.any.sync.b32 %r40, %r20, -1;", x), same)
    assert (per_lane("match.all.sync.b32 %r40|%p1, %r20, -1;", x) == 0).all()
    assert (per_lane("match.all.sync.b32 %r40|%p1, 5, -1;", x) == 0xFFFFFFFF).all()
    y = rng.integers(-(2**31), 2**31, 32).astype(np.int32)
    for op, want in {"add": y.sum(dtype=np.int32), "min": y.min(), "max": y.max()}.items():
        assert (per_lane(f"redux.sync.{op}.s32 %r40, %r20, -1;", y.view(np.uint32)).view(np.int32) == want).all(), op
    for op, f in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        assert (
            per_lane(f"redux.sync.{op}.b32 %r40, %r20, -1;", y.view(np.uint32)) == f.reduce(y.view(np.uint32))
        ).all()


def test_lane_masks_and_elect():
    masks = {"eq": lambda i: 1 << i, "lt": lambda i: (1 << i) - 1, "le": lambda i: (2 << i) - 1}
    for name, f in masks.items():
        np.testing.assert_array_equal(
            per_lane(f"mov.u32 %r40, %lanemask_{name};"), [f(i) & 0xFFFFFFFF for i in range(32)]
        )
    got = per_lane("mov.u32 %r40, 0; elect.sync %r41|%p1, -1; @%p1 mov.u32 %r40, 1;", target="sm_90")
    np.testing.assert_array_equal(got, LANES == 0)
    got = per_lane("mov.u32 %r40, 0; setp.gt.u32 %p1, %r0, 20; @!%p1 bra L1; activemask.b32 %r40; L1:")
    np.testing.assert_array_equal(got, np.where(LANES > 20, 0xFFE00000, 0))


def test_divergence_and_reconvergence():
    code = """mov.u32 %r40, 0; mov.u32 %r41, 0;
    LOOP: setp.ge.u32 %p1, %r41, %r20; @%p1 bra OUT;
    and.b32 %r42, %r41, 1; setp.eq.u32 %p2, %r42, 0; @%p2 bra EVEN;
    add.u32 %r40, %r40, 10; bra NEXT;
    EVEN: add.u32 %r40, %r40, 1;
    NEXT: add.u32 %r41, %r41, 1; bra LOOP;
    OUT: shfl.sync.idx.b32 %r43, %r40, 31, 31, -1; sub.u32 %r40, %r43, %r40;"""
    total = np.array([(n + 1) // 2 + 10 * (n // 2) for n in range(32)], np.uint32)
    np.testing.assert_array_equal(per_lane(code), total[31] - total)


def test_branch_table():
    code = """and.b32 %r41, %r20, 3; T: .branchtargets A, B, C, D; brx.idx %r41, T;
    A: mov.u32 %r40, 7; bra E; B: mov.u32 %r40, 8; bra E; C: mov.u32 %r40, 9; bra E; D: mov.u32 %r40, 10; E:"""
    np.testing.assert_array_equal(per_lane(code), 7 + LANES % 4)


def test_call_of_a_device_function():
    function = """.func (.param .b32 result) twice(.param .b32 x) { .reg .b32 %r<3>; .reg .pred %p<2>;
    ld.param.u32 %r1, [x]; setp.gt.u32 %p1, %r1, 9; @%p1 bra BIG; add.u32 %r1, %r1, %r1; st.param.b32 [result], %r1; ret;
    BIG: st.param.b32 [result], 99; ret; }
    """
    code = """{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r20; call.uni (b), twice, (a); ld.param.b32 %r40, [b]; }"""
    np.testing.assert_array_equal(per_lane(code, before=function), np.where(LANES > 9, 99, 2 * LANES))


def test_block_barriers():
    out = np.zeros(128, np.uint32)
    code = ".shared .u32 s[128]; mov.u32 %r10, s; mad.lo.u32 %r11, %r0, 4, %r10; st.shared.u32 [%r11], %r0; bar.sync 0;"
    code += "sub.u32 %r12, 127, %r0; mad.lo.u32 %r11, %r12, 4, %r10; ld.shared.u32 %r40, [%r11];" + STORE
    for seed in range(4):
        run(code, "u64 out", [out], block=128, seed=seed)
        np.testing.assert_array_equal(out, np.arange(128)[::-1])
    run("setp.gt.u32 %p1, %r0, 99; barrier.sync 1; bar.red.popc.u32 %r40, 2, %p1;" + STORE, "u64 out", [out], block=128)
    assert (out == 28).all()
    run(
        "setp.gt.u32 %p1, %r0, 99; bar.red.or.pred %p2, 0, %p1; selp.u32 %r40, 1, 0, %p2;" + STORE,
        "u64 out",
        [out],
        block=128,
    )
    assert (out == 1).all()


# ---- matrices


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count, trans):
    m = rng.integers(0, 2**16, (count, 8, 8)).astype(np.uint16)
    out, back = np.zeros((32, count), np.uint32), np.zeros((count, 8, 8), np.uint16)
    registers = ", ".join(f"%r{50 + k}" for k in range(count))
    code = ".shared .align 16 .b8 s[1024]; mov.u32 %r10, s; ld.param.u64 %d1, [m]; mad.wide.u32 %d2, %r0, 16, %d1;"
    code += f"mad.lo.u32 %r11, %r0, 16, %r10; setp.lt.u32 %p1, %r0, {8 * count}; @%p1 ld.global.v4.u32 {{%r60,%r61,%r62,%r63}}, [%d2];"
    code += "@%p1 st.shared.v4.u32 [%r11], {%r60,%r61,%r62,%r63}; bar.warp.sync -1;"
    code += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11]; ld.param.u64 %d3, [out];"
    code += "".join(
        f"mad.wide.u32 %d4, %r0, {4 * count}, %d3; st.global.u32 [%d4+{4 * k}], %r{50 + k};" for k in range(count)
    )
    code += f"bar.warp.sync -1; add.u32 %r12, %r11, 512; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r12], {{{registers}}};"
    code += "bar.warp.sync -1; ld.param.u64 %d3, [back]; mad.wide.u32 %d4, %r0, 16, %d3;"
    code += "@%p1 ld.shared.v4.u32 {%r60,%r61,%r62,%r63}, [%r12]; @%p1 st.global.v4.u32 [%d4], {%r60,%r61,%r62,%r63};"
    run(code, "u64 out, u64 back, u64 m", [out, back, aligned(m)], target="sm_90")
    view = m.transpose(0, 2, 1) if trans else m
    want = np.ascontiguousarray(view).reshape(count, 32, 2).view(np.uint32).reshape(count, 32).T
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(back, m)


def test_movmatrix():
    m = rng.integers(0, 2**16, (8, 8)).astype(np.uint16)
    got = per_lane("movmatrix.sync.aligned.m8n8.trans.b16 %r40, %r20;", m.reshape(32, 2).view(np.uint32).reshape(32))
    np.testing.assert_array_equal(got.view(np.uint16).reshape(8, 8), m.T)


SHAPES = [
    ("bf16", torch.bfloat16, 16, "f32"), ("bf16", torch.bfloat16, 8, "f32"), ("f16", torch.float16, 16, "f32"),
    ("f16", torch.float16, 8, "f32"), ("f16", torch.float16, 16, "f16"), ("f16", torch.float16, 8, "f16"),
    ("tf32", torch.float32, 8, "f32"), ("tf32", torch.float32, 4, "f32"), ("f64", torch.float64, 4, "f64"),
]  # fmt: skip


def fragments(kind, k):
    """(row, column) of every element of A, B, C as [lane, element], from the tables of the PTX ISA's mma section."""
    lane = np.arange(32)[:, None]
    group, inside = lane // 4, lane % 4
    if kind == "f64":
        return (group, inside), (inside, group), (group + 0 * lane, 2 * inside + np.arange(2))
    per = {"bf16": 2, "f16": 2, "tf32": 1}[kind]
    i = np.arange(16 * k // 32)
    if per == 2:
        a = group + 8 * (i // 2 % 2), 2 * inside + i % 2 + 8 * (i // 4)
        j = np.arange(8 * k // 32)
        b = 2 * inside + j % 2 + 8 * (j // 2), group + 0 * j
    else:
        a = group + 8 * (i % 2), inside + 4 * (i // 2)
        j = np.arange(8 * k // 32)
        b = inside + 4 * j, group + 0 * j
    c = np.arange(4)
    return a, b, (group + 8 * (c // 2), 2 * inside + c % 2)


@pytest.mark.parametrize("kind, dtype, k, accumulator", SHAPES)
def test_mma(kind, dtype, k, accumulator):
    double = kind == "f64"
    m, out_type = (8, torch.float64) if double else (16, torch.float16 if accumulator == "f16" else torch.float32)
    a = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
    b = torch.from_numpy(rng.standard_normal((k, 8))).to(dtype)
    c = torch.from_numpy(rng.standard_normal((m, 8))).to(out_type)
    if kind == "tf32":
        a, b = ((x.view(torch.int32) & -0x2000).view(torch.float32) for x in (a, b))
    if not double:
        a[3, 1], b[2, 5], c[7, 7] = float("inf"), float("nan"), -float("inf")
    (ar, ac), (br, bc), (cr, cc) = fragments(kind, k)
    size = 8 if double else 4
    words = [np.ascontiguousarray(x).view(np.uint64 if double else np.uint32) for x in (
        a[ar, ac].contiguous().view(torch.int64 if double else torch.int16 if dtype.itemsize == 2 else torch.int32).numpy(),
        b[br, bc].contiguous().view(torch.int64 if double else torch.int16 if dtype.itemsize == 2 else torch.int32).numpy(),
        c[cr, cc].contiguous().view(torch.int64 if double else torch.int16 if out_type.itemsize == 2 else torch.int32).numpy(),
    )]  # fmt: skip
    out = np.zeros_like(words[2])
    stem, ab = ("%d", "f64") if double else ("%r", kind)
    code, names = "", []
    for x, (name, w) in enumerate(zip("abc", words)):
        code += f"ld.param.u64 %d1, [{name}]; mad.wide.u32 %d1, %r0, {size * w.shape[1]}, %d1;"
        names.append([f"{stem}{20 + 10 * x + i}" for i in range(w.shape[1])])
        code += "".join(f"ld.global.b{8 * size} {r}, [%d1+{size * i}];" for i, r in enumerate(names[-1]))
    d = [f"{stem}{50 + i}" for i in range(out.shape[1])]
    vectors = ", ".join("{" + ", ".join(v) + "}" for v in [d, *names])
    acc = "f64" if double else accumulator
    code += f"mma.sync.aligned.m{m}n8k{k}.row.col.{acc}.{ab}.{ab}.{acc} {vectors};"
    code += f"ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r0, {size * out.shape[1]}, %d1;"
    code += "".join(f"st.global.b{8 * size} [%d1+{size * i}], {r};" for i, r in enumerate(d))
    counts = run(code, "u64 out, u64 a, u64 b, u64 c", [out, *words])
    got = torch.zeros(m, 8, dtype=out_type)
    got[cr, cc] = torch.from_numpy(out.view(f"i{out_type.itemsize}")).view(out_type)
    want = a.double() @ b.double() + c.double()
    torch.testing.assert_close(
        got.double(), want.to(out_type).double(), rtol=1e-3 if accumulator == "f16" else 1e-6, atol=1e-6, equal_nan=True
    )
    if out_type == torch.float32:
        assert (got.view(torch.int32)[got.isnan()] == 0x7FFFFFFF).all()
    assert counts["mma"] == 1
    assert counts["mma_flops"] == 2 * m * 8 * k


# ---- memory


def test_loads_and_stores_of_every_width():
    x = rng.integers(0, 256, 256).astype(np.uint8)
    for kind, dtype, n in (("u8", np.uint8, 1), ("s8", np.int8, 1), ("u16", np.uint16, 2), ("s16", np.int16, 2)):
        out = np.zeros(32, np.int32)
        run(
            f"ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, {n}, %d1; ld.global.{kind} %r40, [%d1];" + STORE,
            "u64 out, u64 x",
            [out, x],
        )
        np.testing.assert_array_equal(out, x.view(dtype)[:32].astype(np.int32))
    x = rng.integers(0, 2**32, 32 * 8).astype(np.uint32)
    for v, bits in ((2, 32), (4, 32), (2, 64), (4, 64), (8, 32)):
        size = v * bits // 8
        out = np.zeros_like(x)
        stem = "%r" if bits == 32 else "%d"
        registers = ", ".join(f"{stem}{40 + i}" for i in range(v))
        code = (
            f"ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, {size}, %d1; ld.global.v{v}.b{bits} {{{registers}}}, [%d1];"
        )
        code += f"ld.param.u64 %d2, [out]; mad.wide.u32 %d2, %r0, {size}, %d2; st.global.v{v}.b{bits} [%d2], {{{registers}}};"
        counts = run(code, "u64 out, u64 x", [aligned(out), aligned(x)], target="sm_100")
        assert counts["global_ld_bytes"] == counts["global_st_bytes"] == 32 * size
        assert counts["global_ld_sectors"] == 32 * size / 32


def test_b128_registers():
    x, out = aligned(rng.integers(0, 2**63, 64).astype(np.uint64)), aligned(np.zeros(64, np.uint64))
    code = """ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, 16, %d1; ld.param.u64 %d2, [out]; mad.wide.u32 %d2, %r0, 16, %d2;
    { .reg .b128 r; ld.relaxed.gpu.global.b128 r, [%d1]; mov.b128 {%d3, %d4}, r; }
    { .reg .b128 r; mov.b128 r, {%d4, %d3}; st.relaxed.gpu.global.b128 [%d2], r; }"""
    for torn in (False, True):
        out[:] = 0
        run(code, "u64 out, u64 x", [out, x], target="sm_90", torn=torn, seed=3)
        np.testing.assert_array_equal(out.reshape(-1, 2), x.reshape(-1, 2)[:, ::-1])


def test_generic_addresses_and_local_memory():
    code = """.shared .align 8 .b32 s[32]; .local .align 8 .b8 l[16]; mov.u32 %r10, s; mad.lo.u32 %r10, %r0, 4, %r10;
    cvt.u64.u32 %d2, %r10; cvta.shared.u64 %d2, %d2; st.u32 [%d2], %r0; ld.shared.u32 %r11, [%r10];
    mov.u64 %d3, l; cvta.local.u64 %d3, %d3; add.u32 %r12, %r0, 100; st.u32 [%d3+8], %r12; ld.local.u32 %r13, [l+8];
    isspacep.shared %p1, %d2; isspacep.local %p2, %d3; isspacep.global %p3, %d3; selp.u32 %r14, 1000, 0, %p1;
    selp.u32 %r15, 2000, 0, %p2; selp.u32 %r16, 4000, 0, %p3; cvta.to.shared.u64 %d4, %d2; cvt.u32.u64 %r17, %d4;
    sub.u32 %r18, %r17, %r10; add.u32 %r40, %r11, %r13; add.u32 %r40, %r40, %r14; add.u32 %r40, %r40, %r15;
    add.u32 %r40, %r40, %r16; add.u32 %r40, %r40, %r18;"""
    np.testing.assert_array_equal(per_lane(code), 2 * LANES + 100 + 3000)


def test_module_variables():
    before = ".const .align 4 .b32 c[3] = {5, 0xA, 7};\n.global .align 8 .u64 pointer[1] = {generic(g)};\n.global .b32 g = 42;\n"
    before = "\n".join(reversed(before.strip().split("\n"))) + "\n"
    code = "ld.const.u32 %r10, [c+4]; mov.u64 %d2, pointer; ld.global.u64 %d3, [%d2]; ld.global.u32 %r11, [%d3]; add.u32 %r40, %r10, %r11;"
    assert (per_lane(code, before=before) == 52).all()


ATOMICS = {
    "add.u32": lambda old, x: old + x, "min.u32": min, "max.s32": max, "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x, "xor.b32": lambda old, x: old ^ x, "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1, "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(op, space):
    word, start = np.array([40], np.uint32), 40
    place = "ld.param.u64 %d2, [word];"
    if space == "shared":
        place = ".shared .b32 s; mov.u32 %r9, s; cvt.u64.u32 %d2, %r9; st.shared.u32 [s], 40; bar.warp.sync -1;"
    out = np.zeros(32, np.uint32)
    code = (
        place
        + f"add.u32 %r10, %r0, 30; atom.{space}.{op} %r40, [%d2], %r10; bar.warp.sync -1; ld.{space}.u32 %r41, [%d2];"
    )
    code += STORE + "ld.param.u64 %d3, [word]; st.global.u32 [%d3], %r41;"
    counts = run(code, "u64 out, u64 word", [out, word])
    value = start
    for lane in range(32):
        assert out[lane] == value
        value = ATOMICS[op](value, lane + 30)
    assert word[0] == value
    assert counts[f"atom_{space}"] == 32


def test_atomics_on_floats_and_cas():
    word = np.array([1.5], np.float32)
    run("ld.param.u64 %d2, [w]; cvt.rn.f32.u32 %f1, %r0; red.global.add.f32 [%d2], %f1;", "u64 w", [word])
    assert word[0] == 1.5 + 496
    pair = np.array([1, 1], np.float16)
    run("ld.param.u64 %d2, [w]; mov.b32 %r9, 0x3C004000; red.global.add.noftz.f16x2 [%d2], %r9;", "u64 w", [pair])
    np.testing.assert_array_equal(pair, [65, 33])
    word, out = np.array([7], np.uint64), np.zeros(32, np.uint32)
    code = "ld.param.u64 %d2, [w]; cvt.u64.u32 %d3, %r0; atom.global.cas.b64 %d4, [%d2], 7, %d3; cvt.u32.u64 %r40, %d4;"
    run(code + STORE, "u64 out, u64 w", [out, word])
    np.testing.assert_array_equal(out, [7] + [0] * 31)


def test_cp_async():
    x, out = aligned(rng.integers(0, 2**32, 128).astype(np.uint32)), np.zeros(128, np.uint32)
    code = """.shared .align 16 .b8 s[512]; mov.u32 %r10, s; mad.lo.u32 %r10, %r0, 16, %r10; ld.param.u64 %d2, [x];
    mad.wide.u32 %d2, %r0, 16, %d2; shr.u32 %r11, %r0, 1; {copy} cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.v4.u32 {{%r50, %r51, %r52, %r53}}, [%r10]; ld.param.u64 %d3, [out]; mad.wide.u32 %d3, %r0, 16, %d3;
    st.global.v4.u32 [%d3], {{%r50, %r51, %r52, %r53}};"""
    for defer in (True, False):
        run(code.format(copy="cp.async.cg.shared.global [%r10], [%d2], 16;"), "u64 out, u64 x", [out, x], defer=defer)
        np.testing.assert_array_equal(out, x)
        counts = run(
            code.format(copy="cp.async.cg.shared.global.L2::128B [%r10], [%d2], 0x10, %r11;"),
            "u64 out, u64 x",
            [out, x],
            defer=defer,
        )
        want = x.view(np.uint8).reshape(32, 16).copy()
        for lane in range(32):
            want[lane, lane // 2 :] = 0
        np.testing.assert_array_equal(out, want.view(np.uint32).reshape(-1))
        assert counts["cp_async_bytes"] == sum(i // 2 for i in range(32))
    copy = "cp.async.ca.shared.global [%r10], [%d2], 8; cp.async.ca.shared.global [%r10+8], [%d2+8], 4; cp.async.ca.shared.global [%r10+12], [%d2+12], 4;"
    run(code.format(copy=copy), "u64 out, u64 x", [out, x])
    np.testing.assert_array_equal(out, x)


def test_cp_async_groups_land_in_order():
    x, out = aligned(np.arange(64, dtype=np.uint32)), np.zeros(64, np.uint32)
    code = """.shared .align 16 .b8 s[512]; mov.u32 %r10, s; mad.lo.u32 %r10, %r0, 4, %r10; ld.param.u64 %d2, [x]; mad.wide.u32 %d2, %r0, 4, %d2;
    cp.async.ca.shared.global [%r10], [%d2], 4; cp.async.commit_group; cp.async.ca.shared.global [%r10+128], [%d2+128], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.u32 %r50, [%r10]; ld.shared.u32 %r51, [%r10+128];
    ld.param.u64 %d3, [out]; mad.wide.u32 %d3, %r0, 4, %d3; st.global.u32 [%d3], %r50; st.global.u32 [%d3+128], %r51;"""
    run(code, "u64 out, u64 x", [out, x])
    np.testing.assert_array_equal(out[:32], np.arange(32))
    assert (out[32:] == 0xFFFFFFFF).all()


def test_hints_change_nothing():
    code = """ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, 16, %d1; prefetch.global.L2 [%d1]; applypriority.global.L2::evict_normal [%d1], 128;
    createpolicy.fractional.L2::evict_last.b64 %d3, 1.0; griddepcontrol.wait; nanosleep.u32 20; pmevent 1; griddepcontrol.launch_dependents;
    ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%r20, %r21}, [%d1]; ld.global.L1::evict_last.L2::cache_hint.u32 %r22, [%d1+8], %d3;
    ldu.global.u32 %r23, [%d1+12]; prefetchu.L1 [%d1]; st.global.L1::evict_first.L2::cache_hint.u32 [%d1], %r23, %d3;
    .shared .align 16 .b8 s[512]; mov.u32 %r10, s; mad.lo.u32 %r11, %r0, 16, %r10; ld.param.u64 %d4, [y]; setp.gt.u32 %p1, %r0, 15;
    cp.async.cg.shared.global.L2::cache_hint [%r11], [%d4], 16, %d3; cp.async.cg.shared.global [%r11], [%d4], 16, %p1; cp.async.wait_all;
    ld.shared.u32 %r24, [%r11+4]; add.u32 %r40, %r20, %r21; add.u32 %r40, %r40, %r22; add.u32 %r40, %r40, %r24;"""
    out, x, y = np.zeros(32, np.uint32), aligned(np.arange(128, dtype=np.uint32)), aligned(np.full(4, 5000, np.uint32))
    run(code + STORE, "u64 out, u64 x, u64 y", [out, x, y], target="sm_90")
    np.testing.assert_array_equal(out, 12 * LANES + 3 + np.where(LANES > 15, 0, 5000))
    np.testing.assert_array_equal(x[::4], 4 * LANES + 3)


def test_special_registers():
    names = [
        "tid.x",
        "tid.y",
        "tid.z",
        "ntid.x",
        "ntid.y",
        "ntid.z",
        "ctaid.x",
        "ctaid.y",
        "nctaid.x",
        "nctaid.y",
        "laneid",
        "warpid",
    ]
    n = 2 * 3 * 24
    out = np.zeros((n, len(names)), np.uint32)
    code = """mov.u32 %r10, %ctaid.y; mov.u32 %r11, %nctaid.x; mad.lo.u32 %r10, %r10, %r11, %r2; mov.u32 %r11, %tid.z; mov.u32 %r12, %tid.y;
    mad.lo.u32 %r11, %r11, 3, %r12; mad.lo.u32 %r11, %r11, 4, %r0; mad.lo.u32 %r11, %r10, 24, %r11; ld.param.u64 %d1, [out];"""
    code += f"mad.wide.u32 %d1, %r11, {4 * len(names)}, %d1;"
    code += "".join(f"mov.u32 %r20, %{name}; st.global.u32 [%d1+{4 * i}], %r20;" for i, name in enumerate(names))
    Module(kernel(code, "u64 out")).launch("k", (2, 3), (4, 3, 2), [out])
    block, thread = np.divmod(np.arange(n), 24)
    x, y, z = thread % 4, thread // 4 % 3, thread // 12
    want = [x, y, z, 4, 3, 2, block % 2, block // 2, 2, 3, thread % 32, thread // 32]
    np.testing.assert_array_equal(out, np.stack([np.broadcast_to(w, n) for w in want], 1))


def test_exit_of_some_lanes_leaves_the_others():
    out = np.zeros(64, np.uint32)
    code = "setp.lt.u32 %p1, %r0, 40; @%p1 exit; mov.u32 %r40, 9; bar.sync 0; vote.sync.ballot.b32 %r41, 1, -1; popc.b32 %r42, %r41; add.u32 %r40, %r40, %r42;"
    run(
        code.replace(
            "vote.sync.ballot.b32 %r41, 1, -1", "setp.eq.u32 %p2, %r0, %r0; vote.sync.ballot.b32 %r41, %p2, 0xffffff00"
        )
        + STORE,
        "u64 out",
        [out],
        block=64,
    )
    np.testing.assert_array_equal(out, [0] * 40 + [33] * 24)


def test_clocks_run():
    out = np.zeros(1, np.uint32)
    code = """mov.u64 %d5, %clock64; W: nanosleep.u32 100; mov.u64 %d6, %clock64; sub.u64 %d7, %d6, %d5; setp.lt.u64 %p1, %d7, 1000; @%p1 bra W;
    mov.u32 %r40, 1;"""
    run(code + STORE, "u64 out", [out], block=1)
    assert out[0] == 1


# ---- counters


def test_counters_of_straight_line_code():
    code = """.shared .align 4 .b8 s[256]; .local .align 4 .b8 l[8];
    ld.param.u64 %d1, [x]; mul.wide.u32 %d2, %r0, 8; add.u64 %d3, %d1, %d2; setp.lt.u32 %p1, %r0, 40;
    @%p1 ld.global.f32 %f1, [%d3]; ex2.approx.f32 %f2, %f1; tanh.approx.f32 %f3, %f2; rcp.approx.f32 %f4, %f3; div.rn.f32 %f5, %f4, %f4;
    sqrt.rn.f32 %f6, %f5; @%p1 st.global.v2.f32 [%d3], {%f4, %f4}; shl.b32 %r10, %r0, 2; mov.u32 %r11, s; add.u32 %r12, %r11, %r10;
    st.shared.f32 [%r12], %f4; bar.sync 0; ld.shared.f32 %f7, [%r12]; st.local.f32 [l], %f7; shfl.sync.idx.b32 %r13, %r10, 0, 31, -1;"""
    got = run(code, "u64 x", [aligned(np.ones(128, np.float32))], block=64)
    want = {
        "launches": 1, "blocks": 1, "warp_instr": 2 * (4 + 19 + 1), "global_ld": 2, "global_ld_bytes": 160, "global_ld_sectors": 10, "global_st": 2,
        "global_st_bytes": 320, "global_st_sectors": 10, "ex2": 64, "tanh": 64, "rcp": 64, "div": 64, "sfu_other": 64, "shared_st_bytes": 256,
        "shared_ld_bytes": 256, "local_st_bytes": 256, "local_ld_bytes": 0, "bar_block": 1, "bar_warp": 2, "shfl": 2, "atom_global": 0, "polls": 0,
    }  # fmt: skip
    assert {k: got[k] for k in want} == want
    assert got["by_arg"][0] == {
        "ld_bytes": 160,
        "ld_sectors": 10,
        "st_bytes": 320,
        "st_sectors": 10,
        "atomics": 0,
        "poll_bytes": 0,
    }


def test_sectors_of_access_patterns():
    x = aligned(np.zeros(4096, np.float32))
    for stride, sectors in ((0, 1), (4, 4), (8, 8), (32, 32), (64, 32)):
        code = f"ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, {stride}, %d1; ld.global.f32 %f1, [%d1];"
        assert run(code, "u64 x", [x])["global_ld_sectors"] == sectors
    code = "ld.param.u64 %d1, [x]; sub.u32 %r9, 31, %r0; mad.wide.u32 %d1, %r9, 4, %d1; ld.global.f32 %f1, [%d1+16];"
    assert run(code, "u64 x", [x])["global_ld_sectors"] == 5


def test_polls_are_told_from_first_reads():
    """Block 1 waits for a flag that block 0 sets after a long loop."""
    code = """ld.param.u64 %d1, [flag]; setp.eq.u32 %p1, %r2, 1; @%p1 bra WAIT; mov.u32 %r10, 0;
    SPIN: add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 200000; @%p2 bra SPIN; st.relaxed.gpu.global.u32 [%d1], 1; bra DONE;
    WAIT: ld.relaxed.gpu.global.u32 %r11, [%d1]; setp.eq.u32 %p2, %r11, 0; @%p2 bra WAIT;
    DONE:"""
    got = run(code, "u64 flag", [np.zeros(1, np.uint32)], grid=2, seed=1)
    assert got["polls"] > 0
    assert got["global_ld"] == got["strong_ld"] == got["polls"] + 1
    assert got["global_ld_bytes"] - got["poll_bytes"] == 32 * 4
    assert run(code, "u64 flag", [np.ones(1, np.uint32)], grid=2, seed=1)["polls"] == 0


# ---- what is not there says so


@pytest.mark.parametrize(
    "code, words",
    [
        ("wgmma.fence.sync.aligned;", "unknown instruction"),
        ("add.rn.frob.f32 %f1, %f2, %f3;", "unsupported modifier .frob"),
        ("cp.async.bulk.shared.global [%r1], [%d1], 16;", "unsupported modifier .bulk"),
        ("add.f32 %f1, %f2, %zz;", "unknown name"),
        ("bra NOWHERE;", "label NOWHERE"),
    ],
)
def test_unsupported_code_names_its_line(code, words):
    with pytest.raises(SimulationError, match=words) as error:
        Module(kernel("\n\n" + code)).launch("k", (1,), (32,), [])
    if "label" not in words:
        assert "line 11" in str(error.value)


def test_elementwise_helper_sees_results():
    np.testing.assert_array_equal(
        elementwise("add.u32 {d}, {a}, 1;", np.uint32, np.arange(300, dtype=np.uint32)), np.arange(1, 301)
    )
