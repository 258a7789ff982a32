"What a GPU is asked to do, followed on a CPU: nothing of a step is read but what `read` reads, and attention stays on its fast path"
import math
from unittest.mock import Mock, patch
import numpy as np
import pytest, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from continual_llm.batches import Batches, moved
from continual_llm.loop import LoopConfig, Parts, take_step
from continual_llm.model import ContinualLLM, ModelConfig
from continual_llm.penalties import l2_penalty
from continual_llm.train import carry_out, make_parts

SHAPE = dict(vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=16)


@pytest.fixture
def nowhere(monkeypatch):
    "Torch's `meta` device has shapes and no numbers: who reads one fails. Autocast does not know it, so it is asked nothing"
    for module in ('model', 'ops'): monkeypatch.setattr(f'continual_llm.{module}.product_dtype', lambda x: x.dtype)
    return torch.device('meta')


@pytest.mark.parametrize('held', [2**30, 0], ids=['all scores', 'slices'])
@pytest.mark.parametrize('more', [{}, dict(dropout=.1), dict(qk_norm=True, tie_embeddings=False)], ids=['plain', 'dropout', 'qk_norm'])
def test_a_step_is_waited_for_once(nowhere, monkeypatch, held, more):
    "Batches from a text that is there, two micro-batches, a penalty, clipping: one reading, of two losses and a norm"
    monkeypatch.setattr('continual_llm.ops.HELD', held)
    model = ContinualLLM(ModelConfig(**{**SHAPE, **more})).to(nowhere)
    batches = Batches(np.arange(300, dtype=np.uint16), 16, 3, 2)
    batches.ids = moved(batches.ids, nowhere)
    parts = make_parts(model, None, batches, None, LoopConfig(9))
    assert parts.batch_at(0)[0][0].device == nowhere
    start = {n: p.detach() for n, p in model.named_parameters()}
    parts = Parts(parts.batch_at, parts.loss_fn, None, None, penalty=l2_penalty(model, start, .1))
    opt, reading = torch.optim.SGD(model.parameters(), lr=0.), Mock(return_value=(96*math.log(300), 1.))
    with patch('continual_llm.loop.read', reading): info = take_step(model, opt, parts, LoopConfig(9), 0)
    assert reading.call_count == 1 and [len(half) for half in reading.call_args[0][0]] == [2]
    assert info['tokens'] == 96 and not info['wrong']
    with pytest.raises(NotImplementedError, match='meta'): take_step(model, opt, parts, LoopConfig(9), 0)  # as does the reading itself


class Kernels(TorchDispatchMode):
    "The attention kernels that are called, and with what"
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'scaled_dot_product' in str(func) and 'backward' not in str(func): self.seen.append((str(func), args[:3], args[3:], kwargs or {}))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('precision', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('more', [{}, dict(qk_norm=True), dict(n_kv_heads=4), dict(head_dim=64)], ids=['shared keys', 'qk_norm', 'own keys', 'wide heads'])
def test_attention_stays_on_the_fast_kernel(precision, more):
    "In training, queries, keys and values reach the kernel in one type, that of the products, causal by its flag and without a mask; the slow way is shut off and not missed"
    torch.manual_seed(0)
    model, ids = ContinualLLM(ModelConfig(**{**SHAPE, **more})), torch.randint(300, (2, 17))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), Kernels() as kernels, torch.autocast('cpu', torch.bfloat16, enabled=precision == torch.bfloat16):
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
    assert len(kernels.seen) == 2
    for name, qkv, rest, named in kernels.seen:
        assert 'flash' in name and {t.dtype for t in qkv} == {precision}
        assert True in rest and named.get('attn_mask') is None and not any(isinstance(a, torch.Tensor) for a in rest)


@pytest.mark.parametrize('device, precision, asked', [('cuda', 'bf16', True), ('cuda:1', 'bf16', True), ('cuda', 'fp32', False), ('cpu', 'bf16', False)])
def test_tf32_is_for_what_bf16_leaves(device, precision, asked):
    "A run in fp32 multiplies in fp32, whatever the machine offers"
    class Asked(Exception): pass
    job, machine = Mock(), Mock(side_effect=Asked)
    job.loop = LoopConfig(1, device=device, precision=precision)
    job.begin.return_value = dict(threads=1, settings={})
    with patch('continual_llm.train.machine', machine), patch('continual_llm.train._open'), pytest.raises(Asked): carry_out(job, quiet=True)
    assert machine.call_args[0][2] is asked
