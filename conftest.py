"Pytest runs every page: each code cell is an item, run in order in one shell under nbdev's skip rules"
import getpass, os, tempfile, traceback
from pathlib import Path
import pytest

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # the tests' models are tiny: a second thread would only wait
os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(Path(tempfile.gettempdir())/f'torchinductor_{getpass.getuser()}'))  # one for all pages


def pytest_collect_file(parent, file_path):
    nbs = parent.config.rootpath/'nbs'
    if file_path.suffix == '.ipynb' and nbs in file_path.parents and not file_path.name.startswith('_') \
            and '.ipynb_checkpoints' not in file_path.parts:
        return Page.from_parent(parent, path=file_path)


def _skipped(cell, flags):
    "The directive or content for which nbdev's own test command would pass a cell over, or nothing"
    from nbdev.process import extract_directives
    from execnb.nbio import mk_cell
    if 'nbdev_export(' in cell.source: return 'export'
    found = extract_directives(mk_cell(cell.source, cell_type='code'), remove=False)
    if found.get('eval:', [''])[0] == 'false': return 'eval: false'
    return next((f for f in flags if f in found), None)


class Page(pytest.File):
    "One notebook; its cells share a shell and a folder for temporary files, made when the first one runs and gone after the last"
    shell = broken = temp = None

    def collect(self):
        from execnb.nbio import read_nb
        from nbdev.config import get_config
        flags = get_config(path=self.config.rootpath).tst_flags.split()
        cells = [c for c in read_nb(self.path).cells if c.cell_type == 'code' and c.source.strip()]
        for i, cell in enumerate(cells):
            if not _skipped(cell, flags): yield Cell.from_parent(self, name=f'cell{i+1}', source=cell.source)

    def run(self, source):
        if self.shell is None:
            from execnb.shell import CaptureShell
            self.temp = tempfile.TemporaryDirectory(prefix='page-', ignore_cleanup_errors=True)
            self.before = os.environ.get('TMPDIR'), tempfile.tempdir
            os.environ['TMPDIR'] = tempfile.tempdir = self.temp.name
            self.shell = CaptureShell(self.path)
            self.shell.run_cell('%matplotlib inline')
        self.shell.run(source)
        return self.shell.exc

    def teardown(self):
        if self.shell is None: return
        self.shell = None
        before, tempfile.tempdir = self.before
        if before is None: del os.environ['TMPDIR']
        else: os.environ['TMPDIR'] = before
        self.temp.cleanup()


def _traceback(e):
    "The frames of the cell and of what it called, without the shell's own"
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if 'IPython' not in f.filename and 'execnb' not in f.filename]
    return ''.join(traceback.format_list(own) + traceback.format_exception_only(type(e), e))


class CellError(Exception): "Carries a cell's own traceback"


class Cell(pytest.Item):
    def __init__(self, source, **kw):
        super().__init__(**kw)
        self.source = source

    def runtest(self):
        if self.parent.broken: pytest.skip(f'{self.parent.broken} of this page failed')
        here = os.getcwd()
        os.chdir(self.path.parent)
        try: failed = self.parent.run(self.source)
        finally: os.chdir(here)
        if failed:
            self.parent.broken = self.name
            raise CellError(f'{self.source}\n\n{_traceback(failed)}') from None

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, CellError) else super().repr_failure(excinfo, style)

    def reportinfo(self): return self.path, None, f'{self.path.name} {self.name}: {self.source.strip().splitlines()[0][:60]}'
