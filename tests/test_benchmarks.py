"Every benchmark can still be begun: what it imports is there, and its help says what it is for; those beside others are run in miniature"
import json, os, re, runpy, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest

FOLDER = Path(__file__).parents[1]/'benchmarks'
WITHOUT_FLAGS = {'peak_memory.py'}  # takes none, and is imported alone


@pytest.mark.parametrize('name', sorted(p.name for p in FOLDER.glob('*.py')))
def test_it_begins(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    if name in WITHOUT_FLAGS:
        assert callable(runpy.run_path(str(FOLDER/name), run_name='imported')['main'])
        return
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit) as e: runpy.run_path(str(FOLDER/name), run_name='__main__')
    assert not e.value.code and f'python benchmarks/{name}' in ' '.join(capsys.readouterr().out.split())


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    "Runs a benchmark here, and gives what it printed and the rows that it kept"
    def at_once(name, *flags):
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, 'argv', [name, '--results', str(tmp_path/'rows.jsonl'), *flags])
        runpy.run_path(str(FOLDER/name), run_name='__main__')
        return capfd.readouterr().out, [json.loads(line) for line in (tmp_path/'rows.jsonl').read_text().splitlines()]
    return at_once


@pytest.fixture
def without_peers(monkeypatch):
    "As if nobody had installed them"
    from importlib import metadata
    real = metadata.version
    def version(name):
        if name in ('litgpt', 'llama-cpp-python', 'gguf'): raise metadata.PackageNotFoundError(name)
        return real(name)
    monkeypatch.setattr(metadata, 'version', version)


def test_training_beside_others(run, without_peers):
    said, rows = run('peers_train.py', '--shapes', 'tiny', '--rounds', '1', '--contenders', 'ours,hf,litgpt bf16,plain', '--cpu')
    row = {r['contender']: r for r in rows}
    assert row['ours']['params'] == row['hf']['params'] and abs(row['plain']['params']/row['ours']['params'] - 1) < .05
    assert all(8.8 < row[name]['first'] < 9.3 for name in ('ours', 'hf', 'plain'))  # log 8000 is 8.99: all see the same task
    assert row['litgpt bf16']['missing'] == 'litgpt is not installed' and '| litgpt bf16 | litgpt is not installed |' in said
    assert len(row['ours']['seconds']) == 1 and row['ours']['clock'] == 'processor' and '| ours | ' in said


def test_what_is_measured_is_not_measured_again(run, monkeypatch):
    flags = '--shapes', 'tiny', '--rounds', '1'
    first = run('profile_step.py', *flags)[1]
    import torch
    monkeypatch.delattr(torch.profiler, 'profile')
    assert run('profile_step.py', *flags)[1] == first
    with pytest.raises(AttributeError): run('profile_step.py', *flags, '--again')


def test_the_parts_of_a_step(run):
    _, rows = run('profile_step.py', '--shapes', 'tiny', '--rounds', '1')
    took = {r['contender']: r['seconds'][0] for r in rows}
    assert took['products'] > 0 and took['attention backward'] > 0 and took['optimizer'] > 0
    assert took['other'] < .2*sum(took.values())  # operations that no group claims


def test_writing_beside_others(run, without_peers):
    said, rows = run('peers_generate.py', '--shapes', 'tiny', '--rounds', '1', '--contenders', 'ours,ours bf16,ours int8,hf bf16,litgpt bf16,llama.cpp f16')
    row = {r['contender']: r for r in rows}
    assert row['ours']['first'] == 128 and all(len(row[name]['seconds']) == 1 for name in ('ours', 'ours bf16', 'ours int8', 'hf bf16'))
    assert [r['contender'] for r in rows if 'missing' in r] == ['litgpt bf16', 'llama.cpp f16']


def test_others_have_our_weights(monkeypatch):
    import torch
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers_generate as p
    shape, _ = p.shape_of('tiny')
    ids = torch.tensor([p.prompt_of(shape)])
    with torch.no_grad(): torch.testing.assert_close(p.hf_copy(shape)[0](ids).logits, p.fresh(shape)(ids), rtol=1e-3, atol=1e-3)


