"""What `run_miniature.sh` made, as one page that needs nothing else, and as one file of numbers.

    python -m examples.capimagine.report runs/miniature

Writes `report.html` and `summary.json` into the folder. What was asked for stands first, each with
what was found, met or not; what is only measured, such as accuracies of latent models, follows.
"""

import argparse
import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.capimagine.card import UNKNOWN
from examples.capimagine.chains import Chain, load
from examples.capimagine.effects import Compared
from imaginelens.view.markup import Markup, element
from imaginelens.view.tables import scrollable

TITLE = "CapImagine in miniature"
SUBTITLE = (
    "Words or latents, taught from the same treasure hunts to the same tiny model, and put through "
    "the same interventions. The path is that of arXiv 2602.22766; its numbers are of 7B models, "
    "and none here reproduces one. What is known here and not there: every caption's truth, and "
    "the answer that each edit should lead to."
)
TEXT, DIRECT = "text", "direct"
FOLLOWED = ("wrong card", "first step")  # targeted edits whose answers nothing else gives away
LAST_SHAPE = ("wrong shape", "wrong conclusion")  # followed or not, that is a finding
ACCURATE, FOLLOWS, CHANGES, BELOW = 0.95, 0.9, 0.05, 0.4
NOT_KNOWN = (
    *UNKNOWN,
    "learning rate, epochs, and by what the best checkpoint was chosen (of the rest, Monet's "
    "defaults or ours: see each option's help)",
    "the prompt that leads captions toward a wrong conclusion, and how that conclusion was chosen",
    "the constant tensor, the noise and the seeds of do(Z) on latents",
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
_STYLE = """
main > section { background: var(--card); border: 1px solid var(--line); border-radius: 16px;
  padding: 26px; margin-top: 20px; }
main > section > * + * { margin-top: 16px; }
h2 { font-size: 21px; line-height: 1.3; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; white-space: normal;
  border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; min-width: 18ch; max-width: 36ch; }
td { min-width: 10ch; max-width: 34ch; }
.met { font-weight: 640; }
figure img { max-width: 100%; background: #fff; border-radius: 8px; }
.chain img { image-rendering: pixelated; height: 84px; margin-right: 8px; border-radius: 4px; }
ul { list-style: disc; padding-left: 20px; font-size: 14px; }
.chain p, li { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Check:
    """Something asked for: what was found, and whether that will do."""

    what: str
    wanted: str
    found: str
    met: bool


# ---- numbers -------------------------------------------------------------------------------------


def summary(out: Path) -> dict[str, Any]:
    """All numbers of a folder that the script filled.

    Raises:
        SystemExit: a stage is missing.
    """
    try:
        studies = compared(out)
        causal = studies.to_json()
        names = [path.name for path in sorted((out / "models").iterdir())]
        models = {name: _model(out, name, causal) for name in dict.fromkeys((TEXT, DIRECT, *names))}
        found = {
            "settings": (out / "settings").read_text().strip(),
            "data": _data(out),
            "models": models,
            "arms": causal["arms"],
            "records": causal["records"],
            "notes": causal["notes"],
            "sham": sham(studies),
            "seconds": {path.name: _read(path) for path in sorted((out / "done").iterdir())},
            "versions": {name: version(name) for name in ("imaginelens", "torch", "transformers")},
        }
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing; run_miniature.sh makes it, and goes on where it stopped"
        ) from error
    return {"checks": [asdict(check) for check in checks(found)], **found}


def compared(out: Path) -> Compared:
    """The models whose imagination was edited, the text model first."""
    found = sorted(path.parent.name for path in out.glob("causal/*/causal.json"))
    names = dict.fromkeys((TEXT, *found))
    return Compared.read([out / f"causal/{name}/causal.json" for name in names])


def sham(studies: Compared) -> dict[str, dict[str, int]]:
    """By context, in how many of all answers putting imagination back as it was made a difference.

    In free context it must make none. Fixed context reads the first answer of a reply, where free
    context reads the last: a reply with several, or with none in its place, differs by that.
    """
    found = {context: {"differ": 0, "of": 0} for context in studies.contexts}
    for model in studies.models:
        for outcome in model.outcomes:
            if outcome.arm == "sham":
                pairs = zip(outcome.answers, model.unedited, strict=True)
                found[outcome.context]["differ"] += sum(after != own for after, own in pairs)
                found[outcome.context]["of"] += len(model.unedited)
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _data(out: Path) -> dict[str, Any]:
    card, planted = _read(out / "data/card.json"), set(_read(out / "raw/planted.json"))
    lines = (out / "data/refused.jsonl").read_text(encoding="utf-8").splitlines()
    refused = {json.loads(line)["id"] for line in lines}
    return {
        "card": card,
        "spoiled": len(planted),
        "spoiled and refused": len(planted & refused),
        "sound and refused": len(refused - planted),
    }


def _model(out: Path, name: str, causal: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of one model; decode seconds are of one example at a time."""
    scores = _read(out / f"answers/{name}.scores.json")
    rows = {row["do"]: row for row in scores["rows"] if row["split"] == "all"}
    studied: dict[str, Any] = next((m for m in causal["models"] if m["name"] == name), {})
    taken = _read(out / f"done/train-{name}")
    return {
        "accuracy": rows["none"]["accuracy"],
        "imagined": rows["none"]["emission"]["value"],
        "do(Z)": {do: row["accuracy"] for do, row in rows.items() if do != "none"},
        "updates": _updates(out / "runs" / name),
        "training, CPU seconds": round(taken["user"] + taken["system"], 1),
        "decode seconds": studied.get("seconds"),
        "tokens": rows["none"]["tokens"],
    }


def _updates(run: Path) -> int:
    """Updates of a training: of its stages together, or of its one."""
    if stages := sorted(run.glob("*/done.json")):
        return sum(_read(stage)["updates"] for stage in stages)
    return int(_read(run / "run.json")["updates"])


def checks(found: Mapping[str, Any]) -> Iterator[Check]:
    """What this recipe is to show, and what it shows."""
    data, models = found["data"], found["models"]
    yield Check(
        "the filter refuses the chains that were spoiled, and no other",
        "all, and none",
        f"{data['spoiled and refused']} of {data['spoiled']}, and {data['sound and refused']}",
        data["spoiled and refused"] == data["spoiled"] and not data["sound and refused"],
    )
    text, direct = (models[name]["accuracy"] for name in (TEXT, DIRECT))
    least = f"at least {ACCURATE}"
    yield Check("accuracy with imagination in words", least, share(text), text["value"] >= ACCURATE)
    yield Check(
        f"accuracy without, after {models[DIRECT]['updates']} updates as well",
        f"lower by at least {BELOW}",
        share(direct),
        text["value"] - direct["value"] >= BELOW,
    )
    yield Check(
        "imagination put back as it was, in words and in latents",
        "no answer changes",
        "{differ} of {of} answers, in free context".format_map(found["sham"]["free"]),
        found["sham"]["free"]["differ"] == 0 < found["sham"]["free"]["of"],
    )
    same = record_of(found["records"], TEXT, "paraphrase")
    if same is not None:
        yield Check(
            "answers that change when imagined words are paraphrased",
            f"at most {CHANGES}",
            share(same["changed"]),
            same["changed"]["value"] <= CHANGES,
        )
    for arm in FOLLOWED:
        aimed = record_of(found["records"], TEXT, arm)
        if aimed is not None:
            followed = aimed["followed"]["followed"]
            yield Check(
                f"answers that follow imagined words when edited: {arm}",
                f"at least {FOLLOWS}",
                share(followed),
                followed["value"] >= FOLLOWS,
            )


def record_of(
    records: Sequence[Mapping[str, Any]], model: str, arm: str, context: str = "free"
) -> Mapping[str, Any] | None:
    """What one arm did to one model; None where there is no such arm."""
    wanted = (model, arm, context)
    found = (r for r in records if (r["model"], r["arm"], r["context"]) == wanted)
    return next(found, None)


def share(found: Mapping[str, Any]) -> str:
    """A share with its interval.

    >>> share({"value": 0.5, "low": 0.4, "high": 0.6, "n": 90})
    '0.500 [0.400, 0.600], n 90'
    """
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}], n {found['n']}"


