"SIGKILL at random moments, a third of them inside a save: the same bits, no sample missed or repeated"
import itertools, json, random, shutil, signal, time
from collections import Counter
from tests.faults.runs import Row, command, leftovers, run_difference

KINDS = [dict(precision=p, accumulation=a, world=w, compile=c) for c in (False, True) for w in (1, 2) for p in ('fp32', 'bf16') for a in (1, 3)]
KINDS[8:8] = [dict(precision=p, accumulation=2, world='1 or 2', compile=False) for p in ('fp32', 'bf16')]  # a number drawn for each start; --deterministic


def missed(trace):
    "Targets missed and repeated in each epoch by the steps that count, over all processes: of a step taken again after a kill, the last time"
    took, owner, epochs, size = {}, None, 0, 0
    for start, pid, step, size, per_epoch, places in map(json.loads, trace.read_text().splitlines()):
        if start != owner:
            owner = start
            took = {s: p for s, p in took.items() if s < step}  # this start goes on from here
            if sorted(took) != list(range(step)): return f'goes on from step {step} after steps {sorted(took)[-3:]}'
        took.setdefault(step, {})[pid], epochs = [i for p in places for i in p], max(epochs, step//per_epoch + 1)
    for epoch in range(epochs):
        seen = Counter(i for s in range(epoch*per_epoch, (epoch+1)*per_epoch) for places in took.get(s, {}).values() for i in places)
        lost, again = size//16*16 - len(seen), sum(seen.values()) - len(seen)
        if lost or again: return f'epoch {epoch}: {lost} targets missed, {again} repeated'
    return ''


def strike(server, argv, rng, seconds, how):
    "Start or resume, and kill: at a call inside a save, or at any moment; (was it killed?, how)"
    if rng.random() < .3:
        layer = dict(k=rng.randrange(1, 45), after=rng.random() < .5, saves_only=True)
        return server.run(argv, layer=layer, **how) == -9, f'inside a save, {layer}'
    step, moment = rng.randint(0, 12), rng.uniform(0, seconds/20)
    server.start(argv, told=['training'], **how)
    if step: server.until('training', step)
    time.sleep(moment)
    server.send(signal.SIGKILL, all=True)
    return server.wait() == -9, f'{moment:.4f} s after the beginning of step {step}'


def processes(kind, rng): return rng.choice((1, 2)) if kind['world'] == '1 or 2' else kind['world']


def chain(server, home, whole, kind, rng, row, seconds):
    "One run, killed and resumed until it ends; then compared with the one that never was"
    name, trace, at = 'killed', home/'trace', []
    argv = command(home, name, '--resume', **kind, cache='killed_cache', trained=rng.random() < .1)
    for folder in (name, 'killed_cache'): shutil.rmtree(home/folder, ignore_errors=True)
    trace.write_text('')
    while rng.random() < .8 and row.done < row.asked:
        struck, when = strike(server, argv, rng, seconds, dict(world=processes(kind, rng), trace=str(trace)))
        if not struck: break
        at.append(when)
        row.done += 1
        row.inside += bool(list(home.glob(f'{name}/.saving-*')))
        said = [line for line in server.lines() if 'another process of this run is gone' not in line or kind['world'] == 1]  # a partner may live long enough to say so
        if said: row.wrong.append(f'{kind}, killed {at}: said {said[-1]}')
    if server.run(argv, world=processes(kind, rng), trace=str(trace)) or server.lines(): row.wrong.append(f'{kind}, killed {at}: exit {server.wait()}, {server.lines()[-1:]}')
    elif d := run_difference(whole, home/name) or missed(trace): row.wrong.append(f'{kind}, killed {at}: {d}')
    elif left := leftovers(home/name): row.wrong.append(f'{kind}, killed {at}: left {left}')


def shares(asked, kinds):
    "How many kills of each kind: fewer of those that take long"
    weights = [3 if not k['compile'] else 2 if k['world'] == 1 else 1 for k in kinds]
    ends = [round(asked*w/sum(weights)) for w in itertools.accumulate(weights)]
    return [b - a for a, b in zip([0, *ends], ends)]


def kills(server, home, asked, seed=0, kinds=KINDS, until=float('inf')):
    "A row of the table for each kind of run"
    for kind, n in zip(kinds, shares(asked, kinds)):
        rng, row = random.Random(f'{seed} {kind}'), Row(f"kill, {' '.join(f'{k} {v}' for k, v in kind.items() if v)}", n)
        row.inside, whole = 0, f"whole-{'-'.join(map(str, kind.values()))}"
        how = dict(world=1 if kind['world'] == '1 or 2' else kind['world'])
        for _ in range(1 + kind['compile']):  # how long an undisturbed run takes, when all is compiled
            begun = time.monotonic()
            if server.run(command(home, whole, '--overwrite', **kind), **how): raise RuntimeError(server.lines()[-1])
            seconds = time.monotonic() - begun
        while row.done < n and len(row.wrong) < 3 and time.monotonic() < until: chain(server, home, home/whole, kind, rng, row, seconds)
        row.note, row.seconds = f'{row.inside} inside a save', time.monotonic() - begun
        yield row