def test_weights_for_llama_cpp(monkeypatch):
    "Names and places by hand: numbers i and i+D/2 of a head, which turn together, come to stand side by side"
    import torch
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers_generate as p
    assert p.gguf_name('model.layers.11.self_attn.q_proj.weight') == 'blk.11.attn_q.weight' and p.gguf_name('model.norm.weight') == 'output_norm.weight'
    assert p.turned(torch.arange(8)[:, None].float(), 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_reading_is_measured(run):
    said, rows = run('data_speed.py', '--megabytes', '.1', '--vocab_size', '500', '--sizes', '1,2', '--shapes', 'tiny', '--rounds', '1')
    row = {(r['shape'], r['contender']): r for r in rows}
    assert row['prepare', 'prepare']['amount'] == row['prepare', 'sentencepiece']['amount'] > 20_000  # the same tokens
    assert row['growth', 'reading, 2 MB']['allocated'] > 0 and '| 2 MB |' in said
    assert row['share tiny', 'reading']['amount'] == 100*8*256 and row['share tiny', 'step']['amount'] == 4*8*256  # a hundred batches, four steps


def test_the_tables_say_what_the_rows_say(run, tmp_path):
    stamp = dict(threads=1, machine='a machine', date='2026-01-01', load=0.)
    rows = [dict(set='train', shape='small', contender='products fp32', amount=1000, unit='operations', seconds=[1., 2., 1.]),
            dict(set='train', shape='small', contender='ours', amount=100, unit='tokens', seconds=[1., 2., 4.], work=2, limit='products fp32', params=3e6),
            dict(set='train', shape='small', contender='another', amount=100, unit='tokens', seconds=[3., 4., 4.], work=2, limit='products fp32', params=3e6),
            dict(set='train', shape='small', contender='a third', missing='it is not installed')]
    (tmp_path/'rows.jsonl').write_text('\n'.join(json.dumps(dict(r, **stamp)) for r in rows) + '\n')
    said, _ = run('speed.py', '--table')
    assert '| ours | 50 (25 to 100) |  | 20% | 3.0 M |' in said               # 200 of 1000, 100 of 500, 50 of 1000
    assert '| another | 25 (25 to 33) | 2.00 (1.00 to 3.00) | 7% | 3.0 M |' in said
    assert '| a third | it is not installed | | | |' in said


def test_all_of_the_gpu_benchmark_runs(tmp_path):
    "In miniature on the CPU: every part leaves its rows, and all that it checks holds"
    env = dict(os.environ, PYTHONPATH=str(FOLDER.parent), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, FOLDER/'gpu.py', '--device', 'cpu', '--mini', '--out', tmp_path/'gpu'], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in (tmp_path/'gpu.jsonl').read_text().splitlines()]
    assert done.returncode == 0, [r for r in rows if r.get('ok') is False or r['what'] == 'FAILED'] or done.stderr[-1000:]
    assert {r['part'] for r in rows} == set(runpy.run_path(str(FOLDER/'gpu.py'), run_name='imported')['PARTS'])
    assert sum(r.get('ok', False) for r in rows) >= 30
    assert (tmp_path/'gpu.md').read_text().count('\n## ') == len({r['part'] for r in rows})


