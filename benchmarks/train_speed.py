"""How many tokens a second does training take in?  `python benchmarks/train_speed.py [--precision bf16] [--threads 1]`

Times the parts of an optimizer step (forward, backward, clipping and step) of a preset on random tokens, and prints the medians."""
import argparse, platform, statistics, time
import torch
from torch import nn
from continual_llm.core import autocast, multiplies_bf16, pick_device, pick_precision
from continual_llm.model import ContinualLLM, model_config
from continual_llm.optim import OptimConfig, make_optimizer


def flags():
    "What is measured"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--config', default='small', help='preset or YAML file (default: small)')
    p.add_argument('--batch_size', type=int, default=16, help='blocks at once (default: 16)')
    p.add_argument('--seq_len', type=int, default=256, help='tokens of a block (default: 256)')
    p.add_argument('--precision', default='auto', help='fp32, bf16, or auto for what the hardware multiplies natively')
    p.add_argument('--threads', type=int, default=0, help="CPU threads; 0 leaves torch's own number")
    p.add_argument('--optimizer', default='adamw', help='adamw or muon')
    p.add_argument('--device', default='auto', help='auto, cuda, mps or cpu')
    p.add_argument('--steps', type=int, default=15, help='measured steps, after two that are not (default: 15)')
    return p.parse_args()


def clock(device):
    "The time, once the device has done what it was given"
    if device.type == 'cuda': torch.cuda.synchronize(device)
    return time.perf_counter()


def step_times(model, opt, x, y, precision, device):
    "Seconds of forward, backward, and clipping with the step"
    marks = [clock(device)]
    with autocast(precision, device): loss = model(x, targets=y, reduction='sum') / y.numel()
    marks.append(clock(device))
    loss.backward()
    marks.append(clock(device))
    nn.utils.clip_grad_norm_(model.parameters(), 1.)
    opt.step()
    opt.zero_grad()
    marks.append(clock(device))
    return [b-a for a, b in zip(marks, marks[1:])]


def machine(device):
    "Whose figures these are"
    amx = ' and AMX' if torch.cpu._is_amx_tile_supported() else ''
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}{amx}"
    return f"{name}, bfloat16 {'native' if multiplies_bf16(device) else 'emulated'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    "Measure and print one table"
    a = flags()
    if a.threads: torch.set_num_threads(a.threads)
    device = pick_device(a.device)
    precision = pick_precision(a.precision, device)
    torch.manual_seed(0)
    model = ContinualLLM(model_config(a.config, max_seq_len=a.seq_len)).to(device)
    opt = make_optimizer(model, OptimConfig(a.optimizer))
    for g in opt.param_groups: g['lr'] = 1e-3
    ids = torch.randint(model.config.vocab_size, (a.batch_size, a.seq_len+1), device=device)  # (B,T+1)
    times = [step_times(model, opt, ids[:, :-1], ids[:, 1:], precision, device) for _ in range(a.steps + 2)][2:]
    whole = statistics.median(map(sum, times))
    print(f"{a.config}: {model.n_params():,} parameters, vocabulary {model.config.vocab_size:,}, batch {a.batch_size} x {a.seq_len}, {a.optimizer}, {precision}"
          f"\n{machine(device)}\n\n| part | median of {a.steps} |\n|---|---|")
    for name, took in zip(('forward', 'backward', 'clip and step'), zip(*times)): print(f"| {name} | {1000*statistics.median(took):.0f} ms |")
    print(f"| whole step | {1000*whole:.0f} ms |\n| **tokens per second** | **{ids[:, 1:].numel()/whole:,.0f}** |")


if __name__ == '__main__': main()
