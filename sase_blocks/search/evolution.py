"""Evolution (NSGA-II) and random search over genes with few choices each, by any number of workers in one study.

The engine is Optuna's NSGA-II (Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002): the
score is maximised, the cost minimised. Ours around it:

- Limits are hard: what does not fit is drawn again before anything is paid for it, and never stands in the study.
- No network is scored twice: genomes are compared by the text of the network that they stand for.
- A candidate is written with its whole genome before a worker takes it, so that a killed worker's is taken up again.
- What is drawn is a function of the seed, the worker's number and what the study holds: no random state is stored, and
  one worker that is killed and started again ends with the trials of one that was not.
- A candidate belongs to the generation in which it is finished: no late worker's result is lost to the selection.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sase_blocks.runs import say as print_line
from sase_blocks.search.problem import Candidate, Genome, Problem, best, front
from sase_blocks.search.study import State, Study, beating, describe_owner

__all__ = ['ALGORITHMS', 'Candidate', 'Problem', 'best', 'check_storage', 'evolve', 'front']

ALGORITHMS = ('nsga2', 'random')
DIRECTIONS = ('maximize', 'minimize')  # score, cost
FAILURES = 3  # candidates in a row that may fail
LINES = 20  # progress lines of a whole search


def evolve(
    problem: Problem,
    storage: str | Path,
    study_name: str,
    *,
    evaluations: int,
    algorithm: str = 'nsga2',
    population: int = 50,
    mutation: float | None = None,
    seeds: Sequence[Mapping[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    worker: int = 0,
    say: Callable[[str], None] | None = None,
    tries: int = 2000,
    heartbeat: float = 15.0,
    patience: float = 90.0,
    poll: float = 2.0,
    timeout: float = 60.0,
    deaths: int = 3,
) -> list[Candidate]:
    """Search, together with every other process that runs the same command, until ``evaluations`` networks are scored.

    Run again, the command continues; with more evaluations it goes on from there. What failed since the last success
    is then tried again.

    Args:
        problem: what is searched.
        storage: a SQLite file, a '.journal' file or the URL of a database; see ``search.study.Study``.
        study_name: of the study in the storage.
        evaluations: networks to score, by all workers together. Candidates that failed do not count.
        algorithm: 'nsga2', or 'random' for ``problem.draw`` alone, the baseline.
        population: scored networks of a generation, and parents of the next one; more than 1, fewer than evaluations.
        mutation: probability that a gene of a child is drawn anew, uniformly. Default: 1 / number of genes.
        seeds: genomes that are scored first, in this order.
        settings: what else the scores depend on, as JSON can hold it; a study with other settings is refused, as is one
            with other genes, seeds, algorithm, population, mutation or seed.
        seed: of all that is drawn; not negative.
        worker: a number that no other worker has; not negative. Equal ones do no harm but draw more in vain.
        say: prints a line. Default: print.
        tries: draws in vain after which the search ends, for NSGA-II first of children, then of ``problem.draw``.
        heartbeat, patience, poll, timeout: seconds, as in ``search.tasks.run_tasks``.
        deaths: after as many workers have died over one candidate, it has failed.

    Returns:
        All networks scored so far by anyone, each once, in the order of their trials.

    Raises:
        ImportError: Optuna, or the driver of the database, is missing (extra ``search``).
        ValueError: a wrong argument, a study with other settings, or limits under which nothing was found at all.
        OSError: the storage is locked, gone, damaged or not writable.
        RuntimeError: three candidates in a row have failed. A FloatingPointError of ``problem.score`` passes through,
            and its candidate is left to the next worker, as by Ctrl-C.
    """
    problem.check()
    if algorithm not in ALGORITHMS:
        raise ValueError(f'algorithm: expected {" or ".join(ALGORITHMS)}, got {algorithm!r}')
    least = {'evaluations': 1, 'population': 2, 'seed': 0, 'worker': 0, 'tries': 1}
    for what, value in zip(least, (evaluations, population, seed, worker, tries), strict=True):
        if value < least[what]:
            raise ValueError(f'{what}: expected at least {least[what]}, got {value}')
    if algorithm == 'nsga2' and population >= evaluations:
        raise ValueError(
            f'population: {evaluations} evaluations end before a first generation of {population} has children; '
            f"expected fewer, or algorithm='random'"
        )
    if mutation is not None and not 0 <= mutation <= 1:
        raise ValueError(f'mutation: expected a probability, got {mutation}')
    say = say or print_line
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
    study = Study(
        storage,
        study_name,
        mark='text',
        directions=DIRECTIONS,
        patience=patience,
        timeout=timeout,
        deaths=deaths,
    )
    search = _Search(
        problem, study, evaluations, algorithm == 'nsga2', population, mutation, (seed, worker), tries, planned
    )
    study.open({**theirs, **ours})
    search.retry_failed()
    _work(search, say, heartbeat, poll)
    return search.candidates()


def check_storage(storage: str | Path, study_name: str, timeout: float = 60.0) -> None:
    """Raise now what ``evolve`` would raise about Optuna, the storage, or a study of that name that is another kind."""
    Study(storage, study_name, mark='text', directions=DIRECTIONS, timeout=timeout).connect()


def _work(search: _Search, say: Callable[[str], None], heartbeat: float, poll: float) -> None:
    """What a worker does until enough is evaluated, or nothing new is to be found."""
    study = search.study
    total, told, waiting, failures = search.evaluations, 0, False, 0
    empty: _Empty | None = None
    empty_at = -1  # how much was evaluated when nothing was found
    while True:
        study.bury_the_dead()
        states = search.revive()
        done = [state for state in states.values() if state.status == 'done']
        running = [state for state in states.values() if state.status == 'running']
        if len(done) >= total:
            break
        taken = None
        if len(done) + len(running) < total:
            if empty_at != len(done) and not any(state.status == 'waiting' for state in states.values()):
                try:
                    search.propose()
                except _Empty as reason:  # others may still find something that has new children
                    empty, empty_at = reason, len(done)
            taken = search.take()
        if taken is not None:
            waiting = False
            with beating(taken, heartbeat):
                attrs, values, error = _attempt(search.problem, taken.user_attrs['text'])
                if values is not None:
                    attrs.update(search.membership())
                if not study.end(taken, attrs, values):
                    say(f'trial {taken.number}: another worker took this one for dead and may score it as well')
            if error is not None and 'error' not in attrs:
                raise error
            if error is None:
                failures = 0
                told = _tell(search.candidates(), total, told, say)
                continue
            failures += 1
            say(f'trial {taken.number} failed: {attrs["error"]} ({taken.user_attrs["text"]})')
            if failures == FAILURES:
                raise RuntimeError(
                    f'{failures} candidates in a row failed, the last one, {taken.user_attrs["text"]}: {attrs["error"]}'
                ) from error
        elif running:
            if not waiting:
                waiting = True
                names = ', '.join(describe_owner(state.attrs) for state in running[:3])
                more = f' and {len(running) - 3} more' if len(running) > 3 else ''
                say(f'waiting for what other workers score: {names}{more}')
            time.sleep(poll)
        elif empty is not None and empty_at == len(done):
            if not done:
                raise ValueError(f'nothing was found: {empty}')
            say(f'the search ends after {len(done)} of {total} evaluations: {empty}')
            return
    _tell(search.candidates(), total, told, say)


def _tell(candidates: list[Candidate], total: int, told: int, say: Callable[[str], None]) -> int:
    """A line when another twentieth of the search is over, and how much is told of then."""
    now = len(candidates)
    if now * LINES // total > told * LINES // total:
        first = best(candidates)
        cost = f'{first.cost:,.0f}' if first.cost >= 1000 else f'{first.cost:.4g}'
        say(f'{now} of {total} evaluated, best score {first.score:.6g} at cost {cost}')
        return now
    return told


def _attempt(problem: Problem, text: str) -> tuple[dict[str, Any], list[float] | None, BaseException | None]:
    """What to store of one candidate, its values, and what was raised."""
    began = time.monotonic()
    try:
        cost, score = float(problem.cost(text)), float(problem.score(text))
        for name, value in (('cost', cost), ('score', score)):
            if not math.isfinite(value):
                raise ValueError(f'the {name} is {value}')
    except FloatingPointError as error:
        return {'interrupted': True}, None, error
    except Exception as error:
        return {'error': f'{type(error).__name__}: {" ".join(str(error).split())}'[:1000]}, None, error
    except BaseException as error:  # Ctrl-C or sys.exit: the worker stops, and the candidate is left to the next one
        return {'interrupted': True}, None, error
    return {'seconds': round(time.monotonic() - began, 3)}, [score, cost], None


class _Empty(Exception):
    """Nothing new was drawn that fits."""


@dataclass
class _Search:
    """The candidates in their study. Their trials have the genome as parameters, and the attributes text and, if they
    are complete, seconds and generation; or cached, the number of another trial for this text, with its values."""

    problem: Problem
    study: Study
    evaluations: int
    evolving: bool
    population: int
    mutation: float | None
    seed: tuple[int, int]  # of the search, of the worker
    tries: int
    seeds: Sequence[Genome] = ()

    def __post_init__(self) -> None:
        categorical = self.study.optuna.distributions.CategoricalDistribution
        self.parents: dict[int, list[Any]] = {}  # of each generation
        self.distributions = {name: categorical(tuple(choices)) for name, choices in self.problem.genes.items()}

    def retry_failed(self) -> None:
        """Queue again what failed since the last success."""
        held = self.study.states()
        since = max((trial.number for trial in self.complete()), default=-1)
        for trial in self.study.trials():
            text = trial.user_attrs['text']
            if trial.number > since and text in held and held[text].status == 'failed':
                held[text] = State('waiting', {})
                self._add(trial.params, text, again=True)

    def _add(self, genome: Genome, text: str, **attrs: Any) -> None:
        self.study.add({'text': text, **attrs}, genome, self.distributions)

    def revive(self) -> dict[str, State]:
        """Queue again what workers have left behind, and where each text stands."""
        states = self.study.states()
        missing = [text for text, state in states.items() if state.status == 'missing']
        if missing:
            genomes = {trial.user_attrs['text']: trial.params for trial in self.study.trials()}
            for text in missing:
                self._add(genomes[text], text)
            states = self.study.states()
        return states

    def take(self) -> Any | None:
        """Claim a candidate to score; None if there is none, or others already score as many as are missing."""
        states = self.study.states_of_trials
        while (taken := self.study.take()) is not None:
            trial, same = taken
            if same is not None and same.state == states.COMPLETE:
                self.study.end(trial, {'cached': same.number}, same.values)
            elif same is not None:
                self.study.end(trial, {'duplicate': True})
            else:
                # The first waiting trial is taken first: every other worker that counts this one has a higher number.
                busy = {
                    other.user_attrs['text']
                    for other in self.study.trials()
                    if other.state == states.COMPLETE or (other.state == states.RUNNING and other.number < trial.number)
                }
                if len(busy) < self.evaluations:
                    return trial
                self.study.end(trial, {'interrupted': True})
                return None
        return None

    def complete(self) -> list[Any]:
        """The first trial that was scored for each text, in the order of their numbers."""
        trials: dict[str, Any] = {}
        for trial in self.study.trials():
            if trial.state == self.study.states_of_trials.COMPLETE and 'cached' not in trial.user_attrs:
                trials.setdefault(trial.user_attrs['text'], trial)
        return list(trials.values())

    def candidates(self) -> list[Candidate]:
        found = []
        for trial in self.complete():
            score, cost = trial.values
            genome = {name: trial.params[name] for name in self.problem.genes}
            found.append(Candidate(trial.user_attrs['text'], score, cost, genome, trial.number))
        return found

    def generation(self, complete: Sequence[Any]) -> int:
        """The generation that is being filled."""
        sizes = Counter(trial.user_attrs['generation'] for trial in complete)
        last = max(sizes, default=0)
        return last + (sizes[last] >= self.population)

    def membership(self) -> dict[str, int]:
        return {'generation': self.generation(self.complete())} if self.evolving else {}

    def propose(self) -> None:
        """Queue a new candidate: the first seed that is missing, or what is drawn. Any worker may take it.

        One at a time: what a dead worker leaves is queued behind all that waits, and would change the order.

        Raises:
            _Empty: nothing new that fits was drawn.
        """
        known = {trial.user_attrs['text'] for trial in self.study.trials()}
        for genome in self.seeds:
            if (text := self.problem.decode(genome)) not in known:
                self._add(genome, text)
                return
        # The number of texts, unlike that of trials, is the same whether or not a worker died on the way.
        sequence = np.random.SeedSequence([*self.seed, len(known)])
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
            sampler = _sampler(self, rng, int(sequence.generate_state(1)[0]), new)
            trial = self.study.optuna.trial.create_trial(state=self.study.states_of_trials.WAITING)
            child = sampler.sample_relative(self.study.study, trial, self.distributions) or None
        for _ in range(self.tries):
            child = child or new(self.problem.draw(rng))
        if child is None:
            raise _Empty(
                f'of {drawn.total()} networks drawn {drawn["over the limits"]} were over the limits and '
                f'{drawn["known"]} known already; widen the limits or the space'
            )
        self._add(child, self.problem.decode(child))


def _sampler(
    search: _Search, rng: np.random.Generator, seed: int, new: Callable[[Mapping[str, str]], Genome | None]
) -> Any:
    """Optuna's NSGA-II, made for the next candidate of a search, which it draws again until it is new and fits."""
    members = search.complete()
    generation = search.generation(members)
    genes = {name: list(choices) for name, choices in search.problem.genes.items()}

    class Sampler(search.study.optuna.samplers.NSGAIISampler):  # type: ignore[name-defined]
        def get_trial_generation(self, study: Any, trial: Any) -> int:
            return generation

        def get_population(self, study: Any, generation: int) -> list[Any]:
            return [trial for trial in members if trial.user_attrs['generation'] == generation]

        def get_parent_population(self, study: Any, generation: int) -> list[Any]:
            # Optuna keeps them in the storage, in another order than at first and, before 4.4, by wrong numbers.
            if generation and generation not in search.parents:
                search.parents[generation] = sorted(self.select_parent(study, generation), key=lambda one: one.number)
            return search.parents.get(generation, [])

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> Genome:
            """A genome, or none in the first generation and after too many draws in vain."""
            if not generation:
                return {}
            for _ in range(search.tries):
                child = super().sample_relative(study, trial, search_space)
                # Genes that mutation dropped are drawn anew.
                whole = {name: child[name] if name in child else str(rng.choice(genes[name])) for name in genes}
                if (genome := new(whole)) is not None:
                    return genome
            return {}

    sampler = Sampler(population_size=search.population, mutation_prob=search.mutation, seed=seed)
    for before in range(1, generation):  # each stands on the one before it
        sampler.get_parent_population(search.study.study, before)
    return sampler
