"A run that is stopped, killed and resumed through the command line ends in the same bits as one that never was"
import os, shutil, signal, subprocess, sys, time
import pytest
from tests.faults.runs import run_difference

WORDS = 'cat dog hen fox owl cow mat log hill road'.split()
TEXT = '\n'.join(f'the {a} sat on the {b} and saw the {c} .\n' for a in WORDS for b in WORDS for c in WORDS)
FLAGS = ('--config tiny --epochs 2 --batch_size 4 --grad_accumulation 2 --max_seq_len 32 --learning_rate 3e-3 --warmup_steps 5 '
         '--eval_every 20 --save_every 7').split()


def command(home, name, *more):
    return [sys.executable, '-c', 'from continual_llm.cli import main; main()', 'pretrain', '--data', str(home/'text.txt'), '--tokenizer', str(home/'tok'), '--cache', str(home/'cache'),
            '--save_dir', str(home/name), *FLAGS, *more]


def env(): return dict(os.environ, OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A text, a tokenizer, and a run that was never stopped"
    from continual_llm.tokenizer import train_tokenizer
    home = tmp_path_factory.mktemp('resume')
    (home/'text.txt').write_text(TEXT)
    train_tokenizer(home/'text.txt', vocab_size=300, save=home/'tok')
    subprocess.run(command(home, 'whole'), check=True, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return home


def assert_same_run(home, name): assert not run_difference(home/'whole', home/name)


def start_and_stop(home, name, number, when, *more):
    "Start the run, send a signal once `when` steps are in its log; the exit code"
    with subprocess.Popen(command(home, name, *more), env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        log, until = home/name/'metrics.jsonl', time.monotonic() + 120
        while p.poll() is None and time.monotonic() < until and not (log.exists() and log.read_bytes().count(b'"kind": "step"') > when): time.sleep(.005)
        p.send_signal(number)
        return p.wait(60)


@pytest.mark.parametrize('number,code,when', [(signal.SIGTERM, 143, 25), (signal.SIGINT, 130, 60), (signal.SIGKILL, -9, 3), (signal.SIGKILL, -9, 44)])
def test_stopped_by_a_signal(home, number, code, when):
    name = f'{number.name}-{when}'
    assert start_and_stop(home, name, number, when) == code
    subprocess.run(command(home, name, '--resume'), check=True, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert_same_run(home, name)


def test_killed_again_and_again(home):
    "Three kills in one run, each time going on from what there is"
    for when in (4, 41, 70): start_and_stop(home, 'often', signal.SIGKILL, when, '--resume')
    subprocess.run(command(home, 'often', '--resume'), check=True, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert_same_run(home, 'often')


def test_resuming_a_finished_run_changes_nothing(home):
    shutil.copytree(home/'whole', home/'before')
    subprocess.run(command(home, 'whole', '--resume'), check=True, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert_same_run(home, 'before')


def test_a_damaged_state_is_passed_over_for_the_one_before(home, capfd):
    "The newest resume state is torn: it is named, and the run goes on from the one before, to the same bits"
    start_and_stop(home, 'torn', signal.SIGTERM, 30)
    newest_path = max((home/'torn'/'last').glob('*.pt'))
    data = bytearray(newest_path.read_bytes())
    data[len(data)//3] ^= 4
    newest_path.write_bytes(data)
    out = subprocess.run(command(home, 'torn', '--resume'), check=True, env=env(), capture_output=True, text=True).stdout
    assert newest_path.name in out
    assert_same_run(home, 'torn')


def test_a_second_run_in_the_folder_is_refused(home):
    with subprocess.Popen(command(home, 'busy'), env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        log, until = home/'busy'/'metrics.jsonl', time.monotonic() + 60
        while time.monotonic() < until and not (log.exists() and b'step' in log.read_bytes()): time.sleep(.005)
        p.send_signal(signal.SIGSTOP)  # hold it where it is, so that it cannot finish first
        try: second = subprocess.run(command(home, 'busy', '--resume'), env=env(), capture_output=True, text=True)
        finally:
            p.send_signal(signal.SIGCONT)
            p.terminate()
        assert second.returncode == 2 and str(p.pid) in second.stderr and len(second.stderr.strip().splitlines()) == 1