# ---- the page ------------------------------------------------------------------------------------


def render(found: Mapping[str, Any], out: Path) -> str:
    """The page: no script, no network, no second file, and nothing that is not escaped."""
    style = resources.files("imaginelens.view").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", TITLE),
        element("style", Markup(style + _STYLE)),
    )
    main = element(
        "main",
        element(
            "header",
            element("p", "ImagineLens", class_="brand"),
            element("h1", TITLE),
            element("p", SUBTITLE, class_="subtitle"),
        ),
        _checked(found),
        _chains(found["data"], out),
        _models(found["models"]),
        *(_arms(found, context) for context in found["sham"]),
        _figures(out / "causal"),
        _unknown(found["notes"]),
        _provenance(found),
    )
    return f"<!doctype html>\n{element('html', head, element('body', main), lang='en')}\n"


def _checked(found: Mapping[str, Any]) -> Markup:
    rows = [
        (check["what"], check["wanted"], check["found"], "met" if check["met"] else "NOT met")
        for check in found["checks"]
    ]
    notes = [
        f"Edited in the last caption's shape alone ({arm}), the answer is the edited shape in "
        f"{share(edited['followed']['content'])}, and stays in {share(edited['followed']['own'])}."
        for arm in LAST_SHAPE
        if (edited := record_of(found["records"], TEXT, arm)) is not None
    ]
    shape = record_of(found["records"], TEXT, "wrong shape")
    if shape is not None and shape["followed"]["own"]["low"] > 0.5:
        notes.append(
            "So what is read from captions is mostly which card was found; the shape on it is then "
            "looked up in the picture. Of the wrong conclusion, which is the paper's intervention, "
            "that is true here because the stand-in for its language model edits that shape."
        )
    return element(
        "section",
        element("h2", "What was asked for, and what was found"),
        _table(("", "asked for", "found (95% interval)", ""), rows, "what was asked for"),
        *(element("p", note, class_="note") for note in notes),
    )


