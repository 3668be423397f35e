"""Measurements on disk: a CSV row each, written so that a killed run loses none and doubles none."""

import csv
import io
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nobody looks for another run
    fcntl = None

import torch

import fusedrnn

from .problems import Problem


@dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured. Rows of two environments never share a table."""

    device: str
    torch: str
    cuda: str
    cudnn: str
    driver: str
    fusedrnn: str
    commit: str
    threads: int
    tf32: bool


@dataclass(frozen=True)
class Row(Environment):
    """One measurement; UNITS says in what.

    ``speedup`` is torch.nn's median of the same rounds (``baseline``) by ``median``; ``ratio1`` and ``ratio3`` are the
    quartiles of the quotient within a round. ``others`` are the CPUs that other programs took meanwhile, ``spoiled``
    says why the row is left out of means, if it is.
    ``status`` is ok, wrong (the correctness gate refused it, nothing was timed), failed or unavailable (the provider
    does not take this problem); ``why`` says more.
    ``peak_*`` are the machine's, for the roofline: operations and bytes a second, and where they come from.
    """

    suite: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    L: int
    D: int
    dtype: str
    mode: str
    provider: str
    version: str
    branch: str
    status: str
    median: float | None = None
    least: float | None = None
    quartile1: float | None = None
    quartile3: float | None = None
    rounds: int | None = None
    how: str = ""
    speedup: float | None = None
    ratio1: float | None = None
    ratio3: float | None = None
    baseline: float | None = None
    others: float | None = None
    spoiled: str = ""
    peak_bytes: int | None = None
    error: float | None = None
    allowed: float | None = None
    checked_steps: int | None = None
    why: str = ""
    time: str = ""
    clocks: str = ""
    load: str = ""
    peak_flops: float | None = None
    peak_bandwidth: float | None = None
    peaks_from: str = ""

    @property
    def key(self) -> tuple:
        """What makes a measurement the same measurement."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def environment(self) -> Environment:
        return Environment(*(getattr(self, f.name) for f in fields(Environment)))

    @property
    def problem(self) -> Problem:
        return Problem(self.suite, self.cell, self.T, self.B, self.I, self.H, self.L, self.D, self.dtype)


COLUMNS = [f.name for f in fields(Row)]
# What a number of a row is in; others are counts, sizes or words.
UNITS = {
    **dict.fromkeys(("median", "least", "quartile1", "quartile3", "baseline"), "seconds a call"),
    **dict.fromkeys(("speedup", "ratio1", "ratio3"), "torch.nn's time by this time"),
    "peak_bytes": "bytes",
    "others": "CPUs",
    "load": "processes that run or wait, mean of a minute (os.getloadavg)",
    **dict.fromkeys(("error", "allowed"), "of the largest entry of the tensor"),
    "peak_flops": "operations a second",
    "peak_bandwidth": "bytes a second",
    "time": "UTC",
    "clocks": "MHz",
}
_MEASURED = ("suite", "cell", "T", "B", "I", "H", "L", "D", "dtype", "mode", "provider", "version")
KEY = (*(f.name for f in fields(Environment)), *_MEASURED)
_TYPES = {f.name: f.type for f in fields(Row)}


def _parse(column: str, text: str):
    kind = _TYPES[column]
    if kind is bool:
        return text == "True"
    if kind is str:
        return text
    if text == "":
        return None
    return (int if "int" in str(kind) else float)(text)


def parse(text: str, path: Path) -> list[Row]:
    """The rows of a results.csv. Raises RuntimeError where it is none, or one of another version."""
    header, *lines = [*csv.reader(io.StringIO(text, newline=""))] or [[]]
    if header != COLUMNS:
        raise RuntimeError(
            f"{path} has other columns than this version writes: it is of another version, or no results.csv. "
            "To measure, take another folder (--out)"
        )
    return [Row(**{c: _parse(c, text) for c, text in zip(COLUMNS, line, strict=True)}) for line in lines]


class Results:
    """A folder's results.csv, open for one run at a time.

    Raises:
        RuntimeError: another run is writing there, or the file has other columns.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.csv"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise RuntimeError(f"another run is writing to {self.path}") from error
        try:
            self.rows = self._repair()
        except Exception:
            self.close()
            raise
        self.keys = {row.key for row in self.rows}

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def _repair(self) -> list[Row]:
        """All whole rows; what a killed run left of a line is cut off."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.ftruncate(self._file, len(whole))
        if not whole:
            self._write([COLUMNS])
            return []
        return parse(whole.decode(), self.path)

    def _write(self, lines: list[list]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        data = text.getvalue().encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def append(self, rows: list[Row]) -> None:
        """Writes rows that are not there yet, and waits until they are on the disk."""
        new = [row for row in {row.key: row for row in rows}.values() if row.key not in self.keys]
        self._write([["" if v is None else _one_line(v) for v in (getattr(r, c) for c in COLUMNS)] for r in new])
        self.rows += new
        self.keys |= {row.key for row in new}


def _one_line(value):
    return " ".join(value.split()) if isinstance(value, str) else value


def _output(*command: str, folder: Path | None = None, meanwhile: Callable = lambda: None) -> str:
    """What a command prints; nothing where it is missing or fails. ``meanwhile`` is called until it ends."""
    if shutil.which(command[0]) is None:
        return ""
    with tempfile.TemporaryFile("w+") as printed:
        running = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL, cwd=folder)
        while running.poll() is None:
            meanwhile()
            time.sleep(0.001)
        printed.seek(0)
        return printed.read().strip() if running.returncode == 0 else ""


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ; "installed" outside a checkout."""
    root = Path(fusedrnn.__file__).resolve().parents[1]
    found = (root / ".git").exists() and _output("git", "describe", "--always", "--dirty", "--abbrev=12", folder=root)
    return found or "installed"


def environment(device: torch.device, threads: int, tf32: bool) -> Environment:
    on_gpu = device.type == "cuda"
    capability = fusedrnn.build_info()["cpu_capability"] or "no extension"
    cpu = f"{cpu_model()}, {os.cpu_count()} CPUs, {capability}"
    driver = _of_card(device, "driver_version") if on_gpu else ""
    return Environment(
        torch.cuda.get_device_name(device) if on_gpu else cpu,
        torch.__version__,
        str((torch.version.cuda or torch.version.hip or "") if on_gpu else ""),
        str(torch.backends.cudnn.version() or "") if on_gpu else "",
        driver,
        fusedrnn.__version__,
        commit(),
        threads,
        tf32,
    )


def _of_card(device: torch.device, fields: str, meanwhile: Callable = lambda: None) -> str:
    """What nvidia-smi says of a card. It numbers all cards of the machine, and torch those that it may see: the UUID is
    the same.
    """
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    lines = _output("nvidia-smi", *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits", meanwhile=meanwhile)
    return lines.splitlines()[0] if lines else ""


def clocks(device: torch.device, meanwhile: Callable = lambda: None) -> str:
    """The clocks right now, in MHz: of the GPU's processors and memory, while it does something; of the first CPU."""
    if device.type == "cuda":

        def busy():
            meanwhile()
            torch.cuda.synchronize(device)

        found = _of_card(device, "clocks.sm,clocks.mem,clocks.max.sm", busy)
        return f"sm, memory, largest sm: {found}" if found else ""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("cpu MHz")), "")
