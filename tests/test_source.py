"Every malformed text is refused in one line that names the file and the line, and the command in that line mends it"
import gzip, json, os, random, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from continual_llm.core import UserError
from continual_llm.source import LONGEST, Source, count_words

GOOD = 'a first line\n\nthe third é 日本 line\nthe last'
BAD = {  # file -> (bytes, words the line must hold)
    'binary.txt': (bytes(range(256))*40, ['line 1', 'binary data']),
    'late.txt': (b'fine\n'*100_000 + b'bad \0 line\n', ['line 100001', 'NUL']),
    'latin.txt': (b'fine\nbad \xe9t\xe9\n', ['line 2', 'byte 5', 'UTF-8', '0xe9']),
    'cut.txt': ('fine\nbad 日'.encode()[:-1], ['line 2', 'UTF-8']),
    'crlf.txt': (b'one\r\ntwo\r\n', ['line 1', 'CRLF']),
    'mixed.txt': (b'one\ntwo\r\n', ['line 2', 'CRLF']),
    'bom.txt': (b'\xef\xbb\xbfone\ntwo\n', ['line 1', 'byte-order']),
    'wide.txt': ('one\ntwo\n'.encode('utf-16'), ['line 1', 'UTF-16']),
    'giant.txt': (b'one\n' + b'word '*(LONGEST//4), ['line 2', '4 MiB']),
    'giant_in_gzip.txt.gz': (gzip.compress(b'word '*(LONGEST//4)), ['line 1', '4 MiB']),
    'empty.txt': (b'', ['empty']),
    'blank.txt': (b'\n \t\n\n', ['blank']),
    'blank.txt.gz': (gzip.compress(b''), ['blank']),
    'broken.txt.gz': (gzip.compress(GOOD.encode()*50)[:-9], ['gzip']),
    'checksum.txt.gz': (gzip.compress(GOOD.encode())[:-8] + b'\0'*8, ['gzip']),
    'flipped.txt.gz': (gzip.compress(os.urandom(3000).hex().encode())[:40] + b'\xff'*40, ['gzip']),
    'not.txt.gz': (GOOD.encode(), ['gzip']),
    'not.jsonl': (b'{"text": "fine"}\n{"text": fine}\n', ['line 2', 'JSON']),
    'deep.jsonl': (b'{"text": "fine"}\n' + b'['*200_000 + b'\n', ['line 2', 'JSON']),
    'digits.jsonl': (b'{"text": "fine"}\n{"text": ' + b'9'*100_000 + b'}\n', ['line 2']),
    'other.jsonl': (b'{"text": "fine"}\n{"txt": "fine"}\n', ['line 2', "'text'", "did you mean 'txt'?"]),
    'number.jsonl': (b'{"text": "fine"}\n{"text": 3}\n', ['line 2', 'not text']),
    'none.jsonl': (b'{"text": null}\n', ['line 1', 'not text']),
    'list.jsonl': (b'["text"]\n', ['line 1', 'record']),
    'nul.jsonl': (b'{"text": "a\\u0000b"}\n', ['line 1', 'NUL']),
    'half.jsonl': (b'{"text": "a\\ud83db"}\n', ['line 1', 'half of a character']),
    'giant.jsonl': (json.dumps(dict(text='x'*(LONGEST+1))).encode(), ['line 1', '4 MiB']),
    'latin.jsonl': (b'{"text": "\xe9"}\n', ['line 1', 'UTF-8']),
    'blank.jsonl': (b'\n\n', ['blank']),
}


def refusal(f):
    with pytest.raises(UserError) as stop: f()
    line = str(stop.value)
    assert '\n' not in line and len(line) < 600
    return line


@pytest.mark.parametrize('name', BAD)
def test_malformed(tmp_path, name):
    data, words = BAD[name]
    (tmp_path/name).write_bytes(data)
    line = refusal(lambda: Source.of(tmp_path/name).check())
    for word in [name, *words]: assert word in line, line
    assert refusal(lambda: Source.of(tmp_path/name).hash()) == line
    if 'blank' not in name and 'empty' not in name:
        assert refusal(lambda: list(Source.of(tmp_path/name).texts())) == line
        (tmp_path/'a.txt').write_text(GOOD)
        assert refusal(lambda: Source.of(tmp_path).check()) == line  # and in a folder, after a good file


@pytest.mark.parametrize('name', ['late.txt', 'latin.txt', 'crlf.txt', 'mixed.txt', 'bom.txt', 'wide.txt', 'giant.txt'])
@pytest.mark.parametrize('packed', [False, True])
def test_the_command_mends_it(tmp_path, name, packed):
    file = tmp_path/f"a file's {name}{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(BAD[name][0]) if packed else BAD[name][0])
    commands = re.findall('`([^`]*)`', refusal(lambda: Source.of(file).check()))
    assert len(commands) == 1 + packed
    if not all(shutil.which(c.split()[0]) for c in commands): pytest.skip('a command is not to be had here')
    for command in commands: subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    left = tmp_path/'NEW.txt' if 'NEW.txt' in commands[-1] else tmp_path/f"a file's {name}"
    assert Source.of(left).check().words


def test_missing(tmp_path):
    (tmp_path/'wiki.txt').write_text(GOOD)
    assert "did you mean 'wiki.txt'?" in refusal(lambda: Source.of(tmp_path/'wikki.txt'))
    assert 'nothing.txt' in refusal(lambda: Source.of([tmp_path/'wiki.txt', tmp_path/'nothing.txt']))
    assert '*.md' in refusal(lambda: Source.of(str(tmp_path/'*.md')))
    for data in ('', '  ', None, 3, b'x', [None], []): refusal(lambda: Source.of(data))
    assert "did you mean 'builtin:python'?" in refusal(lambda: Source.of('builtin:pyton'))
    (tmp_path/'folder'/'.git').mkdir(parents=True)
    (tmp_path/'folder'/'.git'/'a.txt').write_text(GOOD)
    (tmp_path/'folder'/'a.bin').write_text(GOOD)
    assert 'folder holds no text' in refusal(lambda: Source.of(tmp_path/'folder'))
    refusal(lambda: Source.of(tmp_path/('x'*5000)))


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_no_permission(tmp_path):
    (tmp_path/'a.txt').write_text(GOOD)
    (tmp_path/'a.txt').chmod(0)
    assert 'chmod u+r' in refusal(lambda: Source.of(tmp_path/'a.txt').check())


def test_a_file_that_goes_away(tmp_path):
    (tmp_path/'a.txt').write_text(GOOD)
    source = Source.of(tmp_path/'a.txt')
    (tmp_path/'a.txt').unlink()
    assert 'a.txt could not be read' in refusal(source.check)


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f'{random.Random(i).random()}.txt' for i in range(30)]
    for name in names: (tmp_path/name).write_text(name)
    for data in (tmp_path, tmp_path/'*.txt', str(tmp_path)): assert [t for t, _ in Source.of(data).texts()] == sorted(names)


def test_names_with_pattern_characters(tmp_path):
    (tmp_path/'a[1].txt').write_text(GOOD)
    assert ''.join(t for t, _ in Source.of(tmp_path/'a[1].txt').texts()) == GOOD


documents = st.lists(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=60).map(lambda t: t.replace('\r\n', '\n')),
                     min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(documents)
def test_nothing_is_lost(tmp_path_factory, texts):
    "Files, records and compressed files give their text back, ends in their places, and the same hash"
    folder = tmp_path_factory.mktemp('texts')
    texts = [t for t in texts if t and not t.startswith('\ufeff')] + ['word']
    for i, text in enumerate(texts):
        (folder/f'{i}.txt').write_bytes(text.encode())
        (folder/f'{i}.txt.gz').write_bytes(gzip.compress(text.encode()))
    (folder/'all.jsonl').write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts), encoding='utf-8')
    sources = [Source.of([folder/f'{i}.txt' for i in range(len(texts))]), Source.of([folder/f'{i}.txt.gz' for i in range(len(texts))]),
               Source.of(folder/'all.jsonl')]
    for source in sources:
        found, now = [], ''
        for text, ends in source.texts():
            assert '\n' not in text[:-1]
            now += text
            if ends: found, now = found + [now], ''
        assert not now and found == texts
        assert source.check().words == sum(map(count_words, texts))
        assert source.check().bytes == sum(len(t.encode()) for t in texts)
    assert len({s.hash() for s in sources}) == 1


def test_the_hash_sees_every_byte_and_every_end(tmp_path):
    data = b'some text\nof two lines\n'
    hashes = set()
    for i in range(len(data)):
        (tmp_path/'a.txt').write_bytes(data[:i] + bytes([data[i]^1]) + data[i+1:])
        hashes.add(Source.of(tmp_path/'a.txt').hash())
    for i in range(1, len(data)+1):
        (tmp_path/'a.txt').write_bytes(data[:i])
        (tmp_path/'b.txt').write_bytes(data[i:] or b'\n')
        hashes.add(Source.of([tmp_path/'a.txt', tmp_path/'b.txt']).hash())
        hashes.add(Source.of(tmp_path/'a.txt').hash())
    assert len(hashes) == 3*len(data)


def test_built_in_corpora_are_the_same_in_another_process_and_import_nothing():
    code = ("import sys, continual_llm.source as s\nbefore = set(sys.modules)\n"
            "print([s.Source.of(f'builtin:{n}').hash() for n in ('english', 'python')])\nprint(sorted(set(sys.modules) - before))")
    out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, env=dict(os.environ, PYTHONHASHSEED='7')).stdout
    hashes, new = out.splitlines()
    assert re.findall(r'\w{64}', hashes) == [Source.of(f'builtin:{n}').hash() for n in ('english', 'python')]
    assert not {'turtle', 'antigravity', 'this', 'pydoc_data'} & set(re.findall(r"'(\w+)", new))


def test_memory_does_not_grow_with_the_text(tmp_path):
    import tracemalloc
    (tmp_path/'a.txt').write_text('a line of ten words that stands here many times\n'*100_000)
    tracemalloc.start()
    Source.of(tmp_path/'a.txt').check()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6
