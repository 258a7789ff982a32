"Checkpoints under damage, full disks and kills: nothing is lost, nothing wrong is loaded (files made to do harm: test_hostile.py)"
import contextlib, errno, itertools, os, random, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
from unittest.mock import patch
import pytest
import torch
from hypothesis import given, settings, strategies as st
from continual_llm import archive, checkpoint, core
from continual_llm.archive import DamagedFile, StorageError, load_object, plain, save_object
from continual_llm.checkpoint import FORMAT_VERSION, Checkpoints, checkpoint_payload, load_checkpoint
from continual_llm.core import UserError, file_hash

SEED = int(os.environ.get('CONTINUAL_LLM_FAULT_SEED', 0))  # another seed tries other places
MANY = int(os.environ.get('CONTINUAL_LLM_FAULTS', 1))      # a larger number tries more of them


def payload(epoch, step=None):
    w = torch.full((40, 25), float(epoch))
    return dict(config=dict(vocab_size=40), model_state_dict={'embed.weight': w, 'head.weight': w}, epoch=epoch, val_loss=5.-epoch, val_perplexity=2.,
                step=10*epoch if step is None else step, tokenizer_hash='ab12', format_version=FORMAT_VERSION)


def state(step):
    return dict(payload(0, step), optimizer=dict(state={0: dict(step=torch.tensor(float(step)), exp_avg=torch.full((40, 25), float(step)))}), history=[dict(loss=1.5)]*20)


@pytest.fixture
def store(tmp_path):
    "A run with two generations, two epochs, a best and a final"
    s = Checkpoints(tmp_path/'run')
    for step in (10, 20): s.save_last(state(step), step)
    for epoch in (1, 2): s.publish(f'epoch_{epoch}/checkpoint.pt', payload(epoch))
    s.link('epoch_1/checkpoint.pt', 'best/checkpoint.pt')
    s.link('epoch_2/checkpoint.pt', 'final/model.pt')
    return s


def files(folder): return sorted(p for p in Path(folder).rglob('*') if p.is_file())
def sums(folder): return {p.relative_to(folder).as_posix(): file_hash(p) for p in files(folder)}
def leftovers(folder): return [p.name for p in Path(folder).rglob('.*')]


# --- damage --------------------------------------------------------------------------------------------------------------------------------------------

def damages(data, rng, n):
    "Ways to spoil a file: flips, cuts, zeroed and repeated pages, bytes from nowhere"
    size = len(data)
    for _ in range(n):
        i, b = rng.randrange(size), rng.randrange(8)
        yield f'bit {b} of byte {i}', data[:i] + bytes([data[i] ^ 1 << b]) + data[i+1:]
    for cut in {0, 1, 47, 48, size-49, size-48, size-1, *(rng.randrange(size) for _ in range(n))}: yield f'cut to {cut}', data[:cut]
    for page in range(0, size, 512):
        if any(data[page:page+512]): yield f'page at {page} zeroed', data[:page] + bytes(len(data[page:page+512])) + data[page+512:]
    yield 'a page repeated', data[:1024] + data[512:1024] + data[1536:]
    yield 'a byte more', data + b'\0'
    yield 'twice', data + data
    yield 'noise', rng.randbytes(size)


def test_every_damage_is_found_and_the_generation_before_is_used(store):
    rng, tried = random.Random(SEED), 0
    new, old = store._generation(20), store._generation(10)
    data, good = new.read_bytes(), load_object(old)
    for how, spoilt in damages(data, rng, 60*MANY):
        new.write_bytes(spoilt)
        found, path, skipped = store.latest()
        assert path == old and [p for p, _ in skipped] == [new], how
        assert found['step'] == 10 and str(new) in skipped[0][1], how
        tried += 1
    assert tried > 120 and torch.equal(found['model_state_dict']['embed.weight'], good['model_state_dict']['embed.weight'])
    new.write_bytes(data)
    assert store.latest()[0]['step'] == 20