def _chains(data: Mapping[str, Any], out: Path) -> Markup:
    """The data card, and one chain before and after."""
    card = data["card"]
    first = ("read", str(card["read"]["chains"]), "")
    rows = [first] + [
        (name, str(stage["left"]), ", ".join(f"{k}: {n}" for k, n in stage["refused"].items()))
        for name, stage in card["stages"].items()
    ]
    paid = ", ".join(
        f"{stage}: {cost['replies']}" for stage, cost in card["cost in the ledger"].items()
    )
    kept = ", ".join(f"{n} {subset}" for subset, n in card["kept by subset"].items())
    lines = [
        f"kept: {card['kept']} of {card['read']['records']} ({kept})",
        f"replies paid for, by stage: {paid}; the endpoint was `{card['model']}`, the local server "
        "that stands in for a model and reads the pixels",
        f"chains whose answer stands in a caption before the last: "
        f"{card['answer in a caption before the last']}",
        "prompts: " + ", ".join(f"{name} ({h[:12]})" for name, h in card["prompts"].items()),
    ]
    return element(
        "section",
        element("h2", "Data: raw chains with pictures become chains with words"),
        _table(("stage", "chains left", "refused"), rows, "chains left after each stage"),
        element("ul", *(element("li", line) for line in lines)),
        _example(out),
    )


def _example(out: Path) -> Markup | None:
    """The first chain whose reply zooms in, raw and rewritten."""
    raw = {chain.id: chain for chain in load(out / "read/chains.jsonl")}
    new = next((c for c in load(out / "data/chains.jsonl") if c.subset == "Visual_CoT"), None)
    if new is None:
        return None
    old = raw[new.id]
    pictures = [*old.pictures(old.prompt), *old.pictures(old.reply)]
    return element(
        "div",
        element("h3", f"One of them, {new.id}: {new.question}"),
        element("p", *(element("img", src=_address(path), alt=path.name) for path in pictures)),
        element("p", element("b", "raw: "), _said(old)),
        element("p", element("b", "rewritten: "), _said(new)),
        class_="chain",
    )


def _said(chain: Chain) -> str:
    return " ".join(part if isinstance(part, str) else "[picture]" for part in chain.reply)


def _models(models: Mapping[str, Mapping[str, Any]]) -> Markup:
    dos = list(dict.fromkeys(do for model in models.values() for do in model["do(Z)"]))
    heads = ("model", "accuracy", "imagines", *(f"do({do})" for do in dos), "updates",
             "training, CPU s", "decode, s", "tokens")  # fmt: skip
    rows = [
        (
            name,
            share(model["accuracy"]),
            f"{model['imagined']:.0%}",
            *(f"{model['do(Z)'][do]['value']:.3f}" if do in model["do(Z)"] else "-" for do in dos),
            str(model["updates"]),
            f"{model['training, CPU seconds']:.0f}",
            "-" if model["decode seconds"] is None else f"{model['decode seconds']:.3f}",
            f"{model['tokens']:.0f}",
        )
        for name, model in models.items()
    ]
    notes = (
        "Held-out hunts, which chose no checkpoint; free runs, in which a model opens its "
        "imagination itself. All start from the same captioning model, its vision tower frozen. "
        "Answering with the shape that most cards show is right in 0.37 of hunts.",
        "do(Z) replaces all latents by their mean, by noise of their mean and spread, by zeros: "
        "what the paper does to latents. One seed, and short: what happened, not a ranking.",
        "Decode seconds are of one example at a time, from the first token to the last, medians.",
    )
    return element(
        "section",
        element("h2", "Models: words, no words, latents"),
        _table(heads, rows, "accuracies and costs"),
        *(element("p", note, class_="note") for note in notes),
    )


