"Everything about the package is said once, in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['relvit', 'relvit.*']), python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require={k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].splitlines(), 'nbdev': ['relvit=relvit._modidx:d']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: 3.{v}' for v in range(10, 14))],
    zip_safe=False)
