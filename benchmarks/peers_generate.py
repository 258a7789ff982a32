"""How fast is writing beside others?  `python benchmarks/peers_generate.py [--shapes small,medium] [--contenders ours,hf-bf16] [--rounds 5] [--threads 1]`

Each contender reads the same prompt of 128 tokens and writes 128 more, the likeliest each time, one text at once. All have the same weights, which are random, stand in one process, and write in turn, round after round;
ratios are taken within a round. How many tokens are the same as ours until the first other one says the field `first` of a row: roundings differ, and weights that mean nothing leave many choices close. A token needs every weight once, so the limit is the speed at which memory is copied (reading alone may be faster, and a small model stays in the caches: then the
share exceeds a hundred per cent). Text is not made of the tokens. Who is who:

- `ours` with weights in fp32; `ours bf16` and `ours int8` as `for_writing` makes them; each of them `compiled`, as `generate --compile`.
- `hf bf16`: `generate` of transformers with weights in bf16; `hf bf16 static` with a cache of fixed size.
- `litgpt bf16`: its `generate`, with weights in bf16.
- `llama.cpp f16` and `llama.cpp q8_0` through llama-cpp-python, on a GGUF file that is written here. The second without weights laid out anew for AMX (`use_extra_bufts`), which ends version 0.3.36 by a
  segmentation fault as soon as it reads several tokens at once.

How to install the peers says `speed.py --help`; without them they are named as missing."""
import re, tempfile
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from unittest.mock import patch
import torch
from peers_train import hf_model, litgpt_model
from speed import clock_of, contend, keep, parser, read, shape_of, stamp, stands, table, version
from continual_llm.bench import limit_tasks
from continual_llm.core import numpy_generator, seed_everything
from continual_llm.footprint import count_params, matrix_numbers
from continual_llm.generate import Reader, Sampling, choose
from continual_llm.model import ContinualLLM
from continual_llm.narrow import for_writing

PROMPT = WRITTEN = 128
LOUD = 4 # as fresh weights are, each token would be followed by itself
WIDTH = dict(fp32=4, bf16=2, f16=2, int8=1, q8_0=34/32) # bytes of a weight; a block of q8_0 is 32 numbers and a scale


def prompt_of(shape): return numpy_generator(0, 'bench').integers(3, shape.vocab_size, size=PROMPT).tolist()


def fresh(shape):
    "Our model, the same each time, its layers so loud that what they say decides"
    seed_everything(0, 'weights')
    model = ContinualLLM(shape).eval().requires_grad_(False)
    for p in model.blocks.parameters():
        if p.ndim == 2: p.mul_(LOUD)
    return model


def task(shape, write, width, library):
    "What `contend` takes"
    return WRITTEN, 'tokens', write, dict(params=count_params(shape), limit='copying', work=matrix_numbers(shape)*WIDTH[width], library=library)


# --- the same weights under other names --------------------------------------------------------------------------------------------------------------------

def split_weights(model):
    "Pairs (name, matrix) of our weights as Llama calls them, with queries, keys and values apart"
    c = model.config
    yield 'model.embed_tokens.weight', model.embed.weight
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv.weight.split([c.n_heads*c.head_dim, c.n_kv_heads*c.head_dim, c.n_kv_heads*c.head_dim])
        gate_up = block.mlp.gate_up.weight.split(c.d_ff)
        parts = dict(zip(('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.gate_proj', 'mlp.up_proj'), (*qkv, *gate_up)))
        parts |= {'self_attn.o_proj': block.attn.out.weight, 'mlp.down_proj': block.mlp.down.weight, 'input_layernorm': block.attn_norm.weight, 'post_attention_layernorm': block.mlp_norm.weight}
        for name, w in parts.items(): yield f'model.layers.{i}.{name}.weight', w
    yield 'model.norm.weight', model.norm.weight


