"""layer.stream: the numbers of the layer step by step, states in and out, and what it refuses."""

import copy
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import _build

LAYERS = (
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "proj_size": 3}),
    ("GRU", {"num_layers": 3, "batch_first": True}),
    ("RNN", {"nonlinearity": "relu", "bias": False}),
)
of_layers = pytest.mark.parametrize("name, options", LAYERS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
# A step reads or adds in another order than a whole sequence does.
LIMIT = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(params=["compiled", "layer"])
def way(request, monkeypatch):
    """Both ways of a stream: one call of C++, and the layer's."""
    if request.param == "layer":
        monkeypatch.setattr("fusedrnn.streaming._DTYPES", {})
    elif not _build.loaded():
        pytest.skip("no C++ extension: streams in C++ are not tested")


def layer_of(name="LSTM", dtype=torch.float32, hidden=33, **options):
    torch.manual_seed(0)
    return getattr(fusedrnn, name)(5, hidden, dtype=dtype, **options)


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


def close(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and (a.double() - b.double()).abs().max() <= LIMIT[a.dtype]


def turned(layer, t):
    """Time-major and the layer's layout, one into the other."""
    return t.transpose(0, 1) if layer.batch_first else t


@of_layers
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_steps_and_chunks_are_the_layer(way, name, options, dtype, batch):
    layer = layer_of(name, dtype, **options)
    x, resets = torch.randn(9, batch, 5).to(dtype), torch.rand(9, batch) < 0.2
    with torch.no_grad():
        want, final = layer(turned(layer, x), resets=turned(layer, resets))
        want = turned(layer, want)
    stream = layer.stream(batch)
    for t in range(4):
        y = stream(x[t], resets=resets[t])
        assert close(y, want[t])
        assert not y.requires_grad
    for part in (slice(4, 7), slice(7, 9)):
        y = stream(turned(layer, x[part]), resets=turned(layer, resets[part]))
        assert close(y, turned(layer, want[part]))
    for ours, theirs in zip(as_tuple(stream.states), as_tuple(final), strict=True):
        assert close(ours, theirs)


def test_the_same_twice(way):
    layer = layer_of(num_layers=2)
    x = torch.randn(6, 2, 5)
    first, second = ([stream(step).clone() for step in x] for stream in (layer.stream(2), layer.stream(2)))
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_states_are_read_written_and_reset(way):
    layer = layer_of(num_layers=2)
    x = torch.randn(5, 3, 5)
    stream, other = layer.stream(3), layer.stream(3)
    for step in x[:2]:
        stream(step)
    states = stream.states
    assert [tuple(s.shape) for s in states] == [(2, 3, 33)] * 2
    other.states = states
    assert torch.equal(stream(x[2]), other(x[2]))
    assert not torch.equal(states[0], stream.states[0])  # a copy
    stream.reset(torch.tensor([False, True, False]))
    assert all(bool((s[:, 1] == 0).all()) and bool((s[:, 0] != 0).all()) for s in stream.states)
    stream.reset()
    assert torch.equal(stream(x[0]), layer.stream(3)(x[0]))


def test_the_memory_is_the_streams(way):
    layer = layer_of()
    stream = layer.stream()
    x = torch.randn(2, 1, 5)
    out = torch.full((1, 33), float("nan"))
    first = stream(x[0])
    kept = first.clone()
    assert stream(x[1], out=out) is out
    assert torch.equal(first, kept)
    with torch.no_grad():
        assert close(torch.stack([kept, out]), layer(x)[0])
    if stream._stream is not None:
        assert stream(x[0]) is first
    # Gaps, and a layout of another order.
    wide = torch.full((1, 66), float("nan"))[:, ::2]
    again = layer.stream()
    again(x[0])
    assert torch.equal(again(x[1], out=wide), out)


def test_strided_input(way):
    layer = layer_of()
    x = torch.randn(3, 5, 2).permute(0, 2, 1)
    a, b = layer.stream(2), layer.stream(2)
    assert torch.equal(a(x).clone(), b(x.contiguous()))


def test_weights_are_those_of_the_beginning(way):
    layer = layer_of()
    stream, x = layer.stream(), torch.randn(1, 5)
    want = stream(x).clone()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    stream.reset()
    assert torch.equal(stream(x), want)
    assert stream.packed_bytes >= sum(p.nbytes for p in layer.parameters())
    assert float(layer.stream()(x).abs().max()) == 0


def test_what_is_refused(way):
    layer = layer_of(num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match=r"nothing drops out in a stream: call eval\(\) first, got dropout=0.5"):
        layer.stream()
    layer.eval()
    with pytest.raises(ValueError, match="batch must be a positive integer, got 0"):
        layer.stream(0)
    with pytest.raises(ValueError, match="goes one way, and this layer is bidirectional"):
        layer_of(bidirectional=True).stream()
    stream = layer.stream(2)
    for wrong in (
        torch.randn(2, 4),
        torch.randn(3, 5),
        torch.randn(5),
        torch.randn(0, 2, 5),
        torch.randn(2, 5).double(),
    ):
        with pytest.raises(
            RuntimeError, match=r"x must be torch.float32 on cpu and have shape \[2, 5\] or \[T, 2, 5\]"
        ):
            stream(wrong)
    x = torch.randn(2, 5)
    with pytest.raises(RuntimeError, match="records no gradient"):
        stream(x.clone().requires_grad_())
    with torch.no_grad():
        stream(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"resets must be torch.bool \(2,\) on cpu, got torch.int64 \(2,\)"):
        stream(x, resets=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"out must be torch.float32 \(2, 33\), got torch.float64 \(2, 33\)"):
        stream(x, out=torch.empty(2, 33, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="states must have the shapes"):
        stream.states = torch.zeros(2, 2, 33)
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        pickle.dumps(stream)
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        copy.deepcopy(stream)
    with pytest.raises(ValueError, match="a stream has x alone, and zoneout_lstm takes keep_h, keep_c"):
        fusedrnn.Layer(fusedrnn.zoo.zoneout_lstm, 5, 8).stream()


@pytest.mark.parametrize("name", ["slstm", "mgu"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_of_a_cell_of_ones_own(name, batch_first):
    torch.manual_seed(0)
    layer = fusedrnn.Layer(getattr(fusedrnn.zoo, name), 5, 8, 2, heads=2, batch_first=batch_first)
    x, resets = torch.randn(9, 3, 5), torch.rand(9, 3) < 0.2
    with torch.no_grad():
        y, states = layer(turned(layer, x), resets=turned(layer, resets))
    stream = layer.stream(3)
    assert stream.packed_bytes >= sum(p.nbytes for p in layer.parameters())
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()  # the stream has its own
    got = [stream(x[t], resets=resets[t]).clone() for t in range(4)]
    got += [*turned(layer, stream(turned(layer, x[4:]), resets=turned(layer, resets[4:])))]
    assert close(torch.stack(got), turned(layer, y))
    assert all(close(a, b) for a, b in zip(as_tuple(stream.states), as_tuple(states), strict=True))
    stream.states = tuple(torch.zeros_like(s) for s in as_tuple(states))
    first = stream(x[0]).clone()
    stream.reset()
    assert torch.equal(stream(x[0]), first)
    assert layer.training
    assert layer.weight_ih_l0.requires_grad
    layer.reset_parameters()
    normed = torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    with torch.no_grad():
        assert close(normed.stream(3)(x[0]), normed(turned(layer, x[:1]))[0].flatten(0, 1))


def test_a_backend_that_was_asked_for_runs():
    layer, x = layer_of(), torch.randn(1, 5)
    want = layer.stream()(x).clone()
    with fusedrnn.backend("reference"):
        stream = layer.stream()
        assert stream._stream is None
        assert close(stream(x), want)
    assert layer_of(backend="reference").stream()._stream is None


def test_a_frozen_layer_and_parametrized_weights(way):
    layer = layer_of()
    x = torch.randn(1, 5)
    want = layer.stream()(x).clone()
    assert torch.equal(fusedrnn.freeze(copy.deepcopy(layer)).stream()(x), want)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    assert close(layer.stream()(x), want)


@pytest.mark.skipif(not _build.loaded(), reason="no C++ extension: streams in C++ are not tested")
def test_one_thread_at_a_time():
    stream = layer_of(hidden=512).stream(4)
    x = torch.randn(200, 4, 5)
    refused = []

    def run():
        try:
            for _ in range(20):
                stream(x)
        except RuntimeError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) in (1, 2)
    assert "is being run by another thread" in refused[0]


PROGRAM = r"""
#include <cstdio>
#include <stdexcept>
#include <vector>
#include "cpu/stream.h"

int main(int, char** arguments) {
  const int64_t batch = 2, input = 3, hidden = 5;
  const auto numbers = [](int64_t count, float scale) {
    std::vector<float> all(count);
    for (int64_t k = 0; k < count; ++k) all[k] = scale * static_cast<float>(k * 7 % 11 - 5);
    return all;
  };
  const auto w_ih = numbers(4 * hidden * input, 0.1f), w_hh = numbers(4 * hidden * hidden, 0.05f);
  const auto x = numbers(batch * input, 0.2f);
  fusedrnn::Stream stream("lstm", {fusedrnn::Dtype::kFloat32, batch, input, hidden}, {{w_ih.data(), w_hh.data()}});
  std::vector<float> y(batch * hidden);
  for (int t = 0; t < 4; ++t) stream.run(x.data(), 1, nullptr, y.data());
  for (const float value : y) std::printf("%.9g ", value);
  try {
    fusedrnn::Stream("no such cell", {}, {{w_ih.data(), w_hh.data()}});
  } catch (const std::runtime_error& error) {
    std::printf("\n%s", error.what());
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None or not _build.loaded(), reason="no g++: no stream without Python")
def test_from_a_program_without_python(tmp_path):
    folder = Path(_build.__file__).parent
    library = folder / "libfusedrnn.so"
    headers = folder / "csrc" if (folder / "csrc").exists() else folder.parent / "csrc"
    (tmp_path / "main.cpp").write_text(PROGRAM)
    torch_lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [
            *("g++", "-std=c++20", f"-I{headers}", "main.cpp", "-o", "main", str(library)),
            *(
                "-Wl,--no-as-needed",
                f"-L{torch_lib}",
                "-ltorch_cpu",
                "-lc10",
                f"-Wl,-rpath,{folder},-rpath,{torch_lib}",
            ),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    run = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True)
    said, error = run.stdout.split("\n")

    def numbers(count, scale):
        return torch.tensor([scale * (k * 7 % 11 - 5) for k in range(count)], dtype=torch.float64)

    layer = torch.nn.LSTM(3, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(numbers(60, 0.1).reshape(20, 3))
        layer.weight_hh_l0.copy_(numbers(100, 0.05).reshape(20, 5))
        want = layer(numbers(6, 0.2).reshape(1, 2, 3).expand(4, 2, 3))[0][-1].flatten()
    got = torch.tensor([float(v) for v in said.split()], dtype=torch.float64)
    assert (got - want).abs().max() <= 1e-6
    assert error == "the cpu backend has no cell 'no such cell'"
