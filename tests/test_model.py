"The model against transformers' own Llama and Qwen3: the same weights, the same scores, the same gradients"
import os
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from continual_llm.attention import KVCache
from continual_llm.model import PRESETS, ContinualLLM, ModelConfig, model_config

# name in a layer of ours: names in theirs, whose rows ours holds one after the other
LAYER = {'attn_norm': ['input_layernorm'], 'mlp_norm': ['post_attention_layernorm'], 'attn.out': ['self_attn.o_proj'], 'mlp.down': ['mlp.down_proj'],
         'attn.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'], 'mlp.gate_up': ['mlp.gate_proj', 'mlp.up_proj'],
         'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm']}


def theirs(config, seed=0):
    "A model of transformers with weights far from its fresh ones"
    transformers = pytest.importorskip('transformers')
    c, kind = config, 'Qwen3' if config.qk_norm else 'Llama'
    shape = dict(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers, head_dim=c.head_dim,
                 num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
                 rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings, rope_theta=c.rope_theta)
    torch.manual_seed(seed)
    model = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p), alpha=.3 if p.ndim == 1 else .08)
    return model


def ours_from(state, config):
    "Our model with the weights of theirs"
    def joined(prefix, names): return torch.cat([state[f'model.layers.{prefix}.{n}.weight'] for n in names])
    mine = {'embed.weight': state['model.embed_tokens.weight'], 'norm.weight': state['model.norm.weight']}
    if not config.tie_embeddings: mine['head.weight'] = state['lm_head.weight']
    for i in range(config.n_layers):
        for name, names in LAYER.items():
            if f'model.layers.{i}.{names[0]}.weight' in state: mine[f'blocks.{i}.{name}.weight'] = joined(i, names)
    return ContinualLLM.from_checkpoint(dict(config=config.to_dict(), model_state_dict=mine))


SHAPES = {
    'llama': dict(),
    'llama-untied': dict(tie_embeddings=False),
    'llama-no-sharing': dict(n_kv_heads=4),
    'llama-one-key-head': dict(n_kv_heads=1),
    'llama-wide-heads': dict(head_dim=32, rope_theta=5e5, norm_eps=1e-6),
    'qwen3': dict(qk_norm=True),
    'qwen3-untied-wide-heads': dict(qk_norm=True, tie_embeddings=False, head_dim=32, rope_theta=1e6),
}


@pytest.mark.parametrize('name', SHAPES)
def test_scores_equal_transformers(name):
    config = ModelConfig(**{**dict(vocab_size=211, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=160, max_seq_len=128), **SHAPES[name]})
    hf = theirs(config)
    ours, ids = ours_from(hf.state_dict(), config), torch.randint(config.vocab_size, (3, 100))
    with torch.no_grad(): a, b = ours(ids), hf(ids).logits
    difference = (a-b).abs().max().item()
    print(f"{name}: scores up to {b.abs().max():.2f}, largest difference {difference:.1e}")
    assert b.abs().max() > 1  # the scores say something
    assert difference < 1e-5


@pytest.mark.parametrize('qk_norm', [False, True])
def test_loss_and_gradients_equal_transformers(qk_norm):
    config = ModelConfig(vocab_size=211, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64, qk_norm=qk_norm)
    hf = theirs(config)
    ours, ids = ours_from(hf.state_dict(), config), torch.randint(config.vocab_size, (2, 41))
    loss = ours(ids[:, :-1], targets=ids[:, 1:])
    reference = hf(ids, labels=ids).loss
    assert abs(loss - reference) < 1e-5
    loss.backward(), reference.backward()
    want = ours_from({n: p.grad for n, p in hf.named_parameters()}, config).state_dict()
    for name, p in ours.named_parameters(): assert (p.grad - want[name]).norm() < 1e-5*want[name].norm() + 1e-9, name


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_have_the_promised_size(preset):
    with torch.device('meta'): model = ContinualLLM(model_config(preset))
    assert round(model.n_params(embeddings=False)/1e6, 1) == dict(tiny=.8, small=4.5, medium=102.6, large=365.)[preset]


def test_rows_of_any_lengths_equal_single_rows():
    "Random prompts, random numbers of tokens a call, rows that stop early: always what one row alone would give"
    config = ModelConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, max_seq_len=40)
    model, g = ContinualLLM(config).double().eval(), torch.Generator().manual_seed(0)
    for _ in range(5):
        B = int(torch.randint(1, 6, (), generator=g))
        ids = torch.randint(97, (B, 40), generator=g)
        cache, read = KVCache(config, B, dtype=torch.float64), torch.zeros(B, dtype=torch.int64)
        with torch.no_grad():
            alone = torch.cat([model(row[None]) for row in ids])
            while cache.longest < 40:
                T = int(torch.randint(1, min(7, 41 - cache.longest), (), generator=g))
                n = torch.randint(0, T+1, (B,), generator=g)
                scores = model(torch.stack([row[a:a+T] for row, a in zip(ids, read)]), cache=cache)
                for b in range(B): torch.testing.assert_close(scores[b, :n[b]], alone[b, read[b]:read[b]+n[b]], rtol=0, atol=1e-12)
                cache.advance(n)
                read += n
                assert cache.lengths.tolist() == read.tolist() and cache.longest == read.max()


def test_bf16_autocast_learns_alike():
    config = ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48, max_seq_len=16, qk_norm=True)
    torch.manual_seed(0)
    model, ids = ContinualLLM(config), torch.randint(64, (2, 17))
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled): loss = model(ids[:, :-1], targets=ids[:, 1:])
        assert loss.dtype == torch.float32
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > .99


def test_a_tiny_model_learns_text_by_heart():
    "Loss falls far below blind guessing within seconds, on any text"
    data = os.environ.get('CONTINUAL_LLM_DATA')
    real = sorted(Path(data).glob('wikitext-2/*valid*')) if data else []
    text = (real[0].read_bytes() if real else b'The cat sat on the mat, and the dog sat on the cat. ' * 20)[:1000]
    torch.manual_seed(0)
    model = ContinualLLM(ModelConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, max_seq_len=64))
    ids, opt = torch.tensor(list(text)), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        starts = torch.randint(len(ids) - 65, (8,))
        batch = torch.stack([ids[s:s+65] for s in starts])
        loss = model(batch[:, :-1], targets=batch[:, 1:])
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < 3
