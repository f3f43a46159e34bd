"""Evolution: better than random, scores each network once, keeps the limits; kills and order change nothing."""

import itertools
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest

from sase_blocks.jobs import each_in_turn
from sase_blocks.search import evolution
from sase_blocks.search.evolution import Candidate, Problem, _Search, best, evolve, front

GENES = {f'gene{i}': ['a', 'b', 'c'] for i in range(12)}
ONE = np.random.default_rng(5).normal(size=(12, 3))
PAIR = np.random.default_rng(6).normal(size=(12, 3, 3))  # of a gene and the next, in a ring
OPTIMUM = 11.168990175940333  # of all 3^12 at a cost of at most 14
LIMIT = 14


def digits(text):
    return ['abc'.index(letter) for letter in text]


def value(text):
    found = digits(text)
    return sum(float(ONE[i, a] + PAIR[i, a, found[(i + 1) % len(found)]]) for i, a in enumerate(found))


def letters(rng):
    return {name: str(rng.choice(choices)) for name, choices in GENES.items()}


def toy(scored=None, score=value, genes=GENES, **changes):
    """A network is a word; each letter costs 0, 1 or 2. ``scored`` collects the words that are scored."""

    def noted(text):
        if scored is not None:
            scored.append(text)
        return score(text)

    functions = {
        'decode': lambda genome: ''.join(genome[name] for name in genes),
        'fits': lambda text: sum(digits(text)) <= LIMIT,
        'cost': lambda text: sum(digits(text)),
        'draw': lambda rng: {name: str(rng.choice(choices)) for name, choices in genes.items()},
    }
    return Problem(genes, score=noted, **{**functions, **changes})


def genome(text):
    return dict(zip(GENES, text, strict=True))


PURE = ['a' * 12, 'b' * 12, 'ab' * 6]


def run(problem, path, evaluations=20, population=5, **more):
    return evolve(problem, path, evaluations=evaluations, population=population, **{'say': [].append, **more})


# ---- what is found ----


@pytest.mark.slow
def test_evolution_beats_random_search(tmp_path):
    """80 of 531441 networks. Over 3 seeds evolution finds 8.3 to 9.5, random search 4.4 to 6.3; the best has 11.17."""
    found = {}
    for algorithm, seed in itertools.product(('nsga2', 'random'), range(3)):
        scored = []
        path = tmp_path / f'{algorithm}{seed}'
        result = run(toy(scored), path, 80, 10, algorithm=algorithm, seed=seed)
        assert sorted(scored) == sorted({one.text for one in result})  # each once
        assert len(result) == 80
        assert max(one.cost for one in result) <= LIMIT
        assert all((one.score, one.cost) == (value(one.text), sum(digits(one.text))) for one in result)
        assert all(''.join(one.genome.values()) == one.text for one in result)
        found.setdefault(algorithm, []).append(best(result).score)
    assert max(found['nsga2']) <= OPTIMUM
    assert min(found['nsga2']) > max(found['random']) + 1.5
    assert np.mean(found['nsga2']) > np.mean(found['random']) + 3


def test_parents_are_the_best_of_all_generations(tmp_path):
    path = tmp_path / 'search.jsonl'
    found = run(toy(), path, 36, 6)
    search = _Search(toy(), evolution.load_optuna(), path, 50, 6, 0, 100, [])
    search.open(json.loads(path.read_text().splitlines()[0])['settings'])
    search.propose()
    for generation in range(1, 7):
        parents = [trial.number for trial in search.parents[generation]]
        assert len(parents) == len(set(parents)) == 6
        older = found[: 6 * generation]
        highest = max(older, key=lambda one: one.score)
        cheapest = min(older, key=lambda one: (one.cost, -one.score))
        assert {highest.number, cheapest.number} <= set(parents)


