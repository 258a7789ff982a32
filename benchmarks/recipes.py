"""What is a recipe worth on a text of one's own?  `python benchmarks/recipes.py --data FOLDER [--megabytes 2] [--epochs 12] [--results FILE] [--table] [--mini]`

FOLDER holds `train.txt` of WikiText-2. Its beginning, a tenth of which is kept to judge by, is learned by the preset `tiny` through `pretrain` itself, in as many passes with each recipe; all else is as the recipe has it. One thread. Rows that stand in the results file are not run
again; `--table` prints what there is, and `--mini` does all of it in miniature."""
import argparse, json, os, tempfile
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from plan_check import excerpt
from speed import read
from continual_llm.bench import machine_line
from continual_llm.core import nearest, pick_device
from continual_llm.train import pretrain

WAYS = {'plain': {}, 'plain, ten times the rate': dict(learning_rate=3e-3), 'plain, ten times the rate, short warmup': dict(learning_rate=3e-3, warmup_steps=100), 'small-data': dict(recipe='small-data'), 'small-data, decay 1': dict(recipe='small-data', weight_decay=1.)}


def run(a, way, work):
    "A run, and what came of it"
    data = excerpt(a.data/'train.txt', 1000*a.megabytes, work/'train.txt')
    small = dict(vocab_size=340, max_seq_len=32) if a.mini else dict(vocab_size=4000)
    done = pretrain(data=data, config='tiny', epochs=a.epochs, memory=0., keep_epochs=1, device='cpu', cache=str(work/'cache'), save_dir=str(work/'run'), overwrite=True, quiet=True, **small, **WAYS[way])
    evals = done.history.rows('eval')
    best = min(evals, key=lambda r: r['loss'])
    return dict(way=way, asked=WAYS[way], megabytes=a.megabytes, epochs=a.epochs, seed=0, parameters=done.model.n_params(), steps=evals[-1]['step'], stopped=done.stopped, curve=[[r['epoch'], round(r['train_loss'], 4), round(r['bits_per_byte'], 4)] for r in evals],
                best_epoch=best['epoch'], bits_per_byte=best['bits_per_byte'], word_perplexity=best['word_perplexity'], seconds=round(done.history.rows('step')[-1]['seconds'], 1), machine=machine_line(pick_device('cpu')))


def table(rows):
    "Rows as Markdown"
    return '\n'.join(['| recipe | megabytes | steps | training loss at the end | bits per byte, best | per word | in pass | seconds |', '|---'*8 + '|',
                      *[f"| {r['way']} | {r['megabytes']:g} | {r['steps']} | {r['curve'][-1][1]:.2f} | {r['bits_per_byte']:.4f} | {r['word_perplexity']:.0f} | {r['best_epoch']} | {r['seconds']:.0f} |" for r in rows]])


def main():
    "Run what is missing; print the table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('.'))
    p.add_argument('--megabytes', type=float, default=2., help='of the text')
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--ways', default=';'.join(WAYS), help='which, with semicolons between them')
    p.add_argument('--results', type=Path, default=Path('checkpoints/recipes.jsonl'), help='one line of JSON a run')
    p.add_argument('--table', action='store_true', help='print what there is, and run nothing')
    p.add_argument('--mini', action='store_true', help='everything in miniature')
    a = p.parse_args()
    if a.mini: a.megabytes, a.epochs = .02, 2
    ways = a.ways.split(';')
    for way in ways:
        if way not in WAYS: raise SystemExit(f"--ways: {way!r} is not one of {'; '.join(WAYS)}{nearest(way, WAYS)}")
    rows = [r for r in read(a.results) if a.table or (r['way'] in ways and (r['megabytes'], r['epochs']) == (a.megabytes, a.epochs))]
    a.results.parent.mkdir(parents=True, exist_ok=True)
    for way in [w for w in ways if not a.table and w not in {r['way'] for r in rows}]:
        with tempfile.TemporaryDirectory() as work: rows.append(run(a, way, Path(work)))
        with open(a.results, 'a') as f: f.write(json.dumps(rows[-1]) + '\n')
        print(f"{way}: {rows[-1]['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == '__main__': main()
