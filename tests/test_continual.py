"Stages: resumable like any run, their gate surviving a kill; each option of `continual_learn` changes what it says; a story of three domains"
import json, math, os, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
from continual_llm import continual as teaching
from continual_llm import distill
from continual_llm import train as training
from continual_llm.checkpoint import Checkpoints, load_checkpoint
from continual_llm.cli import main
from continual_llm.compare import compare_twins
from continual_llm.continual import Learned, Stage, continual_learn, remember_domain
from continual_llm.core import UserError, read_json, write_json
from continual_llm.footprint import SPARE, run_bytes
from continual_llm.generate import load_model
from continual_llm.history import History
from continual_llm.lineage import history, matrix
from continual_llm.lora import load_adapter, merge_lora
from continual_llm.memory import domains
from continual_llm.model import Block, ModelConfig
from continual_llm.monitor import done_lines
from continual_llm.tokenizer import train_tokenizer
from continual_llm.train import carry_out, pretrain
from tests.test_options import LINES, SHAPE, WORDS, shows, SHOWN, options

CODE = [f'def {a}_{b}(x): return {c} + x\n\n' for a in WORDS for b in WORDS for c in WORDS[:3]]
BASE = dict(batch_size=4, grad_accumulation=1, learning_rate=.01, warmup_steps=2, max_steps=30, precision='fp32', device='cpu', quiet=True)
FILES = [f'{n}/checkpoint.pt' for n in ('best', 'candidate', 'epoch_1')]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch): monkeypatch.setattr('continual_llm.train.save_curve', lambda history, path: None)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Two texts, and a model of the first"
    home = tmp_path_factory.mktemp('continual')
    (home/'text.txt').write_text(''.join(LINES))
    (home/'code.txt').write_text(''.join(CODE))
    (home/'few.txt').write_text(''.join(CODE[:40]))
    (home/'shape.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in SHAPE.items()))
    (home/'records.jsonl').write_text('\n'.join(json.dumps(dict(text=line, body='the owl sat\n')) for line in CODE) + '\n')
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    pretrain(str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), save_dir=str(home/'base'), **BASE)
    return home


@pytest.fixture
def teach(home, tmp_path):
    "A short stage with some options otherwise, each in a folder of its own"
    made = []
    def run(**changes):
        made.append(tmp_path/f'stage{len(made)}')
        asked = dict(model=str(home/'base'), data=str(home/'code.txt'), domain='code', method='naive', max_steps=6, max_forgetting=math.inf, precision='fp32', device='cpu', quiet=True,
                     cache=str(home/'cache'), save_dir=str(made[-1]))
        return continual_learn(**{**asked, **changes})
    return run


class Killed(BaseException): pass


def kill(*a, **kw): raise Killed


def rows(stage, kind): return [r for r in map(json.loads, (stage.folder/'metrics.jsonl').read_text().splitlines()) if r['kind'] == kind]


def column(stage, kind, name): return [r[name] for r in rows(stage, kind)]


def weights(stage, name='best/checkpoint.pt'): return load_checkpoint(stage.folder/name)['model_state_dict']


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


# ---- stopped, killed, resumed ----

@pytest.mark.parametrize('method', ['replay', 'naive', 'replay+ewc', 'l2'])
def test_left_and_resumed(teach, method):
    "A stage that is left again and again ends in the same bits as one that never was, its verdict included"
    asked = dict(method=method, max_steps=12, eval_every=5, save_every=2, max_forgetting=.5)
    whole, left = teach(**asked), teach(**asked, max_time=1e-9)
    assert left.stopped == 'max_time' and left.verdict is None and not left.refused
    for minutes in (1e-9, 1e-3, 0.): left = teach(**asked, max_time=minutes, resume=True, save_dir=str(left.folder))
    seen = compare_twins(whole.folder, left.folder)
    assert seen.files > 3 and not seen.differences
    assert left.verdict == whole.verdict and left.after == whole.after


def test_killed_at_the_gate(teach, home, monkeypatch):
    "Killed between the promotion and the record of it, or before both: the same verdict after a resume, never a model that was not examined"
    for limit, broken in ((math.inf, 'write_json'), (0., 'write_json'), (math.inf, 'link')):
        whole = teach(max_forgetting=limit)
        real = training.write_json
        def at_the_end(path, obj, what): return kill() if 'after' in obj.get('stage', {}) else real(path, obj, what)
        def no_promotion(self, source, name, link=Checkpoints.link): return kill() if source.startswith('candidate') and name.startswith('best') else link(self, source, name)
        with monkeypatch.context() as m:
            if broken == 'link': m.setattr(Checkpoints, 'link', no_promotion)
            else: m.setattr(training, 'write_json', at_the_end)
            with pytest.raises(Killed): teach(max_forgetting=limit, save_dir=str(whole.folder)+'-killed')
        folder = whole.folder.parent/(whole.folder.name + '-killed')
        assert 'after' not in read_json(folder/'run.json', 'run')['stage']
        again = teach(max_forgetting=limit, save_dir=str(folder), resume=True)
        assert again.verdict == whole.verdict and again.after == whole.after and same(weights(again), weights(whole))
        assert (folder/'candidate').exists() == again.refused
        assert teach(max_forgetting=limit, save_dir=str(folder), resume=True).verdict == whole.verdict  # and once more, when all is done