@pytest.mark.parametrize('algorithm', ['nsga2', 'random'])
def test_seeds_come_first_and_lines_are_said(tmp_path, algorithm):
    scored, lines = [], []
    path, seeds = tmp_path / 'new folder {#?}' / 'search.jsonl', [genome(text) for text in [*PURE, PURE[0]]]
    run(toy(scored), path, 10, seeds=seeds, algorithm=algorithm, say=lines.append)
    assert scored[:3] == PURE
    assert len(scored) == len(set(scored)) == 10
    top = max(scored, key=value)
    assert lines[-1] == f'10 of 10 evaluated, best score {value(top):.6g} at cost {sum(digits(top))}'
    assert [line.split()[0] for line in lines] == [str(n) for n in range(1, 11)]
    # Again: nothing to do. With more evaluations it continues, and does not score the seeds again.
    first = run(toy(scored), path, 10, seeds=seeds, algorithm=algorithm)
    more = run(toy(scored), path, 12, seeds=seeds, algorithm=algorithm)
    assert more[:10] == first
    assert len(scored) == len(set(scored)) == 12


def test_genes_of_no_effect_cost_no_evaluations(tmp_path):
    """The first gene is the number of letters that count: 2 + 4 + 8 networks in 3 * 2^11 genomes."""
    genes = {name: ['a', 'b', 'c'] if name == 'gene0' else ['a', 'b'] for name in GENES}

    def decode(genome):
        first, *rest = genome.values()
        return ''.join(rest[: 1 + 'abc'.index(first)])

    scored = []
    result = run(toy(scored, len, genes, decode=decode), tmp_path / 'search', 14)
    assert len(scored) == len({one.text for one in result}) == 14
    assert Counter(map(len, scored)) == {1: 2, 2: 4, 3: 8}


def test_front_and_best():
    def make(text, score, cost):
        return Candidate(text, score, cost, {}, 0)

    assert front([]) == []
    with pytest.raises(ValueError, match='no candidates'):
        best([])
    cases = [make('g', 1, 1), make('f', 2, 3), make('d', 2, 2), make('c', 2, 2), make('b', 3, 9), make('a', 3, 8)]
    for order in itertools.permutations(cases):
        assert [one.text for one in front(order)] == ['g', 'c', 'd', 'a']
        assert best(order).text == 'a'
    # By definition, on many ties.
    rng = np.random.default_rng(0)
    for _ in range(20):
        some = [make(str(i), *map(float, rng.integers(0, 6, 2))) for i in range(25)]
        beaten = {
            a.text for a in some for b in some
            if b.score >= a.score and b.cost <= a.cost and (b.score, b.cost) != (a.score, a.cost)
        }  # fmt: skip
        assert {one.text for one in front(some)} == {one.text for one in some} - beaten


# ---- nothing new ----


@pytest.mark.parametrize('algorithm', ['nsga2', 'random'])
def test_limits_that_nothing_meets(tmp_path, algorithm):
    scored, lines = [], []
    with pytest.raises(
        ValueError, match=r'nothing was found: of 70 networks drawn 70 were over the limits and 0 known'
    ):
        run(toy(scored, fits=lambda text: False), tmp_path / 'search', tries=70, algorithm=algorithm)
    # If only a seed fits, it is found.
    only = toy(scored, fits=lambda text: text == PURE[0])
    path = tmp_path / 'one'
    result = run(only, path, tries=70, algorithm=algorithm, seeds=[genome(PURE[0])], say=lines.append)
    assert scored == [one.text for one in result] == [PURE[0]]
    assert re.match(r'the search ends after 1 of 20 evaluations: of 70 networks drawn 70 were over', lines[-1])
    assert len(path.read_text().splitlines()) == 3  # settings, drawn, scored


@pytest.mark.parametrize('algorithm', ['nsga2', 'random'])
def test_a_space_that_is_used_up(tmp_path, algorithm):
    lines = []
    small = toy(genes={'x': ['a', 'b', 'c'], 'y': ['a', 'b']}, fits=lambda text: text != 'cb')
    result = run(small, tmp_path / 'search', population=2, algorithm=algorithm, tries=200, say=lines.append)
    assert sorted(one.text for one in result) == ['aa', 'ab', 'ba', 'bb', 'ca']
    drawn = 400 if algorithm == 'nsga2' else 200
    assert f'ends after 5 of 20 evaluations: of {drawn} networks drawn' in lines[-1]


