"""Run timm's own `tests/test_models.py`, unchanged, for the models this package registers.

The tests are not in timm's wheel, so the source distribution of the *installed* version is taken from the package
index, once, into `.timm-tests/` (git-ignored), and only its tests are unpacked: `import timm` stays the installed one.
They run with their own pytest configuration (ours turns warnings into errors), in their own folder, with
`-p sase_blocks`, because timm's tests list the models when they are collected and ours must be registered by then.

    python tests/timm_upstream.py                                  # every model that sase_blocks registers
    python tests/timm_upstream.py resnet50_sase resnet20_cifar     # these alone
    python tests/timm_upstream.py --list                           # print the models, run nothing
    python tests/timm_upstream.py resnet50_sase -- -x -n 2         # arguments after -- go to pytest
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / '.timm-tests'
PLUGIN = 'sase_blocks'


def fetch_tests(timm_version: str, cache: Path = CACHE) -> Path:
    """Return the folder `timm-VERSION` that holds timm's tests, downloading and unpacking it where it is missing."""
    folder = cache / f'timm-{timm_version}'
    if (folder / 'tests' / 'test_models.py').is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm']
        subprocess.run([*pip, '--dest', scratch, f'timm=={timm_version}'], check=True)
        (archive,) = Path(scratch).glob('timm-*.tar.gz')
        with tarfile.open(archive) as tar:
            wanted = [
                member
                for member in tar.getmembers()
                if (member.isfile() or member.isdir())
                and member.name.split('/')[1:2] in (['tests'], ['pyproject.toml'])
            ]
            tar.extractall(Path(scratch) / 'unpacked', members=wanted, filter='data')
        # A rename is atomic, so a download that was interrupted leaves no half-unpacked tests behind.
        (Path(scratch) / 'unpacked' / folder.name).rename(folder)
    return folder


def registered_models(plugin: str = PLUGIN) -> list[str]:
    """Return the names of the timm models that importing `plugin` registers."""
    import timm

    before = set(timm.list_models())
    __import__(plugin)
    return sorted(set(timm.list_models()) - before)


def test_ids(folder: Path, models: list[str], plugin: str | None) -> list[str]:
    """Return timm's test ids for exactly `models`; pytest's `-k` takes every name that contains one of them, too."""
    command = [*pytest_command(plugin), '--collect-only', '-q', 'tests/test_models.py']
    collected = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if collected.returncode:
        sys.exit(f'timm_upstream: pytest could not collect the tests of timm:\n{collected.stdout}{collected.stderr}')
    wanted = set(models)
    # An id is file.py::test_name[batch-model]; model names hold no hyphen.
    ids = [line for line in collected.stdout.splitlines() if line.endswith(']')]
    chosen = [i for i in ids if wanted & set(i[:-1].split('[', 1)[1].split('-'))]
    tested = {part for i in chosen for part in i[:-1].split('[', 1)[1].split('-')}
    if missing := sorted(wanted - tested):
        sys.exit(f'timm_upstream: timm has no test for {", ".join(missing)}; is it registered? Try --list.')
    return chosen


def pytest_command(plugin: str | None) -> list[str]:
    """Return the start of the pytest command line, the same for collecting and for running."""
    # timm marks its tests with pytest-timeout's mark, which is unknown, and harmless, without that plug-in.
    quiet = ['-W', 'ignore::pytest.PytestUnknownMarkWarning']
    return [sys.executable, '-m', 'pytest', *quiet, *(['-p', plugin] if plugin else [])]


def environment() -> dict[str, str]:
    """Return the environment for pytest without options meant for our own tests."""
    return {key: value for key, value in os.environ.items() if key != 'PYTEST_ADDOPTS'}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return pytest's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    argv, extra = (argv[: argv.index('--')], argv[argv.index('--') + 1 :]) if '--' in argv else (argv, [])
    parser = argparse.ArgumentParser(description='Run the tests of the installed timm for the models of sase_blocks.')
    parser.add_argument('models', nargs='*', help='model names (default: all that sase_blocks registers)')
    parser.add_argument('--list', action='store_true', help='print the registered models and stop')
    parser.add_argument(
        '--plain', action='store_true', help='do not import sase_blocks (to test a model of timm itself)'
    )
    arguments = parser.parse_args(argv)
    models = arguments.models or registered_models()
    if arguments.list:
        print('\n'.join(models))
        return 0
    plugin = None if arguments.plain else PLUGIN
    folder = fetch_tests(version('timm'))
    ids = test_ids(folder, models, plugin)
    print(f'timm {version("timm")}: {len(ids)} tests for {len(models)} models: {" ".join(models)}', flush=True)
    # The summary line of pytest stays the last line; -q keeps the list of warnings of other libraries short.
    command = [*pytest_command(plugin), '-q', '--disable-warnings', '--durations=5', *extra, *ids]
    return subprocess.run(command, cwd=folder, env=environment(), check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
