"Everything about the package is read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
versions = [v for v in ('3.10', '3.11', '3.12', '3.13') if tuple(map(int, v.split('.'))) >= tuple(map(int, cfg['min_python'].split('.')))]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    keywords=cfg['keywords'], license='Apache-2.0', packages=find_packages(include=['continual_llm', 'continual_llm.*']),
    package_dir={'': '.'},  # so that an editable install sees the whole folder: nbdev's documentation asks `tests.reference` about symbols
    classifiers=['Intended Audience :: Developers', 'License :: OSI Approved :: Apache Software License',
                 *[f'Programming Language :: Python :: {v}' for v in versions]],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'hf': cfg['hf_requirements'].split(), 'bench': cfg['bench_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['continual_llm=continual_llm._modidx:d']},
    include_package_data=True, zip_safe=False)
