"Sampling, reading and writing in cases that the page has no room for"
import math, os, warnings
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from continual_llm import narrow
from continual_llm.core import UserError, generator, numpy_generator, seed_for
from continual_llm.generate import Reader, Sampling, TextStream, banned_pieces, choose, draw, exponential_noise, generate, keep_top_k, keep_top_p, penalise, probabilities, stream
from continual_llm.model import ContinualLLM, ModelConfig

quick = settings(max_examples=200, deadline=None)
TOY = ModelConfig(vocab_size=260, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=16)


class Bytes:
    "The simplest tokenizer: one piece per byte, after four special ones"
    pad_id, bos_id, eos_id, vocab_size, hash = 0, 1, 2, 260, 'bytes'
    def encode(self, text): return [b + 4 for b in text.encode()]
    def encode_batch(self, texts): return [self.encode(t) for t in texts]
    def piece_bytes(self, i): return bytes([i - 4]) if i > 3 else b''
    def decode(self, ids): return b''.join(map(self.piece_bytes, ids)).decode('utf-8', 'replace')


def toy(seed=0, scale=12., **changes):
    "A random model in double precision whose scores are spread enough to differ from token to token"
    torch.manual_seed(seed)
    model = ContinualLLM(replace(TOY, **changes)).double().eval()
    with torch.no_grad(): model.norm.weight *= scale
    return model


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


# ---- text ----

def first_completed(text, stop):
    "The text before the stop string that is complete first, found letter by letter"
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts: return text[:min(starts)]
    return text


@quick
@given(data=st.one_of(st.binary(max_size=30), st.text('aé€🙂b', max_size=12).map(str.encode)), cuts=st.lists(st.integers(0, 5), max_size=30),
       stop=st.lists(st.text('aé€🙂b\ufffd', min_size=1, max_size=3), max_size=3))
def test_any_bytes_cut_anywhere(data, cuts, stop):
    t, parts, rest = TextStream(tuple(stop)), [], data
    whole = first_completed(data.decode(errors='replace'), stop)
    for n in cuts:
        parts.append(t.feed(rest[:n]))
        rest = rest[n:]
        assert whole.startswith(''.join(parts))  # nothing shown is ever taken back
    parts.append(t.feed(rest, end=True))
    assert ''.join(parts) == whole
    assert t.feed(b'', end=True) == ''


def test_nothing_is_held_without_need():
    t = TextStream(('stop',))
    assert [t.feed(c.encode()) for c in 'a sto b'] == ['a', ' ', '', '', '', 'sto ', 'b']


# ---- choosing ----

def exponential(seed, *shape):
    return torch.from_numpy(numpy_generator(*(seed if isinstance(seed, tuple) else (seed,))).standard_exponential(shape))


@quick
@given(scores=st.lists(st.floats(-20, 20), min_size=1, max_size=40), p=st.floats(1e-3, .999), k=st.integers(1, 50), look=st.integers(1, 8))
def test_sets_are_smallest(scores, p, k, look):
    x = torch.tensor([scores], dtype=torch.double)
    q, kept = x.softmax(-1)[0], keep_top_p(x, p, look)[0].isfinite()
    assert q[kept].sum() >= p - 1e-9 and q[kept].sum() - q[kept].min() < p + 1e-9
    if not kept.all(): assert q[kept].min() >= q[~kept].max()
    kept = keep_top_k(x, k)[0].isfinite()
    assert kept.sum() == min(k, len(scores))
    if not kept.all(): assert q[kept].min() >= q[~kept].max()


@quick
@given(scores=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=40), seed=st.integers(0, 99), temperature=st.floats(1e-300, 100),
       top_k=st.integers(0, 5), top_p=st.floats(1e-6, 1))
def test_never_outside_what_is_possible(scores, seed, temperature, top_k, top_p):
    x = torch.tensor([scores + [-math.inf]], dtype=torch.double)
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    q = probabilities(x, s)
    assert abs(q.sum() - 1) < 1e-9 and q[0, -1] == 0
    assert q[0, choose(x, exponential(seed, *x.shape), s)] > 0


