"A loss, a gradient, a weight or a validation loss that is no number or far too large: left out, gone back over, given up; the same after a kill"
import contextlib, itertools, json, math, random, shutil, signal, time
from collections import Counter
from dataclasses import replace
from unittest.mock import patch
import torch
from continual_llm.archive import load_object
from continual_llm.compare import compare_twins
from continual_llm.guard import FEWEST, ROLLBACKS, SKIPS
from tests.faults.runs import Row, command, difference, leftovers, run_difference

STEPS, EVERY = 34, 7  # of the small run, and between its evaluations
VALUES = dict(nan=math.nan, inf=math.inf, spike=9.)
WHAT = [(where, what) for where in ('loss', 'gradient') for what in VALUES] + [(where, what) for where in ('weight', 'moment') for what in ('nan', 'inf')] + [('validation', 'nan')]


# --- in the child --------------------------------------------------------------------------------------------------------------------------------------

def spoilt_loss(loss_fn, where, factor):
    "A loss that is wrong itself, or has a wrong gradient"
    def spoilt(model, micro):
        nats, n = loss_fn(model, micro)
        if where == 'loss': return nats*factor, n
        nats.register_hook(lambda g: g * (1e6 if factor == VALUES['spike'] else factor))
        return nats, n
    return spoilt


@contextlib.contextmanager
def spoilt(where, what, first, last, times):
    "At these steps, in as many orders of the data: the same fault each time that a step is taken in the same order"
    from continual_llm import loop
    real_step, real_look, value = loop.take_step, loop.look_up, VALUES[what]
    def due(step, detours): return first <= step <= last and len(detours) < times
    def take_step(model, opt, parts, config, step, *more):
        now = due(step, parts.batch_at.detours)
        if now and where in ('loss', 'gradient'): parts = replace(parts, loss_fn=spoilt_loss(parts.loss_fn, where, value))
        info = real_step(model, opt, parts, config, step, *more)
        p = next(p for p in model.parameters() if p in opt.state)
        if now and where == 'weight': p.data.view(-1)[step] = value
        if now and where == 'moment': opt.state[p]['exp_avg'].view(-1)[step] = value
        return info
    def look_up(at, parts, *more):
        evaluate, now = parts.evaluate, where == 'validation' and due(at.step, at.detours)
        return real_look(at, replace(parts, evaluate=lambda poll: replace(evaluate(poll), nats=value)) if now else parts, *more)
    with patch.object(loop, 'take_step', take_step), patch.object(loop, 'look_up', look_up): yield


# --- in the parent -------------------------------------------------------------------------------------------------------------------------------------

def numbers(x, where=''):
    "All floating-point numbers of a file's content, by their place"
    if isinstance(x, (torch.Tensor, float)): yield where, x
    elif isinstance(x, dict): yield from itertools.chain(*(numbers(v, f'{where}/{k}') for k, v in x.items()))
    elif isinstance(x, (list, tuple)): yield from itertools.chain(*(numbers(v, f'{where}/{i}') for i, v in enumerate(x)))


def not_finite(run):
    "The first number of a checkpoint or of the log that is none; a best loss is infinite until there is one"
    files = {p.relative_to(run): load_object(p) for p in sorted(run.glob('*/*.pt'))} | {'metrics.jsonl': records(run)}
    return next((f'{name}{place} is not finite' for name, content in files.items() for place, x in numbers(content)
                 if not torch.as_tensor(x).isfinite().all() and not place.endswith('/best_loss')), '')


def records(run): return [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]
def notes(run): return [r['text'] for r in records(run) if r['kind'] == 'note']


def random_fault(kind, rng):
    "A fault alone, several times in a row, or for ever; a spike once it is known what is usual"
    where, what = rng.choice(WHAT if kind != 'alone' else WHAT[:6])
    first = rng.randrange(FEWEST if what == 'spike' else 1, STEPS - (kind != 'alone')*SKIPS)
    if where == 'validation': first = rng.randrange(EVERY, STEPS, EVERY)
    length = 1 if kind == 'alone' or where in ('weight', 'moment', 'validation') else SKIPS
    return dict(where=where, what=what, first=first, last=STEPS if kind == 'always' else first + length - 1, times=99 if kind != 'in a row' else rng.randint(1, ROLLBACKS))


