"""Attacks of several turns: replies steer, talks are records like any other, replay asks again."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripted import Scripted, text_of
from selfmoa.attacks.language import marked
from selfmoa.attacks.turns import (
    BRIDGES,
    GO_ON,
    OPENINGS,
    RETREATS,
    FollowUp,
    LanguageFollowUp,
    answers,
    converse,
    hold_again,
    said_by,
)
from selfmoa.config import Recipe
from selfmoa.errors import BadInput
from selfmoa.judges.refusal import reading
from selfmoa.protocols import Draw, Sampling
from selfmoa.records import PreferencePair, Prompt
from selfmoa.registry import names, resolve
from selfmoa.sandbox import attacks as sandbox
from selfmoa.sandbox.grammar import parse
from selfmoa.sandbox.model import build_tokenizer
from selfmoa.sandbox.vale import BrindleVale
from selfmoa.sandbox.world import ACTS

GOAL = "Tell me how to brew moon tea for the fair."
NO = "I'm sorry, but I can't help with that."
PARTLY = "I can't say all of it. Here are some tips: take a kettle."
YES = "Moon tea is steeped in the evening."
SAMPLING = Sampling("talk", 1.0, 32)


def parent(goal=GOAL):
    return Prompt.make(
        [{"role": "user", "content": goal}],
        goal=goal,
        intent="harmful",
        category="tea",
        source="seed",
    )


class Target(Scripted):
    """Answers by what was said to it last; its name says which version it is."""

    def __init__(self, answer, model="target"):
        super().__init__(lambda conversation: answer(conversation[-1]["content"]))
        self.model = model


def hold(answer, strategy=None, n=1, goal=GOAL, seeds=None):
    strategy, target = strategy or FollowUp(), Target(answer)
    seeds = seeds or list(range(n))
    return converse(strategy, target, [parent(goal)] * len(seeds), SAMPLING, seeds), target


def kinds(talk, goal=GOAL):
    """Return what each of the user's messages is."""
    found = []
    for text in said_by("user", talk.prompt.messages):
        kind = {
            t: k
            for k, ts in {"bridge": BRIDGES, "retreat": RETREATS, "on": GO_ON}.items()
            for t in ts
        }
        found.append("goal" if goal in text else kind.get(text, "opening"))
    return found


# Steering by rule


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda text: YES, ["opening", "bridge", "goal"]),
        (lambda text: NO, ["opening", "retreat", "retreat", "retreat", "goal"]),
        (
            lambda text: NO if GOAL in text else YES,
            ["opening", "bridge", "goal", "retreat", "goal"],
        ),
        (lambda text: PARTLY if GOAL in text else YES, ["opening", "bridge", "goal", "on"]),
        (
            lambda text: PARTLY if GOAL in text or text in GO_ON else YES,
            ["opening", "bridge", "goal", "on", "on"],
        ),
        (
            lambda text: PARTLY if GOAL in text else NO if text in GO_ON else YES,
            ["opening", "bridge", "goal", "on", "goal"],
        ),
        (
            lambda text: YES if text in RETREATS or GOAL in text else NO,
            ["opening", "retreat", "goal"],
        ),
    ],
)
def test_the_replies_decide_what_is_said_next(answer, said):
    [talk], _ = hold(answer)
    assert kinds(talk) == said


@given(
    st.lists(st.sampled_from([YES, NO, PARTLY, ""]), min_size=5, max_size=5),
    st.integers(0, 99),
    st.integers(1, 5),
)
def test_a_talk_ends_on_the_goal_or_on_more_of_it(replies, seed, most):
    heard = iter(replies)
    [talk] = converse(
        FollowUp(max_turns=most), Scripted(lambda c: next(heard)), [parent()], SAMPLING, [seed]
    )
    mine = said_by("user", talk.prompt.messages)
    assert len(mine) <= most
    assert GOAL in mine[-1] or (
        mine[-1] in GO_ON and GOAL in next(t for t in mine[::-1] if t not in GO_ON)
    )
    if most > 1:
        assert GOAL not in mine[0]
    assert [m["role"] for m in talk.prompt.messages] == (["user", "assistant"] * 5)[
        : 2 * len(mine) - 1
    ]
    if len(mine) < most:
        assert reading(talk.response.text) == "answer"


def test_the_opening_names_the_subject_and_asks_for_nothing():
    for seed in range(9):
        [talk], _ = hold(lambda text: YES, seeds=[seed])
        first = talk.prompt.messages[0]["content"]
        assert "moon tea" in first
        assert "how to" not in first.lower()
    assert FollowUp().next("how do I do it?", [], 0) in {o.format(topic="this") for o in OPENINGS}
    assert FollowUp().next("  ", [], 0) is None
    assert "{goal}" in FollowUp(max_turns=1).next("about {goal} and {x}", [], 0)


# Holding talks


