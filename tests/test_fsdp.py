"Two processes that each hold a share of the model: the losses of one, half of its memory, and states that anybody can go on from"
import contextlib, errno, json, os, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from unittest.mock import patch
import psutil
import pytest
import torch
from torch.distributed.tensor import Shard, zeros
from continual_llm import train
from continual_llm.archive import DamagedFile, load_object, save_object
from continual_llm.checkpoint import Checkpoints, load_checkpoint
from continual_llm.cli import parse
from continual_llm.core import UserError
from continual_llm.distributed import Processes, join_processes
from continual_llm.model import ContinualLLM, model_config
from continual_llm.optim import all_of, make_optimizer
from continual_llm.sharded import SharedCheckpoints, held_bytes, make_mesh, shard
from continual_llm.train import pretrain
from tests.faults.runs import run_difference
from tests.test_elastic import COMMAND, steps, wait_for_steps
from tests.test_resume import TEXT

FLAGS = ('--config tiny --epochs 2 --batch_size 1 --grad_accumulation 4 --max_seq_len 32 --learning_rate 3e-3 --warmup_steps 5 '
         '--max_steps 30 --eval_every 8 --eval_tokens 256 --save_every 7 --precision fp32').split()  # step 20 has one block, and an evaluation one batch
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


def command(home, name, *more, start=()):
    return [sys.executable, *start, str(home/'command.py'), 'pretrain', '--data', str(home/'text.txt'), '--tokenizer', str(home/'tok'), '--cache', str(home/'cache'),
            '--save_dir', str(home/name), *FLAGS, *more]


def env(): return dict(os.environ, OMP_NUM_THREADS='1')


