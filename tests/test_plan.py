"What `lr_find` and `plan` say is of the job that `pretrain` would carry out, and neither leaves anything behind"
import json, math, os
from pathlib import Path
import pytest
import torch
from continual_llm import distill, lr_find as finding, plan as planning
from continual_llm.cli import main
from continual_llm.core import UserError
from continual_llm.footprint import run_bytes
from continual_llm.lr_find import lr_find
from continual_llm.model import model_config
from continual_llm.plan import plan
from continual_llm.teachers import load_teachers
from continual_llm.train import pretrain
from tests.test_options import SHOWN, home, options, shows

pytestmark = pytest.mark.filterwarnings('ignore:the text passes max_seq_len')


@pytest.fixture
def same(home, tmp_path):
    "A job of a model that takes no time"
    return dict(data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), batch_size=4, grad_accumulation=2, precision='fp32', device='cpu', cache=str(home/'cache'), quiet=True)


def flags(given): return [f'--{k}' if v is True else f'--{k}={v}' for k, v in given.items()]


@shows(lr_find, 'data', 'start', 'end', 'steps')
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_range_test_is_the_beginning_of_a_run(same, optimizer, tmp_path):
    "At a rate that hardly rises its losses are those of the run with this rate, to the last figure"
    found = lr_find(**same, optimizer=optimizer, start=.01, end=.010000001, steps=12)
    run = pretrain(**same, optimizer=optimizer, learning_rate=.01, warmup_steps=0, schedule='wsd', max_steps=12, epochs=9, save_dir=str(tmp_path/'run'), spike=0)
    assert len(found.losses) == 12 and found.losses[:9] == pytest.approx(run.history.column('step', 'loss')[:9], rel=1e-5)
    assert found.losses[0] == run.history.column('step', 'loss')[0]
    assert found.rates[0] == .01 and found.rates[-1] == pytest.approx(.010000001, rel=1e-9) and found.optimizer == optimizer


@shows(lr_find, 'smoothing')
def test_smoothing(same):
    plain, smooth = lr_find(**same, steps=30, smoothing=0.), lr_find(**same, steps=30, smoothing=.5)
    assert plain.means == plain.losses and smooth.losses[:len(plain.losses)] == plain.losses[:len(smooth.losses)]
    assert smooth.means[2] == pytest.approx((4*smooth.losses[2] + 2*smooth.losses[1] + smooth.losses[0])/7)


@shows(lr_find, 'figure', 'quiet')
def test_the_command_prints_and_draws(same, tmp_path, capsys):
    "The table on stdout, a PNG where asked, and no other file; the same numbers as from Python"
    given = {k: v for k, v in same.items() if k != 'quiet'}
    with pytest.raises(SystemExit) as e: main(['lr-find', *flags(given), '--steps=20', f"--figure={tmp_path/'rates.png'}"])
    said, found = capsys.readouterr().out, lr_find(**same, steps=20)
    assert not e.value.code and str(found) in said and said.startswith('Training adamw for at most 20 steps of 128 tokens') and capsys.readouterr().out == ''
    assert os.listdir(tmp_path) == ['rates.png'] and (tmp_path/'rates.png').read_bytes().startswith(b'\x89PNG')
    assert '\n' not in repr(found) and finding.in_words(found) == found.plot().alt


def test_a_loss_that_is_no_number_ends_it(same, monkeypatch):
    real = finding.take_step
    def step(model, opt, parts, loop, i, **how): return {**real(model, opt, parts, loop, i, **how), **(dict(loss=math.nan, wrong='its loss is nan') if i == 5 else {})}
    monkeypatch.setattr(finding, 'take_step', step)
    found = lr_find(**same, steps=20)
    assert found.over == 'its loss is nan' and len(found.rates) == len(found.means) == 5 and all(map(math.isfinite, found.suggestions.values()))
    monkeypatch.setattr(finding, 'take_step', lambda *a, **how: dict(loss=math.nan, wrong='its loss is nan'))
    with pytest.raises(UserError, match='give a lower start'): lr_find(**same)


def test_want_of_memory_is_one_line(same, monkeypatch):
    def step(*a, **how): raise finding.OutOfMemory
    for module, act in ((finding, lr_find), (planning, plan)):
        monkeypatch.setattr(module, 'take_step', step)
        with pytest.raises(UserError, match='^out of memory.*smaller --batch_size'): act(**same)


