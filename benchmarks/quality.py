"""How good a language model do two million words give?  `python benchmarks/quality.py --data FOLDER --rows NAMES [--minutes 8] [--device cuda] [--compile] [--results FILE] [--table]`

Rows differ in few settings each. FOLDER holds `train.txt` and `valid.txt` of WikiText-2. A row that tunes something learns from 95 % of `train.txt` and is judged by the other 5 %, whole articles of it; a row that is `final`
learns from all of it (`part-wd-1-final`: a quarter) and reads `valid.txt` once, when it is done (its curve is of the beginning of its own text). `NAME@1` is the row of another seed; the table has the mean of all seeds, and their spread, and what a change to a family's first row is worth, seed against the same seed. With `--minutes`, a row takes as many steps as fit into them, evaluations included, after some that are timed. Each row runs in a process of its own, `--jobs` of them at the same time, and keeps its weights, what
every token cost it, and its line in the results; `ensemble` rows average the probabilities of others, and rows with `teachers` learn from them as well as from the text. Rows that stand in the results file are not run again; `--table` prints what there is.
`--mini` rehearses everything in miniature."""
import argparse, functools, itertools, json, math, os, statistics, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from speed import read
from continual_llm.attention import Attention
from continual_llm.batches import Batches, resident
from continual_llm.bench import machine_line
from continual_llm.core import human_time, nearest, numpy_generator, pick_device, pick_precision, seed_everything
from continual_llm.data import prepare
from continual_llm.distill import distilled
from continual_llm.dynamic import RATE, dynamic_nats
from continual_llm.evaluate import ensemble_nats, score_tokens, token_nats
from continual_llm.generate import generate
from continual_llm.history import History
from continual_llm.loop import LoopConfig, Parts, fit, take_step
from continual_llm.metrics import Score
from continual_llm.model import ContinualLLM, ModelConfig
from continual_llm.ops import Dropout
from continual_llm.optim import OptimConfig, make_optimizer
from continual_llm.source import Source
from continual_llm.split import prepare_split
from continual_llm.tokenizer import Tokenizer, train_tokenizer
from continual_llm.train import Compiled, machine


@dataclass(frozen=True)
class Row:
    "One way to learn from a small text"
    vocab:int=8000           # pieces
    d_model:int=512
    n_layers:int=8
    n_heads:int=8
    n_kv_heads:int=8
    d_ff:int=1536
    seq_len:int=512          # tokens of a block
    qk_norm:bool=True        # norm of queries and keys (Henry et al. 2020)
    tie_embeddings:bool=True
    dropout:float=.2         # of embeddings and of what each part adds (Srivastava et al. 2014)
    attn_dropout:float=0.    # of attention weights
    word_drop:float=.1       # pieces whose embedding is zero for a whole batch (Gal and Ghahramani 2016; Merity et al. 2018)
    layer_drop:float=0.      # parts left out, drawn for each block of text (Huang et al. 2016)
    replace:float=0.         # input tokens replaced by others of the same batch (Xie et al. 2017)
    mask:float=0.            # input tokens whose embedding is zero
    reshuffle:bool=False     # documents in another order in each epoch, besides the blocks
    bpe_dropout:float=0.     # merges left out while the text is cut into pieces, anew in each epoch (Provilkov et al. 2020)
    values:bool=False        # each layer's values mixed with the first layer's (Zhou et al. 2024); no Llama any more
    smoothing:float=0.       # of the target that all pieces share (Szegedy et al. 2016)
    ema:float=0.             # the model that is judged is a running mean of the weights that keeps this share at each step
    late:float=0.            # or the mean of all weights after this share of the steps, the last ones (Izmailov et al. 2018)
    optimizer:str='muon'
    rate:float=5e-3          # at its peak
    decay:float=.5           # decoupled weight decay
    decay_course:str='even'  # how it changes on the way: one of `COURSES`
    floor:float=0.           # where the descent of the rate ends, as a share of its peak
    epochs:int=24
    batch:int=32             # blocks of a step
    seed:int=0
    teachers:tuple=()        # rows whose mean of probabilities is learned from as well (Hinton et al. 2015)
    taught:float=.5          # the share of the target that is theirs
    ensemble:tuple=()        # rows that answer as one; nothing is trained
    share:float=1.           # of the training text that is learned from, its beginning
    final:bool=False         # learn from all of the training text, and be judged on `valid.txt`

    @property
    def shape(self):
        "The model's"
        mine = asdict(self)
        return ModelConfig(vocab_size=self.vocab, max_seq_len=self.seq_len, **{f.name: mine[f.name] for f in fields(ModelConfig) if f.name in mine})


