"""When does a model begin to learn its text by heart?  `python benchmarks/overfit.py --data FOLDER [--cases narrow:100:3e-3,...] [--epochs 60] [--results FILE] [--table]`

FOLDER holds `train.txt` and `valid.txt` of WikiText-2. A small model reads the beginning of `train.txt`, so many kB of it, again and again at a rate that stays where it is (AdamW, dropout 0.1, steps of 8 blocks of 128 tokens), until the validation loss has not fallen for three
epochs; the epoch that was best is kept. A case is a model, the kB and the rate. An hour on one busy core; rows that stand in the results are not made again. `overfits_at` of `continual_llm.plan` was fitted to these rows."""
import argparse, json, tempfile
from pathlib import Path
from plan_check import excerpt
from speed import read
from continual_llm.plan import overfits_at
from continual_llm.tokenizer import train_tokenizer
from continual_llm.train import pretrain

MODELS = dict(narrow=dict(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=192, max_seq_len=128, dropout=.1),
              wide=dict(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=384, max_seq_len=128, dropout=.1))
CASES = 'narrow:100:3e-3,wide:100:3e-3,narrow:300:3e-3,wide:300:3e-3,wide:100:1e-3,narrow:1000:3e-3'
KEYS = 'model', 'kilobytes', 'rate'


def measure(a, model, kilobytes, rate, work):
    "A row"
    text, valid = excerpt(a.data/'train.txt', kilobytes, work/'train.txt'), excerpt(a.data/'valid.txt', min(150, kilobytes*2), work/'valid.txt')
    run = pretrain(text, MODELS[model], val_data=valid, tokenizer=train_tokenizer(text, vocab_size=a.vocab_size), epochs=a.epochs, batch_size=8, grad_accumulation=1, learning_rate=rate, warmup_steps=50, schedule='wsd', memory=0,
                   keep_epochs=1, spike=0, cache=str(work/'cache'), save_dir=str(work/'run'), quiet=True)
    return dict(zip(KEYS, (model, kilobytes, rate)), parameters=run.model.n_params(), tokens=run.history.column('eval', 'seen')[0], best=run.best_epoch, over=bool(run.stopped), curve=[round(b, 4) for b in run.history.column('eval', 'bits_per_byte')])


def table(rows):
    "One line for each case"
    print('| model | kB | rate | parameters | tokens | best epoch | foretold |\n' + '|---'*7 + '|')
    for r in rows: print(f"| {r['model']} | {r['kilobytes']} | {r['rate']:g} | {r['parameters']:,} | {r['tokens']:,} | {r['best']} | {overfits_at(r['tokens'], r['parameters']):.0f} |")


def main():
    "Measure what is missing, and print one table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('.'))
    p.add_argument('--cases', default=CASES)
    p.add_argument('--epochs', type=int, default=60)
    p.add_argument('--vocab_size', type=int, default=2000)
    p.add_argument('--results', type=Path, default=Path(__file__).parent/'overfit.jsonl')
    p.add_argument('--table', action='store_true', help='print what there is, and measure nothing')
    a = p.parse_args()
    rows = read(a.results)
    for case in () if a.table else a.cases.split(','):
        model, kilobytes, rate = case.split(':')
        case = model, int(kilobytes), float(rate)
        if case in [tuple(r[k] for k in KEYS) for r in rows]: continue
        with tempfile.TemporaryDirectory() as work: rows.append(measure(a, *case, Path(work)))
        with a.results.open('a') as f: print(json.dumps(rows[-1]), file=f)
    table(rows)


if __name__ == '__main__': main()
