"""Which method keeps the old domains best?  `python benchmarks/continual.py [--data FOLDER] [--seeds 0,1,2] [--rows naive,replay-5] [--jobs 2] [--work FOLDER] [--results FILE] [--table]`

A base model learns text of one kind, then two others one after the other: with `--data`, a folder laid out as `wikitext-2/{train,valid}.txt` and `medical/{train,valid}.txt`, encyclopedia, medicine and the
source code of Python's library; without it, the language reference, then the source code. Every row sees the same number of tokens in each stage; `joint` sees the same texts all at once, from fresh
weights, with the sum of all budgets. Each row runs in a process of its own, which tells its time and its largest memory. Rows that stand in the results file are not run again, so the study may be
interrupted and goes on where it was; `--table` prints what there is."""
import argparse, contextlib, json, os, resource, statistics, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch
import torch
from continual_llm import loop
from continual_llm.batches import Batches
from continual_llm.continual import continual_learn
from continual_llm.data import prepare
from continual_llm.evaluate import score_tokens
from continual_llm.memory import domains
from continual_llm.metrics import gap_closed
from continual_llm.source import Source
from continual_llm.tokenizer import Tokenizer, train_tokenizer
from continual_llm.train import pretrain

ROWS = {
    'frozen': dict(method='frozen'), 'naive': dict(method='naive'), 'joint': {},
    'replay-1': dict(method='replay', replay=.01), 'replay-5': dict(method='replay', replay=.05), 'replay-10': dict(method='replay', replay=.1), 'replay-25': dict(method='replay', replay=.25),
    'replay-50': dict(method='replay', replay=.5), 'replay-10+distill': dict(method='replay+distill', replay=.1), 'replay-25+distill': dict(method='replay+distill', replay=.25), 'replay-50+distill': dict(method='replay+distill', replay=.5),
    **{f'{name}-{strength:g}': dict(method=name, strength=strength) for name, strength in (('l2', .003), ('l2', .03), ('l2', .3), ('ewc', 1.), ('ewc', 10.), ('ewc', 100.))}, 'distill': dict(method='distill'), 'self-25+distill': dict(method='self+distill', replay=.25),
    'interpolate': dict(method='interpolate'), 'lora': dict(method='lora', rank=16), 'replay-25+interpolate': dict(method='replay+interpolate', replay=.25),
    'wsd': dict(method='replay', replay=.25, schedule='wsd'), 'sam': dict(method='replay', replay=.25, schedule='wsd'),
    'small-memory': dict(method='replay+distill', replay=.25, memory=.05), 'low-rate': dict(method='replay+distill', replay=.25, rate=1/3)}  # of each text a twentieth is kept; a third of the peak
SAM = .05 # radius in which the worst neighbour is looked for (Foret et al. 2021)


# --- texts -----------------------------------------------------------------------------------------------------------------------------------------------

def cut(source, path, n_bytes, skip=0):
    "Whole texts of a source, from some place on, until there are so many bytes"
    size = 0
    with open(path, 'w', encoding='utf-8') as f:
        for text, _ in Source.of(source).texts():
            size += len(text.encode())
            if skip < size <= skip + n_bytes: f.write(text)


