"A process with torch imported that forks a child for each command, so that a kill costs little"
import contextlib, importlib, json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


# --- the child -----------------------------------------------------------------------------------------------------------------------------------------

def tell(**message): os.write(REPORT, (json.dumps(message) + '\n').encode())


def phases():
    "Tell of each phase as it is entered: where, and how"
    from continual_llm import data, loop, source, split, tokenizer, train
    from continual_llm.checkpoint import ResumeStates
    return dict(reading=(source, '_check'), tokenizer=(tokenizer, '_train'), tokenizing=(data, '_tokenized'), beginning=(train.Job, 'begin'), training=(loop, 'take_step'),
                evaluating=(train, 'score_tokens'), saving=(ResumeStates, '_save'), finishing=(train, 'save_curve'))


@contextlib.contextmanager
def told_phases(names, wait):
    "Report when one of these phases begins"
    with contextlib.ExitStack() as stack:
        for name in names:
            where, what = phases()[name]
            real = getattr(where, what)
            def told(*a, _real=real, _name=name, **kw):
                tell(phase=_name)
                if wait: sys.stdin.readline()
                return _real(*a, **kw)
            stack.enter_context(patch.object(where, what, told))
        yield


@contextlib.contextmanager
def traced(path):
    "Write down which places of the text are targets of each step; see `kills.missed`"
    import numpy as np
    from continual_llm import train
    real_open, Batches = open, train.Batches
    class Traced(Batches):
        def __init__(self, ids, *a, **kw):
            super().__init__(ids, *a, **kw)
            self.places = Batches(np.arange(len(ids)), *a, **kw)
        def __call__(self, step):
            places = [y.flatten().tolist() for _, y in self.places(step)]
            assert all((np.asarray(self.ids)[p] == y.flatten().numpy()).all() for p, (_, y) in zip(places, super().__call__(step)))
            with real_open(path, 'a') as f: f.write(json.dumps([os.getpgid(0), os.getpid(), step, len(self.ids), self.steps_per_epoch, places]) + '\n')
            return super().__call__(step)
    with patch.object(train, 'Batches', Traced): yield


@contextlib.contextmanager
def layered(k, error=None, forever=False, after=False, saves_only=False):
    "At the k-th call that changes the disk: an error, or death"
    from continual_llm.checkpoint import Checkpoints
    from tests.faults.layer import ERRORS, Layer, dying, failing
    layer = Layer(failing(ERRORS[error]) if error else dying(after), k, forever, on=not saves_only)
    with contextlib.ExitStack() as stack:
        for name in ('_save', 'link'):
            def inside(*a, _real=getattr(Checkpoints, name), **kw):
                layer.on = True
                try: path = _real(*a, **kw)
                finally: layer.on = not saves_only
                if path.parent.name == 'last': tell(saved=path.stem)
                return path
            stack.enter_context(patch.object(Checkpoints, name, inside))
        with layer.in_place():
            try: yield
            finally: tell(calls=layer.n, hits=layer.hits)


@contextlib.contextmanager
def backward_clock():
    "Each look at the clock is an hour before the one before; the monotonic clock is as it was"
    now = [time.time()]
    def earlier():
        now[0] -= 3600
        return now[0]
    with patch('time.time', earlier): yield


def several(world):
    "Become that many processes, which see what `torchrun` would tell them; what the first does at its end"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), RANK='0', LOCAL_RANK='0')
    others = []
    for rank in range(1, world):
        others.append(os.fork())
        if not others[-1]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return lambda: None
    return lambda: [os.waitpid(pid, 0) for pid in others]


def child(argv, log, trace=None, layer=None, told=(), wait=False, clock=False, learned=None, world=1, fault=None):
    "Run the console command; never returns"
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    from continual_llm.cli import main
    from tests.faults.divergence import spoilt
    with contextlib.ExitStack() as stack:
        if world > 1: stack.callback(several(world))
        if trace: stack.enter_context(traced(trace))
        stack.enter_context(told_phases(told, wait))
        if learned: stack.enter_context(patch('continual_llm.tokenizer._train', lambda chunks, options: Path(learned).read_bytes()))  # learning itself writes nothing
        if clock: stack.enter_context(backward_clock())
        if fault: stack.enter_context(spoilt(**fault))
        if layer: stack.enter_context(layered(**layer))
        main([str(a) for a in argv])


def serve():
    "Fork a child for each line, and tell how it ended"
    import torch
    from continual_llm import cli, evaluate, generate, nest, train  # all that a child needs
    for name in nest.EARLY: importlib.import_module(name)
    torch.set_num_threads(1)
    tell(ready=True)
    for line in sys.stdin:
        if line == 'go\n': continue  # one too many for the child before
        job = json.loads(line)
        if (pid := os.fork()) == 0:
            code = 70
            try: child(**job)
            except SystemExit as e: code = e.code
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        tell(pid=pid)
        _, status = os.waitpid(pid, 0)
        if job.get('world', 1) > 1:
            with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)  # as `torchrun` ends all when one has died
        tell(code=os.waitstatus_to_exitcode(status))


# --- the parent ----------------------------------------------------------------------------------------------------------------------------------------

class Server:
    "The parent's side: one child at a time"
    def __init__(self, log, wrap=()):
        env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
        self.log, self.messages, self.pid = Path(log), [], None
        self.process = subprocess.Popen([*wrap, sys.executable, '-m', 'tests.faults.server'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env, cwd=ROOT)
        assert 'ready' in self.read()

    def read(self):
        "The next message"
        line = self.process.stdout.readline()
        if not line: raise RuntimeError(f'the fork server died ({self.process.wait()})')
        self.messages.append(json.loads(line))
        return self.messages[-1]

    def start(self, argv, **more):
        "Start a command; its process id"
        self.messages.clear()
        self.log.write_text('')
        self.process.stdin.write(json.dumps(dict(argv=[str(a) for a in argv], log=str(self.log), **more)) + '\n')
        self.pid = self.read()['pid']
        return self.pid

    def send(self, number, all=False):
        "Send the child, or all its processes, a signal, if it is still there"
        with contextlib.suppress(ProcessLookupError): (os.killpg if all else os.kill)(self.pid, number)

    def hold(self, argv, phase, nth, **more):
        "Start a command and let it go on to the n-th beginning of a phase, where it waits for `let`"
        self.start(argv, told=[phase], wait=True, **more)
        self.let(nth-1)
        if not self.until(phase, nth): raise RuntimeError(f'{phase} {nth} did not come: {self.lines()[-1:]}')
        return self.pid

    def let(self, n=99): self.process.stdin.write('go\n'*n)

    def until(self, phase, nth=1):
        "Wait for the n-th beginning of a phase; whether it came"
        while 'code' not in (m := self.read()):
            nth -= m.get('phase') == phase
            if nth == 0: return True
        return False

    def wait(self):
        "The exit code: of a signal, its number below zero"
        while 'code' not in self.messages[-1]: self.read()
        return self.messages[-1]['code']

    def run(self, argv, **more):
        "Start a command and wait for its end"
        self.start(argv, **more)
        return self.wait()

    def told(self, key): return [m[key] for m in self.messages if key in m]

    def lines(self): return self.log.read_text(errors='replace').splitlines()

    def orphans(self):
        "Processes of the child's session that outlive it by more than a moment"
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try: os.killpg(self.pid, 0)
            except ProcessLookupError: return False
            time.sleep(.01)
        return True

    def __enter__(self): return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


if __name__ == '__main__':
    REPORT = os.dup(1)
    serve()
