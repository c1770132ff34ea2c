"""A card whose trials train together, from approval to verdict: the same ladder as inline, and a log that replays."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from automode import replay
from automode.cli.main import main
from automode.session import Session

CARD = """
schema: 1
action: fork
reason: manual
because: The rate was a guess.
selection: {kind: all}
training_recipe:
  replay: 0.1
  variants:
    - {name: plain}
    - {name: fast, lr_mul: 10}
    - {name: faster, lr_mul: 30}
    - {name: slow, lr_mul: 0.1}
    - {name: clipped, clip_norm: 0.1, lr_mul: 3}
    - {name: decayed, weight_decay: 0.1, lr_mul: 3}
budget_steps: 12
asha: {reduction_factor: 3, max_steps: 36}
"""


def played(play_run: Any, script: Any, backend: str) -> Any:
    return play_run(
        script=script(rate=0.003, norm=False, dropout=0.0),
        policy={"budget": "on_top"},
        actions={8: lambda person: person.submit(CARD), 9: lambda person: person.approve()},
        backend=backend,
        steps=260,
    )


def reports(run: Any) -> dict[tuple[int, int], float]:
    return {(body["trial"], body["resource"]): body["value"] for body in run.bodies("trial_reported")}


def test_a_card_goes_the_same_way_with_its_trials_trained_together(
    play_run: Any, script: Any, group_sizes: list[int]
) -> None:
    inline = played(play_run, script, "inline")
    assert group_sizes == []
    stacked = played(play_run, script, "stacked")
    assert group_sizes[:8] == [6] * 8  # the first rung, after four steps alone
    mine, theirs = reports(stacked), reports(inline)
    assert len(mine) >= 8
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value == pytest.approx(theirs[key], abs=1e-4)
    (verdict,), (other,) = stacked.bodies("verdict_given"), inline.bodies("verdict_given")
    assert (verdict["verdict"], verdict["candidate"]) == (other["verdict"], other["candidate"])


UNLIKE = """
schema: 1
action: fork
reason: manual
because: The rate was a guess.
selection: {kind: all}
training_recipe:
  replay: 0.1
  variants:
    - {name: plain}
    - {name: fast, lr_mul: 10}
    - {name: flat, optimizer: sam}
budget_steps: 12
asha: {reduction_factor: 3, max_steps: 36}
"""


def printed(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("group_sizes")
def test_who_trained_alone_and_why_stands_with_the_card_everywhere(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=0.003, norm=False, dropout=0.0),
        policy={"budget": "on_top"},
        actions={8: lambda person: person.submit(UNLIKE), 9: lambda person: person.approve()},
        backend="stacked",
        steps=200,
    )
    noted = run.bodies("trials_noted")
    (sharp,) = [body for body in noted if "sharpness-aware" in body["why"]]
    assert (sharp["trials"], sharp["resource"], sharp["what"]) == ([2], 12, "trained one after another")
    said = f"trial 2 to 12: trained one after another: {sharp['why']}"
    card = sharp["card"]
    for command in (("show", run.path, card), ("trials", run.path), ("story", run.path, card)):
        assert printed(*command).count(said) == 1, command
    with Session.open(run.path) as session:
        assert said in session._repr_html_().replace("&#x27;", "'")
    assert [note.why for note in run.driver.state.cards[card].notes] == [body["why"] for body in noted]
    assert replay(run.path).differences == 0
    assert said in (run.path / "log.jsonl").read_text(encoding="utf-8")
