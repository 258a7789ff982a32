"What a person sees: JupyterLab and the site in Chromium, watched from outside"
import io, json, tempfile
from pathlib import Path
import pytest
from matplotlib.image import imread
from continual_llm.checkpoint import Checkpoints, load_checkpoint
from continual_llm.generate import generate, load_model
from tests.browser import ROOT, Book, Lab, Visit, browser, chromium, notebook, outputs, picture, serve, wait_for

pytestmark = pytest.mark.skipif(not chromium(), reason='no Chromium here: apt-get install chromium')
TINY = "config='tiny', vocab_size=600, max_seq_len=64, warmup_steps=20, epochs=1, eval_every=20, eval_tokens=5000"


def told(folder, kind):
    "The records of a kind that a run has written so far"
    path = folder/'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').split('\n')[:-1] if path.exists() else []
    return [r for line in lines if (r := json.loads(line))['kind'] == kind]


@pytest.fixture(scope='module')
def place():
    with tempfile.TemporaryDirectory() as d: yield Path(d)


@pytest.fixture(scope='module')
def chrome(place):
    with browser(place/'browser') as b: yield b


@pytest.fixture(scope='module')
def lab(place):
    with Lab(place/'lab') as l: yield l


def live(seen): return [f for f in seen['frames'] if f['busy'] and f['bar'] is not None]


@pytest.fixture(scope='module')
def lesson(lab, chrome):
    "A first lesson: a notebook that trains on the text that every Python carries, watched for a while and then interrupted"
    notebook(lab.work/'lesson.ipynb', 'import continual_llm\nfrom continual_llm.train import pretrain\nprint(continual_llm.__file__)',
             f"run = pretrain('builtin:english', {TINY}, save_dir='lesson')")
    book = Book(lab, chrome, 'lesson.ipynb')
    book.watch()
    book.run()
    wait_for(lambda: len(seen := live(book.seen())) >= 8 and 'Sample after step' in seen[-1]['said'], 'lively figure', 400, book.text)
    book.command('notebook:interrupt-kernel')
    book.finish()
    return book


def test_the_figure_changes_while_it_trains(lesson, lab):
    "At least five times before the cell has its number, one picture at a time, while the bar grows and the text tells more; and interrupting ends it well"
    seen = lesson.seen()
    drawn, bars = [f['drawn'] for f in live(seen)], [f['bar'] for f in live(seen)]
    assert len(set(drawn)) == len(drawn) >= 8 and seen['most'] == 1
    assert bars == sorted(bars) and 0 < bars[0] < bars[-1] <= 100
    assert all('tokens/s' in f['said'] for f in live(seen)[1:])
    assert str(ROOT/'continual_llm') in lesson.text()  # and it was this package
    assert [r['stopped'] for r in told(lab.work/'lesson', 'done')] == ['SIGINT']


def test_the_last_picture_stays_in_the_notebook(lesson, lab):
    "In the saved file, with words, and on the page that is loaded from it without the kernel that drew it"
    last = lesson.seen()['frames'][-1]['drawn']
    assert imread(io.BytesIO(picture(last))).shape[1] > 500
    lesson.save()
    said = outputs(lab.work/'lesson.ipynb')
    assert [o['data']['image/png'].strip() for o in said if 'image/png' in o.get('data', {})] == [last.partition(',')[2]]
    assert not any(o['output_type'] == 'error' for o in said)
    lesson.leave()
    lesson.open()
    lesson.until("() => [...document.querySelectorAll('.jp-OutputArea-output img')].some(i => i.complete && i.naturalWidth)", 'picture')
    shown = lesson.tab.locator('.jp-OutputArea-output img')
    assert shown.count() == 1 and shown.get_attribute('src') == last and shown.bounding_box()['width'] > 300


@pytest.fixture(scope='module')
def steered(lab, chrome):
    "A run that a person takes part in, button by button, each pressed once the last one was answered: (notebook, folder)"
    asked = TINY.replace('epochs=1', 'epochs=5') + ", schedule='wsd', early_stopping_patience=0, panel=True"
    notebook(lab.work/'steered.ipynb', 'from continual_llm.train import pretrain', f"run = pretrain('builtin:english', {asked}, save_dir='steered')\nprint(run.stopped)")
    book, folder = Book(lab, chrome, 'steered.ipynb'), lab.work/'steered'
    button = lambda css: book.tab.locator(f'.cl-{css}')
    def press(css):
        before = len(told(folder, 'action'))
        button(css).click()
        wait_for(lambda: len(told(folder, 'action')) > before, f'answer to {css}', said=book.text)
        return told(folder, 'action')[-1]['step']
    book.run()
    wait_for(lambda: len(told(folder, 'step')) > 25, 'steps', said=book.text)  # the rate is at its peak, where it stays
    held = press('pause')
    wait_for(lambda: 'Go on' in button('pause').inner_text(), 'button to go on')
    for css in ('evaluate', 'rate-half'): press(css)
    button('prompt').locator('input').fill('def ')
    press('sample')
    wait_for(lambda: [r for r in told(folder, 'sample') if r['text'].startswith('def ')], 'sample', said=book.text)
    book.tab.wait_for_timeout(1000)  # in which a run that is not held would go on
    assert [r['step'] for r in told(folder, 'step')][-1] == held - 1
    press('pause')
    wait_for(lambda: len(told(folder, 'step')) > held + 5, 'steps after the pause', said=book.text)
    press('rate-double')
    press('stop')
    book.finish()
    return book, folder, held


