"""What does reading text cost, and does it grow?  `python benchmarks/data_speed.py [--data FOLDER] [--parts prepare,share,growth] [--shapes tiny,small] [--rounds 5] [--threads 1]`

FOLDER holds `wikitext-2/train.txt` (by default `$CONTINUAL_LLM_DATA`); without it the source code of Python's library is read. Three measurements, each in turn, round after round:

- `prepare`: a text file as `prepare` makes tokens of it (read, checked and hashed, read again, tokenized, counted, written to a new cache), against SentencePiece alone on the same lines in memory; both with all cores.
- `share`: the part of an optimizer step that reading its batch takes, for each of `--shapes`.
- `growth`: a step of `tiny` with its batch read, and reading alone, on token files of 1, 10, 100 and 1000 MB of text (the same text over and over, written to a temporary folder: 0.6 GB); also the time that an
  epoch's order takes, and the most memory that reading allocates beside the mapped file."""
import argparse, itertools, os, tempfile, time, tracemalloc
from functools import partial
from pathlib import Path
import torch
from speed import clock_of, contend, keep, parser, ratios, read, shape_of, speeds, spread, stamp, stands, version
from continual_llm import source
from continual_llm.batches import Batches
from continual_llm.bench import precisions
from continual_llm.data import prepare, write_tokens
from continual_llm.loop import LoopConfig, Parts, take_step
from continual_llm.model import ContinualLLM
from continual_llm.optim import make_optimizer
from continual_llm.tokenizer import train_tokenizer

SIZES = 1, 10, 100, 1000 # MB of text
READ = 100               # batches that are read in a round
STEPS = 4                # optimizer steps in a round


def text_of(data, folder, megabytes):
    "The path of a text file of at most so many bytes, and its name"
    path, left = Path(folder)/'text.txt', megabytes*1e6
    with open(path, 'w', encoding='utf-8') as f:
        for text, _ in source.Source.of(Path(data)/'wikitext-2'/'train.txt' if data else 'builtin:python').texts():
            if left > 0: left -= f.write(text)
    return path, 'WikiText-2' if data else "Python's library"


def facts(**more): return dict(library=version('torch'), **more)


# --- making tokens ----------------------------------------------------------------------------------------------------------------------------------------

def preparing(path, tok, folder):
    "`prepare` as if it had never seen this text"
    numbers = itertools.count()
    def do():
        source._check.cache_clear()
        return len(prepare(str(path), tok, f'{folder}/cache-{next(numbers)}'))
    return do(), 'tokens', do, facts()


def sentencepiece(path, tok):
    "SentencePiece on the same lines, in memory"
    lines = [text for text, _ in source.Source.of(str(path)).texts()]
    do = lambda: sum(map(len, tok._sp.encode(lines, num_threads=-1)))
    return do(), 'tokens', do, dict(library=version('sentencepiece'))


# --- reading them -----------------------------------------------------------------------------------------------------------------------------------------

def reading(ids, shape, blocks):
    "Batches one after the other"
    batches, steps = Batches(ids, shape.max_seq_len, blocks), itertools.count()
    def do():
        for _ in range(READ): batches(next(steps))
    return READ*blocks*shape.max_seq_len, 'tokens', do, facts()


def stepping(ids, shape, blocks, model, opt):
    "Optimizer steps with their batches"
    batches, steps = Batches(ids, shape.max_seq_len, blocks), itertools.count()
    def loss_fn(model, micro): return model(micro[0], targets=micro[1], reduction='sum'), micro[1].numel()
    parts, config = Parts(batches, loss_fn, None, None), LoopConfig(10**6, learning_rate=1e-4, precision=list(precisions('cpu'))[-1])
    def do():
        for _ in range(STEPS): take_step(model, opt, parts, config, next(steps))
    return STEPS*blocks*shape.max_seq_len, 'tokens', do, facts()


def trained(shape):
    "A model and its optimizer"
    model = ContinualLLM(shape).train()
    return model, make_optimizer(model)


