"""Does a range test find the best rate?  `python benchmarks/lr_find.py --data FOLDER [--rates 1e-3,3e-3,1e-2,3e-2] [--optimizers adamw,muon] [--steps 150] [--results FILE] [--table]`

FOLDER holds `train.txt` and `valid.txt` of WikiText-2. For each optimizer: a range test with `tiny`, and real runs of so many steps at each of the rates, judged by the first 50,000 tokens of `valid.txt`; 25 minutes on one busy core. Rows that stand in the
results are not made again."""
import argparse, json, tempfile
from pathlib import Path
from speed import read
from continual_llm.lr_find import lr_find
from continual_llm.tokenizer import train_tokenizer
from continual_llm.train import pretrain


def keep(a, **row):
    "Write a row down"
    with a.results.open('a') as f: print(json.dumps(row), file=f)


def measure(a, work):
    "The rows that are missing"
    have = {(r['kind'], r['optimizer'], r.get('rate')) for r in read(a.results)}
    wanted = [(kind, o, rate) for o in a.optimizers for kind, rate in [('test', None), *(('run', r) for r in a.rates)]]
    if all(w in have for w in wanted): return
    train, valid = [str(a.data/f'{name}.txt') for name in ('train', 'valid')]
    same = dict(data=train, val_data=valid, tokenizer=train_tokenizer(train, vocab_size=a.vocab_size), config='tiny', batch_size=8, grad_accumulation=1, cache=f'{work}/cache', quiet=True)
    for kind, o, rate in wanted:
        if (kind, o, rate) in have: continue
        if kind == 'test':
            found = lr_find(**same, optimizer=o)
            keep(a, kind=kind, optimizer=o, **found.suggestions, over=found.over, rates=[float(f'{r:.3g}') for r in found.rates], means=[round(m, 4) for m in found.means])
        else:
            run = pretrain(**same, optimizer=o, learning_rate=rate, max_steps=a.steps, warmup_steps=20, eval_tokens=50_000, save_dir=f'{work}/run', overwrite=True, memory=0)
            keep(a, kind=kind, optimizer=o, rate=rate, steps=a.steps, loss=round(run.best_loss, 4))


def table(rows):
    "One line for each optimizer"
    print('| optimizer | steepest | a tenth | loss at each rate |\n|---|---|---|---|')
    for t in (r for r in rows if r['kind'] == 'test'):
        runs = sorted((r['rate'], r['loss']) for r in rows if r['kind'] == 'run' and r['optimizer'] == t['optimizer'])
        print(f"| {t['optimizer']} | {t['steepest']:.1e} | {t['tenth']:.1e} | " + ', '.join(f'{rate:g}: {loss:.3f}' for rate, loss in runs) + ' |')


def main():
    "Measure what is missing, and print one table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('.'))
    p.add_argument('--rates', type=lambda s: [float(r) for r in s.split(',')], default=[1e-3, 3e-3, 1e-2, 3e-2])
    p.add_argument('--optimizers', type=lambda s: s.split(','), default=['adamw', 'muon'])
    p.add_argument('--steps', type=int, default=150)
    p.add_argument('--vocab_size', type=int, default=8000)
    p.add_argument('--results', type=Path, default=Path(__file__).parent/'lr_find.jsonl')
    p.add_argument('--table', action='store_true', help='print what there is, and measure nothing')
    a = p.parse_args()
    if not a.table:
        with tempfile.TemporaryDirectory() as work: measure(a, work)
    table(read(a.results))


if __name__ == '__main__': main()
