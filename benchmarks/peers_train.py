"""How fast is training beside others?  `python benchmarks/peers_train.py [--shapes small,medium] [--contenders ours,hf] [--rounds 5] [--threads 1]`

Each contender takes the same optimizer step on the same tokens: a model of the same shape (or, `plain`, of nearly as many parameters) without dropout, gradients clipped to 1, AdamW. All stand in one process and take
their step in turn, round after round, with the products of matrices that bound them; ratios are taken within a round. Who is who:

- `ours`: what `pretrain` does by default, `take_step` in the precision that `auto` chooses; `ours fp32`; `ours compiled`, as with `--compile`.
- `hf`: `LlamaForCausalLM` of transformers in fp32, which its Trainer takes on a CPU unless told otherwise; `hf bf16` under autocast, as its `bf16=True`; the same `compiled`. AdamW fused, which is the Trainer's own.
- `litgpt bf16`: `litgpt.GPT` under autocast (`bf16-mixed`); the same `compiled`, as its pretraining is; `litgpt bf16-true compiled`, with weights and moments in bf16. AdamW not fused, as its own on a CPU.
- `plain`: a decoder as plain as people write them for teaching, in the manner of nanoGPT (written for this, none of its code): learned positions, LayerNorm, GELU, one key head for each query head, fp32, AdamW
  not fused; its inner width is chosen to have about as many parameters.

Memory that is freed goes back to the system, as in any Python program; that the console command keeps it, which makes `medium` about a tenth faster (`allocator.py`), is not counted. `--fused` gives the fused AdamW to all. `--memory` measures the peak of memory too, each contender with the last shape in a process of its own (`--alone`). How to install the peers says `speed.py --help`."""
import json, subprocess, sys
from functools import partial
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from torch import nn
from prepare_memory import peak
from speed import clock_of, contend, keep, memory_table, parser, read, shape_of, stamp, stands, table, version
from continual_llm.bench import limit_tasks, precisions, train_task
from continual_llm.core import autocast, numpy_generator
from continual_llm.footprint import count_params, flops_per_token, layer_numbers
from continual_llm.model import ContinualLLM
from continual_llm.optim import make_optimizer
from continual_llm.train import Compiled

RATE = 1e-4 # also in `train_task`


def tokens(shape, blocks):
    "Inputs and targets, each (B,T), those of `train_task`"
    ids = torch.from_numpy(numpy_generator(0, 'bench').integers(shape.vocab_size, size=(blocks, shape.max_seq_len + 1)))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def stepping(net, loss, opt, precision):
    "A function that takes one optimizer step and tells its loss"
    def step():
        with autocast(precision): nats = loss(net)
        nats.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        return nats.item()
    return step


def adamw(model, fused): return torch.optim.AdamW(model.parameters(), lr=RATE, betas=(.9, .95), weight_decay=.1, fused=fused)


def task(shape, blocks, step, model, precision, library):
    "What `contend` takes"
    return blocks*shape.max_seq_len, 'tokens', step, dict(params=sum(p.numel() for p in model.parameters()), limit=f'products {precision}', work=flops_per_token(shape), library=library)


# --- who contends -----------------------------------------------------------------------------------------------------------------------------------------

def ours(shape, blocks, fused, precision=None, compiled=False):
    precision = precision or list(precisions('cpu'))[-1]
    if compiled: return compiled_ours(shape, blocks, precision)
    amount, unit, step = train_task(shape, blocks, shape.max_seq_len, precision, 'adamw', 'cpu')
    return amount, unit, lambda: step()['loss'], dict(params=count_params(shape), limit=f'products {precision}', work=flops_per_token(shape), library=version('torch'))


def compiled_ours(shape, blocks, precision):
    model, (x, y) = ContinualLLM(shape).train(), tokens(shape, blocks)
    opt = make_optimizer(model)
    for group in opt.param_groups: group['lr'] = RATE
    compiled = Compiled(model, SimpleNamespace(batch_size=blocks))
    step = stepping(model, lambda net: compiled(x, y)/y.numel(), opt, precision)
    return task(shape, blocks, step, model, precision, version('torch'))


def hf_model(shape):
    "The same shape in transformers"
    library = version('transformers')
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_ff, num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
                         num_key_value_heads=shape.n_kv_heads, max_position_embeddings=shape.max_seq_len, rms_norm_eps=shape.norm_eps, rope_theta=shape.rope_theta, attention_dropout=shape.attn_dropout, tie_word_embeddings=True)
    return LlamaForCausalLM(config), library


