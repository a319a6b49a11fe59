"""client: asks a server of tfrec, from Python; needs httpx and nothing else of tfrec.

from tfrec.client import Client

with Client("http://127.0.0.1:8080") as client:
    for item in client.recommend(user_id="42", k=5).items:
        print(item.title, item.score)
"""

from tfrec.client.answers import (
    Accepted,
    Done,
    Event,
    Explanation,
    Forgotten,
    Imported,
    Item,
    LineError,
    Near,
    NewItem,
    Recommendations,
    Scored,
    Shelf,
    Shelves,
    User,
    Version,
)
from tfrec.client.calls import Ask
from tfrec.client.clients import AsyncClient, Client
from tfrec.client.failures import (
    AnswerError,
    ClientError,
    DeniedError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)

__all__ = [
    "Accepted",
    "AnswerError",
    "Ask",
    "AsyncClient",
    "Client",
    "ClientError",
    "DeniedError",
    "Done",
    "Event",
    "Explanation",
    "Forgotten",
    "Imported",
    "Item",
    "LineError",
    "Near",
    "NewItem",
    "NotFoundError",
    "Recommendations",
    "RefusedError",
    "Scored",
    "Shelf",
    "Shelves",
    "UnavailableError",
    "User",
    "Version",
]
