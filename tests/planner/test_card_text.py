"""A card survives YAML and back, and whatever is wrong with a text is told with its place and a way out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import CardError, PolicyError, UsageError
from automode.planner.card_text import (
    card_html,
    card_summary,
    from_yaml,
    json_schema,
    load_model,
    policy_from_yaml,
    policy_to_yaml,
    problems_in,
    submission_from_yaml,
    to_yaml,
)
from automode.planner.cards import PlanCard
from automode.planner.policy import Policy
from automode.planner.recipes import (
    Acceptance,
    Adjustment,
    Asha,
    Base,
    Cost,
    EarlyStopping,
    GateRecipe,
    MergeAdapterFuse,
    MergeDistill,
    MergeFisherSoup,
    MergeGreedy,
    MergeInterpolate,
    MergeSwa,
    MergeUniform,
    RelabelGiven,
    RelabelPredicted,
    Resources,
    SearchSpace,
    SelectAll,
    SelectIndices,
    SelectKMeans,
    SelectQuantile,
    SelectSlices,
    TrainingRecipe,
    Variant,
)
from automode.planner.variants import DrawChoice, DrawInt, DrawLogUniform, DrawUniform

DIGEST = "sha256:" + "9f" * 32

EXAMPLE = PlanCard(
    id="c7f3a1e0",
    session="digits-7",
    step=2400,
    action="fork",
    reason="residual_cluster",
    because=(
        "Cluster 2 of 3 (412 samples, mostly class 8) loses 1.31 where the rest lose 0.42; stable over 3 scans "
        "(ARI 0.91); estimated label noise 4 %."
    ),
    selection=SelectKMeans(k=3, clusters=(2,)),
    training_recipe=TrainingRecipe(
        variants=(
            Variant(name="plain"),
            Variant(name="gentle", lr_mul=0.5),
            Variant(name="flat", lr_mul=0.5, optimizer="sam"),
        ),
        early_stopping=EarlyStopping(patience=3, min_delta=0.01),
    ),
    gate_recipe=GateRecipe(),
    merge_recipe=MergeDistill(),
    budget_steps=120,
    asha=Asha(max_steps=1080),
    cost=Cost(sample_passes=310000, share_of_remaining=0.11),
    cooldown_steps=800,
    acceptance=Acceptance(metric="accuracy"),
    base=Base(step=2400, checkpoint=DIGEST, policy="sha256:" + "41" * 32),
    diagnostics={"cluster_losses": (0.40, 0.44, 1.31), "scans": 3, "ari": 0.91, "noise": 0.04},
)

GOLDEN = """\
# automode plan card c7f3a1e0, revision 1: proposed at step 2400, takes effect at the next step after approval
schema: 1
id: c7f3a1e0
rev: 1
session: digits-7
step: 2400
created_by: planner
action: fork
reason: residual_cluster
because: >-
  Cluster 2 of 3 (412 samples, mostly class 8) loses 1.31 where the rest lose 0.42; stable over 3 scans (ARI 0.91);
  estimated label noise 4 %.
selection: {kind: kmeans, feature: embedding, k: 3, clusters: [2], window: 4096}
training_recipe:
  replay: 0.1
  variants:
    - {name: plain}
    - {name: gentle, lr_mul: 0.5}
    - {name: flat, lr_mul: 0.5, optimizer: sam, sam_rho: 0.05}
  early_stopping: {patience: 3, min_delta: 0.01}
gate_recipe: {kind: switch_softmax, temperature: 1.0, load_balance: 0.01, epochs: 5, top1: false}
merge_recipe: {kind: distill, temperature: 2.0, steps: 200, teacher: ensemble, student: control, lr_mul: 1.0}
budget_steps: 120                                   # the first rung
asha: {reduction_factor: 3, max_steps: 1080}
cost: {sample_passes: 310000, share_of_remaining: 0.11}
cooldown_steps: 800
acceptance: {against: control, metric: accuracy, z: 1.64, slices: no_worse}
risk: low                                           # what the policy may approve by itself
base:
  step: 2400
  checkpoint: "sha256:9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f"
  policy: "sha256:4141414141414141414141414141414141414141414141414141414141414141"
  lineage: "trunk:0"
