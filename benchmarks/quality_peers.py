"""How good a model does the same time give with others?  `python benchmarks/quality_peers.py --data FOLDER [--tune] [--contenders hf,litgpt,ours] [--minutes 30] [--threads 2] [--ours plain,half-hour] [--table]`

FOLDER holds `train.txt` and `valid.txt` of WikiText-2. Each contender trains from scratch, on this machine's CPU and in a process of its own, for `--minutes`: the number of its optimizer steps is what fits into them by the
median of some steps that are timed first, or by what a run of a peer of this shape and length took, and its schedule ends with the last of them. All read the same ids, those of our tokenizer of 8,000 pieces made from `train.txt`, so that bits per byte and words compare. What does
not count for anybody: reading and cutting the text, making the model, compiling it, saving it and the score at the end. Ours is evaluated after each epoch within its time; the others are not evaluated on the way, and have
all of theirs for training. The field `trained` says how many seconds it came to. Who is who:

- `hf`: `LlamaForCausalLM` trained by the `Trainer` of transformers: its own loop, its fused AdamW (beta2 .95), cosine to 0 after a warmup of a twentieth, gradients clipped to 1, `bf16=True` and `torch_compile=True`, which are its
  fastest on a CPU that multiplies bfloat16 (`peers_train.py`); tables of pieces tied. Blocks are fixed and shuffled in each epoch, and no target is lost between them. Llama has no dropout but that of attention weights.
- `litgpt`: `litgpt.pretrain.setup`, what `litgpt pretrain` calls: its loop, its own start of weights, `bf16-mixed`, compiled as always, AdamW (betas .9 and .95, not fused on a CPU), cosine to 0 after the same warmup, gradients clipped
  to 1, tables tied. The model that is scored is read from the checkpoint it writes. The text is given by a `DataModule` of a few lines, since its `TextFiles` needs litdata and cuts the text with a tokenizer of its own. It has no dropout.
- `ours ROW`: a row of `quality.py` (`--ours`), trained by it: `plain` is the settings of the others, AdamW without dropout; the rest are for small texts. Which is best was found there.

Tuning: `--tune` walks uphill for each peer by itself from the best that is known (or from `--start`): one setting after the other goes up or down the list in `AXES` for as long as it helps, each try trained for `--minutes` on 95 % of
`train.txt` and judged by the other 5 %, whole articles of it, which the full run learns from too. Tries stand in the results file, and none is made twice. The full run takes each peer's best of those tried at the greatest length, and,
since more time wants a larger model, once more with the next larger size (`--above size`; with `--above size,decay`, once with more weight decay too, since more time is also more epochs); the best of these **on `valid.txt`** stands
for the peer, an advantage that ours doesn't get.

All models are scored by one function, `token_nats` in bfloat16 products, in blocks and in a window that slides by an eighth of what the model was trained to see; that it says the same of our own model when that is asked for its logits alone, as others are,
is checked before each score. Rows that stand in the results file are not run again; one that fails is named, the others go on, and it is tried again the next time. What each printed stays in the work folder (`--work`). `--mini` is everything in miniature.

The peers come with the extra `bench`; how to install them says `speed.py --help`. A peer that isn't there is named as missing."""
import argparse, json, math, os, statistics, subprocess, sys, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
import quality
from peers_train import hf_model, litgpt_config
from speed import Missing, clock_of, read, stamp, version
from continual_llm.core import pick_precision, seed_everything
from continual_llm.evaluate import token_nats
from continual_llm.metrics import Score
from continual_llm.model import ContinualLLM, ModelConfig
from continual_llm.tokenizer import train_tokenizer

HERE = Path(__file__).parent
SIZES = '128x4', '192x4', '256x4', '256x6', '384x6', '512x6', '512x8', '640x8'  # width and layers
TIMED = 32 # steps before the run, of which the first are left out
LEFT_OUT = 3


@dataclass(frozen=True)
class Setting:
    "What is tuned"
    size:str='256x6'         # width and layers
    rate:float=2e-3          # at its peak
    batch:int=8              # blocks of a step
    seq_len:int=256          # tokens of a block
    decay:float=.1           # of the weights
    attn_dropout:float=0.
    compiled:bool=True
    vocab:int=8000           # pieces

    @property
    def shape(self):
        "The model's: inner width three times the width, as many key heads as query heads"
        d, layers = map(int, self.size.split('x'))
        heads = d//(64 if d >= 384 else 32)
        return ModelConfig(self.vocab, d, layers, heads, heads, d_ff=3*d, max_seq_len=self.seq_len, attn_dropout=self.attn_dropout)


