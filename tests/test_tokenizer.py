"A tokenizer gives every text back to the byte, is the same for the same text, and loses nothing when something fails"
import io, json, os, random, signal, subprocess, sys, time
from pathlib import Path
from unittest.mock import patch
import pytest
from hypothesis import example, given, settings, strategies as st
from continual_llm.core import UserError, file_hash
from continual_llm.tokenizer import SPECIAL, Tokenizer, tokenizer_of, train_tokenizer

WORDS = 'the cat dog saw a hen on every old road and 日本 déjà naïve 42 <unk> <unk> def return    x_y (z) . ,'.split(' ')
DATA = os.environ.get('CONTINUAL_LLM_DATA')


def text_of(n, seed=0):
    chance = random.Random(seed)
    return ''.join(' '.join(chance.choices(WORDS, k=chance.randrange(1, 20))) + chance.choice(['\n', ' \n', '\n\n']) for _ in range(n))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp('home')
    (folder/'text.txt').write_text(text_of(3000), encoding='utf-8')
    return folder


@pytest.fixture(scope='module', params=[('bpe', 'auto'), ('bpe', 'none'), ('unigram', 'auto'), ('bpe', '<unk>,日本,x_y,((')],
                ids=lambda p: ' '.join(p))
def tok(request, home):
    return train_tokenizer(home/'text.txt', 400 if request.param[0] == 'bpe' else 320, model_type=request.param[0], markers=request.param[1])


risky = ['\u2581', '\u2585', '\n', ' ', '  ', '\t', '\r\n', '\r', '\0', '\ufeff', '\ufffd', '\u2028', '\x85', '\xa0', '\u3000', '\u200d', 'e\u0301', '𝔘',
         '<unk>', ' <unk>', '<un', 'k>', '((', 'x_y', '日本', '日', *SPECIAL, '<0x0A>', '<0xE2>', 'cat', ' the', 'naïve']
texts = st.lists(st.one_of(st.sampled_from(risky), st.text(st.characters(exclude_categories=['Cs']), max_size=8)), max_size=25).map(''.join)


@settings(max_examples=1000, deadline=None)
@given(text=texts)
@example(text='\u2581'*3 + ' \u2581 ' + '\u2581\n\u2581')
@example(text='<unk> <unk>\n <unk>\u2581<unk>')
def test_every_text_comes_back(tok, text):
    "The bytes, line by line or whole, alone or in a batch, and never through a special piece"
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.decode_bytes(ids) == text.encode() == b''.join(map(tok.piece_bytes, ids))
    rows = tok.encode_batch(list(io.StringIO(text, newline='\n')))
    assert [i for row in rows for i in row] == ids
    assert not {tok.pad_id, tok.bos_id, tok.eos_id, 3} & set(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=30))
def test_any_ids_decode(tok, ids):
    "A model may write anything: bytes come back for it, and text with marks where a character is cut"
    assert tok.decode(ids) == b''.join(map(tok.piece_bytes, ids)).decode('utf-8', 'replace')


@settings(max_examples=100, deadline=None)
@given(text=texts, half=st.characters(categories=['Cs']))
def test_lone_surrogates_are_refused(tok, text, half):
    for encode in (lambda: tok.encode(text + half), lambda: tok.encode_batch([text, text + half])):
        with pytest.raises(UserError, match='half of a character'): encode()


def test_every_character_comes_back(tok):
    every = ''.join(chr(i) for i in range(0x110000) if not 0xd800 <= i < 0xe000)
    assert tok.decode(tok.encode(every)) == every


def test_long_texts(tok):
    for text in ('x'*300_000, ' '*50_000, 'ab\u2581'*20_000, '日本'*40_000, text_of(3000, 1), '\n'*20_000): assert tok.decode(tok.encode(text)) == text


def test_markers_are_found(home):
    tok = train_tokenizer(home/'text.txt', 400)
    assert tok.options['markers'] == ['<unk>']
    assert [len(tok.encode(t)) for t in ('<unk>', ' <unk>', '<unk> <unk>')] == [1, 1, 2]
    assert tok.describe('a <num>\n'*50).markers == ('<num>',)


def test_the_same_text_gives_the_same_tokenizer(home, tmp_path):
    "In another process, with another number of threads and another hash seed"
    code = f"from continual_llm.tokenizer import train_tokenizer\nprint(train_tokenizer({str(home/'text.txt')!r}, 400, model_type='{{}}').hash)"
    for kind, size in (('bpe', 400), ('unigram', 320)):
        env = dict(os.environ, PYTHONHASHSEED='5', OMP_NUM_THREADS='1')
        out = subprocess.run([sys.executable, '-c', code.format(kind).replace('400', str(size))], check=True, capture_output=True, text=True, env=env)
        assert out.stdout.strip() == train_tokenizer(home/'text.txt', size, model_type=kind).hash


