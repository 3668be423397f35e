"""What is installed, shipped and documented. `make dist` and the workflow build the wheels with compiled code."""

import ctypes
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from ptxsim import build

import fusedrnn
from fusedrnn import _build, modules

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_public_names_are_documented():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in fusedrnn.__all__:
        assert re.search(rf"^\.\. auto\w+:: (fusedrnn\.)?{name}\b", page, re.MULTILINE), f"{name} is not in docs/api.md"
        assert getattr(fusedrnn, name).__doc__, f"{name} has no docstring"
    for name in ("LSTM", "GRU", "RNN"):
        signature = re.search(rf"^\.\. autoclass:: {name}\((.*)\)$", page, re.MULTILINE).group(1)
        keywords = inspect.signature(modules.RecurrentLayer).parameters.values()
        own = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")]
        assert signature.split("*, ")[1].replace("=None", "").replace("=False", "").split(", ") == own, name


def test_importing_is_light():
    """Beside torch: no Dynamo, no Triton, little time and memory."""
    code = (
        "import sys, time, torch\n"
        # Resident now: the peak of importing torch would hide what comes after it.
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "before, start = resident(), time.process_time()\n"
        "import fusedrnn\n"
        "print(time.process_time() - start, resident() - before, *sys.modules)\n"
    )
    done = python("-c", code, folder=ROOT)
    seconds, megabytes, *found = done.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "triton", "matplotlib"} & set(found), done.stderr
    assert float(seconds) < 0.6  # 0.06 on an idle machine
    assert float(megabytes) < 20


def test_the_command_line_tells_the_version():
    done = python("-m", "fusedrnn", "--version", folder=ROOT)
    assert (done.returncode, done.stdout) == (0, f"fusedrnn {fusedrnn.__version__}\n"), done.stderr


@pytest.mark.slow
def test_the_version_is_that_of_every_torch(checkout):
    assert f'"torch{_build.TORCH_RANGE}"' in (checkout / "setup.py").read_text()
    for environment in ({"FUSEDRNN_BUILD": "0"}, {"FUSEDRNN_BUILD": "1", "FUSEDRNN_CUDA": "0"}):
        done = python("setup.py", "--version", folder=checkout, **environment)
        assert done.stdout.split()[-1] == fusedrnn.__version__, done.stderr


def undefined(library: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


@pytest.mark.skipif(not _build.loaded(), reason=f"the C++ extension: {_build.why_not_loaded()}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm: what the libraries need of torch is not checked")
def test_the_libraries_need_only_what_every_torch_has():
    """Torch's stable C functions, of 2.11, and of Python its limited API."""
    folder = Path(_build._extension.__file__).parent
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    stable, conditions = set(), []
    for name in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h"):
        for line in (include / name).read_text().splitlines():
            if line.startswith("#if"):
                conditions.append(re.search(r"TORCH_VERSION_2_1[2-9]_0", line))
            elif line.startswith("#endif"):
                conditions.pop()
            elif not any(conditions):  # else from a later version on
                stable |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    for name in ("libfusedrnn.so", "_C.abi3.so"):
        needs = undefined(folder / name)
        of_torch = {s for s in needs if "torch" in s or "c10" in s or "2at" in s}
        own = {s for s in of_torch if "8fusedrnn" in s}
        assert len(of_torch - own) > 2
        assert of_torch - own <= stable, (name, of_torch - own - stable)
        assert not own or name == "_C.abi3.so"
        of_python = {s for s in needs if s.startswith(("Py", "_Py"))}
        assert bool(of_python) == (name == "_C.abi3.so"), of_python
        readelf = subprocess.run(["readelf", "-d", folder / name], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf))
        assert not {n for n in needed if "gomp" in n or "omp.so" in n or "python" in n}, needed


