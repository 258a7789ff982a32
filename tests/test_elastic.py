"One process, two, one after two, and one that is left alone: the same samples, the same losses, and the same bits where they are promised"
import contextlib, json, os, signal, socket, subprocess, sys, time
import pytest
from tests.faults.runs import run_difference
from tests.test_resume import TEXT

FLAGS = ('--config tiny --epochs 2 --batch_size 4 --grad_accumulation 2 --max_seq_len 32 --learning_rate 3e-3 --warmup_steps 5 '
         '--max_steps 60 --eval_every 20 --save_every 7 --precision fp32').split()
COMMAND = '''
import sys
from continual_llm.cli import main
main(sys.argv[1:])
'''
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


def command(home, name, *more, start=()):
    "The console command, by itself or started by torchrun"
    return [sys.executable, *start, str(home/'command.py'), 'pretrain', '--data', str(home/'text.txt'), '--tokenizer', str(home/'tok'), '--cache', str(home/'cache'),
            '--save_dir', str(home/name), *FLAGS, *more]


def env(**more): return dict(os.environ, OMP_NUM_THREADS='1', **more)


def go(home, name, *more, start=()):
    done = subprocess.run(command(home, name, *more, start=start), env=env(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def two(home, name, *more):
    "Two processes, started by hand"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(subprocess.Popen(command(home, name, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env(
            RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port))) for r in range(2)]


def wait_for_steps(run, n, process):
    "Until this many steps are in its log"
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until and not len(steps(run)) >= n: time.sleep(.01)


def steps(run):
    "The losses that stand in its log"
    log = run/'metrics.jsonl'
    return [json.loads(line)['loss'] for line in log.read_text().split('\n')[:-1] if '"step"' in line and json.loads(line)['kind'] == 'step'] if log.exists() else []


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A text, a tokenizer, a program that is the console command, and a run of one process"
    from continual_llm.tokenizer import train_tokenizer
    home = tmp_path_factory.mktemp('elastic')
    (home/'text.txt').write_text(TEXT)
    (home/'command.py').write_text(COMMAND)
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    go(home, 'one', '--deterministic')
    return home


def test_the_same_bits_when_asked_for(home):
    "With --deterministic and an even accumulation: one process and two leave the same"
    assert '2 processes' in go(home, 'two', '--deterministic', start=TORCHRUN)
    assert not run_difference(home/'one', home/'two')


def test_each_has_the_teacher(home):
    "One process and two learn the same from it"
    taught = ['--deterministic', '--teacher', str(home/'one'), '--seed', '1', '--max_steps', '10']
    go(home, 'taught', *taught), go(home, 'taught by two', *taught, start=TORCHRUN)
    assert not run_difference(home/'taught', home/'taught by two') and len(steps(home/'taught')) == 10


def test_one_after_two(home):
    "SIGTERM to torchrun: both save and leave together. A mistake is said once. One process goes on to the same bits"
    with subprocess.Popen(command(home, 'both', '--deterministic', start=TORCHRUN), env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        wait_for_steps(home/'both', 13, p)
        p.send_signal(signal.SIGTERM)
        assert p.wait(120) != 0
    assert json.loads((home/'both'/'run.json').read_text())['status'] == 'SIGTERM'
    assert 12 < int(max((home/'both'/'last').glob('*.pt')).stem) < 60
    again = subprocess.run(command(home, 'both', '--deterministic', start=TORCHRUN), env=env(), capture_output=True, text=True, timeout=300)
    said = [line for line in again.stderr.splitlines() if line.startswith('continual-llm:')]
    assert len(said) == 1 and 'already holds a run' in said[0]
    go(home, 'both', '--deterministic', '--resume')
    assert not run_difference(home/'one', home/'both')


@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_partner(home, killed):
    "SIGKILL to one of two: the other says in one line that it is gone and how to go on, and leaves; one process goes on to the same bits"
    name = f'killed{killed}'
    with two(home, name, '--deterministic') as both:
        wait_for_steps(home/name, 13, both[0])
        both[killed].kill()
        out, said = both[1-killed].communicate(timeout=120)
    assert both[killed].wait() == -signal.SIGKILL and both[1-killed].returncode == 1, said
    ours = [line for line in said.splitlines() if line.startswith('continual-llm: ')]
    assert len(ours) == 1 and 'another process of this run is gone' in ours[0] and '--resume' in ours[0], said
    assert 'Traceback' not in out + said
    go(home, name, '--deterministic', '--resume')
    assert not run_difference(home/'one', home/name)


@pytest.mark.parametrize('one,other', [([], ['--grad_accumulation', '1', '--batch_size', '8']),
                                       (odd := ['--grad_accumulation', '3', '--max_seq_len', '16', '--dropout', '0', '--max_steps', '20'], odd)])
def test_the_same_losses_always(home, tmp_path_factory, one, other):
    "Without it: the same samples in the same order, losses within 1e-6"
    runs = tmp_path_factory.mktemp('plain')
    go(home, runs/'one', *one)
    with two(home, runs/'two', *other) as both: assert [p.communicate(timeout=300) and p.returncode for p in both] == [0, 0]
    a, b = steps(runs/'one'), steps(runs/'two')
    assert len(a) == len(b) == (20 if one else 60)
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-6
