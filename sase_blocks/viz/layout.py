"""Lay out a small graph from left to right in layers, with few crossings and level lines.

The layered drawing of Sugiyama, Tagawa and Toda (1981) for graphs of a dozen nodes. A node's layer is its longest path
from the input. A layer of operations lies between two layers of nodes. An edge, with its operation, is one straight
line through all layers between its nodes. One vertical order of all nodes and edges holds in every layer, so straight
lines never cross, and they stay level where there is room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise, permutations, product

import numpy as np

__all__ = ['Box', 'Layout', 'Place', 'lay_out']

Edge = tuple[str, str]
Part = str | int  # a node by its name, an edge by its number
TRIES = 2000  # orders to try, less than a millisecond each


@dataclass(frozen=True)
class Box:
    """The space that a node or an operation needs around its anchor, in points; lines run through the anchor."""

    width: float
    above: float
    below: float


@dataclass(frozen=True)
class Place:
    """Position of a node or an edge. x is the centre of the node or of the edge's operation, y points down."""

    x: float
    y: float
    left: float  # an edge runs straight from here
    right: float  # to here


@dataclass(frozen=True)
class Layout:
    """Positions of the nodes by name and of the edges in order, and the bounding box."""

    nodes: dict[str, Place]
    edges: list[Place]
    width: float
    top: float
    bottom: float
    crossings: int


def lay_out(nodes: Mapping[str, Box], edges: Sequence[Edge], operations: Sequence[Box], gap: float = 8.5) -> Layout:
    """Place the nodes and the operations of an acyclic graph.

    Args:
        nodes: name -> the space it needs; ties put earlier names further up.
        edges: pairs of source and target.
        operations: the space that each edge's operation needs; ``Box(0, 0, 0)`` for a plain line.
        gap: minimum distance between two parts, in points.

    Raises:
        ValueError: the edges form a loop.
    """
    layer = {name: 2 * rank for name, rank in longest_paths(list(nodes), edges).items()}
    # Lines between neighbouring columns: from a node into an edge, along an edge, from an edge into a node.
    lines: list[set[tuple[Part, Part]]] = [set() for _ in range(max(layer.values()) + 1)]
    for number, (source, target) in enumerate(edges):
        path: list[Part] = [source, *[number] * (layer[target] - layer[source] - 1), target]
        for column, line in enumerate(pairwise(path), start=layer[source]):
            lines[column].add(line)
    order, crossings = untangle(list(nodes), edges, lines)
    columns: list[list[Part]] = [[] for _ in lines]
    for part in order:
        inside = [layer[part]] if isinstance(part, str) else range(layer[edges[part][0]] + 1, layer[edges[part][1]])
        for column in inside:
            columns[column].append(part)

    boxes: dict[Part, Box] = dict(nodes.items())
    boxes |= enumerate(operations)
    parts = list(boxes)
    y = heights(parts, edges, columns, boxes, gap)

    x, centres, halves = 0.0, [], []
    for column, members in enumerate(columns):
        # An operation is in the last column before its target; elsewhere its edge is a line.
        half = max(boxes[p].width for p in members if isinstance(p, str) or column == layer[edges[p][1]] - 1) / 2
        if column:
            climb = max(abs(y[a] - y[b]) for a, b in lines[column - 1])
            x += gap + min(0.15 * climb, 12.0)
        centres.append(x + half)
        halves.append(half)
        x += 2 * half
    places = {
        name: Place(centres[c], y[name], centres[c] - halves[c], centres[c] + halves[c]) for name, c in layer.items()
    }
    straight = []
    for number, (source, target) in enumerate(edges):
        first, last = layer[source] + 1, layer[target] - 1
        straight.append(Place(centres[last], y[number], centres[first] - halves[first], centres[last] + halves[last]))
    top = min(y[p] - boxes[p].above for p in parts)
    bottom = max(y[p] + boxes[p].below for p in parts)
    return Layout(places, straight, x, top, bottom, crossings)


