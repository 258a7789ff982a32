"The site: nothing is wrong with it, and what would be wrong is found"
import base64, copy, json, os, re, shutil, subprocess
from pathlib import Path
from types import SimpleNamespace
from matplotlib.image import imread
import nbformat.v4 as v4
import nbformat
import pytest
from tests import reference, site

ROOT = Path(__file__).parent.parent
PNG = base64.b64encode(b'\x89PNG\r\n\x1a\n').decode()


def test_nothing_is_wrong(built):
    _, report, problems = built
    assert not problems, '\n'.join(problems)
    assert re.fullmatch(r'\d+ pages with \d+ figures, \d+ symbols documented, [\d,]+ links checked, warnings 0', report)


def test_pages_stand_alone(built):
    "Every page is there with a view for telephones, both themes, maths without scripts, and nothing of another host"
    out, _, _ = built
    assert len(list(out.rglob('*.html'))) == len(site.notebooks(ROOT/'nbs')) + len(reference.modules())
    text = (out/'schedule.html').read_text()
    for part in ('width=device-width', 'prefers-color-scheme', '<math', 'id="search"', 'aria-current', 'href="source/schedule.html#L-', 'nbs/05_schedule.ipynb'): assert part in text
    assert not re.search(r'(src|href)="(https?:)?//', re.sub(r'<a [^>]*>', '', text))
    css = (out/'site.css').read_text()
    assert '[data-theme=dark]' in css and '@media (max-width' in css and 'url(' not in css


