"""All exhibits, in the order of the paper, then what is beyond it."""

from examples.reproduce import (
    ablations,
    fig2_similarity,
    fig2a_loop,
    fig2c_probe,
    fig3_data,
    fig4_text_similarity,
    fig5_decode_time,
    matched,
    mechanism,
    monet_do_z,
    table1_accuracy,
    table3_text_do_z,
    table4_do_z,
    tablevqa,
    verdicts,
    where,
)
from examples.reproduce.exhibit import Exhibit

_MODULES = (
    fig2a_loop, fig2_similarity, monet_do_z, fig2c_probe, table4_do_z, fig3_data, table1_accuracy,
    tablevqa, ablations, fig4_text_similarity, table3_text_do_z, fig5_decode_time, mechanism,
    verdicts, matched, where,
)  # fmt: skip
EXHIBITS: dict[str, Exhibit] = {module.EXHIBIT.name: module.EXHIBIT for module in _MODULES}

# What no source at hand describes: neither is left out silently.
NOT_KNOWN = (
    "Figure 1 and table 2 are described by no source that was at hand when this was written, nor "
    "is it known how the paper numbers its tables of TableVQA and of the ablations."
)
# The points of the critique that the exhibits answer.
CRITIQUE = {
    "i": "latents get an uninformative replacement, words a misleading one; nothing neutral for "
         "words, nothing targeted for latents",
    "ii": "no paired tests, intervals or tests of equivalence",
    "iii": "a raw cosine is confounded by a large common vector",
    "iv": "accuracies are over all examples, those that emit no latent included",
    "v": "only the block of latents as a whole, no step or layer by itself",
    "vi": "one tau, an unknown sigma, and zeros lie far from real latents",
}  # fmt: skip
