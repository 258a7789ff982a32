"""Does a run take what `plan` said?  `python benchmarks/plan_check.py --data FOLDER [--minutes 1.5] [--results FILE] [--table] [--mini]`

FOLDER holds `train.txt` and `valid.txt` of WikiText-2. Each job is planned in a process of its own, then carried out by the planned settings in another one, for as many epochs as fit into the minutes; where a job has a teacher, that is a run of two steps, made before. Kept are the time of its training, the most
memory that the system saw, and what stands in its folder, beside what was foretold. One thread; times are the processor's, which does not count other programs, or those of the clock on the wall, which does. Rows that stand in the results are not made
again; `--mini` does all of it in miniature."""
import argparse, json, os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path
from prepare_memory import peak
from speed import read

JOBS = [dict(config=config, optimizer=optimizer, validation=validation, kilobytes=kilobytes, clock=clock) for config, optimizer, validation, kilobytes, clock in [
    ('tiny', 'adamw', 'split', 2000, 'processor'), ('tiny', 'muon', 'own file', 2000, 'processor'), ('small', 'adamw', 'own file', 500, 'processor'), ('small', 'muon', 'split', 500, 'processor'),
    ('tiny', 'adamw', 'own file', 400, 'processor'), ('tiny', 'adamw', 'split', 400, 'wall'), ('tiny', 'muon', 'own file', 400, 'wall')]]
JOBS += [dict(config=config, optimizer=optimizer, validation=validation, kilobytes=kilobytes, clock='processor', teachers=teachers) for config, optimizer, validation, kilobytes, teachers in [
    ('small', 'adamw', 'split', 500, 1), ('small', 'muon', 'own file', 500, 2), ('tiny', 'adamw', 'own file', 400, 2)]]
MINI = [dict(config='tiny', optimizer='muon', validation='split', kilobytes=30, clock='wall'), dict(config='tiny', optimizer='adamw', validation='split', kilobytes=30, clock='wall', teachers=2)]


CLOCKS = dict(processor=time.process_time, wall=time.perf_counter)


def said(options, minutes, clock):
    "The plan of a job, made here"
    from continual_llm import plan as planning
    planning.measure = partial(planning.measure, clock=CLOCKS[clock])
    p = planning.plan(**options, hours=minutes/60)
    return dict(seconds=p.seconds, memory=p.pace.memory, disk=p.disk, epochs=p.epochs, steps=p.steps, tokens_per_second=p.pace.tokens)


def was(options, found, clock):
    "The same job, carried out here"
    from continual_llm import train
    real, took, now = train.fit, [], CLOCKS[clock]
    def watched(*args):
        begun = now()
        try: return real(*args)
        finally: took.append(now() - begun)
    train.fit = watched
    run = train.pretrain(**options, epochs=found['epochs'], max_steps=found['steps'])
    files = {p.stat().st_ino: p.stat().st_size for p in run.folder.rglob('*.pt')}  # a checkpoint with two names counts once
    return dict(seconds=took[0], memory=peak(),
                disk=sum(files.values()), stopped=run.stopped, steps=run.history.column('step', 'step')[-1] + 1)


def in_another(*words):
    "What a process of its own found"
    done = subprocess.run([sys.executable, __file__, '--one', json.dumps(words)], stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    return json.loads(done.stdout.splitlines()[-1])


def excerpt(source, kilobytes, target):
    "The beginning of a text, whole lines"
    text = source.read_text()[:round(1000*kilobytes)]
    target.write_text(text[:text.rindex('\n') + 1])
    return str(target)


def measure(a, job, work):
    "A row"
    data = excerpt(a.data/'train.txt', job['kilobytes'], work/'train.txt')
    same = dict(data=data, recipe='plain', config=job['config'], optimizer=job['optimizer'], vocab_size=340 if a.mini else 4000, early_stopping_patience=0, device='cpu', cache=str(work/'cache'), save_dir=str(work/'run'))
    if a.mini: same.update(max_seq_len=32)
    if job['validation'] != 'split': same['val_data'] = excerpt(a.data/'valid.txt', job['kilobytes']//10, work/'valid.txt')
    if job.get('teachers'):
        in_another('was', dict(same, save_dir=str(work/'teacher'), quiet=True), dict(epochs=1, steps=2), job['clock'])
        del same['vocab_size']  # the tokenizer is the teacher's
        same['teacher'] = [str(work/'teacher')]*job['teachers']
    plan = in_another('said', dict(same, quiet=True), a.minutes, job['clock'])
    return dict(job, steps=plan['steps'], load=round(os.getloadavg()[0], 1), said=plan, was=in_another('was', dict(same, quiet=True), plan, job['clock']))


def table(rows):
    "One line for each job"
    print('| model | teachers | optimizer | validation | clock | steps | seconds, foretold | measured | ratio | MB, foretold | measured | ratio | disk, ratio |\n' + '|---'*13 + '|')
    for r in rows:
        s, w = r['said'], r['was']
        print(f"| {r['config']} | {r.get('teachers', 0)} | {r['optimizer']} | {r['validation']} | {r['clock']} | {r['steps']} | {s['seconds']:.0f} | {w['seconds']:.0f} | {s['seconds']/max(w['seconds'], .1):.2f} | {s['memory']/1e6:.0f} | {w['memory']/1e6:.0f} | {s['memory']/w['memory']:.2f} | {s['disk']/w['disk']:.2f} |")


def main():
    "Check what is missing, and print one table"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('.'))
    p.add_argument('--minutes', type=float, default=1.5)
    p.add_argument('--results', type=Path, default=Path(__file__).parent/'plan_check.jsonl')
    p.add_argument('--table', action='store_true', help='print what there is, and measure nothing')
    p.add_argument('--mini', action='store_true', help='a job of seconds')
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        what, *given = json.loads(a.one)
        return print(json.dumps(dict(said=said, was=was)[what](*given)))
    rows = read(a.results)
    for job in () if a.table else MINI if a.mini else JOBS:
        if any(all(r.get(k) == v for k, v in dict(job, teachers=job.get('teachers')).items()) for r in rows): continue
        with tempfile.TemporaryDirectory() as work: rows.append(measure(a, job, Path(work)))
        with a.results.open('a') as f: print(json.dumps(rows[-1]), file=f)
    table(rows)


if __name__ == '__main__': main()
