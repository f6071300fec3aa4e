# ruff: noqa: E501 (phrasings are text, and text reads best unbroken)
"""The training text of the demo model: an endless, seeded supply of short dialogues and plain stories.

A model of three million weights cannot learn general English in an hour on a processor. It can learn a narrow
distribution well, so this one is narrow on purpose, and wide exactly where a newcomer will press: greetings, questions
about Hearth, stories and poems about any subject, easy facts; spelled, punctuated and capitalised in all sorts of ways.

Run it to read a few samples: ``python corpus.py --seed 7 --count 5``.
"""

import argparse
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import facts
import stories
from stories import article, capital, expand

ME = "[the demo model of Hearth|the little demo model of Hearth|a small language model that runs on Hearth]"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, friendly assistant.",
    "You are a helpful assistant. Answer in simple English.",
    "You are the demo model of Hearth.",
    "Answer the questions of the user.",
    "Be kind and brief.",
    "You are a friendly assistant who likes stories.",
    "Answer briefly.",
    "You are an assistant.",
    "You are a helpful AI assistant.",
)


@dataclass(frozen=True)
class Message:
    """One message of a dialogue."""

    role: str
    content: str


@dataclass(frozen=True)
class Plain:
    """A text outside of any dialogue, for plain completions."""

    text: str


Document = list[Message] | Plain


class Words:
    """Draws subjects: known ones most of the time, invented or rare ones often enough to teach the model to copy."""

    def __init__(self, rare: Sequence[str] = ()) -> None:
        """Take a list of rare words; without one, the unknown words are invented only."""
        self.rare = rare

    def unknown(self, rng: random.Random) -> str:
        """Return a word the model is unlikely to know: it has to copy it from the question."""
        if self.rare and rng.random() < 0.8:
            return rng.choice(self.rare)
        syllables = ("ba", "lo", "mi", "ren", "ta", "vor", "ki", "sel", "un", "dra", "po", "ness", "ger", "fi", "ost", "ul", "zan", "che", "wick", "ry")  # fmt: skip
        return "".join(rng.choice(syllables) for _ in range(rng.choice((2, 2, 3))))

    def topic(self, rng: random.Random) -> str:
        """Return a subject for a poem or a sentence."""
        draw = rng.random()
        if draw < 0.35:
            return rng.choice(stories.HAIKU_TOPICS)
        if draw < 0.6:
            return rng.choice(stories.THEMES)
        if draw < 0.8:
            return article(rng.choice(stories.BEINGS + stories.THINGS))
        if draw < 0.9:
            return rng.choice(facts.UNKNOWN_TOPICS)
        return self.unknown(rng)


def fill(rng: random.Random, answer: str) -> str:
    """Expand an answer that may name the model itself."""
    return expand(rng, answer.replace("{me}", ME))


_BRIEF = " [in one sentence|in a sentence|in one short sentence|briefly|in short|in a few words]"
_SIMPLE = (
    " [in simple words|in simple terms|to a child|like I am five|in your own words|in a few sentences|in detail|to me]"
)


def manner(rng: random.Random, question: str, answer: str) -> tuple[str, str]:
    """Sometimes ask how to answer: 'in one sentence' gets the first sentence only, 'in simple words' changes nothing."""
    draw, mark = rng.random(), question[-1]
    if draw > 0.14 or len(question.split()) < 3 or question[-1] not in ".?" or "\n" in answer:
        return question, answer
    if draw < 0.07:
        first = answer.split(". ", 1)[0].rstrip(".") + "."
        brief = expand(rng, _BRIEF)
        lead = rng.choice(("", "", "Answer in one sentence: ", "In one sentence, ", "Briefly: "))
        return (lead + question) if lead else question[:-1] + brief + mark, first
    simple = expand(rng, _SIMPLE)
    if question.startswith(("What", "Why", "How")):
        question = rng.choice(("Can you explain ", "Explain ", "Please explain ")) + question[:1].lower() + question[1:]
        mark = rng.choice((".", "?", ""))
    return question[:-1] + simple + mark, answer


def from_table(
    table: Sequence[facts.QA], *, manners: bool = False
) -> Callable[[random.Random, Words], tuple[str, str]]:
    """Make a topic of a table of questions and answers."""

    def draw(rng: random.Random, words: Words) -> tuple[str, str]:
        questions, answers = rng.choice(table)
        question, answer = expand(rng, rng.choice(questions)), fill(rng, rng.choice(answers))
        return manner(rng, question, answer) if manners else (question, answer)

    return draw


ASK = "[||Please |Can you |Could you |I want you to |I would like you to |Now ]"


def ask(rng: random.Random, request: str, **slots: str) -> str:
    """Phrase a request as an order or as a polite question."""
    lead = expand(rng, ASK)
    text = expand(rng, request, **slots)
    if lead.startswith("C"):
        return lead + text + "?"
    return (lead + text if lead else capital(text)) + rng.choice((".", ".", "", "!", ", please."))