def test_a_small_text_learned_in_several_ways(run, tmp_path, monkeypatch, capfd):
    "One row in a process of its own, which says how far it is; a row that stands there is not run again, and one that answers for others is their mean"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    text = Path(__file__).with_name('test_options.py').read_text()
    (tmp_path/'train.txt').write_text(text[:20_000]), (tmp_path/'valid.txt').write_text(text[20_000:24_000])
    def rows(names, *more):
        with pytest.raises(SystemExit) as e: run('quality.py', '--data', str(tmp_path), '--work', str(tmp_path/'work'), '--mini', '--jobs', '2', '--rows', names, *more)
        assert not e.value.code
        return [json.loads(line) for line in (tmp_path/'rows.jsonl').read_text().splitlines()]
    (first,) = rows('final')
    assert re.findall(r'final at [\d:]+: (\w+)', capfd.readouterr().err) == ['pass', 'trained']
    assert first['curve'][-1] != round(first['blocks']['bits_per_byte'], 4)  # `valid.txt` is read at the end alone
    assert first['epochs'] == 1 == len(first['curve']) and 1 < first['blocks']['bits_per_byte'] < 8 and first['window'] != first['blocks']
    import numpy as np
    nats = np.load(tmp_path/'work'/'final.npy')
    for n in (1, 2, 3): np.save(tmp_path/'work'/f'final@{n}.npy', nats + n/10)
    together = rows('final,final-ensemble,final-again')[1:]
    gain = -np.log(np.mean(np.exp([-.1*n for n in range(4)])))*len(nats)/np.log(2)/4000
    again, together = sorted(together, key=lambda r: 'ensemble' in r['row'])
    assert again['row'] == 'final-again' and again['settings']['teachers'] == ['final'] and again['epochs'] == 1 and again['window'] != first['window']
    for n in (1, 2, 3): shutil.copy(tmp_path/'work'/'final.pt', tmp_path/'work'/f'final@{n}.pt')
    taught = rows('final-taught', '--compile', '--minutes', '.002', '--samples', '3', '--dynamic', '.0005', '.001')[-1]  # as for a GPU
    assert taught['row'] == 'final-taught' and len(taught['settings']['teachers']) == 4 and len(taught['samples']) == 3 and all(taught['samples'])
    assert taught['dynamic'].keys() == {'0.0005', '0.001'} and all(d['bits_per_byte'] != taught['window']['bits_per_byte'] for d in taught['dynamic'].values())
    with pytest.raises(SystemExit, match="final-tought is not a row; did you mean 'final-taught'"): run('quality.py', '--data', str(tmp_path), '--work', str(tmp_path/'work'), '--rows', 'final-tought')
    assert together['row'] == 'final-ensemble' and abs(together['window']['bits_per_byte'] - first['window']['bits_per_byte'] - gain) < 1e-4


@pytest.fixture
def q(monkeypatch):
    "`quality.py` as a module"
    monkeypatch.syspath_prepend(str(FOLDER))
    import quality
    return quality


def test_seeds_of_a_row(q):
    "`NAME@2` differs in its seed alone; the table has their mean and the deviation of one"
    from dataclasses import replace
    plain = SimpleNamespace(mini=False, final=False)
    assert q.chosen(plain, 'few@2') == replace(q.FEW, seed=2) and q.chosen(plain, 'few') == q.FEW and q.chosen(plain, 'half-hour').final
    assert q.chosen(SimpleNamespace(mini=False, final=True), 'few@2') == replace(q.FEW, seed=2, final=True)
    def row(name, bits): return dict(row=name, settings=dict(final=False), parameters=1_250_000, epochs=3.5, window=dict(bits_per_byte=bits, word_perplexity=9.), train_loss=2.)
    lines = q.table([row('few', 1.), row('other', 3.), row('few@1', 1.2), row('few@2', 1.4)]).splitlines()[2:]
    assert lines[0].startswith('| few | 3 | split | 1.2 M | 3.5 ± 0 |  | 1.2000 ± 0.2000 |  |  | 9.00 ± 0.00 |') and lines[1].startswith('| other | 1 | split | 1.2 M | 3.5 |  | 3.0000 |  |')
    few = [row('few', 2.), row('few@1', 4.), row('few-wd-3', 2.2), row('few-wd-3@1', 4.8), row('few-ema@1', 3.9), row('few-untied@2', 1.), row('small-ema', 1.)]
    assert {name: round(b, 9) for name, b in q.against(few).items()} == {'few-wd-3': 10., 'few-wd-3@1': 20., 'few-ema@1': -2.5}
    assert [line.split(' | ')[7] for line in q.table(few).splitlines()[2:]] == ['', '+15.00 ± 7.07', '-2.50', '', '']
    ended = dict(row('few-wd-3-final', 1.), settings=dict(final=True))  # judged by another text
    assert q.against([*few, ended]) == q.against(few) and q.table([row('few', 2.), ended]).splitlines()[-1].split(' | ')[2:8] == ['valid', '1.2 M', '3.5', '', '1.0000', '']


