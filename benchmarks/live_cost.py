"""What does watching a run cost?  `python benchmarks/live_cost.py [--steps 600] [--block 15]`

Trains the quick start's model once, in a real notebook kernel with subshells whose messages are read as a front end would, and switches the views every few steps: none, the live display, the live display and the panel.
So each is measured against none within one run, seconds apart. Prints what the steps of each took beside those of none (medians over the rounds, by the clock and by the processor time of the whole kernel), what share of its
time the training thread spent in the views, how many pictures were drawn, and what a sample takes of the time between evaluations."""
import argparse, json, statistics, sys, tempfile, time
from pathlib import Path

ARMS = ('none', 'live', 'live and panel')


class Switch:
    "A view that lets others see a step only while it is their turn, and keeps what each interval between two steps took"
    def __init__(self, live, panel, block):
        self.live, self.arms, self.block, self.steps, self.last, self.drawn = live, dict(zip(ARMS, ((), (live,), (live, panel)))), block, [], None, 0

    def __call__(self, record, history):
        now, busy = time.perf_counter(), time.process_time()
        if record['kind'] != 'step':
            self.last = None  # an interval with an evaluation in it says nothing
            return
        if self.last: self.steps.append((*self.last[:2], now - self.last[2], busy - self.last[3], self.last[4]))
        turn, n = record['step']//self.block, len(ARMS)
        arm = ARMS[(turn + turn//n) % n]  # another one begins each round
        if arm == 'none' and self.last and self.live.begun: self.live.begun += now - self.last[2]  # time in which it may not draw is none that it may draw for
        for view in self.arms[arm]: view(record, history)
        self.last = (turn//n, arm, now, busy, time.perf_counter() - now)


def measure(steps, block):
    "In the kernel: train with switched views; what was seen, as plain values"
    from continual_llm import train
    from continual_llm.monitor import LiveFigure
    from continual_llm.panel import Controls, Panel
    live, panel, samples = LiveFigure(steps, 9), Panel(Controls()), []
    panel.show()
    switch, shown, make_parts = Switch(live, panel, block), live.show, train.make_parts
    def show(data, about):
        switch.drawn += 1
        shown(data, about)
    live.show = show
    def parts(*given, **named):
        from dataclasses import replace
        made = make_parts(*given, **named)
        def sample(*beginning):
            begun = time.perf_counter()
            text = made.sample(*beginning)
            samples.append(time.perf_counter() - begun)
            return text
        return replace(made, sample=sample)
    train._history = lambda job, state, quiet, views, processes: train.History((switch,))
    train.make_parts, train.save_curve = parts, lambda *given: None
    with tempfile.TemporaryDirectory() as folder:
        run = train.quickstart(max_steps=steps, save_dir=folder + '/run', quiet=True)
    evals = run.history.column('eval', 'step')
    passed = [r['seconds'] for r in run.history.rows('step') if r['step'] + 1 == evals[-1]][0]
    return dict(steps=switch.steps, drawn=switch.drawn, samples=samples, seconds=passed)


def in_kernel(steps, block):
    "Start a kernel, run `measure` in it, and read all that it says meanwhile"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name='python3')
    try:
        client.control_channel.send(client.session.msg('create_subshell_request', {}))
        client.control_channel.get_msg(timeout=60)
        code = f"import sys, json\nsys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\nfrom live_cost import measure\nprint('SEEN' + json.dumps(measure({steps}, {block})))"
        said = []
        def hook(m):
            if m['msg_type'] == 'stream' and m['content']['name'] == 'stdout': said.append(m['content']['text'])
            if m['msg_type'] == 'error': print('\n'.join(m['content']['traceback']), file=sys.stderr)
        client.execute_interactive(code, output_hook=hook, timeout=3600)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return json.loads(''.join(said).split('SEEN')[1])


def table(seen):
    "A line for each kind of watching"
    rounds = {}
    for turn, arm, wall, busy, inside in seen['steps']: rounds.setdefault(turn, {}).setdefault(arm, []).append((wall, busy, inside))
    whole = [r for r in rounds.values() if set(r) == set(ARMS)]
    for arm in ARMS:
        took = [[statistics.fmean(x[k] for x in r[arm])/statistics.fmean(x[k] for x in r['none']) for r in whole] for k in (0, 1)]
        mine = [x for r in rounds.values() for x in r.get(arm, ())]
        share = sum(x[2] for x in mine)/sum(x[0] for x in mine)
        yield f"{arm:<16}{len(mine):>6}{1000*statistics.median(x[0] for x in mine):>10.1f}{statistics.median(took[0]):>12.4f}{statistics.median(took[1]):>14.4f}{share:>12.3%}"


def main():
    "Measure, and print the figures"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=600, help='optimizer steps of the run')
    p.add_argument('--block', type=int, default=15, help='steps before the views change')
    args = p.parse_args()
    seen = in_kernel(args.steps, args.block)
    print(f"{'watched by':<16}{'steps':>6}{'ms a step':>10}{'by clock':>12}{'by processor':>14}{'in views':>12}")
    for line in table(seen): print(line)
    print(f"{seen['drawn']} pictures; {len(seen['samples'])} samples of {1000*statistics.median(seen['samples']):.0f} ms, {sum(seen['samples'])/seen['seconds']:.2%} of the run")


if __name__ == '__main__': main()
