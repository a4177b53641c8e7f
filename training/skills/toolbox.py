"""Families of tools: declarations, questions, results and answers of each. Knows nothing of conversations."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from training.conversation import Call, Declaration, Json
from training.words import DAYS, LANGUAGES, ROOMS, city, made_up, name, noun

_SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear")
_REASONS = ("not found", "no connection", "timed out", "not allowed", "out of order", "unknown name")


@dataclass(frozen=True)
class Parameter:
    """One argument: its possible names in declarations, its JSON type, and a source of values for it.

    The first of ``names`` is its name in templates. A name that is given twice is chosen twice as often.
    """

    names: tuple[str, ...]
    kind: str
    value: Callable[[random.Random], str | int]


@dataclass(frozen=True)
class Family:
    """Tools with one purpose. Templates name arguments by the first of the parameter's names, and results by key.

    `several` has questions about several values of the argument, as in "the time in Rome and Oslo" (empty: not
    possible). `result` returns a call's result; `answer` and `failure` are templates of the answer after it.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    questions: tuple[str, ...]
    several: tuple[str, ...]
    result: Callable[[random.Random, dict[str, str | int]], dict[str, Json]]
    answer: str
    failure: str


def _weather(rng: random.Random, arguments: dict[str, str | int]) -> dict[str, Json]:
    return {"city": arguments["city"], "sky": rng.choice(_SKIES), "temperature": rng.randint(-15, 39)}


def _clock(rng: random.Random, arguments: dict[str, str | int]) -> dict[str, Json]:
    return {"city": arguments["city"], "time": f"{rng.randrange(24):02}:{rng.randrange(60):02}"}


