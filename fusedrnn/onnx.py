"""ONNX: layers as nodes LSTM, GRU and RNN in ``torch.onnx.export``, and weights read back from such nodes.

In an export a layer emits its node itself, one a layer with both directions in it; nothing has to be called. Only a
saved ExportedProgram needs :func:`translation_table`. ONNX orders the gates of an LSTM i o f c and those of a GRU
z r h; its GRU is torch's with ``linear_before_reset=1``. Sizes: T steps, B batch, I input, H hidden, G gates,
D directions, L layers.

Source: the operators' specification, https://onnx.ai/onnx/operators/onnx__LSTM.html, __GRU and __RNN.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fusedrnn import functional, ops
from fusedrnn.cells import CELL_OF_MODE, CELLS, Cell

# Which of torch's gates stands where in ONNX.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_OPERATOR = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
_DTYPES = (torch.float32, torch.float64, torch.float16)


def _attributes(cell: Cell, hidden: int, directions: int, direction: str) -> dict:
    found = {"hidden_size": hidden, "direction": direction}
    if cell.name == "gru":
        found["linear_before_reset"] = 1
    if cell.name in ("rnn_tanh", "rnn_relu"):
        found["activations"] = [cell.name.removeprefix("rnn_").capitalize()] * directions
    return found


def _static(t: Tensor) -> tuple[int, ...]:
    """Sizes that are no part of a trace."""
    if torch.compiler.is_compiling():
        return tuple(t.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in t.shape)


def check(
    cell: Cell,
    dtype: torch.dtype | None = None,
    projection: bool = False,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    heads: int = 1,
) -> None:
    """Raises where ONNX has no operator for it."""

    def need(ok: bool, why: str) -> None:
        if not ok:
            raise RuntimeError(f"no ONNX operator computes this layer: {why}")

    need(cell.name in _OPERATOR, f"ONNX has LSTM, GRU and RNN, and none for the cell {cell.name!r}")
    need(not projection, "the LSTM of ONNX has no projection (proj_size)")
    need(resets is None, "the recurrent operators of ONNX take no resets")
    need(heads == 1, f"the recurrent operators of ONNX have one head, not {heads}")
    need(
        not (return_all_states and cell.has_cell_state),
        "the LSTM of ONNX gives c after the last step only (return_all_states)",
    )
    need(dtype is None or dtype in _DTYPES, f"its recurrent operators take float16, float32 and float64, not {dtype}")


def _gates(rows: Tensor, order: Sequence[int]) -> list[Tensor]:
    """The gates of [D, G*H, ...] in another order. Slices: torch's exporters compute those of constants beforehand."""
    if len(order) == 1:
        return [rows]
    hidden = _static(rows)[1] // len(order)
    return [rows[:, k * hidden : (k + 1) * hidden] for k in order]


def in_onnx_order(operator: str, *rows: Tensor) -> Tensor:
    """[D, G*H, ...] in torch's order of gates, in that of ONNX; several one after the other in the second dimension."""
    parts = [part for each in rows for part in _gates(each, ORDER[operator])]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def in_torch_order(operator: str, rows: Tensor) -> Tensor:
    """[D, G*H, ...] in the order of ONNX, in that of torch."""
    order = ORDER[operator]
    return torch.cat(_gates(rows, [order.index(k) for k in range(len(order))]), 1)


