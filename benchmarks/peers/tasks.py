"""The tasks, what counts as right, and how many lines a user writes for one."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent


class Cannot(Exception):
    """What a peer has nothing for, found by looking."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        does: the function of a peer's module.
        organism: the model it is about.
        tolerance: how far from plain torch is still right: a share of the largest number of the
            reference, or, where `absolute`, as it stands.
        rounds: how often it is timed.
    """

    name: str
    does: str
    what: str
    organism: str = "direct"
    tolerance: float = 1e-4
    absolute: bool = False
    rounds: int = 6

    def allowed(self, reference: torch.Tensor) -> float:
        """How far a right result may be from the reference."""
        return self.tolerance * (1.0 if self.absolute else float(reference.abs().max()))


TASKS = (
    Task("T1", "read_streams", "read the residual stream behind every block", rounds=12),
    Task("T2", "patch_cell", "patch one cell with a state of another picture", rounds=12),
    Task("T3", "sweep_cells", "patch every layer x position, effect on a logit difference"),
    Task(
        "T4", "zero_latents", "zero the latent steps while the answer is generated",
        organism="latent-content", rounds=7,
    ),
    Task("T5", "attribute_image", "integrated gradients of the answer for the picture's tokens"),
    # another estimator of the same accuracy: within three standard errors, or nearly so
    Task(
        "T6", "probe_states", "a linear probe with shuffled labels beside it", tolerance=0.1,
        absolute=True, rounds=3,
    ),
)  # fmt: skip


def difference(found: object, reference: torch.Tensor) -> float:
    """The largest difference of two results; infinite where they have not the same shape.

    >>> difference(torch.ones(2), torch.zeros(2)), difference(torch.ones(2), torch.zeros(3))
    (1.0, inf)
    """
    if not isinstance(found, torch.Tensor) or found.shape != reference.shape:
        return float("inf")
    off = float((found.detach().double() - reference.detach().double()).abs().max())
    return off if off == off else float("inf")


def told(error: BaseException) -> str:
    """What a failure says, in one line, without folders of a machine."""
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    line = re.sub(r"(?<![\w.])/[\w.~+-]+(?:/[\w.~+-]+)*", "(a path)", line)
    if isinstance(error, Cannot):
        return line[:220]
    return ": ".join(filter(None, (type(error).__name__, line)))[:220]


def lines(module: str, function: str) -> int:
    """How many lines of code a user writes: the function and what it calls of these files.

    Blank lines, comments, docstrings and imports are not counted, nor is `problem.py`.

    >>> lines("plain_torch", "read_streams") > lines("plain_torch", "setup") == 2
    True
    """
    return sum(_counted(*place) for place in _reached(module, function, set()))


def _reached(module: str, name: str, seen: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The function and those of our own files that it names, and so on."""
    tree = ast.parse((HERE / f"{module}.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    elsewhere = {
        alias.asname or alias.name: (node.module.rpartition(".")[2], alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks.peers")
        for alias in node.names
    }
    if name not in functions:
        place = elsewhere.get(name)
        if place is None or place[0] in ("problem", "tasks"):
            return seen
        return _reached(*place, seen)
    if (module, name) in seen:
        return seen
    seen.add((module, name))
    for node in ast.walk(functions[name]):
        if isinstance(node, ast.Name) and node.id in {*functions, *elsewhere}:
            _reached(module, node.id, seen)
    return seen


def _counted(module: str, name: str) -> int:
    text = (HERE / f"{module}.py").read_text()
    tree = ast.parse(text)
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    told = {
        number
        for inner in ast.walk(node)
        if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner) is not None
        for number in range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1)
    } | {
        number
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
        for number in range(inner.lineno, (inner.end_lineno or 0) + 1)
    }
    rows = text.splitlines()
    return sum(
        1
        for number in range(first, (node.end_lineno or first) + 1)
        if number not in told and rows[number - 1].split("#")[0].strip()
    )
