"Ctrl-C may come between any two operations: no half-written file stays, and nothing but its own line is said"
import gc, sys
import pytest
from continual_llm.core import atomic_file
from continual_llm.data import progress_bar


def interrupted_at(k, function, codes):
    "Call a function and raise `KeyboardInterrupt` before the k-th operation of code objects of these names; whether it was reached"
    n = 0
    def trace(frame, event, arg):
        nonlocal n
        if frame.f_code.co_name not in codes: return None
        frame.f_trace_opcodes = True
        if event == 'opcode':
            n += 1
            if n == k: raise KeyboardInterrupt
        return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try: function()
    except KeyboardInterrupt: pass
    finally: sys.settrace(before)
    return n >= k


@pytest.mark.parametrize('there', [False, True])
def test_a_file_is_whole_or_as_it_was(tmp_path, there):
    "And no temporary name stays beside it"
    def write():
        with atomic_file(tmp_path/'a') as f: f.write(b'new')
    k, met = 0, True
    while met:
        k += 1
        (tmp_path/'a').unlink(missing_ok=True)
        if there: (tmp_path/'a').write_bytes(b'old')
        met = interrupted_at(k, write, ('atomic_file', 'sync_folder'))
        names = [p.name for p in tmp_path.iterdir()]
        assert set(names) <= {'a'}, (k, names)
        if names: assert (tmp_path/'a').read_bytes() in ((b'old', b'new') if met else (b'new',)), k
    assert k > 20 and names == ['a']


def test_a_bar_that_is_half_made(monkeypatch, capsys):
    "Python tells of what goes wrong while an object is thrown away through this hook"
    said = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda u: said.append((k, repr(u.exc_value))))
    def draw():
        with progress_bar(total=3) as bar: bar.update(1)
    k, met = 0, True
    while met:
        k += 1
        met = interrupted_at(k, draw, ('__init__', 'progress_bar'))
    assert k > 100 and not said


def test_a_bar_that_nobody_closed_is_taken_away(capsys):
    bar = progress_bar(total=3, leave=False)
    bar.update(1)
    del bar
    gc.collect()
    assert capsys.readouterr().err.endswith('\r')