def test_what_was_pressed_is_on_the_record(steered):
    "In the order of the buttons, in metrics.jsonl and in run.json, and it was done"
    book, folder, held = steered
    done = told(folder, 'action')
    assert [(a['action'], a.get('factor'), a.get('prompt')) for a in done] == [('pause', None, None), ('evaluate', None, None), ('rate', .5, None), ('sample', None, 'def '),
        ('go on', None, None), ('rate', 2., None), ('stop', None, None)]
    assert json.loads((folder/'run.json').read_text())['actions'] == [{k: v for k, v in a.items() if k != 'kind'} for a in done]
    assert [a['step'] for a in done[:5]] == [held]*5 and held < done[5]['step'] <= done[6]['step']
    assert held in [r['step'] for r in told(folder, 'eval')]
    rate = {r['step']: r['lr'] for r in told(folder, 'step')}
    assert list(rate) == list(range(done[6]['step']))
    assert all(r == rate[held-1]*(.5 if held <= s < done[5]['step'] else 1) for s, r in rate.items() if s > 20)
    assert told(folder, 'done')[0]['stopped'] == 'request' and book.text().rstrip().endswith('request')


def test_what_was_stopped_is_whole_on_disk(steered):
    "The newest state is the one of the step at which it stopped, it verifies, and so does the best model, which writes"
    _, folder, held = steered
    state, _, skipped = Checkpoints(folder).latest()
    assert state['step'] == told(folder, 'action')[-1]['step'] > held and not skipped
    best = load_checkpoint(folder/'best'/'checkpoint.pt')
    assert best['step'] in [r['step'] for r in told(folder, 'eval')]
    model, tokenizer = load_model(folder)[:2]
    assert generate(model, tokenizer, 'The ', max_tokens=4)


def test_the_panel_leaves_words_behind(steered, lab):
    "No button that does nothing any more; what was done is said in the saved notebook, beside the last picture"
    book, _, held = steered
    assert book.tab.locator('.cl-panel').count() == 0
    book.save()
    said = [o.get('data', {}) for o in outputs(lab.work/'steered.ipynb')]
    assert not any('widget' in kind for data in said for kind in data)
    assert sum('image/png' in data for data in said) == 1
    assert any(f'step {held}: pause' in ''.join(data.get('text/plain', '')) for data in said)


@pytest.fixture(scope='module')
def visits(built, chrome):
    "Every page of the site, opened, unfolded, and narrowed to a phone: {page: what was seen}, and the visitor"
    site = built[0]
    with serve(site) as home:
        visit, seen = Visit(chrome), {}
        for path in sorted(site.rglob('*.html')):
            name = path.relative_to(site).as_posix()
            visit.tab.set_viewport_size(dict(width=1280, height=900))
            seen[name] = dict(visit.look(home + name), phone=visit.width(390))
        return seen, [a for a in visit.asked if not a.startswith((home, 'data:'))], visit.wrong


def test_every_page_of_the_site_is_whole(visits, built):
    "Its pictures load, its maths is drawn, no TeX is left over, and the console is silent"
    seen, _, wrong = visits
    assert not wrong
    assert [(name, p) for name, s in seen.items() for p in s['pictures'] if not p['whole'] or min(p['size']) < 40] == []
    assert [(name, m) for name, s in seen.items() for m in s['math'] if min(m['size']) < 3] == []
    assert [(name, s['tex']) for name, s in seen.items() if s['tex']] == []
    for part, tag, least in (('pictures', '<img', 50), ('math', '<math', 50)):
        assert least < sum(len(s[part]) for s in seen.values()) == sum(p.read_text(encoding='utf-8').count(tag) for p in built[0].rglob('*.html'))


def test_no_other_host_is_asked(visits): assert visits[1] == []


def test_every_page_fits_a_phone(visits):
    "Nothing but what scrolls by itself is wider than the window"
    assert {name: s['phone'] for name, s in visits[0].items() if s['phone'] > 390} == {}


def test_search_theme_and_menu(built, chrome):
    "What a reader types finds a page, darkness stays when they go there, and the menu of a phone opens"
    with serve(built[0]) as home:
        visit = Visit(chrome, viewport=dict(width=390, height=844))
        tab = visit.tab
        tab.goto(home + 'index.html')
        paper = "() => getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(paper)
        tab.click('#theme')
        dark = tab.evaluate(paper)
        assert light != dark
        tab.fill('#search', 'perplexity')
        tab.locator('#found a', has_text='perplexity').first.click()
        tab.wait_for_url('**/metrics.html#*')
        assert tab.evaluate(paper) == dark and tab.locator('#perplexity').is_visible()
        assert not tab.locator('nav.side').is_visible()
        tab.click('#menu')
        tab.locator('nav.side a', has_text='History').click()
        tab.wait_for_url('**/history.html')
        assert not visit.wrong
