"""Figure 3: how the data of CapImagine are made. Nothing to measure on a model."""

from examples.reproduce.exhibit import Exhibit

EXHIBIT = Exhibit(
    name="fig3",
    title="From interleaved chains to words: the data",
    covers=("Figure 3",),
    asks="How are chains with pictures rewritten into imagination in words, and which are kept?",
    paper={
        "paper": {"chains at first (Monet-SFT)": "125k", "of these Visual-CoT": "94.88%",
                  "kept after filtering": "17k (about 14%)"},
    },
    reports=("Qwen3-VL-4B captions the highlighted region (zoom-in chains) or describes what an "
             "edit of the picture reveals (marking chains); the whole chain is then rewritten so "
             "that captions fit; a judge drops chains whose answer conflicts with the new "
             "observation, and ambiguous questions",),
    unknown=("all prompts, the model of the refinement and of the judge, thresholds",
             "the exact count behind 17k", "the schema of the released data"),
    stated="The recipe in examples/capimagine makes such data, counts them at each stage in a data "
           "card, and runs in miniature on organisms.",
)  # fmt: skip
