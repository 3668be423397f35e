"""Who is measured: a table of names, each of which makes a call out of a problem, or says in words why it cannot.

Everybody gets the same weights and the same input, includes the product of the input with W_ih, and gives the same
tensors back: y (and h_n, c_n) in inference; y, the gradient of x, and those of all parameters in a training step.
"""

import functools
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import planning
from fusedrnn.ops import BACKEND_ALGORITHMS

from .problems import GATES, Problem

BASELINE = "torch.nn"
COMPILED_STEPS = 64
_MODULE = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


class UnavailableError(Exception):
    """A provider cannot run a problem here; the message says why."""


@dataclass(frozen=True)
class Given:
    """What every provider starts from, on the device that is measured."""

    problem: Problem
    state: dict[str, Tensor]
    x: Tensor
    dy: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    def weights(self) -> list[Tensor]:
        """w_ih, w_hh, b_ih, b_hh for each layer and direction."""
        return list(self.state.values())


@dataclass(frozen=True)
class Runnable:
    """One call of a provider, and which of its ways it takes, as far as that is known."""

    run: Callable[[], list]
    branch: str


@dataclass(frozen=True)
class Provider:
    """``why_not(device)`` is None or what is missing; ``make(given, mode)`` raises UnavailableError."""

    name: str
    package: str
    why_not: Callable[[torch.device], str | None]
    make: Callable[[Given, str], Runnable]

    @functools.cache  # noqa: B019 - as many as there are providers
    def version(self) -> str:
        if self.package == "fusedrnn":
            return fusedrnn.__version__
        return importlib.metadata.version(self.package)


def draw(problem: Problem, device: torch.device) -> Given:
    """Weights as torch.nn draws them, x and the gradient of y from a normal distribution; the same at every call.

    rnn_relu's weights are divided by 8 and its biases are 1 and -1 by turns, so that no sum rounds across the kink,
    where two right answers have different gradients.
    """
    dtype = getattr(torch, problem.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {k: w.detach() for k, w in _module(nn, problem).state_dict().items()}
        x = torch.randn(problem.T, problem.B, problem.I)
        dy = torch.randn(problem.T, problem.B, problem.D * problem.H)
    if problem.cell == "rnn_relu":
        for name, weight in state.items():
            if name.startswith("bias_ih"):
                weight.copy_(torch.arange(len(weight)) % 2 * 2.0 - 1.0)
            elif name.startswith("weight"):
                weight.mul_(0.125)
    moved = {name: weight.to(device, dtype) for name, weight in state.items()}
    return Given(problem, moved, x.to(device, dtype), dy.to(device, dtype))


def _module(package, problem: Problem, cell: bool = False, **options) -> nn.Module:
    """The layer of torch.nn or of fusedrnn for a problem; with ``cell`` its Cell."""
    if problem.cell.startswith("rnn"):
        options["nonlinearity"] = problem.cell.removeprefix("rnn_")
    cls = getattr(package, _MODULE[problem.cell] + ("Cell" if cell else ""))
    if cell:
        return cls(problem.I, problem.H, **options)
    return cls(problem.I, problem.H, problem.L, bidirectional=problem.D == 2, **options)


def _loaded(package, given: Given, cell: bool, **options) -> nn.Module:
    with torch.device("meta"):
        layer = _module(package, given.problem, cell, **options)
    state = {name.removesuffix("_l0"): w for name, w in given.state.items()} if cell else given.state
    layer = layer.to_empty(device=given.device).to(given.x.dtype)
    layer.load_state_dict(state)
    return layer


def _flat(outputs) -> list[Tensor]:
    return [t for o in outputs for t in (o if isinstance(o, tuple) else (o,))]


def _inference(call: Callable[[], tuple]) -> Callable[[], list]:
    def run():
        with torch.no_grad():
            return _flat(call())

    return run


def training_step(layer: Callable, parameters: list[Tensor], given: Given) -> Callable[[], list]:
    """Forward, and the gradients of x and of every parameter for the given gradient of y."""
    x = given.x.detach().requires_grad_()

    def run():
        y = layer(x)[0]
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], given.dy)]

    return run


