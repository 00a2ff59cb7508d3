"""What notebook 2 shows of pairs: how they were made, one by hand, what was kept, what is wrong."""

from typing import Any

from pandas import DataFrame

from bpo.models.weakening import WEAKENINGS
from bpo.pairs import audit, candidates, selection
from bpo.pairs import stage as pairs
from bpo.params import SOURCES, PairGeneration
from bpo.reports import cards, figures, page
from bpo.reports.cards import Shown
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.files import LineFile
from bpo.study.results import Estimate

CHECKS = {"equal": "share equal to the annotation",
          "truth_right": "share in truth right",
          "is_prior": "share with the prior's answer",
          "of_noise": "share that talks of the noise",
          "longer": "share longer than the chosen answer",
          "length_gap": "words more than the chosen answer",
          "characters_gap": "characters a word more",
          "commas_gap": "commas a word more",
          "type_token_gap": "type-token ratio (different words a word) more",
          "sentences_gap": "sentences more",
          "near_duplicates": "share nearly equal to the chosen answer"}
DRAWN = list(CHECKS)[:9]  # by way of weakening
TELLING = ("equal", "truth_right", "is_prior", "longer")
SIDES = {"candidates": "as made", "kept": "as kept"}


def weakenings(p: PairGeneration) -> Shown:
    """The ways of weakening an image, from their registry."""
    frame = DataFrame([{"mode": name, "the model answers from": way.meaning,
                        "takes a step": "yes" if way.stepped else "no",
                        "branches": 1 if way.mix is None else 2}
                       for name, way in WEAKENINGS.items()])
    return page.folded(
        f"Ways of weakening the image; in this run: {', '.join(p.weaken_modes)}",
        page.table(frame, "Ways of weakening the image",
                   "two branches: the clean and the weakened image against each other"))


def weakening_strip(p: PairGeneration, result: stages.Result, number: int) -> Shown:
    """A row's image as each way of weakening leaves it."""
    pictures = pairs.weakened_pictures(p, result, number)
    notes = ["", *("beside the clean one" if WEAKENINGS[name].mix else "alone"
                   for name in list(pictures)[1:])]
    return page.figure(
        figures.noise_strip(list(pictures.values()), list(pictures), notes),
        alt="One image, clean and as each way of weakening leaves it",
        caption=f"One image as each way of weakening leaves it (noise and fade at step "
                f"{p.weaken_steps[0]}, "
                f"crops of {p.crop_share:.0%} of each side), and whether the model answers from "
                "that picture alone or from both, one against the other.")


def by_hand(line: dict[str, Any], pictures: dict[str, Any], sampled: list[str]) -> Shown:
    """A card of a row: clean and weakened picture, the chosen answer, those sampled by hand."""
    return cards.pair_gallery([{
        **pictures, "question": line["prompt"][-1]["content"], "category": line["category"],
        "chosen": line["chosen"], "rejected": [{"source": "sampled", "text": t} for t in sampled]}])


def agreement(p: PairGeneration, line: dict[str, Any], sampled: list[str]) -> Shown:
    """What was sampled by hand for the first view, beside what the stage stored."""
    view = candidates.views(p)[0]
    if p.decoder:
        return page.say("A server decoded the stored answers: none is sampled here.")
    stored = [c["text"] for c in line["candidates"] if (c["source"], c["mode"]) == (
        "weakened", view.mode) and (c.get("step", 0), c["draw"]) == (view.step, view.draw)]
    if not stored:
        return page.say("Sampled by hand: “{s}”; this run stores no such answers.",
                        s=" | ".join(sampled))
    return page.say("Sampled by hand: “{s}”; stored: “{t}”. {r}", s=" | ".join(sampled),
                    t=" | ".join(stored), r="They are the same." if sampled == stored else
                    "They differ: batches of another make-up may differ in a logit's last bits.")


def outcomes(result: stages.Result, number: int, choice: selection.Choice) -> Shown:
    """What becomes of each candidate of a row by a choice made by hand, and by the stage's."""
    pair = LineFile(result.folder / "pairs.jsonl")[number]
    dropped = [d for d in LineFile(result.folder / "dropped.jsonl") if d["id"] == pair["id"]]
    frame, stored = (DataFrame([(c["source"], c["mode"], c["text"], c.get("reason", "kept"))
                                for c in lines], columns=["source", "mode", "answer", "by hand"])
                     for lines in ([*choice.kept, *choice.dropped], [*pair["rejected"], *dropped]))
    return page.table(frame.assign(stored=stored["by hand"]),
                      "What becomes of the row's candidates")


