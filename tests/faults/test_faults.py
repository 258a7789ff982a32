"A small part of `python -m tests.faults`: kills, signals, failing calls, damaged files, and whatever else happens to a run"
import os
import pytest
from tests.faults import calls, damage, kills, others, signals
from tests.faults.runs import make_home, table
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


def test_failing_calls(server, home): check(calls.calls(server, home, 12*MANY, SEED), 12*MANY)


def test_small_disks(server, home):
    row = calls.small_disks(server, home, 2*MANY, SEED)
    if not row.done: pytest.skip(row.note)
    check([row], 2*MANY)


def test_damage(server, home): check(damage.damages(server, home, 280*MANY, SEED), 240*MANY)


def test_others(server, home): check(others.others(server, home, MANY > 1), 9)
