"""The examples: each runs, and what it prints is what it promises. char_lm.py has tests of its own, test_demo.py."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"its data come with {package} (make test-all installs it)")


TEMPERATURES, SPEECH = needs("vega_datasets"), needs("aeon")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    """What the example prints in a process of its own, on one thread of the CPU: others may be at work here."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def quick(capsys):
    """main([..., "--quick"]) of an example in this process, on one thread; what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name, *arguments: (load(name).main([*arguments, "--quick"]), capsys.readouterr().out)
    torch.set_num_threads(threads)


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"char_lm"}
    assert names == {
        "forecast_temperature",
        "classify_speech",
        "convert_model",
        "distributed",
        "voice_activity",
        "swap_flashrnn",
    }


@TEMPERATURES
def test_temperatures_are_whole_years():
    example = load("forecast_temperature")
    for file in example.CITIES.values():
        series = example.read(file)
        assert series.shape == (8760,)
        assert 32 < series.min() < series.max() < 90
        # The hour that the change to summer time leaves out lies between its neighbours.
        missing = (31 + 28 + 13) * 24 + 3
        assert series[missing] == pytest.approx((series[missing - 1] + series[missing + 1]).item() / 2)


@TEMPERATURES
def test_forecast_windows():
    days, after = load("forecast_temperature").windows(torch.arange(200.0), 3)
    assert days.shape == (3, 200 - 4 * 24 + 1, 24)
    assert torch.equal(days[:, 5].flatten(), torch.arange(5.0, 77.0))
    assert torch.equal(after[5], torch.arange(77.0, 101.0))


@TEMPERATURES
def test_forecast_quick(quick):
    code, text = quick("forecast_temperature")
    assert code == 0
    assert re.search(r"^San Francisco +0\.\d{3} +0\.\d{3} +\d\.\d{3}$", text, re.MULTILINE)


@TEMPERATURES
def test_forecast_needs_days(quick, capsys):
    with pytest.raises(SystemExit):
        quick("forecast_temperature", "--days", "2")
    assert "--days must be at least 3, got 2" in capsys.readouterr().err


@TEMPERATURES
@pytest.mark.slow
def test_forecast_beats_both_baselines():
    text = run("forecast_temperature")
    rows = re.findall(r"^(Seattle|San Francisco) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert [city for city, *_ in rows] == ["Seattle", "San Francisco"]
    for _, naive, with_change, ours in rows:
        assert float(ours) < float(with_change) < float(naive)


@SPEECH
def test_speech_is_the_official_split():
    example = load("classify_speech")
    train, speaker = example.read("TRAIN")
    test, tested = example.read("TEST")
    assert speaker.bincount().tolist() == [30] * 9
    assert tested.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert {u.shape[1] for u in train + test} == {12}
    assert (min(map(len, train + test)), max(map(len, train + test))) == (7, 29)


@SPEECH
def test_speech_quick(quick):
    code, text = quick("classify_speech", "--backend", "cpu", "--cell", "LSTM")
    assert code == 0
    assert int(re.search(r"^ +5 .* (\d+) of 370 ", text, re.MULTILINE)[1]) > 370 // 3


@SPEECH
@pytest.mark.slow
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_speech(cell):
    last = re.findall(r"(\d+) of 370 ", run("classify_speech", "--cell", cell))[-1]
    assert int(last) >= 350


def test_voice_activity(capsys):
    threads = torch.get_num_threads()
    load("voice_activity").main(["--train-steps", "40", "--hidden", "16", "--seconds", "16"])
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    rows = re.findall(r"^(\S+(?: \w+)?) +([\d.]+)% +(\d+) +(\d+) +(\d+) +(\d+)$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["torch.nn.LSTM", "fusedrnn.LSTM", "fusedrnn stream"]
    for _, right, *took in rows:
        assert float(right) > 90
        assert sorted(map(int, took)) == list(map(int, took))
    assert "frames that torch.nn hears otherwise: 0" in said


def test_convert_quick(quick):
    code, text = quick("convert_model")
    assert code == 0
    for part in ("encoder.rnn (LSTM)", "encoder.top (GRU)", "decoder.cell (LSTMCell)"):
        assert f"{part}: swapped" in text
    assert float(re.search(r"gradients at most (\S+) of", text)[1]) < 1e-5


@pytest.mark.slow
def test_convert():
    text = run("convert_model", "--rounds", "3")
    assert re.search(r"training step of the whole model on this cpu: \d+\.\d\d times as fast", text)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "3"])
def test_distributed(processes):
    text = run("distributed", "--processes", processes)
    rows = re.findall(r"^(ddp|fsdp) +(\d) +(\S+) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert [(mode, count) for mode, count, *_ in rows] == [("ddp", processes), ("fsdp", processes)]
    for *_, first, last, gradients, losses in rows:
        assert float(last) < float(first)
        assert float(gradients) < 1e-10
        assert float(losses) < 1e-8


@pytest.mark.slow
def test_distributed_under_torchrun():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(EXAMPLES / "distributed.py"), "--quick", "--mode", "ddp"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ddp +2 ", done.stdout, re.MULTILINE)) == 1


README_OF_AOTI = (EXAMPLES / "aoti" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: no package of AOTInductor is compiled or run from C++")
def test_tagger_goes_to_onnx_and_into_a_program_of_cpp_by_its_page(tmp_path):
    library = Path(fusedrnn.__file__).with_name("libfusedrnn.so")
    if not library.exists():
        pytest.skip("libfusedrnn.so is not built: no package of AOTInductor is run from C++")
    shell, code = re.findall(r"^```(?:python)?\n(.*?)^```$", README_OF_AOTI, re.MULTILINE | re.DOTALL)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (tmp_path / "examples").symlink_to(EXAMPLES)

    def check(*command):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=900, env=os.environ | {"PATH": path}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    lines = check("bash", "-e", "-c", shell)
    python, again = lines[-6:-3], lines[-3:]
    assert float(re.search(r"([\d.]+)%", lines[0])[1]) > 95
    assert python == again
    assert [len(line.split()) for line in again] == [9, 2, 3]
    # Without Python in its environment, one sequence, and what is wrong.
    program, package = tmp_path / "tagger", tmp_path / "tagger.pt2"

    def run_program(*arguments):
        return subprocess.run([program, *arguments], capture_output=True, text=True, env={}, timeout=60)

    assert run_program(library, package, "2 7").stdout == again[1] + "\n"
    assert run_program(tmp_path / "missing.so", package, "2 7").returncode == 1
    # And from Python.
    load = "import torch, fusedrnn; print(torch._inductor.aoti_load_package('tagger.pt2')"
    load += "(torch.tensor([[2, 7]]), torch.tensor([2])).argmax(-1).tolist())"
    assert check(sys.executable, "-c", load) == [str([[int(t) for t in again[1].split()]])]
    pytest.importorskip("onnxruntime", reason="the tagger is not run in ONNX Runtime: not installed (extra 'test')")
    assert [line.split() for line in check(sys.executable, "-c", code)] == [["[[1", "0", "1]"], ["[0", "0", "0]]"]]


def test_swap_flashrnn(quick):
    """Both packages train the same model to the same loss."""
    loss, printed = quick("swap_flashrnn")
    assert "fusedrnn: loss" in printed
    pytest.importorskip("flashrnn", reason="the package flashrnn 1.0.8 is not installed")
    theirs, _ = quick("swap_flashrnn", "--package", "flashrnn")
    assert abs(loss - theirs) < 1e-3 * max(1.0, theirs)
