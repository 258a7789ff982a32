"What no page can hold of the monitor: a real kernel, a terminal, a full disk, a closed pipe, long runs"
import contextlib, gc, io, json, os, re, subprocess, sys, time
from unittest.mock import patch
import pytest
from continual_llm.history import History, draw
from continual_llm.metrics import Score, figure_png
from continual_llm.monitor import Console, JsonLines, LiveFigure, live_html, save_curve

EVAL = dict(epoch=1, train_loss=5.2, **Score(510., 100, 80, 420).to_dict(), best=True, no_improvement=0)


def step(s, total=20, epochs=2): return dict(step=s, epoch=1 + s*epochs//total, loss=5 - s/total, lr=1e-3, tokens_per_second=1234.5)


def python(code, **kw):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, **kw)


# a notebook

def cell_outputs(*sources):
    "Outputs of cells run in a real kernel, as a notebook would save them"
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    env = dict(os.environ, MPLBACKEND='module://matplotlib_inline.backend_inline')
    nbclient.NotebookClient(nb, timeout=120, kernel_name='python3').execute(env=env)
    return [c.outputs for c in nb.cells]


RUN = '''
from continual_llm.monitor import Console, History, LiveFigure, in_notebook
h = History([Console(total=400, epochs=4, progress=False), LiveFigure(400, 4, every=.05)])
seen, live = [], h.views[1]
show = live.show
def count(data, about): seen.append(sorted(data)); show(data, about)
live.show = count
for s in range(400):
    h.add('step', step=s, epoch=1+s//100, loss=5-s/100, lr=1e-3, tokens_per_second=99.)
    if s % 100 == 99: live.next = 0
    if s % 100 == 99: h.add('eval', step=s+1, epoch=1+s//100, train_loss=4., loss=4.5-s/200, perplexity=90.-s/9, word_perplexity=200.,
                            bits_per_byte=1.5, best=True, no_improvement=0)
h.add('done', seconds=60.)
h.close()
assert in_notebook()
'''


def test_one_picture_stays_in_a_notebook():
    "Redrawn as HTML while the run goes on, kept once as a PNG with its description"
    run, seen, fig = cell_outputs(RUN, 'print(len(seen), *{tuple(s) for s in seen[:-1]}, seen[-1])', "from continual_llm.history import draw\ndraw(h)")
    (picture,) = [o for o in run if 'data' in o]
    text = ''.join(o['text'] for o in run if o.output_type == 'stream' and o.name == 'stdout')
    assert int(seen[0]['text'].split()[0]) >= 5 and seen[0]['text'].strip().endswith("('text/html', 'text/plain') ['image/png', 'text/plain']")
    assert sorted(picture['data']) == ['image/png', 'text/plain'] and 'Epoch 4/4 · step 400 of 400 · 100%' in picture['data']['text/plain']
    assert picture['metadata']['image/png']['alt'].startswith('Training loss from 5.00 to 1.01')
    assert not [o for o in run if o.output_type == 'stream' and o.name == 'stderr']
    assert text.count('\nEpoch ') == 4 and text.endswith('Best model: Epoch 4 with validation loss 2.5050\n')
    assert 'image/png' in fig[0]['data']                     # a figure is shown where pyplot was never imported


def test_silent_and_light_outside_a_notebook():
    "No figure, no bar for a run shorter than a minute, no library that only they need"
    code = '''import sys
from continual_llm.monitor import Console, History, LiveFigure
h = History([LiveFigure()])
for s in range(50): h.add('step', step=s, loss=1., lr=1.)
h.close()
assert not {'matplotlib', 'IPython'} & set(sys.modules)
h = History([Console(50, 1)])
for s in range(50): h.add('step', step=s, epoch=1, loss=1., lr=1., tokens_per_second=1.)
h.close()'''
    r = python(code)
    assert (r.returncode, r.stdout, r.stderr) == (0, '', '')


# the bar

class Terminal(io.StringIO):
    def isatty(self): return True


@contextlib.contextmanager
def ticking():
    "A clock on which each look takes a second"
    now = iter(range(10**6))
    with patch('tqdm.std.time', lambda: float(next(now))): yield lambda: next(now)


def test_bar_on_a_terminal():
    tty = Terminal()
    with contextlib.redirect_stderr(tty), contextlib.redirect_stdout(tty), ticking():
        h = History([Console(total=20, epochs=2)])
        for s in range(5, 20): h.add('step', **step(s))      # a resumed run begins where it was
        bar = h.views[0].bar
        assert (bar.n, bar.initial, bar.total) == (20, 5, 20)
        h.add('note', text='a note')
        h.close()
    last = tty.getvalue().split('\r')
    assert any('Epoch 2/2 100%' in t and '20/20 steps' in t and re.search(r'loss 4.0500, 1,234 tokens/s, [\d.]+ [MG]B', t) for t in last)
    assert any(t.startswith('a note\n') for t in last)       # on a line of its own, with the bar cleared before it
    assert not last[-1].strip()                              # nothing stays


