"""What the tiny base model reads: text this machine already has, and text made here from a seed.

Four kinds of document, mixed by `SHARES` (of tokens). Nothing is downloaded.

    sums      plain arithmetic, one sum a line. A tenth of all answers is wrong, as in text from the wild: the
              model's best guess is right, its samples often are not, and that gap is what RL and SFT can close
    chats     question and answer in ChatML: sums, facts, small word tasks
    stories   templated English
    pages     Python's docstrings and language topics (PSF licence), and the licence texts that Debian
              ships in /usr/share/common-licenses

`is_held_out(a, b)` names the tenth of all pairs of numbers that no training sum uses, in either order.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

LICENSES = Path("/usr/share/common-licenses")
SHARES = {"sums": 0.30, "chats": 0.40, "stories": 0.06, "pages": 0.24}
WRONG_ANSWERS = 0.1

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tara",
    "Victor",
]
ANIMALS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "lion": "roar", "owl": "hoot"}
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red"}
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "dark": "light", "full": "empty",
    "high": "low", "hard": "soft", "wet": "dry", "long": "short", "near": "far", "rich": "poor",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Norway": "Oslo", "Greece": "Athens", "Poland": "Warsaw", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WORDS = [
    "apple",
    "bread",
    "cloud",
    "drum",
    "earth",
    "fish",
    "glass",
    "house",
    "ink",
    "jam",
    "key",
    "lamp",
    "moon",
    "nut",
    "oak",
    "pen",
    "queen",
    "rain",
    "salt",
    "tree",
]
PLACES = [
    "the garden",
    "the forest",
    "the old mill",
    "the harbour",
    "the library",
    "the market",
    "the hill",
    "the river",
]
THINGS = [
    "a red ball",
    "a small boat",
    "a warm coat",
    "a shiny coin",
    "a long rope",
    "a paper kite",
    "a loaf of bread",
    "a map",
]
FEELINGS = ["happy", "sad", "proud", "tired", "calm", "brave", "curious", "hungry"]


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair is kept out of training. Symmetric: a + b gives b + a away."""
    low, high = sorted((a, b))
    return (37 * low + 53 * high + low * high) % 101 % 10 == 3  # mod a prime first: independent of the last digits


def _numbers(rng: random.Random, held_out: bool) -> tuple[int, int]:
    """A pair from 0..100: any numbers, or (a third) digits, or (a seventh) one of them a multiple of ten.

    The easy ones are learned first, and carry the hard ones.
    """
    while True:
        kind = rng.random()
        if kind < 0.33:
            a, b = rng.randint(0, 9), rng.randint(0, 9)
        elif kind < 0.47:
            a, b = rng.sample((10 * rng.randint(1, 9), rng.randint(0, 99)), 2)
        else:
            a, b = rng.randint(0, 100), rng.randint(0, 100)
        if is_held_out(a, b) == held_out:
            return a, b


def _answer(rng: random.Random, right: int) -> int:
    """The right answer, or in a tenth of all cases one with a slip that people make."""
    if rng.random() >= WRONG_ANSWERS:
        return right
    wrong = right + rng.choice((-10, -2, -1, 1, 2, 10))
    return wrong if wrong >= 0 else right + 1


def sum_with_answer(rng: random.Random, *, held_out: bool = False) -> tuple[str, int]:
    """A sum as text with spaces, like "12 + 7", and its answer (sometimes wrong). Mostly additions."""
    a, b = _numbers(rng, held_out)
    kind = rng.random()
    if kind < 0.85:
        return f"{a} + {b}", _answer(rng, a + b)
    if kind < 0.95:
        a, b = max(a, b), min(a, b)
        return f"{a} - {b}", _answer(rng, a - b)
    a, b = a % 11, b % 11
    return f"{a} * {b}", _answer(rng, a * b)


