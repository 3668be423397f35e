"""Compiles the device code of this folder and its launcher; setup.py and the tests call it.

compile_device_code(folder, "8.0+PTX;9.0", jobs) writes, of each .cu here, <name>.sm_80.cubin, <name>.compute_80.ptx and
<name>.sm_90.cubin, by nvcc or by NVRTC alone: the sources include no header but their own. A driver takes cubins of its
own CUDA version or an older one, so a wheel for drivers of CUDA 12 is made by a compiler of CUDA 12.

compile_launcher(path) makes the library that loads and launches them: plain C++, no CUDA needed.
"""

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ARCHITECTURES = "8.0+PTX;9.0"  # of a build for this machine, and those of its cards
WHEEL_ARCHITECTURES = "8.0+PTX;9.0;10.0;12.0"  # 8.6 and 8.9 run the code of 8.0
# The names that TORCH_CUDA_ARCH_LIST may hold, as torch's cpp_extension takes them.
NAMES = {
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    **dict.fromkeys(("Kepler+Tesla", "Kepler", "Maxwell+Tegra", "Maxwell", "Pascal", "Volta+Tegra", "Volta"), "7.0"),
    "Turing": "7.5",
}
LAUNCHER = "libfusedrnn_cuda.so"
RECORD = "digests.json"  # of what the files were made of; written when all are there


class Compiler(NamedTuple):
    kind: str  # "nvcc" or "NVRTC"
    path: str
    version: str  # "13.0"; "" where it does not say


@functools.cache
def _version(kind: str, path: str) -> str:
    if kind == "nvcc":
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release ([\d.]+),", said)
        return found.group(1) if found else ""
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _nvrtc_libraries() -> list[str]:
    """Of PyPI's wheels on sys.path, the newest CUDA first: nvidia-cuda-nvrtc, nvidia-cuda-nvrtc-cu12."""
    found = []
    for folder in map(Path, dict.fromkeys(sys.path)):
        for place in ("nvidia/cu[0-9]*/lib", "nvidia/cuda_nvrtc/lib"):
            found += folder.glob(f"{place}/libnvrtc.so.*")
    return [str(p) for p in sorted(found, key=lambda p: -int(p.suffix[1:]))]


def find_compiler(cuda: str = "", prefer: str = "nvcc") -> Compiler | None:
    """$FUSEDRNN_NVRTC (the path of a libnvrtc.so, or 12 for that version's of PyPI); nvcc of CUDA_HOME, of the PATH, of
    PyPI; NVRTC of PyPI (first if it is preferred); or None. Those of a later major version than `cuda` ("12.6") are
    passed over: the driver may be of that version, and takes no later code.
    """
    if forced := os.environ.get("FUSEDRNN_NVRTC"):
        path = next((p for p in _nvrtc_libraries() if p.endswith(f".so.{forced}")), forced)
        return Compiler("NVRTC", path, _version("NVRTC", path))
    for kind, path in _compilers(prefer):
        version = _version(kind, path)
        if not cuda or not version or int(version.split(".")[0]) <= int(cuda.split(".")[0]):
            return Compiler(kind, path, version)
    return None


def has_compiler() -> bool:
    """Whether there is one of any version; starts nothing."""
    return bool(os.environ.get("FUSEDRNN_NVRTC") or _compilers("NVRTC"))


def _compilers(prefer: str) -> list[tuple[str, str]]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [str(Path(home) / "bin" / "nvcc")] if home else []
    places += [p for p in [shutil.which("nvcc")] if p]
    places += [str(Path(folder) / "nvidia" / "cu13" / "bin" / "nvcc") for folder in dict.fromkeys(sys.path)]
    kinds = [("nvcc", places), ("NVRTC", _nvrtc_libraries())]
    kinds = kinds if prefer == "nvcc" else kinds[::-1]
    return [(kind, path) for kind, candidates in kinds for path in filter(os.path.exists, candidates)]


