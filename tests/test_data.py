"Token files, splits, memory and batches: what takes several processes, large texts or real data"
import json, os, random, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np
import pytest
from continual_llm.batches import Batches, Blocks, eval_batches
from continual_llm.core import UserError
from continual_llm.data import HEADER, cache_folder, open_tokens, prepare
from continual_llm.memory import domains, remember
from continual_llm.source import Source
from continual_llm.split import LONG, prepare_split

ROOT = Path(__file__).parent.parent
LETTERS = SimpleNamespace(hash='letters', vocab_size=259, bos_id=1, eos_id=2,
                          encode_batch=lambda texts: [[3+b for b in t.encode()] for t in texts])


def text_of(file): return bytes(i-3 for i in file.ids[:].tolist() if i > 2).decode()


def some_text(draw, n_docs, most_lines=6):
    "Documents of lines, some long, some repeated"
    lines = [f'{draw.random()} ' + 'word '*draw.randint(0, 40) + '\n' for _ in range(n_docs)]
    return ['\n'.join(['']*draw.randint(0, 1)) + ''.join(draw.choices(lines, k=draw.randint(1, most_lines))) + '\n' for _ in range(n_docs)]


# ------------------------------------------------------------ counts

def independent_counts(path):
    "Words and line ends, bytes and lines, without a line of the package"
    raw = Path(path).read_bytes()
    return dict(n_words=len(raw.decode().split()) + raw.count(b'\n'), n_bytes=len(raw), n_lines=raw.count(b'\n') + (not raw.endswith(b'\n')))


def counts_of(*files): return {k: sum(getattr(f, k) for f in files) for k in ('n_words', 'n_bytes', 'n_lines')}


def test_counts_are_those_of_the_text(tmp_path):
    (tmp_path/'a.txt').write_bytes(' \n = Žluťoučký = \n \n Two  spaces , \u2581 and a\u00a0no-break one \n\n\nlast'.encode())
    want = independent_counts(tmp_path/'a.txt')
    assert want == dict(n_words=18, n_bytes=70, n_lines=7)  # 12 words (a no-break space parts two), 6 line ends
    assert counts_of(prepare(tmp_path/'a.txt', LETTERS, tmp_path/'cache')) == want


@pytest.mark.skipif('CONTINUAL_LLM_DATA' not in os.environ, reason='needs CONTINUAL_LLM_DATA; its miniature twin is above')
def test_counts_of_wikitext2(tmp_path):
    path = Path(os.environ['CONTINUAL_LLM_DATA'])/'wikitext-2/valid.txt'
    file = prepare(path, LETTERS, tmp_path)
    assert counts_of(file) == independent_counts(path) == dict(n_words=217_646, n_bytes=1_121_681, n_lines=3_760)
    train, val, dropped = prepare_split(path, LETTERS, .1, 0, tmp_path)
    assert dropped == 0 and counts_of(train, val) == counts_of(file)
    assert train.n_docs + val.n_docs == file.n_docs
    assert abs(val.n_bytes/file.n_bytes - .1) < .005


# ------------------------------------------------------------ what is written is the text

@pytest.mark.parametrize('seed', range(8))
def test_a_split_is_a_partition(tmp_path, seed):
    "Every line stands on one side or was dropped; no document stands on both; nothing is out of order"
    draw = random.Random(seed)
    docs = some_text(draw, draw.choice([5, 30, 300]))
    share = draw.choice([.1, .3, .6])
    (tmp_path/'a.txt').write_text(''.join(docs))
    train, val, dropped = prepare_split(tmp_path/'a.txt', LETTERS, share, seed, tmp_path/'cache')
    lines, kept, held = ''.join(docs).splitlines(True), text_of(train).splitlines(True), text_of(val).splitlines(True)
    lost = Counter(lines) - Counter(kept) - Counter(held)
    assert sum(lost.values()) == dropped == len(lines) - train.n_lines - val.n_lines
    assert all(line in held and len(line.strip()) >= LONG for line in lost)
    assert not {k for k in kept if len(k.strip()) >= LONG} & set(held)
    for side in (kept, held):
        rest = iter(lines)
        assert all(line in rest for line in side)  # a subsequence of the text
    assert train.part['unit'] == val.part['unit']
    assert counts_of(val)['n_bytes'] == len(val.ids)


@pytest.mark.parametrize('seed', range(4))
def test_document_starts(tmp_path, seed):
    docs = [f'{i}. one\ntwo\n' + '\n'*random.Random(seed*100+i).randint(1, 3) for i in range(40)]
    (tmp_path/'a.txt').write_text(''.join(docs))
    for file in prepare_split(tmp_path/'a.txt', LETTERS, .2, seed, tmp_path/'cache')[:2]:
        ends = [*file.doc_starts[1:], len(file)]
        assert all(text_of(SimpleNamespace(ids=file.ids[a:b])) in docs for a, b in zip(file.doc_starts, ends))


