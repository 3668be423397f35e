"""ptxsim: runs PTX on the CPU. See README.md beside this file."""

import contextlib
import ctypes
from pathlib import Path

from .build import (
    BuildError,
    build_simulator,
    compile_ptx,
    registers_of,
)

__all__ = [
    "BuildError",
    "Library",
    "Module",
    "SimulationError",
    "chips",
    "compile_ptx",
    "counters",
    "default_library",
    "latencies",
    "options",
    "reset_counters",
    "set_options",
]

DEFAULTS = {
    "seed": 0,
    "torn": 0,
    "check": 1,
    "races": 1,
    "shared_races": 1,
    "defer": 1,
    "limit": 0,
    "resident": 264,
    "clock": 0,
    "load_ns": 200,
    "store_ns": 250,
    "chip": "h100-sxm",
}
_current = dict(DEFAULTS)
_libraries = []


class SimulationError(RuntimeError):
    """A check failed while a kernel ran: the text names kernel, block, warp and PTX line."""


class Library:
    """A shared library that carries the simulator; .dll has its functions, those of the CUDA driver among them."""

    def __init__(self, path):
        self.path = Path(path)
        self.dll = dll = ctypes.CDLL(str(path))
        u64, ptr, text, i32, u32 = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint32
        for name, result, arguments in (
            ("ps_error", text, []),
            ("ps_load", ptr, [text]),
            ("ps_unload", None, [ptr]),
            ("ps_kernel", i32, [ptr, text]),
            ("ps_nparams", i32, [ptr, i32]),
            ("ps_param_size", i32, [ptr, i32, i32]),
            ("ps_register", None, [u64, u64]),
            ("ps_unregister", None, [u64]),
            ("ps_option", i32, [text, u64]),
            ("ps_chip", i32, [text]),
            ("ps_registers", None, [text, i32]),
            ("ps_count_names", text, []),
            ("ps_counts", None, [ptr]),
            ("ps_count_reset", None, []),
            ("ps_count_alloc", None, [u64, ptr]),
            ("ps_clock_report", text, []),
            ("ps_launch", i32, [ptr, i32] + [u32] * 7 + [ctypes.POINTER(ptr), i32]),
        ):
            function = getattr(dll, name)
            function.restype, function.argtypes = result, arguments
        self._names = dll.ps_count_names().decode().split()
        for key, value in _current.items():
            self._option(key, value)
        _libraries.append(self)

    def _option(self, key, value):
        if key == "chip":
            self.dll.ps_chip(value.encode())
        else:
            self.dll.ps_option(key.encode(), int(value))

    def set_registers(self, registers):
        """{kernel: registers a thread}: how many blocks fit on an SM depends on it."""
        for kernel, count in registers.items():
            self.dll.ps_registers(kernel.encode(), count)

    def error(self):
        """What the last failed launch said."""
        return self.dll.ps_error().decode()

    def counters(self):
        """What every launch since reset_counters() did."""
        buffer = (ctypes.c_uint64 * len(self._names))()
        self.dll.ps_counts(buffer)
        return dict(zip(self._names, buffer))

    def clock(self):
        """What the last launch with the option clock took, by the model of src/clock.cpp: "ns"; "rounds" of strong
        loads of a warp on average, and "most_rounds"; "mma_chain", the longest chain of dependent mma; and "waits":
        {(warp of its block, PTX line, for what): ns, of all blocks together}."""
        lines = self.dll.ps_clock_report().decode().splitlines()
        if not lines:
            raise RuntimeError("nothing was launched with the option clock")
        _, cycles, rounds, most, chain = lines[0].split()
        ghz = latencies()["clock"]["issue"]
        waits = {}
        for line in lines[1:]:
            _, warp, number, rest = line.split(" ", 3)
            reason, spent = rest.rsplit(":", 1)
            waits[int(warp), int(number), reason] = float(spent) / ghz
        return {"ns": float(cycles) / ghz, "rounds": float(rounds), "most_rounds": int(most), "mma_chain": int(chain),
                "waits": waits}  # fmt: skip

    def reset_counters(self):
        self.dll.ps_count_reset()

    def counters_of(self, tensor):
        """Global traffic of the whole allocation that this tensor or array lives in, since reset_counters()."""
        buffer = (ctypes.c_uint64 * 6)()
        self.dll.ps_count_alloc(_extent(tensor)[0], buffer)
        return dict(zip(("ld_bytes", "ld_sectors", "st_bytes", "st_sectors", "atomics", "poll_bytes"), buffer))

    @contextlib.contextmanager
    def registered(self, *tensors):
        """Memory that kernels may touch while the block runs: the whole storage of each tensor or array."""
        extents = sorted({_extent(t) for t in tensors if t is not None})
        for address, size in extents:
            self.dll.ps_register(address, size)
        try:
            yield
        finally:
            for address, _ in extents:
                self.dll.ps_unregister(address)


def _extent(x):
    """(address, bytes) of the storage below a torch tensor or numpy array."""
    if hasattr(x, "untyped_storage"):
        storage = x.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while getattr(x, "base", None) is not None and hasattr(x.base, "ctypes"):
        x = x.base
    return x.ctypes.data, x.nbytes


_default = None


