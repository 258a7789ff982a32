"""What does a way of keeping the old domains cost in a step?  `python benchmarks/stage_speed.py [--methods naive,replay,replay+distill] [--rounds 7]`

A model of English that Python carries begins to learn Python's source code, with one method after the other, round after round, a few steps each. A method's figure is the median over the rounds of its
time for a step divided by that of the first method in the same round, so that a busy machine burdens both. Nothing is learned that anyone would want to keep."""
import argparse, json, os, statistics, tempfile
from pathlib import Path
import torch
from continual_llm.continual import continual_learn
from continual_llm.tokenizer import train_tokenizer
from continual_llm.train import pretrain

SKIPPED = 4 # first steps, in which memory is still being taken


def flags():
    "What is measured"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--methods', default='naive,replay,replay+distill', help='held against the first of them')
    p.add_argument('--config', default='tiny', help='preset or YAML file (default: tiny)')
    p.add_argument('--vocab', type=int, default=4000, help='pieces of the tokenizer (default: 4000)')
    p.add_argument('--batch_size', type=int, default=16, help='blocks of a step (default: 16)')
    p.add_argument('--steps', type=int, default=32, help='of a method in a round (default: 32)')
    p.add_argument('--rounds', type=int, default=7, help='default: 7')
    p.add_argument('--threads', type=int, default=0, help="CPU threads; 0 leaves torch's own number")
    p.add_argument('--device', default='auto', help='auto, cuda, mps or cpu')
    p.add_argument('--compile', action='store_true', help='compile the step')
    return p.parse_args()


def main():
    "Measure and print one table"
    a = flags()
    if a.threads: torch.set_num_threads(a.threads)
    methods, times = a.methods.split(','), []
    with tempfile.TemporaryDirectory() as work:
        course = dict(max_steps=a.steps, batch_size=a.batch_size, grad_accumulation=1, optimizer='muon', device=a.device, compile=a.compile, cache=f'{work}/cache', quiet=True)
        train_tokenizer('builtin:english', vocab_size=a.vocab, save=f'{work}/tok')
        pretrain('builtin:english', a.config, tokenizer=f'{work}/tok', save_dir=f'{work}/base', **course)
        for i in range(a.rounds):
            times.append({})
            for method in methods:
                continual_learn(f'{work}/base', 'builtin:python', 'code', method=method, eval_tokens=1000, max_forgetting=float('inf'), seed=i, save_dir=f'{work}/stage', overwrite=True, **course)
                steps = [r for r in map(json.loads, Path(f'{work}/stage/metrics.jsonl').read_text().splitlines()) if r['kind'] == 'step']
                times[-1][method] = statistics.median(r['tokens']/r['tokens_per_second'] for r in steps[SKIPPED:])
    print(f"{a.config}, {a.batch_size} blocks a step, {torch.get_num_threads()} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n\n| method | ms a step | against {methods[0]} | spread |\n|---|---|---|---|")
    for m in methods:
        ratios = sorted(t[m]/t[methods[0]] for t in times)
        print(f"| {m} | {1000*statistics.median(t[m] for t in times):.1f} | {statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |")


if __name__ == '__main__': main()
