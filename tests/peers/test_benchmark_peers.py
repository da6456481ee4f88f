"""The benchmark of peers: snippets run, a wrong peer is called wrong, the table says what is so."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import regressions
from benchmarks.overhead import Median
from benchmarks.peers import plain_torch, problem, worker
from benchmarks.peers import tasks as tasks_of
from benchmarks.peers.__main__ import asked, row
from benchmarks.peers.registry import PEERS
from benchmarks.peers.table import best, page
from benchmarks.peers.tasks import TASKS, Cannot, Task, difference, lines, told

RESULTS = problem.ROOT / "benchmarks" / "results"
BY_NAME = {task.name: task for task in TASKS}
HERE = ("ours", "nnsight_alone", "transformer_lens_tools", "captum_alone")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("case") / "case.pt"
    problem.write(file)
    return file


def measured(module: object, task: str, case: Path) -> dict[str, object]:
    """One task without timing, on three positions and a few examples."""
    own, other = (problem.read(case, BY_NAME[task].organism) for _ in range(2))
    for given in (own, other):
        given.positions = [5, 14, 21]
    return worker.measured(module, BY_NAME[task], own, other, rounds=0)  # type: ignore[arg-type]


def planted(**functions: object) -> SimpleNamespace:
    return SimpleNamespace(setup=plain_torch.setup, **functions)


@pytest.mark.parametrize("module", HERE)
@pytest.mark.parametrize("task", ["T1", "T2"])
def test_snippets_of_the_peers_that_are_here_are_right(module: str, task: str, case: Path) -> None:
    found = measured(_module(module), task, case)
    assert found["state"] == "right", found
    assert found["off"] <= found["allowed"]  # type: ignore[operator]


@pytest.mark.parametrize(("module", "task"), [("ours", "T4"), ("nnsight_alone", "T4")])
def test_latents_are_zeroed_while_the_answer_is_generated(
    module: str, task: str, case: Path
) -> None:
    assert measured(_module(module), task, case)["state"] == "right"


def test_a_tool_that_drops_the_picture_is_called_wrong(case: Path) -> None:
    """TransformerLens' own patching functions give numbers, of another question."""
    found = measured(_module("transformer_lens_tools"), "T3", case)
    assert found["state"] == "wrong"
    assert "picture is dropped" in str(found["why"])
    assert found["off"] > 100 * found["allowed"]  # type: ignore[operator]


def test_a_planted_wrong_peer_is_called_wrong(case: Path) -> None:
    def next_position(model: object, given: problem.Given) -> torch.Tensor:
        layer, position = given.cell
        given.cell = (layer, position + 1)
        return plain_torch.patch_cell(model, given)

    def unedited(model: object, given: problem.Given) -> torch.Tensor:
        with torch.no_grad():
            return given.model(**given.base).logits[0, -1]

    for wrong in (next_position, unedited):
        found = measured(planted(patch_cell=wrong), "T2", case)
        assert found["state"] == "wrong", wrong.__name__
        assert found["off"] > 100 * found["allowed"]  # type: ignore[operator]
    right = planted(patch_cell=plain_torch.patch_cell)
    assert measured(right, "T2", case)["state"] == "right"


@pytest.mark.parametrize(
    ("result", "state"),
    [
        (lambda right: right * float("nan"), "wrong"),
        (lambda right: right[None], "wrong"),
        (lambda right: right.tolist(), "wrong"),
        (lambda right: right + 1e-6, "right"),
    ],
)
def test_what_is_no_number_or_of_another_shape_is_wrong(
    result: object, state: str, case: Path
) -> None:
    def changed(model: object, given: problem.Given) -> object:
        return result(plain_torch.read_streams(model, given))  # type: ignore[operator]

    assert measured(planted(read_streams=changed), "T1", case)["state"] == state


