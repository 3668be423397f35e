"""fusedrnn.compat.flashrnn against that package's own vanilla backend, and clipping against a loop by hand."""

import dataclasses

import pytest
import torch

import fusedrnn
from fusedrnn import _build, functional
from fusedrnn.backends.common import Inputs
from fusedrnn.compat import flashrnn as compat

B, T, N, D = 3, 5, 2, 6
SIZES = {"lstm": (4, 4, 4, 2), "slstm": (4, 4, 4, 4), "gru": (3, 3, 4, 1), "elman": (1, 1, 1, 1)}  # gates of W, R, b; S
FUNCTIONS = pytest.mark.parametrize("function", SIZES)


def draw(function, dtype=torch.float64, with_states=False):
    of_w, of_r, of_b, count = SIZES[function]
    given = [torch.randn(B, T, of_w, N, D), torch.randn(of_r, N, D, D) * D**-0.5, torch.randn(of_b, N, D)]
    if with_states:
        states = torch.randn(count, B, 1, N, D)
        if function == "slstm":
            states[2] = states[2].abs() + 1
        given.append(states)
    return [t.to(dtype).requires_grad_() for t in given]


def meant(function, states):
    """Of an sLSTM h and c / n, and of n and m the logarithm of what they stand for; of others all states."""
    return torch.stack([states[0], states[1] / states[2]]) if function == "slstm" else states


def gradients(function, outputs, given, weights):
    loss = sum((meant(function, o) * w).sum() for o, w in zip(outputs, weights))
    return torch.autograd.grad(loss, given)


@FUNCTIONS
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_vanilla(function, with_states, dtype):
    theirs = pytest.importorskip("flashrnn", reason="the package flashrnn 1.0.8 is not installed").flashrnn
    given = draw(function, dtype, with_states)
    exact = [t.detach().double().requires_grad_() for t in given]
    ours = compat.flashrnn(*given, function=function, backend="vanilla")
    # Its configuration knows no float64, which its operations take.
    config = fake_config(function)
    want = theirs(*exact, function=function, config=config, backend="vanilla")
    weights = [torch.randn_like(meant(function, o)) for o in want]
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    for got, exactly in zip(ours, want):
        assert got.dtype == dtype
        assert got.shape == exactly.shape
        torch.testing.assert_close(meant(function, got).double(), meant(function, exactly), **tolerance)
    mine = gradients(function, ours, given, [w.to(dtype) for w in weights])
    for got, exactly in zip(mine, gradients(function, want, exact, weights), strict=True):
        torch.testing.assert_close(got.double(), exactly, **tolerance)


def fake_config(function, **options):
    """Their configuration of these sizes, made for float32; vanilla computes in the dtype of its tensors."""
    theirs = pytest.importorskip("flashrnn", reason="the package flashrnn 1.0.8 is not installed")
    options = {"head_dim": D, "num_heads": N, "function": function, "backend": "vanilla", "dtype": "float32"} | options
    return theirs.FlashRNNConfig(**options)


@FUNCTIONS
def test_layouts(function):
    """Every layout gives what the first gives; a config is read by its fields alone."""
    given = draw(function, with_states=True)
    want, last = compat.flashrnn(*given, function=function)

    @dataclasses.dataclass
    class Config:
        function: str
        input_shape: str = "TBGHD"
        recurrent_shape: str = "HPGD"
        bias_shape: str = "HDG"
        output_shape: str = "STBHD"

    x, r, b, states = given
    turned = x.transpose(0, 1), r.permute(1, 3, 0, 2), b.permute(1, 2, 0), states.transpose(1, 2)
    every, end = compat.flashrnn(*turned, config=Config(function))
    torch.testing.assert_close(every.transpose(1, 2), want)
    torch.testing.assert_close(end.transpose(1, 2), last)
    torch.testing.assert_close(last, want[:, :, -1:])