def test_steps_that_fit_into_a_time(q, monkeypatch):
    "By hand: six steps of nine seconds are left out, those of two seconds after them are timed for a fiftieth of the time, but six at least; a twentieth is for evaluations"
    taken = []
    monkeypatch.setattr(q, 'take_step', lambda model, opt, parts, loop, step: taken.append(9 if step < 6 else 2))
    monkeypatch.setattr(q, 'time', SimpleNamespace(perf_counter=lambda: sum(taken)))
    def steps(minutes):
        taken.clear()
        return q.fitting(SimpleNamespace(minutes=minutes), q.FEW, SimpleNamespace(init_weights=lambda: None), None, None, None), len(taken)
    assert steps(100) == (int(6000/1.05/2), 6 + 60) and steps(1) == (int(60/1.05/2), 6 + 6)


def test_a_text_told_anew(q, tmp_path):
    "Articles in another order, or cut into other pieces: every epoch another one, the same again for the same epoch, and always the same text"
    import numpy as np
    from dataclasses import replace
    from continual_llm.data import prepare
    from continual_llm.tokenizer import train_tokenizer
    bodies = [f' = Title {n} = \n \n {"the cat sat on the mat and the dog did not . " * (n+1)}\n = = Part = = \n \n a part of {n} .\n' for n in range(5)]
    (tmp_path/'text.txt').write_text('\n'.join(bodies))
    tok = train_tokenizer(tmp_path/'text.txt', vocab_size=310)
    train = prepare(str(tmp_path/'text.txt'), tok, tmp_path/'cache')
    ids = np.asarray(train.ids)
    parts = q.articles(ids, train.doc_starts, tok)
    assert len(parts) == 5 and [tok.decode(p.tolist()).strip().split(' = ')[0] for p in parts] == [f'= Title {n}' for n in range(5)]
    assert q.telling(q.Row(), ids, train.doc_starts, tok) is None
    tell = q.telling(q.Row(reshuffle=True), ids, train.doc_starts, tok)
    assert sorted(tell(1).tolist()) == sorted(ids.tolist()) and all(p.tobytes() in tell(1).tobytes() for p in parts) and not np.array_equal(tell(1), tell(2)) and np.array_equal(tell(1), tell(1))
    tell = q.telling(replace(q.Row(), bpe_dropout=.3), ids, train.doc_starts, tok)
    bodies = [tok.decode(p.tolist()) for p in parts]
    turned = [''.join(bodies[k:] + bodies[:k]) for k in range(5)]
    begun = [next(k for k in range(5) if turned[k].startswith(tok.decode(tell(e).tolist()))) for e in range(6)]  # each pass a part of the text, from one article or another on
    assert len(tell(0)) == len(ids) and len(tok.decode(tell(0).tolist())) > 100 and len(set(begun)) > 1 and not np.array_equal(tell(0), ids) and np.array_equal(tell(3), tell(3))


def test_a_guided_optimizer(q):
    "The decay takes its course and the mean follows the weights, by hand: shares of 0, two and four thirds of the decay; a mean that keeps six tenths, once it is old enough"
    import torch
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    opt = q.Guided(torch.optim.SGD(model.parameters(), lr=.1, weight_decay=.5), model, .6, 0., q.COURSES['rising'], 3)
    weights = [1.]
    for step in range(3):
        model.weight.grad = torch.zeros(1, 1)
        opt.step()
        weights.append(weights[-1]*(1 - .1*.5*2*step/3))
        assert model.weight.item() == pytest.approx(weights[-1])
    mean = 1.
    for n, w in enumerate(weights[1:], 1): mean += (w - mean)*max(.4, 1/(n+1))
    opt.swap()
    assert model.weight.item() == pytest.approx(mean) != pytest.approx(weights[-1])
    opt.swap()
    assert model.weight.item() == pytest.approx(weights[-1])


