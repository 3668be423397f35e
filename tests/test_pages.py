"""The pages: their Python runs, links lead somewhere, pictures and numbers are those of benchmarks/history."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn.benchmarks import keep
from fusedrnn.benchmarks.results import Results

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks() -> list:
    found = []
    for page in PAGES:
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S), 1):
            found.append(pytest.param(block, id=f"{page.stem}-{number}"))
    return found


@pytest.mark.parametrize("block", blocks())
def test_a_block_runs_as_it_stands(block, tmp_path, monkeypatch):
    """Each alone, as somebody would paste it."""
    needed = {"onnx": ("onnx", "onnxscript"), "plots": ("matplotlib",)}
    for word, packages in needed.items():
        for package in packages if word in block else ():
            pytest.importorskip(package, reason=f"no {package}: a block of the documentation is not run")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_every_page_is_found_and_every_link_leads_somewhere():
    links = load("links")
    assert [problem for page in links.pages() for problem in links.broken(page)] == []
    linked = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        if page.name not in ("index.md", "works.md"):
            assert re.search(rf"^{page.stem}$", linked, re.M), f"{page.name} is in no toctree"


def test_a_broken_link_is_seen(tmp_path, monkeypatch):
    links = load("links")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("# One heading, `two` words\n")
    page.write_text(
        "[x](b.md) [x](b.md#one-heading-two-words) [x](c.md) [x](b.md#none) ![x](c.svg) [x](https://a.b)\n"
        "```text\n[x](d.md)\n```\n```{figure} e.svg\n:alt: e\n```\n"
    )
    assert links.broken(page) == [
        f"a.md: {what}" for what in
        ("c.md is not there", "b.md has no heading #none", "c.svg is not there", "e.svg is not there")
    ]  # fmt: skip


def test_the_readme_says_what_the_pages_say():
    readme = (ROOT / "README.md").read_text()
    flat = " ".join(readme.split())
    assert keep.sentence(keep.read()) in flat
    assert (DOCS / "works.md").read_text().strip() in readme
    install = (DOCS / "install.md").read_text()
    short = install.split("<!-- short -->")[1].split("<!-- end -->")[0].strip()
    assert short in readme
    assert len(readme.splitlines()) < 130


def test_the_readmes_small_calls_are_those_of_the_page():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| \w+.*, H=\d+ \|", line)]
    assert len(rows) == 6
    assert set(rows) < set((DOCS / "benchmarks.md").read_text().splitlines())


def test_the_readmes_model_is_that_of_the_page():
    flat = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(r"model of an H100 .*? \(bfloat16, (H=\d+), (B=\d+)\) takes (.*?) us \(L2: (.*?) us\)", flat)
    lines = (DOCS / "kernels.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| kernel, bfloat16 | R 0.15"))
    row = next(line for line in lines[head:] if line.startswith(f"| forward {said[2]} {said[1]} |"))
    assert re.findall(r"\d\.\d+", said[3]) == re.findall(r"\d\.\d+", row)[:3]
    assert re.findall(r"\d\.\d+", said[4]) == re.findall(r"R (\d\.\d+)", lines[head])


def test_the_readme_can_be_read_on_pypi():
    """torch's range is the package's."""
    low = fusedrnn.build_info()["torch_supported"].removeprefix(">=").split(",")[0]
    assert f"torch {low} or later" in (DOCS / "install.md").read_text()


def words(svg: str) -> list[str]:
    return sorted(re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S))


def test_pictures_are_those_that_the_script_draws():
    pytest.importorskip("matplotlib", reason="no matplotlib: that docs/images are up to date is not checked")
    for name, text in load("draw").drawn().items():
        kept = (DOCS / "images" / name).read_text()
        assert words(kept) == words(text), f"docs/images/{name} is not what docs/draw.py draws: make pictures"
        assert len(words(kept)) > 5


def test_the_tables_are_those_of_the_history():
    kept = keep.read()
    lines = keep.table(kept)
    assert "\n".join(lines) in (DOCS / "benchmarks.md").read_text()
    last = [k for k in keep.of_last_release(kept) if (k.provider, k.dtype) == ("fusedrnn", "float32")]
    assert [float(line.split("**")[1]) for line in lines[2:]] == pytest.approx(
        [k.ratio for k in sorted(last, key=lambda k: lines.index(line_of(k, lines)))], abs=0.0051
    )
    for page in (ROOT / "README.md", DOCS / "index.md"):
        assert keep.caption(kept) in " ".join(page.read_text().split())
    machines = re.findall(r"^\| `(.*?)` \| (.*?), torch", (DOCS / "history.md").read_text(), re.M)
    assert dict(machines) == {m: keep.MACHINES[m] for m in {k.machine for k in kept}}


def line_of(kept: keep.Kept, lines: list[str]) -> str:
    what = f"| {keep.CELL_NAMES[kept.cell]} {keep.MODE_NAMES[kept.mode]} {kept.H}/{kept.B}/{kept.T} |"
    return next(line for line in lines if line.startswith(what))


def test_keeping_a_run(tmp_path, capsys):
    from test_bench import a_row

    spoiled = a_row(H=512, I=512, provider="fusedrnn", spoiled="a test")
    with Results(tmp_path) as written:
        written.append([a_row(), a_row(provider="fusedrnn", median=5.123456e-4, speedup=1.9518), spoiled])
    command = [str(tmp_path / "results.csv"), "--machine", "a-machine", "--folder", str(tmp_path)]
    assert keep.main(command) == 0
    path = tmp_path / "0.1.0-a-machine.csv"
    assert capsys.readouterr().out.strip() == str(path)
    (tmp_path / "results.csv").rename(tmp_path / "other")
    base, ours = keep.read(tmp_path)
    assert (base.provider, base.seconds, base.ratio) == ("torch.nn", 1e-3, 1.0)
    assert (ours.provider, ours.seconds, ours.ratio, ours.machine, ours.T) == (
        "fusedrnn",
        5.123e-4,
        1.952,
        "a-machine",
        64,
    )
    assert ours.problem == a_row().problem
    assert keep.main(command) == 2
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="got no times"):
        keep.write([], tmp_path)


def test_messages_that_the_faq_explains():
    """What stands in docs/faq.md is what the user sees."""
    page = (DOCS / "faq.md").read_text()
    with pytest.raises(TypeError) as raised:
        fusedrnn.plan(torch.nn.LSTM(3, 4), 8)
    assert str(raised.value).split(":")[0] in page
    with pytest.raises(ValueError) as raised:
        fusedrnn.LSTM(3, 4)(torch.randn(5, 2, 3, dtype=torch.float16))
    assert str(raised.value).split(".")[0].split(" (")[0] in page
    with pytest.warns(RuntimeWarning) as seen:
        fusedrnn.backend("reference")
    assert str(seen[0].message).split(":")[0] in page


def test_addresses_have_one_place():
    assert re.search(r"^\[project\.urls\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert '"Source" in urls' in (DOCS / "conf.py").read_text()
