"Reading a run while a child process trains it: nothing is disturbed, nothing half-written is taken for damage"
import os, signal, subprocess, sys, time
import pytest
from continual_llm.core import UserError
from continual_llm.runs import compare_runs, load_run
from continual_llm.tokenizer import train_tokenizer

LINES = [f'the {a} sat on the {b} and saw the {a} .\n\n' for a in 'cat horse hen fox owl'.split() for b in 'mat log hillside road'.split()]*400
SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=16, dropout=0.)


@pytest.fixture
def child(tmp_path):
    "A process that trains until it is killed"
    (tmp_path/'text.txt').write_text(''.join(LINES))
    (tmp_path/'shape.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in SHAPE.items()))
    train_tokenizer(tmp_path/'text.txt', vocab_size=290, save=tmp_path/'tok')
    asked = dict(data=str(tmp_path/'text.txt'), config=str(tmp_path/'shape.yaml'), tokenizer=str(tmp_path/'tok'), cache=str(tmp_path/'cache'), save_dir=str(tmp_path/'runs'/'one'),
                 batch_size=2, grad_accumulation=1, epochs=1000, eval_every=50, save_every=50, eval_tokens=200, early_stopping_patience=0, quiet=True, device='cpu')
    p = subprocess.Popen([sys.executable, '-c', f'from continual_llm.train import pretrain\npretrain(**{asked!r})'])
    yield p
    p.kill()
    p.wait()


def until(found, child, seconds=100):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert child.poll() is None
        try:
            if value := found(): return value
        except UserError as e:
            if 'there is no run' not in str(e): raise
        time.sleep(.02)
    raise AssertionError('nothing came')


def test_a_run_is_read_while_it_trains(child, tmp_path):
    folder = tmp_path/'runs'/'one'
    run = until(lambda: (r := load_run(folder)).best and r, child)
    assert run.status == 'running' and run.settings['d_model'] == 16 and run.plot().axes
    assert isinstance(run.generate('the', max_tokens=4, temperature=0), str)
    lock, seen = (folder/'.lock').read_bytes(), len(run.history.records)
    counts = [len(run.refresh().history.records) for _ in range(100)]  # now and then in the midst of a line
    assert counts == sorted(counts) and until(lambda: len(run.refresh().history.records) > seen, child)
    first = run.model
    until(lambda: run.refresh().best['step'] >= 200, child)
    assert run.model is not first and 'running' in repr(compare_runs(str(tmp_path/'runs'/'*')))
    assert (folder/'.lock').read_bytes() == lock and child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert load_run(folder).status.startswith('killed') and len(load_run(folder).history.records) >= counts[-1]
