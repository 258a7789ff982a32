"""Is a training step faster than it was?  `python benchmarks/step_against.py OTHER [--config small] [--batch_size 8] [--seq_len 256]`

OTHER is another checkout of this repository, such as `git worktree add ../before COMMIT` makes. Two processes, one for each version, take the same training steps on the CPU, in turn, and the figure is the
median of their ratio; the losses of the last step say whether they still compute the same."""
import argparse, os, statistics, subprocess, sys, tempfile
from pathlib import Path

STEPS = """
import sys, time, torch
config, batch_size, seq_len, vocab_size, dropout, precision, optimizer, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
from continual_llm.core import autocast
from continual_llm.model import ContinualLLM, model_config
from continual_llm.optim import OptimConfig, make_optimizer
torch.manual_seed(0)
model = ContinualLLM(model_config(config, vocab_size=int(vocab_size), max_seq_len=int(seq_len), dropout=float(dropout))).train()
opt = make_optimizer(model, OptimConfig(optimizer))
for group in opt.param_groups: group['lr'] = 1e-4
ids = torch.randint(int(vocab_size), (int(batch_size), int(seq_len) + 1))
for line in sys.stdin:
    begun = time.perf_counter()
    with autocast(precision): loss = model(ids[:, :-1], targets=ids[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    opt.step()
    opt.zero_grad()
    print(time.perf_counter() - begun, loss.item(), flush=True)
"""
SKIPPED = 2 # first steps, in which memory is still being taken


def flags():
    "What is measured"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('other', type=Path, help='folder of the other checkout')
    for name, kind, default, help in (('config', str, 'small', 'preset or YAML file'), ('batch_size', int, 8, 'blocks of a step'), ('seq_len', int, 256, 'tokens of a block'), ('vocab_size', int, 8000, 'pieces of the vocabulary'),
                                      ('dropout', float, 0., 'share of the activations dropped'), ('precision', str, 'bf16', 'fp32 or bf16'), ('optimizer', str, 'adamw', 'adamw or muon'), ('threads', int, 1, 'CPU threads')):
        p.add_argument(f'--{name}', type=kind, default=default, help=f'{help} (default: {default})')
    p.add_argument('--steps', type=int, default=14, help='of each, the first two unmeasured (default: 14)')
    a = p.parse_args()
    if not (a.other/'continual_llm').is_dir(): p.error(f"{a.other} holds no continual_llm; name the folder of a checkout")
    return a


def main():
    "Measure and print one line"
    a = flags()
    words = [str(getattr(a, k)) for k in ('config', 'batch_size', 'seq_len', 'vocab_size', 'dropout', 'precision', 'optimizer', 'threads')]
    with tempfile.TemporaryDirectory() as nowhere:  # not a checkout, which would be imported first
        start = lambda folder: subprocess.Popen([sys.executable, '-c', STEPS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=nowhere, env=dict(os.environ, PYTHONPATH=str(folder.resolve())))
        both = [start(folder) for folder in (a.other, Path(__file__).parents[1])]
        rows = []
        for _ in range(a.steps):
            rows.append([])
            for p in both:
                p.stdin.write('go\n')
                rows[-1].append([float(word) for word in p.stdout.readline().split()])
        for p in both: p.communicate()
    other, here = [1000*statistics.median(r[i][0] for r in rows[SKIPPED:]) for i in range(2)]
    print(f"{' '.join(words)}: {other:.0f} ms there, {here:.0f} ms here; there/here {statistics.median(x[0]/y[0] for x, y in rows[SKIPPED:]):.3f}; last losses {rows[-1][0][1]:.4f} and {rows[-1][1][1]:.4f}")


if __name__ == '__main__': main()