def story(run, kind, fault, code, said):
    "What is wrong with how an undisturbed run took its fault; empty if nothing is"
    told, left_out = notes(run), [n for n in notes(run) if 'left out' in n]
    back = [n for n in told if 'Back to the state' in n]
    returns = dict(alone=0, always=ROLLBACKS).get(kind, fault['times'])
    if code != (2 if kind == 'always' else 0) or ('Traceback' in ' '.join(said)): return f'exit {code}, {said[-3:]}'
    if kind == 'always' and not ('diverged' in said[-1] and '--learning_rate' in said[-1] and sum(s.startswith('continual-llm: ') for s in said) == 1): return f'said {said[-3:]}'
    if len(back) != returns or not all(f'({i} of {ROLLBACKS} times)' in n for i, n in enumerate(back, 1)): return f'went back {len(back)} times instead of {returns}: {told}'
    if kind == 'alone' and [n.split(':')[0] for n in left_out] != [f"Step {fault['first']} left out"]: return f'left out: {left_out}'
    if gone := [n for n in told if n not in said]: return f'not on the console: {gone}'
    last = load_object(max((run/'last').glob('*.pt')))['progress']
    if kind != 'always' and len(last['detours']) != returns: return f"detours {last['detours']} after {returns} returns"
    return not_finite(run) or best_of(run, last)


def best_of(run, progress):
    "Whether the log, the progress and the file agree on the best evaluation"
    logged = next((r for r in reversed(records(run)) if r['kind'] == 'eval' and r['best']), None)
    if not (run/'best').exists(): return f'no best/, but {logged}' if logged else ''
    best = load_object(run/'best'/'checkpoint.pt')
    if not logged or (best['step'], best['val_loss']) != (logged['step'], logged['loss']): return f"best/ is of step {best['step']}, {best['val_loss']}, the log says {logged}"
    return ''


def begin(home, name, fault, loud=False):
    "The words of a run and what its process is told"
    argv = [a for a in command(home, name, '--resume') if a != '--quiet' or not loud]
    return argv, dict(fault=fault)


def struck(server, home, name, fault, strikes):
    "A run with this fault that is stopped at these places (signal, phase, how often it began), each time resumed; how it ended"
    shutil.rmtree(home/name, ignore_errors=True)
    argv, how = begin(home, name, fault)
    for number, phase, nth in strikes:
        server.start(argv, told=[phase], wait=True, **how)
        server.let(nth-1)
        if not server.until(phase, nth): break
        server.send(number)
        server.let()
        server.wait()
    return server.run(argv, **how), server.lines()


def same(whole, other, kind, said):
    "Where the disturbed run differs; of one that gave up, the newest state is wherever it was stopped last"
    if kind != 'always': return run_difference(whole, other)
    return next((': '.join(d) for d in compare_twins(whole, other).differences if not d[0].startswith('last')), '') or difference(*said, 'last words')


def one(server, home, kind, fault, strikes):
    "What is wrong with a run that meets a fault, left alone and disturbed at these places"
    whole, other = home/'whole-fault', home/'struck'
    shutil.rmtree(whole, ignore_errors=True)
    argv, how = begin(home, whole.name, fault, loud=True)
    code, said = server.run(argv, **how), server.lines()
    if bad := story(whole, kind, fault, code, said): return f'undisturbed: {bad}'
    again, then = struck(server, home, other.name, fault, strikes)
    if again != code: return f'exit {again}, {then[-1:]}'
    if bad := not_finite(other): return bad
    if left := leftovers(other): return f'left {left}'
    return same(whole, other, kind, ([said[-1]], then[-1:]) if kind == 'always' else ())


def random_strikes(fault, rng):
    "One or two signals, most of them while the fault is dealt with"
    near = rng.randint(fault['first'], fault['first'] + 14)
    places = [('training', near), ('training', near), ('training', rng.randint(1, STEPS)), ('evaluating', rng.randint(1, 7)), ('saving', rng.randint(1, 20))]
    return [(rng.choice((signal.SIGKILL, signal.SIGTERM)), *rng.choice(places)) for _ in range(rng.randint(1, 2))]


def divergence(server, home, asked, seed=0, until=float('inf')):
    "A row for a fault alone, one for several in a row, one for faults without end"
    for kind, share in (('alone', .3), ('in a row', .5), ('always', .2)):
        rng, row, begun, seen = random.Random(f'{seed} {kind}'), Row(f'divergence, {kind}', max(1, round(asked*share))), time.monotonic(), Counter()
        while row.done < row.asked and time.monotonic() < until and len(row.wrong) < 6:
            fault = random_fault(kind, rng)
            strikes = random_strikes(fault, rng)
            if bad := one(server, home, kind, fault, strikes): row.wrong.append(f'{fault}, struck {[(s.name, *at) for s, *at in strikes]}: {bad}')
            row.done += 1
            seen.update([f"{fault['what']} {fault['where']}", *(s.name for s, *_ in strikes)])
        row.note, row.seconds = ', '.join(f'{n} {k}' for k, n in sorted(seen.items())), time.monotonic() - begun
        yield row