def test_rows_do_not_see_each_other():
    x = 5*torch.randn(6, 300, generator=generator(0, 'rows'), dtype=torch.double)
    s, noise = Sampling(top_k=40, top_p=.7), exponential(0, 6, 300)
    assert choose(x, noise, s).tolist() == [choose(x[i:i+1], noise[i:i+1], s).item() for i in range(6)]


def test_penalty_is_one_sided():
    x = torch.tensor([[3., -3., 3., -3.]])
    got = penalise(x, torch.tensor([[True, True, False, False]]), 1.5)
    assert got.tolist() == [[2., -4.5, 3., -3.]]


def test_draws_of_a_batch_follow_the_model():
    "First pieces of 4,000 rows against the model's own probabilities"
    model, tok, n = toy(scale=3.), Bytes(), 4000
    s = Sampling(max_tokens=1, temperature=.7, top_k=12, top_p=.95, seed=5)
    reader, banned = Reader(model, [[1]], 1), banned_pieces(tok)
    q = probabilities(reader.read().masked_fill(banned, -math.inf), s)[0]
    noise = exponential_noise(torch.tensor([seed_for(5, 'generate', row) for row in range(n)]), 0, 260)
    count = torch.bincount(draw(q.expand(n, -1), noise), minlength=260)
    assert ((count/n - q).abs() <= 4*(q*(1-q)/n).sqrt()).all() and (count > 0).sum() > 5
    texts = generate(model, tok, ['']*n, 1, temperature=.7, top_k=12, top_p=.95, seed=5)
    for i in range(4, 132): assert texts.count(tok.decode([i])) == count[i]


def test_control_pieces_are_never_written():
    model = toy(scale=1.)
    tok = Bytes()
    seen = []
    tok.piece_bytes = lambda i: seen.append(i) or Bytes.piece_bytes(tok, i)
    generate(model, tok, ['']*50, 60, temperature=100)
    written = seen[tok.vocab_size:]  # the first calls only ask which pieces are control pieces
    assert tok.eos_id in written and not {0, 1, 3} & set(written) and len(set(written)) > 200


# ---- reading ----

