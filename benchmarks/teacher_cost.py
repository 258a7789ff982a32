"""How much longer is a step with a teacher?  `python benchmarks/teacher_cost.py [--rows few,half-hour] [--threads 1] [--steps 8]`

The step of a row of `quality.py`, compiled, forward and backward, with no teacher, with one of the model's own shape, and with four; the steps take turns, and what is printed is the median of the ratios."""
import argparse, statistics, time
from types import SimpleNamespace
import torch
from quality import ROWS, Student, loss_of
from continual_llm.core import autocast, pick_device, pick_precision
from continual_llm.model import ContinualLLM


def taken(step, device):
    "Seconds of a step"
    begun = time.perf_counter()
    step().item()  # waits for the device
    return time.perf_counter() - begun


def cost(row, steps, device):
    "Number of teachers -> times as long as without; and the seconds of a step without"
    precision, ids = pick_precision('auto', device), torch.randint(row.vocab, (row.batch, row.seq_len + 1))
    model, teachers = Student(row).to(device).train(), [ContinualLLM(row.shape).to(device).eval().requires_grad_(False) for _ in range(4)]
    losses = {n: loss_of(model, SimpleNamespace(batch_size=row.batch), teachers[:n], True) for n in (0, 1, 4)}
    def step(loss_fn):
        with autocast(precision, device): loss, n = loss_fn(model, (ids[:, :-1], ids[:, 1:]))
        (loss/n).backward()
        model.zero_grad()
        return loss.detach()
    took = {n: [] for n in losses}
    for i in range(2 + steps):  # the first two are not counted
        for n, loss_fn in losses.items(): took[n].append(taken(lambda: step(loss_fn), device))
    return {n: statistics.median(a/b for a, b in zip(took[n][2:], took[0][2:])) for n in (1, 4)}, statistics.median(took[0][2:])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', default='few,half-hour', help='of `quality.py`, with commas between them')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--steps', type=int, default=8, help='of each kind')
    p.add_argument('--device', default='auto')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.rows.split(','):
        ratios, seconds = cost(ROWS[name], a.steps, pick_device(a.device))
        print(f"{name}: {seconds:.2f} s a step; with one teacher {ratios[1]:.2f} times as long, with four {ratios[4]:.2f} times", flush=True)


if __name__ == '__main__': main()