def _module_call(package, given: Given, mode: str, **options) -> tuple[nn.Module, Callable[[], list]]:
    """A module of torch.nn or of fusedrnn in one mode; one step of one layer is its Cell."""
    cell = mode == "latency" and given.problem.L == given.problem.D == 1
    layer = _loaded(package, given, cell, **options)
    if mode in ("train", "memory"):
        return layer, training_step(layer, list(layer.parameters()), given)
    if not cell:
        return layer, _inference(lambda: layer(given.x))
    x, h = given.x[0], given.x.new_zeros(given.problem.B, given.problem.H)
    if given.problem.cell == "lstm":
        return layer, _inference(lambda: layer(x, (h, h)))
    return layer, _inference(lambda: (layer(x, h),))


def cudnn_branch(
    problem: Problem, capability: tuple[int, int], processors: int, backward: bool = False, version: int = 91300
) -> str:
    """The algorithm that PyTorch asks cuDNN for (get_algo in aten/src/ATen/native/cudnn/RNN.cpp), unpacked input.

    bfloat16 goes to cuDNN from 9.13 on compute capability 8.0 or later, and else to ATen's loop.
    """
    simple = problem.cell.startswith("rnn")
    if problem.dtype == "bfloat16" and (version < 91300 or capability < (8, 0)):
        return "ATen loop"
    most = (256 if simple else 128) if backward else (384 if simple else 192)
    if problem.dtype != "float64" and capability >= (6, 0) and most >= problem.H:
        return "cuDNN persist_static_small_h"
    whole = problem.L == problem.D == 1 and problem.H <= 1024 and problem.H % 128 == 0 and problem.I % 128 == 0
    if problem.dtype == "float16" and whole and _persistent(problem, capability, processors):
        return "cuDNN persist_static"
    return "cuDNN standard"


def _persistent(problem: Problem, capability: tuple[int, int], processors: int) -> bool:
    """What PyTorch knows of devices on which cuDNN's persistent kernels pay."""
    B, T = problem.B, problem.T
    if capability[0] == 7:
        rows = (B % 16 == 0 and B not in (80, 112)) or B == 8
        return capability[1] != 5 and rows and any(t <= T and b >= B for t, b in ((40, 128), (20, 96), (10, 32)))
    if capability[0] < 8 or processors < 98 or capability[1] == 6 or problem.cell == "gru":
        return False
    return B % 8 == 0 and B <= 128 and (problem.cell == "lstm" or B < 96 or problem.H < 896)


def torch_branch(problem: Problem, mode: str, device: torch.device) -> str:
    """Which way torch.nn takes, as its dispatch (aten/src/ATen/native/RNN.cpp) chooses it."""
    grad = mode in ("train", "memory")
    if mode == "latency" and problem.L == problem.D == 1:
        return (
            "Cell: ATen, fused gates" if device.type == "cuda" and not problem.cell.startswith("rnn") else "Cell: ATen"
        )
    if device.type == "cuda":
        if not torch.backends.cudnn.is_available() or torch.version.hip:
            return "MIOpen or ATen loop" if torch.version.hip else "ATen loop"
        facts = torch.cuda.get_device_properties(device)
        about = ((facts.major, facts.minor), facts.multi_processor_count)
        forward, backward = (cudnn_branch(problem, *about, b, torch.backends.cudnn.version()) for b in (False, True))
        return f"{forward}; backward {backward}" if grad and forward != backward else forward
    onednn = problem.cell == "lstm" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if problem.dtype == "bfloat16":
        onednn = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif problem.dtype == "float16":
        onednn = onednn and not grad and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else:
        onednn = onednn and problem.dtype == "float32"
    return "oneDNN" if onednn else "ATen loop"


def make_torch(given: Given, mode: str) -> Runnable:
    return Runnable(_module_call(nn, given, mode)[1], torch_branch(given.problem, mode, given.device))


