"Every option does what its comment says: each is changed alone, and what follows is checked against a value worked out by hand"
import inspect, json, math, re, shutil, subprocess, sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from continual_llm import dynamic, generate as writing, narrow, train as training
from continual_llm.cli import generate_command, main, parse
from continual_llm.continual import continual_learn
from continual_llm.core import UserError, multiplies_bf16, read_json, seed_everything
from continual_llm.evaluate import evaluate, token_nats
from continual_llm.footprint import SPARE, run_bytes
from continual_llm.generate import Sampling, generate, load_model
from continual_llm.memory import domains
from continual_llm.model import Block, ContinualLLM, ModelConfig, model_config
from continual_llm.recipes import recipe_options
from continual_llm.teachers import load_teachers
from continual_llm.tokenizer import Tokenizer, train_tokenizer
from continual_llm.train import check_saving, memory_bound, prepare_job, pretrain, quickstart

WORDS = 'cat horse hen fox owl elephant mat log hillside road'.split()
LINES = [f'the {a} sat on the {b} and saw the {c} .\n\n' for a in WORDS for b in WORDS for c in WORDS[:3]]
SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=16, dropout=0.)
BASE = dict(batch_size=2, grad_accumulation=1, learning_rate=.01, warmup_steps=0, max_steps=3, precision='fp32', device='cpu', quiet=True)
pytestmark = pytest.mark.filterwarnings('ignore:the text passes max_seq_len')
STILL = 1e-30  # a learning rate that leaves fp32 weights as they are

SHOWN = {}     # function -> option -> the test that shows what it does


def shows(function, *names):
    "Mark a test as the one that shows what some options of a function do"
    def mark(test):
        for name in names: SHOWN.setdefault(function, {})[name] = test.__name__
        return test
    return mark


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Texts, a tokenizer and a model's shape"
    home = tmp_path_factory.mktemp('options')
    (home/'text.txt').write_text(''.join(LINES))
    (home/'few.txt').write_text(''.join(LINES[:10]))
    (home/'shape.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in SHAPE.items()))
    records = [dict(text=line, body='a word of another field\n') for line in LINES[:60]]
    (home/'records.jsonl').write_text('\n'.join(map(json.dumps, records)) + '\n')
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    return home


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    "Most of a tiny run's time is its picture, which has tests of its own"
    monkeypatch.setattr('continual_llm.train.save_curve', lambda history, path: None)


@pytest.fixture
def train(home, tmp_path):
    "A short run with some options otherwise, each in a folder of its own"
    made = []
    def run(**changes):
        made.append(tmp_path/f'run{len(made)}')
        asked = dict(BASE, data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), save_dir=str(made[-1]))
        return pretrain(**{**asked, **changes})
    return run


def steps(run, name): return run.history.column('step', name)


def evals(run, name): return run.history.column('eval', name)


def newest(run): return torch.load(run.folder/'final'/'model.pt')['model_state_dict']


def weights_at_birth(seed=0):
    "What a run begins with, made here"
    seed_everything(seed, 'weights')
    return ContinualLLM(ModelConfig(**SHAPE, vocab_size=300)).state_dict()


def one_step(train, **changes):
    "Weights after one step, less those before it, at a rate of 0.01"
    before, after = weights_at_birth(), newest(train(max_steps=1, **changes))
    return {name: after[name] - before[name] for name in before}


@shows(pretrain, 'recompute')
def test_recompute(train, monkeypatch):
    "Every layer is computed twice in a training step, and all numbers are the same"
    plain = newest(train(dropout=.2))
    calls, real = [], Block.forward
    monkeypatch.setattr(Block, 'forward', lambda self, *a, **kw: calls.append(self.training) or real(self, *a, **kw))
    again = train(dropout=.2, recompute=True)
    assert all(torch.equal(w, plain[k]) for k, w in newest(again).items())
    assert sum(calls) == 3*2*SHAPE['n_layers'] and not again.model.training  # three steps
    assert again.generate('the cat', max_tokens=4)


@shows(pretrain, 'cuda_graphs')
def test_cuda_graphs(train, monkeypatch):
    "The compiler is asked for graphs, and gradients get memory of their own; without CUDA it is refused"
    with pytest.raises(UserError, match='this run is not compiled'): train(cuda_graphs=True)
    with pytest.raises(UserError, match='this run computes on cpu'): train(cuda_graphs=True, compile=True)
    plain, modes, apart = newest(train(compile=False)), [], []
    monkeypatch.setattr(torch, 'compile', lambda f, mode=None, **how: modes.append(mode) or f)
    monkeypatch.setattr(training, 'check_graphs', lambda *given: None)
    monkeypatch.setattr(training.Compiled, 'keep_apart', lambda self: apart.append(1))
    again = newest(train(cuda_graphs=True, compile=True))
    assert {'reduce-overhead'} == set(modes[-2:]) and apart and all(torch.equal(w, plain[k]) for k, w in again.items())


@shows(pretrain, 'parallel')
def test_parallel(train, home, tmp_path):
    "Three processes that each hold a share: the losses of one, and a file of each in every resume state; by one alone it is refused"
    shared = dict(BASE, grad_accumulation=3, data=home/'text.txt', config=home/'shape.yaml', tokenizer=home/'tok', cache=home/'cache', save_dir=tmp_path/'shared')
    del shared['quiet']
    alone = train(grad_accumulation=3, parallel='ddp')
    (tmp_path/'command.py').write_text('from continual_llm.cli import main\nmain()\n')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '3', str(tmp_path/'command.py'), 'pretrain', '--parallel=fsdp',
                           *(f'--{k}={v}' for k, v in shared.items())], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [r for line in (tmp_path/'shared'/'metrics.jsonl').read_text().splitlines() if (r := json.loads(line))['kind'] in ('step', 'eval')]
    assert [r['loss'] for r in found] == pytest.approx([*steps(alone, 'loss'), *evals(alone, 'loss')], rel=1e-6) and len(found) == 4
    assert len(list((tmp_path/'shared'/'last').glob('000003-*/*.pt'))) == 3
    with pytest.raises(UserError, match='start several with `torchrun'): train(parallel='fsdp')


