"What a person sees: JupyterLab and the site in Chromium, watched from outside"
import io, json, tempfile
from pathlib import Path
import pytest
from matplotlib.image import imread
from tests.browser import ROOT, Book, Lab, browser, chromium, notebook, outputs, picture

pytestmark = pytest.mark.skipif(not chromium(), reason='no Chromium here: apt-get install chromium')
TINY = "config='tiny', vocab_size=600, max_seq_len=64, warmup_steps=20, epochs=1, eval_every=60, eval_tokens=5000"


@pytest.fixture(scope='module')
def place():
    with tempfile.TemporaryDirectory() as d: yield Path(d)


@pytest.fixture(scope='module')
def chrome(place):
    with browser(place/'browser') as b: yield b


@pytest.fixture(scope='module')
def lab(place):
    with Lab(place/'lab') as l: yield l


@pytest.fixture(scope='module')
def lesson(lab, chrome):
    "A first lesson: a notebook that trains on the text that every Python carries, watched until it is done"
    notebook(lab.work/'lesson.ipynb', 'import continual_llm\nfrom continual_llm.train import pretrain\nprint(continual_llm.__file__)',
             f"run = pretrain('builtin:english', {TINY}, max_steps=250, save_dir='lesson')")
    book = Book(lab, chrome, 'lesson.ipynb')
    book.watch()
    book.run()
    book.finish()
    return book


def test_the_figure_changes_while_it_trains(lesson, lab):
    "At least five times before the cell has its number, one picture at a time, each another one and each whole"
    seen = lesson.seen()
    frames = [f['src'] for f in seen['frames'] if f['busy']]
    live = [f for f in frames if not f.startswith('data:')]
    assert len(set(live)) == len(live) >= 6, f'{len(live)} frames\n{lesson.text()}'
    assert seen['most'] == 1
    assert all('<svg' in f and 'tokens/s' in f and 'of 250' in f for f in live)
    assert {imread(io.BytesIO(picture(f['src']))).shape[2] for f in seen['frames'] if f['src'].startswith('data:')} == {4}
    assert str(ROOT/'continual_llm') in lesson.text()  # and it was this package
    kinds = [json.loads(line)['kind'] for line in (lab.work/'lesson'/'metrics.jsonl').read_text().splitlines()]
    assert kinds.count('step') == 250 and kinds[-1] == 'done'


def test_the_last_picture_stays_in_the_notebook(lesson, lab):
    "In the saved file, and on the page that is loaded from it without the kernel that drew it"
    last = lesson.seen()['frames'][-1]['src']
    lesson.save()
    said = outputs(lab.work/'lesson.ipynb')
    assert [o['data']['image/png'].strip() for o in said if 'image/png' in o.get('data', {})] == [last.partition(',')[2]]
    assert not any(o['output_type'] == 'error' for o in said)
    lesson.leave()
    lesson.open()
    lesson.until("() => [...document.querySelectorAll('.jp-OutputArea-output img')].some(i => i.complete && i.naturalWidth)", 'picture')
    shown = lesson.tab.locator('.jp-OutputArea-output img')
    assert shown.count() == 1 and shown.get_attribute('src') == last and shown.bounding_box()['width'] > 300
