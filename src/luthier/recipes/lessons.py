"""Lessons of reinforcement learning: what a run's rollouts say in plain words, above all why nothing was learned.

Idea: a loss near 0 says nothing here. What does: how many groups had answers that were all worth the same (nothing to
compare), which prompts are always or never solved, whether answers all become one (entropy), whether they grow or
shrink (length), whether much was cut off or could not be scored, and whether the reward rises where it is trained and
falls where it is held out (something is exploited).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.core.units import percent_text

ALIKE: Final = 0.5
"""A share of groups that teach nothing from which on this is said."""
COLLAPSED: Final = 0.25
"""What is left of the entropy of the beginning when answers are said to have become one."""
DRIFTED: Final = 2.0
"""A factor by which answers become longer or shorter."""
CUT: Final = 0.1
"""A share of answers that were cut off, or could not be scored."""
_FEW: Final = 4
"""Rollouts below which nothing is said of a course."""

Events = Sequence[Mapping[str, Any]]


def lessons(rollouts: Events, evaluations: Events) -> list[str]:
    """Sentences about the rollouts of a run, the most important first; none where all is well."""
    if not rollouts:
        return []
    said = [_alike(rollouts), _failed(rollouts), _unscored(evaluations), _cut(rollouts)]
    if len(rollouts) >= _FEW:
        said += [_exploited(rollouts, evaluations), _collapsed(rollouts), _drifted(rollouts)]
    return [sentence for sentence in said if sentence]


def _alike(rollouts: Events) -> str:
    groups, alike = (sum(int(each[name]) for each in rollouts) for name in ("groups", "alike"))
    if not groups or alike / groups < ALIKE:
        return ""
    if alike == groups and len({(each["reward"], each["reward_std"]) for each in rollouts}) == 1:
        reward = float(rollouts[0]["reward"])
        return (
            f"every answer got the same reward, {reward:.3f}, from which nothing is learned: see with luthier reward "
            "whether a good answer gets more, give partial credit, or train a few good answers with objective sft first"
        )
    best = {row for each in rollouts for row in each["always_best"]}
    never = {row for each in rollouts for row in each["never"]}
    return (
        f"{100 * alike / groups:.0f} % of groups got identical rewards, from which nothing is learned: raise "
        f"objective.temperature or rollouts.answers, or set rollouts.redraws; {len(best - never):,} prompts are always "
        f"solved as well as any, {len(never - best):,} never"
    )


def _failed(rollouts: Events) -> str:
    answers, failed = (sum(int(each[name]) for each in rollouts) for name in ("answers", "failed"))
    if not failed:
        return ""
    # Runs of before had no reasons in their events.
    reasons: Counter[str] = Counter()
    for each in rollouts:
        reasons.update(each.get("failures", {}))
    [(reason, count)] = reasons.most_common(1) or [("", 0)]
    why = f", {count:,} of them because of this: {reason}" if reason else ""
    return f"{failed:,} of {answers:,} answers could not be scored and were left out{why}"


def _unscored(evaluations: Events) -> str:
    """Held-out answers that are in no mean."""
    lacking = [each for each in evaluations if each.get("not_scored")]
    if not lacking:
        return ""
    lost = sum(int(each["not_scored"]) for each in lacking)
    reasons: Counter[str] = Counter()
    for each in lacking:
        reasons.update(each["failures"])
    [(reason, count)] = reasons.most_common(1)
    apart = sum("not_compared_with" in each for each in lacking)
    more = f"; {apart:,} of these lacked rows that the best one had, and were not compared with it" if apart else ""
    return (
        f"in {len(lacking):,} of {len(evaluations):,} evaluations {lost:,} held-out answers could not be scored, "
        f"{count:,} of them because of this: {reason}; the means of these evaluations are over the other rows{more}"
    )


def _cut(rollouts: Events) -> str:
    answers, cut = (sum(int(each[name]) for each in rollouts) for name in ("answers", "cut"))
    if not answers or cut / answers < CUT:
        return ""
    share = percent_text(cut / answers)
    return f"{share} of answers were cut off at rollouts.max_new_tokens: raise it, or set rollouts.cut to mask"


def _exploited(rollouts: Events, evaluations: Events) -> str:
    # What lacks rows may only have had the easier ones.
    held = [float(each["reward"]) for each in evaluations if "reward" in each and not each.get("not_scored")]
    first, last = _ends(rollouts, "reward")
    if len(held) < 2 or last <= first or held[-1] >= held[0]:
        return ""
    return (
        f"the reward rises in training ({first:.3f} to {last:.3f}) and falls on held-out prompts ({held[0]:.3f} to "
        f"{held[-1]:.3f}): something is exploited; read the samples, and the parts of the reward one by one"
    )


def _collapsed(rollouts: Events) -> str:
    first, last = _ends(rollouts, "entropy")
    if not first > 0 or last > COLLAPSED * first:
        return ""
    return (
        f"answers have become one: the mean surprise of a sampled token fell from {first:.3f} to {last:.3f} nats, so "
        "there is little left to choose from; lower optimizer.learning_rate, raise objective.temperature or beta"
    )


def _drifted(rollouts: Events) -> str:
    first, last = _ends(rollouts, "length")
    if not first > 0 or 1 / DRIFTED < last / first < DRIFTED:
        return ""
    return f"answers went from {first:.0f} to {last:.0f} tokens: see whether the reward pays for length"


def _ends(rollouts: Events, name: str) -> tuple[float, float]:
    """The mean over the first and over the last quarter."""
    values = [float(each[name]) for each in rollouts]
    count = max(1, len(values) // 4)
    return sum(values[:count]) / count, sum(values[-count:]) / count
