"""How fast is training, writing and reading, beside others and beside what the machine can do?  `python benchmarks/speed.py --data FOLDER [--threads 2] [--rounds 5] [--sets train,generate,data,profile]`

Runs `peers_train.py`, `peers_generate.py`, `data_speed.py` and `profile_step.py` one after the other, about a quarter of an hour on two quiet cores, and keeps what they find in `benchmarks/speed.jsonl`, which the
page `nbs/speed.ipynb` shows. FOLDER holds `wikitext-2/train.txt`. A measurement that stands in the file with as many rounds and threads is not taken again, so it may be interrupted and goes on where it was;
`--again` takes all of them anew, `--table` prints what there is. Peers that are not installed are named. A clean environment with all of them:

    python3 -m venv benchvenv
    benchvenv/bin/pip install -e '.[bench]'
    benchvenv/bin/pip install --no-deps litgpt

litgpt 0.5 asks for an older huggingface-hub than transformers 5 brings, hence `--no-deps`; what it imports comes with the extra. Without a GPU, install the CPU build of PyTorch first. llama-cpp-python is compiled
while it is installed, for the processor at hand, and needs g++ and cmake (`CMAKE_BUILD_PARALLEL_LEVEL=1` where memory is short)."""
import argparse, json, os, statistics, subprocess, sys, time
from importlib import metadata
from pathlib import Path
import torch
from continual_llm.bench import interleaved, machine_line
from continual_llm.core import atomic_file
from continual_llm.model import model_config

HERE = Path(__file__).parent
SHAPES = dict(tiny=(dict(config='tiny'), 8), small=(dict(config='small'), 8), medium=(dict(config='medium', max_seq_len=512), 4))  # and blocks of a step
SETS = dict(train='peers_train.py', generate='peers_generate.py', data='data_speed.py', profile='profile_step.py')


class Missing(Exception):
    "What a contender needs is not there"


# --- what all of them share -------------------------------------------------------------------------------------------------------------------------------

def shape_of(name):
    "A shape, without dropout, and the blocks of a step"
    fields, blocks = SHAPES[name]
    return model_config(**fields, vocab_size=8000, dropout=0.), blocks


def parser(doc, shapes='small,medium', contenders=None):
    "Flags that the benchmarks have in common"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if shapes: p.add_argument('--shapes', default=shapes, help=f'of {", ".join(SHAPES)} (default: {shapes})')
    if contenders: p.add_argument('--contenders', help=f'of {", ".join(contenders)}; with commas between them (default: all, but two of `train` for medium)')
    p.add_argument('--rounds', type=int, default=5, help='that are measured, after one that is not (default: 5)')
    p.add_argument('--threads', type=int, default=0, help="CPU threads; 0 leaves torch's own number")
    p.add_argument('--cpu', action='store_true', help='count processor time instead of time: for one thread on a machine that others use too')
    p.add_argument('--results', type=Path, help='file of JSON lines that rows are kept in (default: none)')
    p.add_argument('--again', action='store_true', help='measure also what stands in the file')
    return p


def version(package):
    "A package's name and version"
    try: return f'{package} {metadata.version(package)}'
    except metadata.PackageNotFoundError: raise Missing(f'{package} is not installed') from None


def read(path):
    "Rows of a file, none if it is not there"
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if path and Path(path).exists() else []


def key(row): return row['set'], row['shape'], row['contender']


def keep(path, rows):
    "Put rows into a file, in place of those of the same things"
    fresh = {key(r) for r in rows}
    rows = [r for r in read(path) if key(r) not in fresh] + rows
    if path:
        with atomic_file(path, 'w') as f: f.writelines(json.dumps(r) + '\n' for r in rows)


def clock_of(a): return 'processor' if a.cpu else 'wall'


def stands(a, of, shape, contenders):
    "Are these measured already, as now asked for?"
    there = {r['contender']: r for r in read(a.results) if (r['set'], r['shape']) == (of, shape)}
    return not a.again and all('seconds' in (r := there.get(c, {})) and len(r['seconds']) >= a.rounds and (r['threads'], r['clock']) == (torch.get_num_threads(), clock_of(a)) for c in contenders)


def stamp(): return dict(threads=torch.get_num_threads(), machine=machine_line('cpu'), date=time.strftime('%Y-%m-%d'), load=round(os.getloadavg()[0], 1))


