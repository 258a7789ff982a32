"Each option of `bench` changes what it says"
import json, os
import pytest
import torch
from continual_llm import bench as benches
from continual_llm.bench import bench
from continual_llm.cli import main
from continual_llm.core import UserError
from continual_llm.optim import Muon
from tests.test_options import SHAPE, SHOWN, options, shows

SMALL = dict(config=dict(SHAPE, max_seq_len=64), vocab_size=50, batch_size=1, rounds=1, device='cpu')


@pytest.fixture(autouse=True)
def small_limits(monkeypatch): monkeypatch.setattr(benches, 'SIZES', dict(cpu=(64, 2**10)))


def amounts(**given): return {what: f.amount for what, f in bench(**{**SMALL, **given}).figures.items()}


@shows(bench, 'config', 'batch_size', 'max_seq_len', 'vocab_size', 'rounds')
def test_what_is_measured():
    "Tokens of a step, operations of a token, parameters, rounds"
    plain, report = amounts(), bench(**SMALL)
    assert plain['training fp32'] == 64 and plain['writing 16 texts'] == 16*plain['writing fp32']
    assert amounts(batch_size=3)['training fp32'] == 192 and amounts(max_seq_len=16)['training fp32'] == 16
    assert bench(**{**SMALL, 'vocab_size': 70}).flops - report.flops == 6*20*SHAPE['d_model']
    assert bench(**{**SMALL, 'config': dict(SHAPE, n_layers=2, max_seq_len=64)}).flops > report.flops
    assert {len(f.seconds) for f in bench(**{**SMALL, 'rounds': 3}).figures.values()} == {3}


@shows(bench, 'optimizer')
def test_optimizer(monkeypatch):
    "The steps are this optimizer's"
    steps, real = [], Muon.step
    monkeypatch.setattr(Muon, 'step', lambda self: steps.append(1) or real(self))
    bench(**SMALL)
    assert not steps
    bench(**SMALL, optimizer='muon')
    assert len(steps) >= 2


@shows(bench, 'device', 'save')
def test_where_it_is_measured(tmp_path, capsys):
    "On this device; in a file, with a checksum; and printed by the command"
    with pytest.raises(UserError, match='device='): bench(device='tpu')
    with pytest.raises(SystemExit) as e: main(['bench', '--config', 'tiny', '--max_seq_len', '16', '--vocab_size', '50', '--batch_size', '1', '--rounds', '1', '--device', 'cpu', '--save', str(tmp_path/'b.json')])
    said, kept = capsys.readouterr().out, json.loads((tmp_path/'b.json').read_text())
    assert e.value.code == 0 and '| training fp32 |' in said and kept['machine'] in said and 'checksum' in kept
    assert {f['what'] for f in kept['figures']} >= {'products fp32', 'copying', 'training fp32', 'writing fp32'} and all(f['per_second'] > 0 for f in kept['figures'])


def test_threads(monkeypatch):
    "Where torch has several threads, one alone is measured beside them, and there are as many as before afterwards"
    threads, seen, real = [4], [], benches.take_step
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads[0])
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr(benches, 'take_step', lambda *a: seen.append(threads[0]) or real(*a))
    assert 'training, one thread' in bench(**SMALL).figures and threads == [4] and seen.count(1) == 2
    threads[0] = 1
    assert 'training, one thread' not in bench(**SMALL).figures


def test_every_option_is_shown(): assert set(SHOWN[bench]) == options(bench)


@pytest.mark.parametrize('given,said', [(dict(rounds=0), 'rounds=0'), (dict(batch_size=0), 'batch_size=0'), (dict(vocab_size='x'), "vocab_size='x'"), (dict(optimizer='sgd'), "'sgd'"), (dict(save=3), 'save=3'), (dict(save='/nowhere/x/b.json'), 'there is no folder /nowhere/x'),
                                        (dict(config='smal'), "did you mean 'small'?")])
def test_bad_input(given, said):
    with pytest.raises(UserError) as e: bench(**{**SMALL, **given})
    assert said in str(e.value) and '\n' not in str(e.value)