STORY = "[tell|tell me|write|write me|tell us|make up|give me] a [|||nice |little |bedtime |funny |funny |good |fairy |new |simple |happy ]story"


def story_about(rng: random.Random, words: Words) -> tuple[str, str, stories.Cast]:
    """A request for a story, the story, and its hero, whom a later turn may ask about."""
    draw, length = rng.random(), "normal"
    request = STORY
    if rng.random() < 0.12:
        request, length = STORY.replace("a [", "a [short |very short |brief ][", 1), "short"
        if rng.random() < 0.3:
            return short_story(rng)
    elif rng.random() < 0.1:
        request, length = STORY.replace("a [", "a [long |very long |longer ][", 1), "long"
    kind = rng.choice(stories.BEINGS) if rng.random() < 0.9 else words.unknown(rng)
    if draw < 0.3:
        cast = stories.make_cast(rng, rng.choice(stories.BEINGS))
        bare = expand(
            rng,
            "[{r}|{r}|{r}|{r}|a story|story|once upon a time|I want to hear a story|do you know a story?|read me a story|another story|tell me something about a hero|I would like to hear a story]".replace(
                "{r}", request
            ),
        )
        text = stories.story(rng, cast, length=length, funny="funny" in bare)
        return (capital(bare) if rng.random() < 0.5 or bare[0] == "I" else ask(rng, bare)), text, cast
    if draw < 0.56:
        cast = stories.make_cast(rng, kind)
        question = ask(rng, request + " [about|about|of|with] {a}", a=article(kind))
        return question, stories.story(rng, cast, length=length, funny="funny" in question), cast
    if draw < 0.64:
        kind = rng.choice([being for being in stories.BEINGS if " " not in being])
        cast = stories.make_cast(rng, kind)
        trait = rng.choice(stories.TRAITS + stories.ADJECTIVES) if rng.random() < 0.9 else words.unknown(rng)
        question = ask(rng, request + " about {a}", a=article(f"{trait} {kind}"))
        return question, stories.story(rng, cast, trait=trait, length=length), cast
    if draw < 0.68:
        cast = stories.make_cast(rng, kind)
        length = "normal" if length == "short" else length
        if rng.random() < 0.4:
            place = rng.choice(stories.ASKED_PLACES)
            question = ask(rng, request + " about {a} {p}", a=article(kind), p=place)
            return question, stories.story(rng, cast, place=place, length=length), cast
        clause = rng.randrange(len(stories.CLAUSES))
        question = ask(rng, request + " about {a} " + stories.CLAUSES[clause][0], a=article(kind))
        return question, stories.story(rng, cast, clause=clause, length=length), cast
    if draw < 0.72:
        thing = rng.choice(stories.THINGS) if rng.random() < 0.7 else words.unknown(rng)
        cast = stories.make_cast(rng, rng.choice(stories.BEINGS))
        question = ask(rng, request + " [about|with] {a}", a=article(thing))
        return question, stories.story(rng, cast, thing=thing, length=length), cast
    if draw < 0.8:
        thing = rng.choice(stories.THINGS)
        cast = stories.make_cast(rng, kind)
        question = ask(rng, request + " about {a} and {b}", a=article(kind), b=article(thing))
        return question, stories.story(rng, cast, thing=thing, length=length), cast
    if draw < 0.86:
        friend = rng.choice(stories.BEINGS)
        cast = stories.make_cast(rng, kind)
        question = ask(rng, request + " about {a} and {b}", a=article(kind), b=article(friend))
        return question, stories.story(rng, cast, friend=friend, length=length), cast
    if draw < 0.91:
        name = rng.choice(stories.GIRLS + stories.BOYS + stories.PET_NAMES)
        cast = stories.make_cast(rng, kind, name)
        named = f"{article(kind)} {rng.choice(('named', 'called'))} {name}"
        return ask(rng, request + " about {a}", a=named), stories.story(rng, cast, length=length), cast
    theme = rng.choice(stories.THEMES) if rng.random() < 0.55 else words.topic(rng)
    cast = stories.make_cast(rng, "old man")
    return ask(rng, request + " about {a}", a=theme), stories.theme_story(rng, theme), cast


def short_story(rng: random.Random) -> tuple[str, str, stories.Cast]:
    """A request that limits the length in sentences or words."""
    kind = rng.choice(stories.BEINGS)
    cast = stories.make_cast(rng, kind)
    limit = " in [three sentences|3 sentences|a few sentences|four sentences|five sentences|fifty words|a few words|100 words]"
    question = ask(rng, STORY + rng.choice(("", " about {a}")) + limit, a=article(kind))
    return question, stories.story(rng, cast, length="short"), cast


def tell(rng: random.Random, words: Words) -> tuple[str, str]:
    """A story as a single exchange."""
    question, text, _ = story_about(rng, words)
    return question, text