def test_really_killed(home, tmp_path):
    "SIGKILL at three moments of the command; then the same command with --resume"
    def argv(name): return [sys.executable, '-c', 'from continual_llm.cli import main; main()', 'continual-learn', '--model', str(home/'base'), '--data', str(home/'code.txt'), '--domain', 'code',
                            '--max_steps', '60', '--save_every', '5', '--precision', 'fp32', '--cache', str(home/'cache'), '--save_dir', str(tmp_path/name), '--resume', '--quiet']
    env = dict(os.environ, OMP_NUM_THREADS='1')
    assert subprocess.run(argv('whole'), env=env).returncode in (0, 3)
    for steps in (1, 20, 45):
        with subprocess.Popen(argv('killed'), env=env) as p:
            log, until = tmp_path/'killed'/'metrics.jsonl', time.monotonic() + 120
            while p.poll() is None and time.monotonic() < until and not (log.exists() and log.read_bytes().count(b'"kind": "step"') >= steps): time.sleep(.002)
            p.send_signal(signal.SIGKILL)
    assert subprocess.run(argv('killed'), env=env).returncode in (0, 3)
    assert not compare_twins(tmp_path/'whole', tmp_path/'killed').differences
    assert Learned.load(tmp_path/'whole').verdict == Learned.load(tmp_path/'killed').verdict


# ---- killed in the beginning ----

@pytest.mark.parametrize('method', ['naive', 'frozen'])
@pytest.mark.parametrize('at', ['prepare', 'note', 'link', 'end'])
def test_killed_in_the_beginning(teach, monkeypatch, at, method):
    "Killed before the first step, wherever: --resume begins the stage or goes on with it, and ends as one that was never killed"
    whole = teach(method=method)
    folder = str(whole.folder) + '-killed'
    real, seen = training.write_json, []
    def note(path, obj, what):
        seen.append(path)
        if at == 'note' or 'after' in obj.get('stage', {}): kill()
        real(path, obj, what)
    with monkeypatch.context() as m:
        if at == 'prepare': m.setattr(Stage, 'prepare', kill)
        elif at == 'link': m.setattr(Checkpoints, 'link', kill)
        else:
            for place in (training, teaching): m.setattr(place, 'write_json', note, raising=False)
        with pytest.raises(Killed): teach(method=method, save_dir=folder)
    again = teach(method=method, save_dir=folder, resume=True)
    assert again.verdict == whole.verdict and again.after == whole.after and same(weights(again), weights(whole)) and not again.stopped


@pytest.mark.parametrize('n', [2, 4, 5])
def test_killed_while_it_replaces(teach, monkeypatch, n):
    "Half of a run that was to be replaced is never gone on with: begun anew, it ends as any does"
    old = teach()
    left, real = [n], shutil.rmtree
    def few(path, *a, **kw):
        left[0] -= 1
        return kill() if not left[0] else real(path, *a, **kw)
    with monkeypatch.context() as m:
        m.setattr(shutil, 'rmtree', few)
        with pytest.raises(Killed): teach(save_dir=str(old.folder), overwrite=True)
    with pytest.raises(UserError, match='--overwrite'): teach(save_dir=str(old.folder), resume=True)
    assert teach(save_dir=str(old.folder), overwrite=True).after == old.after


# ---- the gate ----

def test_gate(teach, home, tmp_path, capsys):
    "Refused: `best/` is the parent's file, the new model is the candidate, the command exits with 3"
    def command(name, *more):
        with pytest.raises(SystemExit) as stop:
            main(['continual-learn', '--model', str(home/'base'), '--data', str(home/'code.txt'), '--domain', 'code', '--method', 'naive', '--max_steps', '6', '--precision', 'fp32',
                  '--cache', str(home/'cache'), '--save_dir', str(tmp_path/name), *more])
        return stop.value.code, capsys.readouterr().out
    code, said = command('refused', '--max_forgetting', '0')
    assert code == 3 and 'NOT promoted: base takes' in said
    assert 'nearest that would pass' in said or 'No mixture' in said
    refused = Learned.load(tmp_path/'refused')
    assert refused.refused and refused.verdict.domain == 'base' and refused.verdict.change > 0
    assert (tmp_path/'refused'/'best'/'checkpoint.pt').read_bytes() == (home/'base'/'best'/'checkpoint.pt').read_bytes()
    assert not same(weights(refused, 'candidate/checkpoint.pt'), weights(refused))
    code, said = command('passed', '--max_forgetting', 'inf')
    assert code == 0 and 'Promoted' in said and not (tmp_path/'passed'/'candidate').exists()
    assert same(weights(Learned.load(tmp_path/'passed')), weights(refused, 'candidate/checkpoint.pt'))