def test_a_mean_of_the_late_weights(q):
    "Until the share of the steps begins, the weights themselves; then the plain mean of those since"
    import torch
    model = torch.nn.Linear(1, 1, bias=False)
    opt, since = q.Guided(torch.optim.SGD(model.parameters(), lr=1.), model, 0., .4, q.COURSES['even'], 5), []
    for step in range(5):
        model.weight.grad = torch.full((1, 1), -float(step+1))
        opt.step()
        now = model.weight.item()
        since = (since if step > 3 else []) + [now]
        opt.swap()
        assert model.weight.item() == pytest.approx(sum(since)/len(since))
        opt.swap()
        assert model.weight.item() == now
    assert len(since) == 2


@pytest.mark.parametrize('what', ['smoothing', 'teachers', 'none'])
@pytest.mark.parametrize('size', [2, 1], ids=['usual', 'last'])
def test_what_is_asked_for_is_the_same_compiled(q, monkeypatch, what, size):
    "A target spread over all pieces, or shared with another model, by hand; also where the model is compiled and its loss is made outside"
    import torch
    from dataclasses import replace
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: f)
    row = replace(q.ROWS['base'], **q.MINI, attn_dropout=0., dropout=0., word_drop=0., smoothing=.2*(what == 'smoothing'), taught=.25)
    torch.manual_seed(0)
    teachers = [q.Student(replace(row, smoothing=0.)).eval() for _ in range(2*(what == 'teachers'))]
    model, ids = q.Student(row).train(), torch.randint(row.vocab, (size, 9))
    for m in (model, *teachers): m.embed.weight.data *= 20  # so that what they say differs
    x, y = ids[:, :-1], ids[:, 1:]
    logs, true = model.logits(model.hidden(x)).detach().double().log_softmax(-1), torch.nn.functional.one_hot(y, row.vocab)
    asked = .8*true + .2/row.vocab if what == 'smoothing' else true
    if teachers: asked = .75*true + .25*sum(t(x).detach().double().softmax(-1) for t in teachers)/2
    expected = -(asked*logs).sum()
    for compiled in (True, False):
        loss, n = q.loss_of(model, SimpleNamespace(batch_size=2), teachers, compiled)(model, (x, y))
        assert n == y.numel() and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = -(true*logs).sum().item()
    assert (expected.item() == pytest.approx(plain, rel=1e-3)) == (what == 'none')
    assert model.eval()(x, targets=y, reduction='sum').item() == pytest.approx(plain, rel=1e-5)


def test_what_a_teacher_costs(q, monkeypatch):
    "Each teacher reads once in a step; a clock that counts its readings"
    import torch
    from dataclasses import replace
    import teacher_cost
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: f)
    readings, hidden = [], q.ContinualLLM.hidden
    monkeypatch.setattr(q.ContinualLLM, 'hidden', lambda self, *a, **kw: readings.append(1) or hidden(self, *a, **kw))
    def taken(step, device):
        readings.clear()
        assert step().item() > 0
        return 2 + len(readings)
    monkeypatch.setattr(teacher_cost, 'taken', taken)
    assert teacher_cost.cost(replace(q.ROWS['few'], **q.MINI), 1, torch.device('cpu')) == ({1: 1.5, 4: 3.}, 2)