@shows(pretrain, 'max_memory')
def test_max_memory(train, home, monkeypatch, capsys):
    "Fewer blocks at once, as many as what is foretold allows; a resumed run keeps its own; what cannot fit is refused before anything is written"
    monkeypatch.setattr('psutil.Process.memory_info', lambda self: SimpleNamespace(rss=3e8))
    deep = dict(SHAPE, n_layers=6)  # where a block in training takes more than an evaluation
    shape = ModelConfig(**deep, vocab_size=300)
    bound = {n: SPARE*run_bytes(shape, n, 3e8, precision='fp32')/1e9 + 1e-9 for n in (1, 2, 3, 8)}
    def plan(**more):
        run = train(config=deep, batch_size=8, max_steps=1, quiet=False, **more)
        settings = read_json(run.folder/'run.json', 'run')['settings']
        return settings['batch_size'], settings['blocks_per_step'], 'blocks at once instead of 8' in capsys.readouterr().out
    assert plan() == plan(max_memory=bound[8]) == (8, 8, False)
    assert [plan(max_memory=bound[n]) for n in (3, 2, 1)] == [(2, 8, True), (2, 8, True), (1, 8, True)]  # three would fit, and do not divide the step
    more = dict(config=deep, batch_size=8, eval_every=1, max_memory=bound[2], save_dir=str(home/'bounded'))
    left = train(max_time=1e-9, **more)
    assert 'as it began' not in capsys.readouterr().out
    monkeypatch.setattr('psutil.Process.memory_info', lambda self: SimpleNamespace(rss=9e9))
    assert left.stopped == 'max_time' and read_json(train(resume=True, quiet=False, **more).folder/'run.json', 'run')['settings']['batch_size'] == 2
    assert 'goes on with 2 blocks at once, as it began; with 9.' in capsys.readouterr().out
    with pytest.raises(UserError, match='max_memory=0.3: one block at once takes 9'): train(max_memory=.3, save_dir=str(home/'none'))
    assert not (home/'none').exists()
    with pytest.raises(UserError, match='max_memory=-1'): train(max_memory=-1)
    with pytest.raises(UserError, match='max_memory=2 bounds a process on the CPU'): memory_bound(2, 'cuda')
    with pytest.raises(UserError, match='max_memory=2 cannot be kept with compile'): train(max_memory=2, compile=True)
    with pytest.raises(UserError, match='other dropout masks'): check_saving('mps', ModelConfig(dropout=.1), True, False, 0.)
    check_saving('mps', ModelConfig(dropout=0.), True, True, 0.)


PEAK = """
import resource, sys, torch
from pathlib import Path
from continual_llm.train import pretrain
torch.set_num_threads(1)
data, tok, cache, folder, limit = sys.argv[1:]
pretrain(data, dict(d_model=256, n_layers=6, n_heads=8, n_kv_heads=2, d_ff=768, max_seq_len=256), tokenizer=tok, cache=cache, save_dir=folder, batch_size=32, grad_accumulation=1, max_steps=2, device='cpu', max_memory=float(limit))
seen = Path('/proc/self/status')  # Linux hands the other figure on to a child
print(int(seen.read_text().split('VmHWM:')[1].split()[0])*1024/1e9 if seen.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e9 if sys.platform == 'darwin' else 1e6/1.024))
"""

def test_a_process_stays_within_its_bound(home, tmp_path):
    "A real process, whose peak the system tells; unbounded, this run would take 1.4 GB"
    said = subprocess.run([sys.executable, '-c', PEAK, home/'text.txt', home/'tok', home/'cache', tmp_path/'run', '.75'], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    assert 'At most 0.75 GB: ' in said and 'instead of 32' in said
    assert .45 < float(said.splitlines()[-1]) <= .75, said


@shows(pretrain, 'spike')
def test_spike(train, monkeypatch):
    "A loss far above the usual is left out, unless nobody asks"
    monkeypatch.setattr('continual_llm.loop.Guard.verdict', lambda self, loss, norm, spike: f'beyond {spike}' if spike == 5. else '')
    assert [r['text'] for r in train(max_steps=2, spike=5.).history.rows('note')] == ['Step 0 left out: beyond 5.0', 'Step 1 left out: beyond 5.0']
    assert train(max_steps=2).history.rows('note') == []


@pytest.mark.parametrize('again', [False, True], ids=['kept', 'recomputed'])
def test_compiled_dropout_is_the_same(again):
    "One mask forward and backward, and the one that eager code draws; also where a layer is computed twice"
    torch.manual_seed(0)
    model, ids = ContinualLLM(ModelConfig(vocab_size=50, **{**SHAPE, 'dropout': .3})).train(), torch.randint(50, (2, 16))
    def grads(hidden):
        torch.manual_seed(1)
        return torch.autograd.grad(hidden(ids).square().sum(), list(model.parameters()))
    eager = grads(model.hidden)
    model.recompute = again
    for ours, plain in zip(grads(torch.compile(model.hidden, dynamic=False)), eager): torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@shows(pretrain, 'compile')
def test_compile(train, monkeypatch, capsys):
    "The training step goes through torch's compiler, and comes to the same"
    calls, compiler = [], torch.compile
    def compile(f, **how):
        calls.append(f)
        return compiler(f, **how, backend='eager') if isinstance(f, torch.nn.Module) else f  # the capture is torch's; no C++ compiler is needed here
    monkeypatch.setattr('torch.compile', compile)
    plain, compiled = train(), train(compile=True, quiet=False)
    said = capsys.readouterr().out
    assert 'a run of 3 steps will hardly win back' in said and re.search(r'^The first step took \d+ s, in which it was compiled$', said, re.M)
    assert [type(c) for c in calls[-1:]] == [ContinualLLM]
    assert max(abs(a - b) for a, b in zip(steps(plain, 'loss'), steps(compiled, 'loss'))) < 1e-5
    assert list(newest(plain)) == list(newest(compiled))


# ---- pretrain: the texts ----

@shows(pretrain, 'data')
def test_data(train, home):
    tok = Tokenizer.load(home/'tok')
    run = train(data=str(home/'few.txt'), val_data=str(home/'text.txt'), epochs=1, max_steps=0)
    n = len(tok.encode((home/'few.txt').read_text()))
    assert sum(steps(run, 'tokens')) == n//16 * 16


@shows(pretrain, 'val_data')
def test_val_data(train, home):
    text = (home/'few.txt').read_text()
    run = train(val_data=str(home/'few.txt'))
    assert evals(run, 'bytes') == [len(text)] and evals(run, 'words') == [len(text.split()) + text.count('\n')]


def test_a_best_epoch_says_which_text_chose_it(train, home, capsys):
    "Where a text of its own had more than one to choose from"
    own, said = dict(val_data=str(home/'few.txt')), []
    for more in (dict(own, eval_every=2), own, dict(eval_every=2)):
        run = train(**more, max_steps=6, epochs=2, quiet=False)
        said.append([line for line in capsys.readouterr().out.splitlines() if 'chose' in line])
    assert said == [[f"That loss is of few.txt, which also chose among {len(evals(run, 'loss'))} evaluations, so it may be a little too low; measure on another text"], [], []]


@shows(pretrain, 'val_split')
def test_val_split(train, home):
    size = (home/'text.txt').stat().st_size
    for share, given in ((.1, {}), (.3, dict(val_split=.3))):
        held, = evals(train(**given), 'bytes')
        assert math.isclose(held/size, share, abs_tol=.04)


@shows(pretrain, 'tokenizer', 'vocab_size')
def test_tokenizer(train, home):
    given, own = train(), train(tokenizer=None, vocab_size=285)
    assert given.tokenizer.hash == Tokenizer.load(home/'tok').hash and given.model.config.vocab_size == 300
    assert len(own.tokenizer) == own.model.config.vocab_size == 285 and Tokenizer.load(own.folder/'tokenizer').hash == own.tokenizer.hash
    with pytest.raises(UserError, match=f"vocab_size=286, but the run in {own.folder} began with 285 pieces; .*--save_dir"): train(tokenizer=None, vocab_size=286, save_dir=str(own.folder), resume=True)
    for more in ({}, dict(vocab_size=285)): assert len(train(tokenizer=None, save_dir=str(own.folder), resume=True, **more).tokenizer) == 285
    for more in ({}, dict(tokenizer=None, teacher=[given.folder])):
        with pytest.raises(UserError, match=f"vocab_size=285 .* {'teacher' if more else 'tokenizer'} "): train(vocab_size=285, **more)


@pytest.mark.parametrize('of, name, usual', [(pretrain, 'vocab_size', training.VOCABULARY), (evaluate, 'dynamic_rate', dynamic.RATE), (evaluate, 'dynamic_decay', dynamic.DECAY),
                                            (evaluate, 'batch_size', inspect.signature(token_nats).parameters['batch_size'].default)])
def test_a_default_said_in_words_is_the_one_used(of, name, usual):
    from fastcore.docments import docments
    assert float(re.search(r'default: ([\d.]+)', docments(of)[name]).group(1)) == usual and inspect.signature(of).parameters[name].default is None


@pytest.mark.parametrize('brought', ['tokenizer', 'teacher'])
def test_the_quick_start_with_the_pieces_of_another(train, home, tmp_path, brought):
    "Then the size in its own settings says nothing"
    first = train()
    run = quickstart(**{brought: str(home/'tok') if brought == 'tokenizer' else [str(first.folder)]}, data=str(home/'text.txt'), max_seq_len=16, max_steps=2, quiet=True, save_dir=str(tmp_path/'quick'))
    assert run.tokenizer.hash == first.tokenizer.hash and run.model.config.d_model == model_config('tiny').d_model


@shows(pretrain, 'field')
def test_field(train, home):
    runs = [train(data=str(home/'records.jsonl'), val_data=str(home/'records.jsonl'), field=f) for f in ('text', 'body')]
    assert [evals(r, 'bytes')[0] for r in runs] == [sum(map(len, LINES[:60])), 60*len('a word of another field\n')]


@shows(pretrain, 'cache')
def test_cache(train, home, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'user'))
    train(cache=str(tmp_path/'mine'))
    assert len(list((tmp_path/'mine').glob('*.tokens'))) == 2 and not (tmp_path/'user').exists()
    train(cache=None)
    assert {p.name for p in (tmp_path/'user'/'continual_llm').glob('*.tokens')} == {p.name for p in (tmp_path/'mine').glob('*.tokens')}


