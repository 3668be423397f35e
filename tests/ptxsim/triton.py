"""Launches Triton kernels on CPU tensors: compiled ahead of time for sm_80, run by the simulator.

    ptxsim.triton.launch(kernel, grid, {"x": tensor, "n": 100}, {"BLOCK": 32}, num_warps=4, num_stages=2)

Arguments are specialised as a launch on a GPU does it: an int that is 1 becomes a constant, pointers and ints that are
multiples of 16 are marked so, None is a constant.
"""

import os

import torch

from . import Module, SimulationError

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_compiled = {}


def _int_type(value):
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if value < 2**63 else "u64"


def _specialise(parameters, arguments, constexprs):
    """(signature, constants, attributes, names that remain arguments), as triton.compiler.ASTSource takes them."""
    signature, constants, attributes, remaining = {}, {}, {}, []
    for i, parameter in enumerate(parameters):
        name = parameter.name
        if name in constexprs or parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[(i,)] = constexprs.get(name, parameter.default)
            continue
        if name not in arguments:
            raise TypeError(f"no value for parameter {name!r}")
        value = arguments[name]
        specialise = not parameter.do_not_specialize
        if value is None or (specialise and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = _int_type(value)
            aligned = value % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"parameter {name!r}: {type(value).__name__} cannot be passed to a kernel")
        if aligned and specialise and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
        remaining.append(name)
    return signature, constants, attributes, remaining


def _until_ptx(backend=None, stages=None, *rest):
    """Triton's hook on its stages: no ptxas, nobody reads its code here. Without arguments: keys of caches."""
    if stages is None:
        return "until ptx", "until ptx"
    stages["cubin"] = lambda ptx, metadata: b""


def compile(kernel, arguments, constexprs, arch=80, num_warps=4, num_stages=3, enable_fp_fusion=True):
    """(CompiledKernel, Module, names of its parameters), cached."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, remaining = _specialise(kernel.params, arguments, constexprs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    key = (kernel.cache_key, str(signature), str(constants), str(attributes), str(options), arch)
    if key not in _compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        with triton.knobs.runtime.scope(), triton.knobs.cache.scope():
            triton.knobs.runtime.add_stages_inspection_hook = _until_ptx
            # Triton 3.6 would give what was compiled here to whoever wants the whole kernel.
            triton.knobs.cache.dir = os.path.join(triton.knobs.cache.dir, "ptxsim")
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        _compiled[key] = compiled, Module(compiled.asm["ptx"]), remaining
    return _compiled[key]


def launch(
    kernel,
    grid,
    arguments,
    constexprs=None,
    num_warps=4,
    num_stages=3,
    enable_fp_fusion=True,
    arch=80,
    **launch_options,
):
    """Runs a @triton.jit function; returns the counters of the launch, with "by_arg" keyed by parameter name.

    grid: a tuple, or a function of the constexprs. arguments and constexprs: by name.
    launch_options: see Module.launch.
    """
    constexprs = constexprs or {}
    compiled, module, names = compile(kernel, arguments, constexprs, arch, num_warps, num_stages, enable_fp_fusion)
    metadata = compiled.metadata
    if getattr(metadata, "num_ctas", 1) != 1:
        raise SimulationError("clusters (num_ctas > 1) are not simulated")
    if callable(grid):
        grid = grid(constexprs)
    scratch = None
    if getattr(metadata, "global_scratch_size", 0):
        blocks = 1
        for n in grid:
            blocks *= n
        scratch = torch.empty(blocks * metadata.global_scratch_size, dtype=torch.uint8)
    values = [arguments[name] for name in names] + [scratch, None]
    result = module.launch(metadata.name, grid, (32 * num_warps,), values, shared=metadata.shared, **launch_options)
    result["by_arg"] = {names[i]: traffic for i, traffic in result["by_arg"].items() if i < len(names)}
    return result