def test_bar_in_a_log_file_is_a_line_a_minute():
    log = io.StringIO()
    with contextlib.redirect_stderr(log), ticking() as clock:
        h = History([Console(total=2000, epochs=2)])
        for s in range(2000): h.add('step', **step(s, 2000))
        seconds = clock()
        h.close()
    lines = log.getvalue().splitlines()
    assert '\r' not in log.getvalue() and 1 <= len(lines) <= seconds/60
    assert all('steps [' in line and 'tokens/s' in line for line in lines)


# nobody reads, nothing fits

def test_closed_pipe_does_not_stop_the_run(tmp_path):
    code = f'''import os, sys
from continual_llm.monitor import Console, History, JsonLines
h = History([Console(300, 3), JsonLines({str(tmp_path/'m.jsonl')!r})])
sys.stdin.read()  # until the reader is gone
for s in range(300): h.add('note', text=str(s))
assert len(h.views) == 1
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)'''
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    p.stdin.close()
    err = p.stderr.read()
    assert p.wait(120) == 0 and err.count('\n') == 1 and 'Console is switched off' in err and 'BrokenPipe' in err
    assert len((tmp_path/'m.jsonl').read_text().splitlines()) == 300


def test_full_disk_is_said_once_and_made_good(tmp_path):
    "A limit on the size of files stands for a full disk: writes fail half-way, as they do there"
    code = f'''import resource, signal
from continual_llm.monitor import History, JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
h = History([JsonLines({str(tmp_path/'m.jsonl')!r})])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for s in range(100): h.add('step' if s % 10 else 'eval', step=s, loss=1/(s+1))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
h.add('eval', step=100)
h.add('step', step=101)'''
    r = python(code)
    assert r.returncode == 0 and r.stderr.count('\n') == 1 and 'm.jsonl cannot be written' in r.stderr
    assert [json.loads(line)['step'] for line in (tmp_path/'m.jsonl').read_text().splitlines()] == list(range(102))
    assert os.listdir(tmp_path) == ['m.jsonl']               # no torn neighbour is left


def test_curve_file_is_whole_or_as_before(tmp_path):
    h = History()
    h.add('step', **step(0))
    save_curve(h, tmp_path/'curve.png')
    before = (tmp_path/'curve.png').read_bytes()
    h.add('step', **step(1))
    with patch('os.replace', side_effect=OSError(28, 'No space left on device')), pytest.raises(OSError): save_curve(h, tmp_path/'curve.png')
    assert (tmp_path/'curve.png').read_bytes() == before and os.listdir(tmp_path) == ['curve.png']


@pytest.mark.parametrize('bad', [dict(loss=None), dict(loss=float('nan'), perplexity=float('inf')), dict(perplexity='text')])
def test_odd_numbers_never_stop_a_run(bad, tmp_path):
    shown, h = [], History()
    h.views += [Console(20, 2, progress=False), JsonLines(tmp_path/'m.jsonl'), LiveFigure(show=lambda *given: shown.append(given), every=0)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        h.add('step', **step(0))
        h.add('eval', step=1, **EVAL | bad)
        h.add('eval', step=2, **EVAL)
        h.close()
    assert len(h.records) == len((tmp_path/'m.jsonl').read_text().splitlines()) == 3


# long runs

def long_history(n):
    h = History()
    for s in range(n): h.add('step', **step(s, n))
    for s in range(1, 60): h.add('eval', step=s*n//60, **EVAL)
    return h


def timed(f, times=3):
    "The best of a few, in seconds of this process alone"
    best = 1e9
    for _ in range(times):
        start = time.process_time()
        f()
        best = min(best, time.process_time() - start)
    return best


def test_a_long_run_is_drawn_as_fast_as_a_short_one():
    short, long = long_history(500), long_history(20_000)
    assert timed(lambda: live_html(long, None, 20_000, 2)) < 20*timed(lambda: live_html(short, None, 500, 2))  # forty times the records
    assert timed(lambda: figure_png(draw(long))) < 2*timed(lambda: figure_png(draw(short))) + .1


def test_following_a_run_costs_little_per_step(tmp_path):
    h = History([Console(5000, 2), JsonLines(tmp_path/'m.jsonl'), LiveFigure(show=lambda data, about: None, every=3600)])
    with contextlib.redirect_stderr(io.StringIO()):
        h.add('step', **step(0, 5000))  # the first one draws
        took = timed(lambda: [h.add('step', **step(s, 5000)) for s in range(1, 2001)], times=1)
    assert took/2000 < 2e-3             # some 0.1 ms where the machine is quiet; a step of training is 10 ms and more


def test_redraws_leave_nothing_behind():
    from matplotlib.artist import Artist
    h, live = long_history(300), LiveFigure(show=lambda data, about: None, every=0)
    def artists():
        live.stale = h
        live.redraw()
        live.stale = h
        live.finish()
        gc.collect()
        return sum(issubclass(type(o), Artist) for o in gc.get_objects())
    artists()
    assert artists() == artists()
