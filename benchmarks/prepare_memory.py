"""How much memory does it take to tokenize a large text?  `python benchmarks/prepare_memory.py [--megabytes 200]`

Writes a text of that size, splits and tokenizes it, and prints the peak of resident memory above what the imports took."""
import argparse, random, resource, sys, tempfile, time
from pathlib import Path
from continual_llm.core import human_bytes, human_time
from continual_llm.source import Source
from continual_llm.split import prepare_split
from continual_llm.tokenizer import train_tokenizer


def peak():
    "Highest resident memory of this process so far, in bytes"
    try: return 1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def write_text(path, size, seed=0):
    "Documents of invented words, their lengths and frequencies uneven as in real text"
    draw = random.Random(seed)
    words = [''.join(draw.choices('etaoinshrdlucmfwypvbgkjqxz', range(26, 0, -1), k=draw.randint(1, 9))) for _ in range(20_000)]
    often = [1/(i+1) for i in range(len(words))]
    with open(path, 'w') as f:
        while f.tell() < size:
            some = iter(draw.choices(words, often, k=20_000))
            for i, word in enumerate(some): f.write(word + ('.\n' if i%40 == 39 else ' ') + ('\n' if i%400 == 399 else ''))


def main():
    "Prepare a generated text and print the figure"
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--megabytes', type=float, default=200, help='size of the generated text')
    p.add_argument('--vocab_size', type=int, default=8000)
    args = p.parse_args()
    imports = peak()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_text(folder/'sample.txt', min(args.megabytes, 5) * 1e6)
        write_text(folder/'text.txt', args.megabytes * 1e6)
        tokenizer = train_tokenizer(folder/'sample.txt', vocab_size=args.vocab_size)
        start = time.perf_counter()
        train, val, dropped = prepare_split(Source.of(folder/'text.txt'), tokenizer, .1, cache=folder/'cache')
        seconds, above = time.perf_counter() - start, peak() - imports
        print(f"text {human_bytes(train.n_bytes + val.n_bytes)}, {len(train) + len(val):,} tokens, {train.n_docs + val.n_docs:,} documents, "
              f"{human_time(seconds)} ({(train.n_bytes + val.n_bytes)/seconds/1e6:.1f} MB/s)")
        print(f"peak memory above the imports: {above/1e6:.0f} MB (imports {human_bytes(imports)})")


if __name__ == '__main__': main()
