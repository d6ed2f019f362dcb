"""linears and the row-wise work around them  →  one fxquant::rows

Dynamic quantization works on one row at a time, as norms, activations and sums do. Everything between two attentions
then runs on a few rows in cache, and no full-size float tensor is written but what others read.
"""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxquant._compat import FakeTensorMode
from fxquant.capture import remove_dead_code
from fxquant.passes.fuse.row_nodes import is_alias, is_linear, is_row_wise, row_operands, rows_of
from fxquant.passes.fuse.row_program import Refusal, RowProgram, write_program

CACHE_BYTES = 800 << 10  # of a core's cache for a block of rows: kArenaBudget of lowering/cpu/program.cpp
BLOCK_ROWS = 32  # with fewer rows a block the weights pass by so often that separate linears are faster


@dataclass(frozen=True)
class Chain:
    """One group of row-wise nodes: fused, or left as it was for the reason in ``sentence``."""

    node_name: str
    title: str
    sentence: str | None = None


def fuse_rows(gm: fx.GraphModule, fake_mode: FakeTensorMode) -> list[Chain]:
    """Fuse every group that holds quantized linears and something else; says what was fused and what was not."""
    chains = []
    for group in find_groups(gm.graph):
        title, name = _title(group), next(node.name for node in group if is_linear(node))
        results = _results(group)
        try:
            _check_linears(group)
            anchor = _make_room(group, results)
            program = write_program(group, results)
            _check_cache(program, group)
        except Refusal as refusal:
            chains.append(Chain(name, title, str(refusal)))
            continue
        _replace(group, program, anchor, fake_mode)
        chains.append(Chain(name, title))
    remove_dead_code(gm.graph)
    gm.recompile()
    return chains


def find_groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Maximal convex groups of connected row-wise nodes with equal row counts, each in graph order.

    A node's level grows by one where a path leaves row-wise work, so nodes of one level can have no path between them
    that leaves the level: groups of one level are convex. Linears that read one value belong together too.
    """
    written = _written(graph)
    levels: dict[fx.Node, tuple[int, str | None]] = {}
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    readers: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in graph.nodes:
        row_wise = is_row_wise(node) and not written.intersection((node, *node.all_input_nodes))
        if row_wise and is_alias(node):
            row_wise = node.args[0] in leader  # a view of something else is an input
        key = rows_of(node) if row_wise else None
        level = max((_level_after(*levels[source], key) for source in node.all_input_nodes), default=0)
        levels[node] = (level, key)
        if not row_wise:
            continue
        leader[node] = node
        joined = [source for source in row_operands(node) if source in leader and levels[source] == (level, key)]
        if is_linear(node):
            joined.append(readers.setdefault((row_operands(node)[0], level), node))
        for other in joined:
            leader[find(node)] = find(other)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(find(node), []).append(node)
    return [group for group in groups.values() if _is_worth_it(group)]


def _check_linears(group: Sequence[fx.Node]) -> None:
    """Refuse a group that gains nothing from staying in cache."""
    if sum(map(is_linear, group)) < 2:
        raise Refusal("one quantized linear only: there is nothing to keep in cache between two of them")


def _check_cache(program: RowProgram, group: Sequence[fx.Node]) -> None:
    """Refuse rows so wide that a core's cache holds only a few of them; fewer rows than a block need less."""
    count = rows_of(group[-1])
    rows = min(BLOCK_ROWS, int(count)) if count is not None and count.isdecimal() else BLOCK_ROWS
    needed = rows * program.row_bytes()
    if needed > CACHE_BYTES:
        raise Refusal(
            f"{rows} rows of it take {needed >> 10} KiB of scratch memory, and {CACHE_BYTES >> 10} KiB stay in a core's cache"
        )


def _level_after(level: int, key: str | None, next_key: str | None) -> int:
    return level if key is None or key == next_key else level + 1


def _is_worth_it(group: Sequence[fx.Node]) -> bool:
    return any(map(is_linear, group)) and sum(not is_alias(node) for node in group) > 1


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Every value that may share memory with something that an operator writes to; order matters for those."""
    written: set[fx.Node] = set()
    pending = [source for node in graph.nodes if _writes(node) for source in (node, *node.all_input_nodes)]
    while pending:
        node = pending.pop()
        if node in written or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        written.add(node)
        pending += [user for user in node.users if is_alias(user) or not is_row_wise(user)]
        pending += node.all_input_nodes if not is_row_wise(node) or is_alias(node) else []
    return written


def _writes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.meta.get("val"), torch.Tensor) and node.target is not operator.getitem  # not index arithmetic


def _results(group: Sequence[fx.Node]) -> list[fx.Node]:
    """The values that are read outside. A view with an outside reader stays in the graph and reads from outside."""
    members = set(group)
    outside: set[fx.Node] = set()
    results: list[fx.Node] = []
    for node in reversed(group):
        if any(user not in members or user in outside for user in node.users):
            (outside.add if is_alias(node) else results.append)(node)
    return results[::-1]


def _make_room(group: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Node:
    """The first node that reads a result; what the group reads is moved before it where it stands later."""
    members = set(group)
    position = {node: i for i, node in enumerate(group[0].graph.nodes)}
    readers = [user for node in results for user in node.users if user not in members or is_alias(user)]
    if not readers:
        raise Refusal("nobody reads the result")
    anchor = min(readers, key=position.__getitem__)
    late: set[fx.Node] = set()
    pending = [source for node in group for source in node.all_input_nodes if source not in members]
    while pending:
        node = pending.pop()
        if position[node] < position[anchor] or node in late:
            continue
        if _writes(node) or node in members:
            raise Refusal("an operand is made by something that cannot be moved before the first reader of a result")
        late.add(node)
        pending += node.all_input_nodes
    for node in sorted(late, key=position.__getitem__):
        anchor.prepend(node)
    return anchor


def _replace(group: Sequence[fx.Node], program: RowProgram, anchor: fx.Node, fake_mode: FakeTensorMode) -> None:
    graph = anchor.graph
    target = torch.ops.fxquant.rows.default
    arguments = program.arguments()
    values = [[part.meta["val"] if isinstance(part, fx.Node) else part for part in list_] for list_ in _lists(arguments)]
    with fake_mode, torch.no_grad():
        made = target(*values)
    first = next(node for node in group if is_linear(node))
    with graph.inserting_before(anchor):
        fused = graph.call_function(target, arguments)  # type: ignore[arg-type]
        fused.meta = {**first.meta, "val": made}
        items = [graph.call_function(operator.getitem, (fused, k)) for k in range(len(made))]
    for item, node, value in zip(items, program.results, made, strict=True):
        item.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(item)
    for node in reversed(group):
        if not node.users:
            graph.erase_node(node)


def _lists(arguments: Sequence[object]) -> Iterator[list[object]]:
    for values in arguments:
        assert isinstance(values, list)
        yield values


def _title(group: Sequence[fx.Node]) -> str:
    names = [node.target.overloadpacket.__name__ for node in group if not is_alias(node)]  # type: ignore[union-attr]
    counts = Counter("linear" if name in ("linear_dynamic", "linear_static") else name for name in names)
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + "  →  one row program"