def _needs_cudnn(on: torch.device) -> str | None:
    if on.type != "cuda" or torch.version.hip or not torch.backends.cudnn.is_available():
        return f"it is another way to cuDNN, measured is {on.type}"
    return None


def _only_bfloat16(given: Given, mode: str) -> None:
    if given.problem.dtype != "bfloat16":
        raise UnavailableError(f"it is what bfloat16 is compared with, the problem is {given.problem.dtype}")
    if mode == "latency" and given.problem.L == given.problem.D == 1:
        raise UnavailableError("a Cell of torch.nn does not go to cuDNN")


def flatten_weights(layer: nn.RNNBase) -> None:
    """What flatten_parameters does, also in bfloat16: torch leaves that out of CUDNN_TENSOR_DTYPES, so that its layers
    copy their weights into one buffer at every call.
    """
    from torch.backends.cudnn import rnn

    with torch.no_grad(), torch.cuda.device_of(layer._flat_weights[0]):
        torch._cudnn_rnn_flatten_weight(
            layer._flat_weights, 4, layer.input_size, rnn.get_cudnn_mode(layer.mode), layer.hidden_size, 0,
            layer.num_layers, layer.batch_first, bool(layer.bidirectional),
        )  # fmt: skip


def _make_flattened(given: Given, mode: str) -> Runnable:
    """cuDNN without the copy of its weights at every call."""
    _only_bfloat16(given, mode)
    layer, run = _module_call(nn, given, mode)
    flatten_weights(layer)
    return Runnable(run, f"{torch_branch(given.problem, mode, given.device)}, weights in one buffer")


def _make_in_float16(given: Given, mode: str) -> Runnable:
    """The same layer in float16, for which cuDNN has kernels that it has not for bfloat16."""
    _only_bfloat16(given, mode)
    state = {name: w.half() for name, w in given.state.items()}
    return make_torch(Given(replace(given.problem, dtype="float16"), state, given.x.half(), given.dy.half()), mode)


def _make_ours(backend: str | None, algorithm: str | None, **options) -> Callable[[Given, str], Runnable]:
    def make(given: Given, mode: str) -> Runnable:
        if options and mode == "latency":
            raise UnavailableError("a Cell has no such option")
        try:
            layer, run = _module_call(fusedrnn, given, mode, backend=backend, algorithm=algorithm, **options)
            plan = fusedrnn.plan(layer, given.problem.B)
            timed = fusedrnn.plan(layer, given.problem.B, steps=given.problem.T, backward=mode in ("train", "memory"))
            plan = timed if timed.timed else plan
        except (RuntimeError, NotImplementedError) as error:
            if backend is None:
                raise
            raise UnavailableError(str(error).splitlines()[0]) from error
        return Runnable(run, plan.backend if plan.algorithm == "auto" else f"{plan.backend} {plan.algorithm}")

    return make


def _make_frozen(given: Given, mode: str) -> Runnable:
    """Weights packed once, as the sessions of ONNX Runtime and OpenVINO have them."""
    _inference_only("a frozen layer", given, mode)
    layer, run = _module_call(fusedrnn, given, mode)
    fusedrnn.freeze(layer)
    return Runnable(run, "cpu, frozen")


def _make_stream(given: Given, mode: str) -> Runnable:
    """One step of a stream, which goes on from the states of the last; only y can be compared, of the first step."""
    if mode != "latency":
        raise UnavailableError("a stream is measured step by step")
    if given.problem.D > 1:
        raise UnavailableError("a stream goes one way")
    stream = _loaded(fusedrnn, given, cell=False).eval().stream(given.problem.B)
    x, others = given.x[0].contiguous(), [None] * (2 if given.problem.cell == "lstm" else 1)
    if given.problem.L == 1:
        return Runnable(lambda: [stream(x), *others[1:]], "cpu, stream")
    return Runnable(lambda: [stream(x).unsqueeze(0), *others], "cpu, stream")


