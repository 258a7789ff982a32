"The small run that every fault is tried on, and how two runs are compared"
import json
from dataclasses import dataclass, field
from pathlib import Path
import torch
from continual_llm.archive import load_object
from continual_llm.tokenizer import train_tokenizer

WORDS = 'cat dog hen fox owl cow mat log hill road'.split()
TEXT = '\n'.join(f'the {a} sat on the {b} and saw the {c} .\n' for a in WORDS[:4] for b in WORDS for c in WORDS)
SHAPE = 'd_model: 16\nn_layers: 1\nn_heads: 2\nn_kv_heads: 1\nd_ff: 32\nmax_seq_len: 16\ndropout: 0.1\n'
FLAGS = ('--epochs 2 --learning_rate 3e-3 --warmup_steps 5 --eval_every 7 --eval_tokens 400 --save_every 3 --early_stopping_patience 9 --keep_epochs 2').split()
TIMES = {'seconds', 'tokens_per_second', 'path'}  # what may differ between two runs that are the same
BEST, FINAL = 'best/checkpoint.pt', 'final/model.pt'


def make_home(folder):
    "A folder with a text, a shape and a tokenizer"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'text.txt').write_text(TEXT)
    (folder/'shape.yaml').write_text(SHAPE)
    train_tokenizer(folder/'text.txt', vocab_size=300, save=folder/'tok')
    return folder


def command(home, name, *more, accumulation=1, precision='fp32', trained=False, cache='cache'):
    "The words of a pretraining command"
    return ['pretrain', '--data', home/'text.txt', '--config', home/'shape.yaml', '--cache', home/cache, '--save_dir', home/name, '--batch_size', 24//accumulation,
            '--grad_accumulation', accumulation, '--precision', precision, *(('--vocab_size', 300) if trained else ('--tokenizer', home/'tok')), *FLAGS, '--quiet', *more]


def newest(run): return load_object(max((run/'last').glob('*.pt')))


def records(run):
    "The log of a run, without times"
    rows = [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


def difference(a, b, where=''):
    "Where two nested values first differ by a single bit, or nothing"
    if type(a) is not type(b): return f'{where}: {type(a).__name__} and {type(b).__name__}'
    if isinstance(a, torch.Tensor): return '' if a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) else f'{where}: other numbers'
    if isinstance(a, dict):
        if list(a) != list(b): return f'{where}: keys {list(a)} and {list(b)}'
        return next((d for k in a if k not in TIMES and (d := difference(a[k], b[k], f'{where}/{k}'))), '')
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return f'{where}: {len(a)} and {len(b)} items'
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f'{where}/{i}'))), '')
    return '' if a == b or a != a and b != b else f'{where}: {a!r} and {b!r}'


def run_difference(whole, other):
    "Where two finished runs first differ: resume state (weights, moments, best, patience, history), checkpoints, settings, log"
    names = sorted(p.relative_to(whole).as_posix() for p in whole.glob('*/*.pt') if p.parent.name != 'last')
    if (found := sorted(p.relative_to(other).as_posix() for p in other.glob('*/*.pt') if p.parent.name != 'last')) != names: return f'files {names} and {found}'
    for name in names:
        if d := difference(load_object(whole/name), load_object(other/name), name): return d
    for name in ('settings', 'threads', 'status'):
        if d := difference(*(json.loads((run/'run.json').read_text())[name] for run in (whole, other)), f'run.json/{name}'): return d
    return difference(newest(whole), newest(other), 'last') or difference(records(whole), records(other), 'metrics.jsonl')


def leftovers(folder):
    "Temporary names that lie about in a folder"
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if p.name.startswith('.') or p.name.endswith('.tmp'))


@dataclass
class Row:
    "One line of the table"
    what:str
    asked:int
    done:int = 0
    wrong:list = field(default_factory=list)  # what went wrong, with what it takes to see it again
    note:str = ''                             # further counts
    seconds:float = 0.

    @property
    def result(self): return (f'{len(self.wrong)} WRONG: {self.wrong[0]}' if self.wrong else 'as it should') + (f'; {self.note}' if self.note else '')


def table(rows):
    "The rows as text"
    cells = [('what', 'asked', 'done', 'result', 'seconds'), *((r.what, str(r.asked), str(r.done), r.result, f'{r.seconds:.0f}') for r in rows)]
    wide = [max(len(c[i]) for c in cells) for i in (0, 1, 2)]
    return '\n'.join(f'{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {s:>7}  {r}' for a, b, c, r, s in cells)
