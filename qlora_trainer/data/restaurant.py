"""Owns `builtin:restaurant`: short messages to a restaurant and the strict JSON they mean.

In: a split's name. Out: its rows, the same on every machine, as chat messages:
    system     Reply in JSON.
    user       Hi, a table for four this Friday at half past seven, please. Mary Novak
    assistant  {"intent":"book","name":"Mary Novak","people":4,"date":"Friday","time":"7:30 pm"}
Numbers and clock times come in words and figures and leave normalised; what a message does not
say is null. The base model cannot know the schema, so all that it gets right was tuned into it.

    train           TRAIN_ROWS distinct messages
    eval_names      the phrasings of train, said by people who do not occur there
    eval_phrasings  sentences that train has never seen, said by people who do not occur there
"""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

TRAIN_ROWS, EVAL_ROWS = 800, 100
SYSTEM = "Reply in JSON."  # the template would put a longer turn of its own in its place


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words("""Adam Alice Andrew Anna Ben Carl Charles Chris Daniel David Edward Emily Frank Fred George
Henry Jack Jacob James Jane Jean John Joseph Kim Lily Louis Luke Maria Marie Mark Martin Mary Matt Michael
Aisha Amelia Bjorn Camille Diego Dmitri Elena Fatima Freya Gabriel Giulia Hassan Hiroshi Ines Jorge Katarina
Kofi Leila Lucia Mateo Mina Nikolai Olga Pedro Quentin Rafael Rania Sergei Sofia Tatiana Umar Wei Yusuf
Zoe""")
LAST = _words("""Adler Brown Costa Dubois Evans Fischer Garcia Haddad Hansen Ivanov Jensen Kowalski Kumar
Lopez Meyer Moreau Murphy Nguyen Novak Okafor Petrov Quinn Rossi Silva Tanaka Ueda Vogel Weber Zhang Abebe
Carvalho Demir Eriksson Fontaine Greco Horvat Ito Jovanovic Lehmann Marino Oliveira Ramos Torres Virtanen
Yilmaz""")
NEW_FIRST = _words("Alexander Arthur Elizabeth Nick Paul Peter Richard Robert Rose Samuel Sarah Simon Thomas")
NEW_LAST = _words(
    "Bergman Castillo Ferrari Iqbal Johansson Keller Lindqvist Mendoza Nakamura Park Sato Thompson"
)
NUMBERS = _words("zero one two three four five six seven eight nine")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

PHRASINGS = {
    "book": """a table for {people} {date} at {time}, please. {name}
can I book for {people} people {date} at {time}? My name is {name}.
this is {name}, we would like to come {date} at {time}, {people} of us.
I'd like to reserve a table {date}, {time}, party of {people}, under {name}.
{name} here. Do you have room for {people} {date} around {time}?
please put {name} down for {people} {date} at {time}.
is there anything free at {time} {date}? We are {people}. Name: {name}.
could we have a table at {time} {date} for {people}? It's {name}.
we'd love to eat with you {date}! {people} of us at {time}, book it as {name}.
my name is {name} and I need a table for {people} {date} at {time}.""",
    "change": """this is {name}, can we move our table to {date} at {time}?
{name} here, we are {people} now instead.
please change the booking of {name} to {time}.
could you make it {people} people for {name}, {date}?
we have to shift {name}'s table to {date}.
my booking is under {name}, can it be {time} {date} instead?
it's {name}: there will be {people} of us and we'll come at {time}.
I booked as {name} but {date} at {time} would suit us better.
can you update the reservation for {name}? We'll be {people} after all.
{name}, reservation {date}: {time} instead, please.""",
    "cancel": """please cancel the table for {name} {date}.
this is {name}, we can't come {date} after all.
I have to call off the dinner for {people} {date}, {name}.
{name} here, sorry, we won't make it {date}.
cancel {name}, {people} people {date} at {time}, thanks.
we need to drop our reservation. Name is {name}.
my name is {name} and I'd like to cancel for {date}.
sorry, {name}'s party of {people} is not coming {date}.
could you delete the booking of {name} at {time}?
something came up, so no table for {people} {date}. {name}""",
}
NEW_PHRASINGS = {
    "book": """any chance of a table for {people} {date} at {time}? The name would be {name}.
{name} speaking, I want to reserve for {people} {date}, at {time}.
would {time} {date} work for a group of {people}? I'm {name}.""",
    "change": """could we come at {time} instead? The table is booked under {name}.
I need to move my reservation to {date}, my name is {name}.
{name}: can we switch to {date} at {time}?""",
    "cancel": """we won't be coming {date}, please cancel. {name}
I'd like to cancel my table at {time}, it's under {name}.
sorry, I must cancel the booking for {people} {date}, {name}.""",
}


def rows(split: str) -> Iterator[dict[str, Any]]:
    """The rows of `train`, `eval_names` or `eval_phrasings`: {"messages": [system, user, assistant]}."""
    random = Random(f"restaurant {split}")
    phrasings = NEW_PHRASINGS if split == "eval_phrasings" else PHRASINGS
    first, last = (FIRST, LAST) if split == "train" else (NEW_FIRST, NEW_LAST)
    seen: set[str] = set()
    while len(seen) < (TRAIN_ROWS if split == "train" else EVAL_ROWS):
        intent = list(phrasings)[len(seen) % len(phrasings)]
        name = " ".join([random.choice(first), random.choice(last)][: random.choice([1, 2, 2])])
        message, answer = _message(random, intent, random.choice(phrasings[intent].splitlines()), name)
        if message not in seen:
            seen.add(message)
            turns = {"system": SYSTEM, "user": message, "assistant": answer}
            yield {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def _message(random: Random, intent: str, phrasing: str, name: str) -> tuple[str, str]:
    """What is said and what is meant, every slot of `phrasing` filled."""
    people, day, hour = random.randint(2, 9), random.choice(DAYS), random.randint(5, 9)
    dates = {day: day, f"this {day}": day, "tonight": "today", "tomorrow": "tomorrow"}
    full = [f"{hour} pm", f"{NUMBERS[hour]} o'clock", f"{hour}:00"]
    half = [f"{hour}:30 pm", f"half past {NUMBERS[hour]}", f"{hour}:30"]
    time = random.choice(full + half)
    date = random.choice(list(dates))
    said = {"name": name, "people": random.choice([str(people), NUMBERS[people]]), "date": date, "time": time}
    meant = {"name": name, "people": people, "date": dates[date]}
    meant["time"] = f"{hour}:{'00' if time in full else '30'} pm"
    answer = {"intent": intent} | {slot: meant[slot] if f"{{{slot}}}" in phrasing else None for slot in said}
    message = random.choice(["", "", "Hi, ", "Hello, ", "Good evening, "]) + phrasing.format(**said)
    return message[0].upper() + message[1:], json.dumps(answer, separators=(",", ":"))