FAMILIES: tuple[Family, ...] = (
    Family(
        ("get_weather", "get_weather", "weather", "fetch_weather", "current_weather", "weather_in", "lookup_weather"),
        ("Get the weather in a city.", "The weather in a city.", "Tells the current weather.", "Weather for a place."),
        (Parameter(("city", "city", "location", "place", "town"), "string", city),),
        ("What is the weather in {city}?", "How is the weather in {city}?", "What is the weather like in {city}?",
         "Tell me the weather in {city}.", "Is it warm in {city}?", "Is it raining in {city}?",
         "What is the weather in {city} today?", "Weather in {city}?", "How warm is it in {city}?"),
        ("What is the weather in {city}?", "How is the weather in {city}?", "Compare the weather in {city}."),
        _weather, "In {city} it is {sky} and {temperature} degrees.", "I could not get the weather in {city}",
    ),
    Family(
        ("get_time", "get_time", "clock", "current_time", "time_in", "world_clock", "local_time"),
        ("Get the local time in a city.", "The time in a city.", "Tells what time it is."),
        (Parameter(("city", "city", "location", "place", "town"), "string", city),),
        ("What time is it in {city}?", "Tell me the time in {city}.", "What is the time in {city}?",
         "How late is it in {city}?", "What does the clock say in {city}?"),
        ("What time is it in {city}?", "Tell me the time in {city}."),
        _clock, "In {city} it is {time}.", "I could not get the time in {city}",
    ),
    Family(
        ("get_price", "price", "lookup_price", "price_of", "find_price"),
        ("Get the price of an item.", "Looks up what a thing costs.", "The price in the shop."),
        (Parameter(("item", "item", "product", "thing", "article"), "string", noun),),
        ("How much does the {item} cost?", "What is the price of the {item}?", "What does the {item} cost?",
         "Tell me the price of the {item}.", "Find the price of the {item}."),
        ("What do these cost: {item}?", "Tell me the prices of {item}."),
        lambda rng, arguments: {"item": arguments["item"], "price": rng.randint(1, 99)},
        "The {item} costs {price} coins.", "I could not find the price of the {item}",
    ),
    Family(
        ("send_message", "message", "send_text", "write_message", "notify"),
        ("Send a message to a person.", "Sends a short text.", "Delivers a message."),
        (Parameter(("to", "to", "recipient", "person"), "string", name),
         Parameter(("text", "text", "message", "body"), "string", lambda rng: f"{noun(rng)} {noun(rng)}")),
        ("Send {to} the message {text}.", "Tell {to}: {text}.", "Write {text} to {to}.", "Send {text} to {to}."),
        (),
        lambda _, arguments: {"sent": True, "to": arguments["to"]},
        "I sent the message to {to}.", "I could not send the message to {to}",
    ),
    Family(
        ("set_timer", "timer", "start_timer", "new_timer"),
        ("Set a timer.", "Starts a timer of some minutes.", "A kitchen timer."),
        (Parameter(("minutes", "minutes", "duration", "length"), "integer", lambda rng: rng.randint(1, 99)),),
        ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.", "Wake me in {minutes} minutes.",
         "Remind me in {minutes} minutes."),
        (),
        lambda _, arguments: {"minutes": arguments["minutes"], "running": True},
        "The timer is set to {minutes} minutes.", "I could not set the timer",
    ),
    Family(
        ("translate", "translator", "translate_word", "dictionary"),
        ("Translate a word.", "Finds a word in another language.", "A dictionary of several languages."),
        (Parameter(("word", "word", "text", "term"), "string", noun),
         Parameter(("language", "language", "target", "to"), "string", lambda rng: rng.choice(LANGUAGES))),
        ("Translate {word} into {language}.", "What is {word} in {language}?", "How do you say {word} in {language}?",
         "Give me the {language} word for {word}."),
        (),
        lambda rng, arguments: {"language": arguments["language"], "translation": made_up(rng)},
        "In {language}, {word} is {translation}.", "I could not translate {word}",
    ),
    Family(
        ("switch_light", "light", "set_light", "lamp", "control_light"),
        ("Switch a light on or off.", "Controls the lights.", "Turns the light of a room on or off."),
        (Parameter(("room", "room", "place", "where"), "string", lambda rng: rng.choice((*ROOMS, made_up(rng)))),
         Parameter(("state", "state", "value", "to"), "string", lambda rng: rng.choice(("on", "off")))),
        ("Turn {state} the light in the {room}.", "Switch {state} the light in the {room}.",
         "Please turn the light in the {room} {state}.", "Light {state} in the {room}, please."),
        (),
        lambda _, arguments: {"light": arguments["state"], "room": arguments["room"]},
        "The light in the {room} is {state}.", "I could not switch the light in the {room}",
    ),
    Family(
        ("book_table", "reserve_table", "reserve", "book_restaurant"),
        ("Book a table.", "Reserves a table in the restaurant.", "A table for some people on a day."),
        (Parameter(("people", "people", "guests", "seats"), "integer", lambda rng: rng.randint(2, 20)),
         Parameter(("day", "day", "date", "when"), "string", lambda rng: rng.choice(DAYS))),
        ("Book a table for {people} on {day}.", "Reserve a table for {people} people on {day}.",
         "We are {people} and want to eat on {day}.", "I need a table for {people} on {day}."),
        (),
        lambda rng, _: {"booked": True, "number": rng.randint(1, 60)},
        "Table {number} is booked for {people} on {day}.", "I could not book a table on {day}",
    ),
    Family(
        ("count_stock", "stock", "inventory", "in_stock"),
        ("How many of an item are in stock.", "Counts an item in the store.", "Looks into the store."),
        (Parameter(("item", "item", "product", "article", "name"), "string", noun),),
        ("How many of the {item} are in stock?", "Is the {item} in stock?", "Check the stock of the {item}.",
         "Do we have the {item}?"),
        ("Check the stock of {item}.", "How many are in stock of {item}?"),
        lambda rng, arguments: {"count": rng.randint(0, 99), "item": arguments["item"]},
        "There are {count} of the {item} in stock.", "I could not check the stock of the {item}",
    ),
    Family(
        ("find_file", "search_file", "locate", "where_is_file"),
        ("Find a file.", "Finds where a file is.", "Searches the disk for a file."),
        (Parameter(("file", "name", "file", "filename", "path"), "string",
                   lambda rng: f"{noun(rng)}.{rng.choice(('txt', 'md', 'py', 'json'))}"),),
        ("Where is the file {file}?", "Find {file}.", "Find the file {file}.", "In which folder is {file}?"),
        ("Find these files: {file}.", "Where are the files {file}?"),
        lambda rng, _: {"folder": f"/{noun(rng)}/{noun(rng)}"},
        "The file {file} is in {folder}.", "I could not find the file {file}",
    ),
    Family(
        ("add", "add_numbers", "calculator", "plus", "sum_up"),
        ("Add two numbers.", "Adds numbers.", "A calculator."),
        (Parameter(("a", "a", "x", "first"), "integer", lambda rng: rng.randint(0, 999)),
         Parameter(("b", "b", "y", "second"), "integer", lambda rng: rng.randint(0, 999))),
        ("Use the tool to add {a} and {b}.", "Add {a} and {b} with the tool.", "Let the tool add {a} and {b}."),
        (),
        lambda _, arguments: {"result": int(arguments["a"]) + int(arguments["b"])},
        "The result is {result}.", "I could not add the numbers",
    ),
)  # fmt: skip

_ARGUMENT_NAMES = tuple(sorted({name for family in FAMILIES for each in family.parameters for name in each.names}))
_VALUES: tuple[tuple[str, Callable[[random.Random], str | int]], ...] = (
    ("string", noun),
    ("string", city),
    ("integer", lambda rng: rng.randrange(1000)),
)