COURSES = dict(even=lambda done: 1., rising=lambda done: 2*done, falling=lambda done: 2 - 2*done)  # share of the steps behind us -> what the decay is multiplied by; the rate, which it is taken times, falls besides
FEW = Row(share=.05, vocab=2000, d_model=128, n_layers=5, n_heads=4, n_kv_heads=4, d_ff=384, seq_len=256, dropout=.1, word_drop=0., decay=1.5, epochs=12, batch=8)  # a twentieth of the text, and eight numbers to a token where `wd-1.5` has thirteen: for a CPU
QUARTER = replace(FEW, share=.25, vocab=4000, d_model=192, n_layers=6, n_heads=6, n_kv_heads=6, d_ff=576, epochs=19, batch=16)  # for the question which size suits a time
PART = replace(QUARTER, d_model=128, n_heads=4, n_kv_heads=4, d_ff=384, epochs=8)  # the narrow one of these in fewer passes, for each option by itself with more text than `few` has
SMALL = Row(d_model=256, n_layers=6, n_heads=8, n_kv_heads=2, d_ff=768, seq_len=256, dropout=.1, decay=3., epochs=30)  # about the preset
HOURS = replace(FEW, share=1., vocab=8000, d_model=384, n_layers=6, n_heads=6, n_kv_heads=6, d_ff=1152, seq_len=512, decay=1., epochs=10, batch=16, final=True)  # what two cores can do in two hours
HALF_HOUR = replace(QUARTER, share=1., vocab=8000, d_model=256, n_heads=8, n_kv_heads=8, d_ff=768, decay=.5, epochs=5, final=True)  # and in half an hour: about as many numbers to a token as `part`, and in all its steps less decay
HALF_HOURS = ('half-hour', 'half-hour@1', 'half-hour@2')
MINI = dict(vocab=500, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=48, seq_len=32, batch=4, epochs=1)

CHANGES = { # each by itself, to a family of rows
    **{f'wd-{d:g}': dict(decay=d) for d in (.1, .5, 1., 1.5, 2., 3., 6.)}, **{f'decay-{c}': dict(decay_course=c) for c in ('rising', 'falling')}, **{f'dropout-{p:g}': dict(dropout=p) for p in (0., .1, .2, .3)}, 'attention-.1': dict(attn_dropout=.1),
    'word-0': dict(word_drop=0.), 'word-.1': dict(word_drop=.1), 'layer-.1': dict(layer_drop=.1), 'replace-.1': dict(replace=.1), 'mask-.1': dict(mask=.1), 'smoothing-.1': dict(smoothing=.1), 'reshuffle': dict(reshuffle=True), 'bpe-.1': dict(bpe_dropout=.1),
    'ema': dict(ema=.99), 'ema-.999': dict(ema=.999), 'ema-floor-.3': dict(ema=.99, floor=.3), 'late-.1': dict(late=.1), 'late-.3-floor-.3': dict(late=.3, floor=.3), 'floor-.1': dict(floor=.1), 'no-qk-norm': dict(qk_norm=False), 'values': dict(values=True), 'untied': dict(tie_embeddings=False), **{f'vocab-{n}k': dict(vocab=1000*n) for n in (2, 4, 8)},
    **{f'rate-{r:g}': dict(rate=r) for r in (2.5e-3, 1e-2)}, **{f'adamw-{r:g}': dict(optimizer='adamw', rate=r, decay=.1) for r in (1e-3, 2e-3, 4e-3)}, **{f'adamw-{r:g}-wd-{d:g}': dict(optimizer='adamw', rate=r, decay=d) for r in (1e-3, 2e-3, 4e-3) for d in (1.5, 4.)}}