@shows(continual_learn, 'retry', 'max_forgetting')
def test_retry(teach, home):
    "What passes is on the line from the parent to the candidate, as far along it as the limit allows; where that keeps too little, more old text is tried"
    plain = teach(max_steps=20)
    limit = plain.verdict.change/2
    assert teach(max_steps=20, max_forgetting=limit).refused
    found = teach(max_steps=20, max_forgetting=limit, retry=True)
    assert not found.refused and limit/3 < found.verdict.change <= limit
    assert found.after['code'].bits_per_byte < found.before['code'].bits_per_byte
    told = History()
    told.restore(dict(records=[json.loads(line) for line in (found.folder/'metrics.jsonl').read_text().splitlines()]))
    assert f"Best model: {found.how} with validation loss {found.after['code'].loss:.4f}" in done_lines(told.records[-1], told)
    judged = teach(max_steps=20, max_forgetting=limit, retry=True, val_data=str(home/'code.txt'))  # by a text of its own, which chose the weights too
    last = json.loads((judged.folder/'metrics.jsonl').read_text().splitlines()[-1])
    assert judged.how and last['chosen_by'] == 'code.txt' and 'chosen_by' not in told.records[-1]
    if found.how.startswith('alpha'):
        a, old, new = float(found.how.split()[1]), weights(teach(method='frozen')), weights(plain)
        for k in old: torch.testing.assert_close(weights(found)[k], old[k] + a*(new[k] - old[k]), atol=1e-3, rtol=1e-3)
    strict = teach(max_steps=20, max_forgetting=plain.verdict.change/50, retry=True)
    assert strict.refused or strict.how
    assert (strict.folder/'retry').exists()


def test_stopped_while_it_tries_again(teach, monkeypatch):
    "A trial of `retry` that is stopped is judged by nobody: the stage is stopped too, and goes on with the trial; a trial tries nothing itself"
    def strict(**more): return teach(max_steps=20, max_forgetting=1e-4, retry=True, **more)
    def stopped(job, *a, **kw): return carry_out(replace(job, loop=replace(job.loop, max_time=1e-9)) if job.folder.parent.name == 'retry' else job, *a, **kw)
    monkeypatch.setattr(teaching, 'KEEP', math.inf)  # no mixture is good enough
    whole = strict()
    with monkeypatch.context() as m:
        m.setattr(teaching, 'carry_out', stopped)
        left = strict()
    assert left.stopped == 'max_time' and left.verdict is None
    again = strict(save_dir=str(left.folder), resume=True)
    assert again.verdict == whole.verdict and again.how == whole.how and same(weights(again), weights(whole))
    tried = [read_json(p, 'run')['stage'] for p in sorted(whole.folder.glob('retry/*/run.json'))]
    assert len(tried) == 3 and [t['how'] for t in tried] == ['']*3 and not list(whole.folder.glob('retry/*/retry'))


def test_a_trial_that_passes(teach, monkeypatch):
    "What is promoted, and said of it, is the trial's own"
    plain, limit = teach(max_steps=20), 0.
    more = teach(max_steps=20, method='replay', replay=.5)
    limit = (plain.verdict.change + more.verdict.change)/2
    monkeypatch.setattr(teaching, 'KEEP', math.inf)
    monkeypatch.setattr(teaching, '_stronger', lambda share: [.5])
    found = teach(max_steps=20, max_forgetting=limit, retry=True)
    assert found.how == 'replay 0.5' and not found.refused
    assert found.after == more.after and same(weights(found), weights(more, more_file(more)))
    assert load_checkpoint(found.folder)['val_loss'] == pytest.approx(found.after['code'].loss)


def test_the_best_of_what_passes(teach, monkeypatch):
    "Where no trial passes by itself, a mixture is promoted: of the trial, if that keeps more than one of the first candidate"
    plain, more = teach(max_steps=20), teach(max_steps=20, method='replay', replay=.5)
    limit = dict(max_steps=20, max_forgetting=more.verdict.change/2, retry=True)
    assert more.verdict.change < plain.verdict.change/2
    monkeypatch.setattr(teaching, 'KEEP', math.inf)
    monkeypatch.setattr(teaching, '_stronger', lambda share: [])
    first = teach(**limit)
    monkeypatch.setattr(teaching, '_stronger', lambda share: [.5])
    best = teach(**limit)
    assert first.how.startswith('alpha') and best.how.startswith('replay 0.5, alpha') and not first.refused and not best.refused
    assert best.after['code'].bits_per_byte < first.after['code'].bits_per_byte
    start, new, share = weights(teach(method='frozen')), weights(more, more_file(more)), load_checkpoint(best.folder)['alpha']
    for k, w in weights(best).items(): torch.testing.assert_close(w, start[k] + share*(new[k] - start[k]))


def more_file(stage): return f"{'candidate' if stage.refused else 'best'}/checkpoint.pt"