@pytest.mark.parametrize('name', ['epoch_1/checkpoint.pt', 'final/model.pt', 'best/checkpoint.pt'])
def test_no_damaged_checkpoint_loads(store, name):
    path = store.folder/name
    data = path.read_bytes()
    for how, spoilt in damages(data, random.Random(SEED+1), 40*MANY):
        path.write_bytes(spoilt)
        with pytest.raises(DamagedFile, match=path.name): load_checkpoint(path)
    path.write_bytes(data)
    assert load_checkpoint(path)['format_version'] == FORMAT_VERSION


def test_exchanged_and_stale_files_are_refused(store):
    "Each file put in each other's place: refused, or the very same checkpoint under another of its names"
    names, kept = [p.relative_to(store.folder).as_posix() for p in files(store.folder)], {p: p.read_bytes() for p in files(store.folder)}
    for a, b in itertools.permutations(names, 2):
        target = store.folder/b
        os.unlink(target)  # not through the link
        target.write_bytes(kept[store.folder/a])
        if b.startswith('last'):
            found, path, skipped = store.latest()
            want = 20 if b.endswith('10.pt') else 10
            assert found['step'] == want and (want == 20 or skipped[0][0] == target), (a, b)
        elif a.startswith('last') or b.startswith('epoch') and kept[target] != kept[store.folder/a]:
            with pytest.raises(UserError, match='resume state|exchanged'): load_checkpoint(target)
        else: assert load_checkpoint(target)['epoch'] in (1, 2)  # best/ and final/ may be any epoch
        target.write_bytes(kept[target])


def test_nothing_whole_left_is_an_error_and_not_a_new_beginning(store):
    for p in files(store.folder/'last'): p.write_bytes(p.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match='--overwrite'): store.latest()
    shutil.rmtree(store.folder/'last')
    assert store.latest() == (None, None, [])


def test_a_step_back_drops_what_lies_ahead(store):
    store.save_last(state(15), 15)
    assert store.steps() == [10, 15]
    store.save_last(dict(state(15), note='again'), 15)  # the same step once more
    assert store.steps() == [10, 15] and store.latest()[0]['note'] == 'again'
    store.save_last(state(1_234_567), 1_234_567)        # more digits sort as numbers
    assert store.steps() == [15, 1_234_567] and store.latest()[0]['step'] == 1_234_567


# --- a disk that refuses -------------------------------------------------------------------------------------------------------------------------------

class Countdown:
    "Fails at the k-th call, for once or from then on"
    def __init__(self, k, code, forever): self.left, self.code, self.forever, self.hit = k, code, forever, False
    def __call__(self):
        self.left -= 1
        if self.left == 0 or self.forever and self.left < 0:
            self.hit = True
            raise OSError(self.code, os.strerror(self.code))


class FaultyFile:
    "A file whose writes and flushes count down, as its opening did"
    def __init__(self, file, count): self.file, self.count = file, count
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *e): self.file.close()
    def write(self, data): self.count(); return self.file.write(data)
    def flush(self): self.count(); return self.file.flush()


@contextlib.contextmanager
def faulty(call, count):
    "Let one kind of call fail"
    if call == 'write':
        def opened(path, mode='r', *a, **kw):
            if not set(mode) & set('wx'): return open(path, mode, *a, **kw)
            count()
            return FaultyFile(open(path, mode, *a, **kw), count)
        with patch.object(checkpoint, 'open', opened, create=True), patch.object(core, 'open', opened, create=True): yield
    else:
        real = getattr(os, call)
        def failing(*a, **kw): count(); return real(*a, **kw)
        with patch.object(os, call, failing): yield


ACTIONS = dict(save_last=lambda s: s.save_last(state(30), 30), new_epoch=lambda s: s.publish('epoch_3/checkpoint.pt', payload(3)),
               same_epoch=lambda s: s.publish('epoch_2/checkpoint.pt', payload(2)), link=lambda s: s.link('epoch_2/checkpoint.pt', 'best/checkpoint.pt'),
               new_link=lambda s: s.link('epoch_2/checkpoint.pt', 'other/checkpoint.pt'), save_object=lambda s: save_object(payload(2), s.folder/'epoch_2'/'checkpoint.pt'))


