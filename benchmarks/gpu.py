"""Is the library right on a GPU, what does it do there, and how near does training come to what the GPU can?  `python benchmarks/gpu.py [--out gpu] [--minutes 9]`

Checks every path that only a GPU takes against float64 on the CPU; then measures the limits of the machine, a step of `--config` for growing batches (eager and compiled), where a step's time goes, other libraries
on the same shape where they are installed, and writing. Each row is printed and put into OUT.jsonl as soon as it is known, and OUT.md holds them all; a part that fails or runs out of time leaves a row that says so, and the others go
on. `--device cpu --mini` rehearses every part in miniature."""
import argparse, contextlib, copy, json, math, os, signal, statistics, tempfile, time, traceback, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F
from continual_llm import ops
from continual_llm.attention import rotary_table, rotate
from continual_llm.batches import Batches, moved
from continual_llm.bench import interleaved, limit_tasks, machine_line
from continual_llm.core import autocast, multiplies_bf16, numpy_generator
from continual_llm.footprint import count_params, flops_per_token
from continual_llm.generate import generate
from continual_llm.loop import LoopConfig, Parts, take_step
from continual_llm.model import ContinualLLM, ModelConfig, model_config
from continual_llm.narrow import for_writing
from continual_llm.optim import OptimConfig, make_optimizer
from continual_llm.tokenizer import train_tokenizer
from continual_llm.train import Compiled, machine, make_parts, pretrain

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # what cuBLAS needs to repeat itself, before it is first used

LARGE = dict(batches=(4, 8, 16, 32, 64), steps=8, seq_len=1024, vocab_size=32_000, written=128, rows=128, side=8192)
MINI = dict(batches=(1, 2), steps=2, seq_len=32, vocab_size=300, written=4, rows=2, side=256)
SMALL = dict(vocab_size=1003, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=128)  # of the checks; 1003 is no multiple of 64


def flags():
    "What is measured"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='gpu', help='files that are written, without their ending (default: gpu)')
    p.add_argument('--device', default='cuda', help='default: cuda')
    p.add_argument('--config', default='medium', help='preset or YAML file (default: medium)')
    p.add_argument('--minutes', type=float, default=9., help='for all of it (default: 9)')
    p.add_argument('--parts', default=','.join(PARTS), help='which, with commas between them (default: all)')
    p.add_argument('--mini', action='store_true', help='everything in miniature, to see whether it runs')
    a = p.parse_args()
    a.size, a.on = MINI if a.mini else LARGE, torch.device(a.device)
    if a.mini:
        a.config, compiler = 'tiny', torch.compile
        torch.compile = lambda f, mode=None, **how: compiler(f, backend='aot_eager', **how)  # all of it but the code that it would write
    a.precision = 'bf16' if multiplies_bf16(a.on) else 'fp32'
    return a


def wait(on):
    if on.type == 'cuda': torch.cuda.synchronize(on)


def clocked(on, do, n):
    "Median seconds of n calls, after one that is not counted; and the seconds of that one"
    times = []
    for _ in range(n + 1):
        begun = time.perf_counter()
        do()
        wait(on)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]), times[0]


# ---- the machine ----

def about(a):
    "Whose figures these are"
    yield dict(what='machine', text=machine_line(a.on))
    if a.on.type != 'cuda': return
    p = torch.cuda.get_device_properties(a.on)
    yield dict(what='device', text=f"compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory/1e9:.1f} GB, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")


def limits(a):
    "Products and copies, as `continual-llm bench` measures them; and a last product whose vocabulary is filled up, or is not"
    for f in interleaved(limit_tasks(a.on), 2 if a.mini else 10, lambda: wait(a.on)): yield dict(what=f.what, per_second=f.speed, unit=f.unit)
    kind, n = torch.bfloat16 if a.precision == 'bf16' else torch.float32, 256 if a.mini else 16_384
    x, w = [torch.randn(rows, 768, device=a.on, dtype=kind) for rows in (n, 50_257)]
    for name, m in {'as it is': w, 'filled up': F.pad(w, (0, 0, 0, -len(w) % 64))}.items(): yield dict(what=f'scores of 50,257 pieces, {name}', ms=1000*clocked(a.on, lambda: F.linear(x, m), 2 if a.mini else 10)[0])


# ---- the checks ----