def test_a_peer_that_fails_cannot_and_one_without_the_task_is_not_asked(case: Path) -> None:
    def fails(model: object, given: problem.Given) -> None:
        raise Cannot("there is no such thing in it")

    found = measured(planted(read_streams=fails), "T1", case)
    assert (found["state"], found["why"]) == ("cannot", "there is no such thing in it")
    assert measured(planted(), "T1", case)["state"] == "not asked"


def test_where_the_reference_itself_fails_the_peer_is_not_blamed(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: object, given: problem.Given) -> None:
        raise StopIteration

    monkeypatch.setattr(plain_torch, "read_streams", fails)
    found = measured(planted(read_streams=fails), "T1", case)
    assert found["state"] == "cannot"
    assert found["why"] == "plain torch fails there, too: StopIteration"


def test_failures_name_no_folder_of_a_machine() -> None:
    error = OSError("no file /somewhere/of/mine/x.py at 1/2\nsecond line")
    assert told(error) == "OSError: no file (a path) at 1/2"


def test_lines_are_those_of_the_function_and_of_what_it_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.py").write_text(
        "from benchmarks.peers.other import far\n"
        "from benchmarks.peers.problem import Given\n\n\n"
        'def near(x):\n    """Told."""\n    # why\n\n    return far(x)  # what\n\n\n'
        "@wrapped\ndef one(x):\n    import os\n    return near(near(x))\n\n\n"
        "def unused(x):\n    return x\n"
    )
    (tmp_path / "other.py").write_text("def far(x):\n    y = x\n    return y\n")
    monkeypatch.setattr(tasks_of, "HERE", tmp_path)
    assert lines("some", "one") == 3 + 2 + 3
    assert lines("some", "unused") == 2


def test_difference_is_the_largest() -> None:
    assert difference(torch.tensor([1.0, 5.0]), torch.tensor([1.5, 1.0])) == 4.0
    assert difference(None, torch.zeros(1)) == float("inf")


def test_memory_is_what_a_process_of_its_own_takes_beyond_the_first() -> None:
    held: list[bytes] = []

    def taking(size: int) -> Callable[[], None]:
        return lambda: held.append(b"x" * size)

    more = worker.risen(taking(2**20), taking(64 * 2**20))
    if more is None:
        pytest.skip("there is no fork here")
    assert 60 * 2**20 < more < 80 * 2**20
    less = worker.risen(lambda: len(b"x" * (64 * 2**20)), lambda: len(b"x" * 2**20))
    assert less == 0
    assert not held, "what the other process holds came back"


def test_every_peer_says_which_tasks_it_does() -> None:
    for peer in PEERS:
        if not peer.alone:
            module = _module(peer.module)
            assert {task.name for task in TASKS if hasattr(module, task.does)}
        else:
            assert "==" in peer.requirements.read_text()
            assert peer.requirements.read_text().startswith("torch==")


def test_only_chooses_peers_and_tasks() -> None:
    chosen = [
        (peer.module, task.name)
        for peer in PEERS
        for task in TASKS
        if asked(peer, task, ["captum", "T2", "T3"])
    ]
    assert chosen == [("captum_alone", "T2"), ("captum_alone", "T3")]


def _results() -> dict[str, object]:
    task, peers = BY_NAME["T1"], PEERS[:4]
    founds = [
        {"state": "right", "off": 0.0, "seconds": {"peer": [1.0] * 9, "plain": [1.0] * 9}},
        {"state": "right", "off": 1e-7, "seconds": {"peer": [4.0] * 9, "plain": [2.0] * 9},
         "memory": 3 * 2**20},
        {"state": "wrong", "off": 0.5, "why": "it forgets the | picture"},
        {"state": "cannot", "why": "KeyError: 'x'"},
    ]  # fmt: skip
    return {
        "date": "2026-01-01", "cpu": "a processor", "cores": 2, "python": "3", "models": "m",
        "load": 1.0,
        "setup": {"plain torch": 2}, "versions": {"plain torch": {"torch": "2"}},
        "rows": [row(peer, task, one) for peer, one in zip(peers, founds, strict=True)],
    }  # fmt: skip


