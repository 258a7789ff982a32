"What `run.json` says: which run a folder holds, how it ended, and whose checkpoints may stand in it"
import errno, json, shutil
from unittest.mock import patch
import numpy as np
import pytest
import torch
from continual_llm import train
from continual_llm.archive import DamagedFile, StorageError, load_object
from continual_llm.checkpoint import load_checkpoint, run_id
from continual_llm.compare import compare_twins
from continual_llm.core import UserError
from continual_llm.evaluate import evaluate
from continual_llm.generate import load_model
from continual_llm.tokenizer import train_tokenizer

SHAPE = 'd_model: 16\nn_layers: 1\nn_heads: 2\nn_kv_heads: 1\nd_ff: 32\nmax_seq_len: 16\n'


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A text, a tokenizer, and a finished run of two epochs"
    home = tmp_path_factory.mktemp('record')
    (home/'text.txt').write_text('\n'.join(f'the {a} sat on the {b} .\n' for a in 'cat dog hen fox owl'.split() for b in 'mat log hill road roof farm'.split()*2))
    (home/'shape.yaml').write_text(SHAPE)
    train_tokenizer(home/'text.txt', vocab_size=280, save=home/'tok')
    run(home, 'whole')
    return home


def run(home, name, **more):
    settings = dict(data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), epochs=2, batch_size=4, grad_accumulation=1, learning_rate=3e-3,
                    warmup_steps=2, save_every=2, precision='fp32', save_dir=str(home/name), quiet=True)
    return train.pretrain(**{**settings, **more})


def record(home, name): return json.loads((home/name/'run.json').read_text())


@pytest.fixture
def copy(home, tmp_path):
    "A copy of the finished run, to spoil"
    return shutil.copytree(home/'whole', tmp_path/'run')


@pytest.mark.parametrize('name', ['best/checkpoint.pt', 'epoch_1/checkpoint.pt', 'final/model.pt'])
def test_a_checkpoint_of_another_run_is_refused(home, copy, name):
    if not (home/'other').exists(): run(home, 'other', seed=1)
    own, other = [record(home, n)['accepts'][0] for n in ('whole', 'other')]
    assert own != other
    shutil.copy(home/'other'/name, copy/name)
    uses = [lambda: load_checkpoint(copy/name), lambda: load_model(copy/name, device='cpu'), lambda: evaluate(copy/name, str(home/'text.txt'), device='cpu')]
    if name.startswith('best'): uses += [lambda: load_model(copy, device='cpu'), lambda: run(home, copy, resume=True)]
    for use in uses:
        with pytest.raises(DamagedFile, match=f'{name} is of run {other} and its folder of run {own}'): use()
    shutil.copy(copy/name, copy.parent/'copy.pt')
    assert load_checkpoint(copy.parent/'copy.pt')['run'] == other  # the way out


@pytest.mark.parametrize('name', ['best/checkpoint.pt', 'final/model.pt'])
def test_an_older_checkpoint_of_the_same_run_is_refused(copy, name):
    shutil.copy(copy/'epoch_1'/'checkpoint.pt', copy/name)
    with pytest.raises(DamagedFile, match='and should be of step'): load_model(copy/name, device='cpu')


def test_equal_runs_have_equal_names(home):
    run(home, 'again')
    one, two = [load_object(home/n/'best'/'checkpoint.pt') for n in ('whole', 'again')]
    assert one['run'] == two['run'] == run_id(record(home, 'whole')['settings']) and all(torch.equal(a, b) for a, b in zip(one['model_state_dict'].values(), two['model_state_dict'].values()))
    shutil.copy(home/'again'/'best'/'checkpoint.pt', home/'whole'/'best'/'checkpoint.pt')
    load_model(home/'whole', device='cpu')  # the same bits, whoever computed them


