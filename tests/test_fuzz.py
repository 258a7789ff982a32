"""Every reader of ours under inputs that nobody thought of: a valid object, or a `UserError` of one line; never another exception

`CONTINUAL_LLM_FUZZ=20` runs twenty times as many examples, and other ones each time."""
import gzip, hashlib, json, os, warnings
from pathlib import Path
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from continual_llm import archive
from continual_llm.archive import load_object, save_object
from continual_llm.checkpoint import FORMAT_VERSION, load_checkpoint
from continual_llm.cli import COMMANDS, _load, parse
from continual_llm.core import UserError, as_path, in_range, read_json
from continual_llm.data import HEADER, open_tokens, write_tokens
from continual_llm.data import _checksum as token_checksum
from continual_llm.generate import Sampling
from continual_llm.memory import domains
from continual_llm.model import ContinualLLM, ModelConfig, model_config
from continual_llm.source import Source
from continual_llm.tokenizer import FORMAT, Tokenizer, train_tokenizer

MANY = int(os.environ.get('CONTINUAL_LLM_FUZZ', 1))


def fuzz(n): return settings(max_examples=n*MANY, deadline=None, derandomize=MANY == 1, suppress_health_check=list(HealthCheck), database=None)


def holds(f, *names):
    "`f` gives something back, or raises a `UserError` of one line that names the file or the value"
    try: return f()
    except UserError as e:
        line = str(e)
        assert '\n' not in line and 0 < len(line) <= 1000 and any(n in line for n in names), line
    except RecursionError as e: raise AssertionError('recursion') from e


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    warnings.simplefilter('ignore')
    return tmp_path_factory.mktemp('fuzz')


def near(*words): return st.lists(st.one_of(st.sampled_from(words), st.text(max_size=6)), max_size=12).map(''.join)


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=8)
awkward = plain | st.binary(max_size=8) | st.complex_numbers() | st.sampled_from([10**400, -10**5000, 'x'*5000, '\0', '\ud800', '~none/x', object, Path('x'), torch.zeros(2), range(3), {1}])


@fuzz(120)
@given(text=near('d_model', 'n_heads', 'norm_eps', 'tie_embeddings', ': ', ':', '\n', '64', '0', '-1', '1e-4', 'no', '012', '1:30', '[', ']', '{', '}', '- ', '&a ', '*a', '!!int ', '"', "'", '#', '---\n', '%YAML 1.1', '| ', '? ', '<<', '\t', '.inf', '~', '0x1f', '2001-01-01') | st.binary(max_size=60))
def test_config_files(place, text):
    path = place/'c.yaml'
    path.write_bytes(text.encode(errors='surrogatepass') if isinstance(text, str) else text)
    got = holds(lambda: model_config(path), 'c.yaml', '=')
    assert got is None or ModelConfig(**got.to_dict()) == got


@fuzz(120)
@given(st.dictionaries(st.sampled_from([*ModelConfig.__dataclass_fields__, 'x']) | st.text(max_size=5) | st.integers(), awkward, max_size=4))
def test_config_values(fields):
    holds(lambda: model_config(fields), '=', 'field')
    holds(lambda: ContinualLLM.from_checkpoint(dict(config=fields, model_state_dict={'a': torch.zeros(1)})), '=', 'field', 'fit')


@fuzz(150)
@given(data=near('{"text": "', 'word ', '"}', '\n', '\r\n', '\\u0000', '\\ud800', '{', '[', '"', ':', ',', 'null', '1e999', '\ufeff', '\0', '\u2028').map(lambda t: t.encode(errors='surrogatepass')) | st.binary(max_size=80),
       name=st.sampled_from(['a.txt', 'a.jsonl', 'a.txt.gz', 'a.jsonl.gz', 'A.TXT.GZ', 'a']), packed=st.booleans(), field=st.text(max_size=4) | st.just('text') | awkward)
def test_sources(place, data, name, packed, field):
    path = place/name
    path.write_bytes(gzip.compress(data) if packed else data)
    def read():
        source = Source.of(path, field)
        counts, texts = source.check(), list(source.texts())
        assert counts.texts == len(texts) and counts.bytes == sum(len(t.encode()) for t, _ in texts)
    holds(read, name, 'field=')
    path.unlink()


@fuzz(150)
@given(near('*', '**', '/', '..', '[', ']', '!', 'a', '?', '~', '{', '.txt', 'builtin:', 'english', '-', '\\', '\0', '\ud800', ' ', '[z-a]') | awkward | st.lists(near('*', 'a', '['), max_size=2))
def test_names_of_sources(place, data):
    before = os.getcwd()
    os.chdir(place)
    try: holds(lambda: repr(Source.of(data)), 'data=', 'file', 'folder')
    finally: os.chdir(before)


@fuzz(150)
@given(name=st.text(max_size=9), value=awkward, low=st.sampled_from([0, 1, -1.5, float('-inf')]), whole=st.booleans())
def test_numbers_and_paths(name, value, low, whole):
    got = holds(lambda: in_range('size', value, low, whole=whole), 'size=')
    assert got is None or type(got) in (int, float) and got >= low and (not whole or type(got) is int)
    holds(lambda: as_path('place', value), 'place=')
    for field in ('max_tokens', 'temperature', 'top_p', 'stop', 'forbid', 'seed'): holds(lambda: Sampling(**{field: value}), field)