def sources(found: dict[str, Any]) -> list[str]:
    """The sources that candidates came from, in the kit's order."""
    return [s for s in SOURCES if s in found]


def kept(found: dict[str, Any]) -> Shown:
    """One row a source and category: how many annotated rows, and how many rejected answers."""
    frame = DataFrame([{"source": source, "category": category, "rows": n["rows"],
                        "kept": n["kept"], "kept a row": f"{n['kept'] / n['rows']:.2f}"}
                       for source in sources(found)
                       for category, n in found[source]["by_category"].items()])
    return page.table(frame, "Rows and kept rejected answers",
                      f"{found['rows']} annotated rows, {found['positives']} with at least one "
                      "rejected answer")


def dropped(found: dict[str, Any]) -> Shown:
    """One row a reason: candidates that were dropped, rows that could not be used."""
    counts = [(f"{s} candidate", *count) for s in sources(found)
              for count in found[s]["dropped"].items()]
    counts += [("row of the data", *count) for count in found["rows_skipped"].items()]
    frame = DataFrame(counts, columns=["what", "reason", "how many"])
    return page.folded(f"What was dropped, and why: {frame['how many'].sum()}", page.table(
        frame, "What was dropped, and why", "Rows that cannot be used are listed one by one "
        "in rejected_rows.jsonl, candidates in dropped.jsonl. A text model's replies "
        "are in injected.jsonl as they came; one is cut off at max_new_tokens."))


def scores(p: PairGeneration) -> Shown:
    """The scores that `select` may weigh, and what each means."""
    used = (f"{p.select or 'none, the first made is kept'}; {p.keep} kept of each source, mode and "
            "step")
    return page.folded(f"Scores that select can weigh; in this run: {used}", page.table(
        DataFrame(selection.SCORES.items(), columns=["score", "meaning"]), "Scores"))


def checks(found: dict[str, Any]) -> Shown:
    """One row a measure, two columns a source: the candidates as made, and those kept."""
    frame = DataFrame([{"measure": label} | {
        f"{s}, {words}": _text(found[s].get(name, {}).get(side)) for s in sources(found)
        for side, words in SIDES.items()} for name, label in CHECKS.items()])
    note = (f"{found['audited']} positives, drawn by seed where there are more; 95 % bootstrap "
            "intervals over images.")
    if len(sources(found)) > 1:
        note += (f" Two sources gave the same answer in {found['sources_agree']:.0%} of the "
                 "positives that have answers of several.")
    short = frame[frame["measure"].isin([CHECKS[name] for name in TELLING])]
    whole = page.table(frame, "The whole audit", note)
    return _shortened(page.table(
        short.reset_index(drop=True), "Audit of the rejected answers: as made by the model, and as "
        "kept for training", note), f"All {len(frame)} measures", whole)


def ways(result: stages.Result) -> Shown:
    """A panel a measure, a row a way of weakening with its step."""
    rows = results.read(result.folder).query("category == 'audit' and metric in @DRAWN")
    rows = rows[rows["method"].str.startswith("weakened ")]
    if rows.empty:
        return page.say("This run has no answers from weakened images.")
    rows = rows.assign(label=rows["method"].str.removeprefix("weakened "),
                       side=rows["split_or_benchmark"])
    measured = dict(list(rows.groupby("metric", sort=False)))
    drawn = page.figure(
        figures.made_and_kept({CHECKS[m]: measured[m] for m in DRAWN if m in measured}),
        alt="Measures of weakened answers as made and as kept, by way of weakening and step",
        caption=f"Weakened answers by way and step, of {result.metrics['audited']} positives with "
                "95 % bootstrap intervals over images. Good negatives are often the prior's "
                "answer, seldom right, silent about the noise, and near 0 in length and style. "
                "Compare steps as made: without select, what is kept of a later step comes from "
                "rows whose earlier ones gave nothing. What is not drawn needs a truth file.")
    if rows["label"].nunique() > 1:
        return drawn
    return page.folded(f"This run weakened in one way, {rows['label'].iloc[0]}: its audit as a "
                       "figure", drawn)


def prior_shares(found: dict[str, Any]) -> list[str]:
    """How many of each source's kept answers are the prior's, where the truth file names it."""
    return [f"{_counted(of_source)} of the {source} pairs" for source in sources(found)
            if (of_source := found[source].get("is_prior", {}).get("kept"))]