def held(name, off, bound): return dict(what=name, off=float(off), bound=bound, ok=bool(off <= bound))


def apart(got, want):
    "Length of the difference, as a share"
    got, want = [torch.cat([t.detach().cpu().double().flatten() for t in ts]) for ts in (got, want)]
    return float((got - want).norm()/want.norm())


def losses(model, ids, precision, device, net=None):
    "Loss and gradients of some tokens"
    model.zero_grad(set_to_none=True)
    with autocast(precision, device): loss = (model if net is None else net)(ids[:, :-1], targets=ids[:, 1:])
    loss.backward()
    return [loss], [p.grad for p in model.parameters()]


def checked_losses(a):
    "The whole model's loss and gradients in every way that is taken on a GPU"
    for more in ({}, dict(qk_norm=True, tie_embeddings=False)):
        torch.manual_seed(0)
        model = ContinualLLM(ModelConfig(**SMALL, **more))
        ids = torch.randint(SMALL['vocab_size'], (4, 129))
        want, here, there = losses(copy.deepcopy(model).double(), ids, 'fp32', 'cpu'), copy.deepcopy(model).to(a.on), ids.to(a.on)
        def row(name, precision, **how):
            got = losses(here, there, precision, a.on, **how)
            bound = 1e-4 if precision == 'fp32' else 5e-2
            for which, g, w in zip(('loss', 'gradients'), got, want): yield held(f"{which}{' with qk_norm' if more else ''}, {name}, {precision}", apart(g, w), bound)
        for precision in dict.fromkeys(('fp32', a.precision)):
            yield from row('all scores', precision)
            usual, ops.HELD = ops.HELD, 0
            yield from row('scores in slices', precision)
            ops.HELD, here.recompute = usual, True
            yield from row('recomputed', precision)
            here.recompute = False
        if not more: yield from row('compiled', a.precision, net=torch.compile(here, dynamic=False))


def checked_shards(a):
    "`--parallel fsdp` with a group of one process: every weight a share of itself"
    import torch.distributed as dist
    from continual_llm.distributed import Processes
    from continual_llm.sharded import all_of, shard
    dist.init_process_group('nccl' if a.on.type == 'cuda' else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model, ids = ContinualLLM(ModelConfig(**SMALL)), torch.randint(SMALL['vocab_size'], (4, 129))
        want, here = losses(copy.deepcopy(model).double(), ids, 'fp32', 'cpu'), shard(copy.deepcopy(model).to(a.on), Processes(sharded=True), a.on)
        for precision in dict.fromkeys(('fp32', a.precision)):
            loss, grads = losses(here, ids.to(a.on), precision, a.on)
            for which, g, w in (('loss', loss, want[0]), ('gradients', [all_of(g) for g in grads], want[1])): yield held(f'{which}, in shares, {precision}', apart(g, w), 1e-4 if precision == 'fp32' else 5e-2)
    finally: dist.destroy_process_group()


def checked_attention(a):
    "The fast kernel alone, which is not left for another, and rotary positions"
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = [torch.randn(2, h, 128, 64) for h in (12, 3, 3)]
    want = F.scaled_dot_product_attention(*[t.double() for t in (q, k, v)], is_causal=True, enable_gqa=True)
    kind = torch.bfloat16 if a.precision == 'bf16' else torch.float32
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION): got = F.scaled_dot_product_attention(*[t.to(a.on, kind) for t in (q, k, v)], is_causal=True, enable_gqa=True)
    yield held(f'attention, flash kernel with shared keys, {a.precision}', apart([got], [want]), 1e-2)
    cos, sin = [t[:, None] for t in rotary_table(64, 128)]
    x = q.transpose(1, 2)
    yield held('rotary positions, fp32', apart([rotate(x.to(a.on), cos.to(a.on), sin.to(a.on))], [rotate(x.double(), cos.double(), sin.double())]), 1e-6)