def test_refused_and_judged_again(teach):
    "A refused stage that is resumed with a wider limit, or with `retry`, is judged again; nothing is trained again"
    refused = teach(max_forgetting=0.)
    again = dict(save_dir=str(refused.folder), resume=True)
    learned, steps = weights(refused, 'candidate/checkpoint.pt'), len(rows(refused, 'step'))
    mixed = teach(max_forgetting=refused.verdict.change/2, **again)
    assert mixed.refused and mixed.verdict.limit == refused.verdict.change/2 and same(weights(mixed, 'candidate/checkpoint.pt'), learned)
    wide = teach(max_forgetting=2*refused.verdict.change, **again)
    assert not wide.refused and same(weights(wide), learned) and len(rows(wide, 'step')) == steps
    assert not teach(max_forgetting=0., **again).refused  # what was promoted stays
    second = teach(max_forgetting=refused.verdict.change/2)
    found = teach(max_forgetting=refused.verdict.change/2, retry=True, save_dir=str(second.folder), resume=True)
    assert not found.refused and found.how


@pytest.mark.parametrize('given', [dict(method='lora'), dict(method='lora+interpolate'), dict(method='lora', retry=True, max_forgetting=.001), dict(method='lora', retry=True, max_forgetting=.001, keep=math.inf)])
def test_the_adapter_is_what_was_promoted(teach, home, monkeypatch, given):
    "The additions by themselves, put on the parent, are the model that the stage ends with, mixed or tried again"
    monkeypatch.setattr(teaching, 'KEEP', given.pop('keep', teaching.KEEP))
    monkeypatch.setattr(teaching, '_stronger', lambda share: [.2])
    stage = teach(rank=2, max_steps=15, learning_rate=.03, **given)
    put_on = merge_lora(load_adapter(load_model(home/'base')[0], stage.folder/'adapter')).state_dict()
    for k, w in weights(stage, more_file(stage)).items(): torch.testing.assert_close(put_on[k], w, atol=1e-5, rtol=1e-4)


def test_two_processes(home, tmp_path):
    "Two that train together refuse, try again and tell as one does"
    def argv(name): return [sys.executable, '-c', 'from continual_llm import continual; continual.KEEP = 9.; from continual_llm.cli import main; main()', 'continual-learn', '--model', str(home/'base'),
                            '--data', str(home/'code.txt'), '--domain', 'code', '--max_steps', '6', '--precision', 'fp32', '--cache', str(home/'cache'), '--save_dir', str(tmp_path/name), '--device', 'cpu',
                            '--max_forgetting', '0.0001', '--retry', '--deterministic', '--grad_accumulation', '2', '--quiet']
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = dict(os.environ, OMP_NUM_THREADS='1')
    one = subprocess.run(argv('one'), env=env, timeout=300)
    both = [subprocess.Popen(argv('two'), env=dict(env, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)) for r in range(2)]
    try: codes = [p.wait(300) for p in both]
    finally: [p.kill() for p in both]
    assert codes == [one.returncode]*2
    assert Learned.load(tmp_path/'two').verdict == Learned.load(tmp_path/'one').verdict and same(weights(Learned.load(tmp_path/'two')), weights(Learned.load(tmp_path/'one')))
    for trial in (tmp_path/'one').glob('retry/*'): assert not compare_twins(trial, tmp_path/'two'/'retry'/trial.name).differences


# ---- options ----

@shows(continual_learn, 'model', 'data', 'domain', 'save_dir', 'tokenizer')
def test_where(home, teach, tmp_path, monkeypatch):
    stage = teach()
    assert sorted(stage.after) == ['base', 'code'] and [d.name for d in domains(stage.folder/'memory')] == ['base', 'code']
    assert set(teach(domain='python').after) == {'base', 'python'}
    shutil.copytree(home/'base', tmp_path/'mine')
    assert teach(model=str(tmp_path/'mine'), save_dir=None).folder == tmp_path/'mine-code'
    assert teach(data=str(home/'few.txt')).before['code'].bytes < stage.before['code'].bytes
    train_tokenizer(home/'code.txt', vocab_size=290, save=tmp_path/'other')
    with pytest.raises(UserError, match='was trained with'): teach(tokenizer=str(tmp_path/'other'))
    shutil.rmtree(tmp_path/'mine'/'tokenizer')
    assert same(weights(teach(model=str(tmp_path/'mine'), tokenizer=str(home/'tok'))), weights(stage))


@shows(continual_learn, 'method', 'strength', 'distill', 'rank')
def test_methods(teach):
    "Each changes what is learned; a stronger pull stays nearer"
    def moved(**given): return sum(float((w - start[k]).square().sum()) for k, w in weights(teach(**given)).items())
    start = weights(teach(method='frozen'))
    naive = moved()
    assert moved(method='frozen') == 0 < naive
    for method in ('l2', 'ewc'):
        weak, strong = moved(method=method, strength=.001), moved(method=method, strength=1000.)
        assert strong < weak and strong < .9*naive, method
        assert same(weights(teach(method=method)), weights(teach(method=method, strength=teaching.PULL[method])))  # unless one is given
        assert read_json(teach(method=method).folder/'run.json', 'run')['settings']['strength'] == teaching.PULL[method]
    assert len({naive, moved(method='distill', distill=.2), moved(method='distill', distill=.9), moved(method='self'), moved(method='replay')}) == 5
    assert moved(method='lora', rank=1) != moved(method='lora', rank=4)
    stage = teach(method='lora', rank=2)
    assert sorted(p.name for p in (stage.folder/'adapter').iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
    assert set(weights(stage)) == set(start)  # plain weights, whatever the method


def test_whom_the_old_model_teaches(teach, monkeypatch):
    "Every block where there are none but new ones, the old ones alone where there are some; compiled or not"
    asked, mixed = [], distill.mixed_nats
    def counted(hidden, *more): return asked.append(len(hidden)) or mixed(hidden, *more)
    monkeypatch.setattr(distill, 'mixed_nats', counted)
    plain = teach(method='distill', max_steps=4)
    blocks = rows(plain, 'step')[0]['tokens']//16
    assert asked == [blocks]*4
    asked.clear()
    both = teach(method='replay+distill', replay=.25, max_steps=8)
    assert sum(asked) == 8*blocks//4 and max(asked) < blocks
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, **how: compiled.append(f.__name__) or f if callable(f) and not isinstance(f, torch.nn.Module) else f)
    assert same(weights(teach(method='replay+distill', replay=.25, max_steps=8, compile=True)), weights(both)) and 'hidden' in compiled