# ---- pretrain: the model ----

@shows(pretrain, 'config')
def test_config(train):
    assert train().model.config == ModelConfig(**SHAPE, vocab_size=300)
    assert train(config='tiny', max_steps=1).model.config == model_config('tiny', vocab_size=300)


@shows(pretrain, 'max_seq_len')
def test_max_seq_len(train):
    runs = train(), train(max_seq_len=24)
    assert [r.model.config.max_seq_len for r in runs] == [16, 24] and [steps(r, 'tokens')[0] for r in runs] == [2*16, 2*24]


@shows(pretrain, 'dropout')
def test_dropout(train):
    "Training sees it, validation does not"
    off, on = train(learning_rate=STILL), train(learning_rate=STILL, dropout=.5)
    assert on.model.config.dropout == .5 and steps(off, 'loss')[0] != steps(on, 'loss')[0] and evals(off, 'loss') == evals(on, 'loss')


@shows(pretrain, 'qk_norm')
def test_qk_norm(train):
    "The model gets norms of queries and keys; the command can also say that it gets none"
    assert not any('q_norm' in n for n in newest(train())) and newest(train(qk_norm=True))['blocks.0.attn.q_norm.weight'].shape == (8,)
    assert parse('pretrain', pretrain, ['--qk_norm']) == dict(qk_norm=True) and parse('pretrain', pretrain, ['--no-qk_norm']) == dict(qk_norm=False)
    assert not train(config=dict(SHAPE, qk_norm=True), qk_norm=False, max_steps=1).model.config.qk_norm


@shows(pretrain, 'recipe')
def test_recipe(train, capsys):
    "What is not given is the recipe's, and the report says so; what is given stays, and so does what a recipe does not speak of"
    takes = recipe_options('small-data')
    run = train(recipe='small-data', max_steps=1, weight_decay=.5, quiet=False)
    said = {k: v for k, v in read_json(run.folder/'run.json', 'run')['settings'].items() if k in takes}
    assert said == dict({k: v for k, v in takes.items() if k in said}, learning_rate=.01, warmup_steps=0, weight_decay=.5) and len(said) > 6  # BASE gives the first two
    line = next(line for line in capsys.readouterr().out.splitlines() if 'Recipe' in line)
    assert 'small-data (optimizer muon, learning_rate 0.01 (given), weight_decay 0.5 (given), dropout' in line
    given = dict(takes, learning_rate=.01, warmup_steps=0)
    assert all(torch.equal(a, b) for a, b in zip(newest(train(recipe='small-data', max_steps=2)).values(), newest(train(**given, max_steps=2)).values()))
    with pytest.raises(UserError, match="recipe='smalldata' is not one of plain, small-data"): train(recipe='smalldata')


# ---- pretrain: the steps ----