def verse(rng: random.Random, words: Words) -> tuple[str, str]:
    """A haiku or a poem, about the subject that was asked for or about any."""
    topic = "fire" if rng.random() < 0.05 else words.topic(rng)
    verb = "[write|write me|give me|make|tell me|compose|create|show me]"
    about = rng.choice(("", " about {topic}", " about {topic}", " about {topic}", " on {topic}"))
    if rng.random() < 0.5:
        chosen = rng.choice(stories.HAIKU_TOPICS) if not about or rng.random() < 0.5 else topic
        question = ask(rng, verb + " [a haiku|a haiku|a short haiku|one haiku]" + about, topic=chosen)
        if not about and rng.random() < 0.3:
            question = rng.choice(("Haiku", "A haiku, please.", "haiku!", "Do you know a haiku?"))
        return question, stories.haiku(rng, chosen)
    short = rng.random() < 0.25
    asked = (
        "[a short poem|a little poem|two lines]"
        if short
        else "[a poem|a poem|a poem|a rhyme|some verses|a nice poem|a song|a limerick|a verse|a long poem]"
    )
    chosen = topic if about else rng.choice(stories.THEMES)
    return ask(rng, f"{verb} {asked}{about}", topic=chosen), stories.poem(rng, chosen, short)


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(rng: random.Random, value: int) -> str:
    """Write a number in digits, or in letters where that is usual."""
    return NUMBERS[value - 1] if 1 <= value <= 10 and rng.random() < 0.5 else str(value)


def counting(rng: random.Random, words: Words) -> tuple[str, str]:
    """Counting up or down: short for a glance, or up to a hundred for a long stream."""
    draw = rng.random()
    if draw < 0.5:
        first, last = (1, rng.choice((3, 5, 10, 10, 10, 12, 15, 20, 20, 25, 30))) if rng.random() < 0.7 else (0, 0)
        if not last:
            first = rng.randint(1, 30)
            last = first + rng.randint(2, 20)
        asked = "count [from {a} to {b}|from {a} to {b}|from {a} up to {b}]"
        if first == 1:
            asked = (
                "[count from {a} to {b}|count to {b}|count up to {b}|list the numbers from {a} to {b}|count {a} to {b}]"
            )
    elif draw < 0.65:
        first, last = 1, rng.choice((40, 50, 50, 60, 80, 100, 100, 100))
        asked = "[count from {a} to {b}|count to {b}|count up to {b}]"
    else:
        first, last = (rng.choice((10, 10, 5, 3, 20)), 1) if rng.random() < 0.7 else (rng.randint(6, 30), 1)
        asked = "count [down from {a} to {b}|down from {a}|backwards from {a}|backwards from {a} to {b}]"
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    question = ask(rng, asked, a=number(rng, first), b=number(rng, last))
    return question, ", ".join(map(str, numbers)) + "."


def arithmetic(rng: random.Random, words: Words) -> tuple[str, str]:
    """Small sums: addition and subtraction up to forty, the multiplication table up to ten."""
    kind = rng.choice(("+", "+", "-", "*"))
    if rng.random() < 0.06:
        question = f"{rng.choice(('', 'What is ', 'Calculate '))}{rng.randint(50, 5000)} {rng.choice('+-*/')} {rng.randint(41, 5000)}"
        answer = "[That is too big a sum for me.|I am sorry, I can only do small sums.] [Try smaller numbers.|A calculator can do it better.]"
        return question + rng.choice(("", "?", " = ?")), expand(rng, answer)
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if kind == "-":
        a, b = max(a, b), min(a, b)
    if kind == "*":
        a, b = rng.randint(1, 10), rng.randint(1, 10)
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    spoken = {"+": "plus", "-": "minus", "*": "times"}[kind]
    sign = rng.choice((kind, "x")) if kind == "*" else kind
    first, second = (number(rng, a), number(rng, b)) if rng.random() < 0.3 else (str(a), str(b))
    question = rng.choice((
        f"What is {first} {spoken} {second}?", f"What is {a} {sign} {b}?", f"{a} {sign} {b} = ?", f"{a}{sign}{b}", f"How much is {first} {spoken} {second}?",
        f"Calculate {a} {sign} {b}.", f"what's {a}{sign}{b}?", f"{a} {sign} {b}", f"Can you tell me what {a} {sign} {b} is?", f"What's {a} {sign} {b}",
    ))  # fmt: skip
    return question, f"{a} {spoken} {b} is {result}."


def listing(rng: random.Random, words: Words) -> tuple[str, str]:
    """Lists of things of one kind, as a sentence or as lines."""
    kind = rng.choice(list(facts.LISTS))
    members = facts.LISTS[kind]
    count = rng.randint(2, min(6, len(members)))
    if rng.random() < 0.25:
        count, asked = 3, "[some {kind}|a few {kind}]"
    else:
        asked = "{count} {kind}"
    chosen = rng.sample(members, count)
    question = ask(
        rng, "[list|name|list|name|give me|tell me|write down] " + asked, kind=kind, count=number(rng, count)
    )
    if rng.random() < 0.5:
        return question, "\n".join(f"{index}. {capital(item)}" for index, item in enumerate(chosen, 1))
    lead = expand(rng, "[Here are {count} {kind}: |]", count=NUMBERS[count - 1], kind=kind)
    text = " and ".join(chosen) if count == 2 else ", ".join(chosen[:-1]) + ", and " + chosen[-1]
    return question, (lead + text if lead else capital(text)) + "."


