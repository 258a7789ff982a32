"""Is the memory of a run foretold?  `python benchmarks/peak_memory.py`

Trains models of several shapes for a few steps, each in a process of its own, and holds the largest memory that the system saw against `run_bytes`."""
import json, os, resource, subprocess, sys, tempfile
from continual_llm.footprint import run_bytes
from continual_llm.model import model_config

NARROW = dict(d_model=256, n_layers=6, n_heads=8, n_kv_heads=2, d_ff=768, max_seq_len=256)
MIDDLE = dict(d_model=512, n_layers=6, n_heads=8, n_kv_heads=2, d_ff=1536, max_seq_len=256, dropout=.1)
WIDE = dict(d_model=768, n_layers=8, n_heads=12, n_kv_heads=3, d_ff=2304, max_seq_len=512)
CASES = [(NARROW, 4, 'bf16', 'adamw', False), (NARROW, 16, 'bf16', 'adamw', False), (NARROW, 32, 'fp32', 'muon', False), (MIDDLE, 8, 'fp32', 'adamw', False), (MIDDLE, 16, 'bf16', 'muon', False),
         (MIDDLE, 16, 'bf16', 'adamw', True), (WIDE, 2, 'bf16', 'adamw', False), (WIDE, 8, 'bf16', 'muon', False), (WIDE, 8, 'bf16', 'adamw', True), (WIDE, 4, 'fp32', 'adamw', False)]


def one(work, shape, batch_size, precision, optimizer, recompute):
    "Train here; bytes before the model was made, and at the peak"
    import psutil
    from continual_llm import train
    seen, real = [], train._train
    def watched(*args): return seen.append(psutil.Process().memory_info().rss) or real(*args)
    train._train = watched
    train.pretrain('builtin:english', shape, tokenizer=f'{work}/tok', cache=f'{work}/cache', save_dir=f'{work}/run', overwrite=True, max_steps=5, batch_size=batch_size, grad_accumulation=1,
                   precision=precision, optimizer=optimizer, recompute=recompute, eval_tokens=20_000, memory=0, device='cpu', quiet=True)
    print(json.dumps([seen[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)]))


def main():
    "Run every case, and print one table"
    from continual_llm.tokenizer import train_tokenizer
    print('| width | layers | blocks x tokens | precision | optimizer | recomputed | foretold, MB | measured, MB | ratio |\n' + '|---'*9 + '|')
    with tempfile.TemporaryDirectory() as work:
        train_tokenizer('builtin:english', vocab_size=4000, save=f'{work}/tok')
        for shape, n, precision, optimizer, recompute in CASES:
            said = subprocess.run([sys.executable, __file__, work, json.dumps([shape, n, precision, optimizer, recompute])], stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS='1')).stdout
            before, peak = json.loads(said.splitlines()[-1])
            foretold = run_bytes(model_config(shape, vocab_size=4000), n, before, optimizer, precision=precision, recompute=recompute)
            print(f"| {shape['d_model']} | {shape['n_layers']} | {n} x {shape['max_seq_len']} | {precision} | {optimizer} | {'yes' if recompute else 'no'} | {foretold/1e6:,.0f} | {peak/1e6:,.0f} | {foretold/peak:.2f} |", flush=True)


if __name__ == '__main__': one(sys.argv[1], *json.loads(sys.argv[2])) if len(sys.argv) > 1 else main()