@contextlib.contextmanager
def _untraced():
    """Keeps operations out of a trace of torch.jit."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


class _Node(torch.autograd.Function):
    """One layer for the exporter that traces (dynamo=False): what it computes, and the node it is written as.

    Takes the inputs of the node (absent: None), the cell's name and whether sequence_lens are the batch sizes of packed
    data; returns y [T, B, D*H] or packed [N, D*H], Y_h [D, B, H] and, of an LSTM, Y_c.
    """

    @staticmethod
    def forward(ctx, x, W, R, B, lengths, h0, c0, cell, packed):
        with _untraced():
            operator, (directions, _, hidden) = _OPERATOR[cell], R.shape
            parts = [W, R, *(() if B is None else B.chunk(2, 1))]
            parts = [in_torch_order(operator, part) for part in parts]
            weights = [part[k] for k in range(directions) for part in parts]
            batch = int(lengths[0]) if packed else x.shape[1]
            states = [s if s is not None else x.new_zeros(directions, batch, hidden) for s in (h0, c0)]
            y, *finals, _ = functional._stack(
                CELLS[cell], x, states[0], states[1] if CELLS[cell].has_cell_state else None, weights, B is not None,
                1, 0.0, False, directions == 2, False, lengths if packed else None, None, False, False, None, None,
                None if packed else lengths, 0.0,
            )  # fmt: skip
        # The trace has to know the outputs.
        return tuple(t.clone() for t in (y, *finals) if t is not None)

    @staticmethod
    def symbolic(g, x, W, R, B, lengths, h0, c0, cell, packed):
        def given(value):
            if value is not None:
                return value
            absent = g.op("prim::Constant")
            absent.setType(torch._C.OptionalType.ofTensor())
            return absent

        directions, _, hidden = R.type().sizes()
        direction = "forward" if directions == 1 else "bidirectional"
        kinds = {int: "i", str: "s", list: "s"}
        attributes = _attributes(CELLS[cell], hidden, directions, direction)
        has_c = CELLS[cell].has_cell_state
        inputs = [given(value) for value in (x, W, R, B, lengths, h0, *((c0,) if has_c else ()))]
        y, *finals = g.op(
            _OPERATOR[cell], *inputs, outputs=2 + has_c,
            **{f"{name}_{kinds[type(value)]}": value for name, value in attributes.items()},
        )  # fmt: skip
        # From [T, D, B, H], in the operations over which torch's exporter moves a packing of x.
        helper = torch.onnx.symbolic_helper
        if directions == 1:
            return helper._squeeze_helper(g, y, [1]), *finals
        y = g.op("Transpose", y, perm_i=[0, 2, 1, 3])
        shape = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
        return helper._reshape_helper(g, y, shape, allowzero=0), *finals


def symbolic(operator: str, inputs, attributes: dict, dtypes, shapes) -> Sequence[Tensor]:
    """A node of the exporter through Dynamo, which may not look into torch's function of that (torch.cond)."""
    return torch.onnx.ops.symbolic_multi_out(operator, inputs, attributes, dtypes=dtypes, shapes=shapes)


def _node(cell: Cell, x: Tensor, W: Tensor, R: Tensor, B: Tensor | None, lengths, h0, c0, packed: bool):
    """y, Y_h and Y_c (None without a c) of one node; shapes as of _Node."""
    if torch.jit.is_tracing() and not torch.compiler.is_compiling():
        found = _Node.apply(x, W, R, B, lengths, h0, c0, cell.name, packed)
    else:
        directions, _, hidden = R.shape
        steps, batch, _ = x.shape
        states = [(directions, batch, hidden)] * (1 + cell.has_cell_state)
        found = symbolic(
            _OPERATOR[cell.name],
            (x, W, R, B, lengths, h0, *((c0,) if cell.has_cell_state else ())),
            _attributes(cell, hidden, directions, "forward" if directions == 1 else "bidirectional"),
            [x.dtype] * (1 + len(states)),
            [(steps, directions, batch, hidden), *states],
        )
        # They come as CPU tensors.
        y, *finals = (t if t.device == x.device else t.to(x.device) for t in found)
        found = (y.squeeze(1) if directions == 1 else y.transpose(1, 2).flatten(2), *finals)
    return (*found, None)[:3]


