"""The launchers of the CUDA kernels (csrc/cuda/launcher.cpp) in front of a driver that only takes notes, and what is
compiled: the launchers need no CUDA library, the device code no header."""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from fusedrnn import planning
from fusedrnn.backends import cuda

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
spec = importlib.util.spec_from_file_location("device_code", CUDA / "device_code.py")
device_code = importlib.util.module_from_spec(spec)
spec.loader.exec_module(device_code)

# Two devices; a context is its number plus one, 0 none; a module is the context it was loaded in.
DRIVER = r"""
#include <mutex>
#include <string>
#include <stdlib.h>
#include <string.h>
static thread_local long current = 0;
static std::mutex lock;
static std::string notes;
static int capability = 90, version = 12000, refuses = 0, cooperative_error = 0;
static int allowed_shared = 0;
static void note(const std::string& text) {
  const std::lock_guard<std::mutex> held(lock);
  notes += text + "\n";
}
extern "C" {
void set(int c, int v, int r) {
  capability = c, version = v, refuses = r, cooperative_error = 0, allowed_shared = 48 << 10, notes.clear();
}
void set_cooperative_error(int error) { cooperative_error = error; }
void set_current(long context) { current = context; }
long get_current() { return current; }
const char* get_notes() { return notes.c_str(); }
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* v) { return *v = version, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < 2 ? 0 : 101; }
int cuDeviceGetAttribute(int* value, int which, int) {
  return *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : which == 95, 0;
}
int cuDevicePrimaryCtxRetain(long* context, int device) { return note("retain"), *context = device + 1, 0; }
int cuCtxGetCurrent(long* context) { return *context = current % 10, 0; }
int cuCtxGetDevice(int* device) { return *device = int(current % 10) - 1, current ? 0 : 201; }
int cuCtxPushCurrent_v2(long context) { return current = 10 * current + context, 0; }
int cuCtxPopCurrent_v2(long* context) { return *context = current % 10, current /= 10, 0; }
int cuModuleLoadDataEx(long* module, const char* code, unsigned, int*, void** values) {
  if (refuses) return strcpy(static_cast<char*>(values[0]), "no such thing"), refuses;
  note("load " + std::string(code));
  return *module = current % 10, 0;
}
int cuModuleGetFunction(const char** function, long module, const char* name) {
  return *function = strdup((std::to_string(module) + " " + name).c_str()), 0;
}
int cuFuncSetAttribute(const char*, int which, int value) {
  note("attribute " + std::to_string(which) + " " + std::to_string(value));
  const std::lock_guard<std::mutex> held(lock);
  return allowed_shared = value, 0;
}
int cuLaunchKernel(const char* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned, long stream, void**, void**) {
  const std::string directions = z == 1 ? "" : "x" + std::to_string(z);
  return note(std::string("launch ") + function + " " + std::to_string(x) + " " + std::to_string(y) + directions + " " +
              std::to_string(threads) + " on " + std::to_string(stream)), int(current % 10) != function[0] - '0';
}
int cuLaunchCooperativeKernel(const char* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b,
                              unsigned c, unsigned shared, long stream, void** arguments) {
  note("cooperative");
  if (cooperative_error) return cooperative_error;
  {
    const std::lock_guard<std::mutex> held(lock);
    if (int(shared) > allowed_shared) return 1;
  }
  return cuLaunchKernel(function, x, y, z, threads, b, c, shared, stream, arguments, nullptr);
}
static void* memory = nullptr;
void* get_memory() { return memory; }
int cuMemHostAlloc(void** made, size_t bytes, unsigned flags) {
  return note("host memory " + std::to_string(flags)), *made = memory = malloc(bytes), 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  return note("capture mode " + std::to_string(*mode)), *mode = 0, 0;
}
int cuGetErrorName(int error, const char** name) { return *name = error == 1 ? "CUDA_ERROR_INVALID_VALUE" : 0, 0; }
int cuGetErrorString(int, const char** text) { return *text = nullptr, 1; }
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the driver that takes notes, the launchers), compiled."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the launchers are not compiled")
    folder = tmp_path_factory.mktemp("launcher")
    (folder / "driver.cpp").write_text(DRIVER)
    driver = folder / "libdriver.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(driver), str(folder / "driver.cpp")], check=True)
    return driver, device_code.compile_launcher(folder / device_code.LAUNCHER)


class Notes:
    """The launchers before the driver that takes notes, with the images of a folder."""

    def __init__(self, built, folder, images, capability=90, version=12000, refuses=0):
        self.driver = ctypes.CDLL(str(built[0]))
        self.driver.get_notes.restype = ctypes.c_char_p
        self.driver.get_memory.restype = ctypes.c_void_p
        self.driver.set(capability, version, refuses)
        self.driver.set_current(0)
        for file in ("step_forward", "step_linear", "step_cell", "persistent_forward", "persistent_forward_wide"):
            for image in images:
                (folder / f"{file}.{image}").write_text(f"{file} {image}")
        self.kernels = cuda._Kernels(built[1], str(built[0]), folder)
        self.dll = self.kernels.dll

    def step(self, device=0, stream=7, steps=1, hidden=16, batch=4, dtype=4, w_hr=None):
        params = cuda._Forward(
            cell=0, dtype=dtype, steps=steps, batch=batch, input=16, hidden=hidden, out=hidden, w_hr=w_hr
        )
        return self.dll.fusedrnn_step_forward(self.kernels._handle, ctypes.byref(params), device, stream)

    def notes(self):
        return self.driver.get_notes().decode().splitlines()

    def error(self):
        return self.dll.fusedrnn_error().decode()


def test_a_step_is_a_launch_on_the_stream(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin", "compute_80.ptx"])
    n.driver.set_current(1)
    assert n.step(steps=2, batch=20, hidden=40, w_hr=16) == 0, n.error()
    project = "launch 1 step_linear_float16_4_whole 1 3 256 on 7"
    step = "launch 1 step_forward_Lstm_float16_4_whole 1 5 256 on 7"
    capture = ["capture mode 2", "load step_forward sm_90.cubin", "capture mode 0"]
    linear = [c.replace("step_forward", "step_linear") for c in capture]
    assert n.notes() == [*capture, step, *linear, project, step, project]
    assert n.driver.get_current() == 1


def test_a_step_of_any_number_of_rows(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    assert n.step(batch=3_000_000) == 0, n.error()
    assert n.notes()[-1].split()[3:5] == ["93750", "2"]


def test_the_cell_alone_of_many_rows(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    for dtype, name in ((0, "float64"), (1, "float32"), (2, "float32"), (3, "bfloat16")):
        params = cuda._CellStep(
            *(1, dtype), batch=3_000_000, hidden=40, out=40, rows=3_000_000, heads=1, first=5, count=2_000_001
        )
        call = n.dll.fusedrnn_step_cell
        assert call(n.kernels._handle, ctypes.byref(params), 0, None) == 0, n.error()
        assert n.notes()[-1] == f"launch 1 step_cell_Gru_{name}_1_ragged 250001 2 256 on 0"


def test_the_instance_fits_the_call(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    for given, name in (
        ({}, "float16_2_whole"),
        ({"hidden": 12}, "float16_2_ragged"),
        ({"batch": 17}, "float16_4_whole"),
        ({"dtype": 0, "batch": 17}, "float64_1_whole"),
        ({"dtype": 2}, "tf32_2_whole"),
        ({"dtype": 3}, "bfloat16_2_whole"),
    ):
        assert n.step(**given) == 0, n.error()
        assert n.notes()[-1].split()[2] == f"step_forward_Lstm_{name}"
    for cell, hidden, units, name in (
        (0, 256, 8, "Lstm_bfloat16_1_whole"),
        (1, 255, 8, "Gru_bfloat16_1_ragged"),
        (1, 255, 16, "wide_Gru_bfloat16_1_ragged"),
        (2, 264, 8, "RnnTanh_bfloat16_2_ragged"),
        (3, 1024, 16, "wide_RnnRelu_bfloat16_4_whole"),
        (3, 1024, 8, "RnnRelu_bfloat16_4_whole"),
    ):
        params = cuda._Forward(
            cell=cell, dtype=3, steps=1, batch=4, hidden=hidden, out=hidden, slice_rows=4, groups=2, units=units
        )
        call = functools.partial(n.dll.fusedrnn_persistent_forward, n.kernels._handle, ctypes.byref(params), 1)
        assert call(0, None) == 0, n.error()
        assert n.notes()[-2] == "cooperative"
        assert n.notes()[-1] == f"launch 1 persistent_forward_{name} {-(-hidden // units)} 2 256 on 0"
    params.hidden = 1025
    assert call(0, None) == 999
    assert n.error() == "persistent_forward has no kernel for H = 1025"
    params.cell = 9
    assert call(0, None) == 999
    assert n.error() == "there is no cell 9"
    params.cell, params.dtype, params.hidden = 0, 0, 16
    assert call(0, None) == 999
    assert n.error() == "persistent_forward has no kernel for this cell and dtype"


def test_both_directions_are_one_launch(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    sizes = {"cell": 0, "dtype": 3, "steps": 1, "batch": 4, "hidden": 256, "out": 256, "slice_rows": 4, "groups": 1}
    both = (cuda._Forward * 2)(*(cuda._Forward(**sizes, units=8, reverse=reverse) for reverse in (0, 1)))
    call = n.dll.fusedrnn_persistent_forward
    assert call(n.kernels._handle, both, 2, 0, None) == 0, n.error()
    assert n.notes()[-2:] == ["cooperative", "launch 1 persistent_forward_Lstm_bfloat16_1_whole 32 1x2 256 on 0"]


def persistent(n, rows, cell=0, hidden=256):
    params = cuda._Forward(
        cell=cell, dtype=3, steps=1, batch=64, hidden=hidden, out=hidden, slice_rows=rows, groups=1, units=8
    )
    return n.dll.fusedrnn_persistent_forward(n.kernels._handle, ctypes.byref(params), 1, 0, None)


def test_shared_memory_beyond_48_kb_is_asked_for(built, tmp_path):
    """It only grows: the limit is the function's, and another thread may be about to launch it."""
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    # Tiles of 8 rows, two buffers: of a row 1 KB of sums, and copied ahead 4 x 8 units and a reset; of 8 warps offsets.
    for rows in (20, 24, 25, 64, 33):
        assert persistent(n, rows) == 0, n.error()
    assert persistent(n, 32, cell=1) == 0, n.error()  # another function
    assert [line for line in n.notes() if "attribute" in line] == [
        f"attribute 8 {2 * (rows * (1024 + 8 * 2 * gates + 4) + 128)}"
        for rows, gates in ((24, 4), (32, 4), (64, 4), (32, 3))
    ]  # fmt: skip