@shows(pretrain, 'teacher', 'distill')
def test_teacher(train, home, tmp_path, capsys):
    "The first loss is that of the text and the teachers' mean, worked out here; a run is resumed with the same teachers alone"
    first, second = train(max_steps=30), train(max_steps=30, seed=1, split_seed=0)
    job = prepare_job(**BASE, data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), seed=2, split_seed=0)
    (x, y), = job.batches(0)
    scores = job.make_model().eval()(x).flatten(0, 1)
    came, expected = F.cross_entropy(scores, y.flatten()).item(), [load_model(r.folder)[0](x).flatten(0, 1).softmax(1) for r in (first, second)]
    def mixed(share, *known): return (1-share)*came + share*F.cross_entropy(scores, sum(known)/len(known)).item()
    def loss(**changes): return steps(train(seed=2, max_steps=1, **changes), 'loss')[0]
    assert loss(split_seed=0) == pytest.approx(came, rel=1e-5)
    assert loss(teacher=str(first.folder)) == pytest.approx(mixed(.5, expected[0]), rel=1e-5)
    assert loss(teacher=first.folder/'final'/'model.pt', distill=.9) == pytest.approx(mixed(.9, load_model(first.folder/'final'/'model.pt')[0](x).flatten(0, 1).softmax(1)), rel=1e-5)
    assert loss(teacher=[first.folder, second.folder], distill=1.) == pytest.approx(mixed(1., *expected), rel=1e-5)
    assert len({mixed(.5, expected[0]), mixed(.9, expected[0]), mixed(1., *expected), came}) == 4 and abs(mixed(.5, expected[0]) - came) > 1e-3*came
    capsys.readouterr()
    taught = train(teacher=[str(first.folder), str(second.folder)], tokenizer=None, seed=2, quiet=False)
    assert f'{first.folder}, {second.folder} (0.5 of the target, by their mean)' in capsys.readouterr().out and taught.tokenizer.hash == first.tokenizer.hash
    for other, what in (({}, 'the teacher is not the one .* None now'), (dict(teacher=[first.folder, second.folder], distill=.75), 'distill was 0.5 .* is 0.75 now'), (dict(teacher=[second.folder, first.folder]), 'the teacher is not the one')):
        with pytest.raises(UserError, match=what): train(seed=2, save_dir=str(taught.folder), resume=True, **other)
    moved = shutil.copytree(second.folder, tmp_path/'moved')
    left = train(teacher=[first.folder, moved], seed=2, save_dir=str(tmp_path/'left'), max_time=1e-9)
    alone = shutil.copy(first.folder/'best'/'checkpoint.pt', tmp_path/'alone.pt')  # the same weights, of whose split nobody knows
    again = train(teacher=[alone, second.folder], seed=2, save_dir=str(left.folder), resume=True)
    assert left.stopped and all(torch.equal(w, newest(taught)[k]) for k, w in newest(again).items())
    for bad, what in ((dict(distill=.3), 'there is none'), (dict(teacher=first.folder, max_seq_len=32), '--max_seq_len 16'), (dict(teacher=first.folder, save_dir=str(first.folder), overwrite=True), 'must outlast'),
                      (dict(teacher=first.folder, cuda_graphs=True, compile=True), 'without a teacher'), (dict(teacher=tmp_path/'none'), 'no checkpoint'), (dict(teacher=first.folder, parallel='fsdp'), 'torchrun')):
        with pytest.raises(UserError, match=what): train(**bad)


@shows(pretrain, 'split_seed')
def test_split_seed(train, home, tmp_path, capsys):
    "Which text judges does not depend on `seed` then; a student is judged as its teacher was, and by no text that its teacher learned"
    def val(run): return domains(run.folder/'memory')[0].val.ids.tolist()
    first, other = train(), train(seed=1)
    assert val(first) == val(train(seed=1, split_seed=0)) == val(student := train(seed=1, teacher=first.folder)) != val(other)
    assert read_json(other.folder/'run.json', 'run')['settings']['split'] == dict(val_split=.1, seed=1)
    assert read_json(train(val_data=str(home/'few.txt')).folder/'run.json', 'run')['settings']['split'] == {}
    stage = continual_learn(model=str(first.folder), data=str(home/'few.txt'), domain='few', save_dir=str(tmp_path/'stage'), cache=str(home/'cache'), quiet=True, max_steps=2, device='cpu', max_forgetting=math.inf).folder
    apart = train(data=str(home/'records.jsonl'), seed=3)
    told = train(data=str(home/'few.txt'), teacher=apart.folder, seed=3)  # by one who had it from others
    heir = continual_learn(model=str(told.folder), data=str(home/'text.txt'), domain='text', save_dir=str(tmp_path/'heir'), cache=str(home/'cache'), quiet=True, max_steps=2, device='cpu', max_forgetting=math.inf).folder
    for how in (dict(teacher=first.folder, split_seed=1), dict(teacher=[first.folder, other.folder]), dict(teacher=first.folder, val_split=.2), dict(teacher=first.folder, val_data=str(home/'text.txt')),
                dict(teacher=stage, split_seed=1), dict(teacher=stage, val_data=str(home/'few.txt')), *(dict(teacher=t, val_data=str(home/'records.jsonl')) for t in (told.folder, heir)), dict(teacher=student.folder, split_seed=3)):
        with pytest.raises(UserError, match='was trained on text that this run would be validated on .*--val_data'): train(seed=2, **how)
    assert val(train(teacher=stage, seed=2)) == val(first)
    left = train(split_seed=5, save_dir=str(tmp_path/'left'), max_time=1e-9)
    with pytest.raises(UserError, match="split was .*'seed': 5.* is .*'seed': 6"): train(split_seed=6, save_dir=str(left.folder), resume=True)
    whole = newest(train(split_seed=5))
    assert all(torch.equal(w, whole[k]) for k, w in newest(train(save_dir=str(left.folder), resume=True)).items())
    shutil.copy(first.folder/'best'/'checkpoint.pt', tmp_path/'alone.pt')
    capsys.readouterr()
    train(teacher=tmp_path/'alone.pt', quiet=False)
    assert f"Whether teacher={tmp_path/'alone.pt'} read the validation text is not known" in capsys.readouterr().out
    for bad, what in ((dict(split_seed=-1), 'split_seed=-1'), (dict(split_seed=1, val_data=str(home/'few.txt')), 'splits nothing')):
        with pytest.raises(UserError, match=what): train(**bad)


def test_memory_of_a_teacher(train, monkeypatch):
    "A bound on memory counts what it takes besides its weights"
    first, seen = train(max_steps=1), []
    monkeypatch.setattr(training, 'within', lambda *a: seen.append(a[-1]) or a[2:4])
    train(max_memory=5., max_steps=1), train(max_memory=5., max_steps=1, teacher=first.folder)
    assert seen == [0., load_teachers((first.folder,), .5).bytes(2*16, 'fp32')] and seen[1] > 0