def checked_batches(a):
    "Batches made on the device, and how often it is waited for in a step"
    ids = numpy_generator(0, 'gpu').integers(1003, size=50_000, dtype=np.uint16)
    host, there = [Batches(ids, 128, 4, 2) for _ in range(2)]
    there.ids = moved(ids, a.on)
    same = all(x.equal(x1.cpu()) and y.equal(y1.cpu()) for step in range(60) for (x, y), (x1, y1) in zip(host(step), there(step), strict=True))
    yield held('batches made there, tokens that differ', 0 if same else 1, 0)
    for name, b in dict(here=host, there=there).items(): yield dict(what=f'a batch made {name}', ms=1000*clocked(a.on, lambda: [t.to(a.on) for t in b(1)[0]], 5)[0])
    if a.on.type != 'cuda': return
    model = ContinualLLM(ModelConfig(**SMALL)).to(a.on)
    parts, opt, loop = make_parts(model, None, host, None, LoopConfig(9, precision=a.precision, device=str(a.on))), make_optimizer(model, OptimConfig()), LoopConfig(9, precision=a.precision, device=str(a.on))
    take_step(model, opt, parts, loop, 0)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            take_step(model, opt, parts, loop, 1)
    finally: torch.cuda.set_sync_debug_mode('default')
    times = sum('synchroniz' in str(w.message) for w in seen)
    yield held('times that a step is waited for, beyond one', abs(times - 1), 0) | dict(seen=[str(w.message)[:200] for w in seen])


def checked_runs(a):
    "A small run to its end, the same left and resumed, and what the two and the CPU write"
    with tempfile.TemporaryDirectory() as folder:
        tok = train_tokenizer('builtin:english', vocab_size=500)
        shape = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64) if a.mini else dict(SMALL, vocab_size=500)
        how = dict(data='builtin:english', config=shape, tokenizer=tok, max_seq_len=64, batch_size=8, grad_accumulation=2, max_steps=6 if a.mini else 60, learning_rate=3e-3, warmup_steps=2, eval_every=3 if a.mini else 30,
                   eval_tokens=2000, device=str(a.on), deterministic=True, cache=f'{folder}/cache', quiet=True)
        whole = pretrain(**how, save_dir=f'{folder}/whole')
        left = pretrain(**how, save_dir=f'{folder}/left', max_time=1e-4)
        again = pretrain(**how, save_dir=f'{folder}/left', resume=True)
        one, two = [[r['loss'] for r in run.history.rows('step')] for run in (whole, again)]
        yield held('run: loss at its end above nine tenths of that at its beginning', max(0., one[-1] - (one[0] if a.mini else .9*one[0])), 0) | dict(text=f'{one[0]:.3f} -> {one[-1]:.3f}, left at step {len(left.history.rows("step"))}')
        yield held('run resumed: losses that differ', sum(x != y for x, y in zip(one, two, strict=True)), 0)
        yield held('run resumed: weights that differ', sum(not x.equal(y) for x, y in zip(whole.model.state_dict().values(), again.model.state_dict().values())), 0)
        torch.manual_seed(0)
        wild = ContinualLLM(ModelConfig(**dict(SMALL, vocab_size=500), tie_embeddings=False)).eval()
        with torch.no_grad(): [p.mul_(10) for p in wild.parameters() if p.ndim > 1]  # so that it does not repeat itself
        here, there = [generate(m, tok, ['The ', 'A value of'], max_tokens=24, temperature=0) for m in (wild, copy.deepcopy(wild).to(a.on))]
        yield held('greedy texts in fp32 that differ from the CPU\'s', sum(x != y for x, y in zip(here, there)), 0) | dict(text=there[0][:60])
        moved_there, prompts = copy.deepcopy(wild).to(a.on), ['The ', 'A value of', '']
        for how in (dict(temperature=0), dict(seed=3, top_p=.9, repetition_penalty=1.2)):
            plain, graph = [generate(moved_there, tok, prompts, max_tokens=24, compile=c, **how) for c in (False, True)]
            yield held(f"texts that differ when compiled, {'greedy' if 'temperature' in how else 'sampled'}", sum(x != y for x, y in zip(plain, graph)), 0)
        for precision, bound in (('bf16', .05), ('int8', .1)):
            ids = torch.randint(500, (4, 64))
            with torch.no_grad(): want, got = [m(ids.to(next(m.parameters()).device)).cpu() for m in (wild, for_writing(moved_there, precision))]
            yield held(f'scores of weights in {precision}', apart([got], [want]), bound)


# ---- training ----

def shape_of(a, **more): return model_config(a.config, max_seq_len=a.size['seq_len'], vocab_size=a.size['vocab_size'], dropout=0., **more)