@shows(continual_learn, 'old_data')
def test_joint(teach, home):
    "Fresh weights, all texts, the steps of all stages: 30 of the base and 6 of this one"
    stage = teach(method='joint', old_data=str(home/'text.txt'))
    assert len(rows(stage, 'step')) == 36 and rows(stage, 'step')[0]['loss'] > .9*math.log(300)
    assert stage.after['code'].bits_per_byte < stage.before['code'].bits_per_byte
    naive = teach(max_steps=36)
    assert stage.after['base'].bits_per_byte < naive.after['base'].bits_per_byte
    with pytest.raises(UserError, match='do not go together'): teach(method='joint')
    with pytest.raises(UserError, match='do not go together'): teach(method='naive', old_data=str(home/'text.txt'))


def test_interpolate(teach):
    "Weights on the line between the two, no worse on the mean over all domains than the new ones"
    def mean(stage): return sum(s.bits_per_byte for s in stage.after.values())
    mixed, naive, frozen = teach(method='interpolate'), teach(), teach(method='frozen')
    share, old, new = float(mixed.how.split()[1]) if mixed.how else 1., weights(frozen), weights(naive)
    for k in old: torch.testing.assert_close(weights(mixed)[k], old[k] + share*(new[k] - old[k]))
    assert mean(mixed) <= mean(naive)


@shows(continual_learn, 'replay')
def test_replay(teach):
    "The share of old blocks: more steps an epoch, fewer bits lost"
    few, many = [teach(method='replay', replay=r, epochs=1, max_steps=0) for r in (.05, .5)]
    assert len(rows(many, 'step')) > 1.8*len(rows(few, 'step'))
    assert many.verdict.change < few.verdict.change


@shows(continual_learn, 'val_data', 'val_split', 'field', 'cache')
def test_texts(teach, home, tmp_path):
    half, tenth = teach(val_split=.5), teach()
    assert half.before['code'].bytes > 3*tenth.before['code'].bytes
    given = teach(val_data=str(home/'few.txt'))
    assert given.before['code'].bytes == (home/'few.txt').stat().st_size
    text, body = [teach(data=str(home/'records.jsonl'), field=f) for f in ('text', 'body')]
    assert text.before['code'].bits_per_byte > body.before['code'].bits_per_byte
    teach(cache=str(tmp_path/'elsewhere'))
    assert list((tmp_path/'elsewhere').glob('*.tokens'))


@shows(continual_learn, 'epochs', 'batch_size', 'grad_accumulation', 'max_steps', 'eval_every', 'eval_tokens')
def test_sizes(teach, home):
    one, two = teach(max_steps=0, epochs=1), teach(max_steps=0, epochs=2)
    assert len(rows(two, 'step')) == 2*len(rows(one, 'step')) and len(rows(two, 'eval')) == 2
    assert len(rows(teach(max_steps=3), 'step')) == 3
    tokens = {b: rows(teach(batch_size=b, grad_accumulation=a), 'step')[0]['tokens'] for b, a in ((2, 1), (4, 3))}
    assert tokens == {2: 2*16, 4: 12*16}
    assert rows(teach(), 'step')[0]['tokens'] == 4*16  # the parent's
    assert len(rows(teach(eval_every=2), 'eval')) == 3
    assert rows(teach(eval_tokens=50), 'eval')[0]['tokens'] == 50


@shows(continual_learn, 'learning_rate', 'warmup_steps', 'schedule')
def test_rates(teach):
    "What is not given is the parent's, and the rise begins where the parent ended: at a tenth of its peak"
    assert column(teach(warmup_steps=3), 'step', 'lr')[:4] == pytest.approx([.001 + .009*i/4 for i in (1, 2, 3)] + [.01])
    assert column(teach(warmup_steps=0, learning_rate=.002), 'step', 'lr')[0] == .002
    assert column(teach(warmup_steps=1, schedule='wsd', max_steps=10), 'step', 'lr')[1:8] == [.01]*7