def test_a_run_from_before_splits_were_kept(train, monkeypatch):
    "It is resumed, by the split of its seed"
    settings = training.Job.settings.fget
    with monkeypatch.context() as m:
        m.setattr(training.Job, 'settings', property(lambda job: {k: v for k, v in settings(job).items() if k != 'split'}))
        left, whole = train(seed=3, max_time=1e-9), newest(train(seed=3))
    again = train(seed=3, save_dir=str(left.folder), resume=True)
    assert left.stopped and not again.stopped and all(torch.equal(w, whole[k]) for k, w in newest(again).items())


def test_a_teacher_beside_a_compiled_model(train, monkeypatch):
    "Blocks of the usual number go through the compiled model, and the numbers stay"
    first = train(max_steps=5)
    run, seen = train(teacher=first.folder, epochs=1, max_steps=0, batch_size=8), []
    plain = newest(run)
    assert {t//16 for t in steps(run, 'tokens')} == {8, 6}  # the last is a small one
    def compiled(f, **how):
        def run(x, *more): return seen.append((f.__name__, len(x))) or f(x, *more)
        return run if callable(f) and not isinstance(f, torch.nn.Module) else f
    monkeypatch.setattr(torch, 'compile', compiled)
    again = newest(train(teacher=first.folder, epochs=1, max_steps=0, batch_size=8, compile=True))
    assert {s for s in seen if s[0] == 'hidden'} == {('hidden', 8)} and all(torch.equal(w, plain[k]) for k, w in again.items())  # the compiler itself is tried on a lambda first


@shows(pretrain, 'epochs', 'max_steps')
def test_epochs_and_max_steps(train, home):
    few = dict(data=str(home/'few.txt'), val_data=str(home/'few.txt'))
    one, two, cut = train(**few, epochs=1, max_steps=0), train(**few, epochs=2, max_steps=0), train(**few, epochs=2, max_steps=3)
    n = len(steps(one, 'loss'))
    assert n > 3 and len(steps(two, 'loss')) == 2*n and steps(cut, 'step') == [0, 1, 2]
    assert (evals(two, 'step'), evals(two, 'epoch')) == ([n, 2*n], [1, 2]) and evals(cut, 'step') == [3]


@shows(pretrain, 'batch_size', 'grad_accumulation')
def test_batch_size_and_accumulation(train):
    "Four blocks are four blocks, however they are passed"
    two, four, twice = train(), train(batch_size=4), train(grad_accumulation=2)
    assert [steps(r, 'tokens')[0] for r in (two, four, twice)] == [2*16, 4*16, 4*16]
    assert steps(four, 'loss') == pytest.approx(steps(twice, 'loss'), abs=1e-5) and steps(two, 'loss') != pytest.approx(steps(four, 'loss'), abs=1e-3)


@pytest.mark.parametrize('limit', [1, 2])
@shows(pretrain, 'batch_size')
def test_micro_batches(train, limit):
    "`batch_size` is what goes through the model at once"
    seen = []
    hook = register_module_forward_pre_hook(lambda m, x: seen.append(len(x[0])) if isinstance(m, ContinualLLM) and m.training else None)
    try: train(batch_size=limit, grad_accumulation=4//limit, max_steps=1)
    finally: hook.remove()
    assert seen == [limit]*(4//limit)


@shows(pretrain, 'learning_rate')
def test_learning_rate(train):
    once, twice = one_step(train), one_step(train, learning_rate=.02)
    assert max(d.abs().max() for d in once.values()) > .005
    for name in once: torch.testing.assert_close(twice[name], 2*once[name], atol=1e-6, rtol=1e-4)


@shows(pretrain, 'warmup_steps')
def test_warmup_steps(train):
    "Step s of w rising ones is at (s+1)/(w+1) of the peak; the descent ends at a tenth"
    run = train(warmup_steps=4, max_steps=50)
    assert steps(run, 'lr')[:5] == pytest.approx([.01*(s+1)/5 for s in range(5)]) and steps(run, 'lr')[-1] == pytest.approx(.001, rel=.02)
    assert steps(train(warmup_steps=0), 'lr')[0] == .01


@shows(pretrain, 'optimizer')
def test_optimizer(train):
    "AdamW first moves every number by the rate; Muon moves a matrix by an orthogonal one, but for directions without gradient"
    for name, d in one_step(train, weight_decay=0.).items():
        if 'norm' not in name: assert (d.abs() - .01).abs().median() < 1e-4
    d = one_step(train, weight_decay=0., optimizer='muon')
    for name in (n for n in d if d[n].ndim == 2 and 'embed' not in n):
        sizes = torch.linalg.svdvals(d[name]) / (.01 * .2*max(d[name].shape)**.5)
        assert .6 < sizes.max() < 1.4


@shows(pretrain, 'weight_decay')
def test_weight_decay(train):
    "A matrix loses rate times decay of itself per step, a vector nothing"
    before, without, with_it = weights_at_birth(), one_step(train, weight_decay=0.), one_step(train, weight_decay=.5)
    for name in before:
        lost = .01*.5*before[name] if before[name].ndim == 2 else 0*before[name]
        torch.testing.assert_close(without[name] - with_it[name], lost, atol=1e-6, rtol=1e-3)


@shows(pretrain, 'max_grad_norm')
def test_max_grad_norm(train):
    "AdamW divides a gradient by its size plus 1e-8, so a gradient cut to 1e-10 moves nothing by more than a hundredth of the rate"
    free, loose, cut = [one_step(train, weight_decay=0., max_grad_norm=n) for n in (0., 1e9, 1e-10)]
    for name in free:
        assert torch.equal(free[name], loose[name]) and cut[name].abs().max() <= 1.1e-4
    assert max(d.abs().max() for d in free.values()) > .009


@shows(pretrain, 'seed')
def test_seed(train):
    a, again, other = train(), train(), train(seed=1)
    assert steps(a, 'loss') == steps(again, 'loss') and evals(a, 'loss') == evals(again, 'loss')
    assert not set(steps(a, 'loss')) & set(steps(other, 'loss')) and evals(a, 'bytes') != evals(other, 'bytes')
    still = newest(train(seed=1, learning_rate=STILL, weight_decay=0.))
    for name, w in weights_at_birth(1).items(): assert torch.equal(w, still[name])


# ---- pretrain: the machine ----

@shows(pretrain, 'device')
def test_device(train, monkeypatch):
    "The CPU when asked for, though `auto` would take what looks like another device"
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert {p.device.type for p in train(device='cpu').model.parameters()} == {'cpu'}
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)): train(device='auto')


@shows(pretrain, 'precision')
def test_precision(train):
    losses = {p: steps(train(precision=p), 'loss') for p in ('fp32', 'bf16', 'auto')}
    assert losses['fp32'] != losses['bf16'] and losses['fp32'] == pytest.approx(losses['bf16'], rel=.02)
    assert losses['auto'] == losses['bf16' if multiplies_bf16('cpu') else 'fp32']


@shows(pretrain, 'deterministic')
def test_deterministic(train):
    seen = []
    hook = register_module_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    try:
        for asked in (False, True):
            seen.clear()
            train(deterministic=asked)
            assert seen and set(seen) == {asked}
    finally: hook.remove()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- pretrain: looking and stopping ----

@shows(pretrain, 'eval_every')
def test_eval_every(train):
    assert evals(train(max_steps=5), 'step') == [5] and evals(train(max_steps=5, eval_every=2), 'step') == [2, 4, 5]


@shows(pretrain, 'eval_tokens')
def test_eval_tokens(train, home):
    tok, text = Tokenizer.load(home/'tok'), (home/'few.txt').read_text()
    part = tok.decode(tok.encode(text)[:50])
    run, whole = [train(val_data=str(home/'few.txt'), eval_tokens=n) for n in (50, 0)]
    assert evals(run, 'tokens') == [50] and evals(run, 'bytes') == [len(part)] and evals(whole, 'tokens') == [len(tok.encode(text))]


@shows(pretrain, 'early_stopping_patience')
def test_early_stopping_patience(train):
    "A model that stands still is best at the first look and no better at any later one"
    for patience, last in ((1, 2), (2, 3), (0, 5)):
        run = train(learning_rate=STILL, eval_every=1, max_steps=5, early_stopping_patience=patience)
        assert (evals(run, 'step')[-1], run.stopped) == (last, 'early stopping' if patience else '')


@shows(pretrain, 'prompt')
def test_prompt(train):
    "A sample after each evaluation begins with it, and is not the same as another; what is learned is"
    runs = [train(prompt=p, max_steps=4, eval_every=2) for p in ('the cat', '')]
    samples = [r.history.column('sample', 'text') for r in runs]
    assert [s.startswith('the cat') and len(s) > len('the cat') for s in samples[0]] == [True, True] and not samples[1][0].startswith('the cat')
    assert all(torch.equal(a, b) for a, b in zip(newest(runs[0]).values(), newest(runs[1]).values()))


@shows(pretrain, 'panel')
def test_panel(train, monkeypatch):
    "Somebody who presses buttons while it trains; without the option there are none"
    class Hand:
        def __init__(self, controls): self.controls = controls
        def __call__(self, record, history):
            if record['kind'] == 'step' and record['step'] == 1: self.controls.ask('rate', factor=.5); self.controls.ask('evaluate')
    monkeypatch.setattr('continual_llm.train.open_panel', Hand)
    run, plain = train(panel=True, quiet=False, max_steps=4), train(quiet=False, max_steps=4)
    assert [(r['step'], r['action']) for r in run.history.rows('action')] == [(2, 'rate'), (2, 'evaluate')] and evals(run, 'step') == [2, 4]
    assert [a/b for a, b in zip(steps(run, 'lr'), steps(plain, 'lr'))] == [1, 1, .5, .5] and not plain.history.rows('action')


@shows(pretrain, 'actions')
def test_actions(train):
    "As a list, and as the folder of a run in which it was done"
    plan = [dict(step=1, action='rate', factor=.5)]
    run, plain = train(actions=plan), train()
    again = train(actions=str(run.folder))
    assert [a/b for a, b in zip(steps(run, 'lr'), steps(plain, 'lr'))] == [1, .5, .5] and steps(again, 'loss') == steps(run, 'loss') != steps(plain, 'loss')


@shows(pretrain, 'max_time')
def test_max_time(train):
    run = train(max_time=1e-9, max_steps=5)
    assert run.stopped == 'max_time' and len(steps(run, 'loss')) < 5 and not evals(run, 'loss')
    assert train(max_time=60.).stopped == ''


# ---- pretrain: the folder ----

@shows(pretrain, 'keep_epochs')
def test_keep_epochs(train, home):
    few = dict(data=str(home/'few.txt'), val_data=str(home/'few.txt'), epochs=3, max_steps=0)
    for n, kept in ((0, [1, 2, 3]), (1, [3]), (2, [2, 3])):
        run = train(**few, keep_epochs=n)
        assert sorted(p.name for p in run.folder.glob('epoch_*')) == [f'epoch_{i}' for i in kept] and (run.folder/'best'/'checkpoint.pt').is_file()


@shows(pretrain, 'save_every')
def test_save_every(train):
    def states(**given): return [int(p.stem) for p in sorted((train(max_steps=5, **given).folder/'last').glob('*.pt'))]
    assert states() == [0, 5] and states(save_every=3) == [0, 3, 5] and states(save_every=4) == [0, 4, 5]


@shows(pretrain, 'save_dir')
def test_save_dir(train, tmp_path):
    run = train(save_dir=str(tmp_path/'a'/'b'))
    assert run.folder == tmp_path/'a'/'b' and (run.folder/'best'/'checkpoint.pt').is_file()


@shows(pretrain, 'resume', 'overwrite')
def test_resume_and_overwrite(train, tmp_path):
    place = dict(save_dir=str(tmp_path/'run'), max_steps=4)
    whole, left = train(max_steps=4), train(**place, save_every=2, max_time=1e-9)
    assert left.stopped
    with pytest.raises(UserError, match='already holds a run'): train(**place)
    assert steps(train(**place, resume=True), 'loss') == steps(whole, 'loss')
    fresh = train(**place, overwrite=True, seed=1)
    assert len(steps(fresh, 'loss')) == 4 and steps(fresh, 'loss') != steps(whole, 'loss')


@shows(pretrain, 'quiet')
def test_quiet(train, capfd):
    train()
    assert capfd.readouterr() == ('', '')
    train(quiet=False)
    assert 'Training complete!' in capfd.readouterr().out


# ---- evaluate ----

@pytest.fixture(scope='module')
def made(home):
    "A run that has learned a little"
    return pretrain(**dict(BASE, data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), epochs=20, max_steps=150,
                           save_dir=str(home/'made')))


