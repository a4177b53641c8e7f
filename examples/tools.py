"""Tools that the built-in model can call.

    mlx-k2 chat --tools examples/tools.py

Ask "What time is it in Rome?", "How much does the lamp cost?" or "How many of the cup are in stock?"
"""

import datetime
import zoneinfo

PRICES = {"book": 12, "chair": 45, "cup": 4, "lamp": 30, "table": 99}
STOCK = {"book": 8, "chair": 0, "cup": 61, "lamp": 3, "table": 1}


def get_time(city: str) -> dict[str, str]:
    """Get the local time in a city."""
    name = city.strip().replace(" ", "_").casefold()
    for zone in sorted(zoneinfo.available_timezones()):
        if zone.casefold().rpartition("/")[2] == name:
            return {"city": city, "time": f"{datetime.datetime.now(zoneinfo.ZoneInfo(zone)):%H:%M}"}
    raise ValueError("unknown name")


def get_price(item: str) -> dict[str, str | int]:
    """Get the price of an item."""
    if item not in PRICES:
        raise ValueError("not found")
    return {"item": item, "price": PRICES[item]}


def count_stock(item: str) -> dict[str, str | int]:
    """How many of an item are in stock."""
    if item not in STOCK:
        raise ValueError("not found")
    return {"count": STOCK[item], "item": item}
