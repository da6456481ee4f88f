"""What a config would cost: generations, forwards, a rough time. It needs no weights."""

from collections.abc import Sequence

from examples.reproduce.config import Config
from examples.reproduce.exhibit import Exhibit

FORWARD = 10.0  # tokens that cost as much as a forward over a whole reply: a guess


def forecast(config: Config, exhibits: Sequence[Exhibit]) -> str:
    """How much each exhibit takes, roughly: replies are as long as the config guesses."""
    run = config.run
    reply = min(run["reply_tokens"], run["max_new_tokens"])
    lines = [f"{config.heading}: with {reply} tokens a reply, which is a guess"]
    whole = 0.0
    for one in exhibits:
        sets = [name for name in one.benchmarks if name in config.data]
        if not sets:
            wanted = " or ".join(one.benchmarks)
            lines.append(f"  {one.name:<12} left out: [data] names no {wanted}")
            continue
        questions = asked(config, one, sets)
        generations = (one.arms.generations + _rows(config) * one.do_z) * questions
        forwards = one.arms.forwards * questions
        together = 1 if one.size == "timing" else run["batch_size"]
        tokens = generations * reply + forwards * FORWARD
        seconds = run["seconds_per_token"] * tokens / together
        whole += seconds
        lines.append(
            f"  {one.name:<12} {questions:>6} questions of {', '.join(sets)}: {generations} "
            f"generations, {forwards} forwards, {_time(seconds)}"
        )
    lines.append(
        f"  together {_time(whole)} at {run['seconds_per_token']:g} s for a token of "
        f"{run['batch_size']} replies, which is a guess, too; nothing was loaded or run"
    )
    return "\n".join(lines)


def asked(config: Config, one: Exhibit, sets: Sequence[str]) -> int:
    """How many questions an exhibit asks."""
    n = config.run[one.size]
    if one.size == "similarity":  # n in all, as many of each
        n = -(-n // len(sets))
    return sum(config.size(name, n) for name in sets)


def _rows(config: Config) -> int:
    """How many edits the table of do(Z) has, with the draws of noise."""
    how = config.do_z
    if not how:
        return 0
    return len(how["tau"]) + 2 * len(how["sigma"]) * how["draws"] + len(how["mu"])


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