def test_the_table_says_what_the_results_say() -> None:
    text = page(_results())
    rows = [line for line in text.splitlines() if line.startswith("| T1")]
    assert [line.split(" | ")[1] for line in rows] == [peer.name for peer in PEERS[:4]]
    assert "| right | 1e-07 | 2.00 | 2.00..2.00, n = 9 | 3.0 MiB |" in rows[1]
    assert "does it wrong: it forgets the \\| picture | 5e-01 |" in rows[2]
    assert "cannot: KeyError: 'x' |" in rows[3]
    assert "least time: ImagineLens" in text
    assert "least memory (3.0 MiB): ImagineLens" in text


def test_a_peer_that_wins_is_told() -> None:
    results = _results()
    rows = results["rows"]
    assert isinstance(rows, list)
    fast = {**rows[1], "peer": "captum", "lines": 1, "memory": 2**20,
            "ratio": {"value": 1.2, "low": 1.1, "high": 1.3}}  # fmt: skip
    told_of = best([*rows, fast])[0]
    assert told_of == (
        "T1: least time: captum; fewest lines (1): captum; least memory (1.0 MiB): captum"
    )
    tied = {**fast, "ratio": {"value": 1.9, "low": 1.0, "high": 2.1}, "lines": rows[1]["lines"]}
    assert best([*rows, tied])[0].startswith("T1: least time: ImagineLens = captum; fewest lines")


def test_an_environment_in_which_the_reference_differs_is_named() -> None:
    results = _results()
    rows = results["rows"]
    assert isinstance(rows, list)
    for one in rows:
        one["allowed"] = 0.1
    assert "With the versions" not in page(results)
    rows[2]["allowed"] = 0.2
    assert f"With the versions of {PEERS[2].name} plain torch itself gives" in page(results)


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    results = json.loads((RESULTS / "peers.json").read_text())
    assert (RESULTS / "peers.md").read_text() == page(results)
    assert {one["peer"] for one in results["rows"]} == {peer.name for peer in PEERS}
    ours = [one for one in results["rows"] if one["peer"] == "ImagineLens"]
    assert [one["state"] for one in ours] == ["right"] * len(TASKS)
    for one in results["rows"]:
        assert one["state"] != "wrong" or one["why"], f"{one['peer']} {one['task']}: wrong, but how"


def test_tolerances_are_shares_of_the_reference() -> None:
    task = Task("T", "f", "w", tolerance=0.1)
    assert task.allowed(torch.tensor([-20.0, 1.0])) == pytest.approx(2.0)
    assert Task("T", "f", "w", tolerance=0.1, absolute=True).allowed(torch.tensor([9.0])) == 0.1


def _module(name: str) -> ModuleType:
    if name == "captum_alone":
        pytest.importorskip("captum")
    return importlib.import_module(f"benchmarks.peers.{name}")


# regressions


def test_a_ratio_that_grew_is_reported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: Median(1.0, 0.9, 1.1) for name in ("same", "worse", "better", "gone")}
    now = {"same": Median(1.1, 1.0, 1.2), "worse": Median(2.0, 1.5, 3.0),
           "better": Median(0.5, 0.4, 0.6)}  # fmt: skip
    monkeypatch.setattr(regressions, "measured", lambda rounds: now.items())
    text = regressions.report(before, rounds=1)
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:5]]
    assert names == ["worse", "better", "same"]
    assert text.splitlines()[2].endswith("slower |")
    assert text.splitlines()[-1] == "not measured: gone"


def test_a_benchmark_that_fails_does_not_fail_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rounds: int) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(regressions, "measured", broken)
    assert "out of luck" in regressions.report({}, rounds=1)


def test_committed_ratios_are_found_by_the_names_that_are_measured() -> None:
    names = list(regressions.committed())
    assert any(name.startswith("forward, thin twin: run_with_hooks") for name in names)
    assert [name for name in names if name.endswith("of peers")] == [
        f"{task} of peers" for task in regressions.CHEAP
    ]