def hf(shape, blocks, fused, precision, compiled=False):
    (model, library), (x, y) = hf_model(shape), tokens(shape, blocks)
    loss = lambda net: net(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss
    net = torch.compile(model.train(), dynamic=False) if compiled else model.train()
    return task(shape, blocks, stepping(net, loss, adamw(model, True), precision), model, precision, library)


def litgpt_config(shape):
    "The same shape for litgpt"
    from litgpt import Config
    return Config(block_size=shape.max_seq_len, n_layer=shape.n_layers, n_embd=shape.d_model, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size, n_head=shape.n_heads, n_query_groups=shape.n_kv_heads,
                  norm_class_name='RMSNorm', norm_eps=shape.norm_eps, rotary_percentage=1., parallel_residual=False, bias=False, mlp_class_name='LLaMAMLP', intermediate_size=shape.d_ff)


def litgpt_model(shape):
    "A fresh model of it, its tables of pieces tied"
    library = version('litgpt')
    from litgpt import GPT
    model = GPT(litgpt_config(shape))
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight
    return model, library


def litgpt(shape, blocks, fused, precision, compiled=False):
    (model, library), (x, y) = litgpt_model(shape), tokens(shape, blocks)
    from litgpt.utils import chunked_cross_entropy
    if precision == 'bf16-true': model = model.to(torch.bfloat16)
    net = torch.compile(model.train()) if compiled else model.train()
    step = stepping(net, lambda net: chunked_cross_entropy(net(x), y), adamw(model, fused), 'fp32' if precision == 'bf16-true' else precision)
    return task(shape, blocks, step, model, precision[:4], library)


class PlainBlock(nn.Module):
    "Attention with a key head for each query head, then two layers with GELU"
    def __init__(self, d, heads, inner):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out, self.up, self.down = nn.Linear(d, 3*d), nn.Linear(d, d), nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B,H,T,D)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    "A decoder with learned positions and a tied table"
    def __init__(self, shape):
        super().__init__()
        inner = round((layer_numbers(shape) - 4*shape.d_model**2)/(2*shape.d_model))
        self.pieces, self.places = nn.Embedding(shape.vocab_size, shape.d_model), nn.Embedding(shape.max_seq_len, shape.d_model)
        self.blocks = nn.Sequential(*[PlainBlock(shape.d_model, shape.n_heads, inner) for _ in range(shape.n_layers)])
        self.norm = nn.LayerNorm(shape.d_model)
        for p in self.parameters():
            if p.ndim == 2: nn.init.normal_(p, std=.02)

    def forward(self, ids, targets):
        h = self.norm(self.blocks(self.pieces(ids) + self.places.weight[:ids.shape[1]]))
        return F.cross_entropy(F.linear(h, self.pieces.weight).flatten(0, 1), targets.flatten())


def plain(shape, blocks, fused):
    model, (x, y) = PlainGPT(shape).train(), tokens(shape, blocks)
    return task(shape, blocks, stepping(model, lambda net: net(x, y), adamw(model, fused), 'fp32'), model, 'fp32', version('torch'))


CONTENDERS = {'ours': ours, 'ours fp32': partial(ours, precision='fp32'), 'ours compiled': partial(ours, compiled=True),
              'hf': partial(hf, precision='fp32'), 'hf bf16': partial(hf, precision='bf16'), 'hf bf16 compiled': partial(hf, precision='bf16', compiled=True),
              'litgpt bf16': partial(litgpt, precision='bf16'), 'litgpt bf16 compiled': partial(litgpt, precision='bf16', compiled=True),
              'litgpt bf16-true compiled': partial(litgpt, precision='bf16-true', compiled=True), 'plain': plain}

LEFT_OUT = dict(medium=('ours fp32', 'litgpt bf16')) # unless asked for by name, to save minutes


# --- measuring --------------------------------------------------------------------------------------------------------------------------------------------

def alone(name, shape, fused):
    "Bytes of this process before the model was made, and at the peak of two steps"
    model, blocks = shape_of(shape)
    before = peak()
    _, _, step, _ = CONTENDERS[name](model, blocks, fused)
    for _ in range(2): step()
    print(json.dumps([before, peak()]))


def memory(a, shape, names):
    "Rows of the peak of each contender, in a process of its own"
    for name in names:
        said = subprocess.run([sys.executable, __file__, '--alone', name, '--shapes', shape, '--threads', str(a.threads), *['--fused']*a.fused], stdout=subprocess.PIPE, text=True, check=True).stdout
        before, most = json.loads(said.splitlines()[-1])
        yield dict(set='memory', shape=shape, contender=name, before=before, peak=most, **stamp())


def main():
    "Measure and print one table a shape"
    p = parser(__doc__, contenders=CONTENDERS)
    p.add_argument('--fused', action='store_true', help='the fused AdamW for all, also where it is not usual')
    p.add_argument('--memory', action='store_true', help='measure the peak of memory too, of each contender with the last shape')
    p.add_argument('--alone', choices=CONTENDERS, help='tell the memory of this one')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    if a.alone: return alone(a.alone, a.shapes, a.fused)
    shapes = a.shapes.split(',')
    for shape in shapes:
        model, blocks = shape_of(shape)
        names = a.contenders.split(',') if a.contenders else [n for n in CONTENDERS if n not in LEFT_OUT.get(shape, ())]
        if not stands(a, 'train', shape, names):
            limits = {k: v for k, v in limit_tasks('cpu').items() if k != 'copying'}
            rows = contend('train', shape, {n: partial(CONTENDERS[n], model, blocks, a.fused) for n in names}, a.rounds, limits, clock_of(a))
            if a.memory and shape == shapes[-1]: rows += memory(a, shape, [r['contender'] for r in rows if r.get('unit') == 'tokens'])
            keep(a.results, rows)
        else: rows = read(a.results)
        print(f"{blocks} blocks of {model.max_seq_len} tokens, no dropout, AdamW; {stamp()['machine']}\n\n{table(rows, 'train', shape)}\n", flush=True)
        if any(r['set'] == 'memory' for r in rows): print(memory_table(rows))


if __name__ == '__main__': main()