def test_end_marks_between_files_and_records(tmp_path):
    (tmp_path/'a.txt').write_text('a\n\nb\n')
    (tmp_path/'b.txt').write_text('c')
    with open(tmp_path/'c.jsonl', 'w') as f:
        for text in ('d\ne', 'f\n'): f.write(json.dumps(dict(text=text)) + '\n')
    file = prepare([tmp_path/name for name in ('a.txt', 'b.txt', 'c.jsonl')], LETTERS, tmp_path/'cache')
    assert ''.join('|' if i == 2 else chr(i-3) for i in file.ids[:].tolist()) == 'a\n\nb\n|c|d\ne|f\n'
    assert [chr(file.ids[i]-3) for i in file.doc_starts[:]] == ['a', 'b', 'c', 'd', 'f']
    assert counts_of(file) == dict(n_words=6+5, n_bytes=11, n_lines=7)


def test_end_marks_do_not_open_a_side(tmp_path):
    "The first record of training is dropped whole: no `</s>` before the second"
    long = 'x'*LONG
    with open(tmp_path/'a.jsonl', 'w') as f:
        for i in range(20): f.write(json.dumps(dict(text=long if i in (0, 19) else f'{i}'*50)) + '\n')
    for seed in range(30):
        train, val, dropped = prepare_split(tmp_path/'a.jsonl', LETTERS, .1, seed, tmp_path/'cache')
        assert 2 not in (train.ids[0], train.ids[-1], val.ids[0], val.ids[-1])
        assert (train.ids[:] == 2).sum() == train.n_docs - 1
        if long in text_of(val): assert long not in text_of(train)


def test_large_vocabulary_takes_four_bytes(tmp_path):
    (tmp_path/'a.txt').write_text('a\nb\n')
    big = SimpleNamespace(hash='big', vocab_size=100_000, eos_id=2, encode_batch=lambda texts: [[99_999] for _ in texts])
    assert prepare(tmp_path/'a.txt', big, tmp_path/'cache').ids[:].tolist() == [99_999]*2


# ------------------------------------------------------------ files and processes

PREPARE = '''
import sys, time
from types import SimpleNamespace
from continual_llm.data import prepare
def encode(texts):
    print('encoding', flush=True)
    time.sleep({pause})
    return [[3+b for b in t.encode()] for t in texts]
letters = SimpleNamespace(hash='letters', vocab_size=259, bos_id=1, eos_id=2, encode_batch=encode)
print(prepare({text!r}, letters, {cache!r}).checksum, flush=True)
'''


def start(text, cache, pause=.2):
    code = PREPARE.format(text=str(text), cache=str(cache), pause=pause)
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever began the tests in the background had it ignored
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def test_two_preparers_at_once(tmp_path):
    (tmp_path/'a.txt').write_text('some text\n\n'*60_000)  # several pieces
    both = [start(tmp_path/'a.txt', tmp_path/'cache') for _ in range(2)]
    out = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert len({o.splitlines()[-1] for o, _ in out}) == 1
    file = prepare(tmp_path/'a.txt', LETTERS, tmp_path/'cache')
    assert os.listdir(tmp_path/'cache') == [file.path.name] and file.n_bytes == 660_000


@pytest.mark.parametrize('sign', [signal.SIGKILL, signal.SIGINT])
def test_killed_while_preparing(tmp_path, sign):
    (tmp_path/'a.txt').write_text('some text\n\n'*60_000)
    p = start(tmp_path/'a.txt', tmp_path/'cache', pause=.5)
    p.stdout.readline()
    p.stdout.readline()  # the first piece is written, the second in work
    p.send_signal(sign)
    p.communicate(timeout=60)
    left = os.listdir(tmp_path/'cache')
    assert len(left) == (sign == signal.SIGKILL) and all(n.endswith('.tmp') for n in left)
    file = prepare(tmp_path/'a.txt', LETTERS, tmp_path/'cache')
    assert text_of(file) == 'some text\n\n'*60_000


def test_full_disk_leaves_nothing(tmp_path):
    (tmp_path/'a.txt').write_text('some text\n')
    def full(fd): raise OSError(28, 'No space left on device')
    with patch('os.fsync', full), pytest.raises(UserError, match='No space left on device.*make room'):
        prepare(tmp_path/'a.txt', LETTERS, tmp_path/'cache')
    assert os.listdir(tmp_path/'cache') == []


def test_every_kind_of_damage_is_noticed(tmp_path):
    (tmp_path/'a.txt').write_text('some text\n\n'*50)
    file = prepare(tmp_path/'a.txt', LETTERS, tmp_path/'cache')
    whole, draw, silent = file.path.read_bytes(), random.Random(0), 0
    written = len(whole[:HEADER].rstrip()) + 1
    for _ in range(500):
        at = draw.choice([draw.randrange(written), draw.randrange(HEADER, len(whole))])
        bad = draw.choice([whole[:at], whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at+1:],
                           whole[:at] + bytes(len(whole)-at) if any(whole[at:]) else whole[:at]])
        file.path.write_bytes(bad)
        try: silent += open_tokens(file.path) != file  # a change that JSON does not see, such as of the last padding, is none
        except UserError as e: assert str(file.path) in str(e)
    assert silent == 0


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert cache_folder() == tmp_path/'xdg'/'continual_llm' and cache_folder().is_dir()
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    assert cache_folder() == tmp_path/'home'/'.cache'/'continual_llm'
    assert cache_folder(tmp_path/'own') == tmp_path/'own'


