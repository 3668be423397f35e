"""Builds libfusedrnn.so (the ops and their CPU kernels, on torch's stable ABI), fusedrnn._C (its way into Python, in
the limited C API), fusedrnn._direct (calls with gradients in C++, which fits only the torch that it is built with), the
launchers of the CUDA kernels, and, where torch is a CUDA build and a compiler is found, their device code
(csrc/cuda/device_code.py).

Environment: FUSEDRNN_BUILD=0 compiles nothing; FUSEDRNN_DIRECT=0 leaves _direct out, and what is built then fits every
torch and every Python that are supported; FUSEDRNN_CUDA=0 leaves CUDA out; TORCH_CUDA_ARCH_LIST names the
architectures; MAX_JOBS limits how many files are compiled at once.
"""

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

# What comes with a new environment may be older; it would complain about pyproject.toml, which it cannot read.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"fusedrnn is built with setuptools 77 or later, and this is {setuptools.__version__}.\n"
        'Run `pip install "setuptools>=77"` first, then `pip install --no-build-isolation .`'
    )

ROOT = Path(__file__).resolve().parent
X86 = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
CAPABILITIES = X86 if platform.machine() in ("x86_64", "AMD64") else ("portable",)
if platform.machine() in ("aarch64", "arm64"):
    CAPABILITIES = ("portable", "neon")
if sys.platform != "linux":  # whose permission the tile registers need
    CAPABILITIES = tuple(c for c in CAPABILITIES if c != "amx")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 takes the undefined pass-through operands of its own intrinsics for a fault.
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-Wno-uninitialized"]
CAPABILITY_FLAGS = {f"recurrence_{c}.cpp": AVX2 if c == "avx2" else AVX512 for c in X86[1:]}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-maybe-uninitialized",
         "-Wno-unknown-warning-option"]  # fmt: skip
GPUS = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import device_code  # noqa: E402

VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "fusedrnn" / "__init__.py").read_text(), re.MULTILINE).group(1)
TORCH = "torch>=2.11"
TORCH_TARGET = 0x020B << 48  # of the stable ABI: no newer function of torch is linked

try:
    import torch
    from torch.utils.cpp_extension import include_paths
except ImportError as error:
    torch = None
    missing = error


def decide_cuda() -> tuple[device_code.Compiler | None, str, str]:
    """(the compiler or None, the architectures, the sentence that says why). A machine that builds need not have a
    GPU.
    """
    if os.environ.get("FUSEDRNN_CUDA") == "0":
        return None, "", "CUDA kernels are left out: FUSEDRNN_CUDA=0."
    if os.environ.get("FUSEDRNN_CUDA") == "auto" and not GPUS:
        return None, "", "CUDA kernels are left out: there is no NVIDIA GPU in /dev (FUSEDRNN_CUDA=1 builds them)."
    if torch.version.cuda is None:
        return None, "", f"CUDA kernels are left out: torch {torch.__version__} is built without CUDA."
    setting = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("native", "")
    try:
        kept, dropped = device_code.architectures(setting)
    except ValueError as error:
        sys.exit(f"fusedrnn: {error}")
    left_out = f" ({', '.join(dropped)} of TORCH_CUDA_ARCH_LIST left out: the kernels need 8.0)" if dropped else ""
    if dropped and not kept:
        return None, "", f"CUDA kernels are left out: TORCH_CUDA_ARCH_LIST is {setting!r}, and they need 8.0 or newer."
    compiler = device_code.find_compiler(torch.version.cuda)
    if compiler is None:
        why = (
            f"torch is built for CUDA {torch.version.cuda}, but neither nvcc (CUDA_HOME, the PATH) nor NVRTC was found"
        )
        where = "in this environment (the extra 'cuda-build' installs one)"
        return None, "", f"CUDA kernels are left out: {why} {where}."
    cards = [torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())]
    architectures = ";".join(kept) or device_code.default_architectures(compiler.version, cards)
    # What is written down travels in the wheel: it names no folder of the machine that builds.
    return (
        compiler,
        architectures,
        f"CUDA kernels are built for {architectures}{left_out}: torch is built for CUDA {torch.version.cuda} and "
        f"{compiler.kind} {compiler.version or 'of an unknown version'} was found.",
    )


