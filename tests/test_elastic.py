"One process, two under torchrun, and one after two: the same samples, the same losses, and the same bits where they are promised"
import json, os, signal, subprocess, sys, time
import pytest
import torch
from continual_llm.archive import load_object
from tests.test_resume import TEXT, assert_same, newest, records, without_times

FLAGS = ('--config tiny --epochs 2 --batch_size 4 --grad_accumulation 2 --max_seq_len 32 --learning_rate 3e-3 --warmup_steps 5 '
         '--max_steps 60 --eval_every 20 --save_every 7 --precision fp32').split()
COMMAND = '''
import sys
from continual_llm.cli import main
main(sys.argv[1:])
'''


def command(home, name, world, *more):
    "The console command, by itself or in `world` processes"
    start = [sys.executable] if world == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(world)]
    return [*start, str(home/'command.py'), 'pretrain', '--data', str(home/'text.txt'), '--tokenizer', str(home/'tok'), '--cache', str(home/'cache'),
            '--save_dir', str(home/name), *FLAGS, *more]


def env(): return dict(os.environ, OMP_NUM_THREADS='1')


def go(home, name, world, *more):
    done = subprocess.run(command(home, name, world, *more), env=env(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A text, a tokenizer, and a program that is the console command"
    from continual_llm.tokenizer import train_tokenizer
    home = tmp_path_factory.mktemp('elastic')
    (home/'text.txt').write_text(TEXT)
    (home/'command.py').write_text(COMMAND)
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    return home


def assert_same_run(home, a, b):
    assert_same(newest(home/a), newest(home/b))
    assert_same(load_object(home/a/'best'/'checkpoint.pt'), load_object(home/b/'best'/'checkpoint.pt'))
    assert without_times(records(home/a)) == without_times(records(home/b))


def test_the_same_bits_when_asked_for(home):
    "With --deterministic and an even accumulation: one process and two leave the same"
    go(home, 'one', 1, '--deterministic')
    assert '2 processes' in go(home, 'two', 2, '--deterministic')
    assert_same_run(home, 'one', 'two')


def test_one_after_two(home):
    "SIGTERM to torchrun: both save and leave together. A mistake is said once. One process goes on to the same bits"
    with subprocess.Popen(command(home, 'both', 2, '--deterministic'), env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        log, until = home/'both'/'metrics.jsonl', time.monotonic() + 300
        while p.poll() is None and time.monotonic() < until and not (log.exists() and log.read_bytes().count(b'"kind": "step"') > 12): time.sleep(.01)
        p.send_signal(signal.SIGTERM)
        assert p.wait(120) != 0
    assert json.loads((home/'both'/'run.json').read_text())['status'] == 'SIGTERM'
    assert 12 < newest(home/'both')['step'] < 60
    again = subprocess.run(command(home, 'both', 2, '--deterministic'), env=env(), capture_output=True, text=True, timeout=300)
    said = [line for line in again.stderr.splitlines() if line.startswith('continual-llm:')]
    assert len(said) == 1 and 'already holds a run' in said[0]
    go(home, 'both', 1, '--deterministic', '--resume')
    assert_same_run(home, 'one', 'both')


def test_the_same_losses_always(home):
    "Without it: the same samples in the same order, losses within 1e-6"
    go(home, 'plain', 1)
    go(home, 'plain2', 2, '--grad_accumulation', '1', '--batch_size', '8')
    a, b = [[r['loss'] for r in records(home/n) if r['kind'] == 'step'] for n in ('plain', 'plain2')]
    assert len(a) == len(b) == 60
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-6