GGUF = {'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down',
        'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'embed_tokens': 'token_embd', 'norm': 'output_norm'}


def gguf_name(name):
    "What llama.cpp calls a weight of Llama"
    layer, part = re.fullmatch(r'model\.(?:layers\.(\d+)\.)?(.+)\.weight', name).groups()
    return f"{'' if layer is None else f'blk.{layer}.'}{GGUF[part]}.weight"


def turned(w, heads):
    "Rows of queries or keys so that pairs that turn together stand side by side, as llama.cpp has them"
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def write_gguf(model, path, kind):
    "Our model as a GGUF file, with a vocabulary of no meaning"
    import gguf
    import numpy as np
    c, to = model.config, gguf.GGMLQuantizationType[kind.upper()]
    f = gguf.GGUFWriter(path, 'llama')
    f.add_context_length(c.max_seq_len); f.add_embedding_length(c.d_model); f.add_block_count(c.n_layers); f.add_feed_forward_length(c.d_ff)
    f.add_head_count(c.n_heads); f.add_head_count_kv(c.n_kv_heads); f.add_layer_norm_rms_eps(c.norm_eps); f.add_rope_freq_base(c.rope_theta); f.add_rope_dimension_count(c.head_dim); f.add_vocab_size(c.vocab_size)
    special, single = ['<unk>', '<s>', '</s>'], [f'<0x{b:02X}>' for b in range(256)]
    f.add_tokenizer_model('llama')
    f.add_token_list(special + single + [f'\u2581w{i}' for i in range(c.vocab_size - 259)])
    f.add_token_scores([0.]*c.vocab_size)
    f.add_token_types([2, 3, 3] + [6]*256 + [1]*(c.vocab_size - 259))  # unknown, control, byte, normal
    for name, w in split_weights(model):
        w = turned(w, c.n_heads) if 'q_proj' in name else turned(w, c.n_kv_heads) if 'k_proj' in name else w
        x = w.detach().numpy()
        if x.ndim == 1: f.add_tensor(gguf_name(name), x.astype(np.float32))
        else: f.add_tensor(gguf_name(name), gguf.quants.quantize(x, to), raw_dtype=to)
    f.write_header_to_file(); f.write_kv_data_to_file(); f.write_tensors_to_file(); f.close()


# --- who contends -----------------------------------------------------------------------------------------------------------------------------------------

def ours(shape, folder, precision='fp32', compiled=False):
    model, prompt, greedy = for_writing(fresh(shape), precision), prompt_of(shape), Sampling(temperature=0.)
    def write():
        reader = Reader(model, [prompt], WRITTEN, compiled)
        for _ in range(WRITTEN): reader.append(choose(reader.read(), None, greedy).tolist())
        return reader.ids[0][PROMPT:]
    return task(shape, write, precision, version('torch'))


def hf_copy(shape):
    "Our weights in transformers"
    model, library = hf_model(shape)
    fit = model.load_state_dict(dict(split_weights(fresh(shape))), strict=False)
    assert not fit.unexpected_keys and set(fit.missing_keys) <= {'lm_head.weight'}, fit
    return model.eval(), library


def hf(shape, folder, cache=None):
    (model, library), prompt = hf_copy(shape), torch.tensor([prompt_of(shape)])
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    how = dict(do_sample=False, max_new_tokens=WRITTEN, attention_mask=torch.ones_like(prompt), **(dict(cache_implementation=cache) if cache else {}))
    return task(shape, lambda: model.generate(prompt, **how)[0, PROMPT:].tolist(), 'bf16', library)


def litgpt(shape, folder):
    model, library = litgpt_model(shape)
    from litgpt.generate.base import generate
    ours, theirs = fresh(shape), model.transformer
    theirs.wte.load_state_dict(dict(weight=ours.embed.weight))
    theirs.ln_f.load_state_dict(dict(weight=ours.norm.weight))
    for a, b in zip(ours.blocks, theirs.h):
        gate, up = a.mlp.gate_up.weight.split(shape.d_ff)
        b.load_state_dict({'norm_1.weight': a.attn_norm.weight, 'norm_2.weight': a.mlp_norm.weight, 'attn.qkv.weight': a.attn.qkv.weight, 'attn.proj.weight': a.attn.out.weight,
                           'mlp.fc_1.weight': gate, 'mlp.fc_2.weight': up, 'mlp.proj.weight': a.mlp.down.weight})
    model, prompt = model.to(torch.bfloat16).eval(), torch.tensor(prompt_of(shape))
    model.max_seq_length = PROMPT + WRITTEN
    model.set_kv_cache(1, dtype=torch.bfloat16)
    return task(shape, lambda: generate(model, prompt, PROMPT + WRITTEN, temperature=0., include_prompt=False).tolist(), 'bf16', library)


def llama_cpp(shape, folder, kind):
    library, _ = version('llama-cpp-python'), version('gguf')
    import llama_cpp
    path, prompt, threads = folder/f'{kind}.gguf', prompt_of(shape), torch.get_num_threads()
    write_gguf(fresh(shape), path, kind)
    how = llama_cpp.llama_model_default_params()
    how.use_extra_bufts = kind != 'q8_0'
    with patch.object(llama_cpp.llama_cpp, 'llama_model_default_params', lambda: how):
        llama = llama_cpp.Llama(str(path), n_ctx=PROMPT + WRITTEN, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False)
    return task(shape, lambda: list(islice(llama.generate(prompt, temp=0., repeat_penalty=1.), WRITTEN)), kind, library)


CONTENDERS = {**{f'ours{p}{c}': partial(ours, precision=p.strip() or 'fp32', compiled=bool(c)) for p in ('', ' bf16', ' int8') for c in ('', ' compiled')},
              'hf bf16': hf, 'hf bf16 static': partial(hf, cache='static'), 'litgpt bf16': litgpt, 'llama.cpp f16': partial(llama_cpp, kind='f16'), 'llama.cpp q8_0': partial(llama_cpp, kind='q8_0')}


def agreement(rows, row):
    "Tokens that were written as by ours, before the first other one"
    ours = next((r['first'] for r in rows if r['contender'] == 'ours'), [])
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, row['first'])))


def main():
    "Measure and print one table a shape"
    a = parser(__doc__, contenders=CONTENDERS).parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    names = a.contenders.split(',') if a.contenders else list(CONTENDERS)
    for shape in a.shapes.split(','):
        model, _ = shape_of(shape)
        if not stands(a, 'generate', shape, names):
            with tempfile.TemporaryDirectory() as folder:
                limits = {k: v for k, v in limit_tasks('cpu').items() if k == 'copying'}
                rows = contend('generate', shape, {n: partial(CONTENDERS[n], model, Path(folder)) for n in names}, a.rounds, limits, clock_of(a))
            keep(a.results, rows := [dict(r, first=agreement(rows, r)) if 'first' in r else r for r in rows])
        else: rows = read(a.results)
        print(f"a prompt of {PROMPT} tokens, {WRITTEN} written, greedily; {stamp()['machine']}\n\n{table(rows, 'generate', shape)}\n", flush=True)


if __name__ == '__main__': main()