def prefix_maps() -> list[str]:
    """Options that keep the folders of this machine out of what asserts and debug information say."""
    return [f"-ffile-prefix-map={Path(torch.__file__).parents[1]}/=", f"-ffile-prefix-map={ROOT}/="]


class BuildPy(build_py):
    """Writes down next to the package what setup.py decided."""

    def run(self):
        if not self.editable_mode:  # what an earlier build left would be taken along
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        folder = ROOT / "fusedrnn" if self.editable_mode else Path(self.build_lib) / "fusedrnn"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_facts.json").write_text(json.dumps(FACTS, indent=1) + "\n")
        if not self.editable_mode:
            # What cells of one's own are compiled with.
            for path in (ROOT / "csrc").rglob("*"):
                if path.suffix in (".h", ".cuh", ".cu", ".py"):
                    target = folder / "csrc" / path.relative_to(ROOT / "csrc")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


class EditableWheel(editable_wheel):
    """Puts the clone on the path, behind all else. A script in the folder above finds the clone's folder, which may be
    called fusedrnn as well; without this Python takes that for the package, an empty one.
    """

    def run(self):
        super().run()
        for path in Path(self.dist_dir).glob(f"fusedrnn-{VERSION}-*editable*.whl"):
            with zipfile.ZipFile(path) as wheel:
                files = {name: wheel.read(name) for name in wheel.namelist()}
            name, text = "__editable___fusedrnn_clone.pth", f"{ROOT}\n".encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).decode().rstrip("=")
            record = next(n for n in files if n.endswith(".dist-info/RECORD"))
            files |= {name: text, record: files[record] + f"{name},sha256={digest},{len(text)}\n".encode()}
            with zipfile.ZipFile(path, "w") as wheel:
                for name, content in files.items():
                    wheel.writestr(name, content)


class BuildExt(build_ext):
    """Compiles every file with the flags of its instruction set, several at once, with or without ninja."""

    def finalize_options(self):
        super().finalize_options()
        if torch is not None:
            # Kept between builds, also editable ones, and apart for every torch, Python and compiler.
            compiler = re.sub(r"[^\w.+-]", "_", os.environ.get("CXX", "").strip())
            tag = f"torch-{torch.__version__}-{sys.implementation.cache_tag}{compiler and f'-{compiler}'}"
            self.build_temp = str(ROOT / "build" / tag)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        if ext.name == MODULE:
            print(f"fusedrnn: {FACTS['cuda_why']}{f' ({COMPILER.path})' if COMPILER else ''}", flush=True)
            # All files of all extensions at once: the first one takes longest.
            with ThreadPoolExecutor(jobs) as pool:
                cuda = pool.submit(self.build_cuda, jobs)
                todo = [(e, source) for e in (*self.extensions[1:], LIBRARY, ext) for source in e.sources]
                list(pool.map(lambda pair: self.compile_one(*pair), todo))
                shutil.rmtree(target.parent / "device", ignore_errors=True)
                for path, name in cuda.result():
                    (target.parent / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target.parent / name)
            self.link(LIBRARY, target.parent / LIBRARY.name)
        self.link(ext, target)

    def link(self, ext, target):
        own = [str(target.parent / LIBRARY.name)] if ext is not LIBRARY else []
        self.compiler.link_shared_object(
            [*(self.compile_one(ext, source) for source in ext.sources), *own],
            str(target),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            # No libgomp of our own: torch brings the one and only, and GOMP_* resolve to it.
            extra_postargs=["-Wl,--strip-debug", f"-Wl,-soname,{target.name}", "-Wl,-rpath,$ORIGIN"],
            target_lang="c++",
        )

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        shutil.rmtree(ROOT / "fusedrnn" / "device", ignore_errors=True)
        # Of versions before 0.2, whose _C Python would take before the one for every Python.
        for stale in (ROOT / "fusedrnn").glob("_C.cpython-*"):
            stale.unlink()
        for name in (LIBRARY.name, device_code.LAUNCHER, "device"):
            built = Path(self.build_lib) / "fusedrnn" / name
            if built.exists():
                (shutil.copytree if built.is_dir() else shutil.copyfile)(built, ROOT / "fusedrnn" / name)

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

    def build_cuda(self, jobs):
        """[(file, its name in the package)]: the launchers, always, and the device code."""
        folder = Path(self.build_temp) / "device"
        launcher = device_code.compile_launcher(folder / device_code.LAUNCHER, flags=prefix_maps())
        code = device_code.compile_device_code(folder, ARCHITECTURES, jobs, COMPILER) if COMPILER else []
        return [(launcher, launcher.name), *((path, f"device/{path.name}") for path in code)]


