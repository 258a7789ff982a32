"`verify-resume` finds a resume that is wrong, says `identical` of one that is right, and leaves nothing behind"
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from continual_llm import nest, verify
from continual_llm.cli import main
from continual_llm.compare import compare_twins
from continual_llm.nest import Moment
from continual_llm.train import pretrain
from continual_llm.verify import verify_resume

TINY = dict(config='tiny', vocab_size=285, max_seq_len=16, batch_size=2, grad_accumulation=1, learning_rate=3e-3, max_steps=8, eval_every=4, save_every=2)
FORGETS = '''
from continual_llm.checkpoint import ResumeStates
real = ResumeStates.latest
def latest(self, *args, **kw):
    state, path, skipped = real(self, *args, **kw)
    if state: state['optimizer']['state'][1]['exp_avg'].zero_()
    return state, path, skipped
ResumeStates.latest = latest
'''
RANDOM = '''
import os, torch
real = torch.manual_seed
torch.manual_seed = lambda seed: real(seed ^ os.getpid())
'''


@pytest.fixture
def text(tmp_path, monkeypatch):
    "A text, a place for temporary files, and one kill in the middle of the run"
    (tmp_path/'text.txt').write_text('\n'.join(f'the {a} sat on the {b} .\n' for a in 'cat dog hen fox owl cow'.split() for b in 'mat log hill road'.split()*3))
    (tmp_path/'tmp').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'tmp'))
    monkeypatch.setattr(verify, 'moments', lambda *a: [Moment('step', 4, .5)])
    return tmp_path/'text.txt'


def words(text, **more): return ['verify-resume', '--data', str(text), *(str(w) for k, v in {**TINY, **more}.items() for w in (f'--{k}', v))]


def broken(monkeypatch, patch): monkeypatch.setattr(nest, 'PROGRAM', nest.PROGRAM.replace('from continual_llm', f'exec({patch!r}); from continual_llm'))


def left(text): return list((text.parent/'tmp').glob('verify-resume-*'))  # torch makes a cache of its own beside them


def test_a_forgotten_moment_is_found_and_named(text, monkeypatch, capsys):
    broken(monkeypatch, FORGETS)
    with pytest.raises(SystemExit) as e: main(words(text, kills=1))
    out, (folder,) = capsys.readouterr().out, left(text)
    assert e.value.code == 1 and 'DIFFERENT' in out and str(folder) in out
    assert 'first state that differs: last/' in out and 'first record that differs: metrics.jsonl/' in out
    assert 'repeats itself to the bit' in out
    places = [place for place, _ in compare_twins(folder/'whole', folder/'killed').differences]
    assert 'last/optimizer/state/1/exp_avg' in places and 'last/model_state_dict/embed.weight' in places
    assert not compare_twins(folder/'whole', folder/'again').differences


def test_arithmetic_that_does_not_repeat_itself_is_told_apart(text, monkeypatch):
    broken(monkeypatch, RANDOM)
    report = verify_resume(str(text), kills=1, quiet=True, **TINY)
    assert not report.identical and report.repeats is False and 'try --deterministic' in repr(report)


def test_a_right_resume_is_identical_and_nothing_is_left(text, capsys):
    "The run that stands in `save_dir` stays as it is"
    own = text.parent/'runs'/'mine'
    own.mkdir(parents=True)
    (own/'run.json').write_text('mine')
    with pytest.raises(SystemExit) as e: main(words(text, kills=1, save_dir=own, precision='bf16'))
    out = capsys.readouterr().out
    assert not e.value.code and 'kill 1: after step' in out and 'identical: 8 steps, 1 kill' in out
    assert not left(text) and [p.name for p in own.parent.iterdir()] == ['mine'] and (own/'run.json').read_text() == 'mine'


def test_a_run_with_a_teacher_is_killed_too(text, monkeypatch):
    "Whose tokenizer is the run's"
    first = pretrain(data=text, **TINY, save_dir=text.parent/'first', quiet=True)
    settings, seen = verify._settings, []
    monkeypatch.setattr(verify, '_settings', lambda *a: seen.append(settings(*a)) or seen[0])
    report = verify_resume(str(text), kills=1, quiet=True, teacher=[first.folder], seed=1, **{k: v for k, v in TINY.items() if k != 'vocab_size'})
    assert report.identical and len(report.lives) == 2 and (seen[0]['teacher'], seen[0]['tokenizer']) == ([str(first.folder)], None)


def test_mistakes_are_one_line_and_leave_nothing(text, monkeypatch, capsys):
    "The last is found by the run itself, here a fresh process as where one that has imported torch must not go on as a copy"
    broken(monkeypatch, 'import continual_llm.nest as n; n.FORKS = False')
    for more, said in ((dict(kills=0), 'kills=0'), (dict(max_memory=2), 'max_memory=2.0: what fits'), (dict(kills=-3), 'kills=-3'), (dict(precison='bf16'), "did you mean '--precision'?"),
                       (dict(weight_decay=-1), 'weight_decay=-1')):
        with pytest.raises(SystemExit) as e: main(words(text, **more))
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not left(text)


@pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks for processes in /proc')
def test_interrupted_it_leaves_no_process_and_no_file(text):
    env = dict(os.environ, TMPDIR=str(text.parent/'tmp'))
    code = 'from continual_llm.cli import main; main()'
    with subprocess.Popen([sys.executable, '-c', code, *words(text, max_steps=100000, epochs=1000)], env=env, stderr=subprocess.DEVNULL) as p:
        until = time.monotonic() + 120
        while not any('step' in f.read_text() for f in (text.parent/'tmp').glob('*/whole/metrics.jsonl')):
            assert p.poll() is None and time.monotonic() < until
            time.sleep(.02)
        assert len(processes(text)) >= 2  # the nest and the run
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 130
    assert not left(text) and not processes(text)


def processes(text):
    "Processes that name the temporary folder on their command line"
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: found += [p.parent.name] * (str(text.parent/'tmp').encode() in p.read_bytes())
        except OSError: pass
    return found