def longest_paths(nodes: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Length of the longest path to each node, in edges; the last node comes after all others."""
    ranks = dict.fromkeys(nodes, 0)
    for _ in nodes:
        before = dict(ranks)
        for source, target in edges:
            ranks[target] = max(ranks[target], ranks[source] + 1)
        if ranks == before:
            ranks[nodes[-1]] = max(ranks.values())
            return ranks
    raise ValueError(f'the edges form a loop: {", ".join(f"{s} -> {t}" for s, t in edges)}')


def depth_first(nodes: Sequence[str], edges: Sequence[Edge], outgoing: Mapping[str, Sequence[int]]) -> list[Part]:
    """Put each node after the last edge into it, and its outgoing edges after it in the given order."""
    order: list[Part] = []
    waiting = {name: sum(target == name for _, target in edges) for name in nodes}

    def visit(name: str) -> None:
        order.append(name)
        for number in outgoing[name]:
            order.append(number)
            target = edges[number][1]
            waiting[target] -= 1
            if waiting[target] == 0:
                visit(target)

    for name in [name for name in nodes if not waiting[name]]:
        visit(name)
    return order


def untangle(
    nodes: Sequence[str], edges: Sequence[Edge], lines: Sequence[set[tuple[Part, Part]]]
) -> tuple[list[Part], int]:
    """The depth-first order with the fewest crossings among all, or many, orders of the edges at each node."""
    pairs = [pair for column in lines for pair in combinations(sorted(column, key=str), 2)]

    def crossings(order: Sequence[Part]) -> int:
        at = {part: i for i, part in enumerate(order)}
        return sum((at[a] - at[c]) * (at[b] - at[d]) < 0 for (a, b), (c, d) in pairs)

    outgoing = [[number for number, (source, _) in enumerate(edges) if source == name] for name in nodes]
    best: tuple[list[Part], int] | None = None
    for choice in islice(product(*map(permutations, outgoing)), TRIES):
        order = depth_first(nodes, edges, dict(zip(nodes, choice, strict=True)))
        count = crossings(order)
        if best is None or count < best[1]:
            best = order, count
        if not count:
            break
    assert best is not None  # each node has at least one order of its edges
    return best


def heights(
    parts: Sequence[Part],
    edges: Sequence[Edge],
    columns: Sequence[Sequence[Part]],
    boxes: Mapping[Part, Box],
    gap: float,
) -> dict[Part, float]:
    """y of each part: minimises the sum of climbs between nodes and their edges, with space for every box.

    The sum of absolute values keeps lines level and lets them climb once. Reweighted least squares approximates it,
    with the inverse of the last climbs as weights. An overlap is a spring a thousand times as stiff as a line.
    """
    at = {part: i for i, part in enumerate(parts)}
    climb = np.zeros((2 * len(edges), len(parts)))
    wish = np.zeros(len(climb))
    degree = [sum(edge[end] == name for edge in edges) for ends in edges for end, name in enumerate(ends)]
    for number, edge in enumerate(edges):
        for row, node in enumerate(edge, start=2 * number):
            climb[row, at[number]], climb[row, at[node]] = 1, -1
            # Lines climb where they leave or join others, long ones rather than short ones.
            wish[row] = 1 / degree[row] / sum(number in column for column in columns)
    neighbours = sorted({(at[a], at[b]) for column in columns for a, b in pairwise(column)})
    room, least = np.zeros((len(neighbours), len(parts))), np.zeros(len(neighbours))
    for row, (upper, lower) in enumerate(neighbours):
        room[row, upper], room[row, lower] = -1, 1
        least[row] = boxes[parts[upper]].below + gap + boxes[parts[lower]].above
    pin = np.zeros((len(parts), len(parts)))
    pin[0, 0] = 1
    y: np.ndarray = np.zeros(len(parts))
    for _ in range(200):
        lines = climb.T @ ((wish / np.maximum(np.abs(climb @ y), 0.5))[:, None] * climb)
        short = room @ y < least
        springs = room[short]
        before = y
        y = np.linalg.solve(lines + 1e3 * springs.T @ springs + pin, 1e3 * springs.T @ least[short])
        if np.abs(y - before).max() < 0.01:
            break
    return dict(zip(parts, y.tolist(), strict=True))