@shows(continual_learn, 'recompute', 'max_memory')
def test_less_memory(teach, monkeypatch):
    "The same numbers from layers computed again; fewer blocks at once where memory is bounded, fewer still where a method holds more beside the model; a resumed stage keeps its own"
    plain, calls, real = weights(teach(method='replay')), [], Block.forward
    monkeypatch.setattr(Block, 'forward', lambda self, *a, **kw: calls.append(self.training) or real(self, *a, **kw))
    assert same(weights(teach(method='replay', recompute=True)), plain) and sum(calls) == 6*2*SHAPE['n_layers']
    monkeypatch.setattr('psutil.Process.memory_info', lambda self: SimpleNamespace(rss=3e8))
    shape = ModelConfig(**SHAPE, vocab_size=300)
    bound = SPARE*run_bytes(shape, 8, 3e8, precision='fp32')/1e9 + 1e-9
    def size(stage): return [read_json(stage.folder/'run.json', 'run')['settings'][k] for k in ('batch_size', 'blocks_per_step')]
    naive, beside = [teach(method=method, batch_size=8, max_memory=bound, max_time=1e-9) for method in ('naive', 'ewc')]
    assert size(naive) == [8, 8] and size(beside) == [4, 8]
    monkeypatch.setattr('psutil.Process.memory_info', lambda self: SimpleNamespace(rss=9e9))
    again = teach(method='ewc', batch_size=8, max_memory=bound, resume=True, save_dir=str(beside.folder))
    assert not again.stopped and size(again) == [4, 8]
    with pytest.raises(UserError, match='max_memory=0.3'): teach(max_memory=.3)
    with pytest.raises(UserError, match='max_memory=2 cannot be kept with compile'): teach(max_memory=2, compile=True)
    assert teach(method='frozen', max_memory=.3).verdict.passed  # which trains nothing


@shows(continual_learn, 'dropout', 'optimizer', 'weight_decay', 'max_grad_norm', 'seed', 'spike', 'precision', 'deterministic', 'compile')
def test_how_a_step_is_made(teach, monkeypatch):
    "Each goes where `pretrain` puts it, which has tests of its own for what it does there"
    plain = weights(teach())
    for given in (dict(dropout=.5), dict(optimizer='muon'), dict(weight_decay=5.), dict(max_grad_norm=1e-10), dict(seed=1), dict(precision='bf16')):
        assert not same(plain, weights(teach(**given))), given
    settings = read_json(teach(spike=3., deterministic=True).folder/'run.json', 'run')['settings']
    assert (settings['spike'], settings['deterministic']) == (3., True)
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, **how: compiled.append(f) or f)
    assert same(weights(teach(compile=True)), plain) and len(compiled) >= 2


@shows(continual_learn, 'early_stopping_patience')
def test_patience(teach):
    "With a rate that ruins the model every evaluation after the first is worse"
    assert len(rows(teach(learning_rate=5., max_steps=20, eval_every=2, early_stopping_patience=2, spike=0., weight_decay=0.), 'eval')) < 10
    assert len(rows(teach(learning_rate=5., max_steps=20, eval_every=2, early_stopping_patience=0, spike=0., weight_decay=0.), 'eval')) == 10


@shows(continual_learn, 'memory')
def test_memory(teach):
    kept, none = teach(memory=.5), teach(memory=0.)
    assert domains(none.folder/'memory')[1].replay is None and len(domains(kept.folder/'memory')[1].replay) > 100
    with pytest.raises(UserError, match='no text was kept'): teach(model=str(none.folder), domain='third', method='replay')
    assert teach(model=str(none.folder), domain='third', method='self').after.keys() == {'base', 'code', 'third'}


@shows(continual_learn, 'extend')
def test_extend(teach, home):
    "New pieces behind the old ones; old domains are held against the model as it was; a refused stage and a resumed one still fit their tokenizer"
    plain, grown = teach(), teach(extend=20)
    assert len(plain.tokenizer) == 300 < len(grown.tokenizer) <= 320
    assert grown.before['base'] == plain.before['base'] and grown.after['code'].tokens < plain.after['code'].tokens
    assert grown.before['code'].bytes == plain.before['code'].bytes
    refused = teach(extend=20, max_forgetting=0.)
    assert refused.refused and len(refused.tokenizer) == len(grown.tokenizer) == refused.model.config.vocab_size
    old, new = weights(teach(method='frozen')), weights(refused)
    assert torch.equal(new['embed.weight'][:300], old['embed.weight'])
    left = teach(extend=20, max_time=1e-9)
    again = teach(extend=20, save_dir=str(left.folder), resume=True)
    assert again.after == grown.after and same(weights(again), weights(grown))
    third = teach(model=str(grown.folder), domain='third', data=str(home/'few.txt'), extend=5, method='replay')
    assert sorted(third.after) == ['base', 'code', 'third'] and len(third.tokenizer) >= len(grown.tokenizer)
    with pytest.raises(UserError, match='never be learned'): teach(extend=20, method='lora')


