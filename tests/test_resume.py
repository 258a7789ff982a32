"A run that is stopped, killed and resumed through the command line ends in the same bits as one that never was"
import json, os, signal, subprocess, sys, time
import pytest
import torch
from continual_llm.archive import load_object

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


def newest(run): return load_object(max((run/'last').glob('*.pt')))


def records(run): return [json.loads(l) for l in (run/'metrics.jsonl').read_text().splitlines()]


def without_times(rows):
    times = {'seconds', 'tokens_per_second', 'path'}
    return [{k: v for k, v in r.items() if k not in times} for r in rows]


def assert_same(a, b, where=''):
    "Equal to the bit, whatever the nesting"
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor): assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            if k not in ('seconds', 'tokens_per_second', 'path'): assert_same(a[k], b[k], f'{where}/{k}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): assert_same(x, y, f'{where}/{i}')
    else: assert a == b, where


def assert_same_run(home, name):
    whole, other = home/'whole', home/name
    assert_same(newest(whole), newest(other))
    for file in ('best/checkpoint.pt', 'final/model.pt', 'epoch_1/checkpoint.pt'): assert_same(load_object(whole/file), load_object(other/file))
    assert without_times(records(whole)) == without_times(records(other))


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
    before = newest(home/'whole'), without_times(records(home/'whole'))
    subprocess.run(command(home, 'whole', '--resume'), check=True, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert_same(before[0], newest(home/'whole'))
    assert before[1] == without_times(records(home/'whole'))


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