@pytest.mark.parametrize('call', ['write', 'fsync', 'replace', 'mkdir', 'open', 'link'])
@pytest.mark.parametrize('action', ACTIONS)
def test_failing_calls_lose_nothing(store, action, call):
    "Each k-th call of each kind (each fourth write) fails, once or from then on, with each of three errors"
    before, struck = sums(store.folder), 0
    for code, forever in itertools.product((errno.ENOSPC, errno.EIO, errno.EROFS), (False, True)):
        for k in itertools.count(1, 4 if call == 'write' and MANY == 1 else 1):
            count, said = Countdown(k, code, forever), None
            with faulty(call, count):
                try: ACTIONS[action](store)
                except StorageError as e: said = e
            assert not leftovers(store.folder)
            if not count.hit: break
            struck += 1
            assert said is None or said.errno == code and '\n' not in str(said) and isinstance(said.__cause__, OSError)
            after = sums(store.folder)
            if said is not None and code == errno.ENOSPC: assert 'disk full' in str(said) and ('kept step' in str(said)) == (action in ('save_last', 'new_epoch', 'same_epoch'))
            found, path, skipped = store.latest()
            assert not skipped and found['step'] in (20, 30)
            assert said is not None or action != 'save_last' or found['step'] == 30   # what did not fail was saved
            for name in set(after) - {'last/000030.pt'}: assert load_object(store.folder/name), name
            assert set(before) <= set(after) | {'last/000010.pt'} and all(p.is_file() or any(p.iterdir()) for p in store.folder.rglob('*'))
            for extra in ('last/000030.pt', 'epoch_3', 'other'):  # back to the beginning
                p = store.folder/extra
                shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)
            if store.steps() != [10, 20]: store.save_last(state(10), 10); store.save_last(state(20), 20)
            store.link('epoch_1/checkpoint.pt', 'best/checkpoint.pt')
    writes, links = action not in ('link', 'new_link'), action in ('link', 'new_link')
    assert struck or call == 'write' and links or call == 'link' and writes or (action, call) == ('save_object', 'mkdir')


