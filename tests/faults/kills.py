"SIGKILL at random moments, a third of them inside a save: the same bits, no sample missed or repeated"
import inspect, json, random, shutil, signal, time
from collections import Counter
from continual_llm.train import pretrain
from tests.faults.runs import Row, command, leftovers, run_difference

KINDS = [dict(precision=p, accumulation=a) for p in ('fp32', 'bf16') for a in (1, 3)]
if 'compile' in inspect.signature(pretrain).parameters:
    KINDS += [dict(precision='fp32', accumulation=a, world=2) for a in (1, 3)] + [dict(precision=p, accumulation=3, compile=True) for p in ('fp32', 'bf16')]


def missed(trace):
    "Targets missed and repeated in each epoch by the steps that count: of a step taken again after a kill, the last time"
    took, owner, epochs, size = {}, None, 0, 0
    for pid, step, size, per_epoch, places in map(json.loads, trace.read_text().splitlines()):
        if pid != owner:
            owner = pid
            took = {s: p for s, p in took.items() if s < step}  # this process goes on from here
            if sorted(took) != list(range(step)): return f'goes on from step {step} after steps {sorted(took)[-3:]}'
        took[step], epochs = [i for p in places for i in p], max(epochs, step//per_epoch + 1)
    for epoch in range(epochs):
        seen = Counter(i for s in range(epoch*per_epoch, (epoch+1)*per_epoch) for i in took.get(s, ()))
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
    server.send(signal.SIGKILL, all='world' in how)
    return server.wait() == -9, f'{moment:.4f} s after the beginning of step {step}'


def chain(server, home, whole, kind, rng, row, seconds):
    "One run, killed and resumed until it ends; then compared with the one that never was"
    name, trace, at = 'killed', home/'trace', []
    how = dict(world=kind['world']) if 'world' in kind else dict(trace=str(trace))
    argv = command(home, name, '--resume', **kind, cache='killed_cache', trained=rng.random() < .1)
    for folder in (name, 'killed_cache'): shutil.rmtree(home/folder, ignore_errors=True)
    trace.write_text('')
    while rng.random() < .8 and row.done < row.asked:
        struck, when = strike(server, argv, rng, seconds, how)
        if not struck: break
        at.append(when)
        row.done += 1
        row.inside += bool(list(home.glob(f'{name}/.saving-*')))
        if server.lines(): row.wrong.append(f'{kind}, killed {at}: said {server.lines()[-1]}')
    if server.run(argv, **how) or server.lines(): row.wrong.append(f'{kind}, killed {at}: exit {server.wait()}, {server.lines()[-1:]}')
    elif d := run_difference(whole, home/name) or 'trace' in how and missed(trace): row.wrong.append(f'{kind}, killed {at}: {d}')
    elif left := leftovers(home/name): row.wrong.append(f'{kind}, killed {at}: left {left}')


def kills(server, home, asked, seed=0, kinds=KINDS, until=float('inf')):
    "A row of the table for each kind of run"
    for kind, n in zip(kinds, (asked//len(kinds) + (i < asked % len(kinds)) for i in range(len(kinds)))):
        rng, row, begun = random.Random(f'{seed} {kind}'), Row(f"kill, {' '.join(f'{k} {v}' for k, v in kind.items())}", n), time.monotonic()
        row.inside, whole = 0, f"whole-{'-'.join(map(str, kind.values()))}"
        if server.run(command(home, whole, **kind), **{k: v for k, v in kind.items() if k == 'world'}): raise RuntimeError(server.lines()[-1])
        row.seconds, begun = 0, time.monotonic()
        seconds = time_of(server, home, kind)
        while row.done < n and len(row.wrong) < 3 and time.monotonic() < until: chain(server, home, home/whole, kind, rng, row, seconds)
        row.note, row.seconds = f'{row.inside} inside a save', time.monotonic() - begun
        yield row


def time_of(server, home, kind):
    "How long an undisturbed run takes"
    begun = time.monotonic()
    server.run(command(home, 'timed', '--overwrite', **kind), **{k: v for k, v in kind.items() if k == 'world'})
    return time.monotonic() - begun