MINI = Setting('32x1', batch=4, seq_len=32, compiled=False, vocab=quality.MINI['vocab'])
RATES = 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2
AXES = dict(rate=RATES, size=SIZES, batch=(4, 8, 16, 32), seq_len=(128, 256, 512), decay=(.01, .1, .5, 1.5), attn_dropout=(0., .1))
TUNED = dict(hf=tuple(AXES), litgpt=tuple(AXES)[:-1])


# --- text and time --------------------------------------------------------------------------------------------------------------------------------------------

class Cut(torch.utils.data.Dataset):
    "A text in fixed blocks, each with the token after it"
    def __init__(self, ids, seq_len): self.ids, self.seq_len = np.asarray(ids).astype(np.int64), seq_len

    def __len__(self): return (len(self.ids)-1)//self.seq_len

    def __getitem__(self, i): return torch.from_numpy(self.ids[i*self.seq_len:(i+1)*self.seq_len + 1])


class Clocked:
    "Puts blocks together, and notes when it was asked to: once a step"
    def __init__(self, clock): self.clock, self.at = clock, []

    def __call__(self, blocks):
        self.at.append(self.clock())
        return torch.stack(blocks)

    def steps(self):
        "Seconds of each step but the first ones, which compile"
        return np.diff(self.at)[LEFT_OUT:].tolist()


class Shifted(Clocked):
    "The same as inputs and targets, as Llama of transformers takes them"
    def __call__(self, blocks):
        ids = super().__call__(blocks)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        return dict(input_ids=x, labels=y, shift_labels=y)


# --- the peers ------------------------------------------------------------------------------------------------------------------------------------------------

