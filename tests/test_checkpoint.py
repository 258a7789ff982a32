"Checkpoints under damage, full disks, hostile files and kills: nothing is lost, nothing wrong is loaded, nothing runs"
import contextlib, errno, itertools, os, pickle, random, resource, shutil, signal, struct, subprocess, sys, time, zipfile
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
    "A file whose writes and flushes count down"
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
            file = open(path, mode, *a, **kw)
            return FaultyFile(file, count) if 'w' in mode else file
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


# --- hostile files -------------------------------------------------------------------------------------------------------------------------------------

HOSTILE = r'''
import io, os, pickle, resource, struct, sys, time, zipfile, hashlib, collections
from pathlib import Path
import torch
from continual_llm.archive import MAGIC, TRAILER, load_object, DamagedFile
from continual_llm.core import UserError
from continual_llm.checkpoint import load_checkpoint
folder, canary = Path(sys.argv[1]), Path(sys.argv[1])/'canary'

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def seal(data): return data + TRAILER.pack(MAGIC, len(data), hashlib.sha256(data).digest())
def zipped(pickled, how=zipfile.ZIP_STORED, **more):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w', how) as z:
        z.writestr('archive/data.pkl', pickled); z.writestr('archive/version', '3'); z.writestr('archive/byteorder', 'little')
        for n, d in more.items(): z.writestr('archive/data/'+n.strip('_'), d)
    return b.getvalue()
def saved(obj):
    b = io.BytesIO(); torch.save(obj, b); return b.getvalue()

import builtins, subprocess, importlib, shutil, functools, operator, runpy, ctypes, webbrowser, types, code, copyreg, tempfile, pathlib, socket, codecs, marshal, timeit, pdb
touch = f"open({str(canary)!r}, 'w').close()"
calls = dict(system=Call(os.system, f'touch {canary}'), eval=Call(eval, touch), exec=Call(exec, touch), popen=Call(subprocess.Popen, ['touch', str(canary)]),
    run=Call(subprocess.run, ['touch', str(canary)]), output=Call(subprocess.check_output, ['touch', str(canary)]), open=Call(open, str(canary), 'w'), mkdir=Call(os.mkdir, str(canary)),
    spawn=Call(os.spawnlp, 0, 'touch', 'touch', str(canary)), ospopen=Call(os.popen, f'touch {canary}'), compile=Call(compile, touch, 'x', 'exec'), imp=Call(importlib.import_module, 'antigravity'),
    dunder=Call(builtins.__import__, 'antigravity'), getattr=Call(getattr, [], 'append'), partial=Call(functools.partial, os.system, 'x'), attr=Call(operator.attrgetter, 'system'),
    caller=Call(operator.methodcaller, 'x'), loads=Call(pickle.loads, pickle.dumps(Call(os.system, f'touch {canary}'))), torchload=Call(torch.load, str(canary)), hub=Call(torch.hub.load, 'a/b', 'c'),
    jit=Call(torch.jit.load, str(canary)), runpy=Call(runpy.run_path, str(canary)), cdll=Call(ctypes.CDLL, 'libc.so.6'), web=Call(webbrowser.open, 'http://localhost'), rmtree=Call(shutil.rmtree, str(folder/'x')),
    move=Call(shutil.move, sys.argv[0], str(canary)), path=Call(pathlib.PosixPath, 'a'), temp=Call(tempfile.mkdtemp, 'a', 'b', str(folder)), socket=Call(socket.socket), timeit=Call(timeit.timeit, touch, 'pass', ),
    unlink=Call(os.unlink, str(folder/'x')), marshal=Call(marshal.loads, marshal.dumps(compile(touch, 'x', 'exec'))), frozen=frozenset([1]), cls=Call, type=Call(type, 'X', (), {}), counter=collections.Counter('abc'),
    deque=collections.deque([1]), array=Call(bytearray, 10**12), many=Call(bytes, 10**12), rng=Call(range, 10**12), lst=Call(list, range(9)), sets={1, 2}, cplx=1j, codec=Call(codecs.encode, 'a', 'rot13'),
    sparse=torch.eye(3).to_sparse(), meta=torch.zeros(10**12, device='meta'), param=torch.nn.Parameter(torch.zeros(1)), module=torch.nn.Linear(2, 2), size=torch.Size([10**12]), device=torch.device('cpu'), dtype=torch.float8_e4m3fn)
files = {n: saved(dict(w=o)) for n, o in calls.items()}

T = lambda storage='FloatStorage', key='0', numel='J\x04\x00\x00\x00', offset='K\0', size='K\4\x85', stride='K\1\x85': (
    f'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n{storage}\nX{chr(len(key))}\0\0\0{key}X\3\0\0\0cpu'.encode('latin1') + numel.encode('latin1') + b'tQ'
    + offset.encode('latin1') + size.encode('latin1') + stride.encode('latin1') + b'\x89ccollections\nOrderedDict\n)RtR.')
big = '\x8a\x06\0\0\0\0\0\x01'  # 2**40
raw = dict(empty=b'', stop=b'.', nostop=b'\x80\x02]', protocol=b'\x80\x7f].', noise=os.urandom(5000), deep=b'\x80\x02' + b']'*10**5 + b'a'*99_999 + b'.', deeper=b'\x80\x02' + b'('*10**5 + b't'*10**5 + b'.',
    laughs=b'\x80\x02]q\0' + b''.join(b'(' + b'h'+bytes([i])*1 + b'h'+bytes([i]) + b'l' + b'q'+bytes([i+1]) for i in range(60)) + b'.', memo=b'\x80\x02]r\xff\xff\xff\x7f.', get=b'\x80\x02h\5.',
    long=b'\x80\x02\x8b\xff\xff\xff\x7f1.', neglong=b'\x80\x02\x8b\xff\xff\xff\xff1.', text=b'\x80\x02X\xff\xff\xff\x7fab.', utf=b'\x80\x02X\2\0\0\0\xff\xfe.', ascii=b'I1' + b'0'*10**6 + b'\n.',
    inst=b'(S"id"\nios\nsystem\n.', stackglobal=b'\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93.', obj=b'(cos\nsystem\no.', ext=b'\x80\x02\x82\1.', persid=b'Pabc\n.', buffer=b'\x80\x05\x97.',
    bytearray8=b'\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.', build=b'\x80\x02ccollections\nOrderedDict\n)R}X\x09\0\0\0__class__K\1sb.', odd=b'\x80\x02K\1Q.', pop=b'\x80\x020000.', mark=b'\x80\x02((((t.',
    reduce=b'\x80\x02ccollections\nOrderedDict\nK\1R.', dotted=b'\x80\x02ccollections\nabc.os.system\n.', spaced=b'\x80\x02cos system\nx\n.', nested=b'\x80\x02ccollections\nOrderedDict\n(]tR.', float=b'\x80\x02G\0.',
    key=T(key='../x'), absent=T(key='7'), numel=T(numel=big), size=T(size=big+'\x85'), stride=T(size=big+'\x85', stride='K\0\x85'), negative=T(size='J\xff\xff\xff\xff\x85'), offset=T(offset=big),
    offset2=T(offset='J\xf0\xff\xff\xff'), dims=T(size='K\4\x85', stride='K\1K\1\x86'), quant=T(storage='QInt8Storage'), dtype=T(storage='DoubleStorage'), untyped=T(storage='UntypedStorage'), fine=T())
files |= {'raw_'+n: zipped(p, _0_=bytes(16)) for n, p in raw.items()}
files |= dict(bomb=zipped(b'0'*10**8, zipfile.ZIP_DEFLATED), nozip=b'x'*999, pickled=pickle.dumps(dict(a=1)), legacy=b'', cut=zipped(T())[:-30], doubled=zipped(T(), _0_=bytes(16))*2,
    headers=zipped(T(), _0_=bytes(16)).replace(b'\x10\0\0\0', b'\xff\xff\xff\x7f'), names=zipped(T(), _0_=bytes(16)).replace(b'archive/data/0', b'archive/../../0'[:14]))
b = io.BytesIO(); torch.save(dict(a=torch.zeros(2)), b, _use_new_zipfile_serialization=False); files['legacy'] = b.getvalue()

(folder/'x').mkdir()
free = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1])*1024 if os.path.exists('/proc/self/status') else 2**34
resource.setrlimit(resource.RLIMIT_AS, (free + 2**30, free + 2**30))
bad, slowest = [], 0.
for name, data in files.items():
    p = folder/'h.pt'
    p.write_bytes(seal(data))
    for reader in (load_object, load_checkpoint):
        begun = time.perf_counter()
        try: got = reader(p)
        except UserError as e:
            if chr(10) in str(e) or 'weights_only' in str(e) or str(p) not in str(e): bad.append((name, 'said', str(e)[:200]))
        except BaseException as e: bad.append((name, type(e).__name__, str(e)[:200]))
        else:
            ok = name in ('raw_fine', 'raw_laughs', 'raw_nested', 'doubled', 'raw_stride', 'raw_deep', 'raw_deeper', 'raw_mark', 'raw_build', 'raw_memo') and reader is load_object
            if not ok: bad.append((name, 'loaded', type(got).__name__))
        slowest = max(slowest, time.perf_counter() - begun)
    if canary.exists() or not (folder/'x').exists(): bad.append((name, 'RAN')); canary.unlink(missing_ok=True); (folder/'x').mkdir(exist_ok=True)
print('tried', len(files), 'slowest', round(slowest, 2), 'bad', bad)
'''


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on memory')
def test_hostile_files_are_refused_and_nothing_runs(tmp_path):
    "In a child with capped memory; each file carries a right checksum"
    done = subprocess.run([sys.executable, '-c', HOSTILE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    print(done.stdout)
    assert int(words[1]) > 90 and done.stdout.rstrip().endswith('bad []'), done.stdout


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
    at = told = 0
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
            assert len(store.steps()) <= 3 and len(list(folder.glob('epoch_*'))) <= 3
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