@pytest.fixture
def score(home, made):
    def run(**changes): return evaluate(**{**dict(model=made.folder, data=home/'few.txt', device='cpu', precision='fp32', cache=home/'cache'), **changes})
    return run


@shows(evaluate, 'model', 'data', 'field')
def test_what_is_evaluated(score, home, made, train):
    assert score().bytes == (home/'few.txt').stat().st_size and score(data=home/'text.txt').bytes == (home/'text.txt').stat().st_size
    assert [score(data=home/'records.jsonl', field=f).bytes for f in ('text', 'body')] == [sum(map(len, LINES[:60])), 60*24]
    assert score(model=train(learning_rate=STILL).folder).loss > score().loss + 1


@shows(evaluate, 'model')
def test_models_asked_as_one(score, home, made, train):
    "Against the probabilities of both, averaged by hand in plain blocks"
    other = train(learning_rate=STILL)
    ids = torch.tensor([made.tokenizer.bos_id] + made.tokenizer.encode((home/'few.txt').read_text()))
    def probabilities(model):
        model.eval()
        return torch.cat([model(x[None]).double().softmax(-1)[0].gather(1, y[:, None]) for x, y in zip(ids[:-1].split(16), ids[1:].split(16))])
    with torch.no_grad(): want = -((probabilities(made.model) + probabilities(other.model))/2).log().sum().item()
    assert abs(score(model=[made.folder, other.folder]).nats - want) < 1e-5*want


