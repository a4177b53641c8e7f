"""Word lists for the questions, and made-up words. Knows nothing of questions."""

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """apple arrow basket bell bird boat bone book bottle box branch bread bridge brush bucket butter button cake candle
    cap carpet carrot castle chair cheese cherry circle clock cloud coat coin comb corn cotton cow cradle cream crown
    cup curtain desk dish door dragon dream dress drum duck eagle ear egg engine eye farm feather fence field finger
    fire fish flag flower flute forest fork fox frog garden gate ghost glass glove goat gold grape grass guitar hammer
    hand hat heart hill honey horse house ice iron island jacket jar juice key king kite knife ladder lake lamp leaf
    lemon letter lion map market milk mirror moon mountain mouse nail needle nest night nose nut oak ocean onion orange
    oven owl paint paper parrot pear pencil pepper piano picture pillow pipe plate pocket pond potato queen rabbit rain
    ribbon rice ring river road robot roof rope rose sail salt sand scarf school seed shadow sheep shell ship shirt shoe
    silk silver sky snow soap sock song spider spoon spring square star stone storm story stove sugar summer sun sweater
    table tail tea tent thread tiger toast tomato tower train tree trumpet tunnel turtle umbrella valley vase village
    violin wagon wall watch water wave wheel whistle wind window wing winter wolf wood wool yard zebra"""
)
ADJECTIVES = _words(
    """big blue bold brave bright broken brown calm clean clever cold cool dark deep dry empty fast fine fresh full
    gentle golden good grand gray green happy hard heavy high hot kind large late light little long loud low lucky
    merry new nice old open pale patient plain polite poor proud quick quiet red rich round sad sharp short silent slow
    small smart smooth soft strong sweet tall thin tiny tired warm weak wet white wide wild wise young"""
)
CITIES = _words(
    """Accra Algiers Amman Ankara Antwerp Athens Atlanta Austin Baghdad Bangkok Basel Beijing Beirut Belfast Belgrade
    Bergen Berlin Bern Bogota Bologna Bonn Boston Bremen Brussels Budapest Cairo Calgary Caracas Cardiff Chicago
    Cologne Copenhagen Cork Dakar Dallas Delhi Denver Dresden Dublin Durban Edinburgh Florence Geneva Genoa Ghent
    Glasgow Graz Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Karachi Kiev Kingston Krakow Kyoto Lagos
    Leeds Leipzig Lima Linz Lisbon London Lusaka Lyon Madrid Malmo Manila Marseille Melbourne Miami Milan Minsk Montreal
    Moscow Mumbai Munich Nairobi Naples Nice Osaka Oslo Ottawa Oxford Padua Palermo Panama Paris Perth Porto Prague
    Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Seattle Seoul Seville Shanghai Singapore Sofia Stockholm
    Sydney Tallinn Tampa Tehran Tokyo Toronto Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius
    Warsaw Wellington York Zagreb Zurich"""
)
NAMES = _words(
    """Ada Alan Alba Alice Amir Anna Arthur Astrid Bella Ben Bruno Carla Carlos Cecil Chloe Clara Cosmo Daisy Dana
    David Diego Dora Edgar Ella Elsa Emil Emma Erik Eva Felix Finn Flora Frank Freya Gina Grace Greta Gustav Hana
    Hannah Harry Hector Hugo Ida Igor Ines Iris Ivan Jack Jana Jasper Joan Jonas Juno Karl Kasper Kira Lara Leo Lena
    Lily Linus Lola Lucas Luna Mabel Magnus Maja Marco Maria Marvin Max Mia Milo Mina Nadia Nelly Nico Nina Noah Nora
    Olga Olive Oscar Otto Pablo Paula Pedro Penny Petra Pia Quinn Ralph Rita Robin Rosa Ruby Rufus Sam Sara Selma Sofia
    Stella Sven Tara Theo Tilda Tom Tove Uma Ursula Vera Victor Viola Walter Wanda Wilma Xenia Yara Yuri Zelda
    Zoe"""
)
ROLES = _words(
    """assistant baker butler captain chef coach doctor driver farmer gardener guide helper judge librarian mechanic
    nurse painter pilot pirate poet robot sailor scientist secretary singer tailor teacher translator wizard
    writer"""
)
LANGUAGES = ("French", "German", "Greek", "Italian", "Japanese", "Korean", "Polish", "Spanish", "Swedish", "Turkish")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROOMS = ("attic", "bathroom", "bedroom", "cellar", "garage", "garden", "hall", "kitchen", "library", "office", "studio")
ANIMALS = _words("bear cat cow dog dragon duck fox frog goat horse lion mouse owl wolf")

_ONSETS = _words("b c d f g h k l m n p r s t v w z br dr fl gr pl st tr")
_VOWELS = _words("a e i o u")
# Syllables that are rude in some language, and the ones that replace them in made-up words.
_UNKIND = {"fag": "fal", "neg": "nel", "nig": "nil", "dik": "dil", "kok": "kol", "tit": "til", "fuk": "ful"}
_CODAS = ("", "", "", "l", "n", "r", "s", "t", "m", "k")


def made_up(rng: random.Random) -> str:
    """Return a word of two or three syllables that is probably in no list."""
    syllables = rng.choice((2, 2, 3))
    stem = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    word = stem + rng.choice(_CODAS)
    for unkind, harmless in _UNKIND.items():
        word = word.replace(unkind, harmless)
    return word


def noun(rng: random.Random) -> str:
    """Return a noun, with probability 0.15 a made-up one."""
    return made_up(rng) if rng.random() < 0.15 else rng.choice(NOUNS)


def city(rng: random.Random) -> str:
    """Return a city, with probability 0.2 a made-up one."""
    return made_up(rng).capitalize() if rng.random() < 0.2 else rng.choice(CITIES)


def name(rng: random.Random) -> str:
    """Return a first name, with probability 0.3 a made-up one."""
    return made_up(rng).capitalize() if rng.random() < 0.3 else rng.choice(NAMES)


def any_word(rng: random.Random) -> str:
    """Return a word to copy: a noun, adjective, name, city, made-up word, or number below 100."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NOUNS)
    if kind < 0.6:
        return rng.choice(ADJECTIVES)
    if kind < 0.7:
        return rng.choice((*NAMES, *CITIES))
    if kind < 0.93:
        return made_up(rng)
    return str(rng.randrange(100))


def listed(items: list[str]) -> str:
    """Return one or more items as a list in a sentence: with commas, and "and" before the last item."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