def test_values_of_the_first_layer(q):
    "Half of each layer's values are the first layer's when training begins; the model trains, and reads token by token what it reads at once"
    import torch
    from dataclasses import replace
    from continual_llm.attention import KVCache
    row = replace(q.FEW, **dict(q.MINI, n_layers=2), values=True)
    model, ids = q.Student(row), torch.arange(12).view(1, 12)
    first, second = [b.attn for b in model.blocks]
    model(ids, targets=ids).backward()
    own = q.Attention.heads(second, x := torch.randn(1, 12, 32), model.cos[:12], model.sin[:12])[2]
    torch.testing.assert_close(second.heads(x, model.cos[:12], model.sin[:12])[2], (own + first.seen)/2)
    assert second.mix.grad.abs() > 0 and model.n_params() == q.Student(replace(row, values=False)).n_params() + 1
    cache, whole = KVCache(row.shape, 1), model.eval()(ids)
    for i in range(12):
        torch.testing.assert_close(model(ids[:, i:i+1], cache)[:, 0], whole[:, i], rtol=1e-4, atol=1e-5)
        cache.advance(1)


def test_troubleshooting_in_miniature(run, tmp_path):
    "Every run leaves a row, and rows that stand are not run again"
    out, _ = run('troubleshooting.py', '--mini', '--results', str(tmp_path/'rows.jsonl'))
    rows = [json.loads(line) for line in (tmp_path/'rows.jsonl').read_text().splitlines()]
    assert len(rows) == 11 == len({r['run'] for r in rows}) and all(r['steps'] > 5 and r['best'] < 6 for r in rows)
    asked = {r['run']: {k: v for k, v in r['asked'].items() if k not in ('epochs', 'warmup_steps', 'early_stopping_patience')} for r in rows}
    assert asked['small-data, decay 3, dropout 0.2'] == dict(recipe='small-data', weight_decay=3., dropout=.2) and asked['plain, a tenth of the rate'] == dict(learning_rate=3e-4) and asked['plain, dropout 0.3'] == dict(learning_rate=3e-3, dropout=.3)
    assert len({(r['best'], r['steps']) for r in rows if 'patience' not in r['run']}) == 7  # in two passes, those of eight and twenty are one, and so are the two warmups
    again, _ = run('troubleshooting.py', '--mini', '--results', str(tmp_path/'rows.jsonl'))
    assert again.splitlines() == out.splitlines()[-len(again.splitlines()):] and len(again.splitlines()) == 13


def test_recipes_in_miniature(run, text):
    "Each is run as it is named, on the same text, and once"
    flags = '--data', str(text), '--mini', '--ways', 'plain;small-data, decay 1'
    out, rows = run('recipes.py', *flags)
    plain, small = rows
    assert plain['asked'] == {} and small['asked'] == dict(recipe='small-data', weight_decay=1.) and plain['steps'] == small['steps'] > 1 and plain['bits_per_byte'] != small['bits_per_byte']
    assert all(len(r['curve']) == 2 and r['bits_per_byte'] == pytest.approx(min(c[2] for c in r['curve']), abs=1e-4) for r in rows) and '| plain | ' in out
    again, rows = run('recipes.py', *flags)
    assert len(rows) == 2 and again.splitlines() == out.splitlines()[2:]
    results = text/'rows.jsonl'
    results.write_text(''.join(json.dumps(dict(r, epochs=r['epochs'] + 1) if r['way'] == 'plain' else r) + '\n' for r in rows))
    anew, rows = run('recipes.py', *flags)  # what was learned in other passes is no answer
    assert [r['way'] for r in rows] == ['plain', 'small-data, decay 1', 'plain'] and anew.count('| plain |') == 1
    with pytest.raises(SystemExit, match="--ways: 'plane' is not one of plain; plain, ten times the rate; .*did you mean 'plain'"): run('recipes.py', '--data', str(text), '--mini', '--ways', 'plane')


@pytest.fixture
def beside(monkeypatch):
    "The comparison of quality, as a module"
    monkeypatch.syspath_prepend(str(FOLDER))
    import quality_peers
    return quality_peers