# ---- what fails ----


def test_failing_candidates_do_not_count(tmp_path):
    lines, scored = [], []

    def score(text):
        if len(scored) % 4 == 1:
            return float('nan')
        if len(scored) % 4 == 2:
            raise OSError('no\nimages')
        return value(text)

    result = run(toy(scored, score), tmp_path / 'search', algorithm='random', say=lines.append)
    assert len(result) == 20
    failed = [text for number, text in enumerate(scored, start=1) if number % 4 in (1, 2)]
    assert [one.text for one in result] == [text for text in scored if text not in failed]
    assert len(scored) == len(set(scored)) == 20 + len(failed)
    said = [line for line in lines if 'failed' in line]
    for text, line, what in zip(
        failed, said, itertools.cycle(['ValueError: the score is nan', 'OSError: no images']), strict=False
    ):
        assert re.fullmatch(rf'network \d+ failed: {what} \({text}\)', line)
    assert len(said) == len(failed)


def test_three_failures_in_a_row_stop_the_search_and_are_tried_again(tmp_path):
    broken, scored = [True], []

    def score(text):
        if broken[0] and len(scored) in (3, 5, 6, 7):  # two apart, then three in a row
            raise OSError('the disk is gone')
        return value(text)

    path = tmp_path / 'search'
    with pytest.raises(
        RuntimeError, match=r'3 candidates in a row failed, the last one, [abc]{12}: OSError: the disk is'
    ):
        run(toy(scored, score), path)
    assert len(scored) == 7
    broken[0] = False
    assert len(run(toy(scored, score), path)) == 20
    assert scored[7:10] == scored[4:7]
    assert Counter(scored).most_common(4)[3][1] == 1


# ---- death and order ----


class Killed(BaseException):
    pass


def test_dying_anywhere_changes_nothing(tmp_path, monkeypatch):
    """After a kill before or within any line, the next call ends with the same file."""
    seeds = [genome(text) for text in PURE[:2]]
    append, calls = evolution.append_row, itertools.count()
    last = None

    def dying(path, row):
        if next(calls) == last:
            with path.open('a') as file:
                file.write(json.dumps(row)[: 17 * (last % 2)])
            raise Killed
        append(path, row)

    def attempt(path, **more):
        scored = []
        run(toy(scored), path, 8, 3, seeds=seeds, **more)
        return scored

    monkeypatch.setattr(evolution, 'append_row', dying)
    unbroken = tmp_path / 'unbroken'
    attempt(unbroken)
    total = next(calls)
    assert total == 16
    for point in range(total):
        path = tmp_path / f'{point}'
        calls, last = itertools.count(), point
        with pytest.raises(Killed):
            attempt(path)
        last = None
        # A kill between a score and its line loses one score.
        before = sum('"score"' in line for line in unbroken.read_text().splitlines()[1 : point + 1])
        assert len(attempt(path)) == 8 - before, point
        assert sorted(path.read_text().splitlines()) == sorted(unbroken.read_text().splitlines()), point


@pytest.mark.parametrize('algorithm', ['nsga2', 'random'])
def test_the_order_in_which_networks_are_scored_changes_nothing(tmp_path, algorithm):
    """As with many workers. A search may also be split into several calls."""
    rng = np.random.default_rng(0)

    def shuffled(function, arguments):
        for number in rng.permutation(len(arguments)):
            for _, ended in each_in_turn(function, [arguments[number]]):
                yield int(number), ended

    in_order = run(toy(), tmp_path / 'in order', 14, 4, algorithm=algorithm)
    assert run(toy(), tmp_path / 'shuffled', 14, 4, algorithm=algorithm, each=shuffled) == in_order
    for evaluations in (6, 7, 13, 14):
        cut = run(toy(), tmp_path / 'cut', evaluations, 4, algorithm=algorithm, each=shuffled)
        assert cut == in_order[:evaluations]