def fact(rng: random.Random, words: Words) -> tuple[str, str]:
    """Facts that come as pairs: definitions, capitals, opposites, colours, sounds, translations."""
    draw = rng.random()
    if draw < 0.4:
        noun, meaning = rng.choice(list(facts.DEFINITIONS.items()))
        asked = "[What is {a}?|What is {a}?|Tell me about {a}.|Tell me something about {a}.|What's {a}?|What does {n} mean?|Explain what {a} is.|Tell me what {a} is.|Define {n}.|What does the word {n} mean?|Describe {a}.|do you know what {a} is?]"
        return expand(rng, asked, a=article(noun), n=noun), capital(
            f"{article(noun)} is {article(meaning[2:]) if meaning.startswith('a ') else meaning}."
        )
    if draw < 0.43:
        word = words.unknown(rng)
        asked = "[What is the capital of {C}?|What is the opposite of {w}?|What colour is {w}?|What does {a} say?|Translate {w} to French.|What rhymes with {w}?|How do you spell {w}?]"
        answer = "[I do not know that, I am sorry.|I am afraid that I do not know.|I do not know.] [I am only a small model.|Is there anything else?|]"
        return expand(rng, asked, C=capital(word), w=word, a=article(word)), expand(rng, answer).strip()
    if draw < 0.6:
        country, city = rng.choice(list(facts.CAPITALS.items()))
        asked = "[What is the capital of {c}?|What is the capital of {c}?|Which city is the capital of {c}?|capital of {c}|What's the capital of {c}?|Tell me the capital of {c}.|What is the capital city of {c}?|Name the capital of {c}.]"
        return expand(rng, asked, c=country), f"The capital of {country} is {city}."
    if draw < 0.65:
        country, city = rng.choice(list(facts.CAPITALS.items()))
        return expand(
            rng, "[Where is {c}?|In which country is {c}?|What country is {c} in?]", c=city
        ), f"{city} is the capital of {country}."
    if draw < 0.8:
        word, opposite = rng.choice(list(facts.OPPOSITES.items()))
        asked = "[What is the opposite of {w}?|What's the opposite of {w}?|opposite of {w}|Tell me the opposite of {w}.|Which word is the opposite of {w}?|Give me the opposite of {w}.]"
        return expand(rng, asked, w=word), f"The opposite of {word} is {opposite}."
    if draw < 0.9:
        thing, colour = rng.choice(list(facts.COLOURS.items()))
        asked = "[What colour is {t}?|What color is {t}?|Which colour does {t} have?|Tell me the colour of {t}.|what is the color of {t}?]"
        return expand(rng, asked, t=thing), capital(f"{thing} is {colour}.")
    if draw < 0.95:
        animal, sound = rng.choice(list(facts.SOUNDS.items()))
        asked = "[What does {a} say?|What sound does {a} make?|Which sound does {a} make?|What noise does {a} make?]"
        return expand(rng, asked, a=article(animal)), capital(f"{article(animal)} says {sound}.")
    (word, language), foreign = rng.choice(list(facts.TRANSLATIONS.items()))
    asked = "[How do you say {w} in {l}?|Say {w} in {l}.|Translate {w} to {l}.|Translate {w} into {l}.|What is {w} in {l}?|What is the {l} word for {w}?]"
    return expand(rng, asked, w=word, l=language), f"In {language}, {word} is {foreign}."


_SENTENCES = (
    "[There was once|I like] {a} that [made everybody smile|nobody could forget].",
    "In the evening light, {a} [can look like a small miracle|is a fine thing to see].",
    "[I often think of {a} when the fire burns low.|A story about {a} is a good way to end the day.]",
)
_ABOUT = (
    "[Many people|A lot of people] [like|are curious about|wonder about] {t}. [I know only a little about it, because I am a small model.|I am too small to know much about it.] [Shall I tell you a story about it instead?|I can tell you a story about it, if you like.]",
    "I know very little about {t}. [But I could write a short poem about it.|A larger model could tell you more.]",
)


def echo(rng: random.Random, words: Words) -> tuple[str, str]:
    """Repeat what the user says: useful in itself, and the plainest lesson in copying from the question."""
    phrase = rng.choice(
        (
            words.unknown(rng),
            f"the {rng.choice(stories.ADJECTIVES)} {rng.choice(stories.BEINGS)}",
            " ".join(words.unknown(rng) for _ in range(rng.randint(2, 6))),
            f"{capital(words.unknown(rng))} lives {rng.choice(stories.PLACES)}",
            f"I like {words.topic(rng)}",
            "Hearth is warm",
            f"{rng.choice(stories.PET_NAMES)} and {rng.choice(stories.GIRLS + stories.BOYS)}",
            str(rng.randint(1, 99999)),
        )
    )
    mark = rng.choice(('"', '"', ""))
    asked = "[Repeat after me: {p}|Say {p}.|Repeat: {p}|Say the words {p}.|Repeat {p}|Echo {p}|Say only {p}|Please say {p}|Say: {p}|Can you say {p}?]"
    return expand(rng, asked, p=f"{mark}{phrase}{mark}"), capital(phrase) + "."