def test_quality_beside_others(run, without_peers, tmp_path, monkeypatch):
    "In miniature: a peer takes the best setting of its longest tries, and is scored as ours is; what stands is not run again"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    text = Path(__file__).with_name('test_options.py').read_text()
    (tmp_path/'train.txt').write_text(text[:20_000]), (tmp_path/'valid.txt').write_text(text[20_000:22_000])
    def tried(rate, minutes, bits): return dict(phase='tune', contender='hf', minutes=minutes, threads=1, epochs=1, tokens_per_second=1, blocks=dict(bits_per_byte=bits),
                                                setting=dict(size='32x1', batch=4, seq_len=32, compiled=False, vocab=500, rate=rate, decay=.1))
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(tried(*t)) + '\n' for t in [(.1, 1, 1.5), (.004, 2, 2.), (.02, 2, 2.5)]))
    def rows(code):
        with pytest.raises(SystemExit) as e: said, _ = run('quality_peers.py', '--data', str(tmp_path), '--work', str(tmp_path/'work'), '--mini', '--minutes', '.002', '--threads', '1', '--above', '', '--ours', 'plain')
        assert e.value.code == code
        return [json.loads(line) for line in (tmp_path/'rows.jsonl').read_text().splitlines()][3:]
    hf, litgpt, ours = rows(False)
    assert hf['setting']['rate'] == .004 and litgpt['missing'] == 'litgpt is not installed' and ours['contender'] == 'ours plain'
    assert hf['steps'] >= 5 and ours['setting']['final']  # all of them learn from the whole text
    for row in (hf, ours): assert 2 < row['window']['bits_per_byte'] < 6 and row['window'] != row['blocks'] and row['trained'] > 0
    assert rows(False) == [hf, litgpt, ours]


def test_settings_are_found_uphill(beside):
    "By hand: as far as it helps in one direction, else in the other; a value of one's own stays"
    seen, start = [], beside.Setting(rate=2e-3, batch=8, decay=.3)
    def loss(s):
        seen.append((s.rate, s.batch, s.decay))
        return abs(s.rate - 8e-3) + abs(s.batch - 4)
    best = beside.climb(start, {name: beside.AXES[name] for name in ('rate', 'batch', 'decay')}, loss)
    assert (best.rate, best.batch, best.decay) == (8e-3, 4, .3)
    assert [s.size for s in beside.above(best, 'size')] == ['384x6'] and not beside.above(best, 'decay')
    assert seen == [(rate, 8, .3) for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)] + [(8e-3, 16, .3), (8e-3, 4, .3)]


def test_a_full_run_goes_by_what_the_last_one_took(beside, tmp_path):
    "A try, by what the first try of its kind had timed; with another shape, or in another time, neither is known"
    from dataclasses import asdict, replace
    setting = beside.Setting()
    def row(phase, pace, trained): return json.dumps(dict(phase=phase, contender='hf', minutes=30., threads=2, clock='wall', setting=asdict(setting), pace=pace, trained=trained, steps=1000))
    (tmp_path/'rows.jsonl').write_text('\n'.join([row('tune', .3, 200.), row('tune', .4, 200.), row('full', .5, 190.), row('full', .5, 180.)]) + '\n')
    def pace(setting, tune=False, minutes=30.): return beside.known_pace(SimpleNamespace(results=tmp_path/'rows.jsonl', threads=2, cpu=False, minutes=minutes, tune=tune), 'hf', setting)
    assert pace(replace(setting, decay=.5)) == .18 and pace(replace(setting, rate=1e-3), tune=True) == .3
    assert pace(replace(setting, size='384x6')) is None and pace(setting, minutes=5.) is None


def test_others_are_scored_as_ours(beside, monkeypatch):
    "The same weights in transformers cost each token the same, in blocks and in windows"
    import numpy as np
    import torch
    import peers_generate as p
    from continual_llm.evaluate import token_nats
    shape, _ = p.shape_of('tiny')
    ids, (model, *_) = np.random.default_rng(0).integers(3, 8000, 600), p.hf_copy(shape)
    theirs = beside.Asked(model, lambda x: model(x, use_cache=False).logits, shape.max_seq_len)
    for stride in (0, 200): torch.testing.assert_close(token_nats(theirs, ids, stride=stride), token_nats(p.fresh(shape), ids, stride=stride), rtol=1e-3, atol=1e-3)