def longer(found: dict[str, Any]) -> Shown:
    """How many kept answers are longer than the chosen one, by source and category."""
    shares = {f"{s}, {category}": share for s in sources(found)
              for category, measured in found[s]["categories"].items()
              if (share := measured["longer"]["kept"])}
    return page.say("Longer than the chosen answer: {shares}.", shares="; ".join(
        f"{where}: {_counted(share) if share['value'] else 'none'}"
        for where, share in shares.items()))


def length_gaps(result: stages.Result) -> Shown:
    """A histogram a source: how many words more than the chosen answer each kept one has."""
    found, gaps = result.metrics, {}
    for pair in LineFile(result.folder / "pairs.jsonl"):
        for answer in pair["rejected"]:
            gaps.setdefault(answer["source"], []).append(
                audit.gap("length_gap", answer["text"], pair["chosen"]))
    means = [f"{s}: mean {_text(found[s]['length_gap']['kept'])}, n = {len(gaps[s])}"
             for s in sources(found) if s in gaps]
    return page.figure(
        figures.histograms({s: gaps[s] for s in sources(found) if s in gaps},
                           xlabel="words, rejected minus chosen", ylabel="pairs"),
        alt="Histogram of the length of rejected answers minus that of the chosen ones, by source",
        caption=f"Words of each kept rejected answer minus those of its chosen one. "
                f"{'; '.join(means)}; 95 % bootstrap intervals over the images of the audit.")


def shortcuts(found: dict[str, Any]) -> Shown:
    """One row a source and category: how well a text-only classifier tells chosen from rejected."""
    rows = []
    for source in sources(found):
        for side, words in SIDES.items():
            whole = (found["shortcut"].get(source) or {}).get(side)
            for category, part in {"all": whole, **(whole or {}).get("by_category", {})}.items():
                rows.append({"source": source, "answers": words, "category": category,
                             "pairs": part["pairs"] if part else "–",
                             "accuracy from the text": _text(part and part["text"]),
                             "from its length alone": _text(part and part["length"])})
    title = "A text-only classifier on chosen against rejected"
    whole = page.table(DataFrame(rows), title, note := (
        "logistic regression on words and word pairs, five folds by image; 95 % bootstrap "
        "intervals over images"))
    short = page.table(DataFrame(rows).query("category == 'all'").drop(columns="category")
                       .reset_index(drop=True), title, note)
    return _shortened(short, "By category", whole)


def displacement(found: dict[str, Any]) -> Shown:
    """One row a source: CHES of the kept pairs; empty where candidates were not scored."""
    ches = {s: (found[s].get("displacement") or {}).get("kept") for s in sources(found)}
    return page.table(
        DataFrame([(s, _text(e["mean"]), _text(e["above_zero"]), f"{e['percentile_95']:.2f}")
                   for s, e in ches.items() if e],
                  columns=["source", "mean CHES", "share above 0", "95th percentile"]),
        "CHES of the kept pairs, length-normalised", "empty when score_candidates is off")


def headline(found: dict[str, Any]) -> Shown:
    parts = [f"{found[s]['kept']} {s} ({found[s]['share_kept']:.0%} of rows)"
             for s in sources(found)]
    known, long = prior_shares(found), longer(found).plain.rstrip(".")
    prior = ("Where the truth file names the prior's answer, **it is the rejected one** in "
             "{shares}. " if known else "")
    return page.say(prior + "{long}: where that is common, training also teaches length. **{n} "
                    "pairs** from {rows} annotated rows: {parts}.", n=found["pairs"], long=long,
                    rows=found["rows"], parts=", ".join(parts), shares=" and ".join(known))


def _shortened(short: Shown, title: str, whole: Shown) -> Shown:
    """A table of what matters most, the whole one folded behind it; in plain text the whole."""
    return Shown(short.html + page.folded(title, whole).html, plain=whole.plain)


def _counted(share: dict[str, Any]) -> str:
    """A share with its count: 34 % (107 of 311)."""
    return f"{share['value']:.0%} ({round(share['value'] * share['n'])} of {share['n']})"


def _text(estimate: dict[str, Any] | None) -> str:
    return "not known" if estimate is None or estimate["value"] is None else Estimate(
        *(estimate[name] for name in ("value", "low", "high"))).text()