@shows(continual_learn, 'max_time', 'keep_epochs', 'save_every', 'resume', 'overwrite', 'quiet', 'device')
def test_as_a_run(teach, capsys, monkeypatch):
    assert teach(max_time=1e-9).stopped == 'max_time'
    stage = teach(epochs=3, max_steps=0, keep_epochs=1, save_every=3)
    assert sorted(p.name for p in stage.folder.glob('epoch_*')) == ['epoch_3']
    with pytest.raises(UserError, match='already holds a run'): teach(save_dir=str(stage.folder))
    assert teach(save_dir=str(stage.folder), epochs=3, max_steps=0, keep_epochs=1, resume=True).after == stage.after
    assert teach(save_dir=str(stage.folder), overwrite=True, max_steps=2).folder == stage.folder and len(rows(stage, 'step')) == 2
    capsys.readouterr()
    teach()
    assert not capsys.readouterr().out
    teach(quiet=False)
    assert 'What this did to every domain' in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='cuda'): teach(device='cuda')


@shows(continual_learn, 'panel', 'actions')
def test_taking_part(teach, monkeypatch):
    "What somebody pressed while a stage trained is on its record, and another stage does it again"
    class Hand:
        def __init__(self, controls): self.controls = controls
        def __call__(self, record, history):
            if record['kind'] == 'step' and record['step'] == 1: self.controls.ask('rate', factor=.5)
    monkeypatch.setattr('continual_llm.train.open_panel', Hand)
    touched, plain = teach(panel=True, quiet=False, max_steps=4), teach(max_steps=4)
    again = teach(actions=str(touched.folder), max_steps=4)
    done = [dict(step=2, action='rate', factor=.5)]
    assert [read_json(stage.folder/'run.json', 'run').get('actions') for stage in (touched, plain, again)] == [done, None, done]
    assert [a['lr']/b['lr'] for a, b in zip(rows(touched, 'step'), rows(plain, 'step'))] == [1, 1, .5, .5] and again.after == touched.after != plain.after
    with pytest.raises(UserError, match='takes no step'): teach(method='frozen', actions=done)
    with pytest.raises(UserError, match='leave one of them out'): teach(panel=True)


def test_every_option_is_shown():
    "A new option needs a test above that shows what it does"
    assert set(SHOWN[continual_learn]) == options(continual_learn)


# ---- a story ----

def test_three_domains(teach, home, tmp_path, capsys):
    "Two stages after a base: memories add up, the matrix is that of the stages, any stage can be loaded, and the tree is told"
    (tmp_path/'numbers.txt').write_text(''.join(f'{i} plus {i} is {2*i} .\n\n' for i in range(400)))
    code = teach(method='replay')
    both = teach(model=str(code.folder), data=str(tmp_path/'numbers.txt'), domain='numbers', method='replay')
    assert [d.name for d in domains(both.folder/'memory')] == ['base', 'code', 'numbers']
    names, R = matrix(both.folder)
    assert names == ['base', 'code', 'numbers'] and [len(row) for row in R] == [2, 3, 3]
    assert R[1][0] == code.after['base'].bits_per_byte and R[2] == [both.after[n].bits_per_byte for n in names]
    with pytest.raises(SystemExit) as stop: main(['history', str(both.folder)])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and [w in said for w in ('code by replay', 'numbers by replay', '└──')] == [True]*3
    assert read_json(both.folder/'run.json', 'run')['stage']['parent']['folder'] == os.path.relpath(code.folder, both.folder)


def test_branch(teach, home, tmp_path):
    "A stage can begin before the descent of its parent's rate"
    base = pretrain(str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), save_dir=str(tmp_path/'wsd'), schedule='wsd', **BASE)
    stage = teach(model=str(base.folder/'branch'/'checkpoint.pt'))
    assert load_checkpoint(base.folder/'branch'/'checkpoint.pt')['step'] == 24
    assert stage.before['base'].bits_per_byte > teach(model=str(base.folder)).before['base'].bits_per_byte


# ---- bad input ----

@pytest.mark.parametrize('bad, line', [
    (dict(domain='base'), 'is known to'), (dict(domain=''), 'cannot name a domain'), (dict(domain='a/b'), 'cannot name a domain'), (dict(data='empty.txt'), 'empty'),
    (dict(data='none.txt'), 'no file at'), (dict(method='rehearsal'), "there is no 'rehearsal'"), (dict(method='naive+replay'), 'goes with no other'), (dict(method='replay', replay=1.), 'replay=1.0'),
    (dict(method='replay', replay=-.1), 'replay=-0.1'), (dict(method='replay', replay=math.nan), 'replay=nan'), (dict(replay=.1), 'does nothing'), (dict(strength=2.), 'does nothing'),
    (dict(method='l2', strength=0.), 'strength=0'), (dict(method='lora', rank=0), 'rank=0'), (dict(method='distill', distill=2.), 'distill=2'), (dict(max_forgetting=-.1), 'max_forgetting=-0.1'),
    (dict(max_forgetting=math.nan), 'max_forgetting=nan'), (dict(memory=2.), 'memory=2'), (dict(model='bare'), 'continual-llm remember --model'), (dict(model='nowhere'), 'no checkpoint at'),
    (dict(method='frozen', retry=True), 'retry does nothing'), (dict(val_data='code.txt', val_split=.1), 'both name validation text'), (dict(epochs=0), 'epochs=0'), (dict(retry=1), 'retry=1'), (dict(method='lora+l2'), 'nothing to pull back'), (dict(method='ewc+l2'), 'leave one of them out'), (dict(schedule='step'), 'step')])