def go(home, name, *more, start=TORCHRUN):
    done = subprocess.run(command(home, name, *more, start=start), env=env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(run, kind): return [r for line in (run/'metrics.jsonl').read_text().splitlines() if (r := json.loads(line))['kind'] == kind]


def apart(a, b):
    "How far the losses of two runs are apart, as a share"
    pairs = [(x['loss'], y['loss']) for kind in ('step', 'eval') for x, y in zip(rows(a, kind), rows(b, kind), strict=True)]
    assert len(pairs) == 30 + 5
    return max(abs(x - y)/x for x, y in pairs)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A text, a tokenizer, the console command, a run of one process, and all that two processes with a share each do without being stopped"
    from continual_llm.tokenizer import train_tokenizer
    home = tmp_path_factory.mktemp('fsdp')
    (home/'text.txt').write_text('\n'.join(TEXT.split('\n')[:316]))
    (home/'command.py').write_text(COMMAND)
    (home/'untied.yaml').write_text('d_model: 64\nn_layers: 2\nn_heads: 4\nn_kv_heads: 2\nd_ff: 96\ntie_embeddings: false\n')
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    go(home, 'one', start=())
    in_two(home)
    return home


def test_the_losses_of_one(home):
    "Also in a step that is too short for both, and in evaluations of one batch; and what is published is whole"
    assert apart(home/'one', home/'two') < 1e-6
    for name in ('best/checkpoint.pt', 'epoch_1/checkpoint.pt', 'final/model.pt'):
        a, b = [load_checkpoint(home/run/name) for run in ('one', 'two')]
        assert {k: v for k, v in a.items() if 'val' not in k and k != 'model_state_dict'} == {k: v for k, v in b.items() if 'val' not in k and k != 'model_state_dict'}
        for n, t in a['model_state_dict'].items(): torch.testing.assert_close(b['model_state_dict'][n], t, rtol=1e-4, atol=1e-5)


def states(run): return sorted((run/'last').glob('*.pt'))


def shards(run, state): return sorted(next((run/'last').glob(f'{state.stem}-*')).glob('*.pt'))


def test_each_process_writes_its_own(home):
    "Each generation a small file and a file of each process, half of the whole"
    assert [p.stem for p in states(home/'two')] == ['000024', '000028', '000030'] and len(list((home/'two'/'last').iterdir())) == 6
    whole = states(home/'one')[-1].stat().st_size
    for state in states(home/'two'):
        sizes = [p.stat().st_size for p in shards(home/'two', state)]
        assert len(sizes) == 2 and all(.48 < size/whole < .52 for size in sizes) and state.stat().st_size < .05*whole


def flip(path, at=-400):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def exchange(a, b):
    a.rename(a.with_name('aside')); b.rename(a); a.with_name('aside').rename(b)


@pytest.mark.parametrize('what', ['flipped', 'missing', 'cut', 'exchanged', 'of another step', 'folder gone', 'table flipped'])
def test_damaged_shards_are_found(home, tmp_path, what):
    "And the generation before is taken; if all are damaged, that is an error"
    run = shutil.copytree(home/'two', tmp_path/'run')
    oldest, old, new = states(run)
    first, second = shards(run, new)
    if what == 'flipped': flip(second)
    if what == 'missing': second.unlink()
    if what == 'cut': second.write_bytes(second.read_bytes()[:-100])
    if what == 'exchanged': exchange(first, second)
    if what == 'of another step': shutil.copy(shards(run, old)[1], second)
    if what == 'folder gone': shutil.rmtree(second.parent)
    if what == 'table flipped': flip(new)
    state, path, skipped = Checkpoints(run).latest()
    assert state['step'] == 28 and path == old and [p for p, _ in skipped] == [new]
    for state in (oldest, old): flip(shards(run, state)[0], 3000)
    with pytest.raises(DamagedFile, match='--overwrite'): Checkpoints(run).latest()


def test_stopped_damaged_and_resumed_by_two_and_by_one(home):
    "SIGTERM: both save and leave. Two go on to the same bits, from the state before where the newest is damaged; one goes on to the same losses"
    with subprocess.Popen(command(home, 'cut', '--parallel', 'fsdp', start=TORCHRUN), env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        wait_for_steps(home/'cut', 16, p)
        p.send_signal(signal.SIGTERM)
        assert p.wait(120) != 0
    assert json.loads((home/'cut'/'run.json').read_text())['status'] == 'SIGTERM' and len(states(home/'cut')) >= 2 and len(steps(home/'cut')) < 30
    shutil.copytree(home/'cut', home/'alone')
    go(home, 'alone', '--resume', start=())
    assert apart(home/'one', home/'alone') < 1e-6
    newest = states(home/'cut')[-1]
    flip(shards(home/'cut', newest)[1])
    (orphan := home/'cut'/'last'/'000029-0123abcd').mkdir()  # of a save that was killed
    said = go(home, 'cut', '--resume', '--parallel', 'fsdp')
    assert f'Passed over {newest}' in said and '2 processes, each with a share of the model' in said
    assert not run_difference(home/'two', home/'cut') and not orphan.exists()


def test_two_machines_and_a_worker_that_is_killed(home):
    "Two agents of torchrun meet at an address; a worker of one is killed, both start theirs again, and with --resume the run ends in the same bits"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    start = ['-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-id', '7', '--max-restarts', '1']
    fresh = dict(env(), TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')  # or those that are started again read addresses of those before
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(subprocess.Popen(command(home, 'nodes', '--parallel', 'fsdp', '--resume', start=start), env=fresh, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)) for _ in range(2)]
        try:
            wait_for_steps(home/'nodes', 16, agents[0])
            psutil.Process(agents[1].pid).children()[0].kill()
            said = [a.communicate(timeout=120)[0] for a in agents]
        finally:
            for a in agents: a.terminate()
    assert [a.returncode for a in agents] == [0, 0], said
    assert 'exitcode: -9' in ''.join(said) and 'Resuming from' in ''.join(said)  # the other worker is ended by its agent, often before it can say that a partner is gone
    assert not run_difference(home/'two', home/'nodes')


FEW = dict(config='tiny', batch_size=1, grad_accumulation=4, max_seq_len=32, learning_rate=3e-3, warmup_steps=2, precision='fp32', dropout=0., eval_tokens=256, quiet=True)


def with_muon(home, name, **more):
    "Muon, multiplying in fp32, since bfloat16 would round apart what differs in the last bit; a head of its own, layers computed again, gradients always shortened"
    with patch('continual_llm.optim.multiplies_bf16', return_value=False):
        return pretrain(home/'text.txt', tokenizer=str(home/'tok'), cache=str(home/'cache'), save_dir=str(home/name),
                        **{**FEW, 'config': str(home/'untied.yaml')}, optimizer='muon', recompute=True, max_grad_norm=.05, max_steps=4, eval_every=2, **more)


def in_trouble(home, name, **more):
    "Three steps whose loss is not a number, on a course without detours: the run goes back, and on in another order"
    bad, read, make = [], train.Batches.__call__, train.make_parts
    def noted(self, step):
        bad[:] = [not self.detours and 5 <= step < 8]
        return read(self, step)
    def poisoned(*args, **how):
        parts = make(*args, **how)
        def loss_fn(model, micro):
            total, n = parts.loss_fn(model, micro)
            return total*float('nan') if bad[0] else total, n
        return replace(parts, loss_fn=loss_fn)
    with patch.object(train.Batches, '__call__', noted), patch.object(train, 'make_parts', poisoned):
        return pretrain(home/'text.txt', tokenizer=str(home/'tok'), cache=str(home/'cache'), save_dir=str(home/name), **FEW, max_steps=8, save_every=2, **more)


def full_disk(home, me):
    "The second of two cannot write its shard: what each of them says, and what is left on the disk"
    store, tree = SharedCheckpoints(home/'full', me), dict(model_state_dict=dict(w=zeros(4, 3, device_mesh=make_mesh(me), placements=[Shard(0)])), note='kept')
    store.save_last(tree, 1)
    def no_room(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch('os.fsync', no_room) if me.rank else contextlib.nullcontext():
        try: store.save_last(tree, 2)
        except (OSError, UserError) as e: said = f'{type(e).__name__}: {e}'
    me.wait()
    again = store.latest()[0]
    return said, sorted(p.name for p in (home/'full'/'last').iterdir())[0], len(list((home/'full'/'last').iterdir())), again['note'], all_of(again['model_state_dict']['w']).shape


def from_the_command(home, name, **more):
    "The run that the flags above describe"
    return pretrain(**parse('pretrain', pretrain, command(home, name)[3:]), **more)


def both(home):
    "What each of two processes does and finds"
    with join_processes() as me:
        from_the_command(home, 'two', parallel='fsdp', quiet=True)
        if me.first: states(shutil.copytree(home/'one', home/'from_one'))[-1].unlink()
        me.wait()
        from_the_command(home, 'from_one', parallel='fsdp', resume=True, quiet=True)
        with_muon(home, 'muon2', parallel='fsdp')
        in_trouble(home, 'trouble2', parallel='fsdp')
        timed = with_muon(home, 'timed', parallel='fsdp', max_time=1e-9)
        model = shard(ContinualLLM(model_config('tiny', vocab_size=301)), me)
        model(torch.ones(1, 8, dtype=torch.int64), targets=torch.ones(1, 8, dtype=torch.int64)).backward()
        gradients = held_bytes([p.grad for p in model.parameters()])
        (opt := make_optimizer(model)).step()
        found = dict(weights=held_bytes(model.state_dict()), gradients=gradients, moments=held_bytes(opt.state_dict()), full=full_disk(home, me), timed=timed.stopped)
        (home/f'found{me.rank}.json').write_text(json.dumps(found))


def in_two(home):
    "The above, in two processes"
    (home/'both.py').write_text('import sys, pathlib\nfrom tests.test_fsdp import both\nboth(pathlib.Path(sys.argv[1]))\n')
    done = subprocess.run([sys.executable, *TORCHRUN, str(home/'both.py'), str(home)], env=dict(env(), PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_go_on_from_one(home):
    "The state of a plain process, taken up by two with a share each"
    run = home/'from_one'
    assert apart(home/'one', run) < 1e-6 and [len(list((run/'last').glob(n))) for n in ('*.pt', '*-*')] == [3, 1]  # the newest alone is of two


def test_muon_and_going_back(home):
    "Muon, an untied head, --recompute, clipping; going back after a divergence; and max_time"
    with_muon(home, 'muon1')
    in_trouble(home, 'trouble1')
    for name, n in (('muon', 4), ('trouble', 10)):
        a, b = [steps(home/f'{name}{i}') for i in (1, 2)]
        assert len(a) == len(b) > 3 and max(abs(x - y)/x for x, y in zip(a, b)) < 1e-6
    notes = [[r['text'] for r in rows(home/f'trouble{i}', 'note')] for i in (1, 2)]
    assert len(notes[0]) == 4 and 'Back to the state after step' in notes[0][-1] and notes[0] == notes[1]
    assert json.loads((home/'timed'/'run.json').read_text())['status'] == 'max_time' and [p.stem for p in states(home/'timed')] == ['000000']


def found(home): return [json.loads((home/f'found{i}.json').read_text()) for i in (0, 1)]


def test_half_of_the_memory(home):
    "Weights, gradients and moments: together what one process holds, each half of it"
    (a, b), model = found(home), ContinualLLM(model_config('tiny', vocab_size=301))
    n, counts = model.n_params(), 8*len(list(model.parameters()))  # AdamW counts the steps of each weight besides
    for name, size in (('weights', 4*n), ('gradients', 4*n), ('moments', 8*n)):
        assert a[name] + b[name] == size + (name == 'moments')*counts and abs(a[name] - b[name]) <= .01*size, name
    assert a['timed'] == b['timed'] == 'max_time'


def test_a_full_disk_in_one_of_two(home):
    "Both fail in the same words, nothing is left of the save, and the state before is there"
    a, b = [f['full'] for f in found(home)]
    for said in (a[0], b[0]): assert 'disk full' in said and '1.pt' in said
    assert a[0].startswith('StorageError') and b[0].startswith('UserError')
    assert a[1:] == b[1:] == ['000001-' + a[1][7:], 2, 'kept', [4, 3]]


HOSTILE = dict(
    a_place_outside=lambda s: s.update(folder='../000001-01234567'),
    a_file_outside=lambda s: s.update(files={'../../0.pt': ''}),
    no_table=lambda s: s.pop('tensors'),
    endless=lambda s: s['tensors'].update({'["x"]': dict(size=[2**40], dtype='float32', chunks=[dict(offset=[0], size=[2**40], file='0.pt')])}),
    too_few_parts=lambda s: next(iter(s['tensors'].values()))['chunks'].pop(),
    beyond_the_end=lambda s: next(iter(s['tensors'].values()))['chunks'][1].update(offset=[10**6, 0]),
    no_dtype=lambda s: next(iter(s['tensors'].values())).update(dtype='nn'),
    no_such_part=lambda s: s['tensors'].update({'["y"]': dict(size=[1], dtype='float32', chunks=[dict(offset=[0], size=[1], file='0.pt')])}),
    no_path=lambda s: s['tensors'].update({'{': s['tensors'].pop(next(iter(s['tensors'])))}))


@pytest.mark.parametrize('what', HOSTILE)
def test_a_table_that_leads_astray(home, tmp_path, what):
    "A state with a right checksum whose table cannot be followed is passed over"
    run = shutil.copytree(home/'two', tmp_path/'run')
    state = load_object(new := states(run)[-1])
    HOSTILE[what](state['shards'])
    save_object(state, new)
    found, path, skipped = Checkpoints(run).latest()
    assert found['step'] == 28 and [p for p, _ in skipped] == [new]


@pytest.mark.parametrize('flags,said', [(['--parallel', 'fsdp'], 'start several with `torchrun'), (['--parallel', 'zero'], "parallel='zero' is not one of ddp, fsdp")])
def test_refused(home, flags, said):
    done = subprocess.run(command(home, 'no', *flags), env=env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and not (home/'no').exists()


def test_more_processes_than_blocks(home):
    "Refused before anything is read, with the way out"
    with patch('continual_llm.train.join_processes', lambda device: contextlib.nullcontext(Processes(0, 8))), pytest.raises(UserError, match='8 processes cannot share .* = 4 blocks evenly; make it a multiple of 8'):
        pretrain('nowhere.txt', batch_size=1, grad_accumulation=4, save_dir=str(home/'no'), quiet=True)
