"SIGTERM and SIGINT in every phase of the command: saved, exit 143 and 130, nothing left behind, and the run goes on to the same bits"
import random, shutil, signal, time
from continual_llm.checkpoint import Checkpoints
from tests.faults.runs import Row, command, leftovers, run_difference

PHASES = dict(reading=4, tokenizer=1, tokenizing=2, beginning=1, training=34, evaluating=6, saving=15, finishing=1)  # how often each begins in a run
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def interrupt(server, home, whole, phase, number, rng, row):
    "One signal a moment after the n-th beginning of a phase"
    name, nth, delay = 'stopped', rng.randint(1, PHASES[phase]), rng.choice([0, rng.uniform(0, .05)])
    argv, where = command(home, name, '--resume', trained=True, cache='stopped_cache'), f'{number.name} {delay:.3f} s after {phase} {nth}'
    for folder in (name, 'stopped_cache'): shutil.rmtree(home/folder, ignore_errors=True)
    server.start(argv, told=[phase])
    if not server.until(phase, nth): return row.wrong.append(f'{where}: this phase did not come: {server.lines()[-1:]}')
    time.sleep(delay)
    server.send(number)
    sent = time.monotonic()
    code = server.wait()
    row.slowest, said, over = max(row.slowest, time.monotonic() - sent), server.lines(), code == 0
    row.done, row.over = row.done + 1, row.over + over
    if over: complete = run_difference(whole, home/name)  # it came after the last step: the run is complete all the same
    elif code != CODES[number]: return row.wrong.append(f'{where}: exit {code}, {said[-1:]}')
    elif len(said) > 1 or said and not said[0].startswith('continual-llm: '): return row.wrong.append(f'{where}: said {said[-3:]}')
    if server.orphans(): return row.wrong.append(f'{where}: a process outlives it')
    if left := leftovers(home/name) + leftovers(home/'stopped_cache'): return row.wrong.append(f'{where}: left {left}')
    if phase in ('training', 'evaluating', 'saving') and not over and not Checkpoints(home/name).steps(): return row.wrong.append(f'{where}: nothing was saved')
    if not over and server.run(argv): return row.wrong.append(f'{where}: cannot go on: {server.lines()[-1:]}')
    if d := run_difference(whole, home/name): row.wrong.append(f'{where}: {d}')


def signals(server, home, asked, seed=0, until=float('inf')):
    "A row for each of the two signals"
    whole = home/'whole-own'
    if server.run(command(home, whole.name, cache='stopped_cache')): raise RuntimeError(server.lines()[-1])
    for number in CODES:
        rng, row, begun = random.Random(f'{seed} {number}'), Row(f'{number.name} in {len(PHASES)} phases', asked//2), time.monotonic()
        row.slowest = row.over = 0
        for i in range(row.asked):
            if time.monotonic() > until or len(row.wrong) > 5: break
            interrupt(server, home, whole, list(PHASES)[i % len(PHASES)], number, rng, row)
        row.note, row.seconds = f'slowest exit {row.slowest:.1f} s, {row.over} after the last step', time.monotonic() - begun
        yield row
