"""The ONNX operators LSTM, GRU and RNN: their node tests, and the reference evaluator on random weights.

ONNX orders the gates of an LSTM i o f c and those of a GRU z r h; its GRU is torch's with ``linear_before_reset=1``.
"""

import importlib

import numpy as np
import pytest
import torch
from test_recurrence import RUNS, device_of, need

import fusedrnn

onnx = pytest.importorskip("onnx", reason="the ONNX operator tests do not run: no onnx (extra 'test')")

from onnx.backend.test.case import node as node_tests  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

OPERATORS = ("LSTM", "GRU", "RNN")
TO_TORCH = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
# What torch.nn has no form for. A node test that is in neither this table nor expressible fails test_every_node_test.
NO_FORM = {
    "test_lstm_with_peepholes": "peepholes",
    "test_gru_seq_length": "linear_before_reset=0",
    "test_gru_reverse": "linear_before_reset=0",
    "test_gru_bidirectional": "linear_before_reset=0",
}


def node_cases() -> dict:
    for operator in OPERATORS:  # collect_testcases() would import the tests of every operator
        importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
    cases = (case for case in node_tests._NodeTestCases if case.model.graph.node[0].op_type in OPERATORS)
    return {case.name: case for case in cases}


NODE_CASES = node_cases()


def attributes_of(node) -> dict:
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return found | {"direction": found.get("direction", b"forward").decode()}


def why_no_form(node, given: dict[str, np.ndarray]) -> str | None:
    """What torch.nn cannot express of this problem, None where it can."""
    attributes = attributes_of(node)
    for name in ("activations", "clip", "input_forget"):
        if attributes.get(name):
            return name
    if given.get("P", np.zeros(1)).any():
        return "peepholes"
    steps = given["X"].shape[attributes.get("layout", 0)]
    if np.any(given.get("sequence_lens", steps) != steps):
        return "sequence_lens"
    if node.op_type == "GRU" and not attributes.get("linear_before_reset", 0):
        # With h = 0 and no hidden bias of n, the two forms agree in the first step.
        hidden_bias_of_n = np.split(given.get("B", np.zeros((1, 6))), 6, axis=1)[5]
        if steps > 1 or "initial_h" in given or hidden_bias_of_n.any():
            return "linear_before_reset=0"
    return None


def ours(node, given: dict[str, np.ndarray], backend: str, algorithm: str) -> dict[str, np.ndarray]:
    """Y [T, D, B, H], Y_h and Y_c [D, B, H] (layout 1: [B, T, D, H] and [B, D, H]) of our layer."""
    attributes = attributes_of(node)
    batch_first, direction = bool(attributes.get("layout", 0)), attributes["direction"]
    x = torch.tensor(given["X"])
    directions, hidden = given["R"].shape[0], attributes["hidden_size"]
    # "reverse" is the second half of a bidirectional layer, whose first half has the same weights.
    halves = 1 if direction == "forward" else 2
    layer = getattr(fusedrnn, node.op_type)(
        x.shape[2], hidden, bias="B" in given, batch_first=batch_first, bidirectional=halves == 2
    )
    for half, suffix in enumerate(("", "_reverse")[:halves]):
        source = half % directions
        parts = {"weight_ih": given["W"][source], "weight_hh": given["R"][source]}
        if "B" in given:
            parts["bias_ih"], parts["bias_hh"] = np.split(given["B"][source], 2)
        for name, rows in parts.items():
            gates = np.split(rows, len(TO_TORCH[node.op_type]))
            ordered = np.concatenate([gates[k] for k in TO_TORCH[node.op_type]])
            getattr(layer, f"{name}_l0{suffix}").data.copy_(torch.tensor(ordered))
    states = [torch.tensor(given[name]) for name in ("initial_h", "initial_c") if name in given]
    if batch_first:
        states = [s.transpose(0, 1) for s in states]
    states = [s.expand(halves, -1, -1) for s in states]
    device = device_of(backend)
    layer, x, states = layer.to(device), x.to(device), [s.to(device) for s in states]
    with torch.no_grad(), fusedrnn.backend(backend, algorithm):
        y, finals = layer(x, (tuple(states) if node.op_type == "LSTM" else states[0]) if states else None)
    finals = finals if node.op_type == "LSTM" else (finals,)
    kept = slice(halves - directions, halves)
    y = y.unflatten(2, (halves, hidden))[:, :, kept]
    found = {"Y": y if batch_first else y.transpose(1, 2)}
    for name, final in zip(("Y_h", "Y_c"), finals):
        found[name] = final[kept].transpose(0, 1) if batch_first else final[kept]
    return {name: t.cpu().numpy() for name, t in found.items()}


def check(node, given: dict[str, np.ndarray], want: list[np.ndarray], backend: str, algorithm: str) -> None:
    need(backend)
    found = ours(node, given, backend, algorithm)
    names = [name for name in node.output if name]
    assert len(names) == len(want) > 0
    for name, expected in zip(names, want):
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def named(node, arrays) -> dict[str, np.ndarray]:
    return dict(zip((name for name in node.input if name), arrays))


def test_every_node_test_is_run_or_named():
    """18 node tests, of which torch.nn expresses 14."""
    reasons = {}
    for name, case in NODE_CASES.items():
        node = case.model.graph.node[0]
        assert set(node.input) <= {*INPUTS, ""}
        reasons[name] = why_no_form(node, named(node, case.data_sets[0][0]))
    assert len(reasons) >= 18
    assert {name: why for name, why in reasons.items() if why} == NO_FORM


@pytest.mark.parametrize("name", [name for name in NODE_CASES if name not in NO_FORM])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_node_test(backend, algorithm, name):
    case = NODE_CASES[name]
    node = case.model.graph.node[0]
    assert case.data_sets
    for arrays, want in case.data_sets:
        check(node, named(node, arrays), want, backend, algorithm)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_random_weights_and_states(backend, algorithm, operator, direction, layout):
    """The node tests have equal weights in all gates: an order that is wrong would pass there."""
    T, B, I, H, G, D = 4, 3, 5, 6, len(TO_TORCH[operator]), 2 if direction == "bidirectional" else 1
    shapes = {"X": (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "initial_h": (D, B, H)}
    if operator == "LSTM":
        shapes["initial_c"] = (D, B, H)
    draw = np.random.default_rng(7).standard_normal
    given = {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
    if layout:
        given |= {name: given[name].swapaxes(0, 1) for name in given if name in ("X", "initial_h", "initial_c")}
    inputs = ["X", "W", "R", "B", "", "initial_h", *(["initial_c"] if operator == "LSTM" else [])]
    outputs = ["Y", "Y_h", *(["Y_c"] if operator == "LSTM" else [])]
    extra = {"linear_before_reset": 1} if operator == "GRU" else {}
    node = onnx.helper.make_node(operator, inputs, outputs, hidden_size=H, direction=direction, layout=layout, **extra)
    assert why_no_form(node, given) is None
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        operator,
        [value(name, onnx.TensorProto.FLOAT, t.shape) for name, t in given.items()],
        [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)])
    check(node, given, ReferenceEvaluator(model).run(None, given), backend, algorithm)