def test_blocks_lose_no_target(beside):
    cut = beside.Cut(range(11), 3)
    assert [b.tolist() for b in (cut[i] for i in range(len(cut)))] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    batch = beside.Shifted(lambda: 0.)([cut[0], cut[2]])
    assert batch['input_ids'].tolist() == [[0, 1, 2], [6, 7, 8]] and batch['labels'].tolist() == batch['shift_labels'].tolist() == [[1, 2, 3], [7, 8, 9]]


def test_how_much_lower_ours_is(beside):
    def row(contender, bits, **setting): return dict(phase='full', contender=contender, minutes=30, threads=2, parameters=2e6, epochs=4, trained=1799.6, tokens_per_second=9000, blocks=dict(bits_per_byte=bits+.1), window=dict(bits_per_byte=bits, word_perplexity=200.),
                                                     setting=dict(rate=.002, batch=8, seq_len=256, decay=.1, **setting))
    said = beside.full_table([row('hf', 1.6, size='256x6'), row('ours plain', 1.55, d_model=256, n_layers=6), row('ours good', 1.44, d_model=256, n_layers=6)])
    assert '| hf | 30 x 2 | 256x6 | 0.002 | 8 x 256 | 0.1 | 2.0 M | 4 | 1,800 | 9,000 | 1.7000 | 1.6000 | 200.00 | 10.0% |' in said
    assert '| ours good | 30 x 2 | 256x6 | 0.002 | 8 x 256 | 0.1 | 2.0 M | 4 | 1,800 | 9,000 | 1.5400 | 1.4400 | 200.00 |  |' in said


@pytest.fixture
def text(tmp_path):
    "What stands for WikiText-2"
    words = 'cat horse hen fox owl elephant mat log hillside road'.split()
    lines = [f'the {a} sat on the {b} and saw the {c} .\n\n' for a in words for b in words for c in words]
    for name in ('train', 'valid'): (tmp_path/f'{name}.txt').write_text(''.join(lines))
    return tmp_path


def test_a_range_test_beside_real_runs(run, text):
    flags = '--data', str(text), '--rates', '.001,.01', '--optimizers', 'muon', '--steps', '2', '--vocab_size', '300'
    said, rows = run('lr_find.py', *flags)
    assert [(r['kind'], r.get('rate')) for r in rows] == [('test', None), ('run', .001), ('run', .01)] and '| muon | ' in said
    assert rows[0]['steepest'] in [pytest.approx(r, rel=.01) for r in rows[0]['rates']] and 3 < rows[1]['loss'] < 6
    assert run('lr_find.py', *flags)[1] == rows


def test_a_plan_beside_its_run(run, text):
    said, rows = run('plan_check.py', '--data', str(text), '--mini', '--minutes', '.05')
    assert '| tiny | 0 | muon | split | wall |' in said and '| tiny | 2 | adamw | split | wall |' in said
    for row in rows:
        assert row['was']['steps'] == row['steps'] > 0
        assert .7 < row['said']['memory']/row['was']['memory'] < 1.4 and .5 < row['said']['disk']/row['was']['disk'] < 2


def test_when_a_text_is_known_by_heart(run, text):
    flags = '--data', str(text), '--cases', 'narrow:20:3e-3', '--epochs', '2', '--vocab_size', '300'
    said, rows = run('overfit.py', *flags)
    assert len(rows[0]['curve']) == 2 and rows[0]['best'] == 2 and not rows[0]['over'] and 4000 < rows[0]['tokens'] < 10_000 and '| narrow | 20 | 0.003 | ' in said
    assert run('overfit.py', *flags)[1] == rows
