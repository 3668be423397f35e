"""Compiles the simulator (g++ >= 12), and whole CUDA sources into libraries whose launches run in it (nvcc)."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent / "src"
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-fvisibility=hidden",
    "-fwrapv",
    "-ffp-contract=off",
]


class BuildError(RuntimeError):
    """A compiler is missing or failed; the text holds what it said."""


def cache_dir():
    """Where compiled things go: $PTXSIM_CACHE, else build/ptxsim of the checkout, else the user's cache directory."""
    if "PTXSIM_CACHE" in os.environ:
        return Path(os.environ["PTXSIM_CACHE"])
    checkout = SOURCE_DIR.parents[2]
    if (checkout / "pyproject.toml").exists() or (checkout / ".git").exists():
        return checkout / "build" / "ptxsim"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptxsim"


def _run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\nfailed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _publish(temporary, path):
    """Atomic: two processes may build the same file at once."""
    os.replace(temporary, path)
    return path


@contextlib.contextmanager
def _alone(folder):
    """Another process that builds in this folder just now is waited for: its files are then there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _cxx():
    for name in (os.environ.get("CXX"), "g++", "g++-13", "g++-12"):
        if name and shutil.which(name):
            return shutil.which(name)
    raise BuildError("ptxsim needs g++ 12 or newer (set CXX, or install it)")


@functools.cache
def cuda_home():
    """The folder with bin/nvcc: $CUDA_HOME, then nvcc on the PATH, then pip's nvidia/cu13. None if there is none."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if found := shutil.which("nvcc"):
        candidates += [Path(found).resolve().parents[1], Path(found).parents[1]]
    for folder in site.getsitepackages() + [site.getusersitepackages()] + sys.path:
        candidates += sorted(Path(folder or ".").glob("nvidia/cu1[0-9]"), reverse=True)
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            return Path(candidate)
    return None


def nvcc():
    home = cuda_home()
    if home is None:
        raise BuildError("no nvcc: set CUDA_HOME, put nvcc on the PATH, or pip install nvidia-cuda-nvcc (13.0)")
    return str(home / "bin" / "nvcc")


def tool(name):
    """Path of ptxas, cuobjdump, nvdisasm: beside nvcc, on the PATH, or in triton's wheel. None if absent."""
    home = cuda_home()
    if home and (home / "bin" / name).exists():
        return str(home / "bin" / name)
    if found := shutil.which(name):
        return found
    for folder in site.getsitepackages() + sys.path:
        for path in Path(folder or ".").glob(f"triton/backends/nvidia/bin/{name}"):
            return str(path)
    return None


def _digest(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else repr(part).encode())
    return h.hexdigest()[:16]