def _make_in_float32(given: Given, mode: str) -> Runnable:
    """The same layer with the same numbers in float32: what 16 bits are to be compared with."""
    if given.problem.dtype not in ("bfloat16", "float16"):
        raise UnavailableError(f"it is what 16 bits are compared with, the problem is {given.problem.dtype}")
    state = {name: w.float() for name, w in given.state.items()}
    wide = Given(replace(given.problem, dtype="float32"), state, given.x.float(), given.dy.float())
    return _make_ours(None, None)(wide, mode)


def cell_loop(problem: Problem, weights: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The layer written out with plain torch operations in the dtype of x: y, h_n and, for the LSTM, c_n."""
    lstm, gates, finals = problem.cell == "lstm", GATES[problem.cell], []
    act = torch.relu if problem.cell == "rnn_relu" else torch.tanh
    for layer in range(problem.L):
        outputs = []
        for direction in range(problem.D):
            k = 4 * (layer * problem.D + direction)
            w_ih, w_hh, b_ih, b_hh = weights[k : k + 4]
            inputs = nn.functional.linear(x, w_ih, b_ih)
            h = c = x.new_zeros(problem.B, problem.H)
            ys = []
            for t in range(problem.T)[:: -1 if direction else 1]:
                sums = nn.functional.linear(h, w_hh, b_hh)
                if lstm:
                    i, f, g, o = (inputs[t] + sums).chunk(gates, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                elif problem.cell == "gru":
                    (xr, xz, xn), (hr, hz, hn) = inputs[t].chunk(gates, 1), sums.chunk(gates, 1)
                    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
                    n = (xn + r * hn).tanh()
                    h = n + z * (h - n)
                else:
                    h = act(inputs[t] + sums)
                ys.append(h)
            outputs.append(torch.stack(ys[:: -1 if direction else 1]))
            finals.append((h, c))
        x = torch.cat(outputs, -1) if problem.D == 2 else outputs[0]
    h_n, c_n = (torch.stack(states) for states in zip(*finals))
    return (x, h_n, c_n) if lstm else (x, h_n)


def loop_call(given: Given, mode: str, layer: Callable | None = None) -> Callable[[], list]:
    """A call of :func:`cell_loop` (or of ``layer``, made of it) in one mode."""
    problem, weights = given.problem, [w.detach().requires_grad_() for w in given.weights()]
    layer = layer or (lambda x, *weights: cell_loop(problem, list(weights), x))
    if mode in ("train", "memory"):
        return training_step(lambda x: layer(x, *weights), weights, given)
    squeeze = mode == "latency" and problem.L == problem.D == 1

    def run():
        outputs = layer(given.x, *weights)
        return tuple(t[0] for t in outputs[1:]) if squeeze else outputs

    return _inference(run)


def _make_loop(given: Given, mode: str) -> Runnable:
    return Runnable(loop_call(given, mode), "plain torch operations")


def _make_compiled(given: Given, mode: str) -> Runnable:
    problem = given.problem
    if problem.T > COMPILED_STEPS:
        raise UnavailableError(f"the loop is unrolled and compiles for minutes: only up to T={COMPILED_STEPS}")
    torch._dynamo.reset()
    layer = torch.compile(lambda x, *weights: cell_loop(problem, list(weights), x), fullgraph=True, dynamic=False)
    return Runnable(loop_call(given, mode, layer), "inductor, unrolled")


def _inference_only(name: str, given: Given, mode: str) -> None:
    if mode in ("train", "memory"):
        raise UnavailableError(f"{name} is for inference only")
    if given.problem.dtype != "float32":
        raise UnavailableError(f"{name} is taken in float32 only, the problem is {given.problem.dtype}")


def onnx_model(given: Given) -> bytes:
    """The layer as an ONNX graph of one node a layer; outputs y, h_n and, for the LSTM, c_n. Gates in ONNX's order."""
    from onnx import TensorProto, helper, numpy_helper

    problem, H = given.problem, given.problem.H
    order = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}.get(problem.cell, (0,))
    nodes, constants, weights = [], [], [w.detach().cpu().float() for w in given.weights()]

    def constant(name: str, t: Tensor) -> str:
        constants.append(numpy_helper.from_array(t.numpy(), name))
        return name

    def rows(w: Tensor) -> Tensor:
        return torch.cat([w[g * H : (g + 1) * H] for g in order])

    options = {"hidden_size": H, "direction": "bidirectional" if problem.D == 2 else "forward"}
    if problem.cell == "gru":
        options["linear_before_reset"] = 1
    elif problem.cell != "lstm":
        options["activations"] = [problem.cell.removeprefix("rnn_").capitalize()] * problem.D
    constants.append(numpy_helper.from_array(torch.tensor([0, 0, -1]).numpy(), "flat"))
    x, finals = "x", [[], []]
    for layer in range(problem.L):
        k = 4 * layer * problem.D
        parts = [weights[k + 4 * d : k + 4 * d + 4] for d in range(problem.D)]
        names = [
            x,
            constant(f"W{layer}", torch.stack([rows(p[0]) for p in parts])),
            constant(f"R{layer}", torch.stack([rows(p[1]) for p in parts])),
            constant(f"B{layer}", torch.stack([torch.cat([rows(p[2]), rows(p[3])]) for p in parts])),
        ]
        states = [f"{s}{layer}" for s in ("h", "c")[: 1 + (problem.cell == "lstm")]]
        kind = _MODULE[problem.cell]
        nodes.append(helper.make_node(kind, names, [f"Y{layer}", *states], **options))
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
        x = "y" if layer == problem.L - 1 else f"y{layer}"
        nodes.append(helper.make_node("Reshape", [f"t{layer}", "flat"], [x]))
        for names, state in zip(finals, states):
            names.append(state)
    outputs = ["y"]
    for name, states in zip(("h_n", "c_n"), finals):
        if states:
            nodes.append(helper.make_node("Concat", states, [name], axis=0))
            outputs.append(name)
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    states = [problem.L * problem.D, problem.B, H]
    graph = helper.make_graph(
        nodes,
        "layer",
        [info("x", list(given.x.shape))],
        [info(name, [problem.T, problem.B, problem.D * H] if name == "y" else states) for name in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def _as_cell(outputs: list, given: Given, mode: str) -> list:
    """y, h_n, c_n of one step as a Cell gives them: h and c."""
    if mode == "latency" and given.problem.L == given.problem.D == 1:
        return [o[0] for o in outputs[1:]]
    return outputs


def _make_onnxruntime(given: Given, mode: str) -> Runnable:
    _inference_only("ONNX Runtime", given, mode)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_model(given), options, ["CPUExecutionProvider"])
    feed = {"x": given.x.numpy()}
    return Runnable(lambda: _as_cell(session.run(None, feed), given, mode), "CPUExecutionProvider")


def _make_openvino(given: Given, mode: str) -> Runnable:
    _inference_only("OpenVINO", given, mode)
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(onnx_model(given)), "CPU", options).create_infer_request()
    feed, count = {"x": given.x.numpy()}, 3 if given.problem.cell == "lstm" else 2

    def run():
        results = request.infer(feed, share_inputs=True, share_outputs=True)
        return _as_cell([results[k] for k in range(count)], given, mode)

    return Runnable(run, "CPU, f32")


