"Taking part in a run: what buttons do through a real kernel's subshell, and that the record of it makes the same bits again"
import json, threading, time
from pathlib import Path
import pytest
import torch
from continual_llm.archive import load_object
from continual_llm.checkpoint import Checkpoints
from continual_llm.core import UserError, read_json, write_json
from continual_llm.distributed import Processes
from continual_llm.generate import load_model
from continual_llm.history import History
from continual_llm.loop import LoopConfig
from continual_llm.panel import Controls, read_actions
from continual_llm.tokenizer import train_tokenizer
from continual_llm.train import carry_out, pretrain

LINES = [f'the {a} sat on the {b} and saw the {a} .\n\n' for a in 'cat horse hen fox owl'.split() for b in 'mat log hillside road'.split()]*4
SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=16, dropout=.1)
BASE = dict(batch_size=2, grad_accumulation=1, learning_rate=.01, warmup_steps=5, precision='fp32', device='cpu', spike=0., early_stopping_patience=0)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('panel')
    (home/'text.txt').write_text(''.join(LINES))
    (home/'long.txt').write_text(''.join(LINES*200))  # epochs of thousands of steps
    (home/'shape.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in SHAPE.items()))
    train_tokenizer(home/'text.txt', vocab_size=290, save=home/'tok')
    return home


@pytest.fixture
def asked(home): return dict(BASE, data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch): monkeypatch.setattr('continual_llm.train.save_curve', lambda history, path: None)


def newest(folder): return Checkpoints(folder).latest()[0]


def same_weights(a, b):
    a, b = [load_object(Path(p)) if Path(p).is_file() else newest(p) for p in (a, b)]
    return all(torch.equal(x, b['model_state_dict'][name]) for name, x in a['model_state_dict'].items()) and set(a['model_state_dict']) == set(b['model_state_dict'])


# ---- a record, repeated ----

PLAN = [dict(step=3, action='rate', factor=.5), dict(step=5, action='pause'), dict(step=5, action='sample', prompt='the cat'), dict(step=5, action='go on'),
        dict(step=7, action='evaluate'), dict(step=9, action='rate', factor=3.)]


@pytest.fixture(scope='module')
def touched(home):
    return pretrain(**BASE, data=str(home/'text.txt'), config=str(home/'shape.yaml'), tokenizer=str(home/'tok'), cache=str(home/'cache'), max_steps=12, quiet=True,
                    actions=PLAN, save_dir=str(home/'touched'))


def test_actions_are_on_the_record(touched):
    "In the history, in the log and in run.json, each with its step; and the rate is what they say"
    assert read_json(touched.folder/'run.json', 'run')['actions'] == PLAN
    assert [{k: v for k, v in r.items() if k != 'kind'} for r in touched.history.rows('action')] == PLAN
    log = [json.loads(line) for line in (touched.folder/'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log if r['kind'] == 'action'] == [a['step'] for a in PLAN]
    assert touched.history.column('eval', 'step') == [7, 12] and touched.history.column('sample', 'step') == [5, 7, 12]
    assert touched.history.rows('sample')[0]['text'].startswith('the cat')
    rate = touched.history.column('step', 'lr')
    config = LoopConfig(30, 3, .01, 5, max_steps=12)
    assert rate == [config.lr(s)*(1 if s < 3 else .5 if s < 9 else 1.5) for s in range(12)]


def test_a_run_is_repeated_from_its_record(touched, asked, tmp_path):
    again = pretrain(**asked, max_steps=12, quiet=True, actions=str(touched.folder), save_dir=str(tmp_path/'again'))
    plain = pretrain(**asked, max_steps=12, quiet=True, save_dir=str(tmp_path/'plain'))
    assert same_weights(again.folder/'final'/'model.pt', touched.folder/'final'/'model.pt') and read_json(again.folder/'run.json', 'run')['actions'] == PLAN
    assert again.history.column('eval', 'loss') == touched.history.column('eval', 'loss')
    assert not same_weights(plain.folder/'final'/'model.pt', touched.folder/'final'/'model.pt')


@pytest.mark.parametrize('stop', [2, 4, 8, 10])
def test_stopped_and_resumed_is_the_same(touched, asked, tmp_path, stop):
    "Before, between and after the actions that change the rate; what was planned for later is done by the resumed run"
    plan = sorted([*PLAN, dict(step=stop, action='stop')], key=lambda a: a['step'])
    place = dict(asked, max_steps=12, quiet=True, save_dir=str(tmp_path/'run'))
    half = pretrain(**place, actions=plan)
    assert half.stopped == 'request' and read_json(half.folder/'run.json', 'run')['status'] == 'request' and newest(half.folder)['step'] == stop
    whole = pretrain(**place, resume=True)
    assert same_weights(whole.folder/'final'/'model.pt', touched.folder/'final'/'model.pt') and read_json(whole.folder/'run.json', 'run')['actions'] == plan
    assert whole.history.column('step', 'lr') == touched.history.column('step', 'lr')
    assert read_actions(whole.folder) == PLAN  # a stop after which it went on is not repeated


def test_an_action_is_met_again_from_an_older_state(touched, asked, tmp_path):
    "Killed after the action and before the next save: its cause stands in run.json, its effect in no state"
    place = dict(asked, max_steps=12, quiet=True, save_dir=str(tmp_path/'run'), save_every=2)
    half = pretrain(**place, actions=[dict(step=2, action='stop')])
    record = read_json(half.folder/'run.json', 'run')
    write_json(half.folder/'run.json', dict(record, actions=[*record['actions'], *PLAN]), 'run')
    whole = pretrain(**place, resume=True)
    assert same_weights(whole.folder/'final'/'model.pt', touched.folder/'final'/'model.pt')


def test_what_was_asked_for_stays_the_same(asked, tmp_path):
    place = dict(asked, max_steps=4, quiet=True, save_dir=str(tmp_path/'run'))
    plan = [dict(step=2, action='stop'), dict(step=3, action='rate', factor=2.)]
    pretrain(**place, actions=plan)
    with pytest.raises(UserError, match='did not begin with these actions'): pretrain(**place, resume=True, actions=[dict(step=3, action='rate', factor=4.)])
    assert pretrain(**place, resume=True, actions=plan).history.column('step', 'lr')[3] == 2*LoopConfig(30, 3, .01, 0, max_steps=4).lr(3)


def test_an_action_whose_step_never_comes_is_said(touched, asked, tmp_path, capsys):
    "It is no part of what was done, and the same command goes on with a run that is complete"
    place = dict(asked, max_steps=4, save_dir=str(tmp_path/'run'))
    plan = [dict(step=2, action='evaluate'), dict(step=50, action='rate', factor=.5)]
    run = pretrain(**place, actions=plan)
    record = read_json(run.folder/'run.json', 'run')
    assert 'Never done, since the run did not come to it in this order: rate at step 50' in capsys.readouterr().out
    assert record['actions'] == plan[:1] and record['missed'] == plan[1:] and run.history.rows('note')[-1]['step'] == 4
    assert pretrain(**place, actions=plan, resume=True).stopped == ''


def test_a_panel_is_for_one_process():
    with pytest.raises(UserError, match='panel=True is for one process, and there are 2'): carry_out(None, panel=True, processes=Processes(0, 2))


def test_refusals(asked, tmp_path):
    for bad, said in ((dict(actions=str(tmp_path)), 'holds no run'), (dict(actions=[dict(step=1, action='rat')]), "did you mean 'rate'"), (dict(panel=True, quiet=True), 'leave one of them out'),
                      (dict(panel='yes'), 'panel='), (dict(prompt=3), 'prompt=3'), (dict(prompt='the '*40), 'no room to write')):
        with pytest.raises(UserError, match=said): pretrain(**{**asked, 'max_steps': 2, 'quiet': 'panel' not in bad, 'save_dir': str(tmp_path/'bad'), **bad})
    assert not (tmp_path/'bad').exists()


def test_outside_a_notebook_one_line_says_what_works(asked, tmp_path, capfd):
    pretrain(**asked, max_steps=1, panel=True, save_dir=str(tmp_path/'run'))
    said = [line for line in capfd.readouterr().out.splitlines() if 'panel outside' in line]
    assert len(said) == 1 and 'Ctrl-C saves the run' in said[0]


# ---- a real kernel ----

class Lab:
    "A front end without a face: it runs a cell, sees the widgets that are made, and clicks on them through a subshell"
    def __init__(self, subshell=True):
        from jupyter_client.manager import start_new_kernel
        self.manager, self.client = start_new_kernel(kernel_name='python3')
        self.widgets, self.outputs, self.shown, self.shell, self.status = {}, [], {}, None, 'idle'
        if subshell:
            self.client.control_channel.send(self.client.session.msg('create_subshell_request', {}))
            self.shell = self.client.control_channel.get_msg(timeout=60)['content']['subshell_id']

    def run(self, code): self.cell = self.client.execute(code)

    def until(self, wanted, seconds=100):
        "Read what the kernel says until something is true"
        end = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < end, (self.outputs[-5:], self.widgets)
            try: self.take(self.client.get_iopub_msg(timeout=.2))
            except Exception as e:
                if type(e).__name__ != 'Empty': raise
        return self

    def take(self, m):
        kind, c = m['msg_type'], m['content']
        match kind:
            case 'comm_open' if 'state' in c['data']: self.widgets[c['comm_id']] = c['data']['state']
            case 'comm_msg' if c['data'].get('method') == 'update' and c['comm_id'] in self.widgets: self.widgets[c['comm_id']].update(c['data']['state'])
            case 'display_data' | 'update_display_data': self.shown.setdefault(c['transient'].get('display_id'), []).append(c['data'])
            case 'stream': self.outputs.append(c['text'])
            case 'error': raise AssertionError('\n'.join(c['traceback']))
            case 'status' if m['parent_header'].get('msg_id') == self.cell: self.status = c['execution_state']

    def find(self, **wanted):
        return next((i for i, s in self.widgets.items() if all(s.get(k) == v for k, v in wanted.items())), None)

    def send(self, comm, data):
        m = self.client.session.msg('comm_msg', dict(comm_id=comm, data=data))
        if self.shell: m['header']['subshell_id'] = self.shell
        self.client.shell_channel.send(m)

    def press(self, text): self.send(self.find(description=text), dict(method='custom', content=dict(event='click')))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def lab():
    made = []
    def open_lab(**how):
        made.append(Lab(**how))
        return made[-1]
    yield open_lab
    for one in made: one.close()


@pytest.fixture
def long(asked, home): return dict(asked, data=str(home/'long.txt'), epochs=5, eval_tokens=100)


def cell(asked, folder, **more):
    return f'from continual_llm.train import pretrain\nrun = pretrain(**{dict(asked, save_dir=str(folder), panel=True, **more)!r})'


def log(folder, kind):
    path = folder/'metrics.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith('\n')] if path.exists() else []
    return [r for r in rows if r['kind'] == kind]


def test_buttons_in_a_real_kernel(lab, long, tmp_path):
    "Pressed while the cell runs: each takes effect between two steps, stands on the record, and the record makes the same weights again"
    folder, lab = tmp_path/'run', lab()
    def did(n): return lambda: len(log(folder, 'action')) >= n
    lab.run(cell(long, folder))
    lab.until(lambda: lab.find(description='Pause') and len(log(folder, 'step')) > 3)
    lab.press('Pause')
    lab.until(did(1)).until(lambda: lab.find(description='Go on'))
    steps = len(log(folder, 'step'))
    lab.send(lab.find(placeholder='a sample begins with ...'), dict(method='update', state=dict(value='the owl')))
    for text in ('Sample', 'Evaluate', 'Rate x0.5'): lab.press(text)
    lab.until(did(4))
    time.sleep(.5)
    assert len(log(folder, 'step')) == steps and lab.status == 'busy'  # held, and the cell still runs
    lab.press('Go on')
    lab.until(lambda: len(log(folder, 'step')) > steps + 3)
    lab.press('Stop')
    lab.until(lambda: lab.status == 'idle')
    record = read_json(folder/'run.json', 'run')
    names = [a['action'] for a in record['actions']]
    assert names == ['pause', 'sample', 'evaluate', 'rate', 'go on', 'stop'] and record['actions'][1]['prompt'] == 'the owl' and record['status'] == 'request'
    assert log(folder, 'sample')[0]['text'].startswith('the owl') and len({a['step'] for a in record['actions'][:5]}) == 1
    last = [shown[-1] for shown in lab.shown.values()]
    assert not any('application/vnd.jupyter.widget-view+json' in d for d in last) and any('step' in d.get('text/plain', '') and 'stop' in d['text/plain'] for d in last)
    again = pretrain(**long, quiet=True, actions=str(folder), save_dir=str(tmp_path/'again'))
    assert again.stopped == 'request' and newest(again.folder)['step'] == newest(folder)['step'] and same_weights(again.folder, folder)
    assert load_model(folder)[2]['step'] == record['actions'][0]['step']  # the evaluation that was asked for found the first best


def test_a_front_end_without_subshells_is_found_out(lab, asked, tmp_path):
    "No message of a widget arrives while the cell runs: the panel says so, and what works"
    lab = lab(subshell=False)
    lab.run('import continual_llm.panel\ncontinual_llm.panel.PATIENCE = .1\n' + cell(asked, tmp_path/'run', max_steps=30))
    lab.until(lambda: lab.find(description='Pause'))
    lab.press('Stop')
    lab.until(lambda: lab.status == 'idle')
    lab.until(lambda: any('interrupting the kernel' in str(s.get('value')) for s in lab.widgets.values()), 5)
    assert len(log(tmp_path/'run', 'step')) == 30 and not log(tmp_path/'run', 'action')
