"""Tasks to call the right tool with the right arguments, use its results, or state that no tool fits."""

import random

from training.conversation import CallStep, Declaration, Exchange
from training.skills.toolbox import (
    FAMILIES,
    Family,
    Tool,
    declare_tool,
    failure_reason,
    made_up_family,
    renamed_tool,
    result_text,
    strange_tool,
)
from training.task import Task, text_key
from training.words import listed

_ASK_ONE = ("What does {name} take?", "How do you call {name}?", "Which arguments does {name} need?")
_ASK_ALL = ("Which tools do you have?", "What tools can you use?", "List your tools.", "Name your tools.")


def one_call(rng: random.Random) -> Task:
    """Return a question that needs one call."""
    family = made_up_family(rng) if rng.random() < 0.2 else _family(rng)
    return _call_of(rng, declare_tool(rng, family))


def renamed_call(rng: random.Random) -> Task:
    """Return a question that needs one call, of a tool with an arbitrary name for one argument."""
    return _call_of(rng, renamed_tool(rng, _family(rng)))


def strange_call(rng: random.Random) -> Task:
    """Return a question that needs one call, of a tool whose name and arguments are random words."""
    return _call_of(rng, strange_tool(rng))


def telling_tools(rng: random.Random) -> Task:
    """Return a question about the declared tools or one tool's arguments: many look-ups in few tokens."""
    tools: list[Tool] = []
    for _ in range(rng.randint(1, 4)):
        is_strange = rng.random() < 0.5
        tools.append(strange_tool(rng) if is_strange else _declare_beside(rng, _family(rng), tools))
    declared = tuple(tool.declaration for tool in tools)
    if rng.random() < 0.5:
        tool = rng.choice(tools)
        question, answer = rng.choice(_ASK_ONE).format(name=tool.name), f"I call {tool.usage}."
    else:
        question, answer = rng.choice(_ASK_ALL), " ".join(f"I can call {tool.usage}." for tool in tools)
    key = text_key(f"{question} {' '.join(tool.usage for tool in tools)}")
    return Task(key, Exchange(question, "I read the declarations.", answer), tools=declared)


def several_calls(rng: random.Random) -> Task:
    """Return a question that needs two or three calls in a row."""
    count = rng.choice((2, 2, 3))
    return _same_tool(rng, count) if rng.random() < 0.6 else _different_tools(rng, count)


def no_tool(rng: random.Random) -> Task:
    """Return a question for which no tool, or none that fits, is declared."""
    family = _family(rng)
    question = _fill(rng.choice(family.questions), _arguments(rng, family))
    others = _others(rng, {family}, rng.choice((0, 1, 1, 2)))
    answer = "I cannot do that: I have no tool for it."
    declared = tuple(tool.declaration for tool in others)
    return Task(text_key(question), Exchange(question, "No tool here fits the question.", answer), tools=declared)


def spare_tools(rng: random.Random) -> tuple[Declaration, ...]:
    """Return one or two tools that plain questions do not need, so never the tool that adds."""
    return tuple(tool.declaration for tool in _others(rng, {FAMILIES[-1]}, rng.choice((1, 2))))


def _call_of(rng: random.Random, tool: Tool) -> Task:
    arguments = _arguments(rng, tool.family)
    question = _fill(rng.choice(tool.family.questions), arguments)
    step, answer = _step(rng, tool, arguments, f"I need {tool.usage}.")
    return _task(rng, question, (tool,), (step,), answer)


def _same_tool(rng: random.Random, count: int) -> Task:
    family = rng.choice([each for each in FAMILIES if each.several])
    tool = declare_tool(rng, family)
    parameter = family.parameters[0]
    values: list[str | int] = []
    while len(values) < count:
        value = parameter.value(rng)
        if value not in values:
            values.append(value)
    question = rng.choice(family.several).format(**{parameter.names[0]: listed([str(value) for value in values])})
    steps, answers = [], []
    for number, value in enumerate(values):
        think = f"{'First' if number == 0 else 'Now'} {value}: I need {tool.usage}."
        step, answer = _step(rng, tool, {parameter.names[0]: value}, think)
        steps.append(step)
        answers.append(answer)
    return _task(rng, question, (tool,), tuple(steps), " ".join(answers))


def _different_tools(rng: random.Random, count: int) -> Task:
    families = rng.sample(FAMILIES, count)
    tools: list[Tool] = []
    parts, steps, answers = [], [], []
    for number, family in enumerate(families):
        tool = _declare_beside(rng, family, tools)
        arguments = _arguments(rng, family)
        part = _fill(rng.choice(family.questions), arguments)
        think = f"{'First' if number == 0 else 'Now'} I need {tool.usage}."
        step, answer = _step(rng, tool, arguments, think)
        parts.append(part)
        steps.append(step)
        answers.append(answer)
        tools.append(tool)
    return _task(rng, " ".join(parts), tuple(tools), tuple(steps), " ".join(answers))


def _task(
    rng: random.Random, question: str, needed: tuple[Tool, ...], steps: tuple[CallStep, ...], answer: str
) -> Task:
    tools = [
        *needed,
        *_others(rng, {tool.family for tool in needed}, rng.choice((0, 0, 1, 2)) if len(needed) < 3 else 0),
    ]
    rng.shuffle(tools)
    exchange = Exchange(question, "I have what I need.", answer, steps)
    return Task(text_key(question), exchange, tools=tuple(tool.declaration for tool in tools))


def _step(rng: random.Random, tool: Tool, arguments: dict[str, str | int], think: str) -> tuple[CallStep, str]:
    call = tool.call(arguments)
    if rng.random() < 0.08:
        reason = failure_reason(rng)
        answer = f"{_fill(tool.family.failure, arguments)}: {reason}."
        return CallStep(think, call, result_text(rng, {"error": reason})), answer
    result = tool.family.result(rng, arguments)
    answer = tool.family.answer.format(**{**arguments, **result})
    return CallStep(think, call, result_text(rng, result)), answer


def _family(rng: random.Random) -> Family:
    """Return a family, the weather more often than each other one."""
    return FAMILIES[0] if rng.random() < 0.12 else rng.choice(FAMILIES)


def _arguments(rng: random.Random, family: Family) -> dict[str, str | int]:
    return {parameter.names[0]: parameter.value(rng) for parameter in family.parameters}


def _fill(template: str, arguments: dict[str, str | int]) -> str:
    """Insert the arguments by name, or by number in the templates of made-up families."""
    return template.format(*arguments.values(), **arguments)


def _declare_beside(rng: random.Random, family: Family, others: list[Tool]) -> Tool:
    """Return a tool of the family whose name none of the others has."""
    while True:
        tool = declare_tool(rng, family)
        if tool.name not in {other.name for other in others}:
            return tool


def _others(rng: random.Random, but: set[Family], count: int) -> list[Tool]:
    families = rng.sample([family for family in FAMILIES if family not in but], count)
    return [declare_tool(rng, family) for family in families]
