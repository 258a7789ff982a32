"Flipped bits, cut files, zeroed pages, exchanged, old and missing files: found and named, with the good one before it used, or harmless; never silent"
import contextlib, io, random, shutil, signal, time, warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch
import torch
from continual_llm import train
from continual_llm.archive import load_object
from continual_llm.checkpoint import Checkpoints
from continual_llm.cli import parse
from continual_llm.core import UserError
from continual_llm.generate import load_model
from continual_llm.memory import domains
from continual_llm.tokenizer import Tokenizer
from tests.faults.runs import Row, command, difference

HOWS = ('flip', 'cut', 'zero', 'exchange', 'other run', 'old', 'missing')


class Reached(Exception): "Training would begin now, with this"


def would_go_on(home, name, cache, scored):
    "What `pretrain --resume` would go on with, and all that it said; raises what it refuses"
    def fit(model, opt, parts, config, history, store=None, state=None, *more, **also):
        x = [t for pair in parts.batch_at(state['progress']['step'] if state else 0) for t in pair]
        raise Reached(dict(state=state, config=asdict(config), facts=parts.facts, batch=x, weights=model.state_dict(), rates=[{k: v for k, v in g.items() if k != 'params'} for g in opt.param_groups],
                           threads=torch.get_num_threads(), loss=parts.evaluate(lambda: None).loss if scored else 0))
    argv = [str(a) for a in command(home, name, '--resume', cache=cache) if a != '--quiet']
    said, (given, torch_threads) = io.StringIO(), (parse('', train.pretrain, argv[1:]), torch.get_num_threads())
    try:
        with patch.object(train, 'fit', fit), contextlib.redirect_stdout(said), warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter('always')
            train.pretrain(**given)
    except Reached as reached: return reached.args[0], said.getvalue() + ' '.join(str(w.message) for w in noted)
    finally: torch.set_num_threads(torch_threads)


def remembered(run): return [[d.name, d.number, d.source_hash, d.tokenizer_hash, *(t and [t.ids.tolist(), t.doc_starts.tolist()] for t in (d.replay, d.val))] for d in domains(run/'memory')]
def loaded(path):
    model, tokenizer, checkpoint = load_model(path, device='cpu')
    return [model.state_dict(), tokenizer.hash, checkpoint]


class Subject:
    "A stopped run, the token files it reads, and all that is right about them"
    def __init__(self, server, home):
        self.home, self.name, self.cache = home, 'spoilt', 'spoilt_cache'
        self.run, self.other, self.old = home/self.name, home/'spoilt-other', {}
        stop(server, command(home, self.name, cache=self.cache), 12, signal.SIGKILL)
        self.old = {p: p.read_bytes() for p in self.files()}
        stop(server, command(home, self.name, '--resume', cache=self.cache), 12, signal.SIGTERM)
        stop(server, command(home, self.other.name, '--seed', 1, cache='other_cache'), newest(self.run)+1, signal.SIGTERM)
        self.whole = {p: p.read_bytes() for p in self.files()}
        self.right, _ = would_go_on(home, self.name, self.cache, True)
        self.before = load_object(self.run/'last'/f'{Checkpoints(self.run).steps()[-2]:06d}.pt')
        self.memory, self.loads = remembered(self.run), {p: loaded(p) for p in self.run.glob('[be]*/checkpoint.pt')}

    def files(self): return sorted(p for folder in (self.run, self.home/self.cache) for p in folder.rglob('*') if p.is_file())

    def mend(self):
        "Put every file back"
        for p in self.files():
            if p not in self.whole: p.unlink()
        for p, data in self.whole.items():
            if not p.exists() or p.read_bytes() != data:
                p.parent.mkdir(parents=True, exist_ok=True)
                p.write_bytes(data)

    def spoil(self, path, how, rng):
        "Damage one file in its place (all its names with it), or put another in its stead; a description, or nothing if that is not possible"
        data = self.whole[path]
        if how == 'flip':
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at+1:])
            return f'bit {bit} of byte {at}'
        if how == 'cut':
            path.write_bytes(data[:(at := rng.randrange(len(data)))])
            return f'cut to {at} bytes'
        if how == 'zero':
            at, size = rng.randrange(0, len(data), 512), rng.choice([512, 4096])
            if not any(data[at:at+size]): return None
            path.write_bytes(data[:at] + bytes(len(data[at:at+size])) + data[at+size:])
            return f'{size} bytes from {at} on zeroed'
        path.unlink()
        if how == 'missing': return 'missing'
        if how == 'exchange': new = rng.choice([p for p in self.whole if p.suffix == path.suffix])
        elif how == 'other run': new = self.other/path.relative_to(self.run) if path.is_relative_to(self.run) else rng.choice(sorted((self.home/'other_cache').glob('*')))
        else: new = path
        data = (self.old if how == 'old' else self.whole if new in self.whole else {new: new.read_bytes() if new.is_file() else None}).get(new)
        if data is None or data == self.whole[path]: return None
        path.write_bytes(data)
        return f'{how}: {new.relative_to(self.home)}'


def newest(run): return Checkpoints(run).steps()[-1]


def stop(server, argv, step, number):
    "Run to the beginning of this process's n-th step, and send a signal there"
    server.hold(argv, 'training', step)
    server.send(number)
    server.let()
    server.wait()


def verdict(read, right, path, allowed=None):
    "`found` if reading is refused with the file's name, `harmless` if what is read is right, `before` if it is what is allowed instead; otherwise what is wrong"
    try: got, said = read()
    except UserError as e: return 'found' if path.name in str(e) or path.parent.name in str(e) else f'refused without its name: {e}'
    except BaseException as e: return f'not caught: {type(e).__name__}: {e}'
    if not (d := difference(right, got)): return 'harmless' if path.name not in said else 'made again'
    if allowed is not None and not difference(allowed, got['state']) and (str(path) in said or not path.exists()): return 'before'
    return f'SILENT: {d}'


def judge(s, path):
    "All verdicts on what reads this file"
    if path in s.loads: yield verdict(lambda: (loaded(path), ''), s.loads[path], path)
    yield verdict(lambda: would_go_on(s.home, s.name, s.cache, path.suffix == '.tokens'), dict(s.right, loss=s.right['loss'] if path.suffix == '.tokens' else 0), path,
                  s.before if path.parent.name == 'last' else None)
    if path.is_relative_to(s.run/'memory'): yield verdict(lambda: (remembered(s.run), ''), s.memory, path)
    if path.parent.name == 'tokenizer': yield verdict(lambda: ([Tokenizer.load(path.parent).hash], ''), [s.right['facts']['tokenizer_hash']], path)


def damages(server, home, asked, seed=0, until=float('inf')):
    "A row for each kind of damage"
    s = Subject(server, home)
    for how in HOWS:
        rng, row, begun, seen = random.Random(f'{seed} {how}'), Row(f'damage: {how}', asked//len(HOWS)), time.monotonic(), Counter()
        for _ in range(10*row.asked):
            if row.done == row.asked or len(row.wrong) > 19 or time.monotonic() > until: break
            path = rng.choice(list(s.whole))
            if what := s.spoil(path, how, rng):
                verdicts = list(judge(s, path))
                row.done += 1
                seen.update(verdicts)
                bad = [v for v in verdicts if v not in ('found', 'harmless', 'before', 'made again')]
                if bad: row.wrong.append(f'{path.relative_to(home)}, {what}: {bad}')
            s.mend()
        row.note, row.seconds = ', '.join(f'{v} {k}' for k, v in sorted(seen.items()) if len(k) < 12), time.monotonic() - begun
        yield row