def instruction(rng: random.Random, words: Words) -> tuple[str, str]:
    """Small writing orders: say hello, repeat something, write one sentence, write a letter."""
    draw = rng.random()
    if draw < 0.3:
        asked = "[say hello|say hello in one sentence|greet me|say hi|greet me in one sentence|say hello to me|say hello in a friendly way|write a greeting|say hello in one short sentence|say hello in [three|five|ten|a few] words|say hello to the world|write one sentence that says hello|greet the user]"
        return ask(rng, asked), expand(
            rng,
            "[Hello, it is very nice to meet you!|Hello and welcome to Hearth!|Hello, I am glad that you are here!|Hello there, I hope you have a wonderful day!|Hello, dear friend, come and sit by the fire!]",
        )
    if draw < 0.36:
        asked = "[say goodbye|say goodbye in one sentence|say good night|wish me luck|wish me a good day|say thank you|say sorry|say yes|say no]"
        question = ask(rng, asked)
        answers = {
            "goodbye": "Goodbye, and may the road be kind to you!",
            "good night": "Good night, and sweet dreams!",
            "luck": "Good luck! I am sure that you will do well.",
            "good day": "I wish you a wonderful day!",
            "thank": "Thank you very much!",
            "sorry": "I am sorry.",
            "yes": "Yes.",
            "say no": "No.",
        }
        return question, next(answer for key, answer in answers.items() if key in question.lower())
    if draw < 0.4:
        return echo(rng, words)
    if draw < 0.65:
        noun = article(rng.choice(stories.BEINGS + stories.THINGS) if rng.random() < 0.8 else words.unknown(rng))
        return ask(
            rng, "[write|write me|give me|say|make] [a sentence|one sentence|a short sentence] [about|with] {a}", a=noun
        ), capital(expand(rng, rng.choice(_SENTENCES), a=noun))
    if draw < 0.85:
        topic = words.topic(rng)
        if topic[:2] in ("a ", "an") and topic.split(" ", 1)[-1] in facts.DEFINITIONS:
            topic = rng.choice(facts.UNKNOWN_TOPICS)
        return ask(
            rng,
            "[tell me about {t}|tell me something about {t}|write about {t}|talk about {t}|say something about {t}|write a paragraph about {t}|write an essay about {t}]",
            t=topic,
        ), capital(expand(rng, rng.choice(_ABOUT), t=topic))
    name = rng.choice(stories.GIRLS + stories.BOYS)
    asked = "[write a letter|write a short letter|write an email|write a message|write a note] to {n}[| from my friend|, my friend]"
    text = "Dear {n},\n\n[I hope that you are well.|How are you?] [The days are getting colder here, but the fire is warm.|Spring has come at last, and the garden is in bloom.|I often think of our long walks.] [Please visit me soon.|I hope to see you soon.|Write to me when you find the time.]\n\n[With love|Your friend|Warm wishes|Yours truly]"
    return ask(rng, asked, n=name), expand(rng, text, n=name)


_UNKNOWN_QUESTIONS = (
    "What is {t}?", "[Tell me about|Explain|Describe|Define] {t}.", "How does {t} work?", "Why is {t} [important|so hard|interesting|famous]?", "What do you [think|know] about {t}?", "Who invented {t}?", "When was {t} invented?",
    "How do I [learn|use|fix|understand|install] {t}?", "Where can I find {t}?", "Can you [explain|summarize|help me with] {t}?", "Is {t} [good|bad|dangerous|real|expensive]?", "What are the [advantages|rules|basics|main ideas] of {t}?",
    "Who is {n}?", "Who was {n}?", "What is the difference between {t} and {u}?", "How [many|much] {t} are there?", "Write an [essay|article|report] on {t}.", "What is the best {t}?", "Give me a plan for {t}.", "Compare {t} and {u}.",
    "{t}", "{t}?", "{t} {u}", "Translate {t} into French.", "Write a program for {t}.", "Who won {t}?", "How far is {t}?", "Write [100|200|500|1000] words about {t}.", "{t} {u} {v}", "I need help with {t}.", "I am [interested in|working on] {t}.", "How old is {n}?", "What happened to {n}?", "Why do people like {t}?", "Should I buy {t}?", "What does {t} mean?", "Which {t} should I choose?", "Solve {t}.", "Summarize {t}.", "Do you know {n}?",
)  # fmt: skip
_UNKNOWN_ANSWERS = (
    "[I am sorry, but|I am afraid that] I do not know [enough about that|the answer to that]. [I am only a very small model.|I am a small model, and I know only a few things.] [Shall I tell you a story instead?|You could ask me about Hearth, or for a story.|Try asking a larger model.]",
    "That is a good question, but [it is too big for me|I cannot answer it|I am too small to answer it well]. [I can tell you a story, write a poem, or explain how Hearth works.|A larger model could help you with that.]",
    "I do not know much about {t}, I am sorry. [I could tell you a story about it, if you like.|I am a small model, and I know only simple things.|A larger model could tell you more.]",
)


