"""Compare attention blocks in one network: the same budget, seeds and batches for all, with statistics and costs."""

from .candidates import INSERTION, Candidate, Rule, check_candidates, parse_candidate, split_blocks, takes_genotype
from .comparison import CompareConfig, compare, open_comparison
from .report import check_errors, format_comparison, judge, write_results

__all__ = [
    'INSERTION',
    'Candidate',
    'CompareConfig',
    'Rule',
    'check_candidates',
    'check_errors',
    'compare',
    'format_comparison',
    'judge',
    'open_comparison',
    'parse_candidate',
    'split_blocks',
    'takes_genotype',
    'write_results',
]
