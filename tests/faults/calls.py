"Every k-th call that changes the disk fails: one line, no checkpoint lost, nothing left behind, and the run goes on to the same bits"
import json, random, shutil, subprocess, sys, time
from pathlib import Path
from continual_llm.archive import load_object
from continual_llm.checkpoint import Checkpoints
from tests.faults.layer import ERRORS
from tests.faults.runs import Row, command, leftovers, run_difference
from tests.faults.server import ROOT, Server

WORDS = dict(ENOSPC=('No space left', 'disk full'), EIO=('Input/output error',), EROFS=('Read-only',))


def lost(store, saved):
    "What of a run is not whole, or was saved and is gone"
    state, path, skipped = store.latest()
    if skipped: return f'passed over {skipped}'
    if saved and (not path or int(path.stem) < int(saved[-1])): return f'step {saved[-1]} was saved, and {path} is the newest'
    for p in store.folder.glob('*/*.pt'): load_object(p)


def short(home, *more, **kw):
    "A run with all that a run writes: tokenizer, token files, memory, states, an epoch, best, final, log, curve; and what the server needs to know"
    return command(home, *more, '--resume', '--max_steps', 18, trained=True, **kw), dict(learned=str(home/'tok'/'tokenizer.model'))


def after_failure(server, home, whole, name, cache, argv, how, words, mend=lambda: None):
    "What is wrong with how a command that met a failure ended, and with how it goes on; empty if nothing is"
    code, said, saved = server.wait(), server.lines(), server.told('saved')
    ours = [line for line in said if line.startswith('continual-llm: ') and not line.startswith('continual-llm: note: ')]
    if 'Traceback' in ' '.join(said) or code not in (0, 1, 2): return f'exit {code}, {said[-3:]}'
    if code and (len(ours) != 1 or not any(w in ours[0] for w in words)): return f'exit {code}, said {said}'
    if left := leftovers(home/name) + leftovers(home/cache): return f'left {left}, said {said}'
    if code == 0 and (not (d := run_difference(whole, home/name)) or not any('cannot be written' in line for line in said)): return d  # a view that failed to the end is made good by a resume
    if gone := lost(Checkpoints(home/name), saved): return f'{gone}, said {said}'
    mend()
    if server.run(argv, **how): return f'cannot go on after {said}: {server.lines()[-1:]}'
    return run_difference(whole, home/name) or ', '.join(leftovers(home/name))


def failing_call(server, home, whole, k, error, forever):
    "One run with a failing call; (what is wrong, the call)"
    name, cache = 'failing', 'failing_cache'
    for folder in (name, cache): shutil.rmtree(home/folder, ignore_errors=True)
    argv, how = short(home, name, cache=cache)
    server.run(argv, layer=dict(k=k, error=error, forever=forever), **how)
    hits = server.told('hits')
    if not hits or not hits[0]: return None, 'none'
    return after_failure(server, home, whole, name, cache, argv, how, WORDS[error]), hits[0][0]


def calls(server, home, asked=0, seed=0, until=float('inf')):
    "A row for each error; `asked` points, or all there are"
    whole = home/'whole-calls'
    argv, how = short(home, whole.name, cache='calls_cache')
    if server.run(argv, layer=dict(k=0, error='EIO'), **how): raise RuntimeError(server.lines()[-1])
    total = server.told('calls')[0]
    for error in ERRORS:
        points = [(k, forever) for k in range(1, total+1) for forever in (False, True)]
        random.Random(f'{seed} {error}').shuffle(points)
        points = points[:asked//len(ERRORS)] if asked else points
        row, begun, kinds = Row(f'{error} at the k-th of {total} calls', len(points)), time.monotonic(), set()
        for k, forever in points:
            if time.monotonic() > until or len(row.wrong) > 9: break
            wrong, kind = failing_call(server, home, whole, k, error, forever)
            row.done += kind != 'none'
            kinds.add(kind)
            if wrong: row.wrong.append(f'{kind} at call {k}{" and on" if forever else ""}: {wrong}')
        row.note, row.seconds = ', '.join(sorted(kinds)), time.monotonic() - begun
        yield row


# --- a real small disk ---------------------------------------------------------------------------------------------------------------------------------

APART = ['unshare', '-r', '-m']  # a namespace of its own: what is mounted there vanishes with it


def mount(folder, kilobytes, *more): subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join([f'size={kilobytes}k', *more]), 'tmpfs', str(folder)], check=True)


def on_a_disk(server, home, whole, kilobytes):
    "One run on a disk of this size, which is then made larger; (what is wrong, was it too small?)"
    disk = home/'disk'
    mount(disk, kilobytes)
    try:
        argv, how = short(home, 'disk/run', cache='disk/cache')
        code = server.run(argv, **how)
        mend = lambda: mount(disk, 64_000, 'remount')
        return after_failure(server, home, whole, 'disk/run', 'disk/cache', argv, how, ('No space left', 'disk full', 'are free'), mend), code != 0
    finally: subprocess.run(['umount', str(disk)], check=True)


def inside(home, whole, asked, seed):
    "The row, from within the namespace"
    row, rng, begun = Row('runs on a small disk (tmpfs)', asked), random.Random(f'{seed} disk'), time.monotonic()
    full = 0
    with Server(home/'disk_log') as server:
        for _ in range(asked):
            size = rng.randrange(16, 700, 4)
            wrong, small = on_a_disk(server, home, whole, size)
            row.done, full = row.done + 1, full + small
            if wrong: row.wrong.append(f'{size} KB: {wrong}')
    row.note, row.seconds = f'{full} too small', time.monotonic() - begun
    return row


def small_disks(server, home, asked, seed=0):
    "The row, or that mounting is not permitted here"
    whole = home/'whole-disk'
    argv, how = short(home, whole.name)
    if server.run(argv, **how): raise RuntimeError(server.lines()[-1])
    (home/'disk').mkdir(exist_ok=True)
    try: allowed = not subprocess.run([*APART, 'mount', '-t', 'tmpfs', 'tmpfs', str(home/'disk')], capture_output=True).returncode
    except FileNotFoundError: allowed = False
    if not allowed: return Row('runs on a small disk (tmpfs)', asked, note='NOT DONE: mounting is not permitted here')
    done = subprocess.run([*APART, sys.executable, '-m', 'tests.faults.calls', str(home), str(whole), str(asked), str(seed)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode: raise RuntimeError(done.stderr)
    return Row(**json.loads(done.stdout))


if __name__ == '__main__': print(json.dumps(vars(inside(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))))