def _arms(found: Mapping[str, Any], context: str) -> Markup:
    """A row for each arm, a column for each model."""
    records = [record for record in found["records"] if record["context"] == context]
    names = list(dict.fromkeys(record["model"] for record in records))
    rows = [
        (
            f"{arm['kind']}: {arm['name']} (words: {arm['words']}; latents: {arm['latents']})",
            *(_cell(record_of(records, name, arm["name"], context)) for name in names),
        )
        for arm in found["arms"]
        if any(record["arm"] == arm["name"] for record in records)
    ]
    meaning = {
        "free": "The model goes on by itself behind what was edited.",
        "fixed": "The text behind it stays as it was, and one forward reads the answer.",
    }[context]
    note = (
        "Here a reply's first answer is read, and in free context its last. Replies with several, "
        "as models of a short training write them, differ by that: so do {differ} of {of} where "
        "imagination was put back as it was (control: sham)."
    ).format_map(found["sham"].get(context, {"differ": 0, "of": 0}))
    return element(
        "section",
        element("h2", f"The same arms on words and on latents, {context} context"),
        element("p", f"{meaning} Cells: change of accuracy with its 95% interval; answers that "
                "changed; in pairs where readings differ, which answer was given.", class_="note"),
        element("p", note, class_="note") if context == "fixed" else None,
        _table(("arm", *names), rows, f"arms, {context} context"),
    )  # fmt: skip


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "-"
    change, parts = record["change"], list[str]()
    if change is not None:
        ends = f"[{change['low']:+.2f}, {change['high']:+.2f}]"
        parts.append(f"{change['value']:+.2f} {ends} {change['verdict']}")
    if record["changed"] is not None:
        parts.append(f"changed {record['changed']['value']:.0%}")
    told = [f"{name} {f['value']:.0%}" for name, f in record["followed"].items() if f["n"]]
    if told:
        n = next(iter(record["followed"].values()))["n"]
        parts.append(f"{', '.join(told)} (of {n})")
    if record["touched"] < 1:
        parts.append(f"touched {record['touched']:.0%}")
    again = record["again"]
    if again is not None and not math.isnan(again) and again > 0:
        parts.append(f"imagined again {again:.0%}")
    return "; ".join(parts)


def _figures(folder: Path) -> Markup:
    figures = [
        element("figure", element("img", src=_address(path), alt=f"{path.stem}: as in the table"))
        for path in sorted(folder.glob("effects-*.png"), reverse=True)
    ]
    return element("section", element("h2", "Change of accuracy under each arm"), *figures)


def _unknown(notes: Sequence[str]) -> Markup:
    return element(
        "section",
        element("h2", "To be read with it"),
        element("ul", *(element("li", note) for note in notes)),
        element("h3", "What the paper leaves unknown"),
        element("ul", *(element("li", what) for what in NOT_KNOWN)),
    )


def _provenance(found: Mapping[str, Any]) -> Markup:
    seconds = found["seconds"]
    cpu = {stage: s["user"] + s["system"] for stage, s in seconds.items()}
    rows = [(stage, f"{cpu[stage]:.0f}", f"{s['wall']:.0f}") for stage, s in seconds.items()]
    rows.append(("all", f"{sum(cpu.values()):.0f}", "-"))
    about = [found["settings"], ", ".join(f"{k} {v}" for k, v in found["versions"].items())]
    return element(
        "section",
        element("h2", "How it was made"),
        element("ul", *(element("li", line) for line in about)),
        _table(("stage", "CPU s", "wall s"), rows, "seconds"),
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Markup:
    head = element("thead", element("tr", *(element("th", h, scope="col") for h in heads)))
    body = [
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell, class_="met" if cell == "met" else None) for cell in rest),
        )
        for first, *rest in rows
    ]
    return scrollable(head, element("tbody", *body), label=label)


def _address(picture: Path) -> Markup:
    """A picture as an address that holds it whole."""
    return Markup("data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode())


def main() -> None:
    """Write the page and the numbers, and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what run_miniature.sh filled")
    folder = parser.parse_args().folder
    found = summary(folder)
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    models = compared(folder)
    (folder / "causal/table.md").write_text(models.table() + "\n", encoding="utf-8")
    for context in models.contexts:
        models.figure(context).save(folder / f"causal/effects-{context}.png")
    part = folder / ".report.html.part"
    part.write_text(render(found, folder), encoding="utf-8", newline="\n")
    part.replace(folder / "report.html")
    for check in found["checks"]:
        mark = "met    " if check["met"] else "NOT met"
        print(f"  {mark}  {check['what']}: {check['found']} ({check['wanted']})")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