def clipped_by_hand(function, given, wanted, clip, cut):
    """The gradients for ``wanted`` of every state [S, B, T, N, D]: step by step backwards, each by autograd alone."""
    x, r, b, states = (t.detach() for t in given)
    kind = compat._FUNCTIONS[function]
    r_of, b_u, b_x = r[list(kind.recurrent)], compat._of_gates(b, kind.bias), compat._of_gates(b, kind.bias_of_input)
    steps, now = [], [s.squeeze(1) for s in states]
    for t in range(T):
        steps.append(now)
        u = torch.einsum("bnp,gndp->gbnd", now[0], r_of) + b_u[:, None]
        now = kind.cell.step([*(x[:, t] + b_x).unbind(1)], [*u], now)
    d = [torch.zeros_like(s) for s in steps[0]]
    dx, dr, db_u, db_x = torch.zeros_like(x), torch.zeros_like(r_of), torch.zeros_like(b_u), torch.zeros_like(b_x)
    for t in reversed(range(T)):
        leaves = [s.clone().requires_grad_() for s in (steps[t][0], *steps[t], x[:, t], r_of, b_u, b_x)]
        h, *rest = leaves
        old, (xt, rt, but, bxt) = rest[: len(now)], rest[len(now) :]
        u = torch.einsum("bnp,gndp->gbnd", h, rt) + but[:, None]
        new = kind.cell.step([*(xt + bxt).unbind(1)], [*u], old)
        pairs = [(n, a + w) for n, a, w in zip(new, d, wanted[:, :, t]) if n.requires_grad]
        outputs, upstream = zip(*pairs)
        found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        through, *direct = (torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found))
        direct, (gx, gr, gbu, gbx) = direct[: len(now)], direct[len(now) :]
        through = torch.zeros_like(through) if cut else through.clamp(-clip, clip)
        d = [direct[0] + through, *direct[1:]]
        dx[:, t], dr, db_u, db_x = gx, dr + gr, db_u + gbu, db_x + gbx
    back = torch.zeros_like(r).index_add(0, torch.tensor(kind.recurrent), dr)
    db = torch.zeros_like(b)
    for gates, grad in ((kind.bias, db_u), (kind.bias_of_input, db_x)):
        for gate, g in zip(gates, grad):
            if gate >= 0:
                db[gate] += g
    return dx, back, db, torch.stack(d).unsqueeze(2)


@FUNCTIONS
@pytest.mark.parametrize("clip, cut", [(0.05, False), (None, True)])
def test_clipping(function, clip, cut):
    given = draw(function, with_states=True)

    @dataclasses.dataclass
    class Config:
        function: str
        gradient_recurrent_clipval: float | None = clip
        gradient_recurrent_cut: bool = cut

    every, _ = compat.flashrnn(*given, config=Config(function))
    torch.testing.assert_close(every, compat.flashrnn(*given, function=function)[0])
    wanted = torch.randn_like(every)
    got = torch.autograd.grad(every, given, wanted, allow_unused=True, materialize_grads=True)
    for a, exact in zip(got, clipped_by_hand(function, given, wanted, clip, cut), strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-10, atol=1e-12)
    plain = torch.autograd.grad(compat.flashrnn(*given, function=function)[0], given, wanted)
    assert not torch.allclose(plain[1], got[1]), "nothing was clipped"


@FUNCTIONS
def test_initial_values(function):
    given, count = draw(function), SIZES[function][3]

    @dataclasses.dataclass
    class Config:
        function: str
        initial_val: object

    values = [0.5, -0.2, 1.5, 0.1][:count]
    states = torch.stack([torch.full((B, 1, N, D), v, dtype=torch.float64) for v in values])
    want = compat.flashrnn(*given, states, function=function)[0]
    torch.testing.assert_close(compat.flashrnn(*given, config=Config(function, values))[0], want)


