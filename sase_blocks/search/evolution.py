"""Evolution (NSGA-II) and random search over genes with few choices each.

The engine is Optuna's NSGA-II (Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002): the
score is maximised, the cost minimised. Ours around it:

- Limits are hard: what does not fit is drawn again before anything is paid for it, and is never written down.
- No network is scored twice: genomes are compared by the text of the network that they stand for.
- A generation is drawn at once and scored in any order, in this process or on many machines. What is drawn is a
  function of the seed, the texts before it and the generations before its own, so the order changes nothing.
- Candidates are lines of a file, written before and after they are scored: a search that is killed and started again
  ends with the candidates of one that was not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sase_blocks.jobs import Each, check_settings, each_in_turn
from sase_blocks.reading import one_line
from sase_blocks.runs import append_row, write_rows
from sase_blocks.runs import say as print_line

__all__ = ['ALGORITHMS', 'Candidate', 'Genome', 'Problem', 'best', 'evolve', 'front', 'load_optuna']

ALGORITHMS = ('nsga2', 'random')
FAILURES = 3  # candidates in a row that may fail
LINES = 20  # progress lines of a whole search

Genome = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """What is searched: the genes, and functions of them.

    Args:
        genes: from the name of a gene to its choices.
        decode: the text of the network that a genome stands for. Several genomes may give the same: genes that are of
            no effect are ignored here.
        fits: do the hard limits allow this network? Cheap: asked of all that is drawn.
        cost: of a network; less is better.
        score: of a network; more is better. Expensive: asked once of each.
        draw: a random genome of the law by which the first generation, or all of a random search, is drawn.
    """

    genes: Mapping[str, Sequence[str]]
    decode: Callable[[Genome], str]
    fits: Callable[[str], bool]
    cost: Callable[[str], float]
    score: Callable[[str], float]
    draw: Callable[[np.random.Generator], Genome]

    def check(self) -> None:
        """Refuse genes that are none."""
        if not self.genes:
            raise ValueError('there are no genes to search')
        for name, choices in self.genes.items():
            if isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(f'gene {name}: expected a list of texts to choose from, got {choices!r}')
            if len(set(choices)) < len(choices):
                raise ValueError(f'gene {name}: a choice stands twice in {list(choices)}')

    def check_genome(self, genome: Mapping[str, str], what: str) -> Genome:
        """The genome, with its genes in their order; ``what`` says in an error whose it is."""
        if genome.keys() != self.genes.keys():
            differing = sorted(genome.keys() ^ self.genes.keys())
            raise ValueError(f'{what} has other genes than are searched: {", ".join(differing)}')
        for name, choices in self.genes.items():
            if genome[name] not in choices:
                raise ValueError(f'{what}: gene {name} is {genome[name]!r}, expected one of {", ".join(choices)}')
        return {name: genome[name] for name in self.genes}


class Candidate(NamedTuple):
    """A network that was scored: its text, values, a genome of it and the number of its trial in the study."""

    text: str
    score: float
    cost: float
    genome: Genome
    number: int


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats, that is, equals or betters in score and cost and betters in one of them.

    Returns:
        Sorted by cost; equals in cost and score all stay, sorted by text.
    """
    chosen: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.cost, -one.score, one.text)):
        if not chosen or one.score > chosen[-1].score or (one.score, one.cost) == (chosen[-1].score, chosen[-1].cost):
            chosen.append(one)
    return chosen


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The highest score; of equals the cheapest, then the first by text."""
    if not candidates:
        raise ValueError('there are no candidates')
    return min(candidates, key=lambda one: (-one.score, one.cost, one.text))


def load_optuna() -> Any:
    """Optuna. Raises ImportError that names the extra."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f'an evolution needs Optuna ({error}): pip install "sase-blocks[search]"') from error
    return optuna


