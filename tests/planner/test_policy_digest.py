"""A policy's digest covers what decides: its values, the planner's version, the plugins. A card is stale where one of them changed."""

from __future__ import annotations

import pytest

from automode.planner import policy as policies
from automode.planner.card_text import policy_from_yaml, policy_to_yaml
from automode.planner.policy import Policy


def test_a_policy_that_is_only_renamed_keeps_its_digest() -> None:
    assert Policy(name="mine").digest == Policy(name="yours").digest
    assert policy_from_yaml("name: renamed").digest == Policy().digest


def test_every_other_value_is_part_of_it() -> None:
    plain = Policy()
    seen = {plain.digest}
    changed = [Policy(reasons=("loss_plateau",)), Policy(budget="on_top"), Policy(schedule="keep")]
    changed.append(Policy.model_validate({"approval": {"ask": []}}))
    for group in Policy.model_fields:
        part = getattr(plain, group)
        for name in getattr(type(part), "model_fields", ()):
            value = getattr(part, name)
            if isinstance(value, float) or type(value) is int:
                other = part.model_copy(
                    update={name: value + 1}
                )  # whether it is in bounds does not matter here
                changed.append(plain.model_copy(update={group: other}))
    assert len(changed) > 40
    seen |= {policy.digest for policy in changed}
    assert len(seen) == len(changed) + 1


def test_the_planners_version_and_the_plugins_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Policy()
    assert plain.digest_with([]) == plain.digest
    mine = plain.digest_with(["their-rules 1.2", "a-rule 0.1"])
    assert mine == plain.digest_with(["a-rule 0.1", "their-rules 1.2"])
    assert len({plain.digest, mine, plain.digest_with(["a-rule 0.2", "their-rules 1.2"])}) == 3
    before = plain.digest
    monkeypatch.setattr(policies, "PLANNER_VERSION", policies.PLANNER_VERSION + 1)
    assert plain.digest != before


def test_writing_a_policy_out_does_not_change_its_digest() -> None:
    short = policy_from_yaml("pacing: {variants: 5}")
    assert policy_from_yaml(policy_to_yaml(short)).digest == short.digest
