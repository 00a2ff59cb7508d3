"""What the words of the pages mean, for the box of terms at the top of each page."""

import re

# term -> (how a page may write it, what it means)
TERMS = {
    "prior's answer": (r"prior's answers?|\bP\(prior|the prior\b",
                       "what a reader of text alone would expect; the usual answer"),
    "counterfactual": (r"counterfactual", "images that break the habit: the usual answer is wrong"),
    "natural": (r"natural images", "images that mostly agree with the habit"),
    "P(true answer), P(prior's answer)": (
        r"\bP\((true|prior)", "probability that the model gives that answer, as a whole"),
    "chosen, rejected": (r"\brejected\b", "the two answers of a preference pair: the annotated "
                         "one, and one that shows the model's bias"),
    "positives": (r"\bpositives?\b", "annotated rows that give chosen answers"),
    "base": (r"\bbase\b", "the model before preference training"),
    "bpo, bpo_weaken": (r"\bbpo(_weaken)?\b", "trained on all pairs; on those alone whose rejected "
                        "answer comes from a weakened image"),
    "sft": (r"\bsft\b", "supervised fine-tuning on every annotated answer once"),
    "sft_matched": (r"\bsft_matched", "supervised fine-tuning on the chosen answers of bpo's pairs "
                    "(sft_matched_weaken: of bpo_weaken's): what a method adds to its own is the "
                    "contrast"),
    "SFT, DPO": (r"\bDPO\b", "fine-tuning on good answers; preference optimization on pairs"),
    "CHAIRi, CHAIRs": (r"\bCHAIR[is]\b", "share of the objects that captions name, or of the "
                       "captions, that are wrong: objects not in the image; less is better"),
    "cover": (r"\b[Cc]over\b", "share of an image's objects that its caption names; more is "
              "better"),
    "POPE": (r"\bPOPE\b", "share of yes/no questions about an object's presence answered right; "
             "chance is one half"),
    "nats": (r"\bnats\b", "natural logarithms of probability: −0.7 is one half, −2.3 a tenth"),
    "log-prob": (r"\blog-?prob", "logarithm of a probability: nearer to 0 is likelier"),
    "interval": (r"\[[−+\d.]+, ", "95 % interval, in square brackets: where the number would lie "
                 "with other images"),
}


def used(text: str) -> dict[str, str]:
    """The terms that a page's text has, and their meanings."""
    return {term: meaning for term, (pattern, meaning) in TERMS.items() if re.search(pattern, text)}