def _one_layer(name: str, given: Given, cells: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    problem = given.problem
    if problem.cell not in cells or problem.L != 1 or problem.D != 1:
        raise UnavailableError(f"{name} is taken for one layer and direction of {', '.join(cells)}")
    if problem.dtype not in dtypes:
        raise UnavailableError(f"{name} is taken in {', '.join(dtypes)}, the problem is {problem.dtype}")


def _functional_call(given: Given, mode: str, layer: Callable) -> Callable[[], list]:
    """``layer(x, *weights)`` -> (y, h, c), h and c [B, H], in one mode."""

    def whole(x, *weights):
        y, *states = layer(x, *weights)
        return y, *(s.unsqueeze(0) for s in states)

    return loop_call(given, mode, whole)


def _make_flashrnn(backend: str) -> Callable[[Given, str], Runnable]:
    def make(given: Given, mode: str) -> Runnable:
        _one_layer("FlashRNN", given, ("lstm",), ("float32", "bfloat16", "float16"))
        from flashrnn import flashrnn

        H = given.problem.H

        def layer(x, w_ih, w_hh, b_ih, b_hh):
            gates = nn.functional.linear(x, w_ih).transpose(0, 1).unflatten(-1, (4, 1, H))
            states, _ = flashrnn(
                gates, w_hh.view(4, 1, H, H), (b_ih + b_hh).view(4, 1, H), function="lstm", backend=backend,
                dtype=given.problem.dtype,
            )  # fmt: skip
            y, c = states[0, :, :, 0].transpose(0, 1), states[1, :, :, 0].transpose(0, 1)
            return y, y[-1], c[-1]

        return Runnable(_functional_call(given, mode, layer), backend)

    return make


def _make_haste(given: Given, mode: str) -> Runnable:
    _one_layer("haste", given, ("lstm", "gru"), ("float32",))
    import haste_pytorch

    layer = getattr(haste_pytorch, _MODULE[given.problem.cell])(given.problem.I, given.problem.H)
    layer.from_native_weights(*given.weights())
    layer = layer.to(given.device)
    if mode in ("train", "memory"):
        # Its parameters lie in another order and shape: only y and the gradient of x can be compared.
        step = training_step(layer, list(layer.parameters()), given)
        return Runnable(lambda: step()[:2] + [None] * 4, "cuBLAS and a kernel a step")
    squeeze = mode == "latency"
    run = _inference(lambda: layer(given.x))
    return Runnable(lambda: [t[0] for t in run()[1:]] if squeeze else run(), "cuBLAS and a kernel a step")


def _make_torchrl(given: Given, mode: str) -> Runnable:
    _one_layer("TorchRL", given, ("lstm", "gru"), ("float32",))
    from torchrl.modules.tensordict_module import _rnn_triton

    T, B, H = given.problem.T, given.problem.B, given.problem.H
    zeros = given.x.new_zeros(B, T, H)
    resets = torch.zeros(B, T, dtype=torch.bool, device=given.device)
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"

    def layer(x, *weights):
        x = x.transpose(0, 1)
        if given.problem.cell == "gru":
            y, h = _rnn_triton.gru_triton(x, zeros, *weights, resets, input_precision=precision)
            return y.transpose(0, 1), h
        y, _, h, c = _rnn_triton.lstm_triton(x, zeros, zeros, *weights, resets, input_precision=precision)
        return y.transpose(0, 1), h, c

    return Runnable(_functional_call(given, mode, layer), f"triton, {precision}")


def _needs(*packages: str, device: str | None = None) -> Callable[[torch.device], str | None]:
    def why_not(on: torch.device) -> str | None:
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if device is not None and on.type != device:
            return f"it runs on {device} only, measured is {on.type}"
        return None

    return why_not


def _needs_backend(backend: str, algorithm: str | None) -> Callable[[torch.device], str | None]:
    def why_not(on: torch.device) -> str | None:
        capability = torch.cuda.get_device_capability(on) if on.type == "cuda" and torch.version.cuda else None
        problem = planning.Problem("lstm", 8, 8, 0, torch.float32, on.type, capability)
        if on.type == "cpu" and backend in planning.machine().on_cpu:
            return "on the CPU it runs in a simulator, whose time says nothing"
        return planning.unsupported(backend, problem, planning.machine())

    return why_not


def _needs_cpu(on: torch.device) -> str | None:
    return None if on.type == "cpu" else f"it packs weights for the CPU, measured is {on.type}"


def _needs_compiler(on: torch.device) -> str | None:
    if on.type == "cpu" and not shutil.which("g++"):
        return "torch.compile needs g++ on the CPU (the extra 'compile')"
    return None if on.type == "cpu" else _needs("triton")(on)


def _ours() -> list[Provider]:
    found = [Provider("fusedrnn", "fusedrnn", lambda on: None, _make_ours(None, None))]
    for backend, algorithms in BACKEND_ALGORITHMS.items():
        for algorithm in algorithms[1:] or algorithms:
            name = f"fusedrnn:{backend}" if algorithm == "auto" else f"fusedrnn:{backend}:{algorithm}"
            make = _make_ours(backend, None if algorithm == "auto" else algorithm)
            found.append(Provider(name, "fusedrnn", _needs_backend(backend, algorithm), make))
    make = _make_ours(None, None, recompute=True)
    found.append(Provider("fusedrnn:float32", "fusedrnn", lambda on: None, _make_in_float32))
    found.append(Provider("fusedrnn:frozen", "fusedrnn", _needs_cpu, _make_frozen))
    found.append(Provider("fusedrnn:stream", "fusedrnn", _needs_cpu, _make_stream))
    return [*found, Provider("fusedrnn:recompute", "fusedrnn", lambda on: None, make)]


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, "torch", lambda on: None, make_torch),
        Provider(f"{BASELINE}:flattened", "torch", _needs_cudnn, _make_flattened),
        Provider(f"{BASELINE}:float16", "torch", _needs_cudnn, _make_in_float16),
        *_ours(),
        Provider("torch.loop", "torch", lambda on: None, _make_loop),
        Provider("torch.compile", "torch", _needs_compiler, _make_compiled),
        Provider("onnxruntime", "onnxruntime", _needs("onnxruntime", "onnx", device="cpu"), _make_onnxruntime),
        Provider("openvino", "openvino", _needs("openvino", "onnx", device="cpu"), _make_openvino),
        *(
            Provider(f"flashrnn:{b}", "flashrnn", _needs("flashrnn", device="cuda"), _make_flashrnn(b))
            for b in ("cuda_fused", "cuda", "triton_fused")
        ),
        Provider("haste", "haste_pytorch", _needs("haste_pytorch", device="cuda"), _make_haste),
        Provider("torchrl", "torchrl", _needs("torchrl", "triton", device="cuda"), _make_torchrl),
    )
}


