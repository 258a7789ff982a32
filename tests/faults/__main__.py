"""Faults on purpose, counted: `python -m tests.faults [--only kills,signals,divergence,calls,disk,damage,others] [--scale 1.0] [--minutes N] [--seed 0]`

At scale 1 the counts are those that the project aims for: 1,000 kills, 200 signals, 100 divergences, every call that changes the disk with three errors, 10,000 damaged files. What has not
been reached when the minutes are over is in the column `done`."""
import argparse, sys, tempfile, time
from pathlib import Path
from tests.faults.calls import calls, small_disks
from tests.faults.damage import damages
from tests.faults.divergence import divergence
from tests.faults.kills import kills
from tests.faults.others import others
from tests.faults.runs import command, make_home, table
from tests.faults.server import Server
from tests.faults.signals import signals

COUNTS = dict(kills=1000, signals=200, divergence=100, calls=0, disk=60, damage=10_000, others=17)  # 0 means all there are


def rows(home, only, scale, seed, until):
    "The rows of the table, one after the other"
    def n(what): return max(1, round(COUNTS[what]*scale))
    with Server(home/'log') as server:
        if 'kills' in only: yield from kills(server, home, n('kills'), seed, until=until)
        if 'signals' in only: yield from signals(server, home, n('signals'), seed, until=until)
        if 'divergence' in only: yield from divergence(server, home, n('divergence'), seed, until=until)
        if 'calls' in only: yield from calls(server, home, 0 if scale >= 1 else round(3000*scale), seed, until=until)
        if 'disk' in only: yield small_disks(server, home, n('disk'), seed)
        if 'damage' in only: yield from damages(server, home, n('damage'), seed, until=until)
        if 'others' in only: yield from others(server, home)


def main():
    "Print each row when it is done, then all of them; exit with 1 if anything went wrong"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default=','.join(COUNTS), help='what to try, separated by commas')
    p.add_argument('--scale', type=float, default=1., help='share of the full counts')
    p.add_argument('--minutes', type=float, default=float('inf'), help='begin nothing new after this time')
    p.add_argument('--seed', type=int, default=0, help='another seed tries other moments and places')
    args, done = p.parse_args(), []
    if unknown := set(args.only.split(',')) - set(COUNTS): p.error(f"--only {', '.join(unknown)}: choose from {', '.join(COUNTS)}")
    with tempfile.TemporaryDirectory(prefix='faults-') as folder:
        for row in rows(make_home(Path(folder)), args.only.split(','), args.scale, args.seed, time.monotonic() + 60*args.minutes):
            done.append(row)
            print(f'{row.what}: {row.done} of {row.asked} in {row.seconds:.0f} s, {row.result}', *[f'  {w}' for w in row.wrong[1:]], sep='\n', flush=True)
    print(f'\n{table(done)}')
    sys.exit(any(row.wrong for row in done))


if __name__ == '__main__': main()