def layers(
    cell: Cell,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    return_all_states: bool,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """What functional.layers returns, in an export: a node a layer. States that are None are left out of the node."""
    directions = 2 if bidirectional else 1
    per = len(weights) // (num_layers * directions)
    input, h0, c0, *weights = ops.autocast(input.device.type, input, h0, c0, *weights)
    check(cell, input.dtype, per != 2 + 2 * bias, resets, return_all_states)
    operator, hidden = _OPERATOR[cell.name], _static(weights[1])[1]
    packed = batch_sizes is not None
    x = input.transpose(0, 1) if batch_first and not packed else input
    sequence_lens = batch_sizes
    if lengths is not None:
        lengths = functional._check_lengths(lengths, x, x.shape[1], batch_sizes)
        sequence_lens = lengths.to(torch.int32)
    finals: list[tuple[Tensor, Tensor | None]] = []
    every: list[Tensor] = []
    for layer in range(num_layers):
        first = layer * directions
        own = [weights[k * per : (k + 1) * per] for k in range(first, first + directions)]
        W, R, *biases = (torch.stack(part) for part in zip(*own))
        W, R = (in_onnx_order(operator, part) for part in (W, R))
        B = in_onnx_order(operator, *biases) if bias else None
        start = [s if s is None or num_layers == 1 else s[first : first + directions] for s in (h0, c0)]
        x, h, c = _node(cell, x, W, R, B, sequence_lens, *start, packed)
        every += x.split(hidden, -1) if return_all_states else ()
        if dropout and training and layer + 1 < num_layers:
            x = torch.nn.functional.dropout(x, dropout)
        finals.append((h, c))
    h_n, c_n = (None if some[0] is None else some[0] if num_layers == 1 else torch.cat(some) for some in zip(*finals))
    if lengths is not None and padding_value != 0:
        x = functional.Padding.of(lengths, x.shape[0]).cut(x, padding_value)
    flip = batch_first and not packed
    states = None
    if return_all_states:
        states = torch.stack(every)
        states = (states.transpose(1, 2) if flip else states,)
    return x.transpose(0, 1) if flip else x, h_n, c_n, states


def one_step(
    cell: Cell,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What functional.one_step returns, in an export: a node of one step."""
    if (b_ih is None) != (b_hh is None):
        b_ih, b_hh = (torch.zeros_like(w_ih[:, 0]) if b is None else b for b in (b_ih, b_hh))
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    h0, c0 = (None if s is None else s.unsqueeze(0) for s in (h0, c0))
    _, h, c, _ = layers(
        cell, input.unsqueeze(0), h0, c0, weights, b_ih is not None, 1, 0.0, False, False, False, None, None, False
    )
    return h.squeeze(0), None if c is None else c.squeeze(0)


class _Several(list):
    """Outputs of an op that returns them as a list: the exporter names what a node takes out of others' outputs."""

    name: str | None = None

    def producer(self) -> None:
        """No node: each of the outputs has its own."""


@contextlib.contextmanager
def _hint():
    """Says what to do with a program that no node computes."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}; export program.run_decompositions(fusedrnn.decompositions()), which needs no table"
        ) from None


def translation_table(program: torch.export.ExportedProgram) -> dict[Callable, Callable]:
    """``torch.onnx.export(program, ..., custom_translation_table=fusedrnn.onnx.translation_table(program))``

    For a torch.export.ExportedProgram, whose graph has the op ``fusedrnn::sequence`` and no layer: each direction
    becomes a node of its own. Exporting a model needs none of this.

    Raises:
        ImportError: onnx or onnxscript, which that exporter needs, is not installed.
        RuntimeError: the program uses what no node gives: c after every step (``lengths=`` does), or the gates.
    """
    for node in program.graph.nodes:
        if node.target is ops.sequence_op:
            # Gates, and of the list of states after every step each.
            taken = {user.args[1]: user.users for user in node.users}
            used = [*taken.get(2, ()), *(user for item in taken.get(3, ()) for user in item.users)]
            with _hint():
                check(CELLS[node.args[0]], return_all_states=bool(used))

    import onnx
    from onnxscript import opset18 as op

    def sequence(*arguments):
        cell, given = CELLS[arguments[0]], ops._of_sequence(arguments)[0]
        with _hint():
            check(cell, None, given.w_hr is not None, given.resets, heads=given.heads)
        if given.batch_sizes is not None:
            raise RuntimeError("no ONNX operator computes this layer: it takes packed data; export it with lengths=")
        operator, hidden = _OPERATOR[cell.name], given.w_hh.shape[1]

        def one_direction(*rows):
            """[G*H, ...], in the order of ONNX, with a dimension of one direction in front."""
            parts = [op.Slice(t, [k * hidden], [(k + 1) * hidden], [0]) for t in rows for k in ORDER[operator]]
            return op.Unsqueeze(op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0], [0])

        zero = None if given.b_ih is given.b_hh else op.Expand(op.CastLike(0.0, given.x), [len(cell.gates) * hidden])
        biases = [zero if b is None else b for b in (given.b_ih, given.b_hh)]
        y, *finals = getattr(op, operator)(
            given.x,
            one_direction(given.w_ih),
            one_direction(given.w_hh),
            None if biases[0] is None else one_direction(*biases),
            None,
            op.Unsqueeze(given.h0, [0]),
            *(() if given.c0 is None else (op.Unsqueeze(given.c0, [0]),)),
            **_attributes(cell, hidden, 1, "reverse" if given.reverse else "forward"),
        )
        # For the c of a cell that has none, and what only a gradient reads.
        nothing = op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [0], []))
        finals = _Several(op.Squeeze(t, [0]) for t in finals)
        return op.Squeeze(y, [1]), finals, nothing, _Several(nothing for _ in finals[1:])

    return {ops.sequence_op: sequence}


def load_weights(module: nn.Module, model, nodes: str | Sequence[str] | None = None) -> nn.Module:
    """Copies the weights of recurrent nodes of an ONNX model into a layer or cell, and returns it.

    Args:
        module: an LSTM, GRU, RNN or Cell of fusedrnn (or torch.nn): its sizes, directions and nonlinearity must be
            those of the nodes. Without biases in the node its biases become zeros.
        model: a path, or the onnx.ModelProto that onnx.load returns.
        nodes: the name of the node of each layer, in order; None: all nodes LSTM, GRU and RNN of the model's graph.

    Raises:
        ImportError: onnx is not installed.
        TypeError: ``module`` is no recurrent layer or cell.
        ValueError: there are no such nodes, they do not fit the module, or they compute what it cannot (peepholes,
            clip, other activations, input_forget, linear_before_reset=0, direction "reverse", weights that are inputs).
    """
    import onnx

    cell_module = isinstance(module, nn.RNNCellBase)
    if not (cell_module or isinstance(module, nn.RNNBase)):
        raise TypeError(f"load_weights takes a recurrent layer or cell, got {type(module).__name__}")
    mode = getattr(module, "mode", None) or _mode_of_cell(module)
    operator, cell = _OPERATOR[CELL_OF_MODE[mode].name], CELL_OF_MODE[mode]
    model = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    found = [node for node in model.graph.node if node.op_type in ORDER and node.domain in ("", "ai.onnx")]
    if nodes is not None:
        named = {node.name: node for node in found}
        wanted = [nodes] if isinstance(nodes, str) else list(nodes)
        if missing := [name for name in wanted if name not in named]:
            raise ValueError(f"the model has no recurrent node {missing[0]!r}, it has {', '.join(named) or 'none'}")
        found = [named[name] for name in wanted]
    layers = 1 if cell_module else module.num_layers
    if len(found) != layers:
        raise ValueError(
            f"a module of {layers} layers takes {layers} nodes, got {len(found)}: "
            f"{', '.join(f'{node.name} ({node.op_type})' for node in found) or 'none'}"
        )
    directions = 2 if not cell_module and module.bidirectional else 1
    parts = []
    for layer, node in enumerate(found):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        _check_node(node, attributes, operator, cell, directions)
        names = (*node.input, *("",) * 8)
        W, R, B, P = (_constant(model, names[k]) for k in (1, 2, 3, 7))
        if P is not None and P.any():
            raise ValueError(f"node {node.name!r} has peepholes (P), and {type(module).__name__} has none")
        parts.append((layer, node, W, R, B))
    copies = []
    for layer, node, W, R, B in parts:
        rows = [in_torch_order(operator, t) for t in (W, R)]
        if B is not None:
            rows += [in_torch_order(operator, half) for half in B.chunk(2, 1)]
        for k in range(directions):
            suffix = "" if cell_module else f"_l{layer}" + ("_reverse" if k else "")
            for name, t in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), (*rows, None, None)):
                weight = getattr(module, name + suffix, None)
                if weight is None:
                    if t is not None and t[k].any():
                        raise ValueError(f"node {node.name!r} has biases, and the module has none (bias=False)")
                    continue
                if t is not None and (len(t) != directions or t[k].shape != weight.shape):
                    raise ValueError(
                        f"{name}{suffix} must have shape {list(weight.shape)} in {directions} directions, "
                        f"node {node.name!r} has {list(t.shape[1:])} in {len(t)}"
                    )
                copies.append((weight, torch.zeros_like(weight) if t is None else t[k]))
    if not cell_module and module.proj_size:
        raise ValueError("the LSTM of ONNX has no projection (proj_size), and this module has")
    with torch.no_grad():
        for weight, value in copies:
            weight.copy_(value)
    return module


def _mode_of_cell(module: nn.Module) -> str:
    """Of a cell of torch.nn."""
    name = type(module).__name__.removesuffix("Cell")
    return name if name != "RNN" else f"RNN_{module.nonlinearity.upper()}"


def _check_node(node, attributes: dict, operator: str, cell: Cell, directions: int) -> None:
    """Raises ValueError where the node does not compute what the cell does."""

    def check(ok: bool, why: str) -> None:
        if not ok:
            raise ValueError(f"node {node.name!r} ({node.op_type}) does not fit: {why}")

    check(node.op_type == operator, f"the module is a {operator}")
    direction = attributes.get("direction", b"forward").decode()
    fits = "bidirectional" if directions == 2 else "forward"
    check(direction == fits, f"its direction is {direction!r}, that of the module {fits!r}")
    check(not attributes.get("clip"), "it clips its sums (clip)")
    check(not attributes.get("input_forget"), "it couples input and forget gate (input_forget)")
    check(operator != "GRU" or attributes.get("linear_before_reset", 0) == 1, "linear_before_reset is 0, ours is 1")
    usual = {"lstm": ["sigmoid", "tanh", "tanh"], "gru": ["sigmoid", "tanh"], "rnn_relu": ["relu"]}
    want = usual.get(cell.name, ["tanh"]) * directions
    default = ["tanh"] * directions if operator == "RNN" else want
    got = [name.decode().lower() for name in attributes.get("activations", ())] or default
    check(got == want, f"its activations are {got}, ours {want}")


def _constant(model, name: str) -> Tensor | None:
    """The value of a name that depends on constants only; None for no name.

    torch's newer exporter leaves the reordering of large weights to the runtime: it is computed here.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    if not name:
        return None
    graph = model.graph
    initializers = {t.name: t for t in graph.initializer}
    if name in initializers:
        return torch.tensor(onnx.numpy_helper.to_array(initializers[name]))
    producer = {output: node for node in graph.node for output in node.output}
    needed, open_names = [], [name]
    while open_names:
        each = open_names.pop()
        if each in producer and producer[each] not in needed:
            needed.append(producer[each])
            open_names += [n for n in producer[each].input if n]
        elif each not in producer and each not in initializers:
            raise ValueError(f"{name!r} depends on {each!r}, which is an input of the model and no constant")
    used = {n for node in needed for n in node.input}
    part = onnx.helper.make_graph(
        [node for node in graph.node if node in needed], "constants", [],
        [onnx.helper.make_empty_tensor_value_info(name)], [t for k, t in initializers.items() if k in used],
    )  # fmt: skip
    (value,) = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=model.opset_import)).run(None, {})
    return torch.tensor(value)
