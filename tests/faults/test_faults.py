"A small part of `python -m tests.faults`: kills, signals, divergence, failing calls, damaged files, and whatever else happens to a run"
import os, signal
import pytest
from tests.faults import calls, damage, divergence, kills, others, signals
from tests.faults.runs import make_home, run_difference, table
from tests.faults.server import Server

SEED = int(os.environ.get('CONTINUAL_LLM_FAULT_SEED', 0))  # another seed tries other places
MANY = int(os.environ.get('CONTINUAL_LLM_FAULTS', 1))      # a larger number tries more of them
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


@pytest.fixture(scope='module')
def home(tmp_path_factory): return make_home(tmp_path_factory.mktemp('faults'))


@pytest.fixture(scope='module')
def server(home):
    with Server(home/'log') as s: yield s


def check(rows, done):
    "Everything that was asked for was done, and nothing went wrong"
    rows = list(rows)
    print(table(rows))
    assert not [w for r in rows for w in r.wrong]
    assert sum(r.done for r in rows) >= done


def test_kills(server, home):
    "All but compiled runs, whose first compilation takes longer than all the rest"
    check(kills.kills(server, home, 12*MANY, SEED, [k for k in kills.KINDS if not k['compile']]), 12*MANY)


def test_signals(server, home): check(signals.signals(server, home, 16*MANY, SEED), 16*MANY)


def test_divergence(server, home): check(divergence.divergence(server, home, 4*MANY, SEED), 4*MANY)


@pytest.mark.parametrize('where,first,last,strike', [('loss', 8, 10, (signal.SIGTERM, 'training', 10)), ('validation', 14, 14, (signal.SIGTERM, 'evaluating', 2)),
                                                     ('weight', 8, 8, (signal.SIGTERM, 'training', 10))])
def test_nothing_that_a_signal_saved_is_gone_back_to(server, home, where, first, last, strike):
    "Stopped where a state is due, but in the midst of trouble: before the third bad step, before an evaluation that fails, and with a weight that is no number"
    assert not divergence.one(server, home, 'in a row', dict(where=where, what='nan', first=first, last=last, times=1), [strike])


def test_stopped_in_the_last_evaluation(server, home):
    "After the last step there is none to set the learning rate that the last state holds"
    whole = home/'whole-last'
    assert server.run(divergence.begin(home, whole.name, None)[0]) == 0
    assert divergence.struck(server, home, 'last', None, [(signal.SIGTERM, 'evaluating', 6)])[0] == 0
    assert not run_difference(whole, home/'last')


def test_failing_calls(server, home): check(calls.calls(server, home, 12*MANY, SEED), 12*MANY)


def test_small_disks(server, home):
    row = calls.small_disks(server, home, 2*MANY, SEED)
    if not row.done: pytest.skip(row.note)
    check([row], 2*MANY)


def test_damage(server, home): check(damage.damages(server, home, 280*MANY, SEED), 240*MANY)


def test_others(server, home): check(others.others(server, home, MANY > 1), 9)