@functools.cache
def _cpu():
    """-march=native code must not outlive a move to another processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.search(r"flags.*", text).group() + re.search(r"model name.*", text).group()
    except (OSError, AttributeError):
        return ""


@functools.cache
def _objects():
    """(simulator objects, cudart object), compiled once per content of src/."""
    sources = sorted(p for p in SOURCE_DIR.iterdir() if p.suffix in (".cpp", ".h", ".inc"))
    tag = _digest(*[p.name.encode() + p.read_bytes() for p in sources], CXX_FLAGS, _cpu())
    out = cache_dir() / f"objects-{tag}"
    compiled = {p.stem: out / f"{p.stem}.o" for p in sources if p.suffix == ".cpp"}

    def compile_one(source):
        path = compiled[source.stem]
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.o")
            _run([_cxx(), *CXX_FLAGS, "-c", source, "-o", temporary])
            _publish(temporary, path)

    largest_first = sorted((p for p in sources if p.suffix == ".cpp"), key=lambda p: -p.stat().st_size)
    with _alone(out), ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(compile_one, largest_first))
    cudart = compiled.pop("cudart")
    return tuple(compiled.values()), cudart


@functools.cache
def build_simulator():
    """Path of libptxsim.so."""
    objects, _ = _objects()
    path = objects[0].parent / "libptxsim.so"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.so")
        _run([_cxx(), "-shared", "-Wl,-Bsymbolic", "-o", temporary, *objects])
        _publish(temporary, path)
    return path


def _includes(include_dirs):
    flags = []
    for folder in include_dirs:
        flags += ["-I", str(folder)]
    return flags


def _dependencies(sources, include_dirs):
    """Content of the sources and of the files that they include, at any depth; headers of the system are left out."""
    parts, to_read, seen = [], [Path(s).resolve() for s in sources], set()
    while to_read:
        path = to_read.pop()
        if path in seen:
            continue
        seen.add(path)
        parts += [path.name, path.read_bytes()]
        for name in re.findall(rb'^\s*#\s*include\s*["<]([^">]+)', parts[-1], re.M):
            places = [folder / name.decode() for folder in (path.parent, *map(Path, include_dirs))]
            to_read += [place.resolve() for place in places if place.is_file()][:1]
    return parts


def registers_reported(report):
    """{kernel: registers a thread} of what `ptxas -v` prints."""
    out, name = {}, None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            name = found.group(1)
        elif name and (found := re.search(r"Used (\d+) registers", line)):
            out[name] = int(found.group(1))
            name = None
    return out


@functools.lru_cache(maxsize=64)
def registers_of(ptx, sm):
    """Runs ptxas for sm (80, 90, ...): {kernel: registers a thread}. Empty if there is no ptxas."""
    ptxas = tool("ptxas")
    target = re.search(r"\.target sm_(\d+)(\w?)", ptx)
    if ptxas is None or target is None:
        return {}
    name = f"sm_{max(int(sm), int(target.group(1)))}" + ("a" if target.group(2) else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        return registers_reported(
            _run([ptxas, "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "kernel.cubin"])
        )


def compile_ptx(source, include_dirs=(), arch="80", flags=()):
    """PTX text of one .cu, by nvcc. source: a path, or the CUDA text itself."""
    text = source if isinstance(source, str) and "\n" in source else None
    folder = cache_dir() / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [text] if text is not None else _dependencies([source], include_dirs)
    tag = _digest(*parts, Path(source).name if text is None else "", arch, tuple(flags), nvcc())
    path = folder / f"{tag}.ptx"
    if not path.exists():
        if text is not None:
            source = folder / f"{tag}.cu"
            source.write_text(text)
        temporary = path.with_suffix(f".{os.getpid()}.ptx")
        _run(
            [
                nvcc(),
                "-std=c++17",
                "-O3",
                f"-arch=compute_{arch}",
                "-ptx",
                *_includes(include_dirs),
                *flags,
                source,
                "-o",
                temporary,
            ]
        )
        _publish(temporary, path)
    return path.read_text()


def compile_simulated(cu_sources, include_dirs=(), flags=(), arch="80", code="90"):
    """[(object, what ptxas said)] of .cu files with host code, compiled in the cache.

    An object holds the PTX for `arch`, which the simulator runs, and what ptxas makes of it for sm_`code`, the chip
    that is simulated unless another is asked for: its registers count.
    """
    cu_sources = [Path(s).resolve() for s in cu_sources]
    flags = tuple(map(str, flags))
    target = f"arch=compute_{arch},code=[compute_{arch},sm_{code}]"
    options = ["-std=c++17", "-O3", "-gencode", target, "--no-compress", "-cudart", "none", "-Xptxas", "-v"]
    options += ["-Xcompiler", "-fPIC"]

    def compile_one(source):
        # A changed source compiles alone.
        tag = _digest(*_dependencies([source], include_dirs), flags, options, nvcc())
        folder = cache_dir() / f"kernels-{tag}"
        obj, report = (folder / f"{source.stem}.{end}" for end in ("o", "txt"))
        with _alone(folder):
            if not obj.exists() or not report.exists():
                temporary = obj.with_suffix(f".{os.getpid()}.o")
                text = _run([nvcc(), *options, *_includes(include_dirs), *flags, "-c", source, "-o", temporary])
                report.write_text(text)
                _publish(temporary, obj)
        return obj, report.read_text()

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(compile_one, cu_sources))


def build_simulated_library(cu_sources, include_dirs=(), flags=(), arch="80"):
    """Compiles .cu files with host code and links them with the simulator and its own libcudart: path of the .so.

    Open it with ptxsim.Library(path). The stand-in's objects come first: registration of kernels runs in the order of
    linking and needs its statics. -Bsymbolic keeps calls inside, whatever libcudart the process holds already.
    """
    objects, cudart = _objects()
    compiled = compile_simulated(cu_sources, include_dirs, flags, arch)
    # A change of the simulator only links again.
    out = cache_dir() / f"library-{_digest(*[obj.parent.name for obj, _ in compiled], objects[0].parent.name)}"
    path = out / "libsimulated.so"
    with _alone(out):
        if not path.exists():
            (out / "ptxas.txt").write_text("".join(report for _, report in compiled))
            temporary = path.with_suffix(f".{os.getpid()}.so")
            linked = [*objects, cudart, *[obj for obj, _ in compiled]]
            _run([_cxx(), "-shared", "-Wl,-Bsymbolic", "-o", temporary, *linked])
            _publish(temporary, path)
    return path
