"""PTX kernels for tests, written around a few lines of PTX."""

import numpy as np

from . import Module

_HEADER = ".version {version}\n.target {target}\n.address_size 64\n"
_REGISTERS = (
    ".reg .pred %p<32>; .reg .b16 %h<64>; .reg .b32 %r<128>; .reg .b64 %d<64>; .reg .f32 %f<64>; .reg .f64 %e<32>;"
    " .reg .b128 %q<4>;"
)

# Registers by size of the type, for elementwise().
_STEM = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def kernel(body, parameters="", target="sm_80", version="8.7", before="", name="k"):
    """PTX of one kernel. parameters: "u64 x, u32 n". Registers %p %h(16) %r(32) %d(64) %f %e %q(128) are declared.

    %r0 is the thread in the block, %r1 the thread in the grid, %r2 the block, %r3 the block's size.
    """
    listed = ", ".join(".param ." + p.strip() for p in parameters.split(",") if p.strip())
    return (
        _HEADER.format(version=version, target=target)
        + before
        + f"\n.visible .entry {name}({listed})\n{{\n{_REGISTERS}\n"
        + "mov.u32 %r0, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r1, %r2, %r3, %r0;\n"
        + body
        + "\nret;\n}\n"
    )


def run(body, parameters, args, grid=1, block=32, before="", target="sm_80", **options):
    """Launches kernel(body); returns its counters."""
    return Module(kernel(body, parameters, before=before, target=target)).launch(
        "k", (grid,), (block,), args, **options
    )


def aligned(array, to=64):
    """A copy whose data starts at a multiple of `to`: sectors count from 32-byte boundaries."""
    raw = np.zeros(array.nbytes + to, np.uint8)
    start = -raw.ctypes.data % to
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def elementwise(code, result_type, *inputs, target="sm_80", **options):
    """One thread per element. `code` names its operands {d} (result) and {a}, {b}, {c}, ... (inputs)."""
    inputs = [np.ascontiguousarray(x).reshape(-1) for x in inputs]
    n = max(x.size for x in inputs)
    inputs = [np.ascontiguousarray(np.broadcast_to(x, n)) for x in inputs]
    out = np.zeros(n, result_type)
    names, body, parameters = {}, "ld.param.u32 %r9, [n]; setp.ge.u32 %p9, %r1, %r9; @%p9 bra DONE;\n", "u64 out"
    for k, x in enumerate(inputs):
        size = x.dtype.itemsize
        register = f"{_STEM[size]}{20 + k}"
        names["abcdefg"[k] if k < 3 else f"x{k}"] = register
        parameters += f", u64 x{k}"
        body += f"ld.param.u64 %d1, [x{k}]; mad.wide.u32 %d1, %r1, {size}, %d1;"
        body += f" ld.global.{'s' if x.dtype.kind == 'i' else 'u'}{8 * size} {register}, [%d1];\n"
    size = out.dtype.itemsize
    names["d"] = f"{_STEM[size]}40"
    body += code.format(**names) + "\n"
    body += f"ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r1, {size}, %d1; st.global.u{8 * size} [%d1], {names['d']};\n"
    body += "DONE:\n"
    run(body, parameters + ", u32 n", [out, *inputs, n], grid=-(-n // 128), block=128, target=target, **options)
    return out