def make_texts(work, data, megabytes):
    "Training and validation text of each domain, in the order of learning"
    size, names = int(1e6*megabytes), ('encyclopedia', 'medicine', 'code') if data else ('reference', 'code')
    for name in names:
        train, valid = work/f'{name}.train.txt', work/f'{name}.valid.txt'
        if valid.exists(): continue
        folder = data and dict(encyclopedia='wikitext-2', medicine='medical').get(name)
        if folder: [cut(data/folder/f'{side}.txt', path, n) for side, path, n in (('train', train, size), ('valid', valid, size//10))]
        else: [cut('builtin:python' if name == 'code' else 'builtin:english', path, n, skip) for path, n, skip in ((train, size, 0), (valid, size//10, size))]
    return names


# --- one row ----------------------------------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def sharpness_aware():
    "Each step of the rate's descent takes its gradient at the worst neighbour within a small ball (Foret et al. 2021)"
    plain = loop.gradients
    def at_the_worst(model, parts, config, step, *more):
        nats, tokens = plain(model, parts, config, step, *more)
        if config.branch is None or step < config.branch: return nats, tokens
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            moves = [(p, SAM*p.grad/(norm + 1e-12)) for p in model.parameters() if p.grad is not None]
            for p, e in moves: p.add_(e)
            model.zero_grad(set_to_none=True)
        plain(model, parts, config, step, *more)
        with torch.no_grad(): [p.sub_(e) for p, e in moves]
        return nats, tokens
    with patch.object(loop, 'gradients', at_the_worst): yield


def course(args):
    "What all runs share"
    return dict(cache=str(args.work/'cache'), precision=args.precision, early_stopping_patience=0, keep_epochs=1, quiet=True)


def finished(folder):
    "Does a complete run stand there?"
    record = folder/'run.json'
    return record.exists() and json.loads(record.read_text())['status'] == 'complete'


def base(args, seed, memory=None):
    "The model that all rows begin with, or the same with another memory"
    names, folder = make_texts(args.work, args.data, args.megabytes), args.work/(f'base-{seed}' + ('' if memory is None else f'-{memory:g}'))
    if finished(folder): return names, folder  # which several rows may read at once
    pretrain(str(args.work/f'{names[0]}.train.txt'), args.config, str(args.work/f'{names[0]}.valid.txt'), tokenizer=str(args.work/'tok'), domain=names[0], epochs=args.epochs, batch_size=16,
             grad_accumulation=1, learning_rate=args.rate, optimizer='muon', warmup_steps=50, seed=seed, memory=memory, save_dir=str(folder), resume=True, **course(args))
    return names, folder


def stages(args, name, seed):
    "Scores of all domains after each stage of a row"
    (first, *others), folder = base(args, seed, ROWS[name].get('memory'))
    rows, given = [], dict(ROWS[name])
    rate = args.rate*given.pop('rate', 1)
    with sharpness_aware() if name == 'sam' else contextlib.nullcontext():
        for domain in others:
            text = args.work/f'{domain}.train.txt'
            steps = 0 if name == 'frozen' else budget(args, folder, text)
            stage = continual_learn(str(folder), str(text), domain, val_data=str(args.work/f'{domain}.valid.txt'), epochs=2*args.epochs, max_steps=steps, seed=seed, max_forgetting=float('inf'),
                                    save_dir=str(args.work/f'{name}-{seed}-{domain}'), resume=True, learning_rate=rate, **given, **course(args))
            folder = stage.folder
            rows.append({k: s.bits_per_byte for k, s in stage.after.items()})
    return rows


def budget(args, folder, text):
    "Steps of the epochs that naive training takes, which no row exceeds"
    tok, shape = Tokenizer.load(args.work/'tok'), json.loads((folder/'run.json').read_text())['settings']
    return args.epochs*Batches(prepare(str(text), tok, args.work/'cache', False).ids, shape['max_seq_len'], 16).steps_per_epoch


def joint(args, seed):
    "All texts at once, from fresh weights"
    names, folder = base(args, seed)
    together = args.work/'joint.txt'
    if not together.exists(): together.write_text(''.join((args.work/f'{n}.train.txt').read_text() for n in names))
    run = pretrain(str(together), args.config, str(args.work/f'{names[0]}.valid.txt'), tokenizer=str(args.work/'tok'), epochs=args.epochs, batch_size=16, grad_accumulation=1, learning_rate=args.rate,
                   optimizer='muon', warmup_steps=50, seed=seed, save_dir=str(args.work/f'joint-{seed}'), resume=True, **course(args))
    stages(args, 'frozen', seed)  # whose memory has every domain's validation tokens
    known = domains(args.work/f'frozen-{seed}-{names[-1]}'/'memory')
    final = {d.name: score_tokens(run.model, d.val, run.tokenizer, precision=args.precision).bits_per_byte for d in known}
    return [final]*(len(names)-1)


def one(args, name, seed):
    "Run a row here and tell"
    _, folder = base(args, seed, ROWS.get(name, {}).get('memory'))  # which is not the row's own work
    if name == 'base': return print(f'base {seed}:', folder)
    begun, busy = time.perf_counter(), time.process_time()
    rows = joint(args, seed) if name == 'joint' else stages(args, name, seed)
    print(json.dumps(dict(row=name, seed=seed, rows=rows, seconds=round(time.perf_counter()-begun, 1), cpu=round(time.process_time()-busy, 1),
                          megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)))


# --- the table --------------------------------------------------------------------------------------------------------------------------------------------

def mean(xs): return statistics.mean(xs)


def row(results, name, kinds):
    "A row's figures, mean over its seeds"
    mine = [r for r in results if r['row'] == name]
    final = [mean(r['rows'][-1].values()) for r in mine]
    return dict(stages=[{k: mean(r['rows'][i][k] for r in mine) for k in kinds[:i+2]} for i in range(len(kinds)-1)], average=mean(final), spread=statistics.pstdev(final),
                cpu=mean(r['cpu'] for r in mine), megabytes=max(r['megabytes'] for r in mine), seeds=sorted(r['seed'] for r in mine))


def table(results):
    "Rows as Markdown, each held against `frozen`, `naive` and `joint` of the same seeds"
    kinds = list(results[0]['rows'][-1])
    lines = [f"| row | {' | '.join(kinds)} | average | {kinds[0]} forgotten | new domain lost | gap closed | time | memory | seeds |", '|---'*(len(kinds)+8) + '|']
    for name in (n for n in ROWS if any(r['row'] == n for r in results)):
        seeds = {r['seed'] for r in results if r['row'] == name}
        def beside(other):
            there = [r for r in results if r['row'] == other and r['seed'] in seeds]
            return row(there, other, kinds) if {r['seed'] for r in there} == seeds else None
        s, frozen, naive, together = beside(name), *map(beside, ('frozen', 'naive', 'joint'))
        each = range(len(kinds)-1) if name != 'joint' else [len(kinds)-2]
        lost = ', '.join(f"{s['stages'][i][kinds[0]]/frozen['stages'][i][kinds[0]] - 1:+.1%}" for i in each) if frozen else ''
        behind = ', '.join(f"{s['stages'][i][kinds[i+1]]/naive['stages'][i][kinds[i+1]] - 1:+.1%}" for i in each) if naive else ''
        gap = gap_closed(naive['average'], s['average'], together['average']) if naive and together else None
        gap = '' if gap is None else f'{gap:.0%}'
        cost = [f"{s[k]/naive[k]:.2f}" if naive else '' for k in ('cpu', 'megabytes')]
        spread = f" ± {s['spread']:.4f}" if len(seeds) > 1 else ''
        last = ' | '.join(f'{b:.4f}' for b in s['stages'][-1].values())
        lines.append(f"| {name} | {last} | {s['average']:.4f}{spread} | {lost} | {behind} | "
                     f"{gap} | {' | '.join(cost)} | {len(s['seeds'])} |")
    return '\n'.join(lines)


def read(path): return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def study(args):
    "Run the rows that are missing, each in a process of its own, some at the same time"
    names = make_texts(args.work, args.data, args.megabytes)
    if not (args.work/'tok').exists(): train_tokenizer(str(args.work/f'{names[0]}.train.txt'), vocab_size=args.vocab, save=args.work/'tok')
    seeds, rows = [int(s) for s in args.seeds.split(',')], args.rows.split(',')
    env = dict(os.environ, OMP_NUM_THREADS=str(max(1, os.cpu_count()//args.jobs)))
    def run(task):
        said = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--one', '{}:{}'.format(*task)], stdout=subprocess.PIPE, text=True, check=True, env=env).stdout.splitlines()[-1]
        if task[0] in ROWS:
            with open(args.results, 'a') as f: f.write(said + '\n')
        print(said, flush=True)
    for names in (['base'], ['frozen'], [r for r in rows if r != 'frozen']):  # each needs what those before it leave behind
        done = {(r['row'], r['seed']) for r in read(args.results)}
        with ThreadPoolExecutor(args.jobs) as pool: list(pool.map(run, [(n, s) for s in seeds for n in names if (n, s) not in done]))


def main():
    "Run what is missing, each row in a process of its own; print the table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder with `wikitext-2` and `medical` (default: text that Python carries)')
    p.add_argument('--work', type=Path, default=Path('checkpoints/study'), help='where runs are kept')
    p.add_argument('--results', type=Path, help='one line of JSON per row and seed (default: in the work folder)')
    p.add_argument('--config', default='tiny', help='shape of the model')
    p.add_argument('--megabytes', type=float, default=2, help='training text of each domain')
    p.add_argument('--vocab', type=int, default=4000, help='pieces of the tokenizer, trained on the first domain')
    p.add_argument('--epochs', type=int, default=2, help='passes over each text')
    p.add_argument('--rate', type=float, default=1e-2, help='peak learning rate')
    p.add_argument('--precision', default='auto')
    p.add_argument('--seeds', default='0')
    p.add_argument('--rows', default=','.join(ROWS))
    p.add_argument('--jobs', type=int, default=2, help='rows at the same time, which share the cores')
    p.add_argument('--one', help=argparse.SUPPRESS)
    p.add_argument('--table', action='store_true', help='print the table of what there is, and run nothing')
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.results = args.results or args.work/'results.jsonl'
    if args.one: return one(args, args.one.rsplit(':', 1)[0], int(args.one.rsplit(':', 1)[1]))
    if not args.table: study(args)
    print(table(read(args.results)))


if __name__ == '__main__': main()