def repeated(file, n, path):
    "A token file of n tokens, those of another over and over"
    header = dict(n_words=None, n_bytes=None, n_lines=None, dtype=file.dtype, source='repeated', source_hash='0', tokenizer_hash=file.tokenizer_hash, part={})
    chunks = itertools.chain(itertools.repeat(file.ids, n//len(file)), [file.ids[:n % len(file)]])
    return write_tokens(path, ((ids, [0]) for ids in chunks), header)


def epoch_cost(ids, shape, blocks):
    "Seconds and bytes that reading takes with the first batch, beside the mapped file"
    tracemalloc.start()
    batches, begun = Batches(ids, shape.max_seq_len, blocks), time.perf_counter()
    batches(0)
    took = time.perf_counter() - begun
    for step in range(1, 20): batches(step)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took, most


# --- the three measurements -------------------------------------------------------------------------------------------------------------------------------

def measure_prepare(a, path, tok, folder):
    return contend('data', 'prepare', {'prepare': partial(preparing, path, tok, folder), 'sentencepiece': partial(sentencepiece, path, tok)}, a.rounds, {})


def measure_share(a, file):
    for name in a.shapes.split(','):
        shape, blocks = shape_of(name)
        yield from contend('data', f'share {name}', {'step': partial(stepping, file.ids, shape, blocks, *trained(shape)), 'reading': partial(reading, file.ids, shape, blocks)}, a.rounds, {}, clock_of(a))


def measure_growth(a, file, bytes_per_token, folder):
    (shape, blocks), makers, once = shape_of('tiny'), {}, {}
    model, opt = trained(shape)
    for size in a.sizes:
        ids = repeated(file, int(size*1e6/bytes_per_token), Path(folder)/f'{size}.tokens').ids
        once[size] = epoch_cost(ids, shape, blocks)
        makers |= {f'step, {size} MB': partial(stepping, ids, shape, blocks, model, opt), f'reading, {size} MB': partial(reading, ids, shape, blocks)}
    for row in contend('data', 'growth', makers, a.rounds, {}, clock_of(a)):
        size = next(s for s in a.sizes if row['contender'].endswith(f', {s} MB'))
        yield dict(row, order=once[size][0], allocated=once[size][1])


def table(rows):
    "What was found, as Markdown"
    rows = {(r['shape'], r['contender']): r for r in rows if r['set'] == 'data'}
    lines = ['| what | tokens/s, median (slowest to fastest) | beside | ratio, median (least to most) |', '|---'*4 + '|']
    def line(what, row, beside='', ratio=None, form='{:.3f}'): lines.append(f"| {what} | {spread(speeds(row))} | {beside} | {spread(ratio, form) if ratio else ''} |")
    if ('prepare', 'prepare') in rows:
        ours, alone = rows['prepare', 'prepare'], rows['prepare', 'sentencepiece']
        line('SentencePiece alone', alone)
        line('`prepare`', ours, 'SentencePiece alone', ratios(ours, alone), '{:.0%}')
    for name in ('tiny', 'small'):
        if (f'share {name}', 'step') not in rows: continue
        step, batch = rows[f'share {name}', 'step'], rows[f'share {name}', 'reading']
        line(f'reading batches of `{name}`', batch, 'the whole step, in time', ratios(step, batch), '{:.2%}')
    first = {}
    for (shape, what), row in rows.items():
        if shape != 'growth': continue
        kind = what.split(',')[0]
        base = first.setdefault(kind, row)
        line(what, row, '' if row is base else f"the least text, in time a token", None if row is base else ratios(base, row))
    return '\n'.join(lines)


def growth_table(rows):
    "What an epoch costs once, for each size"
    rows = [r for r in rows if r['set'] == 'data' and r['shape'] == 'growth' and r['contender'].startswith('reading')]
    lines = ['| text | an epoch\'s order and first batch | allocated beside the mapped file |', '|---'*3 + '|']
    return '\n'.join(lines + [f"| {r['contender'].split(', ')[1]} | {1000*r['order']:.1f} ms | {r['allocated']/1e6:.1f} MB |" for r in rows])


def main():
    "Measure and print two tables"
    p = parser(__doc__, shapes='tiny,small')
    p.add_argument('--data', default=os.environ.get('CONTINUAL_LLM_DATA'), help='folder of wikitext-2/train.txt (default: $CONTINUAL_LLM_DATA)')
    p.add_argument('--parts', default='prepare,share,growth', help='default: prepare,share,growth')
    p.add_argument('--megabytes', type=float, default=20, help='of the text, at most (default: 20)')
    p.add_argument('--vocab_size', type=int, default=8000, help='pieces of the tokenizer (default: 8000)')
    p.add_argument('--sizes', type=lambda s: tuple(map(int, s.split(','))), default=SIZES, help='MB of text, for growth (default: 1,10,100,1000)')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    kinds = {'prepare': [('prepare', ['prepare', 'sentencepiece'])], 'share': [(f'share {n}', ['step', 'reading']) for n in a.shapes.split(',')], 'growth': [('growth', [f'{k}, {s} MB' for s in a.sizes for k in ('step', 'reading')])]}
    wall = argparse.Namespace(**{**vars(a), 'cpu': False})  # `prepare` works on several cores at once, which processor time would not show
    todo, found = [part for part in a.parts.split(',') if not all(stands(wall if part == 'prepare' else a, 'data', shape, names) for shape, names in kinds[part])], []
    with tempfile.TemporaryDirectory() as folder:
        if todo:
            path, name = text_of(a.data, folder, a.megabytes)
            tok = train_tokenizer(str(path), vocab_size=a.vocab_size)
            file = prepare(str(path), tok, f'{folder}/first')
            print(f"{name}, {file.n_bytes/1e6:.1f} MB, {len(file):,} tokens, {a.vocab_size:,} pieces; {stamp()['machine']}\n")
        for part in todo:
            ways = dict(prepare=lambda: measure_prepare(a, path, tok, folder), share=lambda: measure_share(a, file), growth=lambda: measure_growth(a, file, file.n_bytes/len(file), folder))
            rows = [dict(r, text=name) for r in ways[part]()]
            keep(a.results, rows)
            found += rows
    rows = read(a.results) or found
    print(table(rows), growth_table(rows), sep='\n\n')


if __name__ == '__main__': main()
