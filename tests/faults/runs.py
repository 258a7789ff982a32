"The small run that every fault is tried on, and how two runs are compared"
from dataclasses import dataclass, field
from pathlib import Path
from continual_llm.core import read_json
from continual_llm.tokenizer import train_tokenizer
from continual_llm.compare import compare_twins, differences

WORDS = 'cat dog hen fox owl cow mat log hill road'.split()
TEXT = '\n'.join(f'the {a} sat on the {b} and saw the {c} .\n' for a in WORDS[:4] for b in WORDS for c in WORDS)
SHAPE = 'd_model: 16\nn_layers: 1\nn_heads: 2\nn_kv_heads: 1\nd_ff: 32\nmax_seq_len: 16\ndropout: 0.1\n'
FLAGS = ('--epochs 2 --learning_rate 3e-3 --warmup_steps 5 --eval_every 7 --eval_tokens 400 --save_every 3 --early_stopping_patience 9 --keep_epochs 2').split()


def make_home(folder):
    "A folder with a text, a shape and a tokenizer"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'text.txt').write_text(TEXT)
    (folder/'shape.yaml').write_text(SHAPE)
    train_tokenizer(folder/'text.txt', vocab_size=300, save=folder/'tok')
    return folder


def command(home, name, *more, accumulation=1, precision='fp32', trained=False, cache='cache', compile=False, world=1):
    "The words of a pretraining command, the same for one process and several"
    return ['pretrain', '--data', home/'text.txt', '--config', home/'shape.yaml', '--cache', home/cache, '--save_dir', home/name, '--batch_size', 24//accumulation,
            '--grad_accumulation', accumulation, '--precision', precision, *(('--vocab_size', 300) if trained else ('--tokenizer', home/'tok')), *FLAGS, '--quiet',
            *(['--compile'] if compile else []), *(['--deterministic'] if compile or world == '1 or 2' else []), *more]


def difference(a, b, where=''): return next((f'{place}: {how}' for place, how in differences(a, b, where)), '')


def run_difference(whole, other):
    "Where two finished runs first differ: weights, moments, best, patience, history, log; settings, threads and status"
    seen = compare_twins(whole, other)
    if not seen.files > 3: return f'only {seen.files} files to compare'
    if seen.differences: return ': '.join(seen.differences[0])
    return difference(*[{k: read_json(run/'run.json', 'run')[k] for k in ('settings', 'threads', 'status')} for run in (whole, other)], 'run.json')


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
