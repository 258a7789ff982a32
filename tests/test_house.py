"The house rules: which page may import which, exports in sync, notebooks clean, a wheel that stands alone"
import ast, json, os, re, shutil, subprocess, sys, tempfile, zipfile
from importlib import metadata
from pathlib import Path
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))
FORBIDDEN = {'loop': {'source', 'data', 'batches', 'tokenizer', 'model', 'attention', 'generate'}}


def cells(page, kind='code'):
    return [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def module_of(page):
    return next(m[1] for s in cells(page) if (m := re.search(r'^#\| default_exp (\w+)', s, re.M)))


ORDER = [module_of(p) for p in PAGES]


def arrows(module):
    "Modules of ours that a module imports, at its top or inside its functions"
    tree, found = ast.parse((ROOT/'continual_llm'/f'{module}.py').read_text(encoding='utf-8')), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'continual_llm'):
            found.add((node.module or '').replace('continual_llm.', ''))
    return found - {'continual_llm', ''}


def test_every_module_has_one_page():
    modules = {p.stem for p in (ROOT/'continual_llm').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize('module', ORDER)
def test_imports_point_back(module):
    later = {m for m in arrows(module) if ORDER.index(m) >= ORDER.index(module)}
    assert not later, f'{module} imports {later}, which come after it'
    assert not arrows(module) & FORBIDDEN.get(module, set())


def test_package_is_what_the_pages_export(tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '_docs', '_proc', 'checkpoints', '*.egg-info', '.venv*', 'build'))
    shutil.rmtree(copy/'continual_llm')
    subprocess.run([sys.executable, '-c', 'from nbdev.export import nb_export\nfrom nbdev.doclinks import nbdev_export\nnbdev_export()'],
                   cwd=copy, check=True, env=dict(os.environ, PYTHONPATH=''))
    for want in sorted((copy/'continual_llm').glob('*.py')):
        assert (ROOT/'continual_llm'/want.name).read_text(encoding='utf-8') == want.read_text(encoding='utf-8'), f'{want.name} differs: run nbdev_export'


def test_notebooks_are_clean(tmp_path):
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    subprocess.run([sys.executable, '-c', 'from nbdev.clean import nbdev_clean\nnbdev_clean()'], cwd=tmp_path, check=True)
    for page in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in page.parts: continue
        assert page.read_bytes() == (tmp_path/'nbs'/page.relative_to(ROOT/'nbs')).read_bytes(), f'{page.name} is not clean: run nbdev_clean'


