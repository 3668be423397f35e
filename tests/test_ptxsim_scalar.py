# ruff: noqa: E501  (PTX and CUDA in strings)
"""ptxsim: every instruction that works lane by lane, against numpy, torch and exact fractions, with special values."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptxsim.testing import elementwise

rng = np.random.default_rng(1)

F32_SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1, -1,
     1.0000001, 0.99999994, 2, -2, 3, 0.5, 1e20, -1e-20, 16777216, 16777217, 65504, 65520, 1 / 3],
    np.float32,
)  # fmt: skip
INTEGERS = {
    "s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64
}  # fmt: skip


def pairs(values):
    return np.repeat(values, values.size), np.tile(values, values.size)


def integers(dtype, n=400):
    info = np.iinfo(dtype)
    special = np.array([0, 1, 2, 3, 7, info.max, info.max - 1, info.min, info.min + 1], dtype)
    x, y = pairs(special)
    a = rng.integers(info.min, info.max, n, dtype, endpoint=True)
    b = rng.integers(info.min, info.max, n, dtype, endpoint=True) >> rng.integers(0, info.bits - 1, n).astype(dtype)
    return np.concatenate([x, a]), np.concatenate([y, b])


def wrap(values, dtype):
    bits = np.iinfo(dtype).bits
    return np.array([v & (2**bits - 1) for v in values], f"u{bits // 8}").view(dtype)


def python(*arrays):
    return zip(*[[int(v) for v in a] for a in arrays])


def same_bits(got, want):
    """Equal, and -0 is not 0; every NaN must be the canonical one if `want` is NaN."""
    got, want = np.asarray(got), np.asarray(want)
    view = f"u{got.dtype.itemsize}"
    nan = np.isnan(want)
    assert (np.isnan(got) == nan).all()
    np.testing.assert_array_equal(got.view(view)[~nan], want.view(view)[~nan])


def quotient(a, b, dtype):
    if b == 0:
        return -1
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def remainder(a, b, dtype):
    return a if b == 0 else a - b * quotient(a, b, dtype)


BINARY = {
    "add": lambda a, b, t: a + b,
    "sub": lambda a, b, t: a - b,
    "mul.lo": lambda a, b, t: a * b,
    "mul.hi": lambda a, b, t: (a * b) >> np.iinfo(t).bits,
    "div": quotient,
    "rem": remainder,
    "min": lambda a, b, t: min(a, b),
    "max": lambda a, b, t: max(a, b),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("op", BINARY)
def test_integer_binary(op, kind):
    dtype = INTEGERS[kind]
    a, b = integers(dtype)
    got = elementwise(f"{op}.{kind} {{d}}, {{a}}, {{b}};", dtype, a, b)
    np.testing.assert_array_equal(got, wrap([BINARY[op](x, y, dtype) for x, y in python(a, b)], dtype))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_integer_unary(kind):
    dtype = INTEGERS[kind]
    a, _ = integers(dtype)
    for op, f in {"abs": abs, "neg": lambda x: -x}.items():
        got = elementwise(f"{op}.{kind} {{d}}, {{a}};", dtype, a)
        np.testing.assert_array_equal(got, wrap([f(x) for x in a.tolist()], dtype))


@pytest.mark.parametrize("narrow, wide", [("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")])
def test_integer_wide(narrow, wide):
    a, b = integers(INTEGERS[narrow])
    c = rng.integers(0, 2**31, a.size).astype(INTEGERS[wide])
    got = elementwise(f"mul.wide.{narrow} {{d}}, {{a}}, {{b}};", INTEGERS[wide], a, b)
    np.testing.assert_array_equal(got, wrap([x * y for x, y in python(a, b)], INTEGERS[wide]))
    got = elementwise(f"mad.wide.{narrow} {{d}}, {{a}}, {{b}}, {{c}};", INTEGERS[wide], a, b, c)
    np.testing.assert_array_equal(got, wrap([x * y + z for x, y, z in python(a, b, c)], INTEGERS[wide]))


def test_integer_ternary():
    a, b = integers(np.int32)
    c = a[::-1].copy()
    ternary = {
        "mad.lo.s32": lambda x, y, z: x * y + z,
        "mad.hi.s32": lambda x, y, z: ((x * y) >> 32) + z,
        "sad.s32": lambda x, y, z: abs(x - y) + z,
    }
    for op, f in ternary.items():
        got = elementwise(f"{op} {{d}}, {{a}}, {{b}}, {{c}};", np.int32, a, b, c)
        np.testing.assert_array_equal(got, wrap([f(*v) for v in python(a, b, c)], np.int32), err_msg=op)
    got = elementwise("add.sat.s32 {d}, {a}, {b};", np.int32, a, b)
    np.testing.assert_array_equal(got, np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1))
    got = elementwise("sub.sat.s32 {d}, {a}, {b};", np.int32, a, b)
    np.testing.assert_array_equal(got, np.clip(a.astype(np.int64) - b, -(2**31), 2**31 - 1))


def test_mul24():
    a, b = integers(np.int32)
    low = lambda x: ((int(x) & 0xFFFFFF) ^ 0x800000) - 0x800000
    np.testing.assert_array_equal(
        elementwise("mul24.lo.s32 {d}, {a}, {b};", np.int32, a, b),
        wrap([low(x) * low(y) for x, y in zip(a, b)], np.int32),
    )
    want = wrap([(int(x) & 0xFFFFFF) * (int(y) & 0xFFFFFF) for x, y in zip(a, b)], np.uint32)
    np.testing.assert_array_equal(elementwise("mul24.lo.u32 {d}, {a}, {b};", np.uint32, a, b), want)


def test_carry_makes_128_bit_sums_and_products():
    a, b = integers(np.uint64)
    got = elementwise("add.cc.u64 {d}, {a}, {b}; addc.u64 {d}, 0, 0;", np.uint64, a, b)
    np.testing.assert_array_equal(got, [(x + y) >> 64 for x, y in python(a, b)])
    got = elementwise("sub.cc.u64 {d}, {a}, {b}; subc.u64 {d}, 0, 0;", np.uint64, a, b)
    np.testing.assert_array_equal(got, wrap([-(x < y) for x, y in python(a, b)], np.uint64))
    got = elementwise(
        "mad.lo.cc.u32 {d}, {a}, {b}, {a}; madc.hi.u32 {d}, {a}, {b}, 5;", np.uint32, *integers(np.uint32)
    )
    x, y = integers(np.uint32, 1)
    x, y = x[:81], y[:81]
    np.testing.assert_array_equal(
        got[:81], wrap([(p * q >> 32) + 5 + (((p * q & 0xFFFFFFFF) + p) >> 32) for p, q in python(x, y)], np.uint32)
    )


def test_bits():
    for kind, dtype in (("b32", np.uint32), ("b64", np.uint64)):
        a, b = integers(dtype)
        bits = np.iinfo(dtype).bits
        for op, f in {
            "popc": lambda x: x.bit_count(),
            "clz": lambda x, n=bits: n - x.bit_length(),
        }.items():
            got = elementwise(f"{op}.{kind} {{d}}, {{a}};", np.uint32, a)
            np.testing.assert_array_equal(got, [f(x) for x in a.tolist()], err_msg=op)
        got = elementwise(f"brev.{kind} {{d}}, {{a}};", dtype, a)
        np.testing.assert_array_equal(got, np.array([int(f"{x:0{bits}b}"[::-1], 2) for x in a.tolist()], dtype))
        for op, f in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
            np.testing.assert_array_equal(elementwise(f"{op}.{kind} {{d}}, {{a}}, {{b}};", dtype, a, b), f(a, b))
        np.testing.assert_array_equal(elementwise(f"not.{kind} {{d}}, {{a}};", dtype, a), ~a)
        np.testing.assert_array_equal(elementwise(f"cnot.{kind} {{d}}, {{a}};", dtype, a), a == 0)
    a, _ = integers(np.int32)
    got = elementwise("bfind.s32 {d}, {a};", np.uint32, a)
    np.testing.assert_array_equal(got, [((~x if x < 0 else x).bit_length() - 1) & 0xFFFFFFFF for x in a.tolist()])
    a, _ = integers(np.uint32)
    got = elementwise("bfind.shiftamt.u32 {d}, {a};", np.uint32, a)
    np.testing.assert_array_equal(got, [(32 - x.bit_length()) if x else 0xFFFFFFFF for x in a.tolist()])


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_shifts(kind):
    dtype, bits = INTEGERS[kind], np.iinfo(INTEGERS[kind]).bits
    a, _ = integers(dtype)
    n = rng.integers(0, bits + 9, a.size).astype(np.uint32)  # amounts past the width clamp
    got = elementwise(f"shl.b{bits} {{d}}, {{a}}, {{b}};", dtype, a, n)
    np.testing.assert_array_equal(got, wrap([x << k for x, k in python(a, n)], dtype))
    got = elementwise(f"shr.{kind} {{d}}, {{a}}, {{b}};", dtype, a, n)
    np.testing.assert_array_equal(got, wrap([x >> k for x, k in python(a, n)], dtype))


def test_funnel_shift():
    a, b = integers(np.uint32)
    n = rng.integers(0, 50, a.size).astype(np.uint32)
    for mode, f in {"wrap": lambda k: k & 31, "clamp": lambda k: min(k, 32)}.items():
        got = elementwise(f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", np.uint32, a, b, n)
        np.testing.assert_array_equal(
            got, wrap([((y << 32 | x) << f(k)) >> 32 for x, y, k in python(a, b, n)], np.uint32)
        )
        got = elementwise(f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", np.uint32, a, b, n)
        np.testing.assert_array_equal(got, wrap([(y << 32 | x) >> f(k) for x, y, k in python(a, b, n)], np.uint32))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    dtype, bits = INTEGERS[kind], np.iinfo(INTEGERS[kind]).bits
    a, b = integers(dtype)
    p = rng.integers(0, bits + 4, a.size).astype(np.uint32)
    n = rng.integers(0, bits + 4, a.size).astype(np.uint32)

    def extract(x, p, n):
        if n == 0:
            return 0
        if kind[0] == "u":
            return (x & (2**bits - 1)) >> p & (2**n - 1)
        top = min(p + n - 1, bits - 1)
        low = [(x >> min(p + i, top)) & 1 if p + i <= top else (x >> top) & 1 for i in range(bits)]
        return sum(bit << i for i, bit in enumerate(low))

    got = elementwise(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", dtype, a, p, n)
    np.testing.assert_array_equal(got, wrap([extract(*v) for v in python(a, p, n)], dtype))
    if kind[0] == "u":
        keep = lambda x, y, p, n: y if p >= bits else (y & ~(((1 << n) - 1) << p)) | ((x & ((1 << n) - 1)) << p)
        got = elementwise(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{x3}};", dtype, a, b, p, n)
        np.testing.assert_array_equal(got, wrap([keep(*v) for v in python(a, b, p, n)], dtype))


def test_lop3_of_every_table():
    a, b, c = (np.uint32(x) for x in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    for table in range(0, 256, 5):
        got = elementwise(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", np.uint32, a, b, c)[0]
        assert got == table * 0x01010101


def test_prmt():
    a, b = integers(np.uint32)
    c = rng.integers(0, 2**16, a.size).astype(np.uint32)

    def byte(x, y, select):
        v = (y << 32 | x) >> 8 * (select & 7) & 255
        return (255 if v & 128 else 0) if select & 8 else v

    want = [sum(byte(x, y, s >> 4 * i & 15) << 8 * i for i in range(4)) for x, y, s in python(a, b, c)]
    np.testing.assert_array_equal(elementwise("prmt.b32 {d}, {a}, {b}, {c};", np.uint32, a, b, c), want)
    modes = {
        "f4e": lambda n, i: (n + i) & 7, "b4e": lambda n, i: (n - i) & 7, "rc8": lambda n, i: n,
        "ecl": max, "ecr": min, "rc16": lambda n, i: 2 * (n & 1) + (i & 1),
    }  # fmt: skip
    for mode, f in modes.items():
        got = elementwise(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, {{c}};", np.uint32, a, b, c)
        want = [sum(byte(x, y, f(s & 3, i)) << 8 * i for i in range(4)) for x, y, s in python(a, b, c)]
        np.testing.assert_array_equal(got, want, err_msg=mode)


def test_dp4a():
    a, b = integers(np.int32)
    want = (a.view(np.int8).reshape(-1, 4).astype(int) * b.view(np.int8).reshape(-1, 4)).sum(1) + 7
    np.testing.assert_array_equal(elementwise("dp4a.s32.s32 {d}, {a}, {b}, 7;", np.int32, a, b), want)


# ---- comparison and selection

ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_setp_integer(kind):
    a, b = integers(INTEGERS[kind])
    for op, f in ORDERED.items():
        got = elementwise(f"setp.{op}.{kind} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;", np.uint32, a, b)
        np.testing.assert_array_equal(got, f(a, b))


def test_setp_float():
    a, b = pairs(F32_SPECIAL)
    unordered = np.isnan(a) | np.isnan(b)
    for op, f in ORDERED.items():
        for suffix, want in (("", f(a, b) & ~unordered), ("u", f(a, b) | unordered)):
            got = elementwise(f"setp.{op}{suffix}.f32 %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;", np.uint32, a, b)
            np.testing.assert_array_equal(got, want, err_msg=op + suffix)
    for op, want in {"num": ~unordered, "nan": unordered}.items():
        got = elementwise(f"setp.{op}.f32 %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;", np.uint32, a, b)
        np.testing.assert_array_equal(got, want)
    got = elementwise(
        "setp.lt.ftz.f32 %p1, {a}, {b}; selp.u32 {d}, 1, 0, %p1;", np.uint32, np.float32(-1e-45), np.float32(0)
    )
    assert got[0] == 0


def test_setp_two_results_and_combination():
    a, b = integers(np.int32)
    code = "setp.gt.s32 %p3, {a}, 0; setp.lt.and.s32 %p1|%p2, {a}, {b}, %p3; selp.u32 %r50, 1, 0, %p1; selp.u32 {d}, 2, 0, %p2; add.u32 {d}, {d}, %r50;"
    want = ((a < b) & (a > 0)) + 2 * (~(a < b) & (a > 0))
    np.testing.assert_array_equal(elementwise(code, np.uint32, a, b), want)
    code = "setp.gt.s32 %p3, {a}, 0; setp.lt.xor.s32 %p1, {a}, {b}, !%p3; selp.u32 {d}, 1, 0, %p1;"
    np.testing.assert_array_equal(elementwise(code, np.uint32, a, b), (a < b) ^ (a <= 0))


def test_set_slct_predicates():
    a, b = pairs(F32_SPECIAL)
    np.testing.assert_array_equal(
        elementwise("set.gt.u32.f32 {d}, {a}, {b};", np.uint32, a, b), np.where(a > b, 0xFFFFFFFF, 0)
    )
    np.testing.assert_array_equal(
        elementwise("set.gt.f32.f32 {d}, {a}, {b};", np.float32, a, b), (a > b).astype(np.float32)
    )
    x, y = integers(np.int32)
    np.testing.assert_array_equal(
        elementwise("slct.s32.s32 {d}, {a}, {b}, {a};", np.int32, x, y), np.where(x >= 0, x, y)
    )
    code = "setp.lt.s32 %p1, {a}, 0; setp.lt.s32 %p2, {b}, 0; not.pred %p3, %p1; and.pred %p3, %p3, %p2; or.pred %p3, %p3, %p1; selp.s32 {d}, 1, 0, %p3;"
    np.testing.assert_array_equal(elementwise(code, np.int32, x, y), (x < 0) | (y < 0))


# ---- floats

FLOAT_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
}  # fmt: skip


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
@pytest.mark.parametrize("op", FLOAT_BINARY)
def test_float_arithmetic(op, kind, dtype):
    a, b = pairs(F32_SPECIAL.astype(dtype))
    a = np.concatenate([a, rng.standard_normal(500).astype(dtype)])
    b = np.concatenate([b, rng.standard_normal(500).astype(dtype)])
    rn = ".rn" if op == "div" else ""
    got = elementwise(f"{op}{rn}.{kind} {{d}}, {{a}}, {{b}};", dtype, a, b)
    with np.errstate(all="ignore"):
        same_bits(got, FLOAT_BINARY[op](a, b))
    if kind == "f32":
        assert (got.view(np.uint32)[np.isnan(got)] == 0x7FFFFFFF).all()


def exact(x):
    return Fraction(float(x))


def rounded(value, mode, dtype=np.float32):
    """A fraction to float32 or float64, rounded down, up or towards zero."""
    near = dtype(float(value)) if dtype is np.float64 else np.float32(value.numerator / value.denominator)
    if mode == "rz":
        mode = "rm" if value > 0 else "rp"
    while exact(near) > value:
        near = np.nextafter(near, dtype(-np.inf))
    while exact(np.nextafter(near, dtype(np.inf))) <= value:
        near = np.nextafter(near, dtype(np.inf))
    if mode == "rp" and exact(near) != value:
        near = np.nextafter(near, dtype(np.inf))
    return near


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_directed_rounding(mode, kind, dtype):
    a, b, c = (rng.standard_normal(200).astype(dtype) for _ in range(3))
    c[:50] *= dtype(1e-9)
    operations = {
        "add": lambda x, y, z: x + y, "sub": lambda x, y, z: x - y, "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z, "div": lambda x, y, z: x / y, "rcp": lambda x, y, z: 1 / x,
    }  # fmt: skip
    for op, f in operations.items():
        operands = {"fma": "{a}, {b}, {c}", "rcp": "{a}"}.get(op, "{a}, {b}")
        got = elementwise(f"{op}.{mode}.{kind} {{d}}, {operands};", dtype, a, b, c)
        want = [rounded(f(exact(x), exact(y), exact(z)), mode, dtype) for x, y, z in zip(a, b, c)]
        same_bits(got, np.array(want, dtype))
    got = elementwise(f"sqrt.{mode}.f32 {{d}}, {{a}};", np.float32, np.abs(a).astype(np.float32))
    near = np.sqrt(np.abs(a).astype(np.float32).astype(np.float64))
    assert (np.abs(got - near) < 2e-7 * near + 1e-30).all()
    assert ((got <= near) if mode != "rp" else (got >= near)).all()


def test_fma_rounds_once():
    a = np.float32(1 + 2**-12)
    got = elementwise("fma.rn.f32 {d}, {a}, {a}, {b};", np.float32, a, np.float32(-1 - 2**-11))[0]
    assert got == 2.0**-24
    x, y, z = (rng.standard_normal(300).astype(np.float32) for _ in range(3))
    got = elementwise("fma.rn.f32 {d}, {a}, {b}, {c};", np.float32, x, y, z)
    down = np.array([rounded(exact(p) * exact(q) + exact(r), "rm") for p, q, r in zip(x, y, z)])
    up = np.nextafter(down, np.float32(np.inf))
    true = [exact(p) * exact(q) + exact(r) for p, q, r in zip(x, y, z)]
    near = [d if t - exact(d) <= exact(u) - t else u for d, u, t in zip(down, up, true)]
    np.testing.assert_array_equal(got, near)


def test_min_max_abs_neg():
    a, b = pairs(F32_SPECIAL)
    nan = np.isnan(a) | np.isnan(b)
    lower = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    upper = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    for op, pick in (("min", lower), ("max", upper)):
        want = np.where(np.isnan(a), b, np.where(np.isnan(b), a, pick))
        same_bits(elementwise(f"{op}.f32 {{d}}, {{a}}, {{b}};", np.float32, a, b), want)
        same_bits(
            elementwise(f"{op}.NaN.f32 {{d}}, {{a}}, {{b}};", np.float32, a, b),
            np.where(nan, np.nan, want).astype(np.float32),
        )
    bits = F32_SPECIAL.view(np.uint32)
    np.testing.assert_array_equal(elementwise("abs.f32 {d}, {a};", np.uint32, bits), bits & 0x7FFFFFFF)
    np.testing.assert_array_equal(elementwise("neg.f32 {d}, {a};", np.uint32, bits), bits ^ 0x80000000)
    same_bits(elementwise("copysign.f32 {d}, {a}, {b};", np.float32, a, b)[~nan], np.copysign(b, a)[~nan])


def test_ftz_and_saturation():
    tiny = np.float32(1e-39)
    assert elementwise("add.ftz.f32 {d}, {a}, {a};", np.uint32, tiny)[0] == 0
    assert elementwise("mul.ftz.f32 {d}, {a}, {b};", np.uint32, np.float32(-1e-30), np.float32(1e-10))[0] == 0x80000000
    assert elementwise("add.f32 {d}, {a}, {a};", np.float32, tiny)[0] == tiny + tiny
    x = F32_SPECIAL
    want = np.where(np.isnan(x), 0, np.clip(x, 0, 1)) + np.float32(0)
    np.testing.assert_array_equal(elementwise("add.sat.f32 {d}, {a}, 0f00000000;", np.float32, x), want)


def test_min_and_max_flush_and_keep_nan():
    x = np.float32([-1e-40, 1e-40, np.nan])
    for op, want in {"min": [0x80000000, 0, 0x7FFFFFFF], "max": [0, 0, 0x7FFFFFFF]}.items():
        got = elementwise(f"{op}.ftz.NaN.f32 {{d}}, {{a}}, 0f00000000;", np.uint32, x)
        np.testing.assert_array_equal(got, want)


def test_testp():
    x = F32_SPECIAL
    tests = {
        "finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x),
        "subnormal": (x != 0) & (np.abs(x) < 1.1754944e-38), "normal": np.isfinite(x) & (np.abs(x) >= 1.1754944e-38),
    }  # fmt: skip
    for name, want in tests.items():
        got = elementwise(f"testp.{name}.f32 %p1, {{a}}; selp.u32 {{d}}, 1, 0, %p1;", np.uint32, x)
        np.testing.assert_array_equal(got, want, err_msg=name)


APPROXIMATE = {
    "ex2.approx.f32": np.exp2, "tanh.approx.f32": np.tanh, "rcp.approx.f32": lambda x: 1 / x, "rcp.rn.f32": lambda x: 1 / x,
    "sqrt.approx.f32": np.sqrt, "sqrt.rn.f32": np.sqrt, "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "lg2.approx.f32": np.log2, "sin.approx.f32": np.sin, "cos.approx.f32": np.cos, "div.full.f32": None,
}  # fmt: skip


@pytest.mark.parametrize("op", APPROXIMATE)
def test_special_functions(op):
    x = np.concatenate([F32_SPECIAL, rng.uniform(-8, 8, 300).astype(np.float32)])
    if op.startswith(("sin", "cos")):
        x = x[np.abs(x) < 100]
    with np.errstate(all="ignore"):
        if op == "div.full.f32":
            got, want = elementwise("div.full.f32 {d}, {a}, 0f40400000;", np.float32, x), x.astype(float) / 3
        else:
            got, want = elementwise(f"{op} {{d}}, {{a}};", np.float32, x), APPROXIMATE[op](x.astype(float))
        want = want.astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-44)


def test_double_special_functions():
    x = np.abs(rng.standard_normal(100)) + 1e-3
    np.testing.assert_array_equal(elementwise("sqrt.rn.f64 {d}, {a};", np.float64, x), np.sqrt(x))
    np.testing.assert_array_equal(elementwise("rcp.rn.f64 {d}, {a};", np.float64, x), 1 / x)
    got = elementwise("fma.rn.f64 {d}, {a}, {a}, {b};", np.float64, 1 + 2.0**-30, -1 - 2.0**-29)[0]
    assert got == 2.0**-60


# ---- 16-bit floats

HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def halves(kind, n):
    special = torch.tensor([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 6e-8, -6e-5, 65504, 3.0e38, 1.0078125, 0.1]).to(
        HALF[kind]
    )
    x = torch.cat([special, torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(HALF[kind])])
    return x


def bits16(x):
    return x.view(torch.int16).numpy().view(np.uint16)


def same_halves(got, want):
    got = torch.from_numpy(got.view(np.int16)).view(want.dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert (got.view(torch.int16)[want.isnan()] == 0x7FFF).all()
    assert torch.equal(got.view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "min", "max"])
def test_half_arithmetic(op, kind):
    a = halves(kind, 300).repeat(2)
    b, c = a.flip(0), a.roll(5)
    f = {
        "add": lambda x, y, z: x + y, "sub": lambda x, y, z: x - y, "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z, "min": lambda x, y, z: torch.fmin(x, y), "max": lambda x, y, z: torch.fmax(x, y),
    }[op]  # fmt: skip
    want = f(a.double(), b.double(), c.double()).to(a.dtype)  # exact in double but for fma's odd case, tested below
    zeros = (a == 0) & (b == 0) if op in ("min", "max") else torch.zeros_like(a, dtype=torch.bool)
    operands = "{a}, {b}, {c}" if op == "fma" else "{a}, {b}"
    rn = ".rn" if op == "fma" else ""
    args = [bits16(x) for x in (a, b, c)]
    got = elementwise(f"{op}{rn}.{kind} {{d}}, {operands};", np.uint16, *args)
    same_halves(got[~zeros.numpy()], want[~zeros])
    pairs32 = [x.view(np.uint32) for x in args]
    got2 = elementwise(f"{op}{rn}.{kind}x2 {{d}}, {operands};", np.uint32, *pairs32)
    np.testing.assert_array_equal(got2.view(np.uint16), got)


def test_half_fma_rounds_once_where_a_double_is_too_short():
    # 1 * 1 + 2^-60 in bf16 with a tie: 1.00390625 is half way between two bf16, the tail decides
    a, b, c = (torch.tensor([v]).to(torch.bfloat16) for v in (1.0, 1.0, 2.0**-60))
    assert elementwise("fma.rn.bf16 {d}, {a}, {b}, {c};", np.uint16, *map(bits16, (a, b, c)))[0] == 0x3F80
    x = torch.tensor([1 + 2.0**-4]).to(torch.bfloat16)  # square 1.12890625 = 1.125 + 2^-8: a tie, to even 1.125
    up = elementwise("fma.rn.bf16 {d}, {a}, {a}, {b};", np.uint16, bits16(x), bits16(c))[0]
    down = elementwise("fma.rn.bf16 {d}, {a}, {a}, {b};", np.uint16, bits16(x), bits16(-c))[0]
    assert (up, down) == (0x3F91, 0x3F90)


@pytest.mark.parametrize("kind", HALF)
def test_half_unary(kind):
    a = halves(kind, 300)
    bits = bits16(a)
    np.testing.assert_array_equal(elementwise(f"neg.{kind} {{d}}, {{a}};", np.uint16, bits), bits ^ 0x8000)
    np.testing.assert_array_equal(elementwise(f"abs.{kind} {{d}}, {{a}};", np.uint16, bits), bits & 0x7FFF)
    got = elementwise(f"tanh.approx.{kind} {{d}}, {{a}};", np.uint16, bits)
    same_halves(got, a.double().tanh().to(a.dtype))
    ftz = ".ftz" if kind == "bf16" else ""
    got = elementwise(f"ex2.approx{ftz}.{kind} {{d}}, {{a}};", np.uint16, bits)
    same_halves(got, a.double().exp2().to(a.dtype))
    got = elementwise(
        f"setp.lt.{kind} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;", np.uint32, bits, bits[::-1].copy()
    )
    np.testing.assert_array_equal(got, (a < a.flip(0)).numpy())


# ---- conversion


def test_cvt_float_to_half_nearest():
    x = np.concatenate(
        [F32_SPECIAL, rng.standard_normal(500).astype(np.float32), np.float32(rng.standard_normal(200) * 1e-6)]
    )
    t = torch.from_numpy(x)
    same_halves(elementwise("cvt.rn.f16.f32 {d}, {a};", np.uint16, x), t.half())
    same_halves(elementwise("cvt.rn.bf16.f32 {d}, {a};", np.uint16, x), t.bfloat16())
    same_halves(
        elementwise("cvt.rn.relu.bf16.f32 {d}, {a};", np.uint16, x),
        torch.where(t.isnan(), t, t.clamp(min=0) + 0.0).bfloat16(),
    )
    for kind, dtype in HALF.items():
        got = elementwise(f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, x, x[::-1].copy())
        same_halves((got >> 16).astype(np.uint16), t.to(dtype))
        same_halves((got & 0xFFFF).astype(np.uint16), t.flip(0).to(dtype))
    d = rng.standard_normal(300)
    same_halves(elementwise("cvt.rn.f16.f64 {d}, {a};", np.uint16, d), torch.from_numpy(d.astype(np.float16)))


@pytest.mark.parametrize(
    "kind, fraction, smallest, largest", [("f16", 10, -14, 65504), ("bf16", 7, -126, 255 * 2.0**120)]
)
def test_cvt_float_to_half_directed(kind, fraction, smallest, largest):
    x = np.concatenate(
        [F32_SPECIAL, rng.standard_normal(300).astype(np.float32), np.float32(rng.standard_normal(50) * 1e-6)]
    )
    x = x[np.isfinite(x)]
    got = elementwise(f"cvt.rz.{kind}.f32 {{d}}, {{a}};", np.uint16, x)
    values = torch.from_numpy(got.view(np.int16)).view(HALF[kind]).double().numpy()
    assert (np.abs(values) <= np.abs(x)).all()
    step = 2.0 ** (np.maximum(np.frexp(np.abs(x.astype(float)))[1] - 1, smallest) - fraction)
    assert ((np.abs(x.astype(float)) - np.abs(values) < step) | (np.abs(x) > largest)).all()
    assert np.abs(values).max() == largest


def test_cvt_tf32():
    x = np.concatenate([F32_SPECIAL, rng.standard_normal(500).astype(np.float32)])
    got = elementwise("cvt.rna.tf32.f32 {d}, {a};", np.uint32, x)
    finite = np.isfinite(x) & (np.abs(x) < 3e38)
    assert (got[finite] & 0x1FFF == 0).all()
    want = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))[finite]
    np.testing.assert_array_equal(got[finite], want)
    assert got[np.isnan(x)] == 0x7FFFFFFF


def test_cvt_half_to_float():
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    same_bits(elementwise("cvt.f32.f16 {d}, {a};", np.float32, bits), bits.view(np.float16).astype(np.float32))
    want = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    same_bits(elementwise("cvt.f32.bf16 {d}, {a};", np.float32, bits, target="sm_90"), want)
    same_bits(elementwise("cvt.f64.f16 {d}, {a};", np.float64, bits), bits.view(np.float16).astype(np.float64))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("mode, f", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
def test_cvt_float_to_integer(kind, mode, f):
    x = np.concatenate(
        [
            F32_SPECIAL,
            np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 2147483648, 4294967296, 1e10, 9.3e18, 1.9e19, 127.5, 255.5, -32769]),
        ]
    )
    register = np.uint64 if kind[1:] == "64" else np.uint32
    dtype = np.dtype({"u8": np.uint8}.get(kind, INTEGERS.get(kind)))
    info = np.iinfo(dtype)
    got = elementwise(f"cvt.{mode}.{kind}.f32 {{d}}, {{a}};", register, x).astype(f"u{dtype.itemsize}").view(dtype)
    want = []
    for v in f(x.astype(np.float64)):
        if np.isnan(v):
            want.append(0x8000000000000000 if dtype.itemsize == 8 else 0)
        else:
            want.append(info.max if v > info.max else info.min if v < info.min else int(v))
    np.testing.assert_array_equal(got, wrap(want, dtype))


@pytest.mark.parametrize("kind", INTEGERS)
def test_cvt_integer_to_float(kind):
    a, _ = integers(INTEGERS[kind])
    np.testing.assert_array_equal(elementwise(f"cvt.rn.f32.{kind} {{d}}, {{a}};", np.float32, a), a.astype(np.float32))
    np.testing.assert_array_equal(elementwise(f"cvt.rn.f64.{kind} {{d}}, {{a}};", np.float64, a), a.astype(np.float64))
    for mode in ("rz", "rm", "rp"):
        got = elementwise(f"cvt.{mode}.f32.{kind} {{d}}, {{a}};", np.float32, a)
        want = [np.float32(0) if v == 0 else rounded(Fraction(v), mode) for v in a.tolist()]
        np.testing.assert_array_equal(got, want)


def test_cvt_between_widths():
    a = rng.integers(-(2**31), 2**31, 300).astype(np.int32)
    np.testing.assert_array_equal(elementwise("cvt.s64.s32 {d}, {a};", np.int64, a), a)
    np.testing.assert_array_equal(elementwise("cvt.u64.u32 {d}, {a};", np.uint64, a.view(np.uint32)), a.view(np.uint32))
    np.testing.assert_array_equal(elementwise("cvt.s32.s8 {d}, {a};", np.int32, a), a.astype(np.int8))
    np.testing.assert_array_equal(elementwise("cvt.u32.u8 {d}, {a};", np.uint32, a), a.astype(np.uint8))
    np.testing.assert_array_equal(
        elementwise("cvt.u16.u32 {d}, {a};", np.uint16, a.view(np.uint32)), a.astype(np.uint16)
    )
    np.testing.assert_array_equal(elementwise("cvt.sat.u8.s32 {d}, {a};", np.uint32, a >> 20), np.clip(a >> 20, 0, 255))
    np.testing.assert_array_equal(elementwise("cvt.sat.s16.s32 {d}, {a};", np.int32, a), np.clip(a, -32768, 32767))
    x = rng.standard_normal(300) * 10.0 ** rng.integers(-40, 38, 300)
    np.testing.assert_array_equal(elementwise("cvt.rn.f32.f64 {d}, {a};", np.float32, x), x.astype(np.float32))
    y = F32_SPECIAL
    same_bits(elementwise("cvt.f64.f32 {d}, {a};", np.float64, y), y.astype(np.float64))
    same_bits(elementwise("cvt.rmi.f32.f32 {d}, {a};", np.float32, y), np.floor(y))
    assert elementwise("cvt.ftz.f32.f32 {d}, {a};", np.uint32, np.float32(-1e-40))[0] == 0x80000000


# ---- moves


def test_mov_packs_and_unpacks():
    a, b = integers(np.uint32)
    code = "mov.b64 %d50, {{{a}, {b}}}; mov.b64 {{%r51, %r52}}, %d50; mov.b64 {d}, {{%r52, %r51}};"
    want = a.astype(np.uint64) << np.uint64(32) | b
    np.testing.assert_array_equal(elementwise(code, np.uint64, a, b), want)
    code = "mov.b32 {{%h50, %h51}}, {a}; mov.b32 {d}, {{%h51, %h50}};"
    np.testing.assert_array_equal(elementwise(code, np.uint32, a), a >> 16 | a << 16)
    code = "mov.b32 {{%h50, _}}, {a}; cvt.u32.u16 {d}, %h50;"
    np.testing.assert_array_equal(elementwise(code, np.uint32, a), a & 0xFFFF)
    x, y = integers(np.uint64)
    code = "mov.b128 %q1, {{{a}, {b}}}; mov.b128 %q2, %q1; mov.b128 {{%d51, {d}}}, %q2;"
    np.testing.assert_array_equal(elementwise(code, np.uint64, x, y), y)


def test_immediates():
    assert elementwise("mov.f32 {d}, 0f3F800000;", np.float32, np.uint32(0))[0] == 1
    assert elementwise("mov.f64 {d}, 0d3FF8000000000000;", np.float64, np.uint32(0))[0] == 1.5
    assert elementwise("mov.b32 {d}, 0b101;", np.uint32, np.uint32(0))[0] == 5
    assert elementwise("mov.u32 {d}, -1;", np.uint32, np.uint32(0))[0] == 0xFFFFFFFF
    assert elementwise("mov.u32 {d}, WARP_SZ;", np.uint32, np.uint32(0))[0] == 32