@pytest.mark.slow
@pytest.mark.skipif(not _build.loaded(), reason=f"the C++ extension: {_build.why_not_loaded()}")
def test_the_module_keeps_to_the_limited_api():
    pytest.importorskip("abi3audit", reason="no abi3audit (extra 'dist'): the module's use of Python is not checked")
    done = python(
        *("-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", _build._extension.__file__), folder=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is None or build.cuda_home() is None,
    reason="no CUDA build of torch, or no nvcc: that setup.py builds the CUDA kernels is not checked",
)
def test_cuda_kernels_are_built(checkout):
    """For one architecture. The C++ objects of this checkout are taken as they are."""
    ignore = shutil.ignore_patterns("ptxsim", "*.so")
    shutil.copytree(ROOT / "build", checkout / "build", copy_function=shutil.copy, ignore=ignore)
    environment = {"FUSEDRNN_BUILD": "1", "FUSEDRNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    done = python(
        *("setup.py", "build_ext", "--inplace"), folder=checkout, CUDA_HOME=str(build.cuda_home()), **environment
    )
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels are built for 8.0" in done.stdout
    library = ctypes.CDLL(str(checkout / "fusedrnn" / "libfusedrnn_cuda.so"))
    assert library.fusedrnn_step_forward
    assert library.fusedrnn_persistent_backward
    names = (
        *("persistent_backward", "persistent_forward", "persistent_forward_wide"),
        *("step_backward", "step_cell", "step_forward", "step_linear"),
    )
    assert sorted(p.name for p in (checkout / "fusedrnn" / "device").iterdir()) == [f"{n}.sm_80.cubin" for n in names]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: setup.py is not asked what it does without")
def test_cuda_kernels_are_left_out_without_a_gpu(checkout):
    code = (
        "import sys; sys.argv = ['setup.py', '--version']; import setup; print(setup.COMPILER, setup.FACTS['cuda_why'])"
    )
    done = python("-c", code, folder=checkout, FUSEDRNN_BUILD="1", FUSEDRNN_CUDA="auto")
    assert done.stdout.splitlines()[-1].startswith("None CUDA kernels are left out: there is no NVIDIA GPU"), done