def evolve(
    problem: Problem,
    file: str | Path,
    *,
    evaluations: int,
    algorithm: str = 'nsga2',
    population: int = 50,
    mutation: float | None = None,
    seeds: Sequence[Mapping[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    each: Each = each_in_turn,
    say: Callable[[str], None] | None = None,
    tries: int = 2000,
) -> list[Candidate]:
    """Search until ``evaluations`` networks are scored.

    Called again, this continues; with more evaluations it goes on from there. What failed since the last success is
    then tried again.

    Args:
        problem: what is searched.
        file: of the candidates, one JSON a line; its folder is made. One call at a time may write it.
        evaluations: networks to score. Candidates that failed do not count.
        algorithm: 'nsga2', or 'random' for ``problem.draw`` alone, the baseline.
        population: scored networks of a generation, and parents of the next one; more than 1, fewer than evaluations.
        mutation: probability that a gene of a child is drawn anew, uniformly. Default: 1 / number of genes.
        seeds: genomes that are scored first, in this order.
        settings: what else the scores depend on, as JSON can hold it; a file with other settings is refused, as is one
            with other genes, seeds, algorithm, population, mutation or seed.
        seed: of all that is drawn; not negative.
        each: calls ``problem.score`` with each of several texts. Default: one after another in this process.
        say: prints a line. Default: print.
        tries: draws in vain after which the search ends, for NSGA-II first of children, then of ``problem.draw``.

    Returns:
        All networks scored so far, each once, in the order in which they were drawn.

    Raises:
        ImportError: Optuna is missing (extra ``search``).
        ValueError: a wrong argument, a file with other settings, or limits under which nothing was found at all.
        OSError: the file cannot be written.
        RuntimeError: three candidates in a row have failed.
    """
    problem.check()
    if algorithm not in ALGORITHMS:
        raise ValueError(f'algorithm: expected {" or ".join(ALGORITHMS)}, got {algorithm!r}')
    least = {'evaluations': 1, 'population': 2, 'seed': 0, 'tries': 1}
    for what, value in zip(least, (evaluations, population, seed, tries), strict=True):
        if value < least[what]:
            raise ValueError(f'{what}: expected at least {least[what]}, got {value}')
    if algorithm == 'nsga2' and population >= evaluations:
        raise ValueError(
            f'population: {evaluations} evaluations end before a first generation of {population} has children; '
            f"expected fewer, or algorithm='random'"
        )
    if mutation is not None and not 0 <= mutation <= 1:
        raise ValueError(f'mutation: expected a probability, got {mutation}')
    planned = [problem.check_genome(genome, 'a seed') for genome in seeds]
    ours: dict[str, Any] = {
        'algorithm': algorithm,
        'population': population if algorithm == 'nsga2' else None,
        'mutation': mutation if algorithm == 'nsga2' else None,
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
    drawn = _Drawn(Path(file), {**theirs, **ours})
    search = _Search(
        problem, load_optuna(), drawn, evaluations, algorithm == 'nsga2', population, mutation, seed, tries, planned
    )
    drawn.open()
    return search.run(each, say or print_line)


class _Empty(Exception):
    """Nothing new was drawn that fits."""


@dataclass
class _One:
    """A candidate: drawn, then scored or failed."""

    text: str
    genome: Genome
    score: float | None = None
    cost: float | None = None
    error: str = ''


class _Drawn:
    """The candidates in their file, in the order of their numbers.

    Its first line is {'settings'}; each other one {'number', 'text', 'genome'} of a candidate that was drawn,
    {'number', 'score', 'cost'} of one that was scored, or {'number', 'error'}.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.all: list[_One] = []

    def open(self) -> None:
        """Read what there is, refuse what was made with other settings, and leave out what a killed run wrote in part.

        What failed since the last success is forgotten, so that it is scored again.
        """
        rows = self._rows()
        if rows:
            check_settings(rows[0].get('settings', {}), self.settings, f'{self.file}')
        try:
            for row in rows[1:]:
                if 'text' in row:
                    self.all.append(_One(row['text'], dict(row['genome'])))
                else:
                    one = self.all[row['number']]
                    one.score, one.cost, one.error = row.get('score'), row.get('cost'), row.get('error', '')
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f'{self.file} is damaged ({type(error).__name__}); delete it, and the networks are scored again'
            ) from error
        since = max((number for number, one in enumerate(self.all) if one.score is not None), default=-1)
        for one in self.all[since + 1 :]:
            one.error = ''
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.file, rows or [{'settings': self.settings}])

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        lines = self.file.read_text(encoding='utf-8', errors='replace').splitlines() if self.file.exists() else []
        for line in lines:
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                if line is not lines[-1]:
                    raise ValueError(f'{self.file} is damaged; delete it, and the networks are scored again') from None
        if rows and 'settings' not in rows[0]:
            raise ValueError(f'{self.file} holds no candidates of a search; delete it, or change --out')
        return rows

    def add(self, genome: Genome, text: str) -> None:
        append_row(self.file, {'number': len(self.all), 'text': text, 'genome': genome})
        self.all.append(_One(text, genome))

    def end(self, number: int, **what: Any) -> None:
        append_row(self.file, {'number': number, **what})
        for name, value in what.items():
            setattr(self.all[number], name, value)


@dataclass
class _Search:
    problem: Problem
    optuna: Any
    drawn: _Drawn
    evaluations: int
    evolving: bool
    population: int
    mutation: float | None
    seed: int
    tries: int
    seeds: Sequence[Genome]
    parents: dict[int, list[Any]] = field(default_factory=dict)  # of each generation
    trials: dict[int, Any] = field(default_factory=dict)  # the scored candidates as Optuna has them, by number

    def run(self, each: Each, say: Callable[[str], None]) -> list[Candidate]:
        total, told, failures = self.evaluations, 0, 0
        while (left := total - len(done := self.candidates())) > 0:
            waiting = [number for number, one in enumerate(self.drawn.all) if one.score is None and not one.error]
            # The rest of the generation, whose parents are known; a random search has one generation.
            batch = min(left, self.population - len(done) % self.population) if self.evolving else left
            empty: _Empty | None = None
            while len(waiting) < batch and empty is None:
                try:
                    self.propose()
                    waiting.append(len(self.drawn.all) - 1)
                except _Empty as reason:
                    empty = reason
            if not waiting:
                if not done:
                    raise ValueError(f'nothing was found: {empty}')
                say(f'the search ends after {len(done)} of {total} evaluations: {empty}')
                return done
            for at, ended in each(self.problem.score, [self.drawn.all[number].text for number in waiting[:batch]]):
                number = waiting[at]
                if (error := self._end(number, ended.value, ended.error)) is None:
                    failures = 0
                    told = self._tell(told, say)
                    continue
                failures += 1
                text = self.drawn.all[number].text
                say(f'network {number} failed: {error} ({text})')
                if failures == FAILURES:
                    raise RuntimeError(f'{failures} candidates in a row failed, the last one, {text}: {error}')
        self._tell(told, say)
        return self.candidates()

    def _end(self, number: int, score: Any, error: str) -> str | None:
        """Write how a candidate ended. -> its error."""
        if not error:
            try:
                cost, score = float(self.problem.cost(self.drawn.all[number].text)), float(score)
                for name, value in (('cost', cost), ('score', score)):
                    if not math.isfinite(value):
                        raise ValueError(f'the {name} is {value}')
            except Exception as wrong:
                error = f'{type(wrong).__name__}: {one_line(wrong)}'
            else:
                self.drawn.end(number, score=score, cost=cost)
                return None
        self.drawn.end(number, error=error)
        return error

    def _tell(self, told: int, say: Callable[[str], None]) -> int:
        """A line when another twentieth of the search is over, and how much is told of then."""
        candidates, total = self.candidates(), self.evaluations
        now = len(candidates)
        if now * LINES // total > told * LINES // total:
            first = best(candidates)
            cost = f'{first.cost:,.0f}' if first.cost >= 1000 else f'{first.cost:.4g}'
            say(f'{now} of {total} evaluated, best score {first.score:.6g} at cost {cost}')
            return now
        return told

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(one.text, one.score, one.cost, one.genome, number)
            for number, one in enumerate(self.drawn.all)
            if one.score is not None and one.cost is not None
        ]

    def propose(self) -> None:
        """Write down a new candidate: the first seed that is missing, or what is drawn.

        Raises:
            _Empty: nothing new that fits was drawn.
        """
        known = {one.text for one in self.drawn.all}
        for genome in self.seeds:
            if (text := self.problem.decode(genome)) not in known:
                self.drawn.add(genome, text)
                return
        sequence = np.random.SeedSequence([self.seed, 0, len(known)])
        rng = np.random.default_rng(sequence)
        drawn = Counter[str]()

        def new(genome: Mapping[str, str]) -> Genome | None:
            whole = self.problem.check_genome(genome, 'what was drawn')
            text = self.problem.decode(whole)
            reason = 'known' if text in known else '' if self.problem.fits(text) else 'over the limits'
            drawn[reason] += 1
            return whole if not reason else None

        child: Genome | None = None
        if self.evolving:
            child = next(self._children(rng, int(sequence.generate_state(1)[0]), new), None)
        for _ in range(self.tries):
            child = child or new(self.problem.draw(rng))
        if child is None:
            raise _Empty(
                f'of {drawn.total()} networks drawn {drawn["over the limits"]} were over the limits and '
                f'{drawn["known"]} known already; widen the limits or the space'
            )
        self.drawn.add(child, self.problem.decode(child))

    def _children(
        self, rng: np.random.Generator, seed: int, new: Callable[[Mapping[str, str]], Genome | None]
    ) -> Iterator[Genome]:
        """The children that Optuna's NSGA-II draws and that are new and fit; none in the first generation."""
        optuna, parents, size = self.optuna, self.parents, self.population
        distributions = {
            name: optuna.distributions.CategoricalDistribution(tuple(choices))
            for name, choices in self.problem.genes.items()
        }
        members = self.candidates()
        generation = len(members) // size
        if not generation:
            return
        for one in members:
            if one.number not in self.trials:
                self.trials[one.number] = optuna.trial.create_trial(
                    values=[one.score, one.cost], params=one.genome, distributions=distributions
                )
                self.trials[one.number].number = one.number
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
        sampler = Sampler(population_size=size, mutation_prob=self.mutation, seed=seed)
        # Only for its directions: the trials are given above.
        study = optuna.create_study(directions=['maximize', 'minimize'], sampler=sampler)
        optuna.logging.set_verbosity(verbosity)
        for before in range(1, generation):  # each stands on the one before it
            sampler.get_parent_population(study, before)
        trial = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
        for _ in range(self.tries):
            child = sampler.sample_relative(study, trial, distributions)
            # Genes that mutation dropped are drawn anew.
            whole = {
                name: child[name] if name in child else str(rng.choice(list(choices)))
                for name, choices in self.problem.genes.items()
            }
            if (genome := new(whole)) is not None:
                yield genome
