"""torch's own module database, run against our six classes: every input and every error input."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

# On import it forbids torch.backends' flags to be set for the rest of the process, which other tests do.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = {name: next(info for info in module_db if info.module_cls is getattr(nn, name)) for name in NAMES}
DTYPES = (torch.float32, torch.float64)


def tensors_of(value) -> list[torch.Tensor]:
    """All tensors in nested tuples and packed sequences, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def outputs_and_gradients(module: nn.Module, given: tuple, keywords: dict) -> list[torch.Tensor]:
    given, keywords = copy.deepcopy((given, keywords))
    leaves = [t for t in tensors_of((*given, *keywords.values())) if t.requires_grad]
    outputs = tensors_of(module(*given, **keywords))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    gradients = torch.autograd.grad(outputs, [*leaves, *module.parameters()], weights)
    assert leaves
    return [*(t.detach() for t in outputs), *gradients]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_input(name, dtype, training):
    info = INFOS[name]
    samples = list(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training))
    assert samples
    for sample in samples:
        args, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **keywords, dtype=dtype).train(training)
        ours = getattr(fusedrnn, name)(*args, **keywords, dtype=dtype).train(training)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert repr(ours) == repr(theirs)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        theirs.reset_parameters()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        given = sample.forward_input.args, sample.forward_input.kwargs
        got, want = outputs_and_gradients(ours, *given), outputs_and_gradients(theirs, *given)
        assert len(got) == len(want)
        tight = 1e-12 if dtype == torch.float64 else 1e-5
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=tight, atol=tight)
        if sample.reference_fn is not None and not isinstance(given[0][0], PackedSequence):
            # The reference calls the module with a batch of one; it compares our module with itself.
            found = tensors_of(sample.reference_fn(ours, *given[0], **given[1]))
            for a, b in zip(found, tensors_of(ours(*given[0], **given[1])), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_error(name, dtype, training):
    info = INFOS[name]
    cases = list(info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training))
    assert cases
    for case in cases:
        sample = case.module_error_input
        args, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        keywords = {"dtype": dtype} | keywords
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                getattr(fusedrnn, name)(*args, **keywords)
        else:
            module = getattr(fusedrnn, name)(*args, **keywords).train(training)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)