def family(name, row, **more):
    "A row with each change, its twins of half and twice the length or step, and what is learned from it"
    T, B, mean = row.seq_len, row.batch, tuple(f'{name}{seed}' for seed in ('', '@1', '@2', '@3'))
    sizes = {f'T-{T//2}': dict(seq_len=T//2, batch=2*B), f'T-{2*T}': dict(seq_len=2*T, batch=B//2), f'batch-{B//2}': dict(batch=B//2), f'batch-{2*B}': dict(batch=2*B)}
    others = {'again': dict(teachers=(name,), seed=1), **{f'again-{p:g}': dict(teachers=(name,), seed=1, taught=p) for p in (.25, .75, 1)}, 'taught': dict(teachers=mean, seed=4), 'ensemble': dict(ensemble=mean)}
    changed = {f'{name}-{what}': replace(row, **change) for what, change in {**CHANGES, **sizes, **others, **more}.items()}
    return {name: row, **{n: r for n, r in changed.items() if r != row}}


ROWS = {'base': Row(attn_dropout=.1), 'wd-1.5': Row(attn_dropout=.1, decay=1.5), 'wd-3': Row(attn_dropout=.1, decay=3.), 'dropout-.35': Row(attn_dropout=.1, dropout=.35),
        'plain': replace(SMALL, n_kv_heads=8, qk_norm=False, dropout=0., word_drop=0., optimizer='adamw', rate=2e-3, decay=.1, batch=8),
        **family('few', FEW, wide=dict(d_model=192, n_heads=6, n_kv_heads=6, d_ff=576), **{'wide-6': dict(d_model=192, n_heads=6, n_kv_heads=6, d_ff=576, epochs=6), 'narrow-18': dict(d_model=96, n_heads=3, n_kv_heads=3, d_ff=288, epochs=18)}, **{f'passes-30-wd-{d:g}': dict(epochs=30, decay=d) for d in (1.5, 3)}), **family('quarter', QUARTER, narrow=dict(d_model=128, n_heads=4, n_kv_heads=4, d_ff=384), wide=dict(d_model=256, n_heads=8, n_kv_heads=8, d_ff=768)), **family('part', PART, **{'wd-1-again': dict(decay=1., teachers=('part-wd-1',), seed=1), 'wd-1-final': dict(decay=1., final=True), **{f'passes-14{w}': dict(epochs=14, **d) for w, d in {'': {}, '-wd-1': dict(decay=1.)}.items()}}), **family('small', SMALL), **family('large', Row(decay=1.5, word_drop=0., epochs=16), wide=dict(d_model=768, n_heads=12, n_kv_heads=12, d_ff=2304)),
        'hours': HOURS, 'hours-ensemble': replace(HOURS, ensemble=('hours', 'hours@1')), 'half-hour': HALF_HOUR, **{f'half-hour-{what}': replace(HALF_HOUR, **how) for what, how in dict(again=dict(teachers=('half-hour',), seed=3), taught=dict(teachers=HALF_HOURS, seed=4), ensemble=dict(ensemble=HALF_HOURS)).items()}, **family('final', Row(decay=2.5, dropout=.25, final=True))}


# ---- the model and its optimizer ----

class LayerDrop(Dropout):
    "Dropout; and for some texts, all of what a part adds"
    def __init__(self, p, layer):
        super().__init__(p)
        self.layer = layer

    def forward(self, x):
        x = super().forward(x)
        if not self.training or not self.layer: return x
        return x*((torch.rand(len(x), 1, 1, device=x.device) >= self.layer).to(x.dtype)/(1-self.layer))


class FirstValues(Attention):
    "Attention whose values are mixed with those of the first layer"
    def __init__(self, config, first=None):
        super().__init__(config)
        self.first, self.mix = [first], nn.Parameter(torch.zeros(1)) if first else None  # in a list it is no part of this one

    def heads(self, x, cos, sin):
        q, k, v = super().heads(x, cos, sin)
        if not self.first[0]: self.seen = v
        else: v = v.lerp(self.first[0].seen, self.mix.sigmoid().to(v.dtype))
        return q, k, v


class Student(ContinualLLM):
    "A model with more ways to make learning by heart harder; without training, the plain one"
    def __init__(self, row):
        super().__init__(row.shape)
        self.row = row
        for b in self.blocks: b.drop = LayerDrop(row.dropout, row.layer_drop)
        if not row.values: return
        for i, b in enumerate(self.blocks): b.attn = FirstValues(row.shape, self.blocks[0].attn if i else None)
        self.init_weights()
        for b in self.blocks[1:]: nn.init.zeros_(b.attn.mix)

    def hidden(self, ids, cache=None):
        if not self.training: return super().hidden(ids, cache)
        if p := self.row.replace:
            others = ids.flatten()[torch.randint(ids.numel(), ids.shape, device=ids.device)]
            ids = torch.where(torch.rand(ids.shape, device=ids.device) < p, others, ids)
        x, T = self.embed(ids), ids.shape[1]
        if p := self.row.word_drop: x = x*((torch.rand(self.row.vocab, device=x.device) >= p).to(x.dtype)/(1-p))[ids][..., None]
        if p := self.row.mask: x = x*((torch.rand(ids.shape, device=x.device) >= p).to(x.dtype)/(1-p))[..., None]
        x = self.drop(x)
        for b in self.blocks: x = b(x, self.cos[:T], self.sin[:T])
        return self.norm(x)

    def forward(self, ids, cache=None, targets=None, reduction='mean'):
        if targets is None or not (self.training and self.row.smoothing): return super().forward(ids, cache, targets, reduction)
        return self.smoothed(self.hidden(ids), targets, reduction)

    def smoothed(self, h, targets, reduction):
        "The loss of a target of which all pieces have a share"
        return F.cross_entropy(self.logits(h).flatten(0, 1).float(), targets.flatten(), reduction=reduction, label_smoothing=self.row.smoothing)


class Guided:
    "An optimizer whose weight decay takes its course, and which keeps a running mean of the weights, or one of the late ones"
    def __init__(self, opt, model, keep, late, course, total):
        self.opt, self.keep, self.late, self.course, self.total, self.steps = opt, keep, late, course, total, 0
        self.now = list(model.parameters())
        self.mean = [p.detach().clone() for p in self.now] if keep or late else []
        self.decays = [g['weight_decay'] for g in opt.param_groups]

    def step(self):
        for g, decay in zip(self.opt.param_groups, self.decays): g['weight_decay'] = decay*self.course(self.steps/self.total)
        self.opt.step()
        self.steps += 1
        if self.keep: new = max(1-self.keep, 1/(self.steps+1))  # the first weights are soon forgotten
        else: new = 1/max(1, self.steps - round(self.total*(1-self.late)))  # before that, the newest alone
        if self.mean: torch._foreach_lerp_(self.mean, [p.detach() for p in self.now], new)

    @torch.no_grad()
    def swap(self):
        "The mean becomes the model, and the other way round"
        for p, m in zip(self.now, self.mean):
            old = p.clone()
            p.copy_(m), m.copy_(old)

    def __getattr__(self, name): return getattr(self.opt, name)


# ---- the text, told anew ----

class Retold(Batches):
    "Batches of a text of which each epoch reads another version, of the same length"
    def __init__(self, tell, *text):
        super().__init__(*text)
        self.tell, self.epoch, self.device = tell, None, 'cpu'

    def on(self, device):
        other = super().on(device)
        other.device = device
        return other

    def __call__(self, step):
        if self.epoch != (epoch := step//self.steps_per_epoch): self.epoch, self.ids = epoch, resident(self.tell(epoch), self.device)
        return super().__call__(step)


def articles(ids, starts, tok):
    "The articles of a text as arrays of ids; each begins with a title between single equals signs"
    def title(at): return (begin := tok.decode(ids[at:at+12].tolist()).strip()).startswith('= ') and not begin.startswith('= =')
    return np.split(ids, [at for at in starts[1:] if at < len(ids) and title(at)])


def telling(row, ids, starts, tok):
    "epoch -> the token ids it reads, or None where all read the same"
    if not (row.reshuffle or row.bpe_dropout): return None
    parts = articles(ids, starts, tok)
    if row.bpe_dropout: lines, cutter = [tok.decode(part.tolist()).splitlines(keepends=True) for part in parts], sentencepiece.SentencePieceProcessor(model_proto=tok.model)
    def tell(epoch):
        rng, n = numpy_generator(row.seed, 'telling', epoch), len(parts)
        order = rng.permutation(n) if row.reshuffle else np.roll(np.arange(n), rng.integers(n))  # begins elsewhere each time, for there will be more pieces than room
        if not row.bpe_dropout: return np.concatenate([parts[i] for i in order])
        sentencepiece.set_random_generator_seed(int(rng.integers(2**31)))
        cut = cutter.encode([line for i in order for line in lines[i]], enable_sampling=True, alpha=row.bpe_dropout, nbest_size=-1, num_threads=1)
        return np.resize(np.concatenate(cut).astype(ids.dtype), len(ids))
    return tell


# ---- one row ----

def texts(a, row):
    "What is learned from and what is judged by, and the tokenizer"
    folder, cache = a.work/f'tok{row.vocab}', a.work/'cache'
    tok, (train, valid) = Tokenizer.load(folder), [Source.of(str(a.data/f'{name}.txt')) for name in ('train', 'valid')]
    if row.final: return tok, prepare(train, tok, cache), prepare(valid, tok, cache)
    return tok, *prepare_split(train, tok, .05, 0, cache)[:2]


def kept(a, name, device):
    "The model of a row that was run"
    saved = torch.load(a.work/f'{name}.pt', weights_only=True)
    model = ContinualLLM(ModelConfig(**saved['config'])).to(device)
    model.load_state_dict(saved['weights'])
    return model.eval()


def optimizer(row, model, total): return Guided(make_optimizer(model, OptimConfig(row.optimizer, row.decay)), model, row.ema, row.late, COURSES[row.decay_course], total)


def batches_of(row, train, tok):
    "The blocks of what is learned from"
    ids = train.ids[:int(row.share*len(train.ids))]
    text = ids, row.seq_len, row.batch, 1, row.seed, tok.bos_id
    return Retold(tell, *text) if (tell := telling(row, np.asarray(ids), train.doc_starts, tok)) else Batches(*text)


def fitting(a, row, model, opt, parts, loop):
    "As many steps as fit into the time, by some that are taken back: after six, as many as last for a fiftieth of it, but six at least"
    for step in itertools.count():
        if step == 6: begun = time.perf_counter()
        if step >= 12 and (took := time.perf_counter() - begun) >= 60*a.minutes/50: break
        take_step(model, opt, parts, loop, step)  # reads its loss, so the device is waited for
    seed_everything(row.seed, 'weights')
    model.init_weights()
    return max(2, int(60*a.minutes*(step-6)/(1.05*took)))  # evaluations are a twentieth


def loss_of(model, batches, teachers=(), compile=False):
    "For the loop: (model, micro-batch) -> (summed nats, tokens)"
    row = model.row
    if teachers and row.smoothing: raise SystemExit('smoothing and teachers are not for one row')
    net = Compiled(model, batches, next(model.parameters()).is_cuda and not (teachers or row.smoothing)) if compile else None
    if teachers: return distilled(teachers, row.taught, hidden=net and net.known)
    ask = net or (lambda x, y: model(x, targets=y, reduction='sum'))
    if net and row.smoothing: ask = lambda x, y: model.smoothed(net.known(x), y, 'sum')
    def loss_fn(_, micro):
        x, y = [t.to(model.out_weight.device) for t in micro]
        return ask(x, y), y.numel()
    return loss_fn


def learned(a, row, tok, train, val, device, precision):
    "A trained model, its history, and how often the text was read"
    seed_everything(row.seed, 'weights')
    teachers = [kept(a, t, device) for t in row.teachers]
    model, batches = Student(row).to(device).train(), batches_of(row, train, tok).on(device)
    watched, most = (train, a.eval_tokens or len(val)) if row.final else (val, a.eval_tokens)  # `valid.txt` is not looked at before the end
    def evaluate(poll):
        opt.swap()
        try: score = score_tokens(model, watched, tok, most, batch_size=row.batch, precision=precision)
        finally: opt.swap()
        say(a, f"pass {len(history.rows('eval')) + 1} of {loop.epochs}, {score.bits_per_byte:.3f} bits per byte of {'what it reads' if row.final else 'its split'}")
        return score
    parts, history = Parts(batches, loss_of(model, batches, teachers, a.compile), evaluate, lambda *_: {}), History()
    loop = LoopConfig(batches.steps_per_epoch, row.epochs, row.rate, 0, row.floor, early_stopping_patience=0, precision=precision, device=str(device), seed=row.seed)
    with machine(False, None, precision == 'bf16' and device.type == 'cuda'):
        if a.minutes: steps = fitting(a, row, model, optimizer(row, model, loop.total), parts, loop)
        if a.minutes: loop = replace(loop, epochs=-(-steps//loop.steps_per_epoch), max_steps=steps)
        opt = optimizer(row, model, loop.total)
        at = fit(model, opt, parts, replace(loop, warmup_steps=loop.total//20), history)
        if at.stopped: raise SystemExit(f'stopped by {at.stopped}, so there is no row')
    opt.swap()
    return model.eval(), history, round(loop.total/loop.steps_per_epoch, 2)


def say(a, text): print(f'{a.one} at {time.strftime("%H:%M:%S")}: {text}', file=sys.stderr, flush=True)


def result(score): return dict(bits_per_byte=score.bits_per_byte, word_perplexity=score.word_perplexity, token_perplexity=score.perplexity)


def one(a, name):
    "Run a row here and keep what it gave"
    row, device, begun = chosen(a, name), pick_device(a.device), time.perf_counter()
    tok, train, val = texts(a, row)
    precision = pick_precision('auto', device)
    def scored(nats): return result(Score(float(nats.sum()), len(nats), val.n_words, val.n_bytes))
    def keep(**facts): write(a, dict(row=name, settings=asdict(row), machine=machine_line(device), **facts))
    if row.ensemble: return keep(window=scored(ensemble_nats([torch.from_numpy(np.load(a.work/f'{n}.npy')).double() for n in row.ensemble])))
    model, history, epochs = learned(a, row, tok, train, val, device, precision)
    seconds = time.perf_counter() - begun
    torch.save(dict(config=row.shape.to_dict(), weights=model.state_dict()), a.work/f'{name}.pt')
    say(a, f'trained for {human_time(seconds)}; now it is judged')
    nats = token_nats(model, val.ids, stride=max(1, row.seq_len//a.parts), batch_size=row.batch, bos_id=tok.bos_id, precision=precision)
    np.save(a.work/f'{name}.npy', nats.float().numpy())
    evals, steps, blocks = history.rows('eval'), history.rows('step'), score_tokens(model, val, tok, batch_size=row.batch, precision=precision)
    facts = dict(parameters=model.n_params(), epochs=epochs, blocks={k: getattr(blocks, k) for k in ('bits_per_byte', 'word_perplexity', 'perplexity')}, window=scored(nats), best_epoch=min(evals, key=lambda r: r['loss'])['epoch'], train_loss=evals[-1]['train_loss'],
                 fitting=steps[-1]['seconds'], curve=[round(r['bits_per_byte'], 4) for r in evals], train_curve=[round(r['train_loss'], 3) for r in evals], seconds=round(seconds, 1), tokens_per_second=round(statistics.median(s['tokens_per_second'] for s in steps[len(steps)//2:])))
    for rate in a.dynamic:
        say(a, f'dynamic evaluation at {rate:g}')
        facts.setdefault('dynamic', {})[str(rate)] = scored(dynamic_nats(model, val.ids, rate=rate, bos_id=tok.bos_id, precision=precision))
    if a.samples: facts['samples'] = generate(model, tok, ['']*a.samples, max_tokens=60, temperature=.8, top_p=.95, seed=1)
    keep(**facts)


# ---- all of them ----

def chosen(a, name):
    "The row of a name; `NAME@1` is that of another seed"
    base, _, seed = name.partition('@')
    if base not in ROWS: raise SystemExit(f'{base} is not a row{nearest(base, ROWS)}; see --help')
    row = replace(ROWS[base], seed=int(seed or ROWS[base].seed), final=a.final or ROWS[base].final)
    return replace(row, **MINI) if a.mini else row


def write(a, row):
    "Another line of the results"
    with open(a.results, 'a') as f: f.write(json.dumps(row) + '\n')
    print(table([row]).splitlines()[-1], flush=True)


def several(values, form):
    "Their mean; of several seeds also the deviation of one"
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{spread}'


def seeds(rows):
    "Rows that differ in their seed alone, together"
    together = {}
    for r in rows: together.setdefault(r['row'].partition('@')[0], []).append(r)
    return together


def against(rows):
    "Row -> its bits per byte in a sliding window against the first row of its family with the same seed, judged by the same text, in per cent more or less"
    final = {r['row']: r['settings']['final'] for r in rows}
    bits = {r['row']: r['window']['bits_per_byte'] for r in rows}
    def first(name):
        base, *seed = name.partition('@')
        return min((n.partition('@')[0] for n in bits if (base + '-').startswith(n.partition('@')[0] + '-')), key=len) + ''.join(seed)
    return {name: 100*(b/bits[first(name)] - 1) for name, b in bits.items() if first(name) != name and final.get(first(name)) == final[name]}


def table(rows):
    "Rows as Markdown, the seeds of a row in one"
    beside = against(rows)
    lines = ['| row | seeds | on | parameters | epochs | bits per byte, blocks | sliding window | against the first row, % | words, blocks | sliding window | tokens, blocks | dynamic at the default rate, words | training loss | seconds | tokens/s |', '|---'*15 + '|']
    for name, same in seeds(rows).items():
        def said(form, *path):
            values = [v for r in same if (v := functools.reduce(lambda at, key: at and at.get(key), path, r)) is not None]
            return several(values, form) if values else ''
        for r in same: r['beside'] = beside.get(r['row'])
        for r in same: r['at_default'] = r.get('dynamic', {}).get(str(RATE), {}).get('word_perplexity')  # not the best, which `valid.txt` would have chosen
        cells = [said('.4f', 'blocks', 'bits_per_byte'), said('.4f', 'window', 'bits_per_byte'), said('+.2f', 'beside'), said('.2f', 'blocks', 'word_perplexity'), said('.2f', 'window', 'word_perplexity'), said('.2f', 'blocks', 'perplexity'),
                 said('.2f', 'at_default'), said('.3f', 'train_loss'), said(',.0f', 'seconds'), said(',.0f', 'tokens_per_second')]
        lines.append(f"| {name} | {len(same)} | {'valid' if same[0]['settings']['final'] else 'split'} | {same[0].get('parameters', 0)/1e6:.1f} M | {said('g', 'epochs')} | {' | '.join(cells)} |")
    return '\n'.join(lines)


def study(a):
    "Run the rows that are missing, each in a process of its own"
    names = [n for n in a.rows.split(',') if n not in {r['row'] for r in read(a.results)}]
    for vocab in {chosen(a, n).vocab for n in names}:
        if not (a.work/f'tok{vocab}').exists(): train_tokenizer(str(a.data/'train.txt'), vocab_size=vocab, save=a.work/f'tok{vocab}')
    env = dict(os.environ, **{} if a.device.startswith('cuda') else dict(OMP_NUM_THREADS=str(max(1, os.cpu_count()//a.jobs))))
    def run(name):
        done = subprocess.run([sys.executable, __file__, *a.argv, '--one', name], stdout=subprocess.PIPE, text=True, env=env)
        print(done.stdout.strip() or f'{name} failed, as it says above', flush=True)
        return done.returncode
    waits = [n for n in names if chosen(a, n).teachers or chosen(a, n).ensemble]  # for the others
    with ThreadPoolExecutor(a.jobs) as pool: return any([code for wave in ([n for n in names if n not in waits], waits) for code in list(pool.map(run, wave))])


def main():
    "Run what is missing; print the table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder with `train.txt` and `valid.txt`')
    p.add_argument('--rows', default='small', help=f"which, with commas between them: {', '.join(n for n in ROWS if n in ('base', 'wd-1.5', 'wd-3', 'dropout-.35', 'plain', 'hours', 'hours-ensemble', *(f'half-hour{what}' for what in ('', '-again', '-taught', '-ensemble')), 'few', 'quarter', 'part', 'small', 'large', 'final'))}; of the last six also NAME-CHANGE, with one of {', '.join(dict.fromkeys(n.partition('-')[2] for n in ROWS if n.startswith(('few-', 'part-', 'final-'))))}")
    p.add_argument('--minutes', type=float, default=0., help='of training for each row (default: the epochs of the row)')
    p.add_argument('--device', default='auto')
    p.add_argument('--compile', action='store_true')
    p.add_argument('--dynamic', type=float, nargs='*', default=[], help='rates of dynamic evaluation to try')
    p.add_argument('--eval_tokens', type=int, default=0, help='the curve of a row is of the first of the tokens alone (0: all); its last figures are of all')
    p.add_argument('--parts', type=int, default=8, help='the sliding window moves on by a block in so many parts')
    p.add_argument('--samples', type=int, default=0, help='texts to write')
    p.add_argument('--jobs', type=int, default=1, help='rows at the same time')
    p.add_argument('--work', type=Path, default=Path('checkpoints/quality'), help='where tokenizers and weights are kept')
    p.add_argument('--results', type=Path, help='one line of JSON per row (default: in the work folder)')
    p.add_argument('--final', action='store_true', help='rows learn from all of the training text and are judged on `valid.txt`, whatever they say themselves')
    p.add_argument('--mini', action='store_true', help='everything in miniature')
    p.add_argument('--table', action='store_true', help='print the table of what there is, and run nothing')
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    a.argv = sys.argv[1:]
    a.work.mkdir(parents=True, exist_ok=True)
    a.results = a.results or a.work/'results.jsonl'
    if a.one: return one(a, a.one)
    failed = not a.table and study(a)
    print(table(read(a.results)))
    raise SystemExit(failed)


if __name__ == '__main__': main()
