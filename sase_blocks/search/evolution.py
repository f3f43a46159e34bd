"""Evolution (NSGA-II) and random search over genes with few choices each.

The engine is Optuna's NSGA-II (Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002), which
maximises the score and minimises the cost. Our additions:

- Limits are hard: a network over them is drawn again before it costs anything, and is never written down.
- No network is scored twice: genomes are compared by the text of their network.
- A generation is drawn as a whole and scored in any order, in this process or on many machines. A draw depends only on
  the seed, the earlier texts and the earlier generations.
- Candidates are lines of a file, written before and after scoring. A search that is killed and started again ends with
  the candidates of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sase_blocks.jobs import Each, Ended, check_settings, each_in_turn
from sase_blocks.reading import one_line
from sase_blocks.runs import append_row, import_extra, write_rows
from sase_blocks.runs import say as print_line

ALGORITHMS = ('nsga2', 'random')
FAILURES = 3  # failed candidates in a row that end a search
LINES = 20  # progress lines of a whole search

Genome = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """What to search: the genes, and functions of them.

    Args:
        genes: maps the name of a gene to its choices.
        decode: returns the text of a genome's network. Genomes that differ in genes without effect have the same text.
        fits: returns whether the hard limits allow a network. Cheap: called for every draw.
        cost: of a network; less is better.
        score: of a network; more is better. Expensive: called once per network.
        draw: returns a random genome, for the first generation and for random search.
    """

    genes: Mapping[str, Sequence[str]]
    decode: Callable[[Genome], str]
    fits: Callable[[str], bool]
    cost: Callable[[str], float]
    score: Callable[[str], float]
    draw: Callable[[np.random.Generator], Genome]

    def check(self) -> None:
        """Validate the gene table."""
        if not self.genes:
            raise ValueError('there are no genes to search')
        for name, choices in self.genes.items():
            if isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(f'gene {name}: expected a list of texts to choose from, got {choices!r}')
            if len(set(choices)) < len(choices):
                raise ValueError(f'gene {name}: a choice is repeated in {list(choices)}')

    def check_genome(self, genome: Mapping[str, str], what: str) -> Genome:
        """The genome with its genes in order. An error names it ``what``."""
        if differing := sorted(genome.keys() ^ self.genes.keys()):
            raise ValueError(f'{what} and the search differ in these genes: {", ".join(differing)}')
        for name, choices in self.genes.items():
            if genome[name] not in choices:
                raise ValueError(f'{what}: gene {name} is {genome[name]!r}, expected one of {", ".join(choices)}')
        return {name: genome[name] for name in self.genes}


class Candidate(NamedTuple):
    """A scored network: its text, values, one of its genomes, and the number of its draw."""

    text: str
    score: float
    cost: float
    genome: Genome
    number: int


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto front by cost: no other candidate is at least as good in score and cost and better in one of them.

    All candidates of equal cost and score stay, by text.
    """
    chosen: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.cost, -one.score, one.text)):
        if not chosen or one.score > chosen[-1].score or (one.score, one.cost) == (chosen[-1].score, chosen[-1].cost):
            chosen.append(one)
    return chosen


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the highest score; among equals the cheapest, then the first by text."""
    if not candidates:
        raise ValueError('there are no candidates')
    return min(candidates, key=lambda one: (-one.score, one.cost, one.text))


def load_optuna() -> Any:
    """Optuna. Raises ImportError that names the extra."""
    return import_extra('optuna', 'an evolution needs Optuna', 'search')


def evolve(
    problem: Problem,
    file: str | Path,
    *,
    evaluations: int,
    algorithm: str = 'nsga2',
    population: int = 50,
    seeds: Sequence[Mapping[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    each: Each = each_in_turn,
    say: Callable[[str], None] = print_line,
    tries: int = 2000,
) -> list[Candidate]:
    """Search until ``evaluations`` networks are scored.

    The same call again continues, and more evaluations extend the search. It tries failures since the last success
    again.

    Args:
        file: the candidates, one JSON a line; its folder is made. Only one call at a time may write to it.
        evaluations: networks to score. Failed candidates do not count.
        algorithm: 'nsga2', or 'random' for ``problem.draw`` only, the baseline.
        population: scored networks of a generation, and parents of the next one; above 1, below evaluations.
        seeds: genomes to score first, in this order.
        settings: other JSON values that the scores depend on.
        seed: of all draws; not negative.
        each: calls ``problem.score`` with each of several texts. Default: one after another in this process.
        say: prints a line.
        tries: draws without a new network before the search ends, for NSGA-II first of children, then of
            ``problem.draw``.

    Returns:
        All networks scored so far, each once, in the order of their draws.

    Raises:
        ImportError: Optuna is missing (extra ``search``).
        ValueError: a wrong argument, a file with other settings, genes, seeds, algorithm, population or seed, or
            limits that no drawn network meets.
        OSError: the file cannot be written.
        RuntimeError: three candidates in a row have failed.
    """
    problem.check()
    if algorithm not in ALGORITHMS:
        raise ValueError(f'algorithm: expected {" or ".join(ALGORITHMS)}, got {algorithm!r}')
    counts = {'evaluations': (evaluations, 1), 'population': (population, 2), 'seed': (seed, 0), 'tries': (tries, 1)}
    for what, (value, least) in counts.items():
        if value < least:
            raise ValueError(f'{what}: expected at least {least}, got {value}')
    if algorithm == 'nsga2' and population >= evaluations:
        raise ValueError(
            f'population: {evaluations} evaluations end before a first generation of {population} has children; '
            f"expected fewer, or algorithm='random'"
        )
    planned = [problem.check_genome(genome, 'a seed') for genome in seeds]
    size = population if algorithm == 'nsga2' else None
    ours: dict[str, Any] = {
        'algorithm': algorithm,
        'population': size,
        'seed': seed,
        'seeds': [problem.decode(genome) for genome in planned],
        **{f'gene {name}': list(choices) for name, choices in problem.genes.items()},
    }
    theirs = json.loads(json.dumps(dict(settings or {})))
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            raise ValueError(f'settings: {name} is {theirs[name]!r}, but the search is called with {ours[name]!r}')
    for text in ours['seeds']:
        if not problem.fits(text):
            raise ValueError(f'a seed is over the limits: {text}')
    search = _Search(problem, load_optuna(), Path(file), evaluations, size, seed, tries, planned)
    search.open({**theirs, **ours})
    return search.run(each, say)


@dataclass
class _Search:
    """The candidates, in memory and in their file, and the draws of new ones.

    The first line of the file is {'settings'}. Each other one is {'number', 'text', 'genome'} of a drawn candidate,
    {'number', 'score', 'cost'} of a scored one, or {'number', 'error'}.
    """

    problem: Problem
    optuna: Any
    file: Path
    evaluations: int
    population: int | None  # None: a random search
    seed: int
    tries: int
    seeds: Sequence[Genome]
    drawn: list[dict[str, Any]] = field(default_factory=list)  # by number, the values of all lines together
    parents: dict[int, list[Any]] = field(default_factory=dict)  # by generation
    trials: dict[int, Any] = field(default_factory=dict)  # the scored candidates as Optuna has them

    def open(self, settings: Mapping[str, Any]) -> None:
        """Read the file, except for failures since the last success. Raises ValueError for damage or other settings."""
        rows: list[dict[str, Any]] = []
        lines = self.file.read_text(encoding='utf-8', errors='replace').splitlines() if self.file.exists() else []
        try:
            rows = [dict(json.loads(line)) for line in lines[:-1]]
            with contextlib.suppress(ValueError, TypeError):  # a killed run may leave half a line
                rows += [dict(json.loads(line)) for line in lines[-1:]]
            before = rows[0]['settings'] if rows else {}
            for row in rows[1:]:
                self._note(row)
            last = max((one.number for one in self.candidates()), default=0)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f'{self.file} is damaged ({type(error).__name__}); delete it, and the networks are scored again'
            ) from error
        check_settings(before, settings, f'{self.file}')
        for one in self.drawn[last:]:
            one.pop('error', None)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.file, rows or [{'settings': settings}])

    def _note(self, row: Mapping[str, Any]) -> None:
        if 'text' in row:
            self.drawn.append({'text': row['text'], 'genome': dict(row['genome'])})
        else:
            self.drawn[row['number']].update(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        append_row(self.file, row)
        self._note(row)

    def candidates(self) -> list[Candidate]:
        """The scored candidates, in the order of their draws."""
        return [
            Candidate(one['text'], one['score'], one['cost'], one['genome'], number)
            for number, one in enumerate(self.drawn)
            if 'score' in one
        ]

    def run(self, each: Each, say: Callable[[str], None]) -> list[Candidate]:
        total, told, failures = self.evaluations, 0, 0
        while (scored := len(self.candidates())) < total:
            waiting = [number for number, one in enumerate(self.drawn) if not one.keys() & {'score', 'error'}]
            # The rest of the generation, whose parents are known; a random search has one generation.
            batch = min(total - scored, self.population - scored % self.population if self.population else total)
            empty = ''
            while len(waiting) < batch and not (empty := self.propose()):
                waiting.append(len(self.drawn) - 1)
            if not waiting:
                if not scored:
                    raise ValueError(f'nothing was found: {empty}')
                say(f'the search ends after {scored} of {total} evaluations: {empty}')
                break
            for at, ended in each(self.problem.score, [self.drawn[number]['text'] for number in waiting[:batch]]):
                number, text = waiting[at], self.drawn[waiting[at]]['text']
                if not (error := self._end(number, text, ended)):
                    failures = 0
                    told = self._tell(told, say)
                    continue
                failures += 1
                say(f'network {number} failed: {error} ({text})')
                if failures == FAILURES:
                    raise RuntimeError(f'{failures} candidates in a row failed, the last one, {text}: {error}')
        else:
            self._tell(told, say)
        return self.candidates()

    def _end(self, number: int, text: str, ended: Ended) -> str:
        """Write the values or the error of a candidate. -> the error."""
        error, values = ended.error, {}
        if not error:
            try:
                values = {'score': float(ended.value), 'cost': float(self.problem.cost(text))}
                for name, value in reversed(values.items()):
                    if not math.isfinite(value):
                        raise ValueError(f'the {name} is {value}')
            except Exception as wrong:
                error = f'{type(wrong).__name__}: {one_line(wrong)}'
        self._write({'number': number, **({'error': error} if error else values)})
        return error

    def _tell(self, told: int, say: Callable[[str], None]) -> int:
        """Print a line after each twentieth of the search. -> the number of evaluations in the last line."""
        found, total = self.candidates(), self.evaluations
        if len(found) * LINES // total == told * LINES // total:
            return told
        first = best(found)
        cost = f'{first.cost:,.0f}' if first.cost >= 1000 else f'{first.cost:.4g}'
        say(f'{len(found)} of {total} evaluated, best score {first.score:.6g} at cost {cost}')
        return len(found)

    def propose(self) -> str:
        """Add a new candidate: the first missing seed, or a draw. -> the reason if there is none."""
        known = {one['text'] for one in self.drawn}
        missing = (genome for genome in self.seeds if self.problem.decode(genome) not in known)
        counts = Counter[str]()
        for drawn in itertools.chain(missing, self._draws(np.random.SeedSequence([self.seed, 0, len(known)]))):
            genome = self.problem.check_genome(drawn, 'what was drawn')
            text = self.problem.decode(genome)
            reason = 'known' if text in known else '' if self.problem.fits(text) else 'over the limits'
            if not reason:
                self._write({'number': len(self.drawn), 'text': text, 'genome': genome})
                return ''
            counts[reason] += 1
        return (
            f'of {counts.total()} networks drawn {counts["over the limits"]} were over the limits and '
            f'{counts["known"]} known already; widen the limits or the space'
        )

    def _draws(self, sequence: np.random.SeedSequence) -> Iterator[Mapping[str, str]]:
        """Genomes: children of Optuna's NSGA-II after the first generation, then draws of ``problem.draw``."""
        members, rng = self.candidates(), np.random.default_rng(sequence)
        if self.population and len(members) >= self.population:
            yield from self._children(members, self.population, rng, int(sequence.generate_state(1)[0]))
        for _ in range(self.tries):
            yield self.problem.draw(rng)

    def _children(
        self, members: Sequence[Candidate], size: int, rng: np.random.Generator, seed: int
    ) -> Iterator[Genome]:
        optuna, parents, generation = self.optuna, self.parents, len(members) // size
        categorical = optuna.distributions.CategoricalDistribution
        distributions = {name: categorical(tuple(choices)) for name, choices in self.problem.genes.items()}
        for one in members:
            if one.number not in self.trials:
                trial = self.trials[one.number] = optuna.trial.create_trial(
                    values=[one.score, one.cost], params=one.genome, distributions=distributions
                )
                trial.number = one.number
        trials = [self.trials[one.number] for one in members]

        class Sampler(optuna.samplers.NSGAIISampler):  # type: ignore[name-defined]
            def get_trial_generation(self, study: Any, trial: Any) -> int:
                return generation

            def get_population(self, study: Any, generation: int) -> list[Any]:
                return trials[generation * size : (generation + 1) * size]

            def get_parent_population(self, study: Any, generation: int) -> list[Any]:
                # Optuna keeps them in a storage, in another order than at first and, before 4.4, by wrong numbers.
                if generation and generation not in parents:
                    parents[generation] = sorted(self.select_parent(study, generation), key=lambda one: one.number)
                return parents.get(generation, [])

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = Sampler(population_size=size, seed=seed)
        # The study has only the directions. The sampler has the trials.
        study = optuna.create_study(directions=['maximize', 'minimize'], sampler=sampler)
        optuna.logging.set_verbosity(verbosity)
        for before in range(1, generation):  # each needs the one before it
            sampler.get_parent_population(study, before)
        trial = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
        for _ in range(self.tries):
            child = sampler.sample_relative(study, trial, distributions)
            # Mutation drops genes, which are drawn anew.
            genes = self.problem.genes.items()
            yield {name: child[name] if name in child else str(rng.choice(list(choices))) for name, choices in genes}
