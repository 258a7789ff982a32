"""What do settings of the C library's allocator change in a training step?  `python benchmarks/allocator.py [--configs small,medium] [--rounds 5]`

glibc gives large blocks of memory back to the system as soon as they are free, and the next step pays for every page anew. Each setting is an environment variable, read when a process starts: one process for each takes training steps on the
CPU, in turn, and the figure is the median of the ratio to the process without any. Counted is processor time, so that other programs matter less."""
import argparse, os, statistics, subprocess, sys, tempfile
from pathlib import Path

STEPS = """
import resource, sys, torch
config, batch_size, seq_len, precision, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
import time
from continual_llm.bench import train_task
from continual_llm.model import model_config
step = train_task(model_config(config, vocab_size=8000, max_seq_len=int(seq_len), dropout=0.), int(batch_size), int(seq_len), precision, 'adamw', 'cpu')[2]
for line in sys.stdin:
    begun, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    now = resource.getrusage(resource.RUSAGE_SELF)
    print(time.process_time() - begun, now.ru_minflt - faults, now.ru_maxrss/1e6, flush=True)
"""
KEEP = dict(MALLOC_TRIM_THRESHOLD_=str(2**32), MALLOC_TOP_PAD_=str(2**28))
WAYS = {'as it is': {}, 'keep what is free': KEEP, 'all from the heap': dict(MALLOC_MMAP_THRESHOLD_=str(2**32)), 'both': dict(KEEP, MALLOC_MMAP_THRESHOLD_=str(2**32))}
SIZES = dict(small=(8, 256), medium=(1, 512)) # blocks of a step, tokens of a block


def flags():
    "What is measured"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--configs', default='small,medium', help='default: small,medium')
    p.add_argument('--precision', default='bf16', help='default: bf16')
    p.add_argument('--threads', type=int, default=1, help='default: 1')
    p.add_argument('--rounds', type=int, default=5, help='steps of each that are measured, after two that are not (default: 5)')
    return p.parse_args()


def measure(a, config):
    "Rows of the table"
    with tempfile.TemporaryDirectory() as nowhere:
        def start(more): return subprocess.Popen([sys.executable, '-c', STEPS, config, *map(str, SIZES.get(config, (4, 256))), a.precision, str(a.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=nowhere,
                                                 env={**{k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}, 'PYTHONPATH': str(Path(__file__).parents[1]), **more})
        ways, rounds = {name: start(more) for name, more in WAYS.items()}, []
        for _ in range(a.rounds + 2):
            rounds.append({})
            for name, p in ways.items():
                p.stdin.write('go\n')
                rounds[-1][name] = [float(word) for word in p.stdout.readline().split()]
        for p in ways.values(): p.communicate()
    for name in ways:
        seconds, faults, peak = [statistics.median(r[name][i] for r in rounds[2:]) for i in range(3)]
        yield f"| {config} | {name} | {1000*seconds:.0f} ms | {statistics.median(r['as it is'][0]/r[name][0] for r in rounds[2:]):.2f} | {faults:,.0f} | {peak:.2f} GB |"


def main():
    "Measure and print one table"
    a = flags()
    print(f"{a.precision}, {a.threads} thread{'s'*(a.threads > 1)}, median of {a.rounds} steps", '', '| model | allocator | step | to as it is | page faults | peak |', '|---'*6 + '|', sep='\n')
    for config in a.configs.split(','):
        for row in measure(a, config): print(row, flush=True)
    print('', *(f"{name}: {' '.join(f'{k}={v}' for k, v in more.items())}" for name, more in WAYS.items() if more), sep='\n')


if __name__ == '__main__': main()