@shows(evaluate, 'tokenizer')
def test_evaluate_tokenizer(score, home, tmp_path):
    train_tokenizer(home/'text.txt', vocab_size=285, save=tmp_path/'other')
    assert score(tokenizer=home/'tok').nats == score().nats
    with pytest.raises(UserError, match='was trained with'): score(tokenizer=tmp_path/'other')


@shows(evaluate, 'context', 'stride', 'batch_size', 'precision')
def test_how_it_is_evaluated(score, made, home):
    "Against windows cut by hand; plain blocks do not overlap, the last one neither"
    ids = [made.tokenizer.bos_id] + made.tokenizer.encode((home/'few.txt').read_text())
    def nats(context, stride):
        "Minus the log probability of the whole text, by plain slices"
        total, end = 0., 0
        while end < len(ids)-1:
            new = min(context if not end else stride, len(ids)-1-end)
            start = end if stride == context else max(0, end + new - context)
            with torch.no_grad(): logp = made.model(torch.tensor([ids[start:end+new]]))[0].double().log_softmax(-1)
            total -= logp[range(-new, 0), ids[end+1:end+new+1]].sum().item()
            end += new
        return total
    for context, stride in ((16, 16), (8, 8), (16, 1), (4, 2)):
        assert score(context=context, stride=0 if stride == context else stride).nats == pytest.approx(nats(context, stride), rel=1e-5)
    assert score(batch_size=1).nats == pytest.approx(score(batch_size=5).nats, rel=1e-6)
    assert score(precision='bf16').nats != score().nats and score(precision='bf16').nats == pytest.approx(score().nats, rel=.02)
    assert score(precision='auto').nats == score(precision='bf16' if multiplies_bf16('cpu') else 'fp32').nats


@pytest.mark.parametrize('n', [1, 3])
@shows(evaluate, 'batch_size')
def test_windows_at_once(score, n):
    seen = []
    hook = register_module_forward_pre_hook(lambda m, x: seen.append(len(x[0])) if isinstance(m, ContinualLLM) else None)
    try: score(batch_size=n)
    finally: hook.remove()
    assert max(seen) == n


@shows(evaluate, 'dynamic', 'dynamic_rate', 'dynamic_decay', 'stride')
def test_learning_while_it_reads(score, made, home):
    "Against stretches of eight cut by hand, each learned from by steps of a share of each weight once it is predicted; the checkpoint stays as it is"
    ids = [made.tokenizer.bos_id] + made.tokenizer.encode((home/'few.txt').read_text())
    def nats(rate, decay):
        model, trained, total = made.model, [p.detach().clone() for p in made.model.parameters()], 0.
        for at in range(1, len(ids), 8):
            end = min(at+8, len(ids))
            start = max(0, end-1-16)
            logp = model(torch.tensor([ids[start:end-1]]))[0].log_softmax(-1)
            cost = -logp[range(at-end, 0), ids[at:end]]
            total += cost.double().sum().item()
            grads = torch.autograd.grad(cost.mean(), list(model.parameters()))
            with torch.no_grad():
                for p, g, t in zip(model.parameters(), grads, trained): p.copy_((p - rate*t.norm()*g/g.norm().clamp(min=1e-30))*(1-decay) + decay*t)
        with torch.no_grad():
            for p, t in zip(model.parameters(), trained): p.copy_(t)
        return total
    got = {how: score(dynamic=True, dynamic_rate=how[0], dynamic_decay=how[1], stride=8).nats for how in ((.005, 0.), (.005, .5), (.002, 0.))}
    for how, value in got.items(): assert value == pytest.approx(nats(*how), rel=1e-5)
    assert len(set(got.values())) == 3 and score().nats == score(dynamic=False).nats
    assert score(dynamic=True, dynamic_rate=0., stride=8).nats == pytest.approx(nats(0., 0.), rel=1e-5)
    assert score(dynamic=True, stride=8).nats == score(dynamic=True, dynamic_rate=dynamic.RATE, dynamic_decay=dynamic.DECAY, stride=8).nats
    for bad, said in ((dict(dynamic_rate=dynamic.RATE), 'dynamic_rate=0.001'), (dict(dynamic_decay=0.), 'dynamic_decay=0.0'), (dict(dynamic=True, batch_size=8), 'batch_size=8')):
        with pytest.raises(UserError, match=said): score(**bad)  # would have no effect


@shows(evaluate, 'device', 'cache')
def test_where_it_is_evaluated(score, tmp_path, monkeypatch):
    score(cache=tmp_path/'mine')
    assert len(list((tmp_path/'mine').glob('*.tokens'))) == 1
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert score(device='cpu').tokens
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)): score(device='auto')


# ---- train_tokenizer ----