@fuzz(50)
@given(words=st.lists(st.sampled_from(['--data', '--epochs', '--epochs=3', '--learning_rate', '--resume', '--config', '--x', '--', '-', '-1', '1e5', 'nan', '--data=', '--=', '-h3', '%s', '@file', '--Epochs', '1_000', '٣', '\ud800']) | st.text(max_size=6), max_size=6),
       command=st.sampled_from(['train-tokenizer', 'pretrain', 'generate', 'evaluate']))
def test_flags(words, command):
    if {'-h', '--help'} & set(words): return
    holds(lambda: parse(f'continual-llm {command}', _load(next(part for part in COMMANDS[command] if part and ":" in part)), words), 'see `', '--')


@pytest.fixture(scope='module')
def tok(place):
    (place/'t.txt').write_text('the cat sat on the mat and saw the dog\n'*30)
    return train_tokenizer(place/'t.txt', 290, save=place/'tok')


def spoilt(data, cuts):
    "Bytes with stretches replaced"
    for at, new in cuts: data = data[:at % (len(data)+1)] + new + data[at % (len(data)+1) + len(new):]
    return data


cuts = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6)), max_size=4)


@fuzz(80)
@given(cuts=cuts, info=st.dictionaries(st.sampled_from(['format', 'hash', 'markers', 'model_type', 'vocab_size']), plain, max_size=2), right=st.booleans())
def test_tokenizer_folders(place, tok, cuts, info, right):
    folder, model = place/'tok', spoilt(tok.model, cuts)
    (folder/'tokenizer.model').write_bytes(model)
    said = dict(tok.options, format=1, hash=hashlib.sha256(f'continual_llm tokenizer {FORMAT}\n'.encode() + model).hexdigest())
    (folder/'tokenizer.json').write_text(json.dumps(said if right else {**said, **info}))
    def use():
        got = Tokenizer.load(folder)
        assert got.decode(got.encode(' the \u2581é\n')) == ' the \u2581é\n' and repr(got) and isinstance(got.markers, tuple)
    holds(use, 'tokenizer.')


@fuzz(120)
@given(text=near('{', '}', '"a"', ':', '[', ']', ',', '1', 'NaN', '"checksum"', 'null', '\\ud800', '9'*5000) | plain.map(json.dumps))
def test_json(place, text):
    (place/'r.json').write_bytes(text.encode(errors='surrogatepass'))
    got = holds(lambda: read_json(place/'r.json', 'run'), 'r.json')
    assert got is None or isinstance(got, dict)
    (place/'memory'/'base').mkdir(parents=True, exist_ok=True)
    (place/'memory'/'base'/'domain.json').write_bytes(text.encode(errors='surrogatepass'))
    holds(lambda: domains(place/'memory'), 'domain.json')


@fuzz(80)
@given(changes=st.dictionaries(st.sampled_from(['n_tokens', 'n_docs', 'n_words', 'n_bytes', 'n_lines', 'dtype', 'part', 'source', 'source_hash', 'format']), plain, max_size=3), cuts=cuts, size=st.integers(0, 60))
def test_token_files(place, changes, cuts, size):
    header = dict(n_words=3, n_bytes=9, n_lines=1, dtype='<u2', source='s', source_hash='a', tokenizer_hash='b', part={})
    path = place/'a.tokens'
    write_tokens(path, [([1, 2, 3, 4, 5], [0, 2])], header)
    data = path.read_bytes()
    body = spoilt(data[HEADER:], cuts)[:size] if size < 60 else data[HEADER:]
    head = {**json.loads(data[:HEADER]), **changes}
    import zlib
    head['checksum'] = token_checksum(head, crc=zlib.crc32(body))
    path.write_bytes(json.dumps(head).encode()[:HEADER].ljust(HEADER) + body)
    def use():
        file = open_tokens(path)
        assert len(file.ids) == file.n_tokens and repr(file) and (not file.n_docs or 0 <= file.doc_starts[0] <= file.doc_starts[-1] <= file.n_tokens)
    holds(use, 'a.tokens')
    path.unlink()


@fuzz(70)
@given(changes=st.dictionaries(st.sampled_from(['config', 'model_state_dict', 'epoch', 'step', 'val_loss', 'val_perplexity', 'tokenizer_hash', 'format_version', 'generation', 'more']), plain.filter(lambda x: abs(x) < 2**60 if type(x) is int else True), max_size=2),
       cuts=cuts, seal=st.booleans())
def test_checkpoints(place, changes, cuts, seal):
    "Any values in a checkpoint, and any bytes in its archive under a right checksum"
    w, path = torch.zeros(4, 4), place/'c.pt'
    good = dict(config=dict(vocab_size=4), model_state_dict={'w': w}, epoch=1, step=3, val_loss=1., val_perplexity=2.7, tokenizer_hash='a', format_version=FORMAT_VERSION)
    try: save_object({**good, **changes}, path)
    except UserError: return  # what a file of ours cannot hold
    if seal:
        data = spoilt(path.read_bytes()[:-archive.TRAILER.size], cuts)
        path.write_bytes(data + archive.TRAILER.pack(archive.MAGIC, len(data), hashlib.sha256(data).digest()))
    else: path.write_bytes(spoilt(path.read_bytes(), cuts))
    holds(lambda: load_object(path), 'c.pt')
    checkpoint = holds(lambda: load_checkpoint(path), 'c.pt')
    if checkpoint: holds(lambda: ContinualLLM.from_checkpoint(checkpoint), '')