def default_library():
    """The plain simulator, compiled at first use."""
    global _default
    if _default is None:
        _default = Library(build_simulator())
    return _default


def set_options(**values):
    """Sets options of every simulator in the process; returns what they were. See README.md for the list."""
    unknown = set(values) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"unknown option {sorted(unknown)}; there are {sorted(DEFAULTS)}")
    if "chip" in values and values["chip"] not in chips():
        raise ValueError(f"unknown chip {values['chip']!r}; there are {sorted(chips())}")
    before = {k: _current[k] for k in values}
    _current.update(values)
    for library in _libraries:
        for key, value in values.items():
            library._option(key, value)
    return before


@contextlib.contextmanager
def options(**values):
    """set_options for the length of a with block."""
    before = set_options(**values)
    try:
        yield
    finally:
        set_options(**before)


def chips():
    """{name: limits and where they are stated} of every chip that the option `chip` knows."""
    dll, out = default_library().dll, {}
    names = (
        "sm sms threads_per_sm blocks_per_sm registers_per_sm shared_per_sm shared_per_block reserved_shared_per_block"
    )
    name, source, values = ctypes.c_char_p(), ctypes.c_char_p(), (ctypes.c_int * 8)()
    while dll.ps_chip_info(len(out), ctypes.byref(name), values, ctypes.byref(source)):
        out[name.value.decode()] = {**dict(zip(names.split(), values)), "source": source.value.decode()}
    return out


def latencies():
    """{name: cycles until a result, cycles until the next, source} of what the option clock assumes; of what is shared
    "issue" holds bytes a cycle."""
    dll, out = default_library().dll, {}
    name, source, latency, issue = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_double(), ctypes.c_double()
    while dll.ps_clock_cost(
        len(out), ctypes.byref(name), ctypes.byref(latency), ctypes.byref(issue), ctypes.byref(source)
    ):
        out[name.value.decode()] = {
            "latency": latency.value, "issue": issue.value, "source": source.value.decode()
        }  # fmt: skip
    return out


def counters():
    return default_library().counters()


def reset_counters():
    default_library().reset_counters()


class Module:
    """PTX text, loaded."""

    def __init__(self, ptx, library=None):
        self.library = library or default_library()
        self.ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
        self._resources_of = None
        self._handle = self.library.dll.ps_load(self.ptx.encode())
        if not self._handle:
            raise SimulationError(self.library.error())

    def __del__(self):
        if getattr(self, "_handle", None):
            self.library.dll.ps_unload(self._handle)

    def launch(self, name, grid, block, args, shared=0, cooperative=False, **launch_options):
        """Runs kernel `name`. args: tensors and arrays (their whole storage may be touched), ints, floats, None (a null
        pointer), bytes (a struct passed by value). Returns the counters of this launch; "by_arg" holds, per parameter
        that is a tensor, the traffic of its storage."""
        with options(**launch_options):
            if cooperative:
                self._read_resources()
            return self._launch(name, grid, block, args, shared, cooperative)

    def _read_resources(self):
        """A cooperative launch must fit the chip at once, and registers count: ask ptxas."""
        sm = chips()[_current["chip"]]["sm"]
        if self._resources_of != sm:
            self.library.set_registers(registers_of(self.ptx, sm))
            self._resources_of = sm

    def _launch(self, name, grid, block, args, shared, cooperative):
        library, dll = self.library, self.library.dll
        kernel = dll.ps_kernel(self._handle, name.encode())
        if kernel < 0:
            raise KeyError(f"no kernel {name} in this module")
        count = dll.ps_nparams(self._handle, kernel)
        if count != len(args):
            raise TypeError(f"{name} takes {count} parameters, got {len(args)}")
        grid, block = ((tuple(x) + (1, 1))[:3] for x in (grid, block))
        values, tensors = [], {}
        for i, arg in enumerate(args):
            size = dll.ps_param_size(self._handle, kernel, i)
            if hasattr(arg, "data_ptr") or hasattr(arg, "ctypes"):
                tensors[i] = arg
                values.append(ctypes.c_uint64(arg.data_ptr() if hasattr(arg, "data_ptr") else arg.ctypes.data))
            elif isinstance(arg, (bytes, bytearray)):
                values.append(ctypes.create_string_buffer(bytes(arg), max(size, len(arg))))
            elif arg is None:
                values.append(ctypes.c_uint64(0))
            elif isinstance(arg, float):
                values.append(ctypes.c_float(arg) if size == 4 else ctypes.c_double(arg))
            else:
                values.append(
                    {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}[size](int(arg))
                )
        pointers = (ctypes.c_void_p * max(count, 1))(*[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values])
        with library.registered(*tensors.values()):
            before = library.counters()
            was = {i: library.counters_of(t) for i, t in tensors.items()}
            failed = dll.ps_launch(
                self._handle, kernel, *map(int, grid), *map(int, block), int(shared), pointers, int(cooperative)
            )
            after = library.counters()
            now = {i: library.counters_of(t) for i, t in tensors.items()}
        if failed:
            raise SimulationError(library.error())
        result = {k: v - before[k] for k, v in after.items()}
        result["by_arg"] = {i: {k: v - was[i][k] for k, v in now[i].items()} for i in tensors}
        return result
