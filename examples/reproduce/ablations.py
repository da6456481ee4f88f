"""The ablations of CapImagine: without rewriting, without filtering, Monet on the same data."""

from examples.reproduce.exhibit import Exhibit

EXHIBIT = Exhibit(
    name="ablations",
    title="Ablations of the data",
    covers=("ablation table",),
    asks="Is it the words, or the data that were kept?",
    paper={
        "paper, CapImagine": {"V*": 85.9, "HR-Bench-4K": 74.1, "HR-Bench-8K": 70.7},
        "paper, without rewriting": {"V*": 82.7, "HR-Bench-4K": "74.1 [B only]",
                                     "HR-Bench-8K": 69.8},
        "paper, without filtering": {"V*": 82.7, "HR-Bench-4K": "72.5 [B only]",
                                     "HR-Bench-8K": 69.3},
        "paper, Monet on the same 17k": {"V*": "79.6 [B only]", "HR-Bench-4K": "70.7 [B only]",
                                         "HR-Bench-8K": "67.9 [B only]"},
    },
    reports=("without rewriting, one <think_image> token stands for each picture; without "
             "filtering, all 125k chains are taken with such tokens",),
    unknown=("learning rate and epochs of every one of them", "whether the best checkpoint was "
             "chosen by the benchmarks themselves"),
    arithmetic=("on V* 85.9 against 82.7 is 164 against 158 of 191 questions, inside the 95% "
                "interval of either (5.3 points to each side)",),
    stated="Each needs a model trained anew on 8 GPUs: examples/capimagine makes the data with its "
           "switches for no rewriting and no filtering, and trains; examples/latent_baselines "
           "trains in latents on the same data. Set the trained folder as [model] id of "
           "capimagine-7b.toml (monet-7b.toml for Monet), and run table1.",
)  # fmt: skip