@dataclass(frozen=True)
class Tool:
    """One member of a family as a conversation declares it. `spelled`: the declared names, by the templates' names."""

    family: Family
    name: str
    spelled: dict[str, str]
    declaration: Declaration

    @property
    def usage(self) -> str:
        """The tool's name and its arguments in the declaration's (sorted) order, in the words of a reply."""
        return f"{self.name} with {' and '.join(sorted(self.spelled.values()))}"

    def call(self, arguments: dict[str, str | int]) -> Call:
        """Return the call with the arguments in the declaration's (sorted) order."""
        spelled = {self.spelled[key]: value for key, value in arguments.items()}
        return Call(self.name, {key: spelled[key] for key in sorted(spelled)})


def declare_tool(
    rng: random.Random,
    family: Family,
    names: Callable[[Parameter], tuple[str, ...]] = lambda parameter: parameter.names,
) -> Tool:
    """Return a tool of this family with one of its names. Each argument has one of its `names`."""
    used: dict[str, str] = {}
    for parameter in family.parameters:
        used[parameter.names[0]] = rng.choice([each for each in names(parameter) if each not in used.values()])
    style = rng.random()
    properties: dict[str, Json] = {}
    for parameter in family.parameters:
        spelled = used[parameter.names[0]]
        schema: dict[str, Json] = {"type": parameter.kind}
        if style < 0.15:
            schema["description"] = f"The {spelled}."
        elif style < 0.3:
            schema["title"] = spelled.capitalize()
        properties[spelled] = schema
    tool_name = rng.choice(family.names)
    return Tool(family, tool_name, used, Declaration(tool_name, rng.choice(family.descriptions), properties))


def made_up_family(rng: random.Random) -> Family:
    """Return a family that occurs once, so that its name and argument are known only from its declaration."""
    tool_name = f"{made_up(rng)}_{noun(rng)}" if rng.random() < 0.5 else made_up(rng)
    return Family(
        (tool_name,),
        (f"The {noun(rng)} tool.", f"Does {made_up(rng)}.", f"Looks up a {noun(rng)}."),
        (Parameter((rng.choice(("word", "text", "query", "name", "key", "input", made_up(rng))),), "string", noun),),
        (f"Call {tool_name} with {{0}}.", f"Use {tool_name} for {{0}}.", f"What does {tool_name} say about {{0}}?",
         f"Ask {tool_name} about {{0}}.", f"Run {tool_name} on {{0}}."),
        (),
        lambda rng, _: {"result": noun(rng)},
        "The result is {result}.", f"I could not use {tool_name}",
    )  # fmt: skip


def renamed_tool(rng: random.Random, family: Family) -> Tool:
    """Return a tool of this family with any name for one argument: the call needs the name from the declaration."""
    renamed = rng.choice(family.parameters)
    return declare_tool(rng, family, lambda each: _any_names(rng) if each is renamed else each.names)


def strange_tool(rng: random.Random) -> Tool:
    """Return a tool with one to three arguments of any name. Its questions give the arguments by name."""
    tool_name = rng.choice((made_up(rng), f"{noun(rng)}_{noun(rng)}", f"{made_up(rng)}_{noun(rng)}"))
    count = rng.choice((1, 1, 2, 3))
    spelled: list[str] = []
    while len(spelled) < count:
        word = rng.choice(_any_names(rng))
        if word not in spelled:
            spelled.append(word)
    parameters = tuple(Parameter((word,), *rng.choice(_VALUES)) for word in spelled)
    given = " and ".join(f"{word} {{{index}}}" for index, word in enumerate(spelled))
    family = Family(
        (tool_name,),
        (f"The {noun(rng)} tool.", f"Does {made_up(rng)}.", f"Looks up a {noun(rng)}.", "A tool."),
        parameters,
        (f"Call {tool_name} with {given}.", f"Use {tool_name} with {given}.", f"Run {tool_name}: {given}."),
        (),
        lambda rng, _: {"result": noun(rng)},
        "The result is {result}.",
        f"I could not use {tool_name}",
    )
    return declare_tool(rng, family)


def _any_names(rng: random.Random) -> tuple[str, ...]:
    return noun(rng), made_up(rng), rng.choice(_ARGUMENT_NAMES)


def result_text(rng: random.Random, value: dict[str, Json]) -> str:
    """Return a tool's result as JSON, compact or spaced."""
    separators = (",", ":") if rng.random() < 0.4 else (", ", ": ")
    return json.dumps(value, ensure_ascii=False, separators=separators)


def failure_reason(rng: random.Random) -> str:
    """Return a reason for a tool's failure."""
    return rng.choice(_REASONS)
