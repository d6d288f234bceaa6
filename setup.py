"Everything about the package is in settings.ini; this reads it."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).with_name('settings.ini'), encoding='utf8')
cfg, lib = ini['DEFAULT'], ini['DEFAULT']['lib_name']
extras = {name: shlex.split(cfg[f'{name}_requirements']) for name in ('das', 'dev')}
extras['dev'] += extras['das']               # who develops tests everything
readme = Path(__file__).with_name('README.md')

setup(
    name=lib, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=False, package_data={lib: shlex.split(cfg['package_data'])},
    classifiers=[f"Development Status :: {cfg['status']} - Alpha", 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3'],
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
    zip_safe=False,
)