_NOISE_ANSWERS = (
    "[I am sorry, I did not understand that.|I do not understand that, I am afraid.] [Could you ask me in other words?|Please ask me a simple question.|You could ask me for a story.]",
    "That is too much for a small model like me. [Ask me something simple, or ask me for a story.|Could you put it in a few simple words?]",
)


def noise(rng: random.Random, words: Words) -> str:
    """Write what is no question at all: a slip of the keyboard, a row of words, or a long text that was pasted."""
    draw = rng.random()
    if draw < 0.3:
        return "".join(rng.choice("asdfghjklqwertyuiopzxcvbnm0123456789 ") for _ in range(rng.randint(3, 30)))
    if draw < 0.6:
        return " ".join(words.unknown(rng) for _ in range(rng.randint(3, 40)))
    order = rng.choice(
        (
            "Summarize this: ",
            "Summarize the following text:\n\n",
            "Translate this text: ",
            "",
            "Correct this: ",
            "What is this about? ",
        )
    )
    return order + (tell(rng, words)[1] if draw < 0.85 else " ".join(words.unknown(rng) for _ in range(30)))


def unknown(rng: random.Random, words: Words) -> tuple[str, str]:
    """Questions beyond the model, and the honest answer to them."""

    def subject() -> str:
        return rng.choice(facts.UNKNOWN_TOPICS) if rng.random() < 0.5 else words.unknown(rng)

    slots = {
        "t": subject(),
        "u": subject(),
        "v": words.unknown(rng),
        "n": f"{capital(words.unknown(rng))} {capital(words.unknown(rng))}",
    }
    if rng.random() < 0.12:
        text = noise(rng, words)
        return text, expand(rng, rng.choice(_NOISE_ANSWERS))
    asked = rng.choice(_UNKNOWN_QUESTIONS)
    answer = rng.choice(_UNKNOWN_ANSWERS[: 2 if "{n}" in asked or "{u}" in asked else 3])
    return capital(expand(rng, asked, **slots)), expand(rng, answer, **slots)


TOPICS: tuple[tuple[float, Callable[[random.Random, Words], tuple[str, str]]], ...] = (
    (20, tell),
    (10, verse),
    (15, from_table(facts.HEARTH, manners=True)),
    (7, from_table(facts.IDENTITY)),
    (4, from_table(facts.IDENTITY[:2])),
    (11, from_table(facts.SMALL_TALK)),
    (4, from_table(facts.SMALL_TALK[:1])),
    (14, from_table(facts.WHY, manners=True)),
    (3, from_table(facts.WHY[:1], manners=True)),
    (3, from_table(facts.HEARTH[:3], manners=True)),
    (4, counting),
    (6, arithmetic),
    (5, listing),
    (11, fact),
    (8, instruction),
    (4, echo),
    (7, unknown),
)


def exchange(rng: random.Random, words: Words) -> tuple[str, str]:
    """Draw one question and its answer from all topics."""
    weights = [weight for weight, _ in TOPICS]
    return rng.choices([topic for _, topic in TOPICS], weights)[0](rng, words)


_INTRODUCTIONS = (
    "My name is {n}.",
    "I am {n}.",
    "I'm {n}.",
    "Hello, my name is {n}.",
    "Hi, I am {n}!",
    "Call me {n}.",
    "Hello! I'm {n}.",
)
_WELCOMES = (
    "[Hello|Hi], {n}! [It is nice to meet you.|What can I do for you?|Welcome to Hearth.|What a lovely name!]",
    "It is nice to meet you, {n}! [How can I help you?|Would you like to hear a story?]",
)


