"Every benchmark can still be begun: what it imports is there, and its help says what it is for"
import runpy, sys
from pathlib import Path
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