@shows(train_tokenizer, 'data', 'field', 'vocab_size', 'save', 'overwrite', 'model_type', 'markers', 'sample_bytes')
def test_tokenizer_options(home, tmp_path):
    text, records, save = home/'text.txt', home/'records.jsonl', tmp_path/'tok'
    made = train_tokenizer(text, 290, save=save)
    assert len(made) == 290 and Tokenizer.load(save).hash == made.hash
    with pytest.raises(UserError, match='holds a tokenizer already'): train_tokenizer(text, 285, save=save)
    assert Tokenizer.load(save).hash != train_tokenizer(text, 285, save=save, overwrite=True).hash == Tokenizer.load(save).hash
    assert len(made.encode('horse')) > 1 and len(train_tokenizer(text, 300).encode(' the')) < len(train_tokenizer(text, 285).encode(' the'))
    assert train_tokenizer(text, 285, model_type='unigram').model != train_tokenizer(text, 285).model
    assert [len(train_tokenizer(text, 290, markers=m).encode('<num>')) for m in ('none', '<num>')] == [5, 1]
    body, field = train_tokenizer(records, 285, field='body'), train_tokenizer(records, 285)
    assert len(body.encode('field')) < len(field.encode('field'))
    assert train_tokenizer(text, 290, sample_bytes=1000).model != made.model


# ---- generate, and the command of that name ----

@shows(generate, 'model', 'tokenizer', 'prompt', 'max_tokens')
def test_generate(made):
    def write(prompt, n, **more): return generate(made.model, made.tokenizer, prompt, n, temperature=0, **more)
    assert len(made.tokenizer.encode(write('the cat', 5))) <= 5 and write('the cat', 9).startswith(write('the cat', 5))
    ids = made.tokenizer.encode('the cat')
    with torch.no_grad(): first = made.model(torch.tensor([[made.tokenizer.bos_id] + ids]))[0, -1].argmax().item()
    assert write('the cat', 1) == made.tokenizer.decode([first])


FLAGS = dict(prompt='the owl', max_tokens=3, temperature=2., top_k=1, top_p=.01, repetition_penalty=5., stop='t', forbid='s', seed=5)


@pytest.mark.parametrize('name', FLAGS)
@shows(generate, *(set(FLAGS) - {'prompt', 'max_tokens'}))
@shows(generate_command, *FLAGS)
def test_generate_flags(made, capsys, name):
    "A flag says what the parameter of that name says, and changes the text"
    def text(**given):
        with pytest.raises(SystemExit): main(['generate', '--model', str(made.folder), '--device', 'cpu'] + [str(w) for k, v in given.items() for w in (f'--{k}', v)])
        return capsys.readouterr().out
    usual = dict(prompt='the cat', max_tokens=30)
    asked = {**usual, name: FLAGS[name]}
    assert text(**asked) == asked['prompt'] + generate(made.model, made.tokenizer, **asked) + '\n' != text(**usual)


@shows(generate_command, 'model', 'tokenizer', 'device')
def test_generate_places(made, home, tmp_path, capsys, monkeypatch):
    def call(*argv):
        with pytest.raises(SystemExit) as stop: main(['generate', '--model', str(made.folder), '--max_tokens', '5', *argv])
        return stop.value.code, capsys.readouterr().err
    train_tokenizer(home/'text.txt', vocab_size=285, save=tmp_path/'other')
    assert call('--device', 'cpu', '--tokenizer', str(home/'tok')) == (0, '')
    code, line = call('--device', 'cpu', '--tokenizer', str(tmp_path/'other'))
    assert code == 2 and 'was trained with' in line
    assert call('--device', 'cpu', '--model', str(tmp_path/'none'))[0] == 2
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert call('--device', 'cuda')[0] == 2


def written(made, capsys, *more):
    "What the command prints"
    with pytest.raises(SystemExit) as end: main(['generate', '--model', str(made.folder), '--device', 'cpu', '--prompt', 'the cat', '--max_tokens', '30', *more])
    assert end.value.code in (0, None), capsys.readouterr().err
    return capsys.readouterr().out


@shows(generate_command, 'precision')
def test_generate_precision(made, capsys, monkeypatch):
    "The text is that of the model in narrow numbers, which knows as much"
    used, real = [], narrow.for_writing
    monkeypatch.setattr(narrow, 'for_writing', lambda model, precision: used.append(precision) or real(model, precision))
    ids = torch.tensor([made.tokenizer.encode(''.join(LINES))[:16*40]]).view(40, 16)
    for precision in ('bf16', 'int8'):
        assert written(made, capsys, '--precision', precision) == 'the cat' + generate(real(made.model, precision), made.tokenizer, 'the cat', max_tokens=30) + '\n'
        with torch.no_grad(): plain, less = [m.eval()(ids[:, :-1], targets=ids[:, 1:]).item() for m in (made.model, real(made.model, precision))]
        assert 0 < abs(plain - less) < .005*plain
    assert written(made, capsys) == 'the cat' + generate(made.model, made.tokenizer, 'the cat', max_tokens=30) + '\n' and used == ['bf16', 'int8', 'fp32']


@shows(generate, 'compile')
@shows(generate_command, 'compile')
def test_generate_compile(made, capsys, monkeypatch):
    "The reading of a token goes through the compiler, and the text stays the same"
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, **how: compiled.append(f) or f)
    assert written(made, capsys, '--compile') == written(made, capsys) and compiled[-1] is writing.scores_after


# ---- the table ----

def options(function):
    "Names of all that can be asked of a function"
    names = {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    return names | ({f.name for f in fields(Sampling)} if function is generate else set())


@pytest.mark.parametrize('function', [pretrain, evaluate, train_tokenizer, generate, generate_command], ids=lambda f: f.__name__)
def test_every_option_is_shown(function):
    "A new option needs a test above that shows what it does"
    assert set(SHOWN[function]) == options(function)


@shows(pretrain, 'schedule')
def test_schedule(train):
    "Warmup, then the peak until four fifths of the run, then down to a tenth; the weights before the descent are kept"
    run = train(schedule='wsd', max_steps=10, warmup_steps=1)
    assert run.history.column('step', 'lr')[:9] == [.005] + [.01]*8
    assert run.history.column('step', 'lr')[9] == pytest.approx(.001 + .009*(1 - .5**.5))
    assert load_model(run.folder/'branch')[2]['step'] == 8
    assert not (train(max_steps=10).folder/'branch').exists()


@shows(pretrain, 'domain', 'memory')
def test_domain_and_memory(train):
    "What is kept of the text, and under which name"
    (kept,) = domains(train(domain='home', memory=.5).folder/'memory')
    (less,) = domains(train(memory=.05).folder/'memory')
    (whole,) = domains(train().folder/'memory')
    (none,) = domains(train(memory=0.).folder/'memory')
    assert [d.name for d in (kept, less, none)] == ['home', 'base', 'base'] and none.replay is None
    assert 8 < len(kept.replay)/len(less.replay) < 12 and len(whole.replay) >= 2*len(kept.replay) and kept.val.checksum == none.val.checksum
