"A layer between our writer and the system: it counts the calls that change a disk, and acts on a chosen one"
import builtins, contextlib, errno, io, os, signal
from unittest.mock import patch

CALLS = ('open', 'fsync', 'replace', 'rename', 'mkdir', 'link')  # of `os`; writing and opening for writing are counted besides
ERRORS = dict(ENOSPC=errno.ENOSPC, EIO=errno.EIO, EROFS=errno.EROFS)


class Layer:
    "Counts calls while it is switched on; `act(kind, call)` takes the place of the k-th"
    def __init__(self, act, k, forever=False, on=True): self.act, self.k, self.forever, self.on, self.n, self.hits = act, k, forever, on, 0, []

    def __call__(self, kind, call, half=None, reads=False):
        "Make a call, or what takes its place; `half` makes half of it; what only reads, such as clearing up does, is let through after the k-th"
        if not self.on: return call()
        self.n += 1
        if self.n == self.k or self.forever and self.n > self.k and not reads:
            self.hits.append(kind)
            return self.act(kind, call, half)
        return call()

    @contextlib.contextmanager
    def in_place(self):
        "Put the layer under everything that this process writes"
        real_open, layer = builtins.open, self

        class File(io.FileIO):
            "The system's side of a buffered file"
            def write(self, data):
                write, data = super().write, bytes(data)
                return layer('write', lambda: write(data), lambda: write(data[:(len(data)+1)//2]))

        def opened(file, mode='r', buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if not set(mode) & set('wax+'): return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = layer('open to write', lambda: File(file, mode.replace('b', '').replace('t', ''), closefd, opener))
            file = raw if buffering == 0 else io.BufferedRandom(raw) if '+' in mode else io.BufferedWriter(raw)
            return file if 'b' in mode else io.TextIOWrapper(file, encoding or 'utf-8', errors, newline)

        def counted(name):
            real = getattr(os, name)
            return lambda *a, **kw: layer(name, lambda: real(*a, **kw), reads=name == 'open' and not a[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

        with contextlib.ExitStack() as stack:
            for name in CALLS: stack.enter_context(patch.object(os, name, counted(name)))
            for where in (builtins, io): stack.enter_context(patch.object(where, 'open', opened))
            yield self


def failing(code):
    "Half of a write and then an error; of any other call, the error"
    def act(kind, call, half):
        if half is not None: half()
        raise OSError(code, os.strerror(code))
    return act


def dying(after):
    "SIGKILL in the middle of a write; before any other call, or `after` it"
    def act(kind, call, half):
        if half is not None: half()
        elif after: call()
        os.kill(os.getpid(), signal.SIGKILL)
    return act