def architectures(setting: str) -> tuple[list[str], list[str]]:
    """(["8.0+PTX", "9.0"], [what was dropped]) of a setting in the form of TORCH_CUDA_ARCH_LIST.

    The kernels need compute capability 8.0: what lies below is dropped. Code for one chip only ("9.0a") is that of its
    family: the kernels use nothing more. Raises ValueError on a word that names no architecture.
    """
    kept, dropped = [], []
    for word in re.split(r"[;,\s]+", setting.strip(" ;,")):
        for name in NAMES.get(word, word).split(";"):
            found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
            if name and found is None:
                raise ValueError(f"TORCH_CUDA_ARCH_LIST: {word!r} is no architecture (8.0, 9.0+PTX, Hopper, ...)")
            if found and int(found[1]) < 8:
                dropped.append(word)
            elif found:
                kept.append(f"{found[1]}.{found[2]}{found[3] or ''}")
    return list(dict.fromkeys(kept)), list(dict.fromkeys(dropped))


def default_architectures(compiler_version: str, cards: Sequence[tuple[int, int]]) -> str:
    """Where no list is given, for the compute capabilities of the cards here.

    8.0 and 9.0 always; of 10.x and 12.x the first where such a card is here, which else would have its driver compile
    at the first call all kernels of a file, for a minute or two.
    """
    if tuple(map(int, re.findall(r"\d+", compiler_version)[:2])) < (12, 8):  # knows no 10.0
        return ARCHITECTURES
    newer = sorted({major for major, _ in cards} & {10, 12})
    return ";".join([ARCHITECTURES, *(f"{major}.0" for major in newer)])


def images(setting: str) -> list[str]:
    """ "8.0+PTX;9.0", the form of TORCH_CUDA_ARCH_LIST, as ["sm_80.cubin", "compute_80.ptx", "sm_90.cubin"]."""
    found = []
    for name in architectures(setting)[0]:
        number = name.removesuffix("+PTX").replace(".", "")
        found += [f"sm_{number}.cubin"] + ([f"compute_{number}.ptx"] if name.endswith("+PTX") else [])
    return list(dict.fromkeys(found))


def compile_device_code(
    out_folder: Path, architectures: str, jobs: int, compiler: Compiler | None = None
) -> list[Path]:
    """The files for a list of architectures, those for others removed. Raises RuntimeError where there is no compiler,
    and with what it says.

    What is there already and of the same sources and compiler is kept.
    """
    return compile_images(out_folder, images(architectures), jobs, compiler)


def compile_images(
    out_folder: Path,
    wanted: Sequence[str],
    jobs: int,
    compiler: Compiler | None = None,
    sources: Sequence[Path] = (),
) -> list[Path]:
    """The same for images, such as "sm_80.cubin", and for some sources only."""
    compiler = compiler or find_compiler()
    if compiler is None:
        raise RuntimeError("device code cannot be compiled: neither nvcc nor NVRTC was found")
    sources = sorted(sources or FOLDER.glob("*.cu"))
    out_folder.mkdir(parents=True, exist_ok=True)
    record = out_folder / RECORD
    known = json.loads(record.read_text()) if record.exists() else {}
    headers = sorted([*FOLDER.glob("*.cuh"), *FOLDER.glob("*.h"), *FOLDER.parent.glob("*.h")])
    digests = {}
    for source in sources:
        digest = hashlib.sha256(repr(compiler).encode())
        for path in (source, *headers, Path(__file__)):
            digest.update(path.name.encode() + path.read_bytes())
        digests[source.stem] = digest.hexdigest()
    # PTX first: nvcc assembles it for its own architecture without another pass over the source.
    by_target = {}
    for image in sorted(wanted):
        by_target.setdefault(re.sub(r"\D", "", image), []).append(image)
    groups = [(s, n, [out_folder / f"{s.stem}.{i}" for i in names]) for n, names in by_target.items() for s in sources]
    files = [path for _, _, paths in groups for path in paths]
    for path in [*out_folder.glob("*.cubin"), *out_folder.glob("*.ptx")]:
        if path not in files:
            path.unlink()
    stale = [g for g in groups if not all(p.exists() and known.get(p.name) == digests[g[0].stem] for p in g[2])]
    stale.sort(key=lambda group: -group[0].stat().st_size)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda group: _compile(compiler, *group), stale))
    record.write_text(json.dumps({path.name: digests[path.name.split(".")[0]] for path in files}))
    return files