def hf(setting, ids, steps, clock, folder):
    "A model trained by transformers, the function that asks it, and the seconds of its steps"
    from transformers import Trainer, TrainingArguments
    torch.manual_seed(0)
    model = hf_model(setting.shape)[0]
    collate = Shifted(clock)
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=setting.batch, learning_rate=setting.rate, weight_decay=setting.decay, adam_beta2=.95, max_grad_norm=1., lr_scheduler_type='cosine',
                             warmup_steps=steps//20, bf16=pick_precision('auto', 'cpu') == 'bf16', torch_compile=setting.compiled, use_cpu=True, dataloader_drop_last=True, remove_unused_columns=False, save_strategy='no', report_to='none',
                             logging_steps=max(1, steps//20), disable_tqdm=True, seed=0)
    Trainer(model, args, train_dataset=Cut(ids, setting.seq_len), data_collator=collate).train()
    return model, lambda x: model(input_ids=x, use_cache=False).logits, collate.steps()


def litgpt(setting, ids, steps, clock, folder):
    "The same by litgpt"
    from litgpt import GPT
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.pretrain import setup
    T, collate, blocks = setting.seq_len, Clocked(clock), Cut(ids, setting.seq_len)

    class Text(DataModule):
        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None): self.batch = batch_size
        def train_dataloader(self): return torch.utils.data.DataLoader(blocks, self.batch, shuffle=True, drop_last=True, collate_fn=collate)
        def val_dataloader(self): return torch.utils.data.DataLoader(torch.utils.data.Subset(blocks, range(2*self.batch)), self.batch)

    config = litgpt_config(setting.shape)
    precision = 'bf16-mixed' if pick_precision('auto', 'cpu') == 'bf16' else '32-true'
    train = TrainArgs(save_interval=None, log_interval=max(1, steps//20), global_batch_size=setting.batch, micro_batch_size=setting.batch, max_tokens=steps*setting.batch*T, max_norm=1., min_lr=0., lr_warmup_steps=steps//20, tie_embeddings=True)
    adamw = dict(class_path='torch.optim.AdamW', init_args=dict(lr=setting.rate, weight_decay=setting.decay, betas=(.9, .95)))
    with patch.object(sys, 'argv', ['litgpt', 'pretrain', 'ours']):  # it reads them again when it saves
        setup('ours', config, folder, precision, data=Text(), train=train, eval=EvalArgs(interval=10*steps, max_iters=2, final_validation=False), optimizer=adamw, devices=1, logger_name='csv', seed=0)
    model, saved = GPT(config), torch.load(folder/'final'/'lit_model.pth', weights_only=False)
    model.load_state_dict(saved['model'])
    model.transformer.wte.weight = model.lm_head.weight  # as they were trained; the file has both
    return model, model, collate.steps()


PEERS = dict(hf=hf, litgpt=litgpt)
LIBRARY = dict(hf='transformers', litgpt='litgpt')


def known_pace(a, name, setting):
    "Seconds of a step as they were of another run of this length, from which only the rate and the decay differ, or None; tries have as many steps as the first of them, and a full run goes by what the last one took"
    def alike(s): return {k: v for k, v in s.items() if k not in ('rate', 'decay')}
    wanted = 'tune' if a.tune else 'full', name, a.threads, clock_of(a), a.minutes, alike(asdict(setting))
    same = [r for r in read(a.results) if 'pace' in r and (r['phase'], r['contender'], r['threads'], r['clock'], r['minutes'], alike(r['setting'])) == wanted]
    if same: return same[0]['pace'] if a.tune else same[-1]['trained']/same[-1]['steps']


def peer(a, name, setting, ids):
    "A peer's model, what answers for it, and facts, from a run of as many steps as fit into the time"
    folder, clock = a.work/name, dict(wall=time.perf_counter, processor=time.process_time)[clock_of(a)]
    train = PEERS[name]
    pace = known_pace(a, name, setting) or statistics.median(train(setting, ids, TIMED, clock, folder)[-1])
    steps = max(LEFT_OUT + 2, round(60*a.minutes/pace))
    begun = time.perf_counter()
    model, logits, took = train(setting, ids, steps, clock, folder)
    tokens = steps*setting.batch*setting.seq_len
    return model, logits, dict(setting=asdict(setting), parameters=sum(p.numel() for p in model.parameters()), steps=steps, epochs=round(tokens/len(ids), 2), pace=round(pace, 4),
                               trained=round(statistics.mean(took)*steps, 1), passed=round(time.perf_counter()-begun, 1), tokens_per_second=round(tokens/steps/statistics.mean(took)), library=version(LIBRARY[name]))


# --- ours -----------------------------------------------------------------------------------------------------------------------------------------------------

def ours(a, name, final):
    "The same of a row of `quality.py`, which it runs in a process of its own"
    folder = a.work/f"ours-{'final' if final else 'split'}"
    folder.mkdir(exist_ok=True)
    if not (tok := folder/tokenizer(a).name).exists(): tok.symlink_to(tokenizer(a).absolute())
    results = folder/'results.jsonl'
    flags = ['--data', a.data, '--work', folder, '--results', results, '--minutes', str(a.minutes), '--device', 'cpu', '--parts', '1', *['--mini']*a.mini, *['--compile']*(not a.mini), *['--final']*final]
    subprocess.run([sys.executable, quality.__file__, *map(str, flags), '--one', name], check=True)
    row = [r for r in read(results) if r['row'] == name][-1]
    model = quality.kept(SimpleNamespace(work=folder), name, 'cpu')
    return model, model, dict(setting=row['settings'], parameters=row['parameters'], epochs=row['epochs'], trained=row['fitting'], tokens_per_second=row['tokens_per_second'], library=version('torch'))


# --- one score for all ----------------------------------------------------------------------------------------------------------------------------------------

class Asked(nn.Module):
    "Whatever gives logits, as `token_nats` asks for nats"
    def __init__(self, model, logits, seq_len):
        super().__init__()
        self.model, self.logits, self.config = model, logits, SimpleNamespace(max_seq_len=seq_len)

    def forward(self, ids, targets, reduction): return F.cross_entropy(self.logits(ids).flatten(0, 1).float(), targets.flatten(), reduction=reduction).view(targets.shape)


def check(precision, ids):
    "Our own model costs the same, asked for logits alone"
    shape = MINI.shape
    seed_everything(0, 'check')
    model, ids = ContinualLLM(shape).eval(), np.asarray(ids[:1000]) % shape.vocab_size
    for stride in (0, 4):
        both = [token_nats(m, ids, stride=stride, precision=precision) for m in (model, Asked(model, model, shape.max_seq_len))]
        torch.testing.assert_close(*both, rtol=0, atol=.02 if precision == 'bf16' else 1e-4)


def scores(model, logits, seq_len, text, tok, windows):
    "Results in blocks, and in a sliding window if that is wanted"
    precision = pick_precision('auto', 'cpu')
    check(precision, text.ids)
    asked = Asked(model, logits, seq_len).eval()
    def score(stride):
        nats = token_nats(asked, text.ids, stride=stride, bos_id=tok.bos_id, precision=precision)
        return quality.result(Score(float(nats.sum()), len(nats), text.n_words, text.n_bytes))
    return dict(blocks=score(0), **dict(window=score(max(1, seq_len//8))) if windows else {})


# --- one try --------------------------------------------------------------------------------------------------------------------------------------------------

def one(a, contender, phase, setting=None):
    "Train a contender here, score it, and keep what it gave"
    torch.set_num_threads(a.threads)
    final, of = phase == 'full', contender.partition(' ')
    tok, train, text = quality.texts(a, replace(quality.SMALL, final=final, vocab=int(tokenizer(a).name[3:])))
    setting = setting and Setting(**setting)
    model, logits, facts = ours(a, of[2], final) if of[0] == 'ours' else peer(a, of[0], setting, train.ids)
    keep(a, dict(phase=phase, contender=contender, minutes=a.minutes, **facts, **scores(model, logits, facts['setting']['seq_len'], text, tok, final), clock=clock_of(a), **stamp()))


def keep(a, row):
    "Another line of the results"
    with open(a.results, 'a') as f: f.write(json.dumps(row) + '\n')
    return row


def key(row):
    "What a try is known by; of ours, the name of the row"
    return row['phase'], row['contender'], row['minutes'], row['threads'], None if row['contender'].startswith('ours') else Setting(**row['setting'])


def tried(a, contender, phase, setting=None):
    "The row of a try: the one that stands, or a new one; None if it failed"
    wanted = dict(phase=phase, contender=contender, minutes=a.minutes, setting=setting and asdict(setting), threads=a.threads)
    def there(): return next((r for r in read(a.results) if key(r) == key(wanted)), None)
    if row := there(): return row
    if why := missing(contender): return keep(a, dict(wanted, missing=why))
    log, begun = a.work/f"{contender}-{phase}-{time.strftime('%m%d-%H%M%S')}.log".replace(' ', '-'), time.time()
    job = json.dumps(dict(contender=contender, phase=phase, setting=wanted['setting']))
    with open(log, 'w') as f: code = subprocess.run([sys.executable, __file__, *a.argv, '--one', job], stdout=f, stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS=str(a.threads))).returncode
    row = None if code else there()
    said = f"{row['blocks']['bits_per_byte']:.4f} bits per byte, {row['epochs']} epochs, {row['tokens_per_second']:,} tokens/s" if row else f'FAILED, see {log}'
    print(f"{time.strftime('%H:%M')} {phase} {contender} {' '.join(f'{k}={v}' for k, v in (wanted['setting'] or {}).items())}: {said} ({time.time()-begun:.0f} s)", flush=True)
    return row


def missing(contender):
    "Why a peer cannot contend, or nothing"
    try: version(LIBRARY.get(contender.split()[0], 'torch'))
    except Missing as e: return str(e)


# --- tuning ---------------------------------------------------------------------------------------------------------------------------------------------------

def climb(start, axes, loss):
    "The best setting found by going along one axis after the other for as long as it helps"
    best, least = start, loss(start)
    for name, values in axes.items():
        if getattr(best, name) not in values: continue  # what is not in the list stays
        for way in (1, -1):
            at = best
            while 0 <= (i := values.index(getattr(best, name)) + way) < len(values):
                trial = replace(best, **{name: values[i]})
                if (now := loss(trial)) >= least: break
                best, least = trial, now
            if best != at: break
    return best


def tries(rows, peer):
    "A peer's tries that were trained longest"
    mine = [r for r in rows if r['phase'] == 'tune' and r['contender'] == peer and 'blocks' in r]
    most = max((r['minutes']*r['threads'] for r in mine), default=0)
    return [r for r in mine if r['minutes']*r['threads'] == most]


def best(a, peer):
    "The setting that was asked for, or of the best of these"
    first, mine = MINI if a.mini else Setting(), tries(read(a.results), peer)
    return replace(first, **a.start) if a.start or not mine else Setting(**min(mine, key=lambda r: r['blocks']['bits_per_byte'])['setting'])


def above(setting, axis):
    "The same with the next value of an axis, if there is one"
    at, values = getattr(setting, axis), AXES[axis]
    return [replace(setting, **{axis: values[values.index(at) + 1]})] if at in values[:-1] else []


def tune(a, name):
    "Walk uphill from the best that is known"
    def loss(setting): return row['blocks']['bits_per_byte'] if (row := tried(a, name, 'tune', setting)) and 'blocks' in row else math.inf
    climb(best(a, name), {axis: AXES[axis] for axis in TUNED[name] if axis in a.axes.split(',')}, loss)


def full(a, name):
    "The full run of a contender: of a peer its best setting, and some beside it"
    if name == 'ours': return [tried(a, f'ours {row}', 'full') for row in a.ours.split(',')]
    setting = best(a, name)
    return [tried(a, name, 'full', s) for s in [setting, *(s for axis in filter(None, a.above.split(',')) for s in above(setting, axis))]]


# --- all of it ------------------------------------------------------------------------------------------------------------------------------------------------

def described(row):
    s = row['setting']
    size = s.get('size') or f"{s['d_model']}x{s['n_layers']}"
    return f"{size} | {s['rate']:g} | {s['batch']} x {s['seq_len']} | {s['decay']:g}"


def tuning_table(rows, peer):
    "A peer's tries as Markdown, the longest first and the best of them"
    rows = sorted((r for r in rows if r['phase'] == 'tune' and r['contender'] == peer and 'blocks' in r), key=lambda r: (-r['minutes']*r['threads'], r['blocks']['bits_per_byte']))
    lines = [f'| {peer} | minutes x threads | size | rate | batch | decay | attention dropout | epochs | tokens/s | bits per byte, blocks |', '|---'*10 + '|']
    return '\n'.join(lines + [f"| tune | {r['minutes']:g} x {r['threads']} | {described(r)} | {r['setting'].get('attn_dropout', 0):g} | {r['epochs']:g} | {r['tokens_per_second']:,} | {r['blocks']['bits_per_byte']:.4f} |" for r in rows])


def full_table(rows):
    "The full runs as Markdown, and by how much the best of ours is lower than each"
    rows = [r for r in rows if r['phase'] == 'full']
    def bits(row): return row['window']['bits_per_byte']
    least = min((bits(r) for r in rows if r['contender'].startswith('ours') and 'window' in r), default=math.nan)
    lines = ['| contender | minutes x threads | size | rate | batch | decay | parameters | epochs | seconds | tokens/s | bits per byte, blocks | sliding window | words, sliding window | ours is lower by |', '|---'*14 + '|']
    for r in rows:
        if 'missing' in r: lines.append(f"| {r['contender']} | {r['missing']}{' |'*13}")
        else: lines.append(f"| {r['contender']} | {r['minutes']:g} x {r['threads']} | {described(r)} | {r['parameters']/1e6:.1f} M | {r['epochs']:g} | {r['trained']:,.0f} | {r['tokens_per_second']:,} | {r['blocks']['bits_per_byte']:.4f} | {bits(r):.4f} | {r['window']['word_perplexity']:.2f} | {'' if r['contender'].startswith('ours') or math.isnan(least) else f'{1-least/bits(r):.1%}'} |")
    return '\n'.join(lines)


def tables(rows): return '\n\n'.join([tuning_table(rows, p) for p in PEERS] + [full_table(rows)])


def tokenizer(a):
    "Its folder"
    folder = a.work/f"tok{quality.MINI['vocab'] if a.mini else quality.SMALL.vocab}"
    if not folder.exists(): train_tokenizer(str(a.data/'train.txt'), vocab_size=int(folder.name[3:]), save=folder)
    return folder


def main():
    "Run what is missing; print the tables"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder with `train.txt` and `valid.txt`')
    p.add_argument('--contenders', default='hf,litgpt,ours', help='which, with commas between them')
    p.add_argument('--ours', default='plain,half-hour', help='rows of `quality.py`')
    p.add_argument('--tune', action='store_true', help='look for the best settings of the peers, instead of the full run')
    p.add_argument('--start', type=json.loads, default={}, help='JSON: the setting to begin with, or to run fully, in place of the best that is known; what it leaves out is as in `Setting`')
    p.add_argument('--axes', default=','.join(AXES), help='which settings are tuned')
    p.add_argument('--above', default='size', help='settings of which a peer is fully run with the next value of the list besides, each by itself, such as `size,decay`')
    p.add_argument('--minutes', type=float, default=30., help='of training for each')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--cpu', action='store_true', help='count processor time for the peers: for one thread on a machine that others use too')
    p.add_argument('--work', type=Path, default=Path('checkpoints/quality_peers'), help='where the tokenizer, weights and logs are kept')
    p.add_argument('--results', type=Path, help='one line of JSON per row (default: `quality_peers.jsonl` beside this; of `--mini`, in the work folder)')
    p.add_argument('--mini', action='store_true', help='everything in miniature')
    p.add_argument('--table', action='store_true', help='print the tables of what there is, and run nothing')
    p.add_argument('--one', type=json.loads, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.argv = sys.argv[1:]
    a.results = a.results or (a.work/'results.jsonl' if a.mini else HERE/'quality_peers.jsonl')
    a.work.mkdir(parents=True, exist_ok=True)
    if a.one: return one(a, **a.one)
    if not a.table:
        tokenizer(a)
        done = [full(a, name) for name in a.contenders.split(',')] if not a.tune else [tune(a, name) for name in a.contenders.split(',') if name in PEERS]
    print(tables(read(a.results)))
    raise SystemExit(not (a.table or a.tune or all(row for rows in done for row in rows)))


if __name__ == '__main__': main()