def test_setup_without_torch_says_what_to_do(checkout, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')\n")
    done = python("setup.py", "bdist_wheel", folder=checkout, PYTHONPATH=str(tmp_path), FUSEDRNN_BUILD="1")
    assert done.returncode == 1
    assert "torch is not here (no torch today)" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


def test_setup_with_an_old_setuptools_says_what_to_do(checkout, tmp_path):
    """As pip's stock one: pyproject.toml is read after setup.py has begun."""
    (tmp_path / "sitecustomize.py").write_text("import setuptools; setuptools.__version__ = '65.5.1'\n")
    code = "from setuptools import build_meta; build_meta.get_requires_for_build_wheel()"
    done = python("-c", code, folder=checkout, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "setuptools 77 or later, and this is 65.5.1" in done.stderr
    assert 'pip install "setuptools>=77"' in done.stderr


def test_an_editable_install_is_found_from_the_folder_above(checkout, tmp_path):
    """There the clone's folder looks like a package of that name."""
    clone = checkout.rename(checkout.with_name("fusedrnn"))
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = python("-c", code, folder=clone, FUSEDRNN_BUILD="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        (record,) = (name for name in archive.namelist() if name.endswith("RECORD"))
        recorded = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
        assert recorded == set(archive.namelist())
    code = f"""if True:
        import site
        site.addsitedir({str(tmp_path / "installed")!r})
        import fusedrnn, fusedrnn.kernels, fusedrnn.benchmarks
        print(fusedrnn.LSTM, fusedrnn.__file__)
    """
    # Without site: no other installation comes in between.
    paths = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    done = python("-S", "-c", code, folder=clone.parent, PYTHONPATH=paths, FUSEDRNN_SIMULATE="0")
    assert done.stdout.split()[-1] == str(clone / "fusedrnn" / "__init__.py"), done.stderr


@pytest.mark.skipif(not _build.loaded(), reason=f"the C++ extension: {_build.why_not_loaded()}")
def test_a_checkout_that_hides_what_is_installed_says_so(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    sources = shutil.ignore_patterns("*.so", "_facts.json", "device", "__pycache__")
    for folder in ("fusedrnn", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=sources)
    (site / "fusedrnn").mkdir(parents=True)
    (site / "fusedrnn" / "_build.py").touch()
    (site / "fusedrnn-9.dist-info").mkdir()
    (site / "fusedrnn-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fusedrnn\nVersion: 9\n")
    said = f"this is the checkout {clone}, which is not built, and hides the installed fusedrnn in {site}: start Python"
    program = "import torch, fusedrnn; fusedrnn.LSTM(3, 4)(torch.randn(2, 3))"
    for command in (["-c", program], ["-m", "fusedrnn", "info"]):
        # Without site, an editable installation of these tests is not found.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *(p for p in sys.path if "site-packages" in p)])}
        ran = subprocess.run([sys.executable, "-S", *command], cwd=clone, env=env, capture_output=True, text=True)
        assert said in ran.stderr, ran.stderr
        assert ran.returncode == (2 if "info" in command else 0)


def test_an_extension_of_other_sources_says_what_to_do(checkout):
    for name in ("_C.abi3.so", "libfusedrnn.so"):
        shutil.copy(Path(_build._extension.__file__).with_name(name), checkout / "fusedrnn")
    ops = checkout / "fusedrnn" / "ops.py"
    changed = ops.read_text().replace(
        "bool keep_gates, bool keep_states)", "bool keep_gates, bool keep_states, bool new)"
    )
    assert changed != ops.read_text()
    ops.write_text(changed)
    done = python("-c", "import fusedrnn", folder=checkout, PYTHONPATH=str(checkout))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fusedrnn's C++ extension was built from other sources than these"), done.stderr
    assert "run `pip install --no-build-isolation .`" in last


@pytest.mark.slow
def test_sdist_and_pure_wheel(checkout, tmp_path):
    """The sdist holds all of the project; the wheel that it gives with nothing compiled installs and computes."""
    hook = "from setuptools import build_meta; build_meta.build_{}({!r})"
    done = python("-c", hook.format("sdist", str(tmp_path)), folder=checkout)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"fusedrnn-{fusedrnn.__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"fusedrnn-{fusedrnn.__version__}"
    missing = {p.relative_to(checkout) for p in checkout.rglob("*") if p.is_file() and "egg-info" not in str(p)}
    missing -= {p.relative_to(unpacked) for p in unpacked.rglob("*")}
    assert not missing

    stale = unpacked / "build" / "lib" / "fusedrnn" / "_direct.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = python("-c", hook.format("wheel", str(tmp_path)), folder=unpacked, FUSEDRNN_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert "absent from" not in done.stdout + done.stderr  # a folder of data that `packages` does not name
    wheel = tmp_path / f"fusedrnn-{fusedrnn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    folders = {"fusedrnn": "fusedrnn", "kernels": "fusedrnn/kernels", "benchmarks": "fusedrnn/benchmarks"}
    wanted = {"fusedrnn/_facts.json"}
    for source, target in folders.items():
        files = [p for p in (checkout / source).rglob("*") if p.suffix in (".py", ".csv", ".typed")]
        wanted |= {f"{target}/{p.relative_to(checkout / source)}" for p in files}
    headers = [p for p in (checkout / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".py")]
    wanted |= {f"fusedrnn/csrc/{p.relative_to(checkout / 'csrc')}" for p in headers}
    assert found == wanted

    code = """if True:
        import torch, fusedrnn
        ours, theirs = fusedrnn.LSTM(3, 4), torch.nn.LSTM(3, 4)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
        print(fusedrnn.__file__, fusedrnn.build_info()["extension_why"])
    """
    done = python("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path / "installed"), FUSEDRNN_SIMULATE="0")
    assert done.stdout.startswith(str(tmp_path / "installed")), done.stderr
    assert "the wheel without kernels" in done.stdout
    assert done.stderr.count("RuntimeWarning: fusedrnn: torch's own op runs: cpu cannot: nothing was compiled") == 1


def test_the_wheel_without_kernels_says_why():
    assert _build.why_nothing_compiled("Darwin", False) == "there are kernels for Linux only, and this is Darwin"
    assert "free-threaded" in _build.why_nothing_compiled("Linux", True)
    assert _build.HOW_TO_BUILD in _build.why_nothing_compiled("Linux", False)


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="no sphinx (extra 'docs'): the documentation is not built")
    done = python("-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path), folder=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    for name in fusedrnn.__all__:
        assert f'id="fusedrnn.{name}"' in page or f'id="module-fusedrnn.{name}"' in page, name
