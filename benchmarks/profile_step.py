"""Where does the time of a training step go?  `python benchmarks/profile_step.py [--shapes small,medium] [--rounds 3] [--threads 1]`

Steps as `pretrain` takes them by default are watched by torch.profiler, on the CPU. Each operation counts with its own time alone, without that of the operations that it calls, and belongs to one group: products of
matrices; attention (its scores, weights and sums), forward and backward; what is done number by number, norms and sums included; copies, changes of precision among them; the optimizer; all else, such as Python."""
import statistics
import torch
from speed import keep, parser, read, shape_of, stamp, stands, version
from continual_llm.bench import precisions, train_task

GROUPS = {  # words in an operation's name; the first group that has one of them takes it
    'attention backward': ['scaled_dot_product_flash_attention_for_cpu_backward', 'ScaledDotProductFlashAttentionForCpuBackward', 'attention_backward'],
    'attention forward': ['scaled_dot_product'],
    'optimizer': ['adamw', 'AdamW', 'Muon', 'Optimizer'],
    'products': ['aten::mm', 'aten::bmm', 'aten::addmm', 'aten::baddbmm', 'aten::linear', 'aten::matmul', 'mkldnn', 'onednn', 'MmBackward'],
    'copies': ['aten::copy_', 'aten::_to_copy', 'aten::clone', 'aten::contiguous', 'aten::cat', 'aten::fill_', 'aten::zero_', 'aten::index_select', 'aten::roll', 'ToCopyBackward'],
    'number by number': ['aten::mul', 'aten::add', 'aten::sub', 'aten::div', 'aten::rsub', 'aten::silu', 'aten::sigmoid', 'aten::exp', 'aten::sum', 'aten::mean', 'aten::pow', 'aten::rsqrt', 'aten::sqrt', 'aten::neg',
                         'aten::linalg_vec', 'softmax', 'logsumexp', 'aten::max', 'aten::amax', 'aten::clamp', 'aten::gather', 'aten::scatter', 'aten::index_', 'aten::masked', 'aten::where', 'embedding',
                         '_Normed', '_Gated', 'Nats', 'aten::norm', 'aten::lerp', 'aten::reciprocal', 'aten::nll']}
OTHER = 'other'
ORDER = 'products', 'attention forward', 'attention backward', 'number by number', 'copies', 'optimizer', OTHER


def group(name):
    "The group of an operation"
    return next((g for g, words in GROUPS.items() if any(w in name for w in words)), OTHER)


def profiled(step):
    "Seconds of each group in one step"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: step()
    found = dict.fromkeys(ORDER, 0.)
    for e in p.key_averages(): found[group(e.key)] += e.self_cpu_time_total/1e6
    return found


def measure(shape, rounds):
    "A row for each group"
    model, blocks = shape_of(shape)
    precision = list(precisions('cpu'))[-1]
    amount, _, step = train_task(model, blocks, model.max_seq_len, precision, 'adamw', 'cpu')
    for _ in range(2): step()
    found = [profiled(step) for _ in range(rounds)]
    return [dict(set='profile', shape=shape, contender=g, amount=amount, unit='tokens', seconds=[round(f[g], 6) for f in found], precision=precision, library=version('torch'), clock='wall', **stamp()) for g in ORDER]


def shares(rows, shape):
    "Of a step's time, the part of each group: the median over the rounds"
    rows = [r for r in rows if (r['set'], r['shape']) == ('profile', shape)]
    totals = [sum(ss) for ss in zip(*[r['seconds'] for r in rows])]
    return {r['contender']: statistics.median(s/t for s, t in zip(r['seconds'], totals)) for r in rows}


def table(rows):
    "Groups as rows, shapes as columns"
    found = {shape: shares(rows, shape) for shape in dict.fromkeys(r['shape'] for r in rows if r['set'] == 'profile')}
    lines = ['| share of a step | ' + ' | '.join(found) + ' |', '|---'*(1 + len(found)) + '|']
    return '\n'.join(lines + [f"| {g} | " + ' | '.join(f'{f[g]:.1%}' for f in found.values()) + ' |' for g in ORDER])


def main():
    "Measure and print one table"
    p = parser(__doc__)
    p.set_defaults(rounds=3)
    a = p.parse_args()
    a.cpu = False  # the profiler has its own clock
    if a.threads: torch.set_num_threads(a.threads)
    found = []
    for shape in a.shapes.split(','):
        if stands(a, 'profile', shape, ORDER): continue
        rows = measure(shape, a.rounds)
        keep(a.results, rows)
        found += rows
    print(f"{stamp()['machine']}\n\n{table(read(a.results) or found)}")


if __name__ == '__main__': main()