def contend(of, shape, makers, rounds, limits, clock='wall'):
    "Rows of what each contender took, round after round, with the machine's limits among them; who cannot is named"
    rows, tasks, facts = [], dict(limits), {}
    for name, make in makers.items():
        begun = time.perf_counter()
        try:
            amount, unit, do, facts[name] = make()
            tasks[name] = amount, unit, do
            facts[name]['first'] = do()
        except (Missing, ImportError) as e:
            rows.append(dict(set=of, shape=shape, contender=name, missing=str(e), **stamp()))
            facts.pop(name, None)
        print(f"{of} {shape}: {name} {'is missing' if name not in tasks else f'ready after {time.perf_counter()-begun:.0f} s'}", file=sys.stderr, flush=True)
    for f in interleaved(tasks, rounds, clock=time.process_time if clock == 'processor' else time.perf_counter):
        rows.append(dict(set=of, shape=shape, contender=f.what, amount=f.amount, unit=f.unit, seconds=[round(s, 6) for s in f.seconds], **facts.get(f.what, {}), clock=clock, **stamp()))
    return rows


# --- the tables -------------------------------------------------------------------------------------------------------------------------------------------

def speeds(row): return [row['amount']/s for s in row['seconds']]


def ratios(one, other):
    "How many times as fast one is as the other, in each round"
    return [a/b for a, b in zip(speeds(one), speeds(other))]


def share(rows, row):
    "Of the limit that holds for it, what a contender reached: the median over the rounds"
    limit = next((r for r in rows if r['contender'] == row.get('limit')), None)
    return None if limit is None else statistics.median(row['work']*x for x in ratios(row, limit))


def spread(xs, form='{:,.0f}'): return f"{form.format(statistics.median(xs))} ({form.format(min(xs))} to {form.format(max(xs))})"


def table(rows, of, shape):
    "One set and shape as Markdown, ours first"
    rows = [r for r in rows if (r['set'], r['shape']) == (of, shape)]
    ours = next((r for r in rows if r['contender'] == 'ours' and 'seconds' in r), None)
    lines = [f"| {shape} | tokens/s, median (slowest to fastest) | ours is so many times as fast | of the limit | parameters |", '|---'*5 + '|']
    for r in sorted((r for r in rows if r.get('unit', 'tokens') == 'tokens'), key=lambda r: (r is not ours, not r['contender'].startswith('ours'))):
        if 'missing' in r: lines.append(f"| {r['contender']} | {r['missing']} | | | |")
        else:
            part = share(rows, r)
            lines.append(f"| {r['contender']} | {spread(speeds(r))} | {spread(ratios(ours, r), '{:.2f}') if ours and r is not ours else ''} | {'' if part is None else f'{part:.0%}'} | {r.get('params', 0)/1e6:.1f} M |")
    return '\n'.join(lines)


def memory_table(rows):
    "Peak memory of each process, and what stood before its model"
    lines = ['| peak memory | shape | before the model, MB | at the peak, MB |', '|---'*4 + '|']
    return '\n'.join(lines + [f"| {r['contender']} | {r['shape']} | {r['before']/1e6:,.0f} | {r['peak']/1e6:,.0f} |" for r in rows if r['set'] == 'memory'])


def tables(rows):
    "All there is"
    for of in ('train', 'generate'):
        for shape in dict.fromkeys(r['shape'] for r in rows if r['set'] == of): yield f'**{of}**\n\n' + table(rows, of, shape)
    if any(r['set'] == 'memory' for r in rows): yield memory_table(rows)
    from data_speed import growth_table, table as data_table
    from profile_step import table as profile_table
    yield from (data_table(rows), growth_table(rows), profile_table(rows))


def main():
    "Run the sets one after the other, then print all tables"
    p = parser(__doc__, shapes=None)
    p.add_argument('--data', type=Path, help='folder that holds wikitext-2/train.txt')
    p.add_argument('--sets', default=','.join(SETS), help=f'of {", ".join(SETS)} (default: all)')
    p.add_argument('--table', action='store_true', help='measure nothing, print what there is')
    p.set_defaults(results=HERE/'speed.jsonl')
    a = p.parse_args()
    for of in [] if a.table else a.sets.split(','):
        more = ['--data', str(a.data)] if of == 'data' and a.data else ['--memory'] if of == 'train' else []
        subprocess.run([sys.executable, HERE/SETS[of], '--rounds', str(a.rounds), '--threads', str(a.threads), '--results', str(a.results), *['--again']*a.again, *['--cpu']*a.cpu, *more], check=True)
    print(*tables(read(a.results)), sep='\n\n')


if __name__ == '__main__': main()