def choose(names: list[str] | None, device: torch.device, quick: bool) -> tuple[list[Provider], dict[str, str]]:
    """(who is measured, the baseline first; who is left out and why).

    Without names: everybody who can run here, except loops of plain operations, the reference and, on a CPU, backends
    that "fusedrnn" chooses anyway; ``quick`` leaves out torch.compile as well, which compiles for minutes.

    Raises:
        ValueError: there is no such provider, or one that was asked for cannot run here.
    """
    unknown = [name for name in names or [] if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"peers must be of {', '.join(PROVIDERS)}, got {', '.join(unknown)}")
    left_out, found = {}, [PROVIDERS[BASELINE]]
    for name, provider in PROVIDERS.items():
        why = provider.why_not(device)
        asked = name in (names or [])
        if asked and why:
            raise ValueError(f"{name} was asked for but cannot run: {why}")
        if not names and why is None:
            if name in ("torch.loop", "fusedrnn:reference"):
                why = f"slow by design; ask for it with --peers {name}"
            elif name == "fusedrnn:recompute":
                why = f"it trades time for memory; ask for it with --peers {name}"
            elif name in ("fusedrnn:frozen", "fusedrnn:stream"):
                why = f"its weights are packed once, by promise; ask for it with --peers {name}"
            elif name == "fusedrnn:float32":
                why = f"what 16 bits are compared with; ask for it with --peers {name}"
            elif name == "fusedrnn:cpu:persistent":
                why = "it is what fusedrnn chooses on a CPU"
            elif name == "torch.compile" and quick:
                why = "it compiles for minutes; ask for it with --peers torch.compile"
        if why is not None:
            left_out[name] = why
        elif name != BASELINE and (asked or not names):
            found.append(provider)
    return found, left_out