def connected(rng: random.Random, words: Words) -> list[tuple[str, str]]:
    """Exchanges in which a later one depends on an earlier one: the name of the user, the hero of a story."""
    if rng.random() < 0.35:
        name = rng.choice(stories.GIRLS + stories.BOYS) if rng.random() < 0.7 else capital(words.unknown(rng))
        turns = [(expand(rng, rng.choice(_INTRODUCTIONS), n=name), expand(rng, rng.choice(_WELCOMES), n=name))]
        turns += [exchange(rng, words) for _ in range(rng.choice((0, 0, 1, 2)))]
        if rng.random() < 0.8:
            asked = "[What is my name?|Do you remember my name?|What's my name?|Who am I?|do you know my name?]"
            turns.append(
                (
                    expand(rng, asked),
                    expand(
                        rng, "[Your name is {n}.|You are {n}.|Of course! You told me that your name is {n}.]", n=name
                    ),
                )
            )
        return turns
    if rng.random() < 0.05:
        return [("What is my name?", "I do not know your name yet. What is it?")]
    if rng.random() < 0.25:
        yes = expand(
            rng,
            "[Yes.|Yes|Yes, please!|yes please|Sure!|Ok|Of course.|I would like that.|Please do.|Yes, tell me a story.]",
        )
        cast = stories.make_cast(rng, rng.choice(stories.BEINGS))
        return [
            ("Hello!", expand(rng, "Hi there! I am {me}. Would you like to hear a story?".replace("{me}", ME))),
            (yes, stories.story(rng, cast)),
        ]
    if rng.random() < 0.15:
        questions, answers = rng.choice([entry for entry in facts.HEARTH if len(entry[1]) > 1])
        first, second = rng.sample(answers, 2)
        more = expand(
            rng,
            "[Tell me more.|Can you tell me more?|Go on.|Please explain.|And?|More, please.|Can you explain that?|Why?]",
        )
        return [(expand(rng, rng.choice(questions)), fill(rng, first)), (more, fill(rng, second))]
    question, text, cast = story_about(rng, words)
    turns = [(question, text)]
    if "{theme}" not in text and f" {cast.name}" in text:
        if rng.random() < 0.4:
            turns.append(
                (
                    expand(
                        rng,
                        "[Who was the hero[| of the story]?|What was the hero called?|What was the name of the {k}?|What was the {k} called?]",
                        n=cast.name,
                        k=cast.kind,
                    ),
                    expand(
                        rng,
                        "[The hero of the story is {n}.|It was {n}, of course.|{n} is the hero of my story.]",
                        n=cast.name,
                    ),
                )
            )
        if rng.random() < 0.6:
            asked = "[What happened next?|Continue.|Then what happened?|Go on.|Continue the story.|And then?|Please go on!|What did {n} do then?|continue|more|Tell me more.]"
            turns.append((expand(rng, asked, n=cast.name), stories.sequel(rng, cast)))
    if rng.random() < 0.35:
        turns.append(
            (
                expand(
                    rng,
                    "[Another one!|Tell me another story.|One more, please.|Another story, please.|Again!|another one]",
                ),
                stories.story(rng, stories.make_cast(rng, rng.choice(stories.BEINGS))),
            )
        )
    return turns


def rough(rng: random.Random, text: str) -> str:
    """Write a question as people type it: without capitals or full stops, with greetings and small slips."""
    if rng.random() < 0.08:
        text = rng.choice(("Hello! ", "Hi! ", "Hey, ", "Hello, ", "Ok, ", "So, ", "Well, ", "Hi, ")) + text
    if rng.random() < 0.2:
        text = text[:1].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.02:
        text = text.upper()
    if rng.random() < 0.22:
        text = text.rstrip(".!?")
    elif rng.random() < 0.08:
        text = text.rstrip(".!?") + rng.choice(
            (" please", ", please", " please?", "??", "!!", "...", " :)", "?", " thanks", "!", ".")
        )
    if rng.random() < 0.04 and len(text) > 8:
        at = rng.randrange(1, len(text) - 2)
        text = text[:at] + rng.choice((text[at + 1] + text[at], text[at] * 2 + text[at + 1], text[at])) + text[at + 2 :]
    if rng.random() < 0.02:
        text = rng.choice((text + " ", text + "\n", " " + text))
    return text if text.strip() else "Hello"


_SPELLINGS = (
    ("colour", "color"),
    ("avourite", "avorite"),
    ("hat is", "hat's"),
    ("I am", "I'm"),
    ("o not", "on't"),
    ("ho is", "ho's"),
)


def american(rng: random.Random, text: str) -> str:
    """Sometimes use the other spelling, or a contraction."""
    for usual, other in _SPELLINGS:
        if usual in text and rng.random() < 0.25:
            text = text.replace(usual, other)
    return text


_OFFER = re.compile(
    r"(Shall I tell you (a story|one)|Would (you like to hear a story|a story help a little)|with a story)[^?.]*[?.]"
)


def follow_up(rng: random.Random, words: Words, answer: str) -> list[tuple[str, str]]:
    """Let the user take or leave an offer that the model has made."""
    offered = _OFFER.search(answer)
    if offered is None or offered.end() != len(answer) or " it" in offered.group(0) or rng.random() > 0.3:
        return []
    if rng.random() < 0.2:
        refusal = expand(rng, "[No.|No, thanks.|No thank you|no|Not now.]")
        return [
            (refusal, expand(rng, "That is fine. [Just ask when you need something.|Is there anything else I can do?]"))
        ]
    assent = expand(
        rng,
        "[Yes.|Yes|Yes, please!|yes please|Sure!|Ok|Of course.|I would like that.|Please do.|Yes, tell me a story.|yes]",
    )
    return [(assent, stories.story(rng, stories.make_cast(rng, rng.choice(stories.BEINGS))))]