def step_of(a, n, compiled, graphs=False):
    "A model and a function that takes one of its training steps, n blocks at once, the way a run does"
    torch.manual_seed(0)
    model = ContinualLLM(shape_of(a)).to(a.on).train()
    ids = numpy_generator(0, 'gpu').integers(a.size['vocab_size'], size=a.size['seq_len']*n*(a.size['steps'] + 4), dtype=np.uint16)
    loop = LoopConfig(10**6, learning_rate=1e-4, precision=a.precision, device=str(a.on))
    parts, opt, at = make_parts(model, None, Batches(ids, a.size['seq_len'], n), None, loop, compiled=compiled, graphs=graphs), make_optimizer(model, OptimConfig()), iter(range(10**6))
    return model, lambda: take_step(model, opt, parts, loop, next(at))


def middle(a): return a.size['batches'][len(a.size['batches'])//2]


def ceiling(a):
    "Operations a second of a large product in the precision that is trained in"
    side, kind = a.size['side'], torch.bfloat16 if a.precision == 'bf16' else torch.float32
    x, y = [torch.randn(side, side, device=a.on, dtype=kind) for _ in range(2)]
    out = torch.empty_like(x)
    def ten(): [torch.mm(x, y, out=out) for _ in range(10)]
    return 10*2*side**3/clocked(a.on, ten, 3)[0]


def measured(a, name, n, step, top):
    "One row: speed, share of the ceiling, memory"
    if a.on.type == 'cuda': torch.cuda.reset_peak_memory_stats(a.on)
    seconds, first = clocked(a.on, step, a.size['steps'])
    speed = n*a.size['seq_len']/seconds
    peak = torch.cuda.max_memory_allocated(a.on)/1e9 if a.on.type == 'cuda' else None
    return dict(what=name, blocks=n, tokens_per_second=speed, ms=1000*seconds, share=speed*flops_per_token(shape_of(a))/top, first_s=first, peak_gb=peak)


def cleared(a):
    if a.on.type == 'cuda': torch.cuda.empty_cache()
    torch._dynamo.reset()


def training(a):
    "Growing batches, eager and compiled"
    top, sizes = ceiling(a), a.size['batches']
    yield dict(what='ceiling', per_second=top, unit=f'operations, {a.precision}')
    plans = [('eager', n) for n in sizes] + [('eager, all scores at once', middle(a)), ('eager, scores in slices', middle(a))] + [('compiled', n) for n in dict.fromkeys((middle(a), sizes[-1], *sizes))]
    for how, n in plans:
        name, usual = f'{a.config}, {how}', ops.HELD
        ops.HELD = {'eager, all scores at once': math.inf, 'eager, scores in slices': min(usual, 4*n*a.size['seq_len']*a.size['vocab_size'] - 1)}.get(how, usual)
        try:
            with machine(False, tf32=a.precision == 'bf16' and a.on.type == 'cuda'): yield measured(a, name, n, step_of(a, n, how == 'compiled')[1], top)
        except torch.OutOfMemoryError: yield dict(what=name, blocks=n, text='out of memory')
        finally:
            ops.HELD = usual
            cleared(a)


def graphs(a):
    "The smallest batch with the step recorded as CUDA graphs: gradients of several micro-batches against those without, and what it gains"
    n, top, kept = a.size['batches'][0], ceiling(a), []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = ContinualLLM(shape_of(a)).to(a.on).train()
        net = Compiled(model, SimpleNamespace(batch_size=n), True) if recorded else lambda x, y: model(x, targets=y, reduction='sum')
        g, sums = torch.Generator(a.on).manual_seed(1), []
        for step in range(2):
            model.zero_grad(set_to_none=True)
            for micro in range(3):
                x, y = torch.randint(a.size['vocab_size'], (2, n, a.size['seq_len']), device=a.on, generator=g)
                with autocast(a.precision, a.on): total = net(x, y)
                total.backward()
                sums.append(total.detach())
        kept.append((sums, [p.grad for p in model.parameters()]))
        cleared(a)
    for what, got, want in zip(('losses', 'gradients'), *reversed(kept)): yield held(f'{what} of recorded micro-batches, added up', apart(got, want), 5e-2 if a.precision == 'bf16' else 1e-4)
    yield measured(a, f'{a.config}, compiled', n, step_of(a, n, True)[1], top)
    cleared(a)
    yield measured(a, f'{a.config}, compiled with CUDA graphs', n, step_of(a, n, True, graphs=True)[1], top)
    cleared(a)


KINDS = dict(fused=('triton_', 'cpp_fused'), attention=('flash', 'fmha', 'attention', 'sdpa'), products=('gemm', 'mm', 'cutlass', 'nvjet', 'cublas'), optimizer=('adam', 'multi_tensor', 'foreach'), norms=('norm',), copies=('copy', 'memcpy', 'memset'))


def profile(a):
    "Where the time of a step goes, by kernel"
    from torch.profiler import ProfilerActivity, profile as watch
    cuda, n = a.on.type == 'cuda', middle(a)
    for compiled in (False, True):
        _, step = step_of(a, n, compiled)
        step(), step(), wait(a.on)
        begun = time.perf_counter()
        with watch(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda) as seen:
            for _ in range(3): step()
            wait(a.on)
        wall, how = time.perf_counter() - begun, 'compiled' if compiled else 'eager'
        spent = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total)/1e6 for e in seen.key_averages() if not getattr(e, 'is_user_annotation', False) and (not cuda or str(e.device_type).endswith('CUDA'))}
        total, sums = sum(spent.values()) or 1., {}
        for key, s in spent.items():
            kind = next((k for k, words in KINDS.items() if any(w in key.lower() for w in words)), 'other')
            sums[kind] = sums.get(kind, 0.) + s
        yield dict(what=f'{how}: busy of the time that passed', blocks=n, share=total/wall)
        for kind, s in sorted(sums.items(), key=lambda x: -x[1]): yield dict(what=f'{how}: {kind}', blocks=n, share=s/total)
        for key, s in sorted(spent.items(), key=lambda x: -x[1])[:10]: yield dict(what=f'{how}: kernel {key[:90]}', blocks=n, share=s/total, ms=1000*s/3)
        cleared(a)