WITHOUT_COMPILING = {"egg_info", "sdist", "--version", "--name", "clean"}
COMPILER, ARCHITECTURES, FACTS = None, "", {}
MODULE, LIBRARY = "fusedrnn._C", None
extensions = []
if os.environ.get("FUSEDRNN_BUILD") == "0":
    FACTS = {"extension": False, "cuda_why": "nothing was compiled"}
elif sysconfig.get_config_var("Py_GIL_DISABLED") and not WITHOUT_COMPILING & set(sys.argv):
    sys.exit(
        "fusedrnn: there are no kernels for the free-threaded Python, which has no limited C API.\n"
        "`FUSEDRNN_BUILD=0 pip install --no-build-isolation .` installs without them."
    )
elif torch is None:
    if not WITHOUT_COMPILING & set(sys.argv):
        sys.exit(
            f"fusedrnn is built with torch's headers, and torch is not here ({missing}).\n"
            "Install torch and setuptools>=77 first, then run `pip install --no-build-isolation .` "
            "(FUSEDRNN_BUILD=0 installs without compiling)."
        )
else:
    COMPILER, ARCHITECTURES, cuda_why = decide_cuda()
    direct = os.environ.get("FUSEDRNN_DIRECT") != "0"
    FACTS = {
        "extension": True,
        "torch": torch.__version__,
        "direct": direct,
        "cuda": COMPILER is not None,
        "cuda_why": cuda_why,
        "flags": " ".join(FLAGS),
    }
    common = {"include_dirs": ["csrc", *include_paths()], "library_dirs": [str(Path(torch.__file__).parent / "lib")]}
    stable = [("TORCH_TARGET_VERSION", f"{TORCH_TARGET:#x}ULL")]
    kernels = [*("tensor", "op", "sequence", "stream", "capability"), *(f"recurrence_{c}" for c in CAPABILITIES)]
    LIBRARY = Extension(
        "libfusedrnn.so",
        sources=[f"csrc/cpu/{name}.cpp" for name in kernels],
        define_macros=[*stable, *((f"FUSEDRNN_HAS_{c.upper()}", "1") for c in CAPABILITIES)],
        libraries=["torch_cpu"],
        **common,
    )
    module = Extension(
        MODULE,
        sources=["csrc/module.cpp"],
        define_macros=[*stable, ("Py_LIMITED_API", "0x030A0000")],
        libraries=["torch_cpu"],
        py_limited_api=True,
        **common,
    )
    extensions = [module]
    if direct:
        libraries = ["c10", "torch_cpu", "torch_python"]
        extensions.append(Extension("fusedrnn._direct", sources=["csrc/direct.cpp"], libraries=libraries, **common))

setup(
    version=VERSION,
    install_requires=[TORCH],
    packages=[
        *("fusedrnn", "fusedrnn.backends", "fusedrnn.compat", "fusedrnn.kernels"),
        *("fusedrnn.benchmarks", "fusedrnn.benchmarks.data", "fusedrnn.benchmarks.history"),
    ],
    package_dir={"fusedrnn": "fusedrnn", "fusedrnn.benchmarks": "benchmarks", "fusedrnn.kernels": "kernels"},
    package_data={
        "fusedrnn": ["py.typed"],
        "fusedrnn.benchmarks.data": ["*.csv"],
        "fusedrnn.benchmarks.history": ["*.csv"],
    },
    ext_modules=extensions,
    # One wheel for every CPython, where nothing in it is for one only.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if len(extensions) == 1 else {},
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "editable_wheel": EditableWheel},
)
