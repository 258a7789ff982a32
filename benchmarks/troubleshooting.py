"""What helps a run that disappoints?  `python benchmarks/troubleshooting.py [--results FILE] [--table] [--mini]`

Runs of a small model on 60,000 characters of the English that every Python carries, judged by the 30,000 that follow: with the settings of `plain` and of `small-data`, slow and fast, stopped early or not. Each differs from another in one thing.
Rows that stand in the results file are not run again; `--table` prints what there is. `nbs/troubleshooting.ipynb` tells what follows from it."""
import argparse, json, tempfile, time
from pathlib import Path
from speed import read
from continual_llm.bench import machine_line
from continual_llm.core import pick_device
from continual_llm.source import Source
from continual_llm.train import pretrain

SHAPE = dict(d_model=96, n_layers=3, n_heads=4, n_kv_heads=4, d_ff=256, max_seq_len=64)
PLAIN = dict(epochs=20, learning_rate=3e-3, warmup_steps=20, early_stopping_patience=0)
SMALL = dict(epochs=20, recipe='small-data', warmup_steps=20)
RUNS = {'plain': PLAIN, 'plain, a tenth of the rate': dict(PLAIN, learning_rate=3e-4), 'plain, dropout 0.3': dict(PLAIN, dropout=.3), 'plain, ten times the warmup': dict(PLAIN, warmup_steps=200),
        'plain, half the width': dict(PLAIN, config=dict(SHAPE, d_model=48, d_ff=128)), 'plain, twice the text, half the passes': dict(PLAIN, epochs=10, more=60_000), 'small-data': SMALL, 'small-data, decay 3, dropout 0.2': dict(SMALL, weight_decay=3., dropout=.2),
        'small-data, 8 epochs': dict(SMALL, epochs=8), **{f'small-data, patience {n}, an evaluation every 8 steps': dict(SMALL, early_stopping_patience=n, eval_every=8) for n in (3, 8)}}


def texts(folder, mini, more=0):
    "What is learned from and what is judged by, as files; `more` characters to learn from stand behind those that judge"
    text = ''.join(t for t, _ in Source.of('builtin:english').texts())
    learned, judged = (6_000, 3_000) if mini else (60_000, 30_000)
    (folder/'train.txt').write_text(text[:learned] + text[learned + judged:learned + judged + more])
    (folder/'valid.txt').write_text(text[learned:learned + judged])
    return dict(data=str(folder/'train.txt'), val_data=str(folder/'valid.txt'), cache=str(folder/'cache'), vocab_size=400 if mini else 1000)


def run(name, folder, mini):
    "A run, and what came of it"
    begun, asked = time.perf_counter(), {**RUNS[name], **(dict(epochs=2) if mini else {})}
    how = dict(config=SHAPE, batch_size=8, grad_accumulation=1, memory=0., keep_epochs=1, quiet=True, **texts(folder, mini, asked.pop('more', 0)))
    done = pretrain(save_dir=str(folder/str(list(RUNS).index(name))), **{**how, **asked})
    evals = done.history.rows('eval')
    return dict(run=name, asked=asked, curve=[[r['step'], round(r['train_loss'], 4), round(r['loss'], 4)] for r in evals], best_epoch=done.best_epoch, best=round(done.best_loss, 4), bits_per_byte=round(min(r['bits_per_byte'] for r in evals), 4),
                stopped=done.stopped, steps=evals[-1]['step'], seconds=round(time.perf_counter() - begun, 1), machine=machine_line(pick_device('cpu')))


def table(rows):
    "Rows as Markdown"
    lines = ['| run | steps | best epoch | training loss at the end | validation loss, best | at the end | bits per byte, best |', '|---'*7 + '|']
    return '\n'.join([*lines, *[f"| {r['run']} | {r['steps']} | {r['best_epoch']} | {r['curve'][-1][1]:.2f} | {r['best']:.3f} | {r['curve'][-1][2]:.3f} | {r['bits_per_byte']:.3f} |" for r in rows]])


def main():
    "Run what is missing; print the table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--results', type=Path, default=Path('checkpoints/troubleshooting.jsonl'), help='one line of JSON a run')
    p.add_argument('--table', action='store_true', help='print what there is, and run nothing')
    p.add_argument('--mini', action='store_true', help='everything in miniature')
    a = p.parse_args()
    rows = read(a.results)
    a.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in [n for n in RUNS if not a.table and n not in {r['run'] for r in rows}]:
            rows.append(run(name, Path(folder), a.mini))
            with open(a.results, 'a') as f: f.write(json.dumps(rows[-1]) + '\n')
            print(f"{name}: {rows[-1]['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == '__main__': main()