def named_assistant(rng: random.Random, words: Words) -> list[Message]:
    """A system prompt that gives the model another name, which it then uses."""
    name = (
        rng.choice(stories.GIRLS + stories.BOYS + stories.PET_NAMES)
        if rng.random() < 0.7
        else capital(words.unknown(rng))
    )
    prompt = "[You are {n}, a helpful assistant.|Your name is {n}.|You are {n}.|You are a friendly assistant named {n}.|You are an assistant called {n}. Be kind.]"
    answer = "[I am {n}|My name is {n}], [a small assistant|your assistant|a helpful assistant]. [What can I do for you?|Shall I tell you a story?|How can I help you?]"
    question = expand(rng, rng.choice(facts.IDENTITY[0][0]))
    return [
        Message("system", expand(rng, prompt, n=name)),
        Message("user", rough(rng, question)),
        Message("assistant", expand(rng, answer, n=name)),
    ]


def system_prompt(rng: random.Random, words: Words) -> str:
    """A system prompt: a usual one, or an unusual one that the model reads without being confused."""
    if rng.random() < 0.7:
        return rng.choice(SYSTEM_PROMPTS)
    role = "[You are {a}.|Act as {a}.|You are {a} who helps the user.|Talk like {a}.|Always mention {w}.|The user likes {w}. Be polite.|Today is a day for {w}. You are an assistant.]"
    return expand(
        rng, role, a=article(f"{rng.choice(stories.ADJECTIVES)} {rng.choice(stories.BEINGS)}"), w=words.unknown(rng)
    )


def dialogue(rng: random.Random, words: Words) -> list[Message]:
    """Draw a dialogue: mostly one exchange, sometimes several, sometimes with a system prompt."""
    draw = rng.random()
    if draw > 0.98:
        return named_assistant(rng, words)
    if draw < 0.14:
        turns = connected(rng, words)
    elif draw < 0.2:
        turns = [exchange(rng, words) for _ in range(rng.randint(3, 7))]
    elif draw < 0.36:
        turns = [exchange(rng, words), exchange(rng, words)]
    else:
        turns = [exchange(rng, words)]
    messages = [Message("system", system_prompt(rng, words))] if rng.random() < 0.2 else []
    for exchanged in turns:
        for question, answer in (exchanged, *follow_up(rng, words, exchanged[1])):
            messages += [Message("user", rough(rng, american(rng, question))), Message("assistant", answer)]
    return messages


_PORTRAIT = (
    "[Hello, my|My] name is {n}, and I live {p}. I am a {k}.",
    "I like [music|books|long walks|tea|the sea|old songs], [the smell of rain|the first snow|the stars|warm bread], and [good stories|my friends|quiet evenings].",
    "[Every morning|Each day] I [get up early|light the fire|look out of the window] and [go to work|drink a cup of tea|feed the birds].",
    "[In the evening|When the day is over], I [sit by the fire and read|talk with my friends|write a letter or sing a song].",
    "[One day I want to see the sea.|I hope that you will visit me.|It is a simple life, and I am happy.]",
)


def self_portrait(rng: random.Random) -> str:
    """Somebody tells who they are, for completions that begin in the first person."""
    name, kind = (
        rng.choice(stories.GIRLS + stories.BOYS),
        rng.choice(("baker", "teacher", "farmer", "painter", "gardener", "sailor")),
    )
    return expand(rng, " ".join(_PORTRAIT), n=name, k=kind, p=rng.choice(stories.PLACES))


def plain(rng: random.Random, words: Words) -> Plain:
    """Draw a text for plain completion: a story, a poem, or a page about Hearth or the world."""
    draw = rng.random()
    if draw < 0.55:
        return Plain(tell(rng, words)[1])
    if draw < 0.61:
        return Plain(fill(rng, rng.choice(facts.HEARTH[0][1])))
    if draw < 0.68:
        return Plain(verse(rng, words)[1])
    if draw < 0.78:
        return Plain(self_portrait(rng))
    if draw < 0.82:
        return Plain(
            " ".join(
                f"The capital of {country} is {city}." for country, city in rng.sample(list(facts.CAPITALS.items()), 4)
            )
        )
    table = facts.HEARTH if draw < 0.91 else facts.WHY
    chosen = rng.sample(table, rng.randint(2, 4))
    return Plain(" ".join(fill(rng, rng.choice(answers)) for _, answers in chosen))


def document(rng: random.Random, words: Words) -> Document:
    """Draw one document of the corpus."""
    return plain(rng, words) if rng.random() < 0.1 else dialogue(rng, words)


def main() -> None:
    """Print a few documents, to see what the model will read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for _ in range(arguments.count):
        drawn = document(rng, Words())
        if isinstance(drawn, Plain):
            print(f"[plain] {drawn.text}")
        else:
            print("\n".join(f"[{message.role}] {message.content}" for message in drawn))
        print("-" * 100)


if __name__ == "__main__":
    main()