@torch.inference_mode()
def naive(model, ids, n, pick=lambda scores, i: scores.argmax().item()):
    "Everything read again for every token"
    ids, W, new = list(ids), model.config.max_seq_len, []
    start = max(0, len(ids) - W)
    for i in range(n):
        if len(ids) - start > W: start = len(ids) - max(1, W//2)
        new.append(pick(model(torch.tensor([ids[start:]]))[0, -1], i))
        ids.append(new[-1])
    return new


@pytest.mark.parametrize('changes', [dict(max_seq_len=1), dict(max_seq_len=2), dict(max_seq_len=7), dict(n_kv_heads=1), dict(n_kv_heads=4),
                                     dict(qk_norm=True, tie_embeddings=False), dict(rope_theta=100.)], ids=str)
def test_the_cache_changes_nothing(changes):
    model, rows = toy(**changes), [[1], [1] + [9]*5, [1] + list(range(20, 60))]
    reader = Reader(model, rows, 40)
    for _ in range(40): reader.append(reader.read().argmax(-1).tolist())
    for before, after in zip(rows, reader.ids): assert after[len(before):] == naive(model, before, 40)


def test_each_token_is_read_about_twice_at_most():
    "Sliding by half a window costs one more piece per piece, and scores are made for one place only"
    model, read, scored = toy(), [], []
    hidden, logits = model.hidden, model.logits
    model.hidden = lambda ids, cache=None: read.append(ids.numel()) or hidden(ids, cache)
    model.logits = lambda h: scored.append(h.shape[:-1].numel()) or logits(h)
    generate(model, Bytes(), 'abc', 200, temperature=0, forbid=())
    assert sum(read) <= 2*200 + 16 and len(scored) <= 200 and set(scored) == {1}


def test_the_cache_is_no_longer_than_needed():
    assert Reader(toy(), [[1, 5, 6]], 4).cache.max_len == 7
    assert Reader(toy(), [[1, 5, 6]], 400).cache.max_len == 16


# ---- writing ----

PROMPTS = ['', 'a', 'the cat', 'é€🙂', 'a prompt that is longer than the window of sixteen', 'a']


@pytest.mark.parametrize('knobs', [dict(), dict(temperature=0), dict(temperature=1.3, top_k=30), dict(top_p=.8, repetition_penalty=1.4), dict(stop=['e', 'a '])], ids=str)
def test_side_by_side_as_alone(knobs):
    "Rows start at different lengths, slide and end at different times"
    model, tok = toy(scale=4.), Bytes()
    for trial in range(2):
        seeds = [100*trial + i for i in range(len(PROMPTS))]
        alone = [generate(model, tok, p, 50, seed=s, **knobs) for p, s in zip(PROMPTS, seeds)]
        assert generate(model, tok, PROMPTS, 50, seed=seeds, **knobs) == alone and len(set(alone)) > 3
        parts = ['']*len(PROMPTS)
        for row, new in stream(model, tok, PROMPTS, 50, seed=seeds, **knobs):
            assert new
            parts[row] += new
        assert parts == alone
        assert ''.join(stream(model, tok, PROMPTS[2], 50, seed=seeds[2], **knobs)) == alone[2]


def test_compiled_writing_is_the_same():
    "Rows of different lengths that slide and end at different times, through a cache of one shape and code of one shape"
    model, tok = toy(scale=4.), Bytes()
    knobs = dict(seed=[*range(len(PROMPTS))], top_p=.9, repetition_penalty=1.2, stop='q')
    plain = generate(model, tok, PROMPTS, 40, **knobs)
    assert generate(model, tok, PROMPTS, 40, compile=True, **knobs) == plain
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True): assert generate(model, tok, PROMPTS, 30, compile=True, **knobs) == generate(model, tok, PROMPTS, 30, **knobs)


@pytest.mark.parametrize('precision', ['bf16', 'int8'])
def test_narrow_weights_in_compiled_code(precision, monkeypatch):
    "Packed matrices are no tensors that the compiler knows; they are called from its code, and give the same"
    monkeypatch.setattr(narrow, 'LARGE', 2000)  # of the toy's matrices some are packed, some are not
    model = narrow.for_writing(toy(scale=4.).float(), precision)
    packed = {m.packed is not None for m in model.modules() if isinstance(m, narrow.NarrowLinear)}
    assert packed == {True} if precision == 'bf16' and narrow._packs() else packed == {True, False} or not narrow._packs()
    readers = [Reader(model, [[1, 5, 6], [1, 9]], 12, compiled) for compiled in (False, True)]
    for _ in range(6):
        a, b = [r.read() for r in readers]
        assert (a-b).norm() < 1e-2*a.norm()
        for r in readers: r.append(a.argmax(-1).tolist())


def test_sampled_text_is_what_the_definition_says():
    "Everything at once, against a few plain lines"
    model, tok, banned = toy(scale=4.), Bytes(), [0, 1, 3]
    ids, key, s = [1] + tok.encode('start'), torch.tensor([seed_for(8, 'generate', 0)]), Sampling(temperature=.9, top_k=50, top_p=.9, repetition_penalty=1.2)
    seen = set(ids)
    def pick(scores, i):
        scores = scores.clone()
        for j in seen: scores[j] = scores[j]/1.2 if scores[j] > 0 else scores[j]*1.2
        scores[banned] = -math.inf
        order = scores.div(.9).argsort(descending=True)[:50]
        q, kept, mass = scores[order].div(.9).softmax(-1), [], 0.
        for x in q.tolist():
            if mass >= .9: break
            kept.append(x)
            mass += x
        times = exponential_noise(key, i, 260)[0]
        first = min(range(len(kept)), key=lambda i: times[order[i]]/kept[i])
        seen.add(order[first].item())
        return order[first].item()
    new = naive(model, ids, 60, pick)
    want = tok.decode(new[:(new + [2]).index(2)])
    assert generate(model, tok, 'start', 60, seed=8, temperature=.9, top_k=50, top_p=.9, repetition_penalty=1.2) == want and len(want) > 5


