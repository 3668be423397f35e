"""Random malformed calls: each either works or raises; nothing crashes, nothing returns garbage shapes."""

import random
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import ops

ALLOWED = (TypeError, ValueError, RuntimeError)
CALLS = 200


def wrong_tensor(rng: random.Random, t):
    """``t`` with one thing wrong."""
    kind = rng.randrange(11)
    if not isinstance(t, torch.Tensor):
        return rng.choice([None, 3, "x", torch.zeros(2)])
    if kind == 0:
        return None
    if kind == 1:
        return t.to(
            rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
        )
    if kind == 2:
        return t.unsqueeze(rng.randrange(t.dim() + 1))
    if kind == 3:
        return t.flatten()
    if kind == 4 and t.dim():
        dim = rng.randrange(t.dim())
        return t.narrow(dim, 0, rng.randrange(t.shape[dim]))
    if kind == 5 and t.dim():
        return torch.cat([t, t], rng.randrange(t.dim()))
    if kind == 6:
        return torch.empty(t.shape, device="meta", dtype=t.dtype)
    if kind == 7:
        return t.transpose(0, -1) if t.dim() else t
    if kind == 8:
        return t.to_sparse() if t.dtype.is_floating_point else t
    if kind == 9:
        return t.tolist()
    return -t


def module_call(rng: random.Random) -> None:
    options = {
        "num_layers": rng.choice([1, 2]),
        "bidirectional": rng.random() < 0.3,
        "batch_first": rng.random() < 0.3,
        "proj_size": rng.choice([0, 2]),
        "backend": rng.choice([None, "reference"]),
    }
    lstm = fusedrnn.LSTM(3, 4, **options)
    lead = options["num_layers"] * (1 + options["bidirectional"])
    args = [torch.randn(5, 2, 3), torch.randn(lead, 2, options["proj_size"] or 4), torch.randn(lead, 2, 4)]
    if rng.random() < 0.3:
        sizes = [rng.randrange(-1, 4) for _ in range(rng.randrange(5))]
        args[0] = PackedSequence(torch.randn(rng.randrange(8), 3), torch.tensor(sizes, dtype=torch.int64))
    else:
        k = rng.randrange(3)
        args[k] = wrong_tensor(rng, args[k])
    y = lstm(args[0], (args[1], args[2]))[0]
    data = y.data if isinstance(y, PackedSequence) else y
    given = args[0].data if isinstance(args[0], PackedSequence) else args[0]
    if data.shape != (*given.shape[:-1], (options["proj_size"] or 4) * (1 + options["bidirectional"])):
        raise AssertionError(f"output {list(data.shape)} for input {list(given.shape)}")
    if data.requires_grad:
        data.float().sum().backward()


def op_call(rng: random.Random) -> None:
    backend = rng.choice(["cpu", "reference"])
    packed = rng.random() < 0.4
    sizes = torch.tensor([3, 2, 2]) if packed else None
    x = torch.randn(7, 4) if packed else torch.randn(3, 3, 4)
    tensors = [x, torch.randn(3, 5), torch.randn(3, 5), torch.randn(20, 4), torch.randn(20, 5), torch.randn(20)]
    tensors += [torch.randn(20), None]
    good = ["lstm", *tensors, sizes, None, rng.random() < 0.5, backend, "auto", True, True]
    if rng.random() < 0.5:
        k = rng.randrange(1, 11)
        good[k] = wrong_tensor(rng, good[k])
        if packed and rng.random() < 0.5:
            good[9] = torch.tensor(rng.choice([[3, 3, 1, 1], [2, 3, 2], [7], [], [3, 2, 1], [8, -1], [3, 2, 2, 0]]))
        ops.sequence(*good)
        return
    y, _, _, gates, cells = ops.sequence(*good)
    needs = [rng.random() < 0.5 for _ in range(rng.choice([8, 8, 8, 7]))]
    back = ["lstm", torch.randn_like(y), torch.randn(3, 5), torch.randn(3, 5), torch.randn_like(cells), *good[1:12]]
    back += [y, gates, cells, *good[12:14], needs]
    k = rng.choice([*range(1, 15), 16, 17, 18])
    back[k] = wrong_tensor(rng, back[k])
    ops.sequence_backward(*back)


def main() -> None:
    rng, raised = random.Random(7), 0
    for n in range(CALLS):
        call = module_call if n % 2 else op_call
        try:
            call(rng)
        except ALLOWED as error:
            raised += 1
            if not str(error):
                raise AssertionError(f"call {n} raised {type(error).__name__} without a message") from error
    print(f"{CALLS} calls, {raised} raised")


def test_malformed_calls_raise_and_never_crash():
    """In a process of its own, so that a crash is seen as one."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    raised = int(done.stdout.split("calls, ")[1].split()[0])
    assert raised > CALLS // 2


def test_a_backend_that_cannot_run_says_why():
    lstm = fusedrnn.LSTM(3, 4, device="meta")
    with fusedrnn.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for but cannot run: it takes CPU"):
        lstm(torch.zeros(2, 2, 3, device="meta"))


if __name__ == "__main__":
    main()
