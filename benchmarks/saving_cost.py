"""What does a save cost, and how fast is one verified?  `python benchmarks/saving_cost.py [--megabytes 120] [--times 7]`

Saves a resume state of that size (weights and two moments) by plain `torch.save`, by `torch.save` and a sync to the disk, and by ours, which hashes, syncs the file and its folders and renames; in turn, so
that a disk's mood meets all three. Prints medians, the share of five minutes, and the speed of reading a state back verified."""
import argparse, os, statistics, tempfile, time
from pathlib import Path
import torch
from continual_llm.archive import load_object
from continual_llm.checkpoint import Checkpoints


def timed(act):
    "Seconds that passed, and of them those that this process computed"
    begun, busy = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - begun, time.process_time() - busy


def synced(state, path):
    "Plain `torch.save` whose bytes are on the disk when it returns"
    with open(path, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())


def main():
    "Measure, and print the figures"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--megabytes', type=float, default=120, help='size of the state')
    p.add_argument('--times', type=int, default=7, help='how often each is measured')
    p.add_argument('--folder', help='on the disk to measure (default: the system\'s place for temporary files)')
    args = p.parse_args()
    n = int(args.megabytes*1e6/4/3/20)  # twenty tensors, each with two moments
    state = dict(model_state_dict={f'w{i}': torch.randn(n) for i in range(20)}, optimizer={i: dict(exp_avg=torch.randn(n), exp_avg_sq=torch.randn(n)) for i in range(20)})
    seen, step = dict(plain=[], synced=[], ours=[], verified=[]), iter(range(1, 10**6))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store, path = Checkpoints(Path(folder)/'run'), Path(folder)/'plain.pt'
        for _ in range(args.times):
            seen['plain'].append(timed(lambda: torch.save(state, path)))
            seen['synced'].append(timed(lambda: synced(state, path)))
            seen['ours'].append(timed(lambda: store.save_last(state, next(step))))
            newest = store.folder/'last'/f'{store.steps()[-1]:06d}.pt'
            seen['verified'].append(timed(lambda: load_object(newest)))
        size = newest.stat().st_size/1e6
    s = {k: statistics.median(wall for wall, _ in v) for k, v in seen.items()}
    busy = {k: statistics.median(cpu for _, cpu in v) for k, v in seen.items()}
    print(f"{size:.0f} MB, medians of {args.times}: torch.save {s['plain']:.2f} s, with a sync {s['synced']:.2f} s, ours {s['ours']:.2f} s ({s['ours']/s['synced']:.2f} times the synced one)")
    print(f"one save in five minutes takes {s['ours']/3:.2f} % of the time; verified and loaded at {size/s['verified']:.0f} MB/s")
    print(f"of the processor alone: torch.save {busy['plain']:.2f} s, ours {busy['ours']:.2f} s; verified and loaded at {size/busy['verified']:.0f} MB/s")


if __name__ == '__main__': main()
