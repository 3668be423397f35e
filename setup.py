"""Builds fusedrnn._C (C++, CPU) and, where torch is a CUDA build and an nvcc is found, fusedrnn/_cuda.so.

Environment: FUSEDRNN_BUILD=0 compiles nothing; FUSEDRNN_CUDA=0 leaves CUDA out; TORCH_CUDA_ARCH_LIST names the
architectures; MAX_JOBS limits how many files are compiled at once.

What is compiled fits one torch and has CUDA kernels or not: its version says so (0.1.0+cu130.torch2.14.1,
0.1.0+cpu.torch2.13.0) and it depends on that torch alone. An sdist, and a wheel with nothing compiled, are 0.1.0.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CAPABILITIES = ("portable", "avx2", "avx512", "amx") if platform.machine() in ("x86_64", "AMD64") else ("portable",)
if sys.platform != "linux":  # whose permission the tile registers need
    CAPABILITIES = tuple(c for c in CAPABILITIES if c != "amx")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 takes the undefined pass-through operands of its own intrinsics for a fault.
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-Wno-uninitialized"]
CAPABILITY_FLAGS = {"recurrence_avx2.cpp": AVX2, "recurrence_avx512.cpp": AVX512, "recurrence_amx.cpp": AVX512}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # fmt: skip
GPUS = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
CUDA_ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0"
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "fusedrnn" / "__init__.py").read_text(), re.MULTILINE).group(1)
TORCH = "torch>=2.13,<2.15"

try:
    import torch
    from torch.utils.cpp_extension import include_paths
except ImportError as error:
    torch = None
    missing = error


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wheel = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "bin" / "nvcc"
    candidates = [Path(home) / "bin" / "nvcc" if home else None, shutil.which("nvcc"), wheel]
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


def decide_cuda(sources: list[Path]) -> tuple[str | None, str]:
    """(nvcc or None, the sentence that says why). A machine that builds need not have a GPU."""
    if os.environ.get("FUSEDRNN_CUDA") == "0":
        return None, "CUDA kernels are left out: FUSEDRNN_CUDA=0."
    if os.environ.get("FUSEDRNN_CUDA") == "auto" and not GPUS:
        return None, "CUDA kernels are left out: there is no NVIDIA GPU in /dev (FUSEDRNN_CUDA=1 builds them)."
    if torch.version.cuda is None:
        return None, f"CUDA kernels are left out: torch {torch.__version__} is built without CUDA."
    nvcc = find_nvcc()
    if nvcc is None:
        return None, (
            f"CUDA kernels are left out: torch is built for CUDA {torch.version.cuda}, but no nvcc was found in "
            "CUDA_HOME, on the PATH or in nvidia/cu13/bin of this environment (the extra 'cuda-build' installs one)."
        )
    if not sources:
        return None, "CUDA kernels are left out: there are none in csrc/cuda yet."
    # What is written down travels in the wheel: it names no folder of the machine that builds.
    release = re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return nvcc, (
        f"CUDA kernels are built for {CUDA_ARCHITECTURES}: torch is built for CUDA {torch.version.cuda} and nvcc "
        f"{release.group(1) if release else 'of an unknown version'} was found."
    )


def prefix_maps() -> list[str]:
    """Options that keep the folders of this machine out of what asserts and debug information say."""
    return [f"-ffile-prefix-map={Path(torch.__file__).parents[1]}/=", f"-ffile-prefix-map={ROOT}/="]


def gencode_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list in the form of TORCH_CUDA_ARCH_LIST, such as "8.0+PTX;9.0"."""
    flags = []
    for name in architectures.replace(" ", ";").split(";"):
        if not name:
            continue
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[compute_{number},sm_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


class BuildPy(build_py):
    """Writes down next to the package what setup.py decided."""

    def run(self):
        super().run()
        folder = ROOT / "fusedrnn" if self.editable_mode else Path(self.build_lib) / "fusedrnn"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_facts.json").write_text(json.dumps(FACTS, indent=1) + "\n")


class BuildExt(build_ext):
    """Compiles every file with the flags of its instruction set, several at once, with or without ninja."""

    def finalize_options(self):
        super().finalize_options()
        if torch is not None:
            # Kept between builds, also editable ones, and apart for every torch and Python.
            tag = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / tag)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"fusedrnn: {FACTS['cuda_why']}{f' ({NVCC})' if NVCC else ''}", flush=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            cuda = pool.submit(self.build_cuda) if NVCC else None
            objects = list(pool.map(lambda source: self.compile_one(ext, source), ext.sources))
            if cuda:
                shutil.copyfile(cuda.result(), target.parent / CUDA_LIBRARY)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            # No libgomp of our own: torch brings the one and only, and GOMP_* resolve to it.
            extra_postargs=["-Wl,--strip-debug"],
            target_lang="c++",
        )

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "fusedrnn" / CUDA_LIBRARY
        if NVCC and built.exists():
            shutil.copyfile(built, ROOT / "fusedrnn" / CUDA_LIBRARY)

    def is_fresh(self, result, sources):
        return not self.force and result.exists() and result.stat().st_mtime > max(p.stat().st_mtime for p in sources)

    def compile_one(self, ext, source):
        compiled = Path(self.build_temp) / Path(source).with_suffix(".o")
        headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h")]
        if not self.is_fresh(compiled, [ROOT / source, Path(__file__), *headers]):
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=FLAGS + prefix_maps() + CAPABILITY_FLAGS.get(Path(source).name, []),
                depends=[source],
            )
        return str(compiled)

    def build_cuda(self):
        library = Path(self.build_temp) / CUDA_LIBRARY
        if self.is_fresh(library, [Path(__file__), *(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc").glob("*.h")]):
            return library
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # Absolute names, line numbers, and a device link (nothing needs it) would write this machine's folders into a
        # wheel's library.
        lines = ["-lineinfo"] if self.inplace or self.editable_mode else []
        command = [NVCC, "--threads", jobs, "-shared", "-nodlink", "-O3", "-std=c++17", *lines,
                   "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-I", "csrc",
                   # The nvcc of PyPI looks for its runtime in lib64, the wheels have it in lib.
                   "-L", str(Path(NVCC).resolve().parents[1] / "lib"),
                   *gencode_flags(CUDA_ARCHITECTURES), "-o", str(library),
                   *(str(source.relative_to(ROOT)) for source in CUDA_SOURCES)]  # fmt: skip
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, cwd=ROOT)
        return library


CUDA_LIBRARY = "_cuda.so"
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC, FACTS = None, {}
version, requires = VERSION, TORCH
extensions = []
if os.environ.get("FUSEDRNN_BUILD") == "0":
    FACTS = {"extension": False, "why": "FUSEDRNN_BUILD=0 when it was installed", "cuda_why": "FUSEDRNN_BUILD=0"}
elif torch is None:
    if not {"egg_info", "sdist", "--version", "--name", "clean"} & set(sys.argv):
        sys.exit(
            f"fusedrnn is built against the torch that it will run with, and torch is not here ({missing}).\n"
            "Install torch and setuptools>=77 first, then run `pip install --no-build-isolation .` "
            "(FUSEDRNN_BUILD=0 installs without compiling)."
        )
else:
    NVCC, cuda_why = decide_cuda(CUDA_SOURCES)
    FACTS = {
        "extension": True,
        "torch": torch.__version__,
        "cuda": NVCC is not None,
        "cuda_why": cuda_why,
        "flags": " ".join(FLAGS),
    }
    if "sdist" not in sys.argv:
        release = torch.__version__.split("+")[0]
        label = f"cu{torch.version.cuda.replace('.', '')}" if NVCC else "cpu"
        version, requires = f"{VERSION}+{label}.torch{release}", f"torch=={release}"
    sources = ["csrc/bindings.cpp", "csrc/autograd.cpp", "csrc/cpu/sequence.cpp", "csrc/cpu/capability.cpp"]
    extensions = [
        Extension(
            "fusedrnn._C",
            sources=[*sources, *(f"csrc/cpu/recurrence_{c}.cpp" for c in CAPABILITIES)],
            include_dirs=["csrc", *include_paths()],
            define_macros=[
                ("FUSEDRNN_TORCH_VERSION", f'"{torch.__version__}"'),
                *((f"FUSEDRNN_HAS_{c.upper()}", "1") for c in CAPABILITIES),
            ],
            library_dirs=[str(Path(torch.__file__).parent / "lib")],
            libraries=["c10", "torch_cpu", "torch_python"],
        )
    ]

setup(
    version=version,
    install_requires=[requires],
    packages=["fusedrnn", "fusedrnn.backends", "fusedrnn.benchmarks", "fusedrnn.benchmarks.data", "fusedrnn.kernels"],
    package_dir={"fusedrnn": "fusedrnn", "fusedrnn.benchmarks": "benchmarks", "fusedrnn.kernels": "kernels"},
    package_data={"fusedrnn": ["py.typed"], "fusedrnn.benchmarks.data": ["*.csv"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