@pytest.mark.skipif(not hasattr(resource, 'RLIMIT_FSIZE'), reason='needs a limit on file size')
def test_the_kernel_itself_refuses_to_write_on(store):
    "Not an injected failure: the system allows no file beyond a size, at many sizes"
    big, soft, before = dict(state(30), more=torch.zeros(50_000)), resource.getrlimit(resource.RLIMIT_FSIZE), sums(store.folder)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in [0, 1, 64, 1000, 4096, *range(20_000, 200_000, 40_000//MANY)]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
            try:
                with pytest.raises(StorageError, match='kept step 20') as e: store.save_last(big, 30)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, soft)
            assert e.value.errno == errno.EFBIG and sums(store.folder) == before and not leftovers(store.folder)
    finally: signal.signal(signal.SIGXFSZ, ignored)


def test_a_failed_sync_is_not_tried_again(store):
    calls = []
    def failing(fd): calls.append(fd); raise OSError(errno.EIO, 'Input/output error')
    with patch('os.fsync', failing), pytest.raises(StorageError): store.save_last(state(30), 30)
    assert len(calls) == 1


# --- kills ---------------------------------------------------------------------------------------------------------------------------------------------

SAVER = r'''
import os, sys, torch
from continual_llm.checkpoint import Checkpoints, run_lock
torch.set_num_threads(1)
store, base = Checkpoints(sys.argv[1]), dict(w=torch.zeros(250_000))
for line in sys.stdin:  # a fork server: each line is a step to go on from
    if (pid := os.fork()) == 0:
        step = int(line)
        with store.lock():
            while True:
                step += 1
                store.save_last(dict(w=base['w'] + step), step)
                if step % 5 == 0:
                    store.publish(f'epoch_{step//5}/checkpoint.pt', dict(w=base['w'] + step, epoch=step//5))
                    store.link(f'epoch_{step//5}/checkpoint.pt', 'best/checkpoint.pt')
                    store.prune_epochs(2)
                os.write(1, f'{pid or os.getpid()} {step}\n'.encode())
    os.waitpid(pid, 0)
    os.write(1, b'over\n')
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kills_inside_saves_lose_nothing(tmp_path):
    "SIGKILL at random moments of endless saving; each child goes on from where the one before it was killed"
    folder, rng, inside = tmp_path/'run', random.Random(SEED), 0
    store = Checkpoints(folder)
    server = subprocess.Popen([sys.executable, '-c', SAVER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    at = told = left = 0
    try:
        for _ in range(20*MANY):
            server.stdin.write(f'{at}\n')
            child, told = map(int, server.stdout.readline().split())
            time.sleep(rng.random()*.03)
            os.kill(child, signal.SIGKILL)
            while (line := server.stdout.readline()) != 'over\n': told = int(line.split()[1])
            inside += bool(list(folder.glob('.saving-*')))
            found, path, skipped = store.latest()
            assert not skipped and found['step'] >= told and (found['w'] == found['step']).all()
            for p in folder.glob('[be]*/checkpoint.pt'): assert (load_object(p)['w'] == 5*load_object(p)['epoch']).all()
            there, left = left, len(list(folder.glob('epoch_*')))
            assert len(store.steps()) <= 3 and left <= max(2, there) + 1  # a kill just before old ones are removed leaves one more, until the next save removes them all
            at = found['step']
    finally:
        server.stdin.close()
        server.wait()
    print(f'{inside} of {20*MANY} kills within a save')
    assert inside  # some kills did strike within a save
    with store.lock(): assert leftovers(folder) == ['.lock']
    assert not leftovers(folder)


RACER = r'''
import sys, time
from pathlib import Path
from continual_llm.checkpoint import run_lock
from continual_llm.core import UserError
folder, done = Path(sys.argv[1]), 0
print('ready', flush=True); sys.stdin.readline()
while done < 25:
    try:
        with run_lock(folder):
            n = int((folder/'count').read_text())
            time.sleep(.001)
            (folder/'count').write_text(str(n + 1))
            done += 1
    except UserError as e:
        assert 'in use by' in str(e)
        time.sleep(.001)
'''


@pytest.mark.skipif(checkpoint.fcntl is None, reason='needs file locks')
def test_racing_processes_hold_the_lock_one_at_a_time(tmp_path):
    "Three processes take and leave the lock over and over; a counter under it misses none"
    (tmp_path/'count').write_text('0')
    racers = [subprocess.Popen([sys.executable, '-c', RACER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for r in racers: assert r.stdout.readline() == 'ready\n'
    for r in racers: r.stdin.write('\n'); r.stdin.flush()
    assert [r.wait(120) for r in racers] == [0]*3
    for r in racers: r.stdin.close(); r.stdout.close()
    assert (tmp_path/'count').read_text() == '75' and not leftovers(tmp_path)


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(StorageError, match='could not be saved'): Checkpoints(tmp_path/'file'/'run').lock().__enter__()
    with patch('os.mkdir', side_effect=OSError(errno.EROFS, 'Read-only file system')), pytest.raises(StorageError, match='Read-only'):
        Checkpoints(tmp_path/'new').lock().__enter__()
    with pytest.raises(ZeroDivisionError):  # what the run itself raises passes through, and the lock is given back
        with Checkpoints(tmp_path/'run').lock(): 1/0
    assert not leftovers(tmp_path)


# --- names of one file, and plain loading --------------------------------------------------------------------------------------------------------------

def test_best_outlives_its_epoch(store):
    "Names of one file: removing one, or putting another file under it, leaves the others as they were"
    one, best = store.folder/'epoch_1'/'checkpoint.pt', store.folder/'best'/'checkpoint.pt'
    assert os.path.samefile(one, best) and one.stat().st_nlink == 2
    mapped = torch.load(best, mmap=True)['model_state_dict']['embed.weight']
    store.publish('epoch_1/checkpoint.pt', dict(payload(1), val_loss=9.))  # replaced, not written into
    assert load_checkpoint(best)['val_loss'] == 4. and load_checkpoint(one)['val_loss'] == 9.
    store.link('epoch_2/checkpoint.pt', 'best/checkpoint.pt')
    assert (mapped == 1).all()  # what was mapped into memory is still the old file
    assert store.prune_epochs(keep=1) == [1] and load_checkpoint(best)['epoch'] == 2
    (store.folder/'epoch_2'/'notes.txt').write_text('mine')
    store.publish('epoch_3/checkpoint.pt', payload(3))
    assert store.prune_epochs(keep=1) == [2] and load_checkpoint(best)['epoch'] == 2
    assert [p.name for p in files(store.folder/'epoch_2')] == ['notes.txt']  # not ours to remove


@pytest.mark.parametrize('mmap', [False, True])
def test_plain_torch_load_reads_every_file(store, mmap):
    for p in files(store.folder): assert torch.load(p, mmap=mmap)['format_version'] == FORMAT_VERSION


def test_names_do_not_depend_on_compile_or_wrapping():
    from continual_llm.model import ContinualLLM, ModelConfig
    model = ContinualLLM(ModelConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=8))
    plain_one = checkpoint_payload(model, 1, 0, '')
    for other in (torch.compile(model), torch.nn.DataParallel(model), torch.compile(torch.nn.DataParallel(model))):
        kept = checkpoint_payload(other, 1, 0, '')
        assert list(kept['model_state_dict']) == list(plain_one['model_state_dict']) and kept['config'] == plain_one['config']
    ContinualLLM(ModelConfig(**plain_one['config'])).load_state_dict(plain_one['model_state_dict'])


values = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**63-1) | st.floats(allow_nan=False) | st.text(st.characters()),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(-9, 9), inner, max_size=4) | st.tuples(inner, inner), max_leaves=20)


@settings(max_examples=100, deadline=None)
@given(values)
def test_what_is_plain_comes_back(tmp_path_factory, obj):
    "Whatever may be saved can be loaded, and is the same"
    path = save_object(plain(obj), tmp_path_factory.getbasetemp()/'plain.pt')
    back = load_object(path)
    assert back == obj and type(back) is type(obj)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2000))
def test_bytes_from_nowhere_are_damaged_files(tmp_path_factory, data, place):
    "Any bytes, alone or written into a good archive and sealed with a right checksum: loaded or refused, never another error"
    import hashlib
    path = tmp_path_factory.getbasetemp()/'noise.pt'
    path.write_bytes(data)
    with pytest.raises(DamagedFile): load_object(path)
    with pytest.raises(DamagedFile): load_object(path, unverified=True)
    good = save_object(dict(w=torch.zeros(9), a=[1, 'x', None]), path).read_bytes()[:-48]
    spoilt = good[:place] + data + good[place+len(data):]
    path.write_bytes(spoilt + archive.TRAILER.pack(archive.MAGIC, len(spoilt), hashlib.sha256(spoilt).digest()))
    with contextlib.suppress(DamagedFile): load_object(path)


MEMORY = r'''
import sys, torch
from continual_llm.archive import save_object, load_object
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1000
save_object(dict(w=torch.zeros(10)), sys.argv[1])
obj = {f'w{i}': torch.ones(5_000_000) for i in range(10)}  # 200 MB
a = peak(); save_object(obj, sys.argv[1]); b = peak(); del obj; load_object(sys.argv[1]); c = peak()
print(b - a, c - a)
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux to tell the peak')
def test_saving_holds_nothing_twice(tmp_path):
    "200 MB are saved within 30 MB, and loaded within twice their size"
    saved, loaded = map(float, subprocess.check_output([sys.executable, '-c', MEMORY, str(tmp_path/'a.pt')], text=True).split())
    assert saved < 30 and loaded < 260