def test_threads_with_batches_of_different_size(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    done = []
    threads = [
        threading.Thread(target=lambda k=k: done.append({persistent(n, 64 - 8 * (k % 4)) for _ in range(200)}))
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [{0}] * 8


def test_a_refusal_is_told_by_its_number(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    assert n.dll.fusedrnn_cooperative(n.kernels._handle, 0) == 1
    assert n.dll.fusedrnn_cooperative(n.kernels._handle, 2) == 0  # no such device
    for number in (720, 801):
        n.driver.set_cooperative_error(number)
        assert persistent(n, 8) == number
        assert n.error() == f"persistent_forward_Lstm_bfloat16_1_whole: CUDA_ERROR ({number})"
    n.driver.set_cooperative_error(0)
    assert persistent(n, 8, hidden=1025) == 999


def test_a_fault_outlives_its_context(built, tmp_path, capsys):
    """The kernels write into host memory, of every context: asked for once, and read when a launch fails."""
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    for _ in range(2):
        assert persistent(n, 8) == 0, n.error()
    assert n.notes().count("host memory 3") == 1
    assert n.notes()[-1].endswith("on 0")
    words = ctypes.cast(n.driver.get_memory(), ctypes.POINTER(ctypes.c_int32))
    assert words[:4] == [0, 0, 0, 0]
    assert n.dll.fusedrnn_fault(n.kernels._handle) == b""
    said = "packet 7 of the step before step 3 never came to block 5 of a persistent kernel, which gave up"
    for k, word in enumerate((5, 3, 7, 1)):
        words[k] = word
    n.driver.set_cooperative_error(710)
    assert persistent(n, 8) == 710
    assert n.error() == f"persistent_forward_Lstm_bfloat16_1_whole: CUDA_ERROR (710): {said}"
    words[3] = 1
    n.kernels.tell_fault()
    n.kernels.tell_fault()  # said once
    assert capsys.readouterr().err == f"fusedrnn: {said}\n"


def test_every_device_has_its_context_and_its_modules(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    for device in (1, 0, 1):
        assert n.step(device) == 0, n.error()
        assert n.driver.get_current() == 0
    n.driver.set_current(1)  # that of device 0: used as it is, and left for device 1's
    for device in (0, 1):
        assert n.step(device) == 0, n.error()
        assert n.driver.get_current() == 1
    assert n.notes().count("retain") == 2
    assert [line for line in n.notes() if "load" in line] == ["load step_forward sm_90.cubin"] * 2
    assert [line.split()[1] for line in n.notes() if "launch" in line] == ["2", "1", "2", "1", "2"]
    assert n.step(device=2) == 101
    assert n.error() == "cuDeviceGet: CUDA_ERROR (101)"


def test_threads_load_once(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin"])
    done = []
    threads = [threading.Thread(target=lambda: done.append([n.step(d % 2) for d in range(50)])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [[0] * 50] * 8
    assert sum("load" in line for line in n.notes()) == 2
    assert sum("launch" in line for line in n.notes()) == 400


@pytest.mark.parametrize(
    "capability, first",
    [(80, "sm_80.cubin"), (86, "sm_80.cubin"), (89, "sm_80.cubin"), (90, "sm_90.cubin"), (103, "sm_100.cubin"),
     (110, "compute_80.ptx"), (121, "sm_120.cubin"), (75, None)],
)  # fmt: skip
def test_a_card_takes_the_best_image(built, tmp_path, capability, first):
    images = ["sm_80.cubin", "compute_80.ptx", "sm_90.cubin", "sm_100.cubin", "sm_120.cubin"]
    n = Notes(built, tmp_path, images, capability)
    found = n.dll.fusedrnn_images(str(tmp_path).encode(), *divmod(capability, 10)).decode().split()
    assert found == ([first] if first else []) + (["compute_80.ptx"] if first and first[0] == "s" else [])
    assert n.step() == (0 if first else 999)
    if first:
        assert f"load step_forward {first}" in n.notes()
    else:
        assert n.error() == f"there is no code of step_forward for compute capability 7.5 in {tmp_path}"


def test_a_driver_that_refuses_the_code_is_told_of(built, tmp_path):
    n = Notes(built, tmp_path, ["sm_90.cubin", "compute_80.ptx"], refuses=1)
    assert n.step() == 999
    assert n.error() == (
        "the driver (CUDA 12.0, a card of compute capability 9.0) does not take "
        f"{tmp_path}/step_forward.sm_90.cubin: CUDA_ERROR_INVALID_VALUE (1): no such thing, nor "
        f"{tmp_path}/step_forward.compute_80.ptx: CUDA_ERROR_INVALID_VALUE (1): no such thing. A newer driver may"
    )


def test_drivers_that_are_not_there_or_too_old(built, tmp_path):
    with pytest.raises(RuntimeError, match=r"the driver is too old: it has CUDA 11\.8, CUDA 12\.0 is needed"):
        Notes(built, tmp_path, [], version=11080)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: there is no driver: libnowhere"):
        cuda._Kernels(built[1], "libnowhere.so", tmp_path)
    with pytest.raises(RuntimeError, match="has no cuInit: the driver is too old"):
        cuda._Kernels(built[1], str(built[1]), tmp_path)


def test_the_launchers_need_no_cuda_library(built):
    for library in (built[1], cuda._LIBRARY):
        if library.exists():
            listed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
            needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
            assert needed
            assert {name.split(".so")[0] for name in needed} <= {
                "libdl",
                "libstdc++",
                "libm",
                "libgcc_s",
                "libc",
                "ld-linux-x86-64",
            }


def test_what_is_missing_is_said_and_nothing_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_launchers", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(cuda, "_compiled", cuda._compiled.__wrapped__)
    for version, built, words in (
        (None, True, f"torch {torch.__version__} is built without CUDA"),
        (
            "12.9",
            True,
            "they were built, but fusedrnn/device or fusedrnn/libfusedrnn_cuda.so is missing: install again",
        ),
        ("12.9", False, "left out"),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(cuda, "build_info", lambda built=built: {"cuda_built": built, "cuda_why": "left out"})
        monkeypatch.setattr(cuda, "DEVICE_CODE", tmp_path)
        assert cuda.missing() == words
        assert cuda.images((9, 0)) == []
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
            cuda._compiled()


def test_a_driver_without_the_kernels_leaves_the_card_to_triton(monkeypatch, tmp_path):
    """A driver that is too old, and a card for which nothing was built, are known before a layer is called."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "missing", lambda: "")
    monkeypatch.setattr(cuda, "why_not", cuda.why_not.__wrapped__)
    monkeypatch.setattr(planning, "machine", lambda: planning.Machine())

    def too_old():
        raise RuntimeError("backend 'cuda' cannot run: the driver is too old: it has CUDA 11.8, CUDA 12.0 is needed")

    monkeypatch.setattr(cuda, "_compiled", too_old)
    problem = planning.Problem("lstm", 8, 8, 0, torch.float32, "cuda", (8, 6))
    choice = planning.decide(problem, planning.machine_with(device))
    assert choice.backend == "triton"
    assert "cuda cannot: the driver is too old: it has CUDA 11.8, CUDA 12.0 is needed" in choice.why

    monkeypatch.setattr(cuda, "_compiled", lambda: None)
    monkeypatch.setattr(cuda, "DEVICE_CODE", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    for found, why in (([], "takes none of sm_90.cubin"), (["sm_80.cubin"], "")):
        (tmp_path / "step_forward.sm_90.cubin").touch()
        monkeypatch.setattr(cuda, "images", lambda capability, found=found: found)
        assert why in cuda.why_not(0)
        assert (planning.machine_with(device).reason("cuda") is None) == (why == "")


def test_architectures():
    assert device_code.images("8.0+PTX;9.0 10.0") == ["sm_80.cubin", "compute_80.ptx", "sm_90.cubin", "sm_100.cubin"]
    assert device_code.images("") == []
    assert device_code.images("Ampere;9.0a;8.0") == ["sm_80.cubin", "sm_86.cubin", "compute_86.ptx", "sm_90.cubin"]
    assert device_code.images("Blackwell+Tegra 12.0f+PTX") == ["sm_110.cubin", "sm_120.cubin", "compute_120.ptx"]
    # A container's list: what lies below 8.0 has no kernels, and says so.
    listed = "5.2 6.0;7.0,Turing 7.5 8.0 Volta+Tegra Hopper;"
    assert device_code.architectures(listed) == (
        ["8.0", "9.0+PTX"],
        ["5.2", "6.0", "7.0", "Turing", "7.5", "Volta+Tegra"],
    )
    for wrong in ("Hoper", "9", "sm_90", "8.0;all", "9.0b"):
        with pytest.raises(ValueError, match="is no architecture"):
            device_code.architectures(wrong)


def test_default_architectures():
    default = device_code.default_architectures
    assert default("13.0", []) == default("12.4", [(10, 0)]) == default("", [(12, 0)]) == "8.0+PTX;9.0"
    assert default("12.8", [(8, 6), (12, 1), (12, 0)]) == "8.0+PTX;9.0;12.0"
    assert default("13.0", [(10, 3), (12, 0), (11, 0)]) == "8.0+PTX;9.0;10.0;12.0"


def test_another_list_or_compiler_compiles_anew(tmp_path):
    """An nvcc that writes its arguments; what is there already of the same is kept."""
    ran = tmp_path / "ran"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$3 $4" >> {ran}\nfor last; do :; done\necho code > $last\n')
    nvcc.chmod(0o755)
    source = tmp_path / "one.cu"
    source.write_text("")

    def compile(setting, version="13.0"):
        ran.write_text("")
        compiler = device_code.Compiler("nvcc", str(nvcc), version)
        wanted = device_code.images(setting)
        files = device_code.compile_images(tmp_path / "device", wanted, 1, compiler, [source])
        assert sorted(files) == sorted((tmp_path / "device").glob("one.*"))
        return ran.read_text().split()[::2]

    assert compile("8.0;9.0") == ["-cubin", "-cubin"]
    assert compile("8.0;9.0") == []
    assert compile("9.0;12.0") == ["-cubin"]  # and that of 8.0 is gone
    assert compile("9.0+PTX") == ["-ptx", "-cubin"]  # the PTX, and of it the code
    assert compile("9.0+PTX", "13.1") == ["-ptx", "-cubin"]


def test_compilers(monkeypatch, tmp_path):
    for name, version in (("new", "13.0"), ("old", "12.4")):
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        nvcc.chmod(0o755)
    monkeypatch.delenv("FUSEDRNN_NVRTC", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "new"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'old' / 'bin'}:/bin")
    monkeypatch.setattr(device_code, "_nvrtc_libraries", lambda: ["lib/libnvrtc.so.13", "lib/libnvrtc.so.12"])
    assert device_code.find_compiler("13.0") == ("nvcc", str(tmp_path / "new" / "bin" / "nvcc"), "13.0")
    assert device_code.find_compiler("12.6") == ("nvcc", str(tmp_path / "old" / "bin" / "nvcc"), "12.4")
    monkeypatch.setattr(device_code, "_version", lambda kind, path: "12.9")
    monkeypatch.setenv("FUSEDRNN_NVRTC", "12")
    assert device_code.find_compiler() == ("NVRTC", "lib/libnvrtc.so.12", "12.9")
    monkeypatch.setenv("FUSEDRNN_NVRTC", "/opt/libnvrtc.so")
    assert device_code.find_compiler() == ("NVRTC", "/opt/libnvrtc.so", "12.9")


def test_device_code_needs_no_header(tmp_path):
    """NVRTC knows none; one file goes through it, machine code and all."""
    libraries = device_code._nvrtc_libraries()
    if not libraries:
        pytest.skip("no NVRTC: that the device code needs no header is not checked")
    compiler = device_code.Compiler("NVRTC", libraries[0], "")
    wanted = ["sm_80.cubin", "compute_80.ptx"]
    compiled = functools.partial(device_code.compile_images, tmp_path, wanted, 1, compiler, [CUDA / "step_linear.cu"])
    assert [path.name for path in compiled()] == ["step_linear.compute_80.ptx", "step_linear.sm_80.cubin"]
    ptx, code = compiled()
    assert re.findall(r"\.visible \.entry (\w+)", ptx.read_text())[0] == "step_linear_float32_2_whole"
    assert code.read_bytes().startswith(b"\x7fELF")
    before = code.stat().st_mtime_ns
    compiled()
    assert code.stat().st_mtime_ns == before
    (tmp_path / "none.cu").write_text("#include <stdint.h>\n")
    with pytest.raises(RuntimeError, match="NVRTC cannot compile none"):
        device_code.nvrtc(compiler.path, tmp_path / "none.cu", "80")
    # The other files include what this one does, and persistent.cuh.
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]:
        assert "#include <" not in path.read_text(), path