def test_sampling(home):
    "A sample is used where the text is longer, the same one each time"
    a, b = [train_tokenizer(home/'text.txt', 380, sample_bytes=20_000) for _ in range(2)]
    assert a.model == b.model != train_tokenizer(home/'text.txt', 380).model


def largest(path):
    "A tokenizer of the largest size that a text supports, at most 400"
    try: return train_tokenizer(path, 400, markers='none')
    except UserError as e: return train_tokenizer(path, int(str(e).split('at most ')[1].split(',')[0]), markers='none')


def test_awkward_texts_train(tmp_path):
    "One endless word, text without spaces, runs of spaces, reserved characters, Windows ends within records"
    for name, text in {'word': 'x'*2_000_000 + '\nab ab ab\n', 'cjk': '日本語テキスト、'*40_000, 'indent': '    def f():\n        return 1\n'*500,
                       'reserved': 'a \u2585 b \u2581 c\n'*500, 'controls': '<s> a </s> [UNK] <pad> <0x41>\n'*500}.items():
        (tmp_path/f'{name}.txt').write_text(text, encoding='utf-8')
        tok = largest(tmp_path/f'{name}.txt')
        assert tok.decode(tok.encode(text)) == text
    (tmp_path/'a.jsonl').write_text(json.dumps(dict(text='one\r\ntwo\r\n'*50)) + '\n', encoding='utf-8')
    tok = largest(tmp_path/'a.jsonl')
    assert tok.decode(tok.encode('one\r\n')) == 'one\r\n'


def test_vocabulary_that_does_not_fit(home, tmp_path):
    "The number in the refusal is the largest, or the smallest, that works"
    (tmp_path/'few.txt').write_text('the cat sat on the mat\n'*9)
    for size, word in ((50_000, 'at most '), (261, 'at least ')):
        with pytest.raises(UserError, match=word) as stop: train_tokenizer(tmp_path/'few.txt', size, save=tmp_path/'tok')
        bound = int(str(stop.value).split(word)[1].split(',')[0])
        assert len(train_tokenizer(tmp_path/'few.txt', bound)) == bound
        with pytest.raises(UserError): train_tokenizer(tmp_path/'few.txt', bound + (1 if word == 'at most ' else -1))
    assert not (tmp_path/'tok').exists()


@pytest.mark.parametrize('how', [dict(vocab_size=0), dict(vocab_size='8000'), dict(vocab_size=True), dict(vocab_size=3e3), dict(model_type='word'),
                                 dict(sample_bytes=0), dict(markers='</s>'), dict(markers=['a b']), dict(markers=['']), dict(markers=[3]),
                                 dict(markers='<a>,<a>'), dict(markers=['\u2581']), dict(markers=['<0x41>'])], ids=str)
def test_bad_settings(home, tmp_path, how):
    with pytest.raises(UserError): train_tokenizer(home/'text.txt', **{'save': tmp_path/'tok', 'vocab_size': 400, **how})
    assert not (tmp_path/'tok').exists()


def test_a_tokenizer_is_not_overwritten(home, tmp_path):
    tok = train_tokenizer(home/'text.txt', 400, save=tmp_path/'tok')
    before = {p.name: file_hash(p) for p in (tmp_path/'tok').iterdir()}
    assert set(before) == {'tokenizer.model', 'tokenizer.json'}
    with pytest.raises(UserError, match='holds a tokenizer already'): train_tokenizer(home/'text.txt', 390, save=tmp_path/'tok')
    assert {p.name: file_hash(p) for p in (tmp_path/'tok').iterdir()} == before
    other = train_tokenizer(home/'text.txt', 390, save=tmp_path/'tok', overwrite=True)
    assert Tokenizer.load(tmp_path/'tok').hash == other.hash != tok.hash


@pytest.mark.parametrize('call', ['os.fsync', 'os.replace', 'tempfile.mkstemp'])
@pytest.mark.parametrize('nth', [1, 2, 3])
def test_a_failed_write_loses_nothing(home, tmp_path, call, nth):
    "The old tokenizer still loads, or, where only the last rename failed, the damage is seen; nothing is left lying about"
    old, new = [train_tokenizer(home/'text.txt', size) for size in (400, 390)]
    old.save(tmp_path/'tok')
    module, name = call.split('.')
    real, calls = getattr(sys.modules[module], name), []
    def failing(*a, **k):
        calls.append(1)
        if len(calls) == nth: raise OSError(28, 'No space left on device')
        return real(*a, **k)
    with patch(call, failing):
        try: new.save(tmp_path/'tok', overwrite=True)
        except UserError as e: assert 'No space left' in str(e)
    left = {p.name for p in (tmp_path/'tok').iterdir()}
    assert left == {'tokenizer.model', 'tokenizer.json'}
    try: assert Tokenizer.load(tmp_path/'tok').hash in (old.hash, new.hash)
    except UserError as e: assert 'damaged or replaced' in str(e) and (call, nth) in [('os.replace', 2), ('os.fsync', 3)]


