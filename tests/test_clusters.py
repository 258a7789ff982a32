"The scripts on the page about clusters: shell and YAML are parsed, every flag exists, and the one for SLURM runs with stand-ins"
import json, os, re, shlex, subprocess
from pathlib import Path
import pytest
import yaml
from torch.distributed.run import get_args_parser
from continual_llm.cli import parse
from continual_llm.model import PRESETS
from continual_llm.train import pretrain

PAGE = json.loads((Path(__file__).parent.parent/'nbs'/'clusters.ipynb').read_text(encoding='utf-8'))
TEXT = '\n\n'.join(''.join(c['source']) for c in PAGE['cells'] if c['cell_type'] == 'markdown')
SHELL, YAML = [re.findall(rf'^```{kind}\n(.*?)^```$', TEXT, re.M | re.S) for kind in ('bash', 'yaml')]
OBJECTS = [o for text in YAML for o in yaml.safe_load_all(text)]
JOBS = {o['kind']: o for o in OBJECTS if o['kind'] != 'Service'}


def template(kind):
    spec = JOBS[kind]['spec']
    return (spec['pytorchReplicaSpecs']['Worker'] if kind == 'PyTorchJob' else spec)['template']['spec']


def in_shell(script):
    "The words of the torchrun command in a script"
    words = shlex.split(script.replace('\\\n', ' '), comments=True)
    words = words[words.index('torchrun'):]
    return words[:words.index('if')] if 'if' in words else words


def in_pod(kind):
    c, = template(kind)['containers']
    return [*c['command'], *c['args']]


COMMANDS = {**{f'shell {i}': in_shell(s) for i, s in enumerate(SHELL)}, **{kind: in_pod(kind) for kind in JOBS}}


def test_all_are_here(): assert list(COMMANDS) == ['shell 0', 'shell 1', 'shell 2', 'shell 3', 'PyTorchJob', 'Job']


@pytest.mark.parametrize('script', SHELL)
def test_shell_is_parsed(script):
    done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize('words', COMMANDS.values(), ids=COMMANDS)
def test_flags_exist(words):
    "Those of torchrun, and those of the command it starts; and the blocks of a step can be shared"
    assert all(type(w) is str for w in words)
    i = words.index('continual-llm')
    asked = get_args_parser().parse_args([w.replace('$SLURM_NNODES', '2') for w in words[1:i]] + ['continual-llm'])
    assert asked.no_python and asked.training_script == 'continual-llm' and words[i+1] == 'pretrain'
    given = parse('continual-llm pretrain', pretrain, words[i+2:])
    assert given['config'] in PRESETS and given['batch_size']*given['grad_accumulation'] % 16 == 0  # as many processes at most
    if given.get('parallel'): assert given['parallel'] == 'fsdp' and given['resume']


@pytest.mark.parametrize('script', [s for s in SHELL if '--max_restarts' in s])
def test_restarts_meet_in_a_fresh_place(script): assert 'export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1' in script


@pytest.mark.parametrize('kind', JOBS)
def test_pods_have_what_they_name(kind):
    "Volumes, the same store for each generation, machines as many as are waited for, and a name to meet at"
    pod, spec = template(kind), JOBS[kind]['spec']
    c, = pod['containers']
    assert {v['name'] for v in pod['volumes']} == {m['name'] for m in c['volumeMounts']}
    assert dict(name='TORCH_DISABLE_SHARE_RDZV_TCP_STORE', value='1') in c['env'] and c['resources']['limits']['nvidia.com/gpu'] == 8
    places = [m['mountPath'] + '/' for m in c['volumeMounts']]
    for flag in ('--data', '--save_dir', '--cache'): assert any(c['args'][c['args'].index(flag)+1].startswith(p) for p in places)
    if kind == 'PyTorchJob':
        assert c['name'] == 'pytorch' and spec['nprocPerNode'] == '8'
        assert spec['elasticPolicy']['maxReplicas'] == spec['pytorchReplicaSpecs']['Worker']['replicas']
    else:
        service, = [o for o in OBJECTS if o['kind'] == 'Service']
        name = JOBS[kind]['metadata']['name']
        assert pod['subdomain'] == service['metadata']['name'] and service['spec']['selector'] == {'job-name': name} and service['spec']['clusterIP'] == 'None'
        assert c['command'][c['command'].index('--rdzv_endpoint')+1] == f"{name}-0.{pod['subdomain']}:29500"
        assert spec['completions'] == spec['parallelism'] == int(c['command'][c['command'].index('--nnodes')+1])


@pytest.mark.parametrize('status,again', [('max_time', True), ('complete', False)])
def test_slurm_with_stand_ins(tmp_path, status, again):
    "The words that torchrun gets on a machine, and the job put back into the queue if its time was over"
    script, = [s for s in SHELL if '#SBATCH' in s]
    (tmp_path/'bin').mkdir()
    stand_ins = dict(scontrol='echo "scontrol $@" >> log; [ "$1" = show ] && printf "n7\\nn8\\n"; true', srun='printf "%s\\n" "$@" > words')
    for name, body in stand_ins.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path/'bin'/name).chmod(0o755)
    (tmp_path/'run.json').write_text(json.dumps(dict(status=status), indent=2))
    env = dict(PATH=f"{tmp_path/'bin'}:{os.environ['PATH']}", SLURM_JOB_NODELIST='n[7-8]', SLURM_NNODES='2', SLURM_JOB_ID='42')
    subprocess.run(['bash', '-eu'], input=script.replace('run=/shared/runs/large', f'run={tmp_path}'), env=env, cwd=tmp_path, check=True, text=True)
    words = (tmp_path/'words').read_text().splitlines()
    assert words[:3] == ['torchrun', '--nnodes', '2'] and words[words.index('--rdzv_endpoint')+1] == 'n7:29500' and words[words.index('--rdzv_id')+1] == '42'
    assert words[words.index('--save_dir')+1] == str(tmp_path)
    assert ('scontrol requeue 42' in (tmp_path/'log').read_text()) == again