def test_the_end_of_a_text_ends_it():
    model, tok = toy(), Bytes()
    with torch.no_grad(): model.embed.weight[2] = 0
    model.logits = lambda h, plain=model.logits: torch.cat((plain(h)[..., :2], torch.full((*h.shape[:-1], 1), 1e4, dtype=h.dtype), plain(h)[..., 3:]), -1)
    assert generate(model, tok, ['a', 'b'], 50) == ['', ''] and list(stream(model, tok, 'a')) == []


def test_seeds_are_rows():
    model, tok = toy(scale=2.), Bytes()
    five = generate(model, tok, ['x']*5, 20, seed=3)
    assert len(set(five)) == 5 and five[:2] == generate(model, tok, ['x']*2, 20, seed=3)
    assert len(set(generate(model, tok, ['x']*5, 20, seed=[7]*5))) == 1
    torch.manual_seed(1)
    state = torch.get_rng_state()
    generate(model, tok, 'x', 20, seed=3)
    assert (torch.get_rng_state() == state).all()  # nobody else's chance is touched


def test_a_stream_given_up_leaves_the_model_as_it_was():
    model, tok = toy(dropout=.3, scale=4.).train(), Bytes()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    pairs = stream(model, tok, 'x', 50)
    next(pairs)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    pairs.close()
    model.logits = lambda h: 1/0
    with pytest.raises(ZeroDivisionError): generate(model, tok, 'x')
    assert [m.training for m in model.modules()] == modes


def test_each_thing_is_said_once():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        generate(toy(scale=4.), Bytes(), PROMPTS, 60)
    assert len(told) == 2


def test_scores_that_are_not_finite_are_refused():
    model = toy()
    with torch.no_grad(): model.embed.weight[7] = math.nan
    for t in (0, 1.):
        with pytest.raises(UserError, match='not finite'): generate(model, Bytes(), 'x', temperature=t)


def markers_are_kept_out(text, folder, vocab_size):
    "Train a tokenizer on a text with `<unk>`; a random model writes it, and not when it is forbidden"
    from continual_llm.tokenizer import train_tokenizer
    (folder/'text.txt').write_text(text, encoding='utf-8')
    tok = train_tokenizer(folder/'text.txt', vocab_size=vocab_size)
    model = toy(vocab_size=tok.vocab_size, scale=1.)
    free, bound = [''.join(generate(model, tok, ['the']*200, 40, temperature=3., forbid=f)) for f in ((), '<unk>')]
    assert '<unk>' in free and '<unk>' not in bound


def test_forbidden_marker(tmp_path):
    markers_are_kept_out('the cat <unk> sat on the <unk> mat .\nthe dog <unk> saw the <unk> cat .\n'*60, tmp_path, 300)


@pytest.mark.skipif(not os.environ.get('CONTINUAL_LLM_DATA'), reason='CONTINUAL_LLM_DATA names no folder of real texts')
def test_forbidden_marker_in_wikitext(tmp_path):
    text = (Path(os.environ['CONTINUAL_LLM_DATA'])/'wikitext-2'/'valid.txt').read_text(encoding='utf-8')
    markers_are_kept_out(text[:300_000], tmp_path, 1000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_the_same_text_on_a_gpu():
    model, tok = toy(scale=4.), Bytes()
    here = generate(model, tok, PROMPTS, 50, seed=1)
    assert generate(model.cuda(), tok, PROMPTS, 50, seed=1) == here
