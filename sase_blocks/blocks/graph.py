"""The graph of a block as plain data, for the drawings and the gallery, not for computing."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Edge:
    """One operation, from its input node to its output node.

    Args:
        source, target: names of nodes.
        label: the operation; empty for a plain connection.
        set_name: the operation's set in ``ops.EXTENDED_SETS``, if it was chosen from one.
    """

    source: str
    target: str
    label: str = ''
    set_name: str | None = None


@dataclass(frozen=True)
class Graph:
    """A block as nodes and operations, without loops.

    Args:
        nodes: name -> shape, such as ``'C x 1 x 1'``; the input 'x' first and the output 'y' last.
        edges: the operations.
        formula: the block in one line.

    Raises:
        ValueError: no 'x' first or 'y' last, or an edge between unknown nodes.
    """

    nodes: dict[str, str]
    edges: tuple[Edge, ...]
    formula: str

    def __post_init__(self) -> None:
        names = list(self.nodes)
        if not names or names[0] != 'x' or names[-1] != 'y':
            raise ValueError(f"a graph's nodes run from 'x' to 'y', got {names}")
        strangers = {name for edge in self.edges for name in (edge.source, edge.target)} - set(names)
        if strangers:
            raise ValueError(f'edges between unknown nodes: {", ".join(sorted(strangers))}; nodes: {names}')


MAP, CHANNEL, SPATIAL = 'C x H x W', 'C x 1 x 1', '1 x H x W'


def chain(graphs: list[Graph]) -> Graph:
    """Blocks in sequence as one graph: the output of each is the input of the next."""
    if not graphs:
        raise ValueError('there is no block to draw')
    nodes: dict[str, str] = {}
    edges: list[Edge] = []
    formulas = []
    for i, graph in enumerate(graphs):
        first, last = i == 0, i == len(graphs) - 1
        names = {name: f'{name}{i + 1}' if name in nodes else name for name in graph.nodes}
        names['x'] = 'x' if first else f'y{i}'
        names['y'] = 'y' if last else f'y{i + 1}'
        nodes |= {names[name]: shape for name, shape in graph.nodes.items()}
        edges += [replace(e, source=names[e.source], target=names[e.target]) for e in graph.edges]
        formulas.append(graph.formula if first else graph.formula.replace('y = ', 'then y = '))
    y = nodes.pop('y')  # must stay last
    return Graph({**nodes, 'y': y}, tuple(edges), ', '.join(formulas))