diagnostics: {cluster_losses: [0.4, 0.44, 1.31], scans: 3, ari: 0.91, noise: 0.04}
"""


def same(a: Any, b: Any) -> bool:
    """Equality of plain data where NaN equals NaN, 1 differs from 1.0 and True, and 0.0 from -0.0."""
    if type(a) is not type(b):
        return False
    match a:
        case dict():
            return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        case list() | tuple():
            return len(a) == len(b) and all(map(same, a, b))
        case float():
            return (math.isnan(a) and math.isnan(b)) or (
                a == b and math.copysign(1, a) == math.copysign(1, b)
            )
        case _:
            return bool(a == b)


# ---------------------------------------------------------------------------------------------------------- strategies

ODD = [
    *(
        "yes",
        "NO",
        "null",
        "~",
        "1e-3",
        "012",
        "12:30:00",
        "0x1f",
        "1_000",
        ".nan",
        "-.inf",
        "true",
        "2001-01-01",
        "=",
        "<<",
    ),
    *(
        "a: b",
        "a #b",
        "- a",
        "#",
        "'",
        '"',
        "\\",
        "!x",
        "&a",
        "*a",
        "{",
        "}",
        "[",
        "]",
        "|",
        ">",
        "%",
        "@",
        "`",
        "---",
        "...",
    ),
    *(
        "a\nb",
        " a",
        "a ",
        "a\n",
        "a\n\nb",
        "\n",
        "\ta",
        "a\x85b",
        "\u2028",
        "\ufeff",
        "\u202e",
        "😀",
        "é",
        "? a",
        ": a",
        "a:",
    ),
]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | st.sampled_from(ODD)
names = st.text("aZ09_.:/+ -", min_size=1, max_size=20) | st.sampled_from(
    ["1", "1e3", "null", "-", " ", ": ", "a: b", "- -"]
)
fractions = st.floats(0, 1)
positives = st.floats(1e-300, 100, exclude_min=True)
steps = st.integers(0, 10**12)
digests = st.sampled_from([DIGEST, "sha256:" + "0" * 64])
numbers = st.none() | st.booleans() | st.integers() | st.floats() | texts
diagnostics = st.dictionaries(texts, numbers | st.lists(numbers, max_size=40).map(tuple), max_size=5)
quantiles = (
    st.tuples(fractions, fractions)
    .filter(lambda p: p[0] < p[1])
    .flatmap(
        lambda p: st.builds(
            lambda metric, careful: SelectQuantile(
                **{"from": p[0], "to": p[1], "metric": metric, "exclude_suspects": careful}
            ),
            st.sampled_from(["mean_loss", "last_loss", "ema_loss", "margin"]),
            st.booleans(),
        )
    )
)
clusterings = st.builds(
    SelectKMeans,
    feature=st.sampled_from(["embedding", "loss", "margin"]),
    k=st.just(64),
    clusters=st.lists(st.integers(0, 63), min_size=1, unique=True).map(tuple),
    window=st.integers(16, 10**6),
    artifact=st.none() | digests,
)
given_ids = st.lists(st.integers(0, 2**63), min_size=1, max_size=200).map(tuple)
indices = st.builds(SelectIndices, ids=given_ids, slice=st.none() | names) | st.builds(
    SelectIndices, artifact=digests, slice=st.none() | names
)
named = st.builds(SelectSlices, slices=st.lists(names, min_size=1, max_size=64, unique=True).map(tuple))
selections = st.builds(SelectAll) | quantiles | clusterings | named | indices
variants = st.builds(
    Variant,
    name=names,
    lr_mul=positives | st.just(1.0),
    weight_decay_mul=positives | st.just(1.0),
    weight_decay=st.none() | st.floats(0, 10),
    clip_norm=st.none() | positives,
    optimizer=st.sampled_from(["keep", "sgd", "adam", "adamw", "sam"]),
    sam_rho=positives | st.just(0.05),
    ema=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    precision=st.sampled_from(["keep", "fp32", "bf16"]),
    schedule=st.sampled_from(["keep", "constant", "anneal"]),
)
ends = st.tuples(positives, positives).filter(lambda p: p[0] < p[1])
draws = (
    ends.map(lambda p: DrawLogUniform(low=p[0], high=p[1]))
    | st.tuples(ends, st.none() | fractions.filter(bool)).map(
        lambda t: DrawUniform(low=t[0][0], high=t[0][1], step=(t[1] and (t[0][1] - t[0][0]) * t[1]) or None)
    )
    | st.integers(1, 50).flatmap(
        lambda low: st.builds(
            DrawInt, low=st.just(low), high=st.integers(low + 4, 99), step=st.integers(1, 4)
        )
    )
    | st.lists(positives, min_size=1, max_size=9, unique=True).map(lambda c: DrawChoice(choices=tuple(c)))
)
searches = st.builds(
    SearchSpace,
    parameters=st.dictionaries(
        st.sampled_from(["lr_mul", "clip_norm", "weight_decay_mul"]), draws, min_size=1
    ),
    draws=st.integers(1, 60),
    sampler=st.sampled_from(["tpe", "random"]),
)
recipe_rest = {
    "replay": fractions,
    "early_stopping": st.none()
    | st.builds(EarlyStopping, patience=st.integers(1, 1000), min_delta=positives),
    "exclude": st.none() | selections,
}
relabels = st.builds(RelabelPredicted, confidence=fractions, neighbours=st.integers(1, 1000)) | st.lists(
    st.tuples(st.integers(0, 2**63), st.integers(0, 10**6)),
    min_size=1,
    max_size=200,
    unique_by=lambda p: p[0],
).map(lambda pairs: RelabelGiven(ids=tuple(i for i, _ in pairs), labels=tuple(c for _, c in pairs)))
relabelled = st.builds(
    TrainingRecipe,
    variants=st.just((Variant(name="pruned"), Variant(name="new", labels="relabel"))),
    **recipe_rest | {"exclude": selections, "relabel": relabels},
)
recipes = st.builds(
    TrainingRecipe,
    variants=st.lists(variants, min_size=1, max_size=4, unique_by=lambda v: v.name).map(tuple),
    **recipe_rest,
) | st.builds(
    TrainingRecipe,
    variants=st.just(()) | st.just((Variant(name="drop", lr_mul=0.1),)),
    search=searches,
    **recipe_rest,
)
recipes |= relabelled
gates = st.builds(GateRecipe, temperature=positives, load_balance=st.floats(0, 10), top1=st.booleans())
merges = st.one_of(
    st.sampled_from([MergeSwa(), MergeUniform(), MergeGreedy(), MergeAdapterFuse()]),
    st.builds(MergeInterpolate, weights=st.lists(fractions, min_size=1, max_size=16).map(tuple)),
    st.builds(MergeFisherSoup, samples=st.integers(1, 10**6), floor=st.floats(0, 1, exclude_min=True)),
    st.builds(
        MergeDistill,
        temperature=positives,
        steps=st.integers(1, 10**9),
        teacher=st.sampled_from(["ensemble", "mixture"]),
        student=st.sampled_from(["control", "specialist"]),
        lr_mul=positives,
    ),
)
common = {
    "id": st.text("0123456789abcdef", min_size=8, max_size=8)
    | st.sampled_from(["12345678", "1e234567", "00000000", "1234e012"]),
    "rev": st.integers(1, 10**6),
    "session": texts,
    "step": steps,
    "created_by": texts,
    "reason": st.sampled_from(["manual", "loss_plateau", "merge_cadence"]),
    "because": texts | st.lists(texts, min_size=1, max_size=40).map(" ".join),
    "selection": selections,
    "cost": st.builds(
        Cost,
        sample_passes=st.floats(0, 1e300),
        share_of_remaining=st.floats(0, 1e9),
        memory_mib=st.none() | st.floats(0),
        seconds=st.none() | st.floats(0),
    ),
    "cooldown_steps": steps,
    "acceptance": st.builds(Acceptance, z=st.floats(0, 10), slices=st.sampled_from(["no_worse", "ignore"])),
    "risk": st.sampled_from(["low", "medium", "high"]),
    "base": st.builds(Base, step=steps, checkpoint=st.none() | digests, policy=digests, lineage=texts),
    "diagnostics": diagnostics,
}
forks = st.builds(
    PlanCard,
    action=st.just("fork"),
    training_recipe=recipes,
    gate_recipe=st.none() | gates,
    merge_recipe=st.none() | merges,
    budget_steps=st.integers(1, 100),
    asha=st.builds(Asha, reduction_factor=st.integers(2, 16), max_steps=st.integers(100, 10**9)),
    **common,
)
merge_cards = st.builds(PlanCard, action=st.just("merge"), merge_recipe=merges, budget_steps=steps, **common)
adjustments = st.builds(
    Adjustment,
    rate_factor=st.floats(1e-6, 100.0).filter(lambda factor: factor != 1.0),
    clip_norm=st.none() | st.floats(1e-6, 1e6),
)
adjusting_cards = st.builds(
    PlanCard,
    action=st.just("adjust"),
    adjustment=adjustments,
    budget_steps=steps,
    **(common | {"selection": st.just(SelectAll()), "acceptance": st.just(Acceptance())}),
)
cards = forks | merge_cards | adjusting_cards


# --------------------------------------------------------------------------------------------------------- round trips


def test_the_yaml_of_a_card_is_stable() -> None:
    assert to_yaml(EXAMPLE) == GOLDEN
    assert from_yaml(GOLDEN) == EXAMPLE


@given(cards)
def test_a_card_survives_yaml_and_back_unchanged(card: PlanCard) -> None:
    text = to_yaml(card)
    again = from_yaml(text)
    assert same(again.model_dump(), card.model_dump()), text
    assert to_yaml(again) == text


@given(cards)
def test_a_card_survives_json_and_back_unchanged(card: PlanCard) -> None:
    again = PlanCard.model_validate_json(card.model_dump_json())
    assert same(again.model_dump(), card.model_dump())


@given(texts, st.lists(texts, max_size=3), diagnostics)
def test_other_readers_of_yaml_see_the_same_text(
    because: str, more: list[str], readings: dict[str, Any]
) -> None:
    card = EXAMPLE.model_copy(update={"because": " ".join([because, *more]), "diagnostics": readings})
    seen = yaml.safe_load(to_yaml(card))
    assert seen["because"] == card.because
    assert list(seen["diagnostics"] if readings else {}) == list(readings)


@given(cards)
def test_every_line_of_a_card_but_quoted_and_nested_ones_fits_the_screen(card: PlanCard) -> None:
    lines = to_yaml(card.model_copy(update={"because": " ".join(["word"] * 99)})).split("\n")
    assert all(len(line) <= 118 or '"' in line or "- [" in line for line in lines[1:])
    assert not any(line.endswith(" ") for line in lines)


def test_what_a_card_has_not_is_not_written() -> None:
    text = to_yaml(EXAMPLE.model_copy(update={"diagnostics": {}, "gate_recipe": None}))
    assert "diagnostics" not in text
    assert "gate_recipe" not in text
    assert "memory_mib" not in text
    assert "exclude" not in text


def test_prose_of_several_lines_stays_readable() -> None:
    card = EXAMPLE.model_copy(update={"because": "first paragraph\n\nsecond: with # signs\n  and an indent"})
    text = to_yaml(card)
    assert "because: |-\n  first paragraph\n\n  second: with # signs\n    and an indent\n" in text
    assert from_yaml(text) == card


# --------------------------------------------------------------------------------------------------------------- errors


def problems(text: str) -> list[str]:
    return [str(p) for p in problems_in(text, PlanCard)]


def changed(old: str, new: str) -> str:
    assert GOLDEN.count(old) == 1, old
    return GOLDEN.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "lr_mul: 0.5}",
            "lr_mull: 0.5}",
            "line 18, column 22: training_recipe.variants[1].lr_mull: unknown key, did you mean `lr_mul`?",
        ),
        ("cooldown_steps: 800", "colour: 3", "line 26, column 1: colour: unknown key; known here: schema, id, rev,"),
        (
            "k: 3,",
            "k: '3',",
            "line 13, column 50: selection.k: expected a whole number from 2 to 64, came the text '3'",
        ),
        ("k: 3,", "k: 3.0,", "line 13, column 50: selection.k: expected a whole number from 2 to 64, came the number 3.0"),
        (
            "metric: accuracy",
            "metric: acuracy",
            "acceptance.metric: expected one of utility, accuracy, nll, huber, mse, log_score, came the text 'acuracy', did you mean `accuracy`?",
        ),
        (
            "kind: distill",
            "kind: distil",
            "line 22, column 15: merge_recipe: there is no kind 'distil', did you mean `distill`?; expected one of",
        ),
        ("{kind: kmeans, ", "{", "line 13, column 12: selection: `kind` is missing; expected a mapping with `kind`: one of"),
        (
            "asha: {reduction_factor: 3, max_steps: 1080}",
            "asha: {reduction_factor: 3}",
            "line 24, column 7: asha.max_steps: is missing; expected a whole number at least 1 (resource of the top rung,",
        ),
        ("replay: 0.1", "replay: 1.5", "line 15, column 11: training_recipe.replay: expected a number from 0 to 1, came the number 1.5"),
        ("replay: 0.1", "replay: .nan", "line 15, column 11: training_recipe.replay: expected a number from 0 to 1, came"),
        ("min_delta: 0.01", "min_delta: .inf", "training_recipe.early_stopping.min_delta: expected a number at least 0, finite, came the number .inf"),
        ("top1: false", "top1: no", "gate_recipe.top1: expected true or false, came the text 'no'"),
        ("temperature: 1.0", "temperature:", "gate_recipe.temperature: expected a number above 0, came nothing (null)"),
        ("clusters: [2]", "clusters: 2", "selection.clusters: expected a list of at least 1 of a whole number at least 0, came the number 2"),
        ("clusters: [2]", "clusters: [2, a]", "line 13, column 67: selection.clusters[1]: expected a whole number at least 0, came the text 'a'"),
        ("clusters: [2]", "clusters: [3]", "line 13, column 12: selection: clusters [3] do not exist: k is 3, so they run from 0 to 2"),
        ("max_steps: 1080", "max_steps: 100", "line 2, column 1: `budget_steps` (120) must lie between 1 and asha.max_steps (100)"),
        ("asha: {reduction_factor: 3, max_steps: 1080}", "asha: 3", "asha: expected a mapping with max_steps or null, came the number 3"),
        ("id: c7f3a1e0", "id: 1234e012", 'line 3, column 5: id: expected text like ^[0-9a-f]{8}$, came the number 1234e012; if you mean the text, write "1234e012" in quotes'),
        ("schema: 1\n", "schema: 2\n", "line 2, column 9: schema: expected `1`, came the number 2"),
        ("schema: 1\n", "schema_: 1\n", "line 2, column 1: schema_: unknown key, did you mean `schema`?"),
        ("scans: 3", "scans: {a: 1}", "diagnostics.scans: expected a number or true or false or text or a list of such values or null, came a mapping of 1"),
        ("scans: 3", "scans: [3, {a: 1}]", "diagnostics.scans[1]: expected a number or true or false or text or null, came a mapping of 1"),
        ("risk: low  ", "risk: Low  ", "risk: expected one of low, medium, high, came the text 'Low', did you mean `low`?"),
        ("rev: 1\n", "rev: 012\n", "rev: expected a whole number at least 1, came the text '012'"),
        ("rev: 1\n", "rev: 1_0\n", "rev: expected a whole number at least 1, came the text '1_0'"),
        ("rev: 1\n", "rev: 0x1\n", "rev: expected a whole number at least 1, came the text '0x1'"),
        ("rev: 1\n", "rev: 1\nrev: 2\n", "line 5, column 1: `rev` is given twice (first on line 4): keep one"),
        ("{patience: 3,", "{patience: 3, patience: 4,", "line 20, column 33: training_recipe.early_stopping: `patience` is given twice"),
        ("clusters: [2]", "clusters: &a [2]", "line 13, column 63: selection.clusters: the anchor &a is not taken"),
        ("clusters: [2]", "clusters: *a", "line 13, column 63: selection.clusters: the alias *a is not taken"),
        ("clusters: [2]", "clusters: !!set {2}", "selection.clusters: the tag tag:yaml.org,2002:set is not taken"),
        ("scans: 3", "scans: !!python/object/apply:os.system [ls]", "the tag tag:yaml.org,2002:python/object/apply:os.system is not taken"),
        ("step: 2400\ncreated", "<<: {a: 1}\ncreated", "<<: unknown key; known here"),
        ("rev: 1\n", "? [rev]\n: 1\n", "line 4, column 3: a key must be a word, and this is a list or a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_card_is_told_with_line_path_expectation_and_guess(old: str, new: str, told: str) -> None:
    text = changed(old, new)
    assert any(told in p for p in problems(text)), problems(text)
    with pytest.raises(CardError) as caught:
        from_yaml(text)
    assert told in str(caught.value)


def test_every_problem_is_listed_in_the_order_of_the_text() -> None:
    text = GOLDEN.replace("rev: 1", "rev: 0").replace("risk: low", "risk: none").replace("k: 3", "k: 1")
    with pytest.raises(
        CardError, match=r"for 3 reasons:\n  line 4.*rev.*\n  line 13.*selection.k.*\n  line 28.*risk"
    ):
        from_yaml(text)


def test_problems_of_the_text_itself_are_all_listed_too() -> None:
    text = "a: 1\na: 2\nb: &x 3\nc: *x\nd: !t 4\n"
    assert [p.line for p in problems_in(text, PlanCard)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the text is empty; expected a mapping with id, session"),
        ("# only a remark\n", "the text is empty"),
        ("[1, 2]", "line 1, column 1: expected a mapping with id, session"),
        ("just words", "expected a mapping with id, session.*came the text 'just words'"),
        ("---\na: 1\n---\na: 2\n", "line 3, column 1: a second document starts here"),
        ("a: [1", "line 1, column 6: no valid YAML"),
        ("a:\n\tb: 1", "line 2, column 1: no valid YAML"),
        ("a: \x00", r"line 1, column 4: the character U\+0000 may not stand"),
        ("a: 1\nb: \ud800", r"line 2, column 4: the character U\+D800 may not stand"),
        ('a: "\\ud800"', "a: holds half of a surrogate pair"),
        ('a: "\\U00110000"', "that is no character"),
        ("[" * 40, "line 1, column 33: deeper than 32 levels"),
        ("- 1\n" * 20_001, "line 20000, column 3: .*more than 20,000 values"),
        ("#" * 1_000_001, "1,000,001 characters; at most 1,000,000 are read"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "the alias"),
    ],
)
def test_a_text_that_is_no_card_at_all_is_refused(text: str, told: str) -> None:
    with pytest.raises(CardError, match=f"(?s){told}"):
        from_yaml(text)


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda b: b.decode("latin1")))
def test_no_text_ends_in_anything_but_a_card_error(text: str) -> None:
    with pytest.raises(CardError):
        from_yaml(text)


@given(st.data())
def test_no_damage_to_a_card_ends_in_anything_but_a_card_or_a_card_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOLDEN) - 1))
    cut = data.draw(st.integers(0, 12))
    put = data.draw(
        st.text(max_size=4) | st.sampled_from(["{", "}", "[", ": ", "\n", "- ", '"', "&a ", "*a", "!!int "])
    )
    text = GOLDEN[:at] + put + GOLDEN[at + cut :]
    try:
        card = from_yaml(text)
    except CardError as error:
        assert "cannot be taken" in str(error)  # noqa: PT017 (either outcome is fine, a third is not)
    else:
        assert isinstance(card, PlanCard)


def test_a_message_shows_no_control_characters_and_no_endless_words() -> None:
    found = problems('"\\e[31m' + "x" * 900 + '": 1')
    assert not any("\x1b" in p for p in found)
    assert any("\\u{1b}[31mxxx" in p and "…" in p for p in found)
    assert max(map(len, found)) < 600


def test_json_is_read_too_emojis_included() -> None:
    card = EXAMPLE.model_copy(update={"because": "😀 é", "diagnostics": {"a": math.nan, "b": (1, -math.inf)}})
    assert same(from_yaml(json.dumps(card.dump())).model_dump(), card.model_dump())
    assert same(from_yaml(card.model_dump_json(indent=2)).model_dump(), card.model_dump())


# ---------------------------------------------------------------------------------------------------------- submissions

SUBMISSION = """\
action: fork
selection: {kind: indices, ids: [3, 5, 8]}
training_recipe: {variants: [{name: plain}]}
budget_steps: 50
asha: {max_steps: 450}
"""


def test_a_submission_may_leave_out_what_automode_fills_in() -> None:
    data = submission_from_yaml(SUBMISSION)
    assert list(data) == ["action", "selection", "training_recipe", "budget_steps", "asha"]
    assert data["selection"] == {"kind": "indices", "ids": [3, 5, 8]}
    adjusting = submission_from_yaml("{action: adjust, adjustment: {rate_factor: 0.5}}")
    assert adjusting["adjustment"] == {"rate_factor": 0.5}
    assert submission_from_yaml("{action: merge, merge_recipe: {kind: swa}}")["action"] == "merge"
    assert submission_from_yaml(GOLDEN)["id"] == "c7f3a1e0"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the text is empty; expected a mapping"),
        ("[]", "expected a mapping"),
        ("action: fork\naction: fork", "`action` is given twice"),
        (
            SUBMISSION.replace("budget_steps: 50\n", ""),
            "budget_steps: is missing; expected a whole number at least 0",
        ),
        (SUBMISSION.replace("action: fork\n", ""), "action: is missing; expected one of fork, merge, adjust"),
        (
            SUBMISSION.replace("ids", "idx"),
            "line 2, column 28: selection.idx: unknown key, did you mean `ids`?",
        ),
        (SUBMISSION + "id: 7", "line 6, column 5: id: expected text like"),
        (SUBMISSION + "base: {step: 1}", "base.policy: is missing"),
    ],
)
def test_what_a_submission_gives_must_be_right(text: str, told: str) -> None:
    with pytest.raises(CardError) as caught:
        submission_from_yaml(text)
    assert told in str(caught.value)


# ------------------------------------------------------------------------------------------------ scalars as people mean


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("-0", 0),
        ("1.0", 1.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        (".NaN", math.nan),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("yes", "yes"),
        ("NO", "NO"),
        ("on", "on"),
        ("012", "012"),
        ("0o17", "0o17"),
        ("12:30:00", "12:30:00"),
        ("1_000", "1_000"),
        ("2001-12-14", "2001-12-14"),
        ("1e999", "1e999"),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_plain_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    card = from_yaml(changed("scans: 3", f"scans: {text}"))
    assert same(card.diagnostics["scans"], value)


# ------------------------------------------------------------------------------------------------------- policy, schema


def test_a_policy_survives_yaml_and_back_unchanged() -> None:
    policy = Policy.model_validate(
        {
            "name": 'odd "name": \n#1',
            "reasons": [],
            "trend": {"budget": 400, "gain": 1e-5},
            "approval": {"timeout_seconds": 1e-3, "expire_steps": 7},
            "evidence": {"holdout_share": 0.2},
        }
    )
    assert policy_from_yaml(policy_to_yaml(policy)) == policy
    assert policy_from_yaml(policy_to_yaml(policy)).digest == policy.digest


def test_a_policy_says_only_what_it_changes() -> None:
    assert policy_from_yaml("pacing: {max_cards: 3}\n").pacing.max_cards == 3
    assert policy_from_yaml("schema: 1") == Policy()


def test_a_policy_is_written_with_every_value_and_its_meaning() -> None:
    text = policy_to_yaml(Policy())
    assert "  max_cards: 16                                     # cards in a session at the most\n" in text
    assert "  timeout_seconds: null " in text
    assert all(len(line) <= 118 for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "pacing: {max_card: 3}",
            "line 1, column 10: pacing.max_card: unknown key, did you mean `max_cards`?",
        ),
        ("reasons: [loss_plateu]", "reasons[0]: expected one of instability_spike,"),
        ("reasons: [loss_plateau, loss_plateau]", "`reasons` names a reason twice"),
        ("trend: {gain: 0}", "trend.gain: expected a number above 0"),
        ("spike: {window: 21, warmup: 30}", "line 1, column 8: spike: warmup (30) exceeds window (21)"),
        (
            "safeguards: {skip_nonfinite: yes}",
            "safeguards.skip_nonfinite: expected true or false, came the text 'yes'",
        ),
    ],
)
def test_a_wrong_policy_is_told_with_line_path_and_expectation(text: str, told: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy_from_yaml(text)
    assert told in str(caught.value)


def test_any_model_can_be_read_and_blames_what_it_was_to_be() -> None:
    assert load_model("{name: a}", Variant, "variant") == Variant(name="a")
    with pytest.raises(UsageError, match="this variant cannot be taken: line 1, column 1: name: is missing"):
        load_model("{}", Variant, "variant")


def test_the_schemas_name_their_fields_as_texts_do() -> None:
    card, policy = json_schema("card"), json_schema("policy")
    assert {"schema", "id", "selection", "acceptance"} <= set(card["properties"])
    assert "from" in card["$defs"]["SelectQuantile"]["properties"]
    assert "pacing" in policy["properties"]
    for schema in (card, policy):
        assert schema["$schema"].endswith("2020-12/schema")
        assert schema["additionalProperties"] is False
        assert json.loads(json.dumps(schema)) == schema


# ------------------------------------------------------------------------------------------------------------- at a glance


@given(cards)
def test_a_summary_is_at_most_twelve_printable_lines(card: PlanCard) -> None:
    lines = card_summary(card).split("\n")
    assert 4 <= len(lines) <= 12
    assert all(line.isprintable() and len(line) <= 110 for line in lines)


def test_a_summary_holds_what_a_person_decides_on() -> None:
    text = card_summary(EXAMPLE)
    for part in ("card c7f3a1e0, revision 1", "fork for residual_cluster at step 2400 (risk low)", "cluster 2 of 3", "gentle (lr_mul 0.5)",
                 "310,000 sample passes, 11.0% of what remains", "accuracy above the control's"):  # fmt: skip
        assert part in text


def test_html_escapes_everything_and_fetches_nothing() -> None:
    nasty = "<script>alert('x')</script><img src=x onerror=y>\"&"
    card = EXAMPLE.model_copy(
        update={"because": nasty, "session": nasty, "created_by": nasty, "diagnostics": {nasty: nasty}}
    )
    text = card_html(card)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert card._repr_html_() == text


def placed(resources: str) -> str:
    """A card whose trials ask for something."""
    head, recipe, rest = to_yaml(EXAMPLE).partition("training_recipe:\n")
    return f"{head}{recipe}  resources: {resources}\n{rest}"


def test_what_a_trial_needs_is_read_shown_and_written_again() -> None:
    card = from_yaml(placed("{cpus: 2, gpus: 0.5}"))
    assert card.training_recipe is not None
    assert card.training_recipe.resources == Resources(cpus=2.0, gpus=0.5)
    assert from_yaml(to_yaml(card)) == card
    assert "resources: {cpus: 2.0, gpus: 0.5}" in to_yaml(card)
    assert "each gets 2 cores and 0.5 GPUs" in card_summary(card)
    assert len(card_summary(card).splitlines()) <= 12
    assert "resources" not in to_yaml(EXAMPLE)
    assert from_yaml(placed("{gpus: 1}")).training_recipe.resources == Resources(cpus=1.0, gpus=1.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ("{cpus: 1, gpu: 1}", "did you mean `gpus`"),
        ("{cpus: -1}", "a number from 0 to 4096"),
        ("{gpus: 1.5}", "only whole GPUs can be had"),
        ("{cpus: 0.00001}", "finer than a ten-thousandth"),
        ("{cpus: .nan}", "resources.cpus"),
        ("2", "resources"),
    ],
)
def test_needs_that_no_worker_could_have_are_refused_with_the_field(resources: str, words: str) -> None:
    with pytest.raises(CardError, match="resources") as caught:
        from_yaml(placed(resources))
    assert words in str(caught.value)


def test_a_card_that_anneals_says_what_it_has_to_beat() -> None:
    def needs(schedule: str) -> str:
        variant = Variant.model_validate({"name": "v", "schedule": schedule})
        plain = {"gate_recipe": None, "merge_recipe": None}
        card = EXAMPLE.model_copy(update={"training_recipe": TrainingRecipe(variants=(variant,)), **plain})
        return next(line for line in card_summary(card).splitlines() if "needs" in line)

    assert "above the annealed control's and the trunk's, z at least" in needs("anneal")
    assert "above the control's, z at least" in needs("keep")
