"""Any module as `torch.export` sees it, in pieces that run operation by operation with the module's own weights.

What a later piece needs of an earlier one is found in the graph: values that follow the images travel, batch first;
all others (position tables, masks, sizes) are made again.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .modes import attributes_kept, fill_shared_caches, gradients_kept, plain_tensors, twin
from .segments import State
from .sequential_split import HIDDEN, LOGITS, PIXELS, Piece, chain_points, listed, logits_of, one_place, wrong_order


@dataclass(frozen=True)
class Source:
    """Where a tensor of a trace is found when it runs.

    Args:
        module (`nn.Module`, *optional*), name (`str`, *optional*): A parameter, buffer or attribute of a module.
        constant (`Tensor`, *optional*): What it was while tracing, where it may be gone or of another shape by now.
    """

    module: nn.Module | None = None
    name: str = ""
    constant: Tensor | None = None

    def __call__(self) -> Tensor:
        """The tensor as it is now."""
        if self.constant is None:
            return cast(Tensor, getattr(self.module, self.name))
        now = getattr(self.module, self.name, None)
        fits = isinstance(now, Tensor) and (now.shape, now.dtype) == (self.constant.shape, self.constant.dtype)
        return cast(Tensor, now) if fits else self.constant


@dataclass
class TracedPiece:
    """A part of a traced module, run operation by operation with the module's own weights.

    Args:
        code (`fx.GraphModule`): Takes weights, then tensors of the state; gives those of the next one.
        weights (`list[Source]`): Where each weight is to be found.
        inputs (`list[str]`): Names of the tensors it takes from the state.
        outputs (`list[str]`): Names of those it gives.
    """

    code: fx.GraphModule
    weights: list[Source]
    inputs: list[str]
    outputs: list[str]

    def __call__(self, state: State) -> State:
        """Run the operations."""
        weights = [source() for source in self.weights]
        # not called as a module: an exporter asks of each module it meets where in the model it stands
        found = self.code.forward(*weights, *(state[name] for name in self.inputs))
        return State(dict(zip(self.outputs, found, strict=True)))


@dataclass(frozen=True)
class Tap:
    """Where a submodule has just run: the place in the graph and the value that it gave."""

    place: int
    value: fx.Node


class _Record:
    """What ran while a module was traced. No list of the module itself, which `torch.export` would put back."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.running: list[str] = []


