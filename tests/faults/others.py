"A second run in the folder, a clock that goes backwards, a text that changes: refused by name, or of no consequence"
import os, shutil, signal, time
from tests.faults.runs import Row, command, leftovers, run_difference
from tests.faults.server import Server


def snapshot(folder): return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def second_runs(server, home, whole, row):
    "While one run holds the folder, each way to begin another there is refused by the name of the first"
    with Server(home/'second_log') as second:
        for more in ('--resume',), ('--overwrite',):
            shutil.rmtree(home/'busy', ignore_errors=True)
            first = server.hold(command(home, 'busy'), 'training', 5)
            before = snapshot(home/'busy')
            code, said = second.run(command(home, 'busy', *more)), ' '.join(second.lines())
            row.done += 1
            if code != 2 or f'process {first} on {os.uname().nodename}' not in said or 'serve' not in said: row.wrong.append(f'{more}: exit {code}, {said}')
            if snapshot(home/'busy') != before: row.wrong.append(f'{more}: it changed the folder')
            server.let()
            if server.wait() or (d := run_difference(whole, home/'busy')): row.wrong.append(f'{more}: the first run suffered: {server.lines()[-1:] or d}')


def clocks(server, home, whole, row):
    "The clock goes back an hour at each look, or all files come from the past or the future"
    for when in 'backwards', 0, 2**32:
        for folder in ('clock', 'clock_cache'): shutil.rmtree(home/folder, ignore_errors=True)
        argv = command(home, 'clock', '--resume', cache='clock_cache')
        server.hold(argv, 'training', 20, clock=when == 'backwards')
        server.send(signal.SIGTERM)
        server.let()
        server.wait()
        if when != 'backwards':
            for p in snapshot(home/'clock').keys() | snapshot(home/'clock_cache').keys(): os.utime(p, (when, when))
        code = server.run(argv, clock=when == 'backwards')
        row.done += 1
        if code or server.lines(): row.wrong.append(f'{when}: exit {code}, {server.lines()[-1:]}')
        elif d := run_difference(whole, home/'clock') or ', '.join(leftovers(home/'clock')): row.wrong.append(f'{when}: {d}')


def another_text(path, how):
    "Change a text; with `in place`, neither its size nor its time of change tell"
    before = os.stat(path)
    if how == 'longer': path.write_text(path.read_text() + 'one line more\n')
    if how == 'in place': path.write_text(path.read_text().replace('cat', 'cow', 1))
    if how == 'replaced':
        path.with_suffix('.new').write_text(path.read_text().replace('cat', 'cow'))
        os.replace(path.with_suffix('.new'), path)
    if how == 'missing': path.unlink()
    if how == 'in place': os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def texts(server, home, whole, row):
    "The text changes between a stop and the resume, while it is read, and while it is trained on"
    cases = [(how, phase) for how in ('in place', 'longer', 'replaced', 'missing') for phase in ('stopped', 'tokenizing', 'training')]
    text, old = home/'text.txt', (home/'text.txt').read_text()
    for how, phase in cases[:row.asked]:
        for folder in ('text', 'text_cache'): shutil.rmtree(home/folder, ignore_errors=True)
        argv = command(home, 'text', '--resume', cache='text_cache')
        server.hold(argv, 'tokenizing' if phase == 'tokenizing' else 'training', 16 if phase == 'stopped' else 1)
        if phase == 'stopped':
            server.send(signal.SIGTERM)
            server.let()
            server.wait()
            before = snapshot(home/'text')
        another_text(text, how)
        if phase != 'stopped': server.let()
        code, said = server.run(argv) if phase == 'stopped' else server.wait(), server.lines()
        row.done += 1
        if phase == 'training' and code: row.wrong.append(f'{how}, {phase}: exit {code}, {said[-1:]}')
        if phase != 'training' and not (code == 2 and len(said) == 1 and 'text' in said[0]): row.wrong.append(f'{how}, {phase}: exit {code}, {said}')
        if phase == 'stopped' and snapshot(home/'text') != before: row.wrong.append(f'{how}, {phase}: the folder was changed')
        text.write_text(old)
        if code and server.run(argv): row.wrong.append(f'{how}, {phase}: with the old text back it does not go on: {server.lines()[-1:]}')
        elif d := run_difference(whole, home/'text'): row.wrong.append(f'{how}, {phase}: {d}')


def others(server, home, all=True):
    "Three rows; the third with all its cases or a few"
    whole = home/'whole-others'
    if server.run(command(home, whole.name)): raise RuntimeError(server.lines()[-1])
    for what, asked, act in (('a second run in the folder', 2, second_runs), ('a clock gone wrong', 3, clocks), ('a text that changes', 12 if all else 4, texts)):
        row, begun = Row(what, asked), time.monotonic()
        act(server, home, whole, row)
        row.seconds = time.monotonic() - begun
        yield row
