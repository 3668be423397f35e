"""docs/writing-a-cell.md: its blocks fit this tree; a copy that they are applied to builds, passes and runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptxsim.build import cache_dir, cuda_home

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "writing-a-cell.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, language
    return found


def apply(folder: Path) -> dict[Path, str]:
    """The files of the page's diffs, as the diffs leave them. Every hunk has one place in its file."""
    changed = {}
    for block in blocks("diff"):
        first, _, body = block.partition("\n")
        path = folder / first.removeprefix("--- ")
        text = changed.get(path) or path.read_text()
        for hunk in body.split("@@\n"):
            old, new = (
                "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in kinds) for kinds in (" -", " +")
            )
            assert old.strip(), hunk
            assert old != new, hunk
            # A hunk may begin and end inside a line of the file.
            old, new = (old, new) if f"\n{old}" in text else (old.rstrip("\n"), new.rstrip("\n"))
            assert text.count(old) == 1, f"{path.name} holds {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        changed[path] = text
    return changed


def test_the_blocks_fit_the_tree():
    changed = apply(ROOT)
    assert {path.parent.name for path in changed} == {"fusedrnn", "kernels", "csrc"}
    for path, text in changed.items():
        assert "mgu" in text.lower(), path
        if path.suffix == ".py":
            compile(text, str(path), "exec")


@pytest.mark.slow
def test_the_cell_of_the_page_runs_everywhere(checkout):
    """Builds the copy for the plainest instruction set: the source is the same for all."""
    if cuda_home() is None:
        pytest.skip("no nvcc: the cell of docs/writing-a-cell.md is not tried in the simulated CUDA kernels")
    for path, text in apply(checkout).items():
        path.write_text(text)
    setup = (checkout / "setup.py").read_text()
    assert setup.count('("portable", "avx2", "avx512", "amx")') == 1
    (checkout / "setup.py").write_text(setup.replace('("portable", "avx2", "avx512", "amx")', '("portable",)'))
    (checkout / "fusedrnn" / "kernels").symlink_to("../kernels")

    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "FUSEDRNN_CUDA": "0",
        "FUSEDRNN_SIMULATE": str(checkout / "tests" / "ptxsim"),
        "PTXSIM_CACHE": str(cache_dir()),
    }

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    python("setup.py", "build_ext", "--inplace")
    suite = python("-m", "pytest", "-q", "-m", "not slow", "tests/test_recurrence.py", "-k", "mgu")
    # 8 problems for 28 pairs of algorithm and arithmetic at least; none may be left out.
    passed = re.search(r"^(\d+) passed, \d+ deselected in", suite, re.MULTILINE)
    assert passed, suite
    assert int(passed.group(1)) >= 8 * 28
    for block in blocks("python"):
        python("-c", f"import fusedrnn; assert fusedrnn.__file__.startswith({str(checkout)!r})\n{block}")