def test_memory_does_not_grow_with_the_text():
    "The benchmark in miniature: three times the text, hardly more memory"
    def above(megabytes):
        r = subprocess.run([sys.executable, ROOT/'benchmarks'/'prepare_memory.py', '--megabytes', str(megabytes), '--vocab_size', '1000'],
                           capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        return int(r.stdout.split('above the imports: ')[1].split(' MB')[0])
    small, large = above(3), above(9)
    assert large < 400 and large - small < 60, (small, large)


# ------------------------------------------------------------ with the real tokenizer

def test_tokens_give_the_text_back(tmp_path):
    from continual_llm.tokenizer import train_tokenizer
    text = ''.join(f'The {i}th line says naïve things about <unk>  twice.\n' + '\n'*(i%5 == 0) for i in range(400))
    (tmp_path/'a.txt').write_text(text)
    tokenizer = train_tokenizer(tmp_path/'a.txt', vocab_size=400)
    file = prepare(tmp_path/'a.txt', tokenizer, tmp_path/'cache')
    assert tokenizer.decode(file.ids[:].tolist()) == text
    starts = [*file.doc_starts, len(file)]
    assert ''.join(tokenizer.decode(file.ids[a:b].tolist()) for a, b in zip(starts, starts[1:])) == text


# ------------------------------------------------------------ order

@pytest.mark.parametrize('seed', range(30))
def test_batches_by_counting(seed):
    "Any shape, any number of processes: each token at most once, fewer than a block left, together what one would read"
    draw = random.Random(seed)
    seq_len, size, accumulation = draw.randint(1, 20), draw.randint(1, 5), draw.randint(1, 4)
    n = draw.randint(seq_len, 50*seq_len)
    world = draw.choice([w for w in range(1, 21) if size*accumulation % w == 0])
    ids = np.arange(n)
    one = Batches(ids, seq_len, size, accumulation, seed, bos_id=-1)
    many = [Batches(ids, seq_len, size, accumulation, seed, -1, rank, world) for rank in range(world)]
    for epoch in range(2):
        seen = Counter()
        for step in range(epoch*one.steps_per_epoch, (epoch+1)*one.steps_per_epoch):
            want = [row for x, y in one(step) for row in zip(x.tolist(), y.tolist())]
            got = [row for b in many for x, y in b(step) for row in zip(x.tolist(), y.tolist())]
            assert got == want and one.n_targets(step) == many[-1].n_targets(step) == len(want)*seq_len
            for x, y in want:
                seen.update(y)
                assert all(i == t-1 for i, t in zip(x, y))  # the input is the token before; `<s>` (-1) before the first
        assert set(seen.values()) == {1} and n - len(seen) == n % seq_len < seq_len


def test_left_over_tokens_differ_between_epochs():
    blocks = Blocks(10_007, 64, seed=1)
    gaps = {(blocks.offset(e) - 10_007 % 64) % 10_007 for e in range(50)}
    assert len(gaps) >= 49


def test_a_batch_is_quick(tmp_path):
    np.zeros(5_000_000, np.uint16).tofile(tmp_path/'ids')
    batches = Batches(np.memmap(tmp_path/'ids', np.uint16, 'r'), 256, 32)
    batches(0)
    times = []
    for step in range(1, 30):
        begin = time.perf_counter()
        batches(step)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3


@pytest.mark.parametrize('n', [1, 7, 8, 9, 64, 100])
def test_eval_batches_cover_everything_once(n):
    got = list(eval_batches(np.arange(1, n+1), 8, 3, bos_id=0))
    assert [t for _, y in got for t in y.flatten().tolist()] == list(range(1, n+1))
    assert [t for x, _ in got for t in x.flatten().tolist()] == list(range(n))


# ------------------------------------------------------------ memory of a domain

def test_memory_of_real_sides(tmp_path):
    (tmp_path/'a.txt').write_text(''.join(f'Document {i}.\nIts text.\n\n' for i in range(400)))
    train, val, _ = prepare_split(tmp_path/'a.txt', LETTERS, .1, 0, tmp_path/'cache')
    domain = remember(train, val, tmp_path/'memory', 'documents', share=.05, seed=3)
    docs = text_of(domain.replay).split('\n\n')[:-1]
    assert .04*len(train) < len(domain.replay) <= .05*len(train)
    assert all(d.startswith('Document') and f'{d}\n\n' in text_of(train) for d in docs) and len(set(docs)) == len(docs) == domain.replay.n_docs
    assert text_of(domain.val) == text_of(val)
    assert domains(tmp_path/'memory') == [domain]
    assert domain.source_hash == Source.of(tmp_path/'a.txt').hash()