def llama_of(a):
    "transformers' own model of the shape"
    from transformers import LlamaConfig, LlamaForCausalLM
    c = shape_of(a)
    return LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers, head_dim=c.head_dim, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
                                        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings, use_cache=False)), lambda out: out.logits


def litgpt_of(a):
    "litgpt's"
    from litgpt import GPT, Config
    c = shape_of(a)
    return GPT(Config(block_size=c.max_seq_len, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, n_query_groups=c.n_kv_heads, rotary_percentage=1., parallel_residual=False,
                      bias=False, norm_class_name='RMSNorm', mlp_class_name='LLaMAMLP', intermediate_size=c.d_ff)), lambda out: out


def others(a):
    "Other libraries on the same shape, with the same optimizer and precision"
    top, n = ceiling(a), middle(a)
    for name, made in dict(transformers=llama_of, litgpt=litgpt_of).items():
        for compiled in (False, True):
            try: model, scores = made(a)
            except ImportError:
                yield dict(what=name, text='not installed')
                break
            model = model.to(a.on).train()
            net, opt = torch.compile(model, dynamic=False) if compiled else model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            ids = torch.randint(a.size['vocab_size'], (n, a.size['seq_len'] + 1), device=a.on)
            def step():
                opt.zero_grad(set_to_none=True)
                with autocast(a.precision, a.on): s = scores(net(ids[:, :-1].contiguous()))
                F.cross_entropy(s.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
                float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.))
                opt.step()
            yield measured(a, f"{name}, {'compiled' if compiled else 'eager'}", n, step, top) | dict(parameters=sum(p.numel() for p in model.parameters()))
            del model, net, opt
            cleared(a)
    yield dict(what='parameters of ours', text=f'{count_params(shape_of(a)):,}')


