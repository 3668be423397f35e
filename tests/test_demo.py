"""examples/char_lm.py: what it prints and writes, and what it says when the input is wrong."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "char_lm.py"

# Li Bai, Wang Zhihuan, Meng Haoran, Du Fu: four Tang poems.
VERSE = """床前明月光，疑是地上霜。
举头望明月，低头思故乡。
白日依山尽，黄河入海流。
欲穷千里目，更上一层楼。
春眠不觉晓，处处闻啼鸟。
夜来风雨声，花落知多少。
国破山河在，城春草木深。
感时花溅泪，恨别鸟惊心。
烽火连三月，家书抵万金。
白头搔更短，浑欲不胜簪。
"""

for package in ("tqdm", "matplotlib"):
    pytest.importorskip(package, reason="the demo needs the extra 'demo'")


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("char_lm", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def verse(tmp_path_factory):
    path = tmp_path_factory.mktemp("verse") / "verse.txt"
    path.write_text(VERSE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(verse):
    out = verse.parent / "new" / "out"
    tiny = "--steps 12 --hidden 16 --layers 2 --batch 4 --length 8 --vocabulary 40 --generate 9".split()
    tiny += ["--ulp", "--ulp-weights", "2"]
    paths = ["--text", str(verse), "--out", str(out), "--checkpoint", str(out.parent / "demo.pt")]
    done = subprocess.run(
        [sys.executable, str(DEMO), *paths, "--device", "cpu", *tiny],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done, out, json.loads((out / "char_lm.json").read_text(encoding="utf-8"))


def test_table_and_verdict(trained):
    done, _, results = trained
    for layer in ("torch.nn.LSTM", "fusedrnn.LSTM"):
        row = re.search(rf"^{layer} +([\d.]+) +([\d.]+) +([\d,]+)$", done.stdout, re.MULTILINE)
        assert row, done.stdout
        assert float(row[1]) == pytest.approx(results["losses"][layer][0], abs=1e-4)
    assert done.stdout.count("torch.nn.LSTM from itself, one ulp moved") == 1
    assert "over all 4 pairs of runs" in done.stdout
    sign = "<=" if results["agrees"] else ">"
    verdict = f"{results['largest_difference']:.3e} {sign} {results['largest_difference_after_one_ulp']:.3e}"
    assert verdict in done.stdout


def test_the_measure_is_the_largest_difference_of_the_curves(trained):
    _, _, results = trained
    plain, fused = results["losses"].values()
    by_weights = results["losses_after_ulps"]
    first, second, both = (by_weights[names] for names in sorted(by_weights, key=lambda names: names.count(" ")))
    assert all(len(losses) == 12 for losses in (plain, fused, first, second, both))

    def difference(a, b):
        return max(abs(x - y) for x, y in zip(a, b))

    assert results["largest_difference"] == difference(fused, plain)
    pairs = [(plain, first), (plain, second), (first, both), (second, both)]
    assert results["largest_difference_after_one_ulp"] == max(difference(*pair) for pair in pairs)
    assert difference(fused, plain) < 1e-4  # after so few steps rounding has not grown


def test_loss_falls_and_text_is_of_the_vocabulary(trained):
    _, _, results = trained
    losses = results["losses"]["fusedrnn.LSTM"]
    assert losses[-1] < losses[0]
    assert len(results["text"]) == 9
    assert set(results["text"]) <= set(VERSE)


def test_picture(trained):
    _, out, _ = trained
    assert (out / "char_lm.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoint(demo, trained, verse):
    import torch

    found = torch.load(trained[1].parent / "demo.pt", weights_only=True)
    state = found.pop("state_dict")
    characters = demo.Corpus.read(verse, vocabulary=40).characters
    assert found == {"cell": "LSTM", "hidden": 16, "layers": 2, "characters": characters}
    model = demo.CharLM(torch.nn.LSTM, 40, 16, 2)
    model.load_state_dict(state)
    assert not torch.equal(model.embedding.weight, demo.CharLM(torch.nn.LSTM, 40, 16, 2).embedding.weight)


@pytest.mark.parametrize("cell", ["GRU", "RNN"])
def test_other_cells(demo, verse, tmp_path, capsys, cell):
    tiny = "--steps 3 --hidden 8 --batch 2 --length 8 --vocabulary 20 --generate 5 --device cpu".split()
    assert demo.main(["--cell", cell, "--text", str(verse), "--out", str(tmp_path), "--quantize", *tiny]) == 0
    printed = capsys.readouterr().out
    assert f"1 x {cell} 8" in printed
    assert "bits/character" in printed
    assert "one ulp moved" not in printed
    assert "--ulp measures how far torch.nn gets from itself" in printed
    assert f"fusedrnn.{cell} from torch.nn.{cell}" in printed
    results = json.loads((tmp_path / "char_lm.json").read_text(encoding="utf-8"))
    exact, *fewer_bits = results["losses_of_weights"].values()
    assert fewer_bits == pytest.approx([exact] * 3, rel=1e-2)
    assert exact not in fewer_bits
    losses = results["losses"]
    assert list(losses) == [f"torch.nn.{cell}", f"fusedrnn.{cell}"]
    assert losses[f"fusedrnn.{cell}"] == pytest.approx(losses[f"torch.nn.{cell}"], rel=1e-4)


def test_checkpoint_in_no_folder(demo, capsys, verse, tmp_path):
    path = tmp_path / "none" / "demo.pt"
    code, error = run(demo, capsys, "--text", str(verse), "--out", str(tmp_path / "out"), "--checkpoint", str(path))
    assert code == 2
    assert str(path) in error


def test_progress_bar_is_quiet_when_nobody_watches(trained):
    done, _, _ = trained
    assert "step/s" not in done.stderr


def test_vocabulary_is_capped_and_tokens_spell_the_text(demo, verse):
    whole = demo.Corpus.read(verse, vocabulary=2048)
    assert "".join(whole.characters[i] for i in whole.tokens) == VERSE
    capped = demo.Corpus.read(verse, vocabulary=10)
    assert len(capped.characters) == 10
    assert {"，", "。", "\n", demo.UNKNOWN} <= set(capped.characters)
    spelled = "".join(capped.characters[i] for i in capped.tokens)
    assert all(a in (b, demo.UNKNOWN) for a, b in zip(spelled, VERSE))


def test_default_text_is_the_standard_library(demo):
    corpus = demo.Corpus.read(None, vocabulary=2048)
    assert len(corpus.tokens) > 1_000_000
    assert {"d", "e", "f", "_"} <= set(corpus.characters)


def test_one_weight_moves_by_one_ulp(demo):
    import torch

    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 4, 2)
    before = [w.clone() for w in lstm.parameters()]
    demo.move_by_one_ulp(lstm, demo.draw_weight(lstm, torch.Generator().manual_seed(0)))
    moved = [(a, b) for x, y in zip(before, lstm.parameters()) for a, b in zip(x.flatten(), y.flatten()) if a != b]
    assert len(moved) == 1
    before, after = moved[0]
    assert after == torch.nextafter(before, torch.tensor(torch.inf))


def run(demo, capsys, *arguments):
    code = demo.main(list(arguments))
    return code, capsys.readouterr().err


def test_missing_file(demo, capsys, tmp_path):
    code, error = run(demo, capsys, "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "none.txt" in error
    assert "No such file" in error


def test_text_is_a_folder(demo, capsys, tmp_path):
    code, error = run(demo, capsys, "--text", str(tmp_path))
    assert code == 2
    assert str(tmp_path) in error


def test_not_utf8(demo, capsys, tmp_path):
    path = tmp_path / "gbk.txt"
    path.write_bytes(VERSE.encode("gbk"))
    code, error = run(demo, capsys, "--text", str(path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "is not UTF-8 text" in error


def test_no_such_device(demo, capsys, verse, tmp_path):
    device = "toaster"
    code, error = run(
        demo, capsys, "--text", str(verse), "--out", str(tmp_path / "out"), "--length", "8", "--device", device
    )
    assert code == 2
    assert f"--device {device}: " in error
    assert "Traceback" not in error


@pytest.mark.parametrize("text", ["", "床前明月光"])
def test_too_short(demo, capsys, tmp_path, text):
    path = tmp_path / "short.txt"
    path.write_text(text, encoding="utf-8")
    code, error = run(demo, capsys, "--text", str(path), "--out", str(tmp_path / "out"), "--length", "8")
    assert code == 2
    assert f"has {len(text)} characters, but a window needs --length + 1 = 9" in error


@pytest.mark.parametrize("option", ["--steps", "--hidden", "--layers", "--vocabulary"])
def test_sizes_must_be_positive(demo, capsys, option):
    with pytest.raises(SystemExit) as stopped:
        demo.main([option, "0"])
    assert stopped.value.code == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err