def test_what_stops_the_search_leaves_its_network_to_the_next(tmp_path):
    def stop(text):
        if len(scored) == 7:
            raise KeyboardInterrupt
        return value(text)

    path, scored, rest = tmp_path / 'search', [], []
    with pytest.raises(KeyboardInterrupt):
        run(toy(scored, stop), path)
    run(toy(rest), path)
    assert rest[0] == scored[6]
    assert len(rest) == 14
    assert run(toy(), tmp_path / 'other') == run(toy(), path)


# ---- refusals ----


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'evaluations': 0}, 'evaluations: expected at least 1, got 0'),
        ({'population': 1}, 'population: expected at least 2, got 1'),
        ({'population': 20}, '20 evaluations end before a first generation of 20 has children'),
        ({'seed': -1}, 'seed: expected at least 0, got -1'),
        ({'tries': 0}, 'tries: expected at least 1, got 0'),
        ({'algorithm': 'tpe'}, "algorithm: expected nsga2 or random, got 'tpe'"),
        ({'problem': toy(genes={})}, 'no genes'),
        ({'problem': toy(genes={'x': 'abc'})}, "gene x: expected a list of texts to choose from, got 'abc'"),
        ({'problem': toy(genes={'x': []})}, 'gene x: expected a list'),
        ({'problem': toy(genes={'x': ['a', 1]})}, 'gene x: expected a list'),
        ({'problem': toy(genes={'x': ['a', 'a']})}, 'gene x: a choice is repeated'),
        ({'seeds': [{'gene0': 'a'}]}, 'a seed and the search differ in these genes: gene1, gene10'),
        ({'seeds': [genome('d' * 12)]}, "a seed: gene gene0 is 'd', expected one of a, b, c"),
        ({'seeds': [genome('c' * 12)]}, 'a seed is over the limits: cccccccccccc'),
        ({'settings': {'seed': 7}}, 'settings: seed is 7, but the search is called with 0'),
        ({'problem': toy(draw=lambda rng: {'other': 'a'})}, 'what was drawn and the search differ .* gene9, other'),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        run(**{'problem': toy(), 'path': tmp_path / 'search', **changes})
    if 'drawn' not in says:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'settings': {'limit': 15}}, 'made with other settings: limit was 14 and is 15; set them back'),
        ({'settings': {}}, 'limit was 14 and is None'),
        ({'algorithm': 'random'}, "algorithm was 'nsga2' and is 'random'"),
        ({'population': 4}, 'population was 5 and is 4'),
        ({'seed': 1}, 'seed was 0 and is 1'),
        ({'seeds': [genome(PURE[0])]}, r'seeds was \[\] and is \[.aaaaaaaaaaaa.\]'),
        ({'problem': toy(genes={**GENES, 'gene3': ['a', 'b']})}, r'settings: gene gene3 was \[.*c.\] and is \[.*b.\]'),
    ],
)
def test_a_file_made_for_something_else_is_refused(tmp_path, changes, says):
    path, settings = tmp_path / 'search', {'limit': 14}
    first = run(toy(), path, 6, settings=settings)
    with pytest.raises(ValueError, match=says):
        run(**{'problem': toy(), 'path': path, 'evaluations': 6, 'settings': settings, **changes})
    assert run(toy(), path, 6, settings=settings) == first


@pytest.mark.parametrize(
    ('harm', 'says'),
    [
        (lambda lines: ['no JSON', *lines[1:]], r'is damaged \(JSONDecodeError\); delete it'),
        (lambda lines: lines[1:], r'is damaged \(KeyError\); delete it'),
        (
            lambda lines: [lines[0], *lines[2:]],
            r'is damaged \(IndexError\); delete it, and the networks are scored again',
        ),
        (lambda lines: [lines[0], '{"text": "a"}'], r'is damaged \(KeyError\)'),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, harm, says):
    path = tmp_path / 'search.jsonl'
    run(toy(), path, 3, 2)
    path.write_text('\n'.join(harm(path.read_text().splitlines())) + '\n')
    with pytest.raises(ValueError, match=says):
        run(toy(), path, 3, 2)


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[search\]"'):
        run(toy(), tmp_path / 'search')