class _Tapped(nn.Module):
    """A module that also gives what some of its submodules give (by default all), marked in the graph as they do."""

    def __init__(self, module: nn.Module, names: Sequence[str] | None):
        super().__init__()
        self.module, self.marked = module, names
        self.training = module.training
        self.record = _Record()

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        marks: list[Tensor] = []
        record = self.record
        record.names.clear()
        record.running.clear()

        def begin(name: str) -> None:
            record.running.append(name)

        def end(name: str, output: Any) -> None:
            record.running.pop()
            if self.marked is not None and name not in self.marked:
                return
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if tensors:
                record.names.append(name)
                # a new name for the value as it is now: later changes in place are of the old one
                marks.append(torch.ops.aten.alias(tensors[0]))

        hooks = []
        for name, submodule in self.module.named_modules():
            if name:
                hooks.append(submodule.register_forward_pre_hook(lambda *_, name=name: begin(name)))
                hooks.append(submodule.register_forward_hook(lambda *given, name=name: end(name, given[2])))
        buffers = dict(self.module.named_buffers())
        try:
            logits = logits_of(self.module(pixel_values))
            # what was not there before is made again each time
            now = dict(self.module.named_buffers())
            set_anew = [name for name, buffer in buffers.items() if now.get(name) is not buffer]
            if set_anew:
                raise TypeError(f"the buffer {set_anew[0]!r} is set anew, which is lost; change it in place (copy_)")
            return [logits, *marks]
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Traced:
    """A module as a list of operations, and where in it each submodule ends.

    Args:
        module (`nn.Module`): The module.
        root (`fx.GraphModule`): Holds what operations of a higher order refer to.
        nodes (`list[fx.Node]`): The operations, in the order in which they run.
        logits (`fx.Node`): The answer.
        taps (`dict[str, list[Tap]]`): Of each name, one for each time that it runs.
        sources (`dict[fx.Node, Source]`): Where the weights are.
        pixels (`fx.Node`): The images.
    """

    module: nn.Module
    root: fx.GraphModule
    nodes: list[fx.Node]
    logits: fx.Node
    taps: dict[str, list[Tap]]
    sources: dict[fx.Node, Source]
    pixels: fx.Node
    place: dict[fx.Node, int] = field(init=False)
    follows: set[fx.Node] = field(init=False)
    base: dict[fx.Node, fx.Node] = field(init=False)
    writes: dict[fx.Node, list[fx.Node]] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.follows = {self.pixels}
        self.base, self.writes = {}, {}
        for node in self.nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            is_size = isinstance(node.meta.get("val"), torch.SymInt)
            if not is_size and (random or any(given in self.follows for given in node.all_input_nodes)):
                self.follows.add(node)
            for given, is_write in _aliases(node):
                base = self.base[node] = self.base_of(given)
                if is_write:
                    self.writes.setdefault(base, []).append(node)
                if is_write and node in self.follows:
                    self.follows |= {base, *(each for each in self.base if self.base[each] is base)}

    def base_of(self, node: fx.Node) -> fx.Node:
        """The value whose memory a node looks at."""
        return self.base.get(node, node)

    def shortest(self) -> list[str]:
        """Names of the submodules that have run, one for each place, in that order."""
        names: dict[int, str] = {}
        for name, taps in self.taps.items():
            place = self.next_place(taps[-1].place)
            if place not in names or name.count(".") < names[place].count("."):
                names[place] = name
        return [names[place] for place in sorted(names)]

    def next_place(self, place: int) -> int:
        """The next operation that does something, which is the same for all names of one place."""
        while place < len(self.nodes) and self.nodes[place].op != "call_function":
            place += 1
        return place

    def obstacle(self, name: str) -> str | None:
        """Why the module cannot be cut after a submodule; `None` where it can."""
        taps = self.taps.get(name, [])
        if not taps:
            return "it does not run, or gives no tensor"
        if len(taps) > 1:
            return f"it runs {len(taps)} times for one answer"
        tap = taps[0]
        if self.place[self.logits] < tap.place:
            return "nothing but the answer is left after it"
        if tap.value not in self.follows:
            return "what it gives does not depend on the images"
        if isinstance(tap.value.target, torch._ops.HigherOrderOperator):
            return f"it runs within {str(tap.value.target)!r}, which is one operation of the trace"
        travelling = self.travelling(tap)
        for node in [tap.value, *travelling]:
            shape = _shape(node)
            if shape is None:
                return f"{_described(node)} goes on after it and is no tensor"
            if not shape or not self._is_batch(shape[0]):
                return f"{_described(node)} goes on after it, and its first dimension is not the batch"
        bases = [self.base_of(node) for node in travelling]
        for base in set(bases):
            if bases.count(base) > 1 and any(self.place[write] >= tap.place for write in self.writes.get(base, [])):
                return f"{_described(base)} goes on after it under two names and is changed in place"
        return None

    def _is_batch(self, size: Any) -> bool:
        batch = self.pixels.meta["val"].shape[0]
        return isinstance(size, torch.SymInt) and size.node.expr == batch.node.expr

    def travelling(self, tap: Tap) -> list[fx.Node]:
        """The values that follow the images and are needed after a cut, in the order in which they were made."""
        needed: dict[fx.Node, None] = {}
        for node in self._between(tap.place, len(self.nodes)):
            for given in node.all_input_nodes:
                if given in self.follows and self.place.get(given, -1) < tap.place:
                    needed[given] = None
        return sorted(needed, key=lambda node: self.place.get(node, -1))

    def _between(self, start: int, stop: int) -> list[fx.Node]:
        """The operations between two places, and earlier ones that make again what does not follow the images."""
        found: set[fx.Node] = set()
        missing = self.nodes[start:stop]
        while missing:
            node = missing.pop()
            if node in found or self._is_batch_size(node):
                continue
            found.add(node)
            again = node.all_input_nodes
            if self.base_of(node) in self.place:
                # what was written into a value that is made again is written again
                again = [*again, *self.writes.get(self.base_of(node), [])]
            missing += [each for each in again if each not in self.follows and self.place.get(each, start) < start]
        return sorted(found, key=self.place.__getitem__)

    def _is_batch_size(self, node: fx.Node) -> bool:
        size = node.meta.get("val")
        return isinstance(size, torch.SymInt) and self._is_batch(size)

    def piece(self, start: int, stop: int, given: dict[str, fx.Node], wanted: dict[str, fx.Node]) -> TracedPiece:
        """The operations between two places as a function of weights and of the state's tensors."""
        nodes = self._between(start, stop)
        used = {given for node in nodes for given in node.all_input_nodes}
        weights = [source for source in self.sources if source in used]
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in [*weights, *given.values()]}
        batch_size = graph.call_function(torch.ops.aten.sym_size.int, (copies[next(iter(given.values()))], 0))
        copies |= {node: batch_size for node in self.nodes if self._is_batch_size(node)}
        for node in given.values():
            if not set(self.writes.get(self.base_of(node), ())).isdisjoint(nodes):
                # the exit before, and whoever gave the images, still read it
                copies[node] = graph.call_function(torch.ops.aten.clone.default, (copies[node],))
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
        graph.output([copies[node] for node in wanted.values()])
        graph.eliminate_dead_code()
        return TracedPiece(
            code=fx.GraphModule(self.root, graph),
            weights=[self.sources[source] for source in weights],
            inputs=list(given),
            outputs=list(wanted),
        )


