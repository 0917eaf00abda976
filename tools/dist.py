"""One version: in settings.ini, in the package, and in the tag of a release.

    python tools/dist.py [v0.1.0]    exit code 1 where they differ
"""
import re, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def versions(tag=None):
    "Where a version is said, and which"
    settings = ConfigParser(delimiters=['='])
    settings.read(root/'settings.ini', encoding='utf-8')
    said = {'settings.ini': settings['DEFAULT']['version']}
    said['relvit/__init__.py'] = re.search(r'^__version__ = "(.+)"$', (root/'relvit/__init__.py').read_text(), re.M)[1]
    return said | ({'the tag': tag.removeprefix('v')} if tag else {})


if __name__ == '__main__':
    said = versions(*sys.argv[1:])
    if len(set(said.values())) > 1: sys.exit('versions differ: ' + ', '.join(f'{where} says {v}' for where, v in said.items()))
    print(*set(said.values()))
