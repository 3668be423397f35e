"""What the CPU kernels do with a problem: asked of the C++ that decides it."""

from dataclasses import dataclass, field

import torch

from fusedrnn import _build
from fusedrnn.cells import Cell

# Their numbers in torch, which never change.
_NUMBERS = {torch.int8: 1, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
# Where T is not known: as long as it takes for the beginning not to count.
_LONG = 1000
_GEMMS = {"kernel": "by the same kernel", "host": "by torch's GEMM before", "panels": "by a GEMM of ours before"}


@dataclass(frozen=True)
class Plan:
    """``capability``: the instruction set. ``by_rows``: each thread takes rows of the batch through all steps; else it
    takes units, and all wait for each other after a step. ``direct``: W_hh is read where it lies; else it is repacked
    to ``panel_bytes``, ``kept``: once, by freeze or quantize. ``quantized``: the dtype of weights of fewer bits,
    ``activations``: that of x and h, rounded at every step.
    ``tiles``: multiplied in the tile registers of AMX; ``digits``: in whole numbers, by AVX512-VNNI or AVX2.
    ``input_product`` and ``state_product`` tell who multiplies the rows of all steps by W_ih, and the states by W_hh:
    "kernel", "host" (torch's GEMM) or "panels" (ours). ``beside``: "directions" or "layers", if two of them are done at
    the same time, each by half of the threads, where no gradient is needed; else "".
    """

    algorithm: str
    capability: str
    threads: int
    by_rows: bool
    direct: bool
    tiles: bool
    digits: bool
    panel_bytes: int
    kept: bool
    quantized: torch.dtype | None
    activations: torch.dtype | None
    input_product: str
    state_product: str
    beside: str
    why: str = field(repr=False)


def plan_for(
    cell: Cell,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    steps: int | None = None,
    kept: bool = False,
    heads: int = 1,
    quantized: torch.dtype | None = None,
    activations: torch.dtype | None = None,
    directions: int = 1,
    layers: int = 1,
) -> Plan:
    """The plan of one direction of one layer; ``steps`` None: of a long sequence. ``kept``: its weights are packed."""
    sizes = (_NUMBERS[dtype], steps or _LONG, batch, input_size, hidden_size, proj_size, heads)
    more = (max(len(cell.states) - 2, 0), len(cell.parameters), len(cell.inputs))
    kept = kept and not backward
    if backward:  # then the weights are in float32
        quantized = activations = None
    of_weights = quantized and _NUMBERS[quantized], activations is not None
    found = _build._extension.plan(cell.name, *sizes, *more, kept, backward, *of_weights)
    if found["direct"]:
        found["panel_bytes"] = 0
    of = {"directions": found.pop("directions_beside") and directions > 1}
    of["layers"] = found.pop("layers_beside") and directions == 1 and layers > 1
    found["beside"] = next((name for name, there in of.items() if there and _build._small_calls is not None), "")
    why = _why(found, steps, kept, backward, quantized)
    if activations is not None:
        why = f"{why}; x and h rounded to {str(activations).removeprefix('torch.')}"
    return Plan("persistent", kept=kept, quantized=quantized, activations=activations, why=why, **found)


def _why(found: dict, steps: int | None, kept: bool, backward: bool, quantized: torch.dtype | None) -> str:
    threads, available = found["threads"], torch.get_num_threads()
    if threads > 1:
        shared = "take rows of the batch each, W_hh fits their caches" if found["by_rows"] else "take units each"
        who = f"{threads} threads {shared}"
    else:
        who = "one thread" + (f" of {available}, a step is too small to share" if available > 1 else "")
    size = f"{found['panel_bytes'] / 2**20:.2f} MiB"
    narrow = f" in {str(quantized).removeprefix('torch.')}" if quantized else ""
    if found["state_product"] != "kernel":
        weights = f"W_hh {_GEMMS[found['state_product']]}"
    elif found["direct"]:
        weights = f"W_hh read where it lies{narrow}: so few steps do not pay for packing it"
    else:
        when = f"once, by {'quantize' if quantized else 'freeze'}" if kept else "at each call"
        how = ", tiles" * found["tiles"] + ", in whole numbers" * found["digits"]
        weights = f"W_hh packed{narrow} {when} ({size}{how})"
    product = _GEMMS[found["input_product"]]
    if quantized and found["input_product"] != "kernel":
        product = f"in float32 {product}"
    inputs = f"dx and dW_ih {product.replace('before', 'behind')}" if backward else f"x W_ih^T {product}"
    if found["beside"]:
        two = "the two directions" if found["beside"] == "directions" else "two layers"
        who += f" ({two} at the same time where no gradient is needed, each by half of {available})"
    length = "" if steps else "; planned for a long sequence, steps= was not given"
    return f"{found['capability']}, {who}; {weights}; {inputs}{length}"
