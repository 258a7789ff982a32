"""What do compiling and `--deterministic` cost, and which of them repeats its bits?  `python benchmarks/compile_cost.py [--configs tiny,small] [--threads 2]`

Takes the same training steps eagerly, eagerly and deterministically, compiled, and both; each in two runs from the same seeds; all in turn, so that a machine's mood meets all of them. Prints steps a second
against the eager ones, the seconds of the first step (into an empty cache of compiled code), whether the two runs have the same weights at the end, and how far those are from the eager ones."""
import argparse, os, statistics, tempfile, time
from types import SimpleNamespace
import torch
from continual_llm.bench import machine_line
from continual_llm.core import autocast, seed_everything
from continual_llm.model import ContinualLLM, model_config
from continual_llm.optim import OptimConfig, make_optimizer
from continual_llm.train import Compiled, machine

MODES = {'eager': (False, False), 'eager, deterministic': (False, True), 'compiled': (True, False), 'compiled, deterministic': (True, True)}
ROW = '| {:6} | {:9} | {:23} | {:>7} | {:>12} | {:>10} | {:>11} | {:>10} |'


def flags():
    "What is measured"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--configs', default='tiny,small', help='presets or YAML files, with commas between them (default: tiny,small)')
    p.add_argument('--precisions', default='fp32,bf16', help='default: fp32,bf16')
    p.add_argument('--batch_size', type=int, default=4, help='blocks at once (default: 4)')
    p.add_argument('--seq_len', type=int, default=128, help='tokens of a block (default: 128)')
    p.add_argument('--vocab_size', type=int, default=4000, help='pieces of the vocabulary (default: 4000)')
    p.add_argument('--threads', type=int, default=2, help='CPU threads; a single one hides that compiled code does not repeat itself (default: 2)')
    p.add_argument('--steps', type=int, default=6, help='measured steps of each run, after one that is not (default: 6)')
    return p.parse_args()


class Twice:
    "One way to train, in two runs from the same seeds"
    def __init__(self, shape, blocks, precision, compiled, deterministic):
        self.precision, self.deterministic = precision, deterministic
        self.models, self.times = [self.fresh(shape) for _ in range(2)], []
        self.nets = [Compiled(m, SimpleNamespace(batch_size=blocks)) if compiled else (lambda x, y, m=m: m(x, targets=y, reduction='sum')) for m in self.models]
        self.opts = [make_optimizer(m, OptimConfig()) for m in self.models]
        for group in [g for opt in self.opts for g in opt.param_groups]: group['lr'] = 1e-3

    def fresh(self, shape):
        seed_everything(0, 'weights')
        return ContinualLLM(shape)

    def step(self, n, ids):
        "Take step n in both runs; the seconds of each"
        with machine(self.deterministic):
            for model, net, opt in zip(self.models, self.nets, self.opts):
                seed_everything(0, 'step', n)
                begun = time.perf_counter()
                with autocast(self.precision): loss = net(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())/ids[:, 1:].numel()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
                opt.step()
                opt.zero_grad()
                self.times.append(time.perf_counter() - begun)

    @property
    def same(self): return all(torch.equal(a, b) for a, b in zip(*[m.state_dict().values() for m in self.models]))

    def apart(self, other):
        "Largest difference of a weight"
        return max(float((a-b).abs().max()) for a, b in zip(self.models[0].state_dict().values(), other.models[0].state_dict().values()))


def measure(a, config, precision):
    "Rows of the table"
    shape = model_config(config, max_seq_len=a.seq_len, vocab_size=a.vocab_size)
    ways = {name: Twice(shape, a.batch_size, precision, *mode) for name, mode in MODES.items()}
    g = torch.Generator().manual_seed(0)
    for n in range(a.steps + 1):
        ids = torch.randint(a.vocab_size, (a.batch_size, a.seq_len+1), generator=g)  # (B,T+1)
        for way in ways.values(): way.step(n, ids)
    eager = ways['eager']
    usual = statistics.median(eager.times[2:])
    for name, way in ways.items():
        took = statistics.median(way.times[2:])
        yield ROW.format(config, precision, name, f'{1/took:.2f}', f'{usual/took:.2f}', f'{way.times[0]:.1f} s', 'yes' if way.same else 'NO', f'{way.apart(eager):.0e}' if way is not eager else '')


def main():
    "Measure and print one table"
    a = flags()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache
        print(f"batch {a.batch_size} x {a.seq_len}, vocabulary {a.vocab_size:,}, adamw, medians of {2*a.steps} steps\n{machine_line('cpu')}\n")
        print(ROW.format('model', 'precision', 'how', 'steps/s', 'to eager', 'first step', 'repeats', 'off eager'), '|---'*8 + '|', sep='\n')
        for config in a.configs.split(','):
            for precision in a.precisions.split(','):
                for row in measure(a, config, precision): print(row, flush=True)
                torch._dynamo.reset()


if __name__ == '__main__': main()