def test_no_loop_runs():
    """The package's function is one call of a fused kernel."""
    given = draw("slstm", torch.float32)
    with torch.profiler.profile() as seen:
        compat.flashrnn(*given, function="slstm")
    names = [event.name for event in seen.events()]
    assert names.count("fusedrnn::sequence") <= 1
    assert "aten::bmm" not in names
    with fusedrnn.backend("reference"):
        torch.testing.assert_close(
            compat.flashrnn(*given, function="slstm")[0][0], compat.flashrnn(*given, function="slstm")[0][0]
        )


@FUNCTIONS
def test_the_product_is_taken_as_it_comes(function):
    """By the op, w_ih having no columns: as with an identity for w_ih."""
    kind, (of_w, _, _, count) = compat._FUNCTIONS[function], SIZES[function]
    cell, heads, H = kind.cell.cell, 2, N * D
    x = torch.randn(70, B, of_w * H, dtype=torch.float64)
    states = [torch.rand(B, H, dtype=torch.float64) + 1 for _ in range(count)]
    w_hh, b_ih, b_hh = torch.randn(of_w * H, D), torch.randn(of_w * H), torch.randn(of_w * H)
    weights = [t.double() / 4 for t in (w_hh, b_ih, b_hh)]
    found = []
    for w_ih in (torch.zeros(of_w * H, 0, dtype=torch.float64), torch.eye(of_w * H, dtype=torch.float64)):
        for backend in ("cpu", "reference") if _build.loaded() else ("reference",):
            leaves = [t.clone().requires_grad_() for t in (x, *states, *weights)]
            h0, c0, *others = (*leaves[1 : 1 + count], None)[: max(count, 2)]
            given = Inputs(
                leaves[0], h0, c0, w_ih.clone().requires_grad_(), *leaves[1 + count :], None, None, None, True,
                tuple(others), (), (), heads,
            )  # fmt: skip
            y, finals, _ = functional.recurrence_of_states(cell, given, backend, "auto")
            first = torch.autograd.grad(y.sin().sum(), [*leaves, given.w_ih], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first[:1]), leaves, allow_unused=True)
            found.append([y, *finals[:count], *first[:-1], *(g for g in second if g is not None)])
            assert first[-1].shape == w_ih.shape
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with pytest.raises(RuntimeError, match="it multiplies x by w_ih, and w_ih has no columns"):
        functional.recurrence_of_states(cell, given._replace(w_ih=w_ih[:, :0]), "triton", "step")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the simulator has CPU tensors, this machine a GPU")
@FUNCTIONS
def test_on_triton(function):
    pytest.importorskip("triton")
    given = draw(function, torch.float32)
    want, _ = compat.flashrnn(*given, function=function)
    with fusedrnn.backend("triton", "step"):
        got, _ = compat.flashrnn(*given, function=function)
    weights = torch.randn_like(want[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad((t[0] * weights).sum(), given) for t in (want, got)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"function": "mlstm"}, "function must be one of lstm, slstm, gru, elman, got 'mlstm'"),
        ({"backend": "metal"}, "backend must be one of vanilla"),
        ({"R": torch.zeros(4, N, D, D + 1)}, r"R of function 'lstm' must be \[4, 2, 6, 6\] \(GHDP\)"),
        ({"b": torch.zeros(3, N, D)}, r"b of function 'lstm' must be \[4, 2, 6\]"),
        ({"Wx": torch.zeros(T, 4, N, D)}, "Wx must have 5 dimensions, BTGHD"),
        ({"states": torch.zeros(4, B, 1, N, D)}, r"states must be \[2, 3, 1, 2, 6\]"),
        ({"config": type("C", (), {"forward_clipval": 1.0})()}, "forward_clipval is not supported"),
        ({"config": type("C", (), {"input_shape": "BTGXD"})()}, "layout of Wx must be made of the letters TBGHD"),
    ],
)
def test_errors(change, message):
    given = dict(zip(("Wx", "R", "b"), draw("lstm")))
    with pytest.raises(ValueError, match=message):
        compat.flashrnn(**given | change)