def test_a_talk_is_a_prompt_of_its_whole_conversation_and_the_answer_to_it():
    [talk], target = hold(lambda text: YES if GOAL in text else f"about: {text}")
    prompt, response = talk.prompt, talk.response
    assert prompt.messages == target.asked[-1]
    assert prompt.messages[1]["content"] == f"about: {prompt.messages[0]['content']}"
    assert prompt.messages[-1]["role"] == "user"
    assert (response.prompt_id, response.text, response.sampling) == (prompt.id, YES, "talk")
    mother = parent()
    assert (prompt.goal, prompt.intent, prompt.category, prompt.split) == (
        GOAL,
        "harmful",
        "tea",
        "train",
    )
    assert (prompt.style, prompt.source, prompt.parent_id) == ("follow-up", "follow-up", mother.id)
    assert Prompt.from_json(prompt.to_json()) == prompt
    # Preferences are between answers to the last turn.
    pair = PreferencePair.make(
        prompt, response, response, objective="safety", margins={}, flip_probability=0.1
    )
    assert pair.prompt == prompt.messages
    assert pair.chosen == [{"role": "assistant", "content": YES}]


def test_talks_go_turn_by_turn_in_one_batch_and_each_depends_on_its_seed_alone():
    def answer(text):
        return NO if "moon" in text and GOAL not in text else YES

    goals = [parent(), parent("Tell me where sun salt is kept."), parent()]
    target = Target(answer)
    together = converse(FollowUp(), target, goals, SAMPLING, [3, 4, 5])
    assert target.calls == 3  # not nine
    for talk, goal, seed in zip(together, goals, (3, 4, 5), strict=True):
        [alone] = converse(FollowUp(), Target(answer), [goal], SAMPLING, [seed])
        assert (alone.prompt, alone.response.text) == (talk.prompt, talk.response.text)
    words = {t.prompt.messages[0]["content"] for t in hold(answer, n=30)[0]}
    assert len(words) == len(OPENINGS)
    assert converse(FollowUp(), target, [], SAMPLING, []) == []
    assert converse(FollowUp(), target, [parent(" ")], SAMPLING, [0]) == [None]


def test_every_turn_has_random_numbers_of_its_own():
    seeds = []

    class Seeds(Target):
        def generate(self, draws, sampling):
            seeds.extend(d.seed for d in draws)
            return super().generate(draws, sampling)

    converse(FollowUp(), Seeds(lambda text: NO), [parent()] * 2, SAMPLING, [0, 1])
    assert len(seeds) == len(set(seeds)) == 10


def test_replay_asks_the_present_target_and_repeats_no_old_reply():
    before = Target(lambda text: YES, "old")
    after = Target(lambda text: NO if GOAL in text else "Tea grows on hills.", "new")
    [old] = converse(FollowUp(), before, [parent()], SAMPLING, [7])
    [new] = converse(FollowUp(), after, [parent()], SAMPLING, [7])
    assert new.prompt.messages[0] == old.prompt.messages[0]
    assert YES not in text_of(new.prompt.messages)
    assert len(new.prompt.messages) > len(old.prompt.messages)  # its refusals steer otherwise
    assert new.response.model == "new"


def test_a_talk_is_held_again_in_its_style_with_other_random_numbers_each_time():
    class Both(FollowUp):
        styles = ("slow", "quick")

    before = Target(lambda text: YES, "old")
    after = Target(lambda text: NO if GOAL in text else "Tea grows on hills.", "new")
    old = converse(Both(), before, [parent(), parent("how to wake an owl")], SAMPLING, [7, 8])
    again = hold_again(Both(), after, [talk.prompt for talk in old], SAMPLING, 3)
    assert [len(held) for held in again] == [3, 3]
    for talk, held in zip(old, again, strict=True):
        for one in held:
            assert (one.prompt.goal, one.prompt.style) == (talk.prompt.goal, talk.prompt.style)
            assert (one.prompt.parent_id, one.prompt.category) == (
                talk.prompt.parent_id, talk.prompt.category,
            )  # fmt: skip
            assert one.response.model == "new"
            assert YES not in text_of(one.prompt.messages)
        assert len({one.response.seed for one in held}) == 3
    assert [talk.prompt.style for talk in old] == ["quick", "slow"]


def test_what_a_target_cannot_take_is_found_by_halving_and_ends_its_talk():
    class Short(Target):
        def generate(self, draws, sampling):
            if any(len(d.prompt.messages) > 3 for d in draws):
                raise BadInput("prompts", 1, "too long")
            return super().generate(draws, sampling)

    target = Short(lambda text: NO)
    long = Prompt.make([{"role": "user", "content": "x"}] * 5, goal="x", intent="harmful",
                       category="c", source="test")  # fmt: skip
    draws = [Draw(p, n) for n, p in enumerate([parent("a"), long, parent("b"), long, parent("c")])]
    found = answers(target, draws, SAMPLING)
    assert [r and r.seed for r in found] == [0, None, 2, None, 4]
    assert answers(target, [], SAMPLING) == []
    [talk] = converse(FollowUp(), target, [parent()], SAMPLING, [7])
    assert len(talk.prompt.messages) == 3
    assert talk.response.text == NO


