"""Whether every link and picture of the documentation leads somewhere in this project: `make lint`.

Addresses of the web are not asked for; they must be https.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)|^```\{(?:figure|include)\} (\S+)", re.MULTILINE)


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("README.md")]


def anchors(page: Path) -> set[str]:
    """The names that GitHub and MyST give to headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken(page: Path) -> list[str]:
    """What leads nowhere, in words."""
    found = []
    text = re.sub(r"^```(?!\{(?:figure|include)).*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in ("".join(parts) for parts in LINK.findall(text)):
        address, _, anchor = link.partition("#")
        if address.startswith("https://"):
            continue
        target = page if not address else page.parent / address
        if not target.exists():
            found.append(f"{page.relative_to(ROOT)}: {link} is not there")
        elif anchor and anchor not in anchors(target):
            found.append(f"{page.relative_to(ROOT)}: {address} has no heading #{anchor}")
    return found


if __name__ == "__main__":
    problems = [problem for page in pages() for problem in broken(page)]
    print("\n".join(problems) or "all links lead somewhere")
    sys.exit(bool(problems))
