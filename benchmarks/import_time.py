"""What does the package add to the time of importing torch?  `python benchmarks/import_time.py [--pairs 11]`

Times whole Python processes in alternating pairs, so that a busy moment hits both alike, and prints the medians and the median of the pairs' ratios."""
import argparse, os, statistics, subprocess, sys, time

CODES = {'import torch': 'import torch', 'pretrain': 'from continual_llm.train import pretrain'}


def seconds(code):
    "Time of a whole Python process that runs `code`"
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - start


def pairs(n):
    "Pairs (torch alone, with the package), the order turned each time; the first, which only warms the disk's cache, is dropped"
    for i in range(n+1):
        order = list(CODES) if i%2 else list(CODES)[::-1]
        took = {name: seconds(CODES[name]) for name in order}
        if i: yield tuple(took[name] for name in CODES)


def main():
    "Measure and print one table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', type=int, default=11, help='pairs of processes (default: 11)')
    found = list(pairs(p.parse_args().pairs))
    torch_alone, ours = zip(*found)
    ratios = sorted(b/a for a, b in found)
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {len(found)} pairs\n\n| whole process | median | fastest |\n|---|---|---|")
    for name, times in zip(CODES.values(), (torch_alone, ours)): print(f"| `{name}` | {statistics.median(times):.3f} s | {min(times):.3f} s |")
    print(f"| ratio, median of the pairs | {statistics.median(ratios):.3f} | {min(ours)/min(torch_alone):.3f} |")


if __name__ == '__main__': main()