def sums(rng: random.Random, held_out: bool = False) -> str:
    """Ten sums, all in one of three notations."""
    notation = rng.choice(("{sum} = {answer}", "{sum} = {answer}", "{tight}={answer}", "Q: {sum}\nA: {answer}"))
    lines = []
    for _ in range(10):
        text, answer = sum_with_answer(rng, held_out=held_out)
        lines.append(notation.format(sum=text, tight=text.replace(" ", ""), answer=answer))
    return "\n".join(lines) + "\n"


def _fact(rng: random.Random) -> tuple[str, str]:
    """A question about the small world above, with its answer."""
    kind = rng.randrange(7)
    if kind == 0:
        animal, sound = rng.choice(list(ANIMALS.items()))
        return f"What does the {animal} say?", f"The {animal} says {sound}."
    if kind == 1:
        thing, colour = rng.choice(list(COLOURS.items()))
        return f"What colour is {thing}?", f"{thing.capitalize()} is {colour}."
    if kind == 2:
        one, other = rng.choice([*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())])
        return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
    if kind == 3:
        country, capital = rng.choice(list(CAPITALS.items()))
        return f"What is the capital of {country}?", f"The capital of {country} is {capital}."
    if kind == 4:
        day = rng.randrange(7)
        return f"Which day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."
    if kind == 5:
        name = rng.choice(NAMES)
        return f"Hello, my name is {name}.", f"Hello {name}, nice to meet you."
    word = rng.choice(WORDS)
    return rng.choice(
        (
            (f"Spell {word}.", " ".join(word)),
            (f"Say {word} three times.", f"{word} {word} {word}"),
            (f"Write {word} in capitals.", word.upper()),
        )
    )


def turn(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """One question with its answer; sums two times in three, mostly answered by the bare number."""
    if rng.random() < 0.33:
        return _fact(rng)
    text, answer = sum_with_answer(rng, held_out=held_out)
    question = rng.choice((f"What is {text}?", f"What is {text}?", f"{text} = ?", f"Please work out {text}."))
    return question, rng.choice((str(answer), str(answer), str(answer), f"{text} = {answer}"))


def chats(rng: random.Random, held_out: bool = False) -> str:
    """One to four turns in ChatML, exactly as the tokenizer's chat template writes them."""
    text = ""
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        question, answer = turn(rng, held_out)
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return text


def stories(rng: random.Random, held_out: bool = False) -> str:
    """A few sentences about two people, a thing and a place, the same ones from first to last."""
    one, two = rng.sample(NAMES, 2)
    place, thing, animal = rng.choice(PLACES), rng.choice(THINGS), rng.choice(list(ANIMALS))
    feeling, then = rng.sample(FEELINGS, 2)
    day = rng.choice(DAYS)
    start = rng.choice((f"On {day} {one} went to {place}.", f"One {day} {one} and {two} walked to {place}."))
    middle = rng.sample(
        (
            f"There {one} found {thing}.",
            f"A {animal} sat near {place} and said {ANIMALS[animal]}.",
            f'"{one}, are you {feeling}?" asked {two}.',
            f"{two} wanted {thing} too, and {one} was {feeling}.",
            f"It was {rng.choice(list(OPPOSITES))} outside, but {two} did not mind.",
        ),
        3,
    )
    end = rng.choice((f"In the evening {one} was {then}.", f"{two} gave {thing} to {one}, and both were {then}."))
    return " ".join((start, *middle, end)) + "\n"


def pages() -> list[str]:
    """Every page this machine has: docstrings, Python's language topics, licence texts; in a fixed order."""
    import pydoc_data.topics

    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts += [path.read_text(errors="replace") for path in sorted(LICENSES.glob("*")) if path.is_file()]
    texts += list(_docstrings(Path(sysconfig.get_paths()["stdlib"])))
    return [text.strip() + "\n" for text in dict.fromkeys(texts) if len(text) > 40]


def _docstrings(stdlib: Path) -> Iterator[str]:
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(stdlib.rglob("*.py")):
        if skipped & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(errors="replace"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


MADE: dict[str, Callable[[random.Random, bool], str]] = {"sums": sums, "chats": chats, "stories": stories}
