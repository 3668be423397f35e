"""convert on models of other projects: swapped whole, with the same outputs, gradients and training steps."""

import copy

import pytest
import torch
from torch import nn

import fusedrnn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def needs(*packages: str):
    """The packages, imported; skips where one is missing."""
    return [
        pytest.importorskip(name, reason=f"whether {name}'s models run converted is not tested: extra 'models'")
        for name in packages
    ]


def tensors(found) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(found, is_leaf=lambda t: isinstance(t, nn.utils.rnn.PackedSequence))
    leaves = [t.data if isinstance(t, nn.utils.rnn.PackedSequence) else t for t in leaves]
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def check(model: nn.Module, run, count: int) -> None:
    """``run(model)`` gives the same before and after convert, and so do its gradients and three training steps; the
    model has ``count`` recurrent layers and cells.
    """
    models = [model, copy.deepcopy(model)]
    fusedrnn.convert(models[1])
    report = fusedrnn.conversion_report(models[1])
    assert [entry.swapped for entry in report] == [True] * count, "\n".join(map(str, report))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    for _ in range(3):
        seen = []
        for each, optimizer in zip(models, optimizers):
            torch.manual_seed(1)
            optimizer.zero_grad()
            outputs = tensors(run(each))
            sum(t.sin().mean() for t in outputs).backward()
            grads = [p.grad for p in each.parameters()]
            assert any(g is not None and g.abs().max() > 0 for g in grads)
            seen.append([*outputs, *(g for g in grads if g is not None)])
            optimizer.step()
        for got, want in zip(seen[1], seen[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("separate", [True, False])
def test_sb3_contrib(separate):
    policies, states_type, spaces = needs(
        "sb3_contrib.common.recurrent.policies", "sb3_contrib.common.recurrent.type_aliases", "gymnasium.spaces"
    )
    policy = policies.RecurrentActorCriticPolicy(
        spaces.Box(-1, 1, (5,)), spaces.Discrete(3), lambda _: 1e-3, lstm_hidden_size=8, n_lstm_layers=2,
        enable_critic_lstm=separate, shared_lstm=not separate,
    )  # fmt: skip
    observations, actions = torch.randn(12, 5), torch.randint(0, 3, (12,))
    starts = (torch.arange(12) % 5 == 0).float()
    state = tuple(torch.randn(2, 3, 8) for _ in range(2))
    given = states_type.RNNStates(state, state)
    check(policy, lambda p: p.evaluate_actions(observations, actions, given, starts), 1 + separate)


def test_sb3_contrib_learns():
    (ppo,) = needs("sb3_contrib")
    learned = []
    for swap in (False, True):
        agent = ppo.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0)
        if swap:
            fusedrnn.convert(agent.policy)
        agent.learn(128)
        learned.append(list(agent.policy.parameters()))
    for p, q in zip(*learned, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torchrl(name):
    """In its recurrent mode: one call for a whole trajectory, in which episodes begin."""
    rl, tensordict = needs("torchrl.modules", "tensordict")
    module = getattr(rl, f"{name}Module")(input_size=3, hidden_size=4, num_layers=2, in_key="obs", out_key="emb")
    starts = torch.rand(4, 9, 1) < 0.3
    data = tensordict.TensorDict({"obs": torch.randn(4, 9, 3), "is_init": starts}, [4, 9])

    def run(m):
        with rl.set_recurrent_mode(True):
            whole = m(data.clone())
        step = m(data[:, 0].clone())
        return whole["emb"], step["emb"]

    check(module, run, 1)


def test_demucs():
    demucs, hdemucs = needs("demucs.demucs", "demucs.hdemucs")
    wave = torch.randn(2, 2, 4000)
    model = demucs.Demucs(["a", "b"], channels=4, depth=2, lstm_layers=2, resample=False)
    fitting = torch.randn(2, 2, model.valid_length(4000))
    check(model, lambda m: m(fitting), sum(isinstance(m, nn.LSTM) for m in model.modules()))
    blocks = demucs.BLSTM(6, layers=2, max_steps=20, skip=True)
    check(blocks, lambda m: m(wave.reshape(2, 2, 4000)[:, :, :210].repeat(1, 3, 1)), 1)
    model = hdemucs.HDemucs(["a", "b"], channels=4)
    recurrent = sum(isinstance(m, nn.LSTM) for m in model.modules())
    assert recurrent > 1
    check(model, lambda m: m(wave), recurrent)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_speechbrain(name):
    rnn, crdnn = needs("speechbrain.nnet.RNN", "speechbrain.lobes.models.CRDNN")
    x, lengths = torch.randn(4, 10, 20), torch.tensor([1.0, 0.5, 0.8, 0.1])
    options = {"hidden_size": 5, "input_size": 20, "num_layers": 2}
    layer = getattr(rnn, name)(**options, bidirectional=True)
    check(layer, lambda m: m(x, lengths=lengths), 1)
    cell = getattr(rnn, f"{name}Cell")(**options)
    check(cell, lambda m: m(x[:, 0]), 2)
    model = crdnn.CRDNN(
        input_shape=x.shape, cnn_blocks=1, cnn_channels=[4], rnn_class=getattr(rnn, name), rnn_neurons=6, dnn_neurons=5,
        dropout=0.0,
    )  # fmt: skip
    check(model, lambda m: m(x), 1)


def test_stanza():
    tokens, packed, languages = needs(
        "stanza.models.tokenization.model", "stanza.models.common.packed_lstm", "stanza.models.langid.model"
    )
    args = {
        "feat_dim": 3, "rnn_layers": 2, "conv_res": "1,3", "hier_conv_res": True, "use_mwt": True, "hierarchical": True,
        "hier_invtemp": 0.5, "tok_noise": 0.0,
    }  # fmt: skip
    tokenizer = tokens.Tokenizer(args, 20, 6, 8, 0.0, 0.0)
    x, features = torch.randint(1, 20, (3, 9)), torch.randn(3, 9, 3)
    check(tokenizer, lambda m: m(x, features, [9, 5, 2]), 2)
    for dropped in (0.0, 0.5):
        layer = packed.PackedLSTM(6, 8, 2, batch_first=True, bidirectional=True, pad=True, rec_dropout=dropped)
        data = torch.randn(3, 9, 6)
        check(layer, lambda m, data=data: m(data, [9, 5, 2]), 4 if dropped else 1)
    classifier = languages.LangIDBiLSTM({"<PAD>": 0, "a": 1, "b": 2}, {"en": 0, "fr": 1}, 2, 6, 8, 3)
    check(classifier, lambda m: m(torch.arange(27).reshape(3, 9) % 3), 1)


def test_openunmix():
    (umx,) = needs("openunmix.model")
    for alone in (True, False):
        model = umx.OpenUnmix(nb_bins=20, nb_channels=2, hidden_size=8, nb_layers=3, unidirectional=alone)
        model.lstm.dropout = 0.0
        x = torch.rand(3, 2, 20, 11)
        check(model, lambda m, x=x: m(x), 1)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_pytorch_forecasting(name):
    """Its layers are subclasses whose forward packs and hands over to super()."""
    (rnn,) = needs("pytorch_forecasting.models.nn.rnn")
    layer, x = rnn.get_rnn(name)(3, 4, num_layers=2, batch_first=True), torch.randn(4, 7, 3)

    def run(m):
        y, states = m(x, lengths=torch.tensor([7, 0, 3, 1]), enforce_sorted=False)
        return y, states, m(x, m.init_hidden_state(x))

    check(layer, run, 1)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_pytorch_forecasting_network(name):
    forecasting, pandas = needs("pytorch_forecasting", "pandas")
    frame = pandas.DataFrame({"t": [*range(30)] * 2, "group": ["a"] * 30 + ["b"] * 30})
    frame["value"] = torch.randn(60).numpy()
    data = forecasting.TimeSeriesDataSet(
        frame, "t", "value", ["group"], max_encoder_length=8, min_encoder_length=3, max_prediction_length=3,
        time_varying_unknown_reals=["value"], time_varying_known_reals=["t"],
    )  # fmt: skip
    model = forecasting.RecurrentNetwork.from_dataset(data, cell_type=name, hidden_size=8, rnn_layers=2, dropout=0.0)
    batch, _ = next(iter(data.to_dataloader(train=False, batch_size=5)))
    check(model, lambda m: m(batch)["prediction"], 1)