def writing(a):
    "Texts written from a short prompt, one and many at once: in fp32 as it is, in narrow weights, compiled (a recorded graph), chosen greedily and by chance"
    tok, new = train_tokenizer('builtin:english', vocab_size=500), a.size['written']
    model = ContinualLLM(model_config(a.config, vocab_size=len(tok), max_seq_len=max(256, a.size['seq_len']), dropout=0.)).to(a.on).eval()
    with torch.no_grad(): model.out_weight[tok.eos_id].zero_()  # so that no text ends early
    greedy, sampled = dict(temperature=0), dict(temperature=.8, top_k=50)
    ways = [('bf16', True, greedy), ('bf16', True, sampled), ('int8', True, greedy), ('fp32', True, greedy), ('bf16', False, greedy), ('fp32', False, greedy), ('fp32', False, sampled)]
    for precision, compiled, sampling in ways:
        narrow = for_writing(model, precision)
        for rows in (1, a.size['rows']):
            seconds, first = clocked(a.on, lambda: generate(narrow, tok, ['The value of']*rows, max_tokens=new, compile=compiled, **sampling), 2)
            yield dict(what=f"writing in {precision}{', compiled' if compiled else ''}, {'sampled' if sampling is sampled else 'greedy'}", rows=rows, tokens_per_second=rows*new/seconds, first_s=first)
        cleared(a)


# ---- all of it ----

PARTS = dict(machine=(about, .02), losses=(checked_losses, .15), attention=(checked_attention, .03), shards=(checked_shards, .05), batches=(checked_batches, .05), runs=(checked_runs, .15), limits=(limits, .05), training=(training, .35), profile=(profile, .12), writing=(writing, .12),
             graphs=(graphs, .1), others=(others, .15))  # what is done, and the share of the time that it may take


@contextlib.contextmanager
def stopped(seconds):
    "What takes far too long is broken off"
    def late(*_): raise TimeoutError(f'broken off after {seconds:.0f} s')
    if not hasattr(signal, 'SIGALRM'): return (yield)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def part(a, name, end, tell):
    "One part, which leaves a row whatever comes of it"
    do, share = PARTS[name]
    begun, bound = time.perf_counter(), share*60*a.minutes
    try:
        with stopped(2*bound + 20):
            for row in do(a):
                tell(dict(part=name, **row))
                took = time.perf_counter() - begun
                if took > bound or time.perf_counter() > end: return tell(dict(part=name, what='ended', text=f'its time was over after {took:.0f} s'))
    except Exception as e: tell(dict(part=name, what='FAILED', text=f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}", trace=traceback.format_exc()[-1500:]))


def written(value): return '' if value is None else value if isinstance(value, str) else f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'


def table(rows):
    "All rows as Markdown"
    names = [n for n in ('what', 'ok', 'off', 'bound', 'blocks', 'rows', 'tokens_per_second', 'ms', 'share', 'first_s', 'peak_gb', 'per_second', 'unit', 'parameters', 'text') if any(n in r for r in rows)]
    lines = ['| ' + ' | '.join(names) + ' |', '|---'*len(names) + '|']
    return '\n'.join(lines + ['| ' + ' | '.join(str(r[n]) if isinstance(r.get(n), bool) else written(r.get(n)).replace('|', '/') for n in names) + ' |' for r in rows])


def report(rows):
    "All that is known as Markdown; and whether something of it is wrong"
    bad, found = [r for r in rows if r.get('ok') is False or r['what'] == 'FAILED'], [r['ok'] for r in rows if 'ok' in r]
    head = f'{sum(found)} of {len(found)} checks hold' + ''.join(f"\n- {r['part']}: {r['what']} {r.get('text', '')}" for r in bad)
    parts = [f"## {name}\n\n{table([r for r in rows if r['part'] == name])}" for name in dict.fromkeys(r['part'] for r in rows)]
    return '\n\n'.join(['# `benchmarks/gpu.py`', head, *parts]) + '\n', bool(bad)


def main():
    "Everything, one table a part"
    a, rows = flags(), []
    end = time.perf_counter() + 60*a.minutes
    with open(f'{a.out}.jsonl', 'w') as log:
        def tell(row):
            rows.append(row)
            print(*[f'{k}={written(v) if isinstance(v, (int, float, str)) and not isinstance(v, bool) else v}' for k, v in row.items() if k not in ('trace', 'seen')], flush=True)
            log.write(json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}) + '\n')
            log.flush()
        for name in a.parts.split(','):
            if time.perf_counter() > end: tell(dict(part=name, what='left out', text='no time'))
            else: part(a, name, end, tell)
            text, bad = report(rows)
            Path(f'{a.out}.md').write_text(text, encoding='utf-8')
    print(text.split('## ')[0])
    raise SystemExit(bad)


if __name__ == '__main__': main()