def test_damage_is_seen(home, tmp_path):
    "Every flipped bit, cut and swap of the model"
    tok = train_tokenizer(home/'text.txt', 400, save=tmp_path/'tok')
    path, data, chance = tmp_path/'tok'/'tokenizer.model', tok.model, random.Random(0)
    flipped = [data[:i] + bytes([data[i] ^ 1 << chance.randrange(8)]) + data[i+1:] for i in chance.sample(range(len(data)), 300)]
    for bad in [*flipped, b'', data[:-1], data + b'\0', data[:len(data)//2], b'\0'*len(data), train_tokenizer(home/'text.txt', 390).model]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match='damaged or replaced'): Tokenizer.load(tmp_path/'tok')
    for text in ('', '{', '[]', '{}', 'null', '{"format": 1}', '['*100_000):
        path.with_name('tokenizer.json').write_text(text)
        with pytest.raises(UserError): Tokenizer.load(tmp_path/'tok')


def test_the_tokenizer_of_a_checkpoint(home, tmp_path):
    a, b = train_tokenizer(home/'text.txt', 400, save=tmp_path/'run'/'tokenizer'), train_tokenizer(home/'text.txt', 390, save=tmp_path/'b')
    for place in ('', 'best/checkpoint.pt', 'epoch_3/checkpoint.pt', 'final/model.pt', 'last/000120.pt'):
        assert tokenizer_of(tmp_path/'run'/place, expected_hash=a.hash).hash == a.hash
    with pytest.raises(UserError) as stop: tokenizer_of(tmp_path/'run'/'best'/'checkpoint.pt', given=tmp_path/'b', expected_hash=a.hash)
    assert a.hash in str(stop.value) and b.hash in str(stop.value)
    with pytest.raises(UserError, match='no tokenizer/'): tokenizer_of(tmp_path/'run'/'a'/'deep'/'place'/'checkpoint.pt')


CTRL_C = '''
import sys
from continual_llm.tokenizer import train_tokenizer
print('started', flush=True)
try: train_tokenizer(sys.argv[1], 30000, save=sys.argv[2])
except KeyboardInterrupt: sys.exit(130)
'''


@pytest.mark.skipif(not Path('/proc').exists(), reason='looks for children in /proc')
def test_ctrl_c_ends_both_processes(tmp_path):
    "In the middle of SentencePiece's own work, at once, and nothing is left behind"
    chance = random.Random(0)
    (tmp_path/'long.txt').write_text('\n'.join(' '.join(f'{chance.getrandbits(60):x}' for _ in range(12)) for _ in range(60_000)))
    run = subprocess.Popen([sys.executable, '-c', CTRL_C, tmp_path/'long.txt', tmp_path/'tok'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    children = lambda: Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()
    deadline = time.time() + 60
    while not children() and time.time() < deadline: time.sleep(.05)
    child, = children()
    time.sleep(3)  # into the counting, where SentencePiece hears no signal
    assert run.poll() is None
    start = time.time()
    run.send_signal(signal.SIGINT)  # to us alone, as a notebook does it
    assert run.wait(20) == 130 and time.time() - start < 15
    assert not Path(f'/proc/{child}').exists() or 'Z' in Path(f'/proc/{child}/stat').read_text().split(')')[1]
    assert not (tmp_path/'tok').exists()


@pytest.mark.skipif(not DATA, reason='CONTINUAL_LLM_DATA names no folder with real texts; test_every_text_comes_back is its miniature twin')
def test_real_text(tmp_path):
    home = Path(DATA)
    tok = train_tokenizer(home/'wikitext-2'/'valid.txt', 8000)
    assert '<unk>' in tok.options['markers']
    seen = tok.describe((home/'wikitext-2'/'valid.txt').read_text(encoding='utf-8'))
    unseen = tok.describe((home/'medical'/'valid.txt').read_text(encoding='utf-8'))
    assert seen.round_trip and unseen.round_trip and seen.words == 217_646
    assert seen.tokens_per_word < 1.25 < 1.6 < unseen.tokens_per_word < 2
    assert max(seen.fallback_rate, unseen.fallback_rate) < .01
