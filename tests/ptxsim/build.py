"""Compiles the simulator (g++ >= 12), and CUDA sources to the PTX that runs in it (nvcc)."""

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
        yield folder


def folder_of(name, *parts):
    """A context manager: the folder of the cache for things made of these parts (bytes, or what has a repr), which no
    other process uses meanwhile."""
    return _alone(cache_dir() / f"{name}-{_digest(*parts)}")


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
    """The simulator's objects, compiled once per content of src/."""
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
    return tuple(compiled.values())


@functools.cache
def build_simulator():
    """Path of libptxsim.so: the interface of this package, and that of the CUDA driver for launchers."""
    objects = _objects()
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


def dependencies(sources, include_dirs=()):
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
def assemble(ptx, sm):
    """Runs ptxas for sm (80, 90, ...): (what it says, path of the machine code in the cache); None without ptxas."""
    ptxas = tool("ptxas")
    target = re.search(r"\.target sm_(\d+)(\w?)", ptx)
    if ptxas is None or target is None:
        return None
    name = f"sm_{max(int(sm), int(target.group(1)))}" + ("a" if target.group(2) else "")
    with folder_of("assembled", ptx.encode(), name, ptxas) as folder:
        report, code = folder / "ptxas.txt", folder / "kernel.cubin"
        if not report.exists():
            source = folder / "kernel.ptx"
            source.write_text(ptx)
            report.write_text(_run([ptxas, "-v", f"--gpu-name={name}", source, "-o", code]))
            source.unlink()
        return report.read_text(), code


def registers_of(ptx, sm):
    """{kernel: registers a thread} of machine code for sm. Empty if there is no ptxas."""
    assembled = assemble(ptx, sm)
    return registers_reported(assembled[0]) if assembled else {}


def compile_ptx(source, include_dirs=(), arch="80", flags=()):
    """PTX text of one .cu, by nvcc. source: a path, or the CUDA text itself."""
    text = source if isinstance(source, str) and "\n" in source else None
    folder = cache_dir() / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [text] if text is not None else dependencies([source], include_dirs)
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