def test_a_parent_of_the_run_may_stand_in_its_folder(home, copy):
    if not (home/'other').exists(): run(home, 'other', seed=1)
    said = {k: v for k, v in json.loads((copy/'run.json').read_text()).items() if k != 'checksum'}
    (copy/'run.json').write_text(json.dumps(dict(said, accepts=said['accepts'] + record(home, 'other')['accepts'])))
    shutil.copy(home/'other'/'epoch_1'/'checkpoint.pt', copy/'best'/'checkpoint.pt')
    assert load_checkpoint(copy)['run'] == record(home, 'other')['accepts'][0]


def test_a_run_that_is_stopped_and_goes_on(home):
    "`result` is there while nobody trains, and the name does not change"
    run(home, 'left', max_time=1e-5)
    before, seen = record(home, 'left'), []
    assert before['status'] == 'max_time' and before['result']['step'] == 0
    def fit(*parts):
        seen.append(record(home, 'left'))
        raise SystemExit  # as if it ended here
    with patch.object(train, 'fit', fit), pytest.raises(SystemExit): run(home, 'left', resume=True)
    assert seen[0] == record(home, 'left') and seen[0]['status'] == 'running' and 'result' not in seen[0]
    run(home, 'left', resume=True)
    a, b = record(home, 'left'), record(home, 'whole')
    assert a['status'] == 'complete' and a['accepts'] == b['accepts'] == before['accepts'] and {**a['result'], 'seconds': 0} == {**b['result'], 'seconds': 0}


def test_a_finished_run_that_is_resumed_keeps_its_record(home, copy):
    before = (copy/'run.json').read_bytes()
    run(home, copy, resume=True)
    assert (copy/'run.json').read_bytes() == before
    shutil.copy(copy/'epoch_1'/'checkpoint.pt', copy/'best'/'checkpoint.pt')
    with pytest.raises(DamagedFile): run(home, copy, resume=True)
    assert (copy/'run.json').read_bytes() == before  # the run was complete; it is its folder that was spoilt


def test_a_run_that_fails_says_so_and_can_go_on(home):
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    def fit(*parts):
        with patch('os.fsync', full): parts[5].publish('epoch_1/checkpoint.pt', dict(x=torch.zeros(9)))
    with patch.object(train, 'fit', fit), pytest.raises(StorageError): run(home, 'failed')
    assert record(home, 'failed')['status'].startswith('failed: disk full: ')
    def broken(*parts): raise RuntimeError('a fault of ours')
    with patch.object(train, 'fit', broken), pytest.raises(RuntimeError): run(home, 'failed', resume=True)
    assert record(home, 'failed')['status'] == 'failed: RuntimeError: a fault of ours'
    run(home, 'failed', resume=True)
    assert record(home, 'failed')['status'] == 'complete' and record(home, 'failed')['accepts'] == record(home, 'whole')['accepts']


def test_a_failure_on_a_full_disk_leaves_the_record_whole(home):
    "If even the record cannot be written, the first error is the one that is told"
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    def fit(*parts):
        patch('os.fsync', full).start()
        raise UserError('the first error')
    try:
        with patch.object(train, 'fit', fit), pytest.raises(UserError, match='the first error'): run(home, 'no_room')
    finally: patch.stopall()
    assert record(home, 'no_room')['status'] == 'running'


def test_numbers_of_numpy_are_as_good_as_plain_ones(home):
    "Each is kept as Python's own, so that the run is the same, and neither the record nor a resume state refuses it at the first save"
    plain = dict(epochs=2, batch_size=4, grad_accumulation=1, learning_rate=3e-3, warmup_steps=2, save_every=2, early_stopping_patience=3, max_seq_len=16, dropout=0., weight_decay=.1, max_grad_norm=1.,
                 seed=0, compile=False, deterministic=False, spike=8., eval_every=0, eval_tokens=0, max_steps=0, max_time=0., keep_epochs=0, memory=.05, vocab_size=280, tokenizer=None)
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    run(home, 'numpy', **{k: v if v is None else kinds[type(v)](v) for k, v in plain.items()})
    run(home, 'plain', **plain)
    assert record(home, 'numpy')['settings'] == record(home, 'plain')['settings'] and not compare_twins(home/'plain', home/'numpy').differences
