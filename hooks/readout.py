"""From the logits of a script to what its answer shows: the part that metrics are functions of."""

from collections.abc import Callable, Sequence

import torch

from imaginelens.hooks.metrics import Readout, Targets
from imaginelens.hooks.script import Script


def answer_columns(script: Script, targets: Targets) -> list[int]:
    """The columns whose logits decide the answers' tokens; one, unread, if no row has an answer."""
    width = max((len(ids) for ids in targets.base_ids), default=1) or 1
    columns = {start + k for start in script.read_at if start >= 0 for k in range(width)}
    return sorted(c for c in columns if c < script.tokens.width) or [0]


def read_out(
    script: Script,
    targets: Targets,
    logits: torch.Tensor,
    columns: Sequence[int],
    decode: Callable[[int], str],
    unedited: Readout | None,
) -> Readout:
    """Read the answers of a script from its logits at `columns`, (example, column, vocab).

    The answers reported are what the deciding positions' logits say.
    """
    place = {column: i for i, column in enumerate(columns)}
    deciding: list[torch.Tensor] = []
    log_probs: list[torch.Tensor] = []
    answers: list[str | None] = []
    for row, start in enumerate(script.read_at):
        ids, at = targets.base_ids[row], targets.differ_at[row]
        if start < 0 or not ids:
            deciding.append(torch.full_like(logits[row, 0], float("nan")))
            log_probs.append(logits.new_tensor(float("nan")))
            answers.append(None)
            continue
        deciding.append(logits[row, place[start + at]])
        steps = torch.stack([logits[row, place[start + k]] for k in range(len(ids))])
        chosen = steps.log_softmax(-1)[torch.arange(len(ids)), list(ids)]
        log_probs.append(chosen.sum())
        answers.append(_said(targets, row, int(deciding[-1].argmax()), decode))
    return Readout(
        torch.stack(deciding).cpu(), torch.stack(log_probs).cpu(), tuple(answers), targets, unedited
    )


def _said(targets: Targets, row: int, token: int, decode: Callable[[int], str]) -> str | None:
    """The answer that a deciding token stands for."""
    if token == targets.base_token[row]:
        return targets.base_answers[row]
    if token == targets.source_token[row]:
        return targets.source_answers[row]
    return decode(token)