def test_the_home_page_leads_to_every_page(built):
    "On the site and in the README, where the table of pages has their names alone"
    out, _, _ = built
    names = re.findall(r'^\| `([\w/]+)` \|', '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/'index.ipynb', 4).cells), re.M)
    assert len(names) == len(site.notebooks(ROOT/'nbs')) - 1
    index, readme = (out/'index.html').read_text(), (ROOT/'README.md').read_text(encoding='utf-8')
    for name in names:
        assert re.search(rf'<a href="[\w/]+\.html"><code>{name}</code></a>', index), name
        target = re.search(rf'\[`{name}`\]\((\S+)\)', readme)[1]
        assert (ROOT/target).is_file()


def test_search_finds_symbols_and_sections(built):
    out, _, _ = built
    index = json.loads((out/'search.js').read_text().removeprefix('PAGES = '))
    found = {(url, anchor): head for _, url, _, sections in index for head, anchor, _ in sections}
    assert found['schedule.html', 'lr_at'] == 'lr_at' and found['guard.html', 'guard.note'] == 'Guard.note'
    assert all(anchor for _, anchor in found)


def test_every_page_is_text_too(built):
    "For programs that read: each line of llms.txt leads to a page, and each page has its Markdown beside it"
    out, _, _ = built
    links = re.findall(r'^- \[.+\]\((\S+)\): .+$', (out/'llms.txt').read_text(), re.M)
    assert len(links) == len(site.notebooks(ROOT/'nbs')) and all((out/l).is_file() and (out/f'{l}.md').is_file() for l in links)


def test_the_home_page_shows_a_run():
    "A picture that a browser took, named on the home page and in the README, and light"
    from tests.portrait import PICTURE, over
    text = (ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8')
    assert 'src=\\"images/live.png\\"' in text and 'src="nbs/images/live.png"' in (ROOT/'README.md').read_text(encoding='utf-8')
    assert PICTURE.stat().st_size < 100_000 and imread(PICTURE).shape[1] > 800
    assert [over(t) for t in ('step 360 of 600 · 60%', '1,200 of 2,400 steps', 'Starting')] == [.6, .5, 0.]


def notebook(folder, name, *cells):
    folder.mkdir(exist_ok=True)
    nb = v4.new_notebook(cells=[v4.new_markdown_cell(f'# {name}\n\n> A page'), *cells])
    nbformat.write(nb, folder/f'{name}.ipynb')
    return site.work((folder/f'{name}.ipynb', folder))


def picture(source): return v4.new_code_cell(source, outputs=[v4.new_output('display_data', {'image/png': PNG, 'text/plain': 'a figure'})])


def test_every_fault_is_found(pages, tmp_path):
    "Faults planted on pages, and exactly these found"
    table = v4.new_markdown_cell('| a |\n|---|\n| 1 |')
    planted = [
        notebook(tmp_path/'nbs', 'zz_links', table, v4.new_markdown_cell('[a](nowhere.ipynb) [b](04_model.ipynb#nothing) [c](#nothing) [d](05_schedule.ipynb#lr_at)')),
        notebook(tmp_path/'nbs', 'zz_bare', picture('fig, ax = plt.subplots()')),
        notebook(tmp_path/'nbs', 'zz_said', picture('#| label: fig-a\n#| fig-cap: "One"\n#| fig-alt: "A line"\nfig, ax = plt.subplots()')),
        notebook(tmp_path/'nbs', 'zz_twice', *[picture('#| label: fig-a\n#| fig-cap: "One"\n#| fig-alt: "A line"\nfig, ax = plt.subplots()') for _ in range(2)]),
        notebook(tmp_path/'nbs', 'zz_shown', table, v4.new_markdown_cell('[`lr_at`](05_schedule.ipynb) with --resume and ** this**')),
        notebook(tmp_path/'nbs', 'zz_words', v4.new_markdown_cell('Words alone')),
        notebook(tmp_path/'nbs', 'zz_raw', v4.new_markdown_cell('<img src="images/none.png">'), v4.new_markdown_cell('<img src="https://example.org/a.png" alt="a">')),
        notebook(tmp_path/'nbs', 'zz_warned', table, v4.new_markdown_cell('::: {.note}\nnever closed')),
    ]
    known = copy.deepcopy(pages)
    next(p for p in known if p.source == '05_schedule.ipynb').entries.remove('lr_at')
    _, problems = site.build(tmp_path/'site', known + planted)
    assert sorted(p for p in problems if 'no section of the sidebar' not in p and not p.startswith('zz_warned')) == sorted([
        'zz_links.ipynb: the link nowhere.ipynb leads nowhere',
        'zz_links.ipynb: the link model.html#nothing has no such anchor',
        'zz_links.ipynb: the link #nothing has no such anchor',
        'zz_bare.ipynb: cell 2 has a figure without `#| fig-alt:`',
        'zz_twice.ipynb: two figures are labelled fig-a',
        "zz_shown.ipynb: the text shows '](/schedule.html#lr_at)'",
        "zz_shown.ipynb: the text shows '–resume and ** this**'",
        'zz_words.ipynb: no figure and no table',
        'zz_raw.ipynb: the link images/none.png leads nowhere',
        'zz_raw.ipynb: loads https://example.org/a.png from another host',
        'zz_raw.ipynb: no alternative text for images/none.png',
        'schedule.lr_at is on no page: its cell is hidden, or nbdev_export was not run'])
    assert len([p for p in problems if 'no section of the sidebar' in p]) == len(planted)
    assert any(p.startswith('zz_warned.ipynb: [WARNING] ') for p in problems)


@pytest.mark.parametrize('name', ['README.md', 'nbs/llms.txt'])
def test_a_file_that_the_pages_do_not_say_is_found(name, tmp_path):
    (tmp_path/'nbs').mkdir()
    for n in ('README.md', 'nbs/llms.txt'): shutil.copy(ROOT/n, tmp_path/n)
    assert site.drifted(tmp_path) == []
    (tmp_path/name).write_text((tmp_path/name).read_text() + '\n')
    assert site.drifted(tmp_path) == [f'{name} is not what the pages say: run python -m tests.readme']
    (tmp_path/name).unlink()
    assert len(site.drifted(tmp_path)) == 1


def test_the_command_fails_with_its_problems(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(site, 'read_pages', lambda nbs: [])
    monkeypatch.setattr('sys.argv', ['site', '--out', str(tmp_path)])
    monkeypatch.chdir(ROOT)
    for problems, code in ([], 0), (['a page: wrong'], 1):
        monkeypatch.setattr(site, 'build', lambda out, pages: ('1 page', problems))
        with pytest.raises(SystemExit) as e: site.main()
        assert e.value.code == code and capsys.readouterr().out == ('a page: wrong\n1 page; 1 problems\n' if problems else '1 page\n')


SOURCE = '''
def f(
    a:int,      # tokens
                # of a block
    b, c=(1, 2), # both
    *,
    d:str|None=None,
)->float:       # seconds
    "Say `d` in words"
    if a < 0: raise ValueError(f"a={a} is less than 0")

def g(x, tokenizer): # of the body
    return x

def _private(x): pass

@dataclass
class C:
    "Holds a thing"
    n:int=0 # things
    more:list=field(default_factory=list)
    _own:int=0
    @property
    def p(self)->int: return 1
    def m(self, k): "Uses `k`"
'''


def test_a_source_is_read():
    found = reference.read(SOURCE, 'made_up')
    assert list(found) == ['f', 'g', 'C', 'C.p', 'C.m']
    f = found['f']
    assert f.params == [('a', 'a:int', 'tokens of a block'), ('b', 'b', 'both'), ('c', 'c=(1, 2)', 'both'), ('d', 'd:str|None=None', '')]
    assert (f.returns, f.raises, f.line) == (('float', 'seconds'), [('ValueError', 'a={a} is less than 0')], 2)
    assert [p[:2] for p in found['C'].params] == [('n', 'n:int=0'), ('more', 'more:list=list()')] and found['C.p'].kind == 'property'


def test_what_is_not_said_is_found():
    found = reference.read(SOURCE, 'made_up')
    assert {name: e.missing() for name, e in found.items()} == {
        'f': '', 'g': 'has no docstring', 'C': 'has no comment on more', 'C.p': 'has no docstring', 'C.m': ''}


def test_an_entry_says_all_of_it():
    f = reference.markdown(reference.read(SOURCE, 'made_up')['f'])
    for part in ('### f\n', 'continual_llm/made_up.py, line 2', 'f(a, b, c=(1, 2), d=None) -> float', '`a:int`\n:   tokens of a block', '*returns*\n:   seconds', '*raises* `ValueError`\n:   a={a} is less than 0'): assert part in f
    made, warnings = site.pandoc(reference.markdown(reference.Entry('m', 'x', 'function', 1, 'Costs $5 *a* <b> [c]', [('y', 'y:int|None', 'a_b_c')])))
    assert not warnings and 'Costs $5 *a* &lt;b&gt; [c]' in made and 'a_b_c' in made and 'y:int|None' in made


def test_pages_lead_to_the_repository_where_it_is_known(monkeypatch):
    "Edit links and sources on the host that settings.ini names; without one, the names of the files"
    page = site.Page('05_schedule.ipynb', 'Schedule', '', 'schedule.html')
    entry = reference.entries('schedule')['lr_at']
    assert 'href' not in site.edit_line(page) and 'nbs/05_schedule.ipynb' in site.edit_line(page)
    monkeypatch.setattr('nbdev.config.get_config', lambda: SimpleNamespace(git_url='https://github.com/someone/continual_llm/', branch='main'))
    assert 'href="https://github.dev/someone/continual_llm/blob/main/nbs/05_schedule.ipynb"' in site.edit_line(page)
    assert f'[source](https://github.com/someone/continual_llm/blob/main/continual_llm/schedule.py#L{entry.line}){{.source}}' in reference.markdown(entry)


@pytest.mark.parametrize('base', ['', '/continual_llm'])
def test_the_workflow_says_where_everything_is(base, tmp_path):
    "The one step of the workflow that is ours, on copies: settings and Quarto's file get the addresses that they leave open here"
    import yaml
    from configparser import ConfigParser
    steps = yaml.safe_load((ROOT/'.github'/'workflows'/'docs.yml').read_text())['jobs']['docs']['steps']
    step = next(s for s in steps if 'sed' in s.get('run', ''))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, tmp_path)
    env = dict(os.environ, ORIGIN='https://someone.example', BASE=base, GITHUB_SERVER_URL='https://github.com', GITHUB_REPOSITORY='someone/continual_llm')
    subprocess.run(['bash', '-e', '-c', step['run']], cwd=tmp_path, env=env, check=True)
    ini = ConfigParser(delimiters=['='])
    ini.read(tmp_path/'settings.ini')
    assert [ini['DEFAULT'][k] for k in ('git_url', 'doc_host', 'doc_baseurl')] == ['https://github.com/someone/continual_llm', 'https://someone.example', base or '/']
    quarto = yaml.safe_load((tmp_path/'_quarto.yml').read_text())
    assert quarto['website'].pop('repo-actions') == ['edit', 'source', 'issue'] and quarto['website'].pop('repo-subdir') == 'nbs'
    assert quarto == yaml.safe_load((ROOT/'_quarto.yml').read_text())  # which asks for no links to a repository that it does not know: Quarto would warn


def test_quarto_reads_one_sidebar():
    "nbdev writes none of its own, whose pages Quarto would add to ours; what it copies and asks for is there"
    import yaml
    from nbdev.config import get_config
    assert get_config(path=ROOT).custom_sidebar
    pointer = yaml.safe_load((ROOT/'nbs'/'_quarto.yml').read_text())
    assert [name for name in pointer['metadata-files'] if not (ROOT/'nbs'/name).is_file()] in ([], ['nbdev.yml'])  # which nbdev writes
    assert all((ROOT/'nbs'/name).is_file() for name in yaml.safe_load((ROOT/'_quarto.yml').read_text())['project']['resources'])
