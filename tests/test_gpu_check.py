"""``make gpu-check`` as far as the simulator goes: every part, in a process of its own, into one file."""

import json
import re

import pytest
import torch
from ptxsim import build

from fusedrnn import planning
from fusedrnn.benchmarks import gpu_check

pytestmark = pytest.mark.skipif(
    "cuda" not in planning.machine().on_cpu,
    reason="the simulator runs CUDA kernels where there is an nvcc and no GPU: gpu-check is not run",
)
CPU = torch.device("cpu")


def test_every_part_leaves_its_result_in_one_file(tmp_path, capsys):
    out = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--parts", "about,exchange,model,steps", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert not report["measured_on_a_gpu"]
    parts = report["parts"]
    assert list(parts) == ["about", "exchange", "model", "steps"]
    assert {part["status"] for part in parts.values()} == {"ok"}
    about = parts["about"]["found"]
    assert about["info"]["torch_running"] == torch.__version__
    assert "W_hh stays in registers" in about["plans"]["backward=True"]
    assert parts["exchange"]["found"]["packets"] == "arrived"
    modelled = parts["model"]["found"]
    assert (modelled["R_us"], modelled["S_us"]) == gpu_check.EXPECTED
    assert all(0.1 < us < 10 for us in modelled["us_per_step"].values())
    assert len(modelled["us_per_step"]) == 2
    rows = parts["steps"]["found"]
    kernels = {(r["name"], r["mode"]) for r in rows if r["what"] == "kernel"}
    names = ("cuda:persistent", "cuda:step", "triton:step", "triton:step 1 warps")
    assert kernels == {(n, m) for n in names for m in ("forward", "backward")}
    assert {("torch.nn", "train"), ("fusedrnn", "forward")} <= {(r["name"], r["mode"]) for r in rows}
    # What ran here says nothing of a GPU's time, and claims nothing.
    assert {r["why"] for r in rows} == {"ran; simulated: no time"}
    assert not any("us_per_step" in r for r in rows)
    timed = [line for line in capsys.readouterr().out.splitlines() if " us" in line]
    assert len(timed) == 2
    assert all("by a model" in line for line in timed)


def test_a_part_that_fails_costs_its_own_result(tmp_path, monkeypatch, capsys):
    died = {"status": "failed", "why": "its process ended with 7"}
    monkeypatch.setattr(
        gpu_check,
        "in_a_process",
        lambda name, device, given: died if name == "exchange" else {"status": "ok", "found": []},
    )
    out = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--parts", "exchange,bench", "--out", str(out)]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert (parts["exchange"]["status"], parts["bench"]["status"]) == ("failed", "ok")
    assert "exchange  failed  its process ended with 7" in capsys.readouterr().out


def test_a_process_that_dies_is_reported(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_SIMULATE", "nowhere")  # every part's process ends with 2
    found = gpu_check.in_a_process("exchange", CPU)
    assert found["status"] == "failed"
    assert found["why"] == "its process ended with 2"
    assert "FUSEDRNN_SIMULATE must be 1" in found["stderr"]
    monkeypatch.setitem(gpu_check.SECONDS, "about", 0.01)
    assert gpu_check.in_a_process("about", CPU)["why"] == "it took more than 0.01 s"


def test_a_part_that_raises_or_finds_something_wrong(monkeypatch):
    def wrong(device):
        raise gpu_check.PartError("1 kernel is wrong", [1, 2])

    monkeypatch.setattr(gpu_check, "selftest", wrong)
    said = gpu_check.run_part("selftest", CPU)
    assert (said["status"], said["why"], said["found"]) == ("failed", "1 kernel is wrong", [1, 2])
    monkeypatch.setattr(gpu_check, "tests", lambda device: 1 / 0)
    assert gpu_check.run_part("tests", CPU)["why"] == "ZeroDivisionError: division by zero"


def test_what_comes_of_times_on_a_gpu(monkeypatch):
    """R, S and a step from times that a GPU could have given: planted ones, of 0.2 us a load and 0.25 us a store."""

    class Planted:
        def __init__(self, device):
            pass

        def seconds(self, kernel, blocks, memory, count, other):
            if kernel == "exchange":
                memory[:, 0] = torch.arange(count).repeat(2)
            return 1e-4 + count * (2 * (0.2 + 0.25) if kernel == "exchange" else 0.2) * 1e-6

    monkeypatch.setattr(gpu_check, "Driver", Planted)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"multi_processor_count": 132})())

    class Device:
        type = "cuda"

    tensors = torch.full, torch.Tensor.to
    monkeypatch.setattr(torch, "full", lambda *a, device, **options: tensors[0](*a, **options))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, where: t if isinstance(where, Device) else tensors[1](t, where))
    found = gpu_check.exchange(Device())
    assert found["R_us"] == pytest.approx(0.2, rel=1e-3)
    assert found["S_us"]["median"] == pytest.approx(0.25, rel=1e-3)
    assert list(found["round_us_by_partner"]) == [1, 2, 33, 66, 131]


def test_bad_arguments(capsys):
    assert gpu_check.main(["--parts", "about,everything"]) == 2
    assert "--parts must be of about, selftest" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cuda:9"]) == 2
    assert "got cuda:9" in capsys.readouterr().err


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_the_kernels_are_strong_and_wait_for_what_they_load(sm):
    assembled = build.assemble(gpu_check.KERNELS, sm)
    if assembled is None:
        pytest.skip("no ptxas: the kernels of gpu-check are not assembled")
    assert set(build.registers_reported(assembled[0])) == {"exchange", "chase"}
    tool = build.tool("nvdisasm")
    if tool is None:
        pytest.skip("no nvdisasm: the machine code is not read")
    code = build._run([tool, "-c", assembled[1]])
    strong = re.findall(r"\b(LD|ST)(\S*STRONG\S*)", code)
    assert {kind for kind, _ in strong} == {"LD", "ST"}
    assert all(".128." in rest and rest.endswith("STRONG.GPU") for _, rest in strong), strong