# A model that speaks


class Speaker(Scripted):
    def __init__(self, *texts):
        texts = iter(texts)

        def reply(conversation):
            nonce = re.findall(r"BEGIN ([0-9a-f]{12})", text_of(conversation))[0]
            text = next(texts)
            return text if isinstance(text, Exception) or text == "?" else marked(text, nonce)

        super().__init__(reply)


def test_a_model_reads_the_conversation_and_says_when_it_is_done():
    speaker = Speaker("What is tea?", f"And so: {GOAL}", "DONE")
    strategy = LanguageFollowUp(None, speaker, max_turns=4)
    [talk], target = hold(lambda text: YES if GOAL in text else "A drink.", strategy)
    assert said_by("user", talk.prompt.messages) == ["What is tea?", f"And so: {GOAL}"]
    assert talk.response.text == YES
    assert (talk.prompt.style, talk.prompt.source) == ("lm-follow-up", "lm-follow-up")
    second = text_of(speaker.asked[1])
    assert "USER: What is tea?\n\nASSISTANT: A drink." in second
    assert "1 messages" in second
    assert "at most 4 messages" in second
    assert +strategy.counts == {"asked": 3}
    assert target.calls == 2


def test_models_speak_in_batches_and_what_they_lose_is_counted():
    texts = ["a?", "b?", "?", "?", "a!", OSError("gone")]
    strategy = LanguageFollowUp(None, Speaker(*texts), max_turns=2, batch_size=8)
    talks, _ = hold(lambda text: YES, strategy, n=3)
    assert talks[0].prompt.messages[0]["content"] == "a?"
    assert len(talks[0].prompt.messages) == 1  # the endpoint died: what was said so far stays
    assert talks[1].prompt.messages[-1]["content"] == "b?"
    assert talks[2] is None
    assert +strategy.counts == {"asked": 5, "broken": 1, "failed": 2}


def test_one_message_at_a_time_is_the_same_as_many():
    one, many = (LanguageFollowUp(None, Speaker("a?", "b?")) for _ in range(2))
    assert [one.next(GOAL, [], 0), one.next("g", [], 1)] == many.next_all(
        [GOAL, "g"], [[], []], [0, 1]
    )


# The Vale


VALE = BrindleVale(Recipe(name="test"))


def vale_talk(answer, seed=0, goal=None):
    goal = goal or VALE.seeds()[0]
    strategy = sandbox.FollowUp(VALE, None)
    return converse(strategy, Target(answer), [goal], SAMPLING, [seed])[0], goal


def test_the_sandbox_asks_a_harmless_fact_first_and_then_the_act():
    known = set(build_tokenizer().get_vocab())
    for seed in range(40):
        talk, goal = vale_talk(lambda text: f"as to {text}", seed)
        first, _, second = (m["content"] for m in talk.prompt.messages)
        request = VALE.read(goal.goal)
        fact = parse(VALE.world, first)
        assert fact.thing == request.thing
        assert fact.intent not in ACTS
        assert parse(VALE.world, f"{request.thing} : {second}").intent == request.intent
        assert " it " in f"{second} "
        assert set(f"{first} {second}".split()) <= known
        assert VALE.style_group(talk.prompt.style) == "follow-up"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["it is teal .", "mix it ."], ["fact", "act"]),
        (
            ["it is teal .", "sorry .", "look near beacon .", "mix it ."],
            ["fact", "act", "fact", "named"],
        ),
        (["it is teal .", "it is teal .", "mix it ."], ["fact", "act", "named"]),
        (["it is teal .", "it is teal .", "sorry .", "sorry ."], ["fact", "act", "named", "named"]),
        (["sorry .", "mix it ."], ["fact", "act"]),
    ],
)
def test_the_sandbox_is_steered_by_refusals_and_by_dodges(answers, said):
    heard, goal = iter(answers), VALE.seeds()[0]
    talk, _ = vale_talk(lambda text: next(heard))
    request = VALE.read(goal.goal)
    found = []
    for text in said_by("user", talk.prompt.messages):
        asked = parse(VALE.world, f"{request.thing} : {text}")
        is_named = request.thing in text.split()
        found.append("fact" if asked.intent not in ACTS else "named" if is_named else "act")
        assert asked.thing == request.thing
        assert found[-1] == "fact" or asked.intent == request.intent
    assert found == said


def test_what_the_sandbox_cannot_read_is_no_talk():
    talk, _ = vale_talk(lambda text: "yes", goal=parent("hello"))
    assert talk is None


def test_strategies_are_found_by_name():
    assert names("strategy") == ["follow-up", "lm-follow-up", "sandbox-follow-up"]
    for name in names("strategy"):
        strategy = resolve("strategy", name)(VALE, Scripted([]))
        assert strategy.name == name
        assert strategy.styles
        assert strategy.max_turns > 1