@pytest.mark.parametrize('act', [lr_find, plan])
def test_threads_and_algorithms_are_as_before(same, act, monkeypatch):
    seen = []
    for module in (finding, planning):
        def watched(*a, real=module.take_step, **how): return seen.append(torch.are_deterministic_algorithms_enabled()) or real(*a, **how)
        monkeypatch.setattr(module, 'take_step', watched)
    act(**same, deterministic=True, **dict(steps=10) if act is lr_find else dict(seconds=.01))
    assert all(seen) and seen and not torch.are_deterministic_algorithms_enabled()


@shows(plan, 'data', 'hours')
def test_hours_bound_the_epochs(same, monkeypatch, tmp_path):
    "At a made-up pace: as many epochs as fit, by hand"
    pace = planning.Pace(0., 1000., math.inf, 0., 0., 0., 1e8, 5)
    monkeypatch.setattr(planning, 'measure', lambda job, *a: pace)
    whole = plan(**same, save_dir=str(tmp_path/'run'), epochs=10)
    per_epoch = whole.n_tokens//16*16/1000  # blocks of 16 tokens
    assert whole.seconds == pytest.approx(10*per_epoch) and whole.epoch_seconds == pytest.approx(per_epoch) and whole.steps == 10*math.ceil(whole.n_tokens//16/8)
    free = plan(**same, save_dir=str(tmp_path/'run'))
    fit = plan(**same, hours=2.5*per_epoch/3600, save_dir=str(tmp_path/'run'))
    assert free.epochs == planning.recipe_options(free.recipe)['epochs'] > 2 == fit.epochs and fit.notes and '--epochs 2' in fit.command
    assert plan(**same, recipe='plain', save_dir=str(tmp_path/'run')).epochs == planning.suggest_epochs(free.n_tokens, free.n_params)
    half = plan(**same, hours=.5*per_epoch/3600, save_dir=str(tmp_path/'run'))
    assert half.epochs == 1 and half.steps == int(.5*per_epoch*1000//128) and f'--max_steps {half.steps}' in half.command
    assert 'does not fit' in plan(**same, hours=per_epoch/3600, epochs=10, save_dir=str(tmp_path/'run')).notes[0]
    assert os.listdir(tmp_path) == []


@shows(plan, 'seconds', 'quiet')
def test_seconds_are_spent_on_steps(same, tmp_path, monkeypatch, capsys):
    more = dict(same, quiet=False, save_dir=str(tmp_path/'run'))
    few = plan(**more, seconds=1e-6)
    assert few.pace.steps == 1 and 'Measuring' in capsys.readouterr().out
    monkeypatch.setattr(planning, 'MOST_STEPS', 5)
    assert plan(**{**more, 'quiet': True}, seconds=600.).pace.steps == 5 and capsys.readouterr().out == '' and os.listdir(tmp_path) == []


def test_a_plan_is_of_the_job_that_is_asked_for(same, home, tmp_path, capsys):
    "The command that it prints, typed: as many steps, as many tokens, and as many bytes on the disk"
    more = dict(same, val_data=str(home/'few.txt'), save_dir=str(tmp_path/'run'), epochs=2, optimizer='muon')
    del more['quiet']
    with pytest.raises(SystemExit): main(['plan', *flags(more), '--seconds=.05'])
    command = capsys.readouterr().out.splitlines()[-1].split()
    found = plan(**more, seconds=.05, quiet=True)
    assert found.command.split() == command and command[:2] == ['continual-llm', 'pretrain']
    with pytest.raises(SystemExit) as e: main(command[1:])
    assert not e.value.code
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert record['result']['step'] == found.steps and record['settings']['optimizer'] == 'muon'
    files = {p.stat().st_ino: p.stat().st_size for p in (tmp_path/'run').rglob('*.pt')}
    assert .7*sum(files.values()) <= found.disk <= sum(files.values())
    numbers = sum(t.numel() for t in torch.load(tmp_path/'run'/'best'/'checkpoint.pt')['model_state_dict'].values())
    assert found.n_params == numbers and found.n_bytes == (home/'text.txt').stat().st_size + (home/'few.txt').stat().st_size


def test_memory_is_foretold(same, tmp_path, monkeypatch):
    "As `run_bytes` has it for the micro-batch that is asked for, over what the process had"
    monkeypatch.setattr(planning, 'standing_bytes', lambda: 1e8)
    shape = model_config('tiny', vocab_size=300)
    for n in (1, 32): assert plan(**{**same, 'batch_size': n, 'config': 'tiny'}, recipe='plain', seconds=.01, save_dir=str(tmp_path/'run')).pace.memory == run_bytes(shape, n, 1e8, precision='fp32')


def test_a_teacher_is_planned_for(same, tmp_path, monkeypatch):
    "It is asked in the steps that are measured, its copies are in the memory, its tokenizer is the run's, and it stands in the command"
    monkeypatch.setattr(planning, 'standing_bytes', lambda: 1e8)
    pretrain(**{**same, 'max_steps': 2}, save_dir=str(tmp_path/'first'))
    asked, mixed = [], distill.mixed_nats
    monkeypatch.setattr(distill, 'mixed_nats', lambda *a: asked.append(len(a[2])) or mixed(*a))
    teachers = [str(tmp_path/'first')]*2
    found = plan(**{**same, 'tokenizer': None, 'precision': 'bf16'}, recipe='plain', teacher=teachers, seconds=.01, save_dir=str(tmp_path/'run'))
    without = plan(**{**same, 'precision': 'bf16'}, recipe='plain', seconds=.01, save_dir=str(tmp_path/'run'))
    beside = load_teachers((tmp_path/'first', tmp_path/'first'), .5).bytes(4*16, 'bf16')
    assert set(asked) == {2} and found.pace.memory - without.pace.memory == beside > 0
    assert f'--teacher {teachers[0]} --teacher {teachers[1]}' in found.command and '--vocab_size' not in found.command and found.n_pieces == without.n_pieces


def test_a_decay_for_few_parameters(same, tmp_path):
    "Suggested with the recipe for small texts, where the model is too small to learn its text by heart; what is given stays"
    few = dict(d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=8)
    def command(**more): return plan(**{**same, 'config': few, **more}, seconds=.01, save_dir=str(tmp_path/'run')).command
    assert '--recipe small-data' in command() and '--weight_decay 1.0' in command() and '--weight_decay 0.7' in command(weight_decay=.7)
    assert '--weight_decay' not in command(config='tiny') and '--weight_decay' not in command(recipe='plain')
    for other in (dict(optimizer='adamw'), dict(learning_rate=.02)): assert '--weight_decay' not in command(recipe='small-data', **other)  # with another rate it is another decay


def test_what_is_not_given_is_suggested(same, home, tmp_path):
    given = {k: v for k, v in same.items() if k not in ('config', 'tokenizer')}
    found = plan(**given, max_seq_len=16, seconds=.01, save_dir=str(tmp_path/'run'))
    assert found.config == 'tiny' and found.n_pieces == 300 and found.recipe == planning.SMALL and '--recipe small-data' in found.command and '--vocab_size 300' in found.command
    assert plan(**given, max_seq_len=16, seconds=.01, learning_rate=1e-3, save_dir=str(tmp_path/'run')).recipe == 'plain'


@shows(lr_find, 'config', 'tokenizer')
@pytest.mark.parametrize('act, given, said', [
    (lr_find, dict(start=1., end=.1), 'start=1 is not below end=0.1'), (lr_find, dict(steps=5), 'steps=5'), (lr_find, dict(smoothing=1.), 'smoothing=1.0'), (lr_find, dict(figure='/nowhere/x.png'), 'there is no folder /nowhere'),
    (lr_find, dict(learning_rate=.1), 'learning_rate is an option of a run'), (lr_find, dict(max_seq_len=100_000), 'fewer than one block'), (lr_find, dict(batchsize=3), "did you mean 'batch_size'?"),
    (plan, dict(hours=-1.), 'hours=-1.0'), (plan, dict(seconds=0.), 'seconds=0.0'), (plan, dict(resume=True), 'resume changes nothing in a plan'), (plan, dict(optimizer='sgd'), "'sgd'"), (plan, dict(epochs=0), 'epochs=0')])
def test_bad_input(same, act, given, said):
    with pytest.raises(UserError) as e: act(**{**same, **given})
    assert said in str(e.value) and '\n' not in str(e.value)


def test_several_processes_are_refused(same, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for act in (lr_find, plan):
        with pytest.raises(UserError, match='one process'): act(**same)


@pytest.mark.parametrize('act', [lr_find, plan])
def test_every_option_of_its_own_is_shown(act): assert options(act) - options(pretrain) <= set(SHOWN[act])