def compile_source(compiler: Compiler, source: Path, image: str, target: Path, include: Sequence[Path]) -> None:
    """One source into one image; where NVRTC does not know a card's generation raises RuntimeError."""
    number = re.sub(r"\D", "", image)
    if compiler.kind == "NVRTC":
        nvrtc(compiler.path, source, number, [target], include)
        return
    kind = ["-ptx", f"-arch=compute_{number}"] if image.endswith(".ptx") else ["-cubin", f"-arch=sm_{number}"]
    folders = [f"-I{folder}" for folder in include]
    _run([compiler.path, "-std=c++17", "-O3", *folders, *kind, str(source), "-o", str(target)])


def _run(command: Sequence[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed with {ran.returncode}:\n{ran.stdout}{ran.stderr}")


def _compile(compiler: Compiler, source: Path, number: str, files: Sequence[Path]) -> None:
    if compiler.kind == "NVRTC":  # in a process of its own: within one, some versions take turns
        _run([sys.executable, __file__, compiler.path, str(source), number, *map(str, files)])
        return
    options = [compiler.path, "-std=c++17", "-O3"]
    made = source
    for path in files:
        kind = ["-ptx", f"-arch=compute_{number}"] if path.suffix == ".ptx" else ["-cubin", f"-arch=sm_{number}"]
        _run([*options, *kind, str(made), "-o", str(path)])
        made = path if path.suffix == ".ptx" else made


def nvrtc(library: str, source: Path, number: str, files: Sequence[Path] = (), include: Sequence[Path] = ()) -> str:
    """Compiles one source, writes the files; returns the log. Raises RuntimeError with it."""
    for path in Path(library).parent.glob("libnvrtc-builtins.so.*"):  # it does not always look there itself
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    rtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(rtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if getattr(rtc, f"nvrtcGet{kind}")(program, buffer):
            raise RuntimeError(f"NVRTC made no {kind} of {source.name}")
        return buffer.raw

    # Without machine code only the front end runs, for PTX.
    target = "sm" if any(path.suffix == ".cubin" for path in files) else "compute"
    options = ["--std=c++17", "-default-device", f"--gpu-architecture={target}_{number}"]
    options += [f"-I{folder}" for folder in (source.parent, *include)]
    created = rtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    if created:
        raise RuntimeError(f"NVRTC cannot begin: error {created}")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = rtc.nvrtcCompileProgram(program, len(options), arguments)
        log = text("ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(f"NVRTC cannot compile {source.name} for {target}_{number}:\n{log}")
        for path in files:
            code = text("PTX").rstrip(b"\0") if path.suffix == ".ptx" else text("CUBIN")
            path.write_bytes(code)
    finally:
        rtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log


def compile_launcher(path: Path, compiler: str = "", flags: Sequence[str] = ()) -> Path:
    """The library of the launchers, by a C++ compiler alone."""
    compilers = (compiler, os.environ.get("CXX"), "c++", "g++", "clang++")
    command = [
        next((c for c in compilers if c and shutil.which(c)), "c++"),
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        *flags,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    _run([*command, str(FOLDER / "launcher.cpp"), "-o", str(path), "-ldl"])
    return path


if __name__ == "__main__":
    nvrtc(sys.argv[1], Path(sys.argv[2]), sys.argv[3], [Path(p) for p in sys.argv[4:]])