@pytest.mark.parametrize('page', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_pages_are_notebooks(page): nbformat.validate(nbformat.read(page, as_version=4))


@pytest.mark.parametrize('page', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_pages_are_pages(page):
    "Title and subtitle alone in the first text, saved outputs without errors, small enough to read"
    nb = json.loads(page.read_text(encoding='utf-8'))
    first = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# .+\n\n?> .+', first.strip()), f'{page.name} opens with {first!r}'
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    assert outputs and not any(o['output_type'] == 'error' for o in outputs)
    assert page.stat().st_size < 200_000
    assert 'widgets' not in json.loads(page.read_text())['metadata']  # the state of buttons that are gone


@pytest.mark.parametrize('page', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_figures_have_words(page):
    for source in cells(page):
        drawn = re.search(r'^(fig|fig, axs?|fig, axes) = |plt\.subplots|\.plot\(\)$', source, re.M)
        if drawn and not re.search(r'^#\| (hide|export|exporti)', source, re.M):
            for word in ('#| label: fig-', '#| fig-cap:', '#| fig-alt:'): assert word in source, f'{page.name}: a figure lacks {word}\n{source}'


@pytest.mark.parametrize('page', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_imports_stand_alone(page):
    "Building the site runs every cell that holds an import, and none of those around it"
    for source in cells(page):
        if re.search(r'^#\| (export|eval: false)', source, re.M) or 'nbdev_export()' in source: continue
        tree = ast.parse(re.sub(r'^%.*', '', source, flags=re.M))
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)):
            assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body), f'{page.name}: an import among other code\n{source}'


def public():
    import importlib
    for module in ORDER:
        m = importlib.import_module(f'continual_llm.{module}')
        for name in getattr(m, '__all__', []):
            yield pytest.param(getattr(m, name), id=f'{module}.{name}')


@pytest.mark.parametrize('thing', public())
def test_public_things_are_described(thing):
    if callable(thing): assert (thing.__doc__ or '').strip(), f'{thing} has no docstring'


def runtime_closure():
    "Names of the distributions that our runtime requirements bring"
    from packaging.requirements import Requirement
    todo, seen = [Requirement(r).name for r in metadata.requires('continual_llm') or [] if 'extra ==' not in r], set()
    while todo:
        name = re.sub(r'[-_.]+', '-', todo.pop()).lower()
        if name in seen: continue
        seen.add(name)
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        todo += [Requirement(r).name for r in needs if (not Requirement(r).marker or Requirement(r).marker.evaluate({'extra': ''}))]
    return seen


BLOCK = '''
import sys
refused = set({refused!r})
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in refused: raise ModuleNotFoundError(name + ' is not a runtime dependency')
sys.meta_path.insert(0, Block())
import importlib, pathlib, continual_llm
assert pathlib.Path(continual_llm.__file__).parent.parent == pathlib.Path({where!r}), continual_llm.__file__
for m in {modules!r}: importlib.import_module('continual_llm.' + m)
from continual_llm.cli import main
try: main(['pretrain', '--help'])
except SystemExit as e: assert not e.code
'''


def test_wheel_stands_alone(tmp_path):
    "A wheel holds every module, and imports with the runtime dependencies alone"
    copy = tmp_path/'src'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', 'checkpoints', '*.egg-info', 'build', '.venv*'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, '.'], cwd=copy, check=True)
    wheel, = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as z: z.extractall(tmp_path/'site')
    kept, refused = runtime_closure(), set()
    for top, dists in metadata.packages_distributions().items():
        if not {re.sub(r'[-_.]+', '-', d).lower() for d in dists} & (kept | {'continual-llm', 'pip', 'setuptools'}): refused.add(top)
    assert {'pytest', 'nbdev', 'transformers'} <= refused
    code = BLOCK.format(refused=sorted(refused), where=str(tmp_path/'site'), modules=ORDER)
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(tmp_path/'site')))


def test_importing_train_is_light():
    "Libraries that are only sometimes needed are not imported with the package"
    code = "import sys, continual_llm.train; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert not set(loaded) & {'matplotlib', 'IPython', 'ipywidgets', 'sentencepiece', 'yaml', 'transformers', 'fastcore', 'pandas'}


def test_readme_has_the_two_commands():
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    assert re.search(r'^pip install .*&& continual-llm pretrain$', readme, re.M) and re.search(r'^pip install .*&& pytest$', readme, re.M)


def test_slow_cells_are_passed_over(request):
    "Pytest reads the flags of settings.ini: what takes minutes is left to whoever asks for it"
    from conftest import Page
    page = ROOT/'nbs'/'index.ipynb'
    assert any('#| slow' in s for s in cells(page))
    assert not [c.name for c in Page.from_parent(request.session, path=page).collect() if '#| slow' in c.source]


def test_what_a_page_writes_aside_is_gone_with_it(request, tmp_path):
    "Dozens of runs in folders that nobody removes fill a disk"
    from conftest import Page
    (tmp_path/'page.ipynb').write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    page, aside, there = Page.from_parent(request.session, path=tmp_path/'page.ipynb'), tmp_path/'aside', tempfile.gettempdir()
    assert not page.run(f"import subprocess, sys, tempfile\nfrom pathlib import Path\nPath({str(aside)!r}).write_text(tempfile.mkdtemp() + '\\n' + "
                        "subprocess.run([sys.executable, '-c', 'import tempfile; print(tempfile.mkdtemp())'], capture_output=True, text=True).stdout)")
    made = [Path(line) for line in aside.read_text().split()]
    assert len(made) == 2 and all(m.exists() and m.parent != Path(there) for m in made)
    page.teardown()
    assert not any(m.exists() for m in made) and tempfile.gettempdir() == there


def test_home_page_names_every_page():
    index = '\n'.join(cells(ROOT/'nbs'/'index.ipynb', 'markdown'))
    assert [p.stem for p in PAGES if f'| `{p.stem}` |' not in index] == []


def test_readme_is_the_home_page():
    from tests.readme import PICTURES, readme
    text, pictures = readme()
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'README.md is not what nbs/index.ipynb says: run python -m tests.readme'
    assert pictures and {p.name: p.read_bytes() for p in (ROOT/PICTURES).glob('*.png')} == pictures