def traced_pieces(module: nn.Module, after: Sequence[str], images: Tensor) -> list[Piece]:
    """The pieces of a module between some of its submodules; arguments and errors are those of `cut`."""
    traced = trace(module, images, after)
    for name in after:
        reason = traced.obstacle(name)
        if reason is not None:
            nearest = _nearest(trace(module, images), name)
            raise ValueError(f"after: {name!r} cannot be cut after: {reason}; {nearest}")
    pieces: list[Piece] = []
    start, given = 0, {PIXELS: traced.pixels}
    for name, earlier in zip(after, ["", *after], strict=False):
        tap = traced.taps[name][0]
        if tap.place < start:
            raise ValueError(wrong_order(name, earlier))
        if earlier and traced.next_place(tap.place) == traced.next_place(start):
            raise ValueError(one_place(name, earlier))
        wanted = {HIDDEN: tap.value}
        # an exporter names what it meets after its operation, so that the name alone could be there twice
        wanted |= {f"from_{node.name}": node for node in traced.travelling(tap) if node is not tap.value}
        pieces.append(traced.piece(start, tap.place, given, wanted))
        start, given = tap.place, wanted
    return [*pieces, traced.piece(start, len(traced.nodes), given, {LOGITS: traced.logits})]


def _aliases(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The values whose memory an operation's result may share, and whether it writes there."""
    if node.target is operator.getitem:
        yield cast(fx.Node, node.args[0]), False
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, given in zip(node.target._schema.arguments, node.args, strict=False):
            if isinstance(given, fx.Node) and argument.alias_info is not None:
                yield given, argument.alias_info.is_write


def _shape(node: fx.Node) -> tuple | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _described(node: fx.Node) -> str:
    """An operation's result as an error names it: the operation, the shape, and where in the module it is."""
    shape, stack = _shape(node), list((node.meta.get("nn_module_stack") or {}).values())
    made = cast(fx.Node, node.args[0]) if node.target is operator.getitem else node
    name = str(made.target).removeprefix("aten.").partition(".")[0]
    where = stack[-1][0].removeprefix("module").removeprefix(".") if stack else ""
    # the only open size is that of the batch
    sizes = [size if isinstance(size, int) else re.sub(r"s\d+", "batch", str(size)) for size in shape or ()]
    of_shape = "" if shape is None else f" {sizes}"
    return f"the result of {name!r}{of_shape}" + (f" in {where!r}" if where else "")


def _nearest(traced: Traced, name: str) -> str:
    """Where a module can be cut instead, for an error."""
    able = [other for other in traced.shortest() if traced.obstacle(other) is None]
    if not able:
        return f"no place in {type(traced.module).__name__} can"
    if name not in traced.taps:
        return f"places that can: {listed(able)}"
    place = traced.taps[name][-1].place
    before = [other for other in able if traced.taps[other][0].place <= place][-1:]
    after = [other for other in able if traced.taps[other][0].place > place][:1]
    return f"the nearest places that can: {listed([*before, *after])}"


def trace(module: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> Traced:
    """A module's operations, and where in them its submodules (by default all) end.

    A copy of the module with the same weights is traced: what `forward` keeps on the way (a cache, say) is no real
    tensor then.

    Raises:
        ValueError: It cannot be traced, with the reason and places that need no tracing.
    """
    copied = twin(module)
    tapped = _Tapped(copied, names)
    try:
        with (
            plain_tensors(images.device),
            attributes_kept(copied),
            gradients_kept(copied),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            fill_shared_caches(module, images)
            exported = torch.export.export(
                tapped, (images.clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    # tracing runs the user's code, and torch.export raises errors of many kinds
    except Exception as error:
        running = tapped.record.running
        where = repr(running[-1]) if running else type(module).__name__
        able = chain_points(module)
        instead = f"places that need no tracing: {listed(able)}" if able else "no place in it can be cut without"
        reason = f"{type(error).__name__}: " + str(error).strip().partition("\n")[0][:300]
        if "Constraints violated (batch)" in reason:
            reason = "the size of the batch is read as a plain number, as by len(x); x.shape[0] can stay open"
        raise ValueError(f"after: {where} cannot be traced by torch.export ({reason}); {instead}") from error
    return _read(module, tapped.record.names, exported)


def _read(module: nn.Module, names: Sequence[str], exported: torch.export.ExportedProgram) -> Traced:
    """The operations of an exported program, the marks taken out and their places kept."""
    signature, graph = exported.graph_signature, exported.graph
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    sources: dict[fx.Node, Source] = {}
    nodes: list[fx.Node] = []
    pixels = None
    logits, *marks = next(node for node in graph.nodes if node.op == "output").args[0]
    named = dict(zip(marks, names, strict=True))
    taps: dict[str, list[Tap]] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in held:
            path, _, name = held[node.name].removeprefix("module.").rpartition(".")
            sources[node] = Source(module.get_submodule(path), name)
        elif node.op == "placeholder" and node.name in constants:
            # of a tensor in a plain attribute, the attribute's name
            path, _, name = constants[node.name].removeprefix("module.").rpartition(".")
            constant = exported.constants[constants[node.name]]
            owner = dict(module.named_modules()).get(path) if constants[node.name].startswith("module.") else None
            sources[node] = Source(owner, name, constant)
        elif node.op == "placeholder":
            pixels = node
        elif node in named:
            taps.setdefault(named[node], []).append(Tap(len(nodes), node.args[0]))
        elif node.op != "output" and not _is_check(node):
            nodes.append(node)
    return Traced(module, exported.graph_module, nodes, logits, taps, sources, cast(fx.Node, pixels))


def _is_check(node: fx.Node) -> bool:
    """Whether an operation only states what held while tracing."""
    return str(node.target).startswith(("aten._assert", "aten.sym_constrain_range"))
