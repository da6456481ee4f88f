"""TableVQA: accuracy on three kinds of questions on tables, and their unweighted mean."""

from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, Number
from examples.reproduce.subjects import Subject
from examples.reproduce.table1_accuracy import accuracies

SPLITS = ("VWTQ", "VWTQ-syn", "VTabFact")
OVERALL = "Overall"


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """The three accuracies; overall is their unweighted mean, as the paper's is."""
    (benchmark,) = subject.benchmarks(("tablevqa",))
    found, missing = accuracies(subject, benchmark, splits=SPLITS, n=n, seed=seed)
    column: dict[str, Cell] = {name: found[name] for name in SPLITS if name in found}
    parts = [cell.value for cell in column.values() if isinstance(cell, Number)]
    if len(parts) == len(SPLITS):
        column[OVERALL] = Number(sum(parts) / len(parts))
    return Measured({"": column}, (missing,))


EXHIBIT = Exhibit(
    name="tablevqa",
    title="Questions on tables",
    covers=("TableVQA table",),
    asks="Does imagination in words help with tables?",
    paper={
        "paper, Monet-7B": {"VWTQ": 55.3, "VWTQ-syn": 60.4, "VTabFact": 78.8, OVERALL: 64.8},
        "paper, CapImagine-7B": {"VWTQ": 60.9, "VWTQ-syn": 68.0, "VTabFact": 83.2, OVERALL: 70.7},
    },
    unknown=("decoding parameters, the judge, intervals", "the number of the table in the paper"),
    arithmetic=("overall is the unweighted mean of the three", "the text claims +6.1 points "
                "overall; the table's difference is +5.9"),
    stated="No organism reads tables; a config with folders of TableVQA measures it.",
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "capimagine"),
    benchmarks=("tablevqa",),
    unit="accuracy in %, 95% interval",
    measure=measure,
    arms=Arms(generations=1),
)  # fmt: skip
