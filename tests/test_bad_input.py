"Every mistake a user can make: one line with value, place and way out; exit 2; no traceback; nothing changed on disk"
import hashlib, inspect, shutil
from contextlib import nullcontext
from collections import namedtuple
from pathlib import Path
from unittest.mock import patch
import pytest
import torch
from continual_llm.archive import load_object, save_object
from continual_llm.cli import main

WORDS = 'cat dog hen fox owl cow mat log hill road roof farm'.split()
TEXT = '\n'.join(f'the {a} sat on the {b} and saw the {c} .\n' for a in WORDS for b in WORDS for c in WORDS)
Usage = namedtuple('Usage', 'total used free')


def call(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "A text, a tokenizer and a short run, made once"
    from continual_llm.tokenizer import train_tokenizer
    from continual_llm.train import pretrain
    home = tmp_path_factory.mktemp('made')
    (home/'text.txt').write_text(TEXT)
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    pretrain(str(home/'text.txt'), 'tiny', tokenizer=str(home/'tok'), epochs=1, batch_size=2, grad_accumulation=1, max_seq_len=32, max_steps=3,
             save_dir=str(home/'run'), cache=str(home/'cache'), quiet=True)
    return home


@pytest.fixture
def here(tmp_path, made, monkeypatch):
    "A folder of its own for each test, as the working directory"
    for name in ('text.txt', 'tok', 'run', 'cache'):
        (shutil.copy if (made/name).is_file() else shutil.copytree)(made/name, tmp_path/name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else '' for p in folder.rglob('*')
            if 'cache' not in p.relative_to(folder).parts}


def refused(capsys, here, *argv, words=(), during=nullcontext()):
    before = snapshot(here)
    with during: code, out, err = call(capsys, *argv)
    assert code == 2, (code, out, err)
    line, = [l for l in err.splitlines() if l.startswith('continual-llm: ')]
    assert 'Traceback' not in err + out
    for word in words: assert word in line, line
    assert snapshot(here) == before
    return line


PRETRAIN = 'pretrain --data text.txt --config tiny --tokenizer tok --epochs 1 --batch_size 2 --grad_accumulation 1 --max_seq_len 32 --max_steps 2 --save_dir new --cache cache'.split()


def with_flag(**changes):
    "The command above with some flags otherwise"
    argv = list(PRETRAIN)
    for name, value in changes.items():
        if f'--{name}' in argv: argv[argv.index(f'--{name}')+1] = value
        else: argv += [f'--{name}', value]
    return argv


TEXTS = {  # name -> (bytes of the file, words the line must hold)
    'empty': (b'', ['bad.txt']),
    'only blank lines': (b'\n \n\t\n', ['bad.txt']),
    'one giant line': (b'word '*2_000_000, ['bad.txt']),
    'binary': (bytes(range(256))*40, ['bad.txt']),
    'bad UTF-8': (b'good line\n\xff\xfe broken\n', ['bad.txt', '2']),
    'NUL bytes': (b'good line\nnul \x00 here\n', ['bad.txt', '2']),
    'CRLF': (b'one\r\ntwo\r\n', ['bad.txt', '1']),
    'BOM': (b'\xef\xbb\xbfone\ntwo\n', ['bad.txt', '1']),
}


@pytest.mark.parametrize('command', ['pretrain', 'validation', 'tokenizer', 'evaluate'])
@pytest.mark.parametrize('kind', TEXTS)
def test_texts(capsys, here, kind, command):
    data, words = TEXTS[kind]
    (here/'bad.txt').write_bytes(data)
    argv = dict(pretrain=with_flag(data='bad.txt'), validation=with_flag(val_data='bad.txt'),
                tokenizer=['train-tokenizer', '--data', 'bad.txt', '--save', 'newtok'],
                evaluate=['evaluate', '--model', 'run', '--data', 'bad.txt', '--cache', 'cache'])[command]
    refused(capsys, here, *argv, words=words)


def test_no_file(capsys, here): refused(capsys, here, *with_flag(data='none.txt'), words=['none.txt'])


def test_an_empty_validation_side(capsys, here):
    (here/'line.txt').write_text('one line alone, which cannot stand on both sides\n')
    refused(capsys, here, *with_flag(data='line.txt'), words=['line.txt'])


def test_folder_without_text(capsys, here):
    (here/'folder').mkdir()
    refused(capsys, here, *with_flag(data='folder'), words=['folder'])


def test_no_read_permission(capsys, here):
    real = open
    def guarded(file, *a, **kw):
        if str(file).endswith('text.txt'): raise PermissionError(13, 'Permission denied', str(file))
        return real(file, *a, **kw)
    shutil.rmtree(here/'cache')
    refused(capsys, here, *PRETRAIN, words=['text.txt'], during=patch('builtins.open', guarded))


FLAGS = {  # name -> (flags, words the line must hold)
    'val_split of 1': (dict(val_split='1.0'), ['val_split=1.0', '[0, 1)']),
    'negative val_split': (dict(val_split='-0.1'), ['val_split=-0.1']),
    'val_split of NaN': (dict(val_split='nan'), ['val_split=nan']),
    'val_split of 0 alone': (dict(val_split='0'), ['val_split=0']),
    'both val_split and val_data': (dict(val_split='0.2', val_data='text.txt'), ['val_split=0.2', 'val_data=text.txt']),
    'zero batch': (dict(batch_size='0'), ['batch_size=0']),
    'negative accumulation': (dict(grad_accumulation='-1'), ['grad_accumulation=-1']),
    'zero epochs': (dict(epochs='0'), ['epochs=0']),
    'negative epochs': (dict(epochs='-3'), ['epochs=-3']),
    'half an epoch': (dict(epochs='0.5'), ['epochs', '0.5']),
    'rate of NaN': (dict(learning_rate='nan'), ['learning_rate=nan']),
    'negative rate': (dict(learning_rate='-0.001'), ['learning_rate=-0.001']),
    'rate of zero': (dict(learning_rate='0'), ['learning_rate=0']),
    'infinite rate': (dict(learning_rate='inf'), ['learning_rate=inf']),
    'rate in words': (dict(learning_rate='high'), ['learning_rate', 'high']),
    'negative warmup': (dict(warmup_steps='-5'), ['warmup_steps=-5']),
    'negative patience': (dict(early_stopping_patience='-1'), ['early_stopping_patience=-1']),
    'zero seq_len': (dict(max_seq_len='0'), ['max_seq_len=0']),
    'dropout of 1': (dict(dropout='1'), ['dropout=1']),
    'negative decay': (dict(weight_decay='-1'), ['weight_decay=-1']),
    'negative clip': (dict(max_grad_norm='-1'), ['max_grad_norm=-1']),
    'negative time': (dict(max_time='-1'), ['max_time=-1']),
    'negative seed': (dict(seed='-1'), ['seed=-1']),
    'negative eval_tokens': (dict(eval_tokens='-1'), ['eval_tokens=-1']),
    'unknown preset': (dict(config='smal'), ["'smal'", "did you mean 'small'?"]),
    'unknown device': (dict(device='gpu'), ["'gpu'", 'cpu']),
    'missing device': (dict(device='cuda'), ['cuda']),
    'unknown precision': (dict(precision='fp8'), ["'fp8'", 'bf16']),
    'unknown optimizer': (dict(optimizer='adam'), ["'adam'", "did you mean 'adamw'?"]),
    'missing YAML': (dict(config='none.yaml'), ['none.yaml']),
    'missing tokenizer': (dict(tokenizer='none'), ['none', 'train']),
    'corpus shorter than a block': (dict(max_seq_len='1000000'), ['1,000,000']),
    'existing run': (dict(save_dir='run'), ['run', '--resume', '--overwrite']),
    'save_dir is a file': (dict(save_dir='text.txt'), ['text.txt']),
    'below a file': (dict(save_dir='text.txt/run'), ['text.txt']),
}


@pytest.mark.parametrize('name', FLAGS)
def test_flags(capsys, here, name):
    if name == 'missing device' and torch.cuda.is_available(): pytest.skip('there is a GPU')
    flags, words = FLAGS[name]
    refused(capsys, here, *with_flag(**flags), words=words)


YAML = {  # name -> (file, words the line must hold)
    'unknown key': ('d_modl: 64\n', ['d_modl', "did you mean 'd_model'?"]),
    'repeated key': ('d_model: 64\nd_model: 32\n', ['d_model', 'twice']),
    '1e-4 is text': ('norm_eps: 1e-4\n', ['norm_eps', '1e-4']),
    'heads that do not divide': ('n_heads: 4\nn_kv_heads: 3\n', ['n_heads=4', 'n_kv_heads=3']),
    'zero size': ('d_model: 0\n', ['d_model=0']),
    'negative size': ('n_layers: -2\n', ['n_layers=-2']),
    'width that does not divide': ('d_model: 66\nn_heads: 4\nn_kv_heads: 2\n', ['d_model=66']),
    'no is False': ('n_layers: no\n', ['n_layers=no', 'False']),
    'octal': ('n_layers: 012\n', ['n_layers', '012']),
    'empty': ('', ['bad.yaml', 'empty']),
    'a list': ('- 1\n- 2\n', ['bad.yaml']),
    'nesting': ('[' * 5000, ['bad.yaml']),
    'a tag': ('d_model: !!python/object/apply:os.system ["true"]\n', ['bad.yaml']),
    'not YAML': ('d_model: [\n', ['bad.yaml']),
    'tokenizer of another size': ('vocab_size: 8000\nd_model: 64\n', ['vocab_size=8000', '300']),
}


@pytest.mark.parametrize('name', YAML)
def test_yaml(capsys, here, name):
    text, words = YAML[name]
    (here/'bad.yaml').write_text(text)
    refused(capsys, here, *with_flag(config='bad.yaml'), words=words)


def test_vocabulary_larger_than_the_corpus(capsys, here):
    refused(capsys, here, 'train-tokenizer', '--data', 'text.txt', '--vocab_size', 50_000, '--save', 'newtok', words=['50'])
    refused(capsys, here, *PRETRAIN[:5], '--vocab_size', 50_000, '--save_dir', 'new', '--cache', 'cache', words=['50'])


def test_tokenizer_there_already(capsys, here):
    refused(capsys, here, 'train-tokenizer', '--data', 'text.txt', '--vocab_size', 300, '--save', 'tok', words=['tok'])


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'swap'])
def test_corrupt_tokenizer(capsys, here, damage):
    model = here/'tok'/'tokenizer.model'
    data = bytearray(model.read_bytes())
    data[len(data)//2] ^= 1
    model.write_bytes(dict(flip=data, cut=data[:-100], empty=b'', swap=b'not a tokenizer'*100)[damage])
    refused(capsys, here, *PRETRAIN, words=['tok'])


@pytest.mark.parametrize('command', ['generate', 'evaluate'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'text', 'no trailer', 'missing'])
def test_corrupt_checkpoint(capsys, here, damage, command):
    path = here/'run'/'best'/'checkpoint.pt'
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.unlink()
    if damage != 'missing': path.write_bytes({'flip': data, 'cut': data[:-500], 'empty': b'', 'text': b'hello', 'no trailer': data[:-48]}[damage])
    refused(capsys, here, command, '--model', path, *(('--data', 'text.txt', '--cache', 'cache') if command == 'evaluate' else ()), words=['checkpoint.pt'])


@pytest.mark.parametrize('name,change', [
    ('another shape', lambda c: c['config'].update(d_model=64, head_dim=16)),
    ('another format version', lambda c: c.update(format_version=99)),
    ('no weights', lambda c: c.pop('model_state_dict')),
    ('no config', lambda c: c.pop('config')),
    ('a weight that is not finite', lambda c: next(iter(c['model_state_dict'].values())).view(-1)[:1].fill_(float('nan'))),
    ('another tokenizer', lambda c: c.update(tokenizer_hash='0'*64))])
def test_wrong_checkpoint(capsys, here, name, change):
    path = here/'run'/'best'/'checkpoint.pt'
    checkpoint = load_object(path)
    change(checkpoint)
    path.unlink()
    save_object(checkpoint, path)
    refused(capsys, here, 'generate', '--model', path, words=['hash'] if name == 'another tokenizer' else ['checkpoint.pt'])


def test_resume_with_other_settings(capsys, here):
    refused(capsys, here, *with_flag(save_dir='run', learning_rate='0.01', max_steps='3'), '--resume', words=['learning_rate', '0.01'])


def test_resume_with_another_text(capsys, here):
    (here/'text.txt').write_text(TEXT + 'one more line\n')
    refused(capsys, here, *with_flag(save_dir='run', max_steps='3'), '--resume', words=['text'])


def test_resume_and_overwrite(capsys, here): refused(capsys, here, *with_flag(save_dir='run'), '--resume', '--overwrite', words=['--resume', '--overwrite'])


def test_read_only_folder(capsys, here):
    (here/'locked').mkdir()
    refused(capsys, here, *with_flag(save_dir='locked/run'), words=['locked'], during=patch('os.access', lambda path, mode: Path(path).name != 'locked'))


def test_full_disk_is_seen_before_training(capsys, here):
    refused(capsys, here, *PRETRAIN, words=['new', '1.0 KB'], during=patch('shutil.disk_usage', lambda path: Usage(10**9, 10**9, 1000)))


@pytest.mark.parametrize('argv,words', [
    (['pretrain', '--epoch', '3'], ['--epoch', '--epochs']),
    (['pretrain', '--batch-size', '3'], ['--batch-size', '--batch_size']),
    (['pretain'], ['pretain', 'pretrain']),
    (['generate'], ['--model']),
    (['generate', '--model', 'run', '--temperature', '-1'], ['temperature=-1']),
    (['generate', '--model', 'run', '--top_p', '0'], ['top_p=0']),
    (['generate', '--model', 'run', '--top_k', '-1'], ['top_k=-1']),
    (['generate', '--model', 'run', '--max_tokens', '-1'], ['max_tokens=-1']),
    (['generate', '--model', 'run', '--repetition_penalty', '0'], ['repetition_penalty=0']),
    (['train-tokenizer', '--data', 'text.txt', '--vocab_size', '0', '--save', 'new'], ['vocab_size=0']),
    (['train-tokenizer', '--data', 'text.txt', '--model_type', 'bep', '--save', 'new'], ["'bep'", "'bpe'"])])
def test_commands(capsys, here, argv, words): refused(capsys, here, *argv, words=words)


def test_a_warmup_that_would_not_fit_is_shortened_and_said(capsys, here):
    code, out, err = call(capsys, *with_flag(warmup_steps='500', max_steps='20'))
    assert code == 0 and '500' in out and 'warmup 2 steps' in out


def test_long_texts_do_not_hide_the_line(capsys, here):
    "However the failure came about, what is printed is one line"
    line = refused(capsys, here, *with_flag(config='a\nb'), words=['a'])
    assert line.count('\n') == 0


def python_calls():
    "The same mistakes through Python, and values of a wrong kind: name -> (call, words the line must hold)"
    import numpy as np
    from continual_llm.evaluate import evaluate
    from continual_llm.generate import generate, load_model
    from continual_llm.model import ContinualLLM, model_config
    from continual_llm.source import Source
    from continual_llm.tokenizer import Tokenizer, tokenizer_of, train_tokenizer
    from continual_llm.train import pretrain
    base = dict(data='text.txt', config='tiny', tokenizer='tok', epochs=1, batch_size=2, grad_accumulation=1, max_seq_len=32, max_steps=2, save_dir='new', cache='cache', quiet=True)
    def run(**new): return lambda: pretrain(**{**base, **new})
    def write(**new): return lambda: generate(*load_model('run', device='cpu')[:2], **{'prompt': 'the', 'max_tokens': 1, **new})
    calls = {f'pretrain {k}={str(v)[:20]}': (run(**{k: v}), [k]) for k, vs in dict(data=(None, 3, [], b'x', ''), val_split=('0.1', True, np.float64(2)), batch_size=('4', 2.5, None, [2], 10**400), epochs=('3', np.int64(0)), learning_rate=('1e-3', None, [1e-3]),
             seed=(1.5, 'x', 2**63), dropout=('0.1', 1), max_seq_len=('64', 0.5), field=(3, ['text']), device=(3,), precision=(16,), optimizer=(None,)).items() for v in vs}
    calls |= {f'generate {k}={str(v)[:20]}': (write(**{k: v}), [k]) for k, vs in dict(prompt=(None, 3, [None], b'x'), max_tokens=('1', -1, 1.5), temperature=('hot', None), stop=(3, ['']), forbid=([None], '\ud800'), seed=('x', 1.5), top_k=(10**400,)).items() for v in vs}
    calls |= {f'load_model {str(v)[:20]}': (lambda v=v: load_model(v), ['model=']) for v in (None, 3, b'x', '', 'x'*5000, 'a\0b')} | {f'Tokenizer.load {str(v)[:20]}': (lambda v=v: Tokenizer.load(v), ['tokenizer=']) for v in (None, 3, '', 'x'*5000)}
    return calls | dict(no_model=(lambda: generate('run', Tokenizer.load('tok'), 'x'), ['load_model']), checkpoint=(lambda: ContinualLLM.from_checkpoint('run'), ['load_checkpoint']), config=(lambda: model_config(dict(d_model=None)), ['d_model=None']),
        config_kind=(lambda: model_config(3), ['config=']), evaluated=(lambda: evaluate(None, 'text.txt'), ['model=None']), measured=(lambda: evaluate('run', None), ['data=None']), field=(lambda: Source.of('text.txt', field=None), ['field=None']),
        vocabulary=(lambda: train_tokenizer('text.txt', '300'), ["vocab_size='300'", 'quotes']), save=(lambda: train_tokenizer('text.txt', 300, save=3), ['save=3']), replace=(lambda: train_tokenizer('text.txt', 300, overwrite='no'), ["overwrite='no'"]),
        markers=(lambda: train_tokenizer('text.txt', 300, markers=3), ['markers=3']), encoded=(lambda: Tokenizer.load('tok').encode(None), ['not text']), decoded=(lambda: Tokenizer.load('tok').decode('x'), ['ids=']), found=(lambda: tokenizer_of(None), ['model=None']))


def test_python_functions(here):
    "Each raises one line that names the value, and leaves the folder as it was"
    from continual_llm.core import UserError
    before = snapshot(here)
    for name, (call, words) in python_calls().items():
        try: call()
        except UserError as e: line = str(e)
        else: pytest.fail(f'{name} was accepted')
        assert '\n' not in line and len(line) < 700 and all(w in line for w in words), (name, line)
    assert snapshot(here) == before


@pytest.mark.parametrize('late', ['forward', 'backward'])
def test_a_compiler_that_fails_in_the_step(capsys, here, monkeypatch, late):
    "What was compiled before the run went well; the step itself does not"
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.exc import InductorError  # in which it wraps whatever happens
    words = 'C++ compile error\n\nCommand:\ng++ -O3\n\nOutput:\ng++: fatal error: Killed signal terminated program cc1plus\n'
    def fail(graph, inputs): raise InductorError(RuntimeError(words), inspect.currentframe())
    backend = aot_autograd(fw_compiler=fail if late == 'forward' else lambda graph, inputs: graph.forward, bw_compiler=fail)
    compiler = torch.compile
    monkeypatch.setattr('torch.compile', lambda f, **how: compiler(f, **how, backend=backend) if isinstance(getattr(f, '__self__', f), torch.nn.Module) else f)
    torch._dynamo.reset()
    code, out, err = call(capsys, *with_flag(), '--compile')
    line, = [l for l in err.splitlines() if l.startswith('continual-llm: ')]
    assert code == 2 and 'Traceback' not in out + err
    assert 'g++: fatal error: Killed signal' in line and '--resume' in line and 'without --compile' in line
    assert load_object(here/'new'/'last'/'000000.pt')['step'] == 0
    torch._dynamo.reset()