def test_bad_input(teach, home, tmp_path, bad, line):
    "One line, and nothing is written"
    (home/'empty.txt').write_text('')
    if not (home/'bare').exists():
        shutil.copytree(home/'base', home/'bare')
        shutil.rmtree(home/'bare'/'memory')
    before = sorted((p, p.stat().st_mtime_ns) for p in home.rglob('*') if 'cache' not in p.parts)
    given = {k: str(home/v) if k in ('data', 'model', 'val_data') else v for k, v in bad.items()}
    with pytest.raises(UserError, match=line): teach(**given, save_dir=str(tmp_path/'bad'))
    assert not (tmp_path/'bad').exists()
    assert sorted((p, p.stat().st_mtime_ns) for p in home.rglob('*') if 'cache' not in p.parts) == before


def test_the_text_of_a_stage_changes(teach, home, tmp_path):
    "A resumed stage refuses another text, another parent and another method"
    shutil.copy(home/'code.txt', tmp_path/'mine.txt')
    stage = teach(data=str(tmp_path/'mine.txt'), max_time=1e-9)
    again = dict(save_dir=str(stage.folder), resume=True)
    with pytest.raises(UserError, match='method was'): teach(data=str(tmp_path/'mine.txt'), method='replay', **again)
    with open(tmp_path/'mine.txt', 'a') as f: f.write('one more\n')
    with pytest.raises(UserError, match='training text is not the one'): teach(data=str(tmp_path/'mine.txt'), **again)


def test_the_parent_is_not_written_over(teach, home, tmp_path):
    "Under whatever name its folder is given"
    shutil.copytree(home/'base', tmp_path/'mine')
    (tmp_path/'link').symlink_to(tmp_path/'mine')
    for name in ('mine', 'link', 'mine/../mine'):
        with pytest.raises(UserError, match="the parent's own folder"): teach(model=str(tmp_path/'mine'), save_dir=str(tmp_path/name), overwrite=True)
    assert (tmp_path/'mine'/'best'/'checkpoint.pt').exists()


def test_ewc_without_old_text(teach, tmp_path):
    "is refused before anything is written"
    none = teach(memory=0.)
    with pytest.raises(UserError, match='no text was kept'): teach(model=str(none.folder), domain='third', method='ewc', save_dir=str(tmp_path/'third'))
    assert not (tmp_path/'third').exists()


def test_odd_lineages(teach, home, tmp_path):
    "A stage that took its parent's name, one whose parent was replaced, a neighbour that cannot be read, a parent that was stopped"
    shutil.copytree(home/'base', tmp_path/'base')
    stage = teach(model=str(tmp_path/'base'), save_dir=str(tmp_path/'base-code'))
    (tmp_path/'odd').mkdir()
    (tmp_path/'odd'/'run.json').write_text('{"not": "ours"')
    assert len(history(stage.folder).splitlines()) == 2
    with pytest.raises(UserError, match='odd'): history(tmp_path)
    shutil.rmtree(tmp_path/'base')
    stage.folder.rename(tmp_path/'base')
    assert history(tmp_path/'base').startswith('base: code by naive')
    with pytest.raises(UserError, match='not there any more'): matrix(tmp_path/'base')


def test_names_in_a_matrix(teach, home, tmp_path):
    "are those of the domains that were scored, also where the base was stopped, or was given its memory later"
    stopped = pretrain(str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), domain='talk', save_dir=str(tmp_path/'talk'), **BASE)
    record = read_json(stopped.folder/'run.json', 'run')
    write_json(stopped.folder/'run.json', {k: v for k, v in record.items() if k not in ('stage', 'result')} | dict(status='SIGTERM'), 'run')
    assert matrix(teach(model=str(stopped.folder)).folder)[0] == ['talk', 'code'] and history(stopped.folder).startswith('talk: talk by pretrain')
    shutil.copytree(home/'base', tmp_path/'bare')
    shutil.rmtree(tmp_path/'bare'/'memory')
    remember_domain(str(tmp_path/'bare'), str(home/'text.txt'), 'speech', cache=str(home/'cache'))
    names, R = matrix(teach(model=str(tmp_path/'bare')).folder)
    assert names == ['speech', 'code'] and [len(row) for row in R] == [2, 2]


def test_remember(home, tmp_path, capsys):
    shutil.copytree(home/'base', tmp_path/'bare')
    shutil.rmtree(tmp_path/'bare'/'memory')
    with pytest.raises(SystemExit) as stop: main(['remember', '--model', str(tmp_path/'bare'), '--domain', 'base', '--data', str(home/'text.txt'), '--cache', str(home/'cache')])
    assert stop.value.code == 0
    mine, theirs = [domains(r/'memory')[0] for r in (tmp_path/'bare', home/'base')]
    assert (mine.replay.checksum, mine.val.checksum) == (theirs.replay.checksum, theirs.val.checksum)
    with pytest.raises(UserError, match='choose another name'): remember_domain(str(tmp_path/'bare'), str(home/'code.txt'), 'base', cache=str(home/'cache'))
